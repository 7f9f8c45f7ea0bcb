"""`metadata.json` of one build, and the digests it carries. Text in, value out; only `digest_files` touches a disk."""

from __future__ import annotations

import base64
import binascii
import hashlib
import keyword
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from . import strict
from .errors import BadMetadata
from .strict import quote
from .types import Dependency, Digest, Metadata, Provenance

MAX_BYTES = 1 << 20  # names files, not tensors: a megabyte is ten thousand files
MAX_FILES = 20_000
MAX_LIST = 256
BACKENDS = ("cann", "cpu", "cuda", "metal", "neuron", "rocm", "tpu", "xpu")
ALGORITHMS = {"sha256": 32, "sha512": 64}
UNDIGESTED = ("metadata.json", "metadata.json.sigstore")  # at the top only; the first is what a signature protects

_CURRENT_ERA = ("id", "name", "license", "backend")
_NAME = re.compile(r"[a-z][-a-z0-9]{0,126}[a-z0-9]")
_REPOSITORY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*/[A-Za-z0-9_][A-Za-z0-9._-]*")
_COMMIT = re.compile(r"[0-9a-fA-F]{40}|[0-9a-fA-F]{64}")
_MINVER = re.compile(r"([0-9]{1,6})\.([0-9]{1,6})\.([0-9]{1,6})")
_SCP = re.compile(r"(?P<user>[A-Za-z0-9._-]+)@(?P<host>[A-Za-z0-9._-]+):(?P<path>[^\s:][^\s]*)")
_SCHEMES = ("https", "http", "git", "ssh", "git+ssh", "git+https", "git+http")
_CHUNK = 1 << 20


def parse(data: bytes, *, package: str = "", path_hint: str = "") -> Metadata:
    """Read `data` strictly: every wrong value is a problem, every unknown key is ignored (later builders add some).

    Builds of older eras lack `id`, `name`, `license` or `backend`; those are made up, from `package` (`org/repo`) and
    `path_hint` (what tells two builds apart: `commit/variant`), and listed in `synthesised`. A build that has none of the four
    may also lack `version` (0) and `python-depends` (none), so that `{}` stands for a build without the file.

    Raises:
        BadMetadata: every problem at once, one a line.
    """
    what = f"metadata.json of {package}" if package else "metadata.json"
    root = strict.loads(data, what=what, max_bytes=MAX_BYTES)
    if not isinstance(root, dict):
        raise BadMetadata(f"expected an object, found {strict.kind(root)}", asked=what)
    reader = _Reader(root)
    parsed = reader.metadata(package, path_hint)
    strict.fail(reader.problems, what=what)
    return parsed


def digest_files(root: Path, algorithm: str = "sha256") -> dict[str, str]:
    """`/`-separated path to base64 digest, of every regular file below `root` in the order of their paths.

    Symlinks are followed (the hub's cache is made of them) and hashed under their own path; a link that leads back to a
    directory it is in is not entered again. Left out: `UNDIGESTED` at the top, `__pycache__` anywhere, `*.pyc`.

    Raises:
        OSError: a file cannot be read.
    """
    found = {path: _digest(file, algorithm) for path, file in _files(root, "", ()) if path not in UNDIGESTED}
    return dict(sorted(found.items()))


def compare(digest: Digest, root: Path) -> list[str]:
    """How the files below `root` differ from `digest`: algorithm, then missing or changed in order of path, then unknown files."""
    if digest.algorithm not in ALGORITHMS:
        return [f"algorithm {quote(digest.algorithm)} is none of {', '.join(ALGORITHMS)}"]
    actual = digest_files(root, digest.algorithm)
    expected = dict(digest.files)
    problems = [
        f"{path} is missing" if path not in actual else f"{path} does not have the digest that metadata.json states"
        for path in sorted(expected)
        if actual.get(path) != expected[path]
    ]
    return problems + [f"{quote(path)[1:-1]} is not listed in metadata.json" for path in actual if path not in expected]


# -- the files ----------------------------------------------------------------------------------------------------


def _files(directory: Path, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, Path]]:
    here = directory.stat()
    identity = here.st_dev, here.st_ino
    if identity in above:
        return
    with os.scandir(directory) as entries:
        names = sorted(entry.name for entry in entries)
    for name in names:
        path = directory / name
        if name == "__pycache__" or name.endswith(".pyc"):
            continue
        if path.is_dir():
            yield from _files(path, f"{prefix}{name}/", (*above, identity))
        elif path.is_file():
            yield prefix + name, path


def _digest(file: Path, algorithm: str) -> str:
    state = hashlib.new(algorithm)
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            state.update(chunk)
    return base64.b64encode(state.digest()).decode()


# -- the text -----------------------------------------------------------------------------------------------------


