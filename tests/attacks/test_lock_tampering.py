"""A lock that was edited, or a repository that changed behind one."""

import pytest
from tests.kernel_files import Folder

from kernelswap import tree
from kernelswap.errors import Refused
from kernelswap.lock import Lock, Locked, LockedBuild
from kernelswap.policy import Policy
from kernelswap.sources.pinned import Pinned
from kernelswap.verifiers.policy import PolicyVerifier

ONLY_LOCKED = Policy(locked_only=True, sources=("test",))


@pytest.fixture
def build(world):
    return world.build({"__init__.py": "V = 1\n"})


def lock(build, *, commit="c" * 40, state=None, files=(), name="org/my-norm"):
    return Lock((Locked(name, commit, version=1, builds=(LockedBuild("torch-cpu", state or tree.digest(build), tuple(files)),)),))


def test_the_honest_lock_loads(world, build):
    assert world.load(world.put(build, [PolicyVerifier(ONLY_LOCKED, lock(build))])).V == 1


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"commit": "d" * 40}, "the lock has it at dddddddddddd"),
        ({"state": "0" * 64}, "the lock states the tree"),
        ({"name": "org/other"}, "no lock names it"),
    ],
)
def test_an_edited_entry(world, build, refused, changed, why):
    verifier = PolicyVerifier(ONLY_LOCKED, lock(build, **changed))
    refused(Refused, why, lambda: world.put(build, [verifier]))


def test_an_edited_list_of_files(world, build, refused):
    source = Pinned(Folder(build), lock(build, files=[("__init__.py", "0" * 64)]))
    refused(Refused, r"__init__\.py", lambda: world.put(build, source=source))


def test_bytes_that_changed_under_a_locked_commit(world, build, refused):
    honest = lock(build)
    other = world.build({"__init__.py": world.evil})
    refused(Refused, "the lock states the tree", lambda: world.put(other, [PolicyVerifier(ONLY_LOCKED, honest)]))
    refused(Refused, "the lock states the tree", lambda: world.put(other, source=Pinned(Folder(other), honest)))


def test_an_artifact_that_was_stored_before_the_lock_said_otherwise(world, refused):
    """The commit is the same, the bytes are not: a forged history, or an index that points to the wrong artifact."""
    stored = world.put(world.build({"__init__.py": world.evil}))
    honest = lock(world.build({"__init__.py": "V = 1\n"}))
    verifier = PolicyVerifier(ONLY_LOCKED, honest)
    refused(Refused, "the lock states the tree", lambda: world.store.known(stored.candidate, [verifier]))
