import os

import pytest
from tests.contract.sources import SourceContract, Subject, on_disk
from tests.hub import kernel_files

from kernelswap import tree
from kernelswap.errors import Refused, UnknownKernel
from kernelswap.sources.directory import DirectorySource
from kernelswap.spec import parse
from kernelswap.types import Requirement

VARIANTS = {"torch-cpu": "x = 1", "torch-cuda": {"code": "x = 2", "files": {"deep/data.json": "{}"}}}


def of(path, **more):
    return Requirement(str(path), source="dir", **more)


def subject_of(root, at=None):
    builds = {}
    for variant, given in VARIANTS.items():
        keywords = given if isinstance(given, dict) else {"code": given}
        prefix = f"build/{variant}/"
        builds[variant] = {p.removeprefix(prefix): d for p, d in kernel_files(variant, name=root.name, **keywords).items()}
    return Subject(DirectorySource(), of(at or root), builds, of(root.parent / "absent"))


class TestRepository(SourceContract):
    @pytest.fixture
    def subject(self, make_repo, tmp_path):
        (tmp_path / "repos").mkdir()
        (tmp_path / "repos" / "outside.txt").write_text("secret")
        root = make_repo("demo", VARIANTS)
        cached = root / "build" / "torch-cpu" / "__pycache__"
        cached.mkdir()
        (cached / "x.pyc").write_bytes(b"cached")
        return subject_of(root)


class TestFolderOfBuilds(SourceContract):
    @pytest.fixture
    def subject(self, make_repo):
        root = make_repo("demo", VARIANTS)
        return subject_of(root, root / "build")


def test_one_build_is_taken_under_its_own_name(make_repo):
    root = make_repo("demo", VARIANTS)
    found, _ = DirectorySource().find(of(root / "build" / "torch-cuda"))
    assert [c.variant for c in found] == ["torch-cuda"]


@pytest.mark.parametrize(
    ("metadata", "variant"),
    [({}, "torch-cpu"), ({"backend": {"type": "cann"}}, "torch-npu"), ({"backend": None}, "torch-universal")],
)
def test_a_build_under_another_name_is_what_its_metadata_says(make_repo, tmp_path, metadata, variant):
    root = make_repo("demo", {"torch-cpu": {"metadata": metadata}})
    (root / "build" / "torch-cpu").rename(tmp_path / "my-own")
    found, _ = DirectorySource().find(of(tmp_path / "my-own"))
    assert [c.variant for c in found] == [variant]


def test_the_commit_is_the_digest_of_what_fetch_copies(make_repo, tmp_path):
    source = DirectorySource()
    (candidate,) = source.find(of(make_repo("demo", {"torch-cpu": "x = 1"})))[0]
    (tmp_path / "into").mkdir()
    source.fetch(candidate, tmp_path / "into")
    assert candidate.commit == f"local-{tree.digest(tmp_path / 'into')}"


def test_an_edited_file_is_another_candidate_and_the_old_one_is_not_fetched(make_repo, tmp_path):
    root = make_repo("demo", {"torch-cpu": "x = 1"})
    source = DirectorySource()
    (before,) = source.find(of(root))[0]
    (root / "build" / "torch-cpu" / "__init__.py").write_text("x = 2")
    (after,) = source.find(of(root))[0]
    assert before.commit != after.commit
    (tmp_path / "into").mkdir()
    with pytest.raises(UnknownKernel, match="changed"):
        source.fetch(before, tmp_path / "into")


def test_bytecode_beside_the_sources_does_not_make_another_candidate(make_repo):
    root = make_repo("demo", {"torch-cpu": "x = 1"})
    source = DirectorySource()
    before = source.find(of(root))[0]
    (root / "build" / "torch-cpu" / "__pycache__").mkdir()
    (root / "build" / "torch-cpu" / "__pycache__" / "a.cpython-311.pyc").write_bytes(b"x")
    assert source.find(of(root))[0] == before