class _Reader:
    """One object being read; problems collect, and a value that has one is replaced by a harmless one."""

    def __init__(self, root: dict[str, Any]) -> None:
        self.root = root
        self.problems: list[str] = []

    def metadata(self, package: str, path_hint: str) -> Metadata:
        root = self.root
        old = not any(key in root for key in _CURRENT_ERA)
        may_lack = (*_CURRENT_ERA, "version", "python-depends") if old else _CURRENT_ERA
        made_up = tuple(key for key in may_lack if key not in root)
        name = self.name() if "name" in root else _name_from(package)
        return Metadata(
            name=name,
            id=self.id() if "id" in root else _id_from(name, f"{package}\n{path_hint}"),
            version=0 if "version" in made_up else self.integer(root, "version", "version"),
            license="unknown" if "license" in made_up else self.string(root, "license", "license", longest=256),
            backend=self.backend() if "backend" in root else "universal",
            archs=self.archs(),
            python_depends=() if "python-depends" in made_up else self.strings(root, "python-depends", "python-depends"),
            kernel_depends=self.kernel_depends(),
            minver=self.minver(),
            upstream=self.url("upstream"),
            source=self.url("source"),
            digest=self.digest(),
            provenance=self.provenance(),
            synthesised=made_up,
        )

    # one method per key; `where` is the key as a reader of the file would write it

    def name(self) -> str:
        name = self.string(self.root, "name", "name")
        if name and not _NAME.fullmatch(name):
            self.problems.append(f"name: {quote(name)} is not a kernel name (a-z, 0-9 and inner dashes, two characters or more)")
        return name

    def id(self) -> str:
        id_ = self.string(self.root, "id", "id", longest=128)
        if not id_:
            return id_
        if not (id_.isascii() and id_.isidentifier()) or keyword.iskeyword(id_):
            self.problems.append(f"id: {quote(id_)} is not a Python identifier")
        elif id_ in sys.stdlib_module_names or (id_.startswith("__") and id_.endswith("__")):
            self.problems.append(f"id: {quote(id_)} is the name of a module of Python itself")
        return id_

    def backend(self) -> str:
        backend = self.mapping(self.root, "backend", "backend")
        type_ = self.string(backend, "type", "backend.type") if backend is not None else ""
        if type_ and type_ not in BACKENDS:
            self.problems.append(f"backend.type: {quote(type_)} is none of {', '.join(BACKENDS)}")
        return type_

    def archs(self) -> tuple[str, ...]:
        backend = self.root.get("backend")
        if not isinstance(backend, dict) or backend.get("archs") is None:
            return ()
        return self.strings(backend, "archs", "backend.archs")

    def kernel_depends(self) -> tuple[Dependency, ...]:
        if "kernel-depends" not in self.root:
            return ()
        found = []
        for i, item in enumerate(self.items(self.root, "kernel-depends", "kernel-depends")):
            where = f"kernel-depends[{i}]"
            if not isinstance(item, dict):
                self.wrong(where, "an object", item)
                continue
            self.problems += [
                f"{where}: unknown key {quote(key)}" for key in item if key not in {"repo-id", "version", "revision"}
            ]
            name = self.string(item, "repo-id", f"{where}.repo-id", longest=200)
            if name and (not _REPOSITORY.fullmatch(name) or "--" in name or ".." in name):
                self.problems.append(f"{where}.repo-id: {quote(name)} is not `org/name`")
            if ("version" in item) is ("revision" in item):
                self.problems.append(f"{where}: exactly one of version and revision is needed")
            elif "version" in item:
                found.append(Dependency(name, version=self.integer(item, "version", f"{where}.version")))
            else:
                found.append(Dependency(name, revision=self.string(item, "revision", f"{where}.revision", longest=256)))
        return tuple(found)

    def minver(self) -> tuple[int, int, int] | None:
        text = self.optional("kernels-minver")
        match = _MINVER.fullmatch(text) if text is not None else None
        if text is not None and match is None:
            self.problems.append(f"kernels-minver: {quote(text)} is not three numbers, `1.2.3`")
        return (int(match[1]), int(match[2]), int(match[3])) if match is not None else None

    def url(self, key: str) -> str | None:
        text = self.optional(key)
        if text is None:
            return None
        scp = _SCP.fullmatch(text)
        if scp is not None and "://" not in text:
            return f"ssh://{scp['user']}@{scp['host']}/{scp['path'].lstrip('/')}"
        try:
            parts = urlsplit(text)
            good = parts.scheme in _SCHEMES and bool(parts.hostname) and not re.search(r"\s", text)
        except ValueError:  # an unclosed bracket in the host
            good = False
        if not good:
            self.problems.append(f"{key}: {quote(text)} is not the URL of a git repository")
        return text

    def digest(self) -> Digest | None:
        if self.root.get("digest") is None:
            return None
        digest = self.mapping(self.root, "digest", "digest") or {}
        algorithm = self.string(digest, "algorithm", "digest.algorithm")
        if algorithm and algorithm not in ALGORITHMS:
            self.problems.append(f"digest.algorithm: {quote(algorithm)} is none of {', '.join(ALGORITHMS)}")
        files = self.mapping(digest, "files", "digest.files") or {}
        if len(files) > MAX_FILES:
            self.problems.append(f"digest.files: {len(files)} files, at most {MAX_FILES} are read")
            files = {}
        for path, value in files.items():
            if (why := strict.path_problem(path)) is not None:
                self.problems.append(f"digest.files: the path {quote(path)} {why}")
            if not isinstance(value, str):
                self.wrong(f"digest.files[{quote(path)}]", "a string", value)
            elif algorithm in ALGORITHMS and not _is_base64(value, ALGORITHMS[algorithm]):
                self.problems.append(f"digest.files[{quote(path)}]: {quote(value)} is not a {algorithm} in base64")
        return Digest(algorithm, tuple((path, str(value)) for path, value in sorted(files.items())))

    def provenance(self) -> Provenance | None:
        if self.root.get("provenance") is None:
            return None
        provenance = self.mapping(self.root, "provenance", "provenance") or {}
        builder = self.mapping(provenance, "kernel-builder", "provenance.kernel-builder") or {}
        builder_commit, builder_dirty = self.origin(builder, "provenance.kernel-builder")
        if (builder_commit is None) is not (builder_dirty is None):
            self.problems.append("provenance.kernel-builder: commit and dirty come together or not at all")
        kernel = self.mapping(provenance, "kernel", "provenance.kernel") if provenance.get("kernel") is not None else None
        commit, dirty = self.origin(kernel or {}, "provenance.kernel")
        return Provenance(
            builder_version=self.string(builder, "version", "provenance.kernel-builder.version") if builder else "",
            builder_commit=builder_commit,
            builder_dirty=builder_dirty,
            commit=commit,
            dirty=dirty,
        )

    def origin(self, where_from: dict[str, Any], where: str) -> tuple[str | None, bool | None]:
        """`commit` (once called `sha`) and `dirty`."""
        if "sha" in where_from and "commit" in where_from:
            self.problems.append(f"{where}: `sha` is the old name of `commit`, both are given")
        key = "sha" if "sha" in where_from else "commit"
        commit = self.string(where_from, key, f"{where}.{key}") if where_from.get(key) is not None else None
        if commit and not _COMMIT.fullmatch(commit):
            self.problems.append(f"{where}.{key}: {quote(commit)} is not 40 or 64 hex digits")
        dirty = where_from.get("dirty")
        if dirty is not None and not isinstance(dirty, bool):
            self.wrong(f"{where}.dirty", "a boolean", dirty)
            dirty = None
        return commit.lower() if commit else commit, dirty

    # values by type

    def wrong(self, where: str, wanted: str, value: object) -> None:
        self.problems.append(f"{where}: expected {wanted}, found {strict.kind(value)}")

    def get(self, mapping: dict[str, Any], key: str, where: str, wanted: str, good: Callable[[Any], bool]) -> Any:
        if key not in mapping:
            self.problems.append(f"{where}: missing")
        elif not good(mapping[key]):
            self.wrong(where, wanted, mapping[key])
        else:
            return mapping[key]
        return None

    def string(self, mapping: dict[str, Any], key: str, where: str, *, longest: int = 512) -> str:
        value: str | None = self.get(mapping, key, where, "a string", lambda v: isinstance(v, str))
        if value is None:
            return ""
        if not value or not value.isprintable() or len(value) > longest:
            why = "is empty" if not value else f"is longer than {longest}" if len(value) > longest else "cannot be printed"
            self.problems.append(f"{where}: {quote(value)} {why}")
        return value

    def optional(self, key: str) -> str | None:
        return None if self.root.get(key) is None else self.string(self.root, key, key, longest=strict.MAX_STRING) or None

    def integer(self, mapping: dict[str, Any], key: str, where: str) -> int:
        value: int | None = self.get(
            mapping, key, where, "a whole number", lambda v: isinstance(v, int) and not isinstance(v, bool)
        )
        if value is not None and not 0 <= value < 1 << 31:
            self.problems.append(f"{where}: {quote(value)} is out of range, expected a whole number from 0 on")
        return value or 0

    def mapping(self, mapping: dict[str, Any], key: str, where: str) -> dict[str, Any] | None:
        value: dict[str, Any] | None = self.get(mapping, key, where, "an object", lambda v: isinstance(v, dict))
        return value

    def items(self, mapping: dict[str, Any], key: str, where: str) -> list[Any]:
        value: list[Any] = self.get(mapping, key, where, "a list", lambda v: isinstance(v, list)) or []
        if len(value) > MAX_LIST:
            self.problems.append(f"{where}: {len(value)} entries, at most {MAX_LIST} are read")
        return value[:MAX_LIST]

    def strings(self, mapping: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
        items = self.items(mapping, key, where)
        return tuple(self.string({"": item}, "", f"{where}[{i}]", longest=128) for i, item in enumerate(items))


def _is_base64(text: str, size: int) -> bool:
    try:
        return len(base64.b64decode(text, validate=True)) == size and text.isascii()
    except (binascii.Error, ValueError):
        return False


def _name_from(package: str) -> str:
    name = re.sub(r"[^a-z0-9]+", "-", package.rpartition("/")[2].lower()).strip("-").lstrip("0123456789-")[:64].rstrip("-")
    return name if _NAME.fullmatch(name) else "kernel"


def _id_from(name: str, tells_apart: str) -> str:
    unique = hashlib.sha256(tells_apart.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"_{name.replace('-', '_')}_{unique}"
