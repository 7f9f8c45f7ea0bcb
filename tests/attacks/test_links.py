"""Links: out of the repository, in place of verified files, and swapped in between the look and the use."""

import os
import stat

import pytest
from tests.kernel_files import Folder, snapshot

from kernelswap.errors import Refused, StoreError, Tampered
from kernelswap.types import Evidence


def test_a_link_out_of_the_build(world, refused):
    build = world.build({"__init__.py": ""})
    (build / "data.txt").symlink_to(world.outside / "secret.txt")
    (build / "dir").symlink_to(world.outside, target_is_directory=True)
    error = refused(Refused, "'data.txt' is a symbolic link", lambda: world.put(build))
    assert "'dir' is a symbolic link" in str(error)


def test_a_hard_link_to_somebodys_file_is_refused_and_that_file_stays_writable(world, refused):
    class Links(Folder):
        def fetch(self, candidate, into):
            super().fetch(candidate, into)
            os.link(world.outside / "secret.txt", into / "data.txt")

    build = world.build({"__init__.py": ""}, digest=False)
    mode = (world.outside / "secret.txt").stat().st_mode
    refused(Refused, "hard link", lambda: world.put(build, source=Links(build)))
    assert (world.outside / "secret.txt").stat().st_mode == mode
    assert (world.outside / "secret.txt").stat().st_nlink == 1


def test_a_file_swapped_for_a_link_after_it_was_stored(world, refused):
    artifact = world.put(world.build({"__init__.py": "", "layers.py": "V = 1\n"}))
    path = artifact.path / "layers.py"
    path.unlink()
    path.symlink_to(world.outside / "evil.py")
    refused(Tampered, r"'layers\.py' cannot be read", lambda: world.load(artifact))


def test_a_link_to_equal_bytes_is_refused_too_since_they_can_change_later(world, refused):
    artifact = world.put(world.build({"__init__.py": "", "layers.py": "V = 1\n"}))
    twin = world.root / "twin.py"
    twin.write_text("V = 1\n")
    (artifact.path / "layers.py").unlink()
    (artifact.path / "layers.py").symlink_to(twin)
    refused(Tampered, r"'layers\.py'", lambda: world.load(artifact))


def test_the_whole_artifact_swapped_for_a_link(world, refused):
    artifact = world.put(world.build({"__init__.py": "V = 1\n"}))
    other = world.root / "elsewhere"
    artifact.path.rename(other)
    artifact.path.symlink_to(other)
    refused(Tampered, "is a link", lambda: world.load(artifact))


@pytest.mark.parametrize("how", ["rewritten", "link", "gone"])
def test_swapped_between_the_check_and_the_import(world, how):
    """The attacker wins the race: every hash was right, then the file changes, then it is imported."""
    artifact = world.put(world.build({"__init__.py": "from . import layers\n", "layers.py": "V = 1\n"}))
    path = artifact.path / "layers.py"
    honest = world.store.reverify

    def checks_then_loses_the_race(a):
        files = honest(a)
        path.unlink()
        if how == "rewritten":
            path.write_text(world.evil)
        elif how == "link":
            path.symlink_to(world.outside / "evil.py")
        return files

    from kernelswap import loader

    with pytest.raises(Tampered, match=r"layers\.py"):
        loader.load(artifact, reverify=checks_then_loses_the_race)
    assert loader.loaded() == ()


def test_swapped_while_it_is_being_verified(world, refused):
    class LosesTheRace:
        def check(self, candidate, metadata, staged):
            path = staged / "__init__.py"
            path.chmod(stat.S_IRUSR | stat.S_IWUSR)
            path.write_text(world.evil)
            return Evidence("loses", "fine, a moment ago")

    build = world.build({"__init__.py": "V = 1\n"})
    refused(Refused, "files changed while they were verified", lambda: world.put(build, [LosesTheRace()]))


def test_swapped_long_after_the_import_before_a_late_import(world):
    artifact = world.put(
        world.build({"__init__.py": "def late():\n    from . import later\n    return later.V\n", "later.py": "V = 1\n"})
    )
    module = world.load(artifact)
    path = artifact.path / "later.py"
    path.chmod(0o644)
    path.write_text(world.evil)
    with pytest.raises(Tampered, match=r"later\.py was changed since it was verified"):
        module.late()
    with pytest.raises(Tampered):
        module.late()


def test_a_file_added_after_the_check_does_not_exist_for_the_kernel(world):
    code = "def late():\n    from . import extra\n"
    artifact = world.put(world.build({"__init__.py": code}))
    module = world.load(artifact)
    (artifact.path / "extra.py").write_text(world.evil)
    with pytest.raises(ImportError):
        module.late()


def test_the_cache_itself_may_be_a_link_that_the_user_made(world, tmp_path):
    from kernelswap.store import Store

    (tmp_path / "big-disk").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "big-disk")
    world.store = Store(tmp_path / "linked")
    artifact = world.put(world.build({"__init__.py": "V = 1\n"}))
    assert world.load(artifact).V == 1


def test_staging_that_is_a_link_elsewhere_by_the_users_own_hand_is_crossed(world):
    other = world.root / "other-disk"
    other.mkdir()
    world.store.cache.mkdir()
    (world.store.cache / "staging").symlink_to(other)
    before = snapshot(world.outside)
    try:
        artifact = world.put(world.build({"__init__.py": "V = 1\n"}))
        assert world.load(artifact).V == 1
    except StoreError:
        pytest.fail("a staging directory on another disk must work")
    assert snapshot(world.outside) == before
