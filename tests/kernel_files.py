"""Small kernel repositories for the tests of store, verifiers and loader: plain files, no compiler, no network."""

import base64
import hashlib
import json
import shutil
from pathlib import Path

from kernelswap import metadata as metadata_file
from kernelswap.types import Candidate, Requirement

INIT = "from . import layers\n\n\ndef double(x):\n    return x + x\n"
LAYERS = "VALUE = 1\n"


def write(root, files=None, *, name="my-norm", id_="_my_norm_cpu_0a1b2c3", digest=True, **extra):
    """One build directory with metadata that fits; returns it."""
    root = Path(root)
    root.mkdir(parents=True)
    for path, text in (files if files is not None else {"__init__.py": INIT, "layers.py": LAYERS}).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(text if isinstance(text, bytes) else text.encode())
    about = {"name": name, "id": id_, "version": 1, "license": "MIT", "python-depends": [], "backend": {"type": "cpu"}, **extra}
    if digest:
        about["digest"] = {"algorithm": "sha256", "files": metadata_file.digest_files(root)}
    (root / "metadata.json").write_text(json.dumps(about))
    return root


def b64(data):
    return base64.b64encode(hashlib.sha256(data).digest()).decode()


def candidate(name="org/my-norm", *, commit="c" * 40, variant="torch-cpu", source="test", layer=None):
    return Candidate(Requirement(name, source="hub", version=1, layer=layer), source, name, commit, variant)


def metadata_of(root, name="org/my-norm"):
    path = root / "metadata.json"
    return metadata_file.parse(path.read_bytes() if path.exists() else b"{}", package=name)


class Folder:
    """A Source of one build directory, copied byte for byte, links and all. `fetched` counts."""

    def __init__(self, root):
        self.root, self.fetched = root, 0

    def find(self, requirement):
        return [], []

    def read(self, candidate, name):
        path = self.root / name
        return path.read_bytes() if path.exists() else None

    def fetch(self, candidate, into):
        self.fetched += 1
        shutil.copytree(self.root, into, symlinks=True, dirs_exist_ok=True)


def snapshot(root):
    """Everything below `root` as a value, to show that nothing changed. Empty working directories do not count."""
    found = {}
    for path in sorted(Path(root).rglob("*")):
        if path.is_symlink():
            found[path.relative_to(root).as_posix()] = ("link", str(path.readlink()))
        elif path.is_file():
            found[path.relative_to(root).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return {path: content for path, content in found.items() if not path.startswith("locks/")}
