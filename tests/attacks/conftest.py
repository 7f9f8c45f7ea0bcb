"""A world to attack: a store, files outside of it, and a way to show that a refusal changed none of it.

Hostile code sets `builtins.attacked`; every test ends by showing that nothing did.
"""

import builtins
import sys
from pathlib import Path

import pytest
from tests.kernel_files import Folder, candidate, metadata_of, snapshot, write

from kernelswap import loader
from kernelswap.store import Store


class World:
    evil = "import builtins\nbuiltins.attacked = True\n"

    def __init__(self, root):
        self.root = root
        self.store = Store(root / "cache")
        self.outside = root / "outside"
        self.outside.mkdir()
        (self.outside / "secret.txt").write_text("secret")
        (self.outside / "evil.py").write_text(self.evil)
        self.number = 0

    def build(self, files, **about):
        self.number += 1
        return write(self.root / f"repo{self.number}", files, **about)

    def put(self, build, verifiers=(), source=None, metadata=None, **names):
        return self.store.materialize(candidate(**names), metadata or metadata_of(build), source or Folder(build), verifiers)

    def load(self, artifact):
        return loader.load(artifact, reverify=self.store.reverify).module

    def state(self):
        """Everything that an attack could have changed and that is not the attacker's own."""
        cwd = sorted(Path().iterdir())
        modules = set(sys.modules)
        return snapshot(self.root / "cache"), snapshot(self.outside), cwd, modules, list(sys.meta_path), loader.loaded()


@pytest.fixture
def world(tmp_path, monkeypatch):
    packages = set(loader._finder.packages)  # what other tests of this process loaded stays importable
    monkeypatch.setattr(loader, "_loaded", {})
    monkeypatch.setattr(builtins, "attacked", False, raising=False)
    world = World(tmp_path)
    before = set(sys.modules)
    yield world
    for name in set(loader._finder.packages) - packages:
        loader._forget(name)
    assert builtins.attacked is False
    assert not {m for m in set(sys.modules) - before if m.startswith("_my_norm")}


@pytest.fixture
def refused(world):
    """`refused(error, match, call)`: the call raises that, and the world is as it was before."""

    def check(error, match, call):
        before = world.state()
        with pytest.raises(error, match=match) as e:
            call()
        assert world.state() == before
        return e.value

    return check
