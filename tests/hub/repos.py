"""What the hub holds: repositories as dicts of files, with branches, tags and commits. No HTTP here."""

import base64
import hashlib
import json
from dataclasses import dataclass, field

LFS_FROM = 1024  # bytes; the hub's own limit is 10 MB, tests want redirects with small files


def as_bytes(value):
    return value.encode() if isinstance(value, str) else bytes(value)


def blob_id(data):
    """What git calls the blob: the ETag of small files."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_lfs(path, data):
    return len(data) >= LFS_FROM or path.endswith((".so", ".safetensors", ".bin"))


@dataclass
class Repo:
    """One repository. Every change makes a commit; a commit is a dict of files that never changes again."""

    name: str
    type: str = "kernel"
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    other: dict[str, str] = field(default_factory=dict)
    """Refs that are neither, `refs/pr/1`."""

    def commit(self, files):
        """A commit that no branch points to. Returns its 40 hex digits."""
        stored = {path: as_bytes(data) for path, data in files.items()}
        seed = json.dumps([self.name, len(self.commits), sorted((p, blob_id(d)) for p, d in stored.items())])
        commit = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[commit] = stored
        return commit

    def branch(self, name, files):
        """Make or move a branch; `files` is everything it holds afterwards. Returns the commit."""
        self.branches[name] = self.commit(files)
        return self.branches[name]

    def tag(self, name, target):
        """Tag a branch, a commit, or a dict of files. Returns the commit."""
        self.tags[name] = self.commit(target) if isinstance(target, dict) else self.resolve(target)
        return self.tags[name]

    def pull_request(self, number, files):
        """`refs/pr/N`. Returns the commit."""
        self.other[f"refs/pr/{number}"] = self.commit(files)
        return self.other[f"refs/pr/{number}"]

    def resolve(self, revision):
        """Commit of a branch, tag, other ref or (full) commit; None when there is none."""
        known = {**self.other, **self.tags, **self.branches}
        return known.get(revision) or (revision if revision in self.commits else None)

    def refs(self):
        return {
            "branches": [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in self.branches.items()],
            "tags": [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": c} for n, c in self.tags.items()],
            "converts": [],
        }

    def tree(self, commit, under, *, recursive):
        """Entries as the tree API gives them; None when there is no such folder."""
        prefix = f"{under}/" if under else ""
        inside = {p: d for p, d in self.commits[commit].items() if p.startswith(prefix)}
        if under and not inside:
            return None
        entries, seen = [], set()
        for path, data in sorted(inside.items()):
            parts = path[len(prefix) :].split("/")
            for depth in range(1, len(parts)):
                folder = prefix + "/".join(parts[:depth])
                if folder not in seen and (recursive or depth == 1):
                    entries.append({"type": "directory", "path": folder, "oid": blob_id(folder.encode()), "size": 0})
                    seen.add(folder)
            if recursive or len(parts) == 1:
                entry = {"type": "file", "path": path, "oid": blob_id(data), "size": len(data)}
                if is_lfs(path, data):
                    sha = hashlib.sha256(data).hexdigest()
                    entry["lfs"] = {"oid": sha, "size": len(data), "pointerSize": 130}
                entries.append(entry)
        return entries


def kernel_files(variant, code="", *, name="demo", version=1, backend=None, files=None, metadata=None, unique="0a1b2c3"):
    """`build/<variant>/` of a kernel with a right digest, as a dict of paths to bytes.

    `code` is `__init__.py`; `files` are further files of the build; `metadata` overrides or (with None) drops keys.
    """
    if backend is None:
        found = [b for b in ("cuda", "cu1", "rocm", "metal", "xpu", "npu", "cann", "neuron", "tpu", "cpu") if b in variant]
        backend = {"cu1": "cuda", "npu": "cann"}.get(found[0], found[0]) if found else "cpu"
    inside = {"__init__.py": as_bytes(code), **{p: as_bytes(d) for p, d in (files or {}).items()}}
    content = {
        "name": name,
        "id": f"_{name.replace('-', '_')}_{backend}_{unique}",
        "version": version,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {p: base64.b64encode(hashlib.sha256(d).digest()).decode() for p, d in sorted(inside.items())},
        },
    }
    content.update(metadata or {})
    inside["metadata.json"] = json.dumps({k: v for k, v in content.items() if v is not None}).encode()
    return {f"build/{variant}/{path}": data for path, data in inside.items()}