def test_a_link_within_the_repository_is_followed(make_repo, tmp_path):
    root = make_repo("demo", {"torch-cpu": "x = 1"})
    (root / "shared.py").write_text("y = 1")
    (root / "build" / "torch-cpu" / "shared.py").symlink_to("../../shared.py")
    source = DirectorySource()
    (candidate,) = source.find(of(root))[0]
    (tmp_path / "into").mkdir()
    source.fetch(candidate, tmp_path / "into")
    assert on_disk(tmp_path / "into")["shared.py"] == b"y = 1"
    assert not (tmp_path / "into" / "shared.py").is_symlink()


@pytest.mark.parametrize("target", ["/etc/passwd", "../../../secret", "no/such/file", "/etc"])
def test_a_link_that_leads_out_is_refused_and_nothing_is_copied(make_repo, tmp_path, target):
    root = make_repo("demo", {"torch-cpu": "x = 1"})
    (tmp_path / "repos" / "secret").write_text("secret")
    (root / "build" / "torch-cpu" / "leak").symlink_to(target)
    with pytest.raises(Refused, match="leak is a link"):
        DirectorySource().find(of(root))


def test_a_device_in_a_build_is_refused(make_repo):
    root = make_repo("demo", {"torch-cpu": "x = 1"})
    os.mkfifo(root / "build" / "torch-cpu" / "pipe")
    with pytest.raises(Refused, match="pipe is not a file"):
        DirectorySource().find(of(root))


def test_a_snapshot_of_the_hub_cache_is_a_repository(tmp_path):
    """Other loaders hand over snapshot directories, whose files are links to blobs beside them."""
    snapshot = tmp_path / "kernels--org--demo" / "snapshots" / ("0" * 40)
    blobs = tmp_path / "kernels--org--demo" / "blobs"
    blobs.mkdir(parents=True)
    for number, (path, data) in enumerate(kernel_files("torch-cpu", "x = 1").items()):
        (blobs / str(number)).write_bytes(data)
        (snapshot / path).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / path).symlink_to(os.path.relpath(blobs / str(number), (snapshot / path).parent))
    source = DirectorySource()
    (candidate,) = source.find(of(snapshot))[0]
    (tmp_path / "into").mkdir()
    source.fetch(candidate, tmp_path / "into")
    assert on_disk(tmp_path / "into")["__init__.py"] == b"x = 1"


def test_constraints_are_held_against_the_version_in_the_metadata(make_repo):
    root = make_repo("demo", {"torch-cpu": {"version": 2}, "torch-cuda": {"version": 3}})
    found, _ = DirectorySource().find(of(root, constraints=">=2,<3"))
    assert [c.variant for c in found] == ["torch-cpu"]
    with pytest.raises(UnknownKernel, match="has version 2, version 3"):
        DirectorySource().find(of(root, constraints=">=4"))


def test_a_revision_is_a_commit_as_given_here(make_repo):
    root = make_repo("demo", {"torch-cpu": "x = 1"})
    (candidate,) = DirectorySource().find(of(root))[0]
    assert DirectorySource().find(of(root, revision=candidate.commit))[0][0].commit == candidate.commit
    with pytest.raises(UnknownKernel, match=candidate.commit):
        DirectorySource().find(of(root, revision="main"))


def test_sources_without_builds_are_a_note(tmp_path):
    (tmp_path / "build.toml").write_text("[general]")
    found, notes = DirectorySource().find(of(tmp_path))
    assert found == ()
    assert "kernelswap build" in notes[0]


def test_a_directory_without_builds_and_one_that_is_misspelt(tmp_path, make_repo):
    with pytest.raises(UnknownKernel, match="has no build"):
        DirectorySource().find(of(tmp_path))
    make_repo("activation", VARIANTS, where=tmp_path)
    with pytest.raises(UnknownKernel, match=r"did you mean .*activation\?"):
        DirectorySource().find(of(tmp_path / "activaton"))


def test_a_spec_with_a_path_is_found(make_repo):
    root = make_repo("demo", VARIANTS)
    assert len(DirectorySource().find(parse(f"dir://{root}@1:Layer"))[0]) == 2
    assert len(DirectorySource().find(parse(str(root)))[0]) == 2
