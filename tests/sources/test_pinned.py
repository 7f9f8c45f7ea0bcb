from dataclasses import replace

import pytest
from tests.contract.sources import SourceContract, Subject
from tests.hub import kernel_files

from kernelswap import tree
from kernelswap.errors import Refused, UnknownKernel
from kernelswap.lock import Lock, Locked, LockedBuild
from kernelswap.sources.directory import DirectorySource
from kernelswap.sources.pinned import Pinned
from kernelswap.types import Requirement

VARIANTS = {"torch-cpu": "x = 1", "torch-cuda": "x = 2"}


@pytest.fixture
def root(make_repo):
    return make_repo("demo", {"torch-cpu": "x = 1"})


def locked(root, *, files=None, tree_digest=None, variant="torch-cpu"):
    (candidate,) = DirectorySource().find(Requirement(str(root)))[0]
    build = LockedBuild(variant, tree=tree_digest, files=tuple((files or {}).items()))
    return Lock((Locked(str(root), candidate.commit, version=1, builds=(build,)),))


class TestLocked(SourceContract):
    @pytest.fixture
    def subject(self, root, tmp_path):
        files = {p.removeprefix("build/torch-cpu/"): d for p, d in kernel_files("torch-cpu", "x = 1").items()}
        lock = locked(
            root, files=tree.hashes(root / "build" / "torch-cpu"), tree_digest=tree.digest(root / "build" / "torch-cpu")
        )
        unknown = Requirement(str(tmp_path / "other"))
        return Subject(Pinned(DirectorySource(), lock), Requirement(str(root), version=1), {"torch-cpu": files}, unknown)

    def test_the_commit_is_the_locked_one(self, subject):
        (candidate,) = subject.source.find(subject.known)[0]
        assert candidate.commit == subject.source.lock.entries[0].commit

    def test_another_version_than_the_locked_one_is_unknown(self, subject):
        with pytest.raises(UnknownKernel, match=r"the lock has .*@1 at local-"):
            subject.source.find(Requirement(subject.known.name, version=2))


def test_a_changed_directory_is_not_the_locked_one(root):
    lock = locked(root)
    (root / "build" / "torch-cpu" / "__init__.py").write_text("x = 3")
    with pytest.raises(UnknownKernel, match="has local-"):
        Pinned(DirectorySource(), lock).find(Requirement(str(root), version=1))


def test_every_difference_from_the_locked_digests_is_named(root, tmp_path):
    right = tree.hashes(root / "build" / "torch-cpu")
    lock = locked(root, files={"__init__.py": "0" * 64, "gone.py": "1" * 64})
    source = Pinned(DirectorySource(), lock)
    (candidate,) = source.find(Requirement(str(root), version=1))[0]
    (tmp_path / "into").mkdir()
    with pytest.raises(Refused) as e:
        source.fetch(candidate, tmp_path / "into")
    assert e.value.found.splitlines() == [
        "gone.py is missing",
        "__init__.py differs from the lock",
        "metadata.json is not in the lock",
    ]
    assert right


def test_a_tree_digest_alone_is_enough(root, tmp_path):
    source = Pinned(DirectorySource(), locked(root, tree_digest="0" * 64))
    (candidate,) = source.find(Requirement(str(root), version=1))[0]
    (tmp_path / "into").mkdir()
    with pytest.raises(Refused, match="the lock states the tree 0000"):
        source.fetch(candidate, tmp_path / "into")


def test_only_locked_builds_are_offered(make_repo):
    root = make_repo("demo", VARIANTS)
    lock = Lock((Locked(str(root), next(iter(DirectorySource().find(Requirement(str(root)))[0])).commit),))
    found, _ = Pinned(DirectorySource(), lock).find(Requirement(str(root)))
    assert len(found) == 1


def test_a_lax_lock_lets_the_rest_through_with_a_note(root):
    source = Pinned(DirectorySource(), Lock(), strict=False)
    found, notes = source.find(Requirement(str(root)))
    assert len(found) == 1
    assert "is not in the lock" in notes[0]


def test_a_locked_commit_that_redirects_is_not_the_locked_one(root):
    """A commit names bytes; what a redirect leads to is other bytes, whoever publishes them."""

    class Redirects(DirectorySource):
        def find(self, requirement):
            found, notes = DirectorySource().find(Requirement(str(root)))
            return [replace(c, commit="local-" + "0" * 64) for c in found], notes

    with pytest.raises(UnknownKernel, match="that commit redirects to"):
        Pinned(Redirects(), locked(root)).find(Requirement(str(root), version=1))
