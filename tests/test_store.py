import dataclasses
import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import filelock
import pytest
from tests.kernel_files import Folder, candidate, metadata_of, snapshot, write

from kernelswap import record, tree
from kernelswap.errors import Refused, StoreError, Tampered, Unreachable
from kernelswap.store import Store, tree_digest
from kernelswap.types import Evidence


@pytest.fixture
def build(tmp_path):
    return write(tmp_path / "repo")


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "cache")


def put(store, build, verifiers=(), depends=(), source=None, **names):
    return store.materialize(candidate(**names), metadata_of(build), source or Folder(build), verifiers, depends)


# -- in and out ---------------------------------------------------------------------------------------------------


def test_a_build_arrives_whole_read_only_and_under_the_name_of_its_digest(store, build):
    artifact = put(store, build)
    assert artifact.path == store.cache / "artifacts" / artifact.digest
    assert artifact.digest == tree_digest(artifact.path) == tree_digest(build)
    assert {p.name for p in artifact.path.iterdir()} == {"__init__.py", "layers.py", "metadata.json"}
    assert all(stat.S_IMODE(p.stat().st_mode) == 0o444 for p in artifact.path.iterdir())
    assert [e.verifier for e in artifact.evidence] == ["contents", "digest"]
    assert not list((store.cache / "staging").iterdir())


def test_what_is_here_is_known_again_equal_and_without_a_request(store, build):
    artifact = put(store, build)
    assert Store(store.cache).known(candidate()) == artifact
    source = Folder(build)
    assert put(store, build, source=source) == artifact
    assert source.fetched == 0


def test_nothing_is_known_of_another_commit_variant_source_or_name(store, build):
    put(store, build)
    for other in ({"commit": "d" * 40}, {"variant": "torch-cuda"}, {"source": "dir"}, {"name": "org/other"}):
        assert store.known(candidate(**other)) is None


def test_two_candidates_with_equal_bytes_share_one_artifact(store, build):
    first, second = put(store, build), put(store, build, commit="d" * 40)
    assert first.path == second.path
    assert first.candidate != second.candidate
    assert len(list((store.cache / "artifacts").iterdir())) == 1


def test_a_build_of_an_old_era_is_known_with_the_metadata_it_was_given(store, tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    (old / "__init__.py").write_text("x = 1\n")
    artifact = put(store, old)
    assert artifact.metadata.synthesised
    assert Evidence("digest", "no digest published") in artifact.evidence
    assert Store(store.cache).known(candidate()) == artifact


def test_dependencies_come_back_with_the_kernel_and_follow_the_last_resolution(store, build, tmp_path):
    below = put(store, write(tmp_path / "base", name="base"), name="org/base")
    newer = put(store, write(tmp_path / "base2", name="base", version=2), name="org/base", commit="d" * 40)
    artifact = put(store, build, depends=(below,))
    assert store.known(candidate()).depends == (below,)
    source = Folder(build)
    assert put(store, build, depends=(newer,), source=source) == dataclasses.replace(artifact, depends=(newer,))
    assert source.fetched == 0
    assert store.known(candidate()).depends == (newer,)
    store.remove(newer)
    assert store.known(candidate()) is None  # half a kernel is none


def test_entries_and_remove(store, build, tmp_path):
    a, b = put(store, build), put(store, write(tmp_path / "b", name="other"), name="org/other")
    assert store.entries() == (a, b)
    store.remove(a)
    assert store.entries() == (b,)
    assert store.known(candidate()) is None
    assert not a.path.exists()
    assert store.verify_all() == {b.digest: None}


def test_the_tree_digest_counts_names_and_bytes_and_nothing_else(tmp_path):
    a = write(tmp_path / "a", {"x.py": "1", "d/y.py": "2"})
    b = write(tmp_path / "b", {"d/y.py": "2", "x.py": "1"})
    (b / "empty").mkdir()
    os.utime(b / "x.py", (1, 1))
    assert tree_digest(a) == tree_digest(b)
    (b / "x.py").rename(b / "z.py")
    assert tree_digest(a) != tree_digest(b)


# -- refusals leave nothing ---------------------------------------------------------------------------------------


class Says:
    def __init__(self, no, name="test"):
        self.no, self.name, self.asked = no, name, 0

    def check(self, candidate, metadata, staged):
        self.asked += 1
        if self.no:
            raise Refused(self.no)
        return Evidence(self.name, "fine")


def test_every_problem_of_every_verifier_is_in_one_refusal_and_nothing_is_left(store, build):
    (build / "layers.py").write_text("VALUE = 2\n")
    with pytest.raises(Refused) as e:
        put(store, build, [Says("wrong publisher"), Says("wrong signer"), Says(None)])
    for part in ("layers.py", "wrong publisher", "wrong signer", "org/my-norm@1", "torch-cpu"):
        assert part in str(e.value)
    assert snapshot(store.cache) == {}


def test_a_verifier_is_asked_again_for_what_is_already_here(store, build):
    artifact = put(store, build, [Says(None)])
    before = snapshot(store.cache)
    with pytest.raises(Refused, match="not today"):
        put(store, build, [Says("not today")])
    with pytest.raises(Refused, match="not today"):
        store.known(candidate(), [Says("not today")])
    assert store.known(candidate()) == artifact
    assert snapshot(store.cache) == before


def test_a_precheck_refuses_before_anything_is_fetched(store, build):
    class Early(Says):
        def precheck(self, candidate, metadata):
            raise Refused("unknown publisher")

    source = Folder(build)
    with pytest.raises(Refused, match="unknown publisher"):
        put(store, build, [Early(None)], source=source)
    assert source.fetched == 0
    assert not store.cache.exists()


def test_metadata_that_changed_between_choosing_and_fetching_is_refused(store, build, tmp_path):
    judged = metadata_of(build)
    other = write(tmp_path / "other", **{"python-depends": ["einops"]})
    with pytest.raises(Refused, match="not the one that this build was chosen by"):
        store.materialize(candidate(), judged, Folder(other))
    assert snapshot(store.cache) == {}


# -- before import ------------------------------------------------------------------------------------------------


def age(store, artifact):
    """As if the manifest had been written a minute later than the files: past any clock tick."""
    path = store.cache / "manifests" / f"{artifact.digest}.json"
    later = path.stat().st_mtime_ns + 60_000_000_000
    os.utime(path, ns=(later, later))


def change(path, data):
    path.chmod(0o644)
    path.write_bytes(data)
    path.chmod(0o444)


@pytest.mark.parametrize("old", [False, True], ids=["just stored", "stored long ago"])
def test_changed_missing_and_added_files_are_all_named(store, build, old):
    artifact = put(store, build)
    if old:
        age(store, artifact)
    assert set(store.reverify(artifact)) == {"__init__.py", "layers.py", "metadata.json"}
    change(artifact.path / "__init__.py", b"import os\n")
    (artifact.path / "layers.py").unlink()
    (artifact.path / "extra.py").write_text("")
    with pytest.raises(Tampered) as e:
        store.reverify(artifact)
    for line in ("'__init__.py' differs", "'layers.py' is missing", "'extra.py' was added"):
        assert line in str(e.value)
    assert store.verify_all()[artifact.digest] is not None


def test_same_size_and_same_times_do_not_hide_a_change(store, build):
    artifact = put(store, build)
    age(store, artifact)
    path = artifact.path / "layers.py"
    before = path.stat()
    change(path, b"VALUE = 9\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    with pytest.raises(Tampered, match=r"layers\.py"):
        store.reverify(artifact)


def test_unchanged_files_are_proven_without_reading_them(store, build, monkeypatch):
    artifact = put(store, build)
    age(store, artifact)
    monkeypatch.setattr(tree, "sha256", lambda path: pytest.fail(f"read {path}"))
    assert tree.digest_of(store.reverify(artifact)) == artifact.digest


def test_a_file_as_young_as_its_manifest_is_read(store, build, monkeypatch):
    artifact = put(store, build)
    path = store.cache / "manifests" / f"{artifact.digest}.json"
    young = (artifact.path / "layers.py").stat().st_ctime_ns
    os.utime(path, ns=(young, young))
    read, real = [], tree.sha256
    monkeypatch.setattr(tree, "sha256", lambda p: read.append(p.name) or real(p))
    store.reverify(artifact)
    assert sorted(read) == ["__init__.py", "layers.py", "metadata.json"]


def test_a_manifest_that_others_can_write_proves_nothing(store, build, monkeypatch):
    artifact = put(store, build)
    age(store, artifact)
    (store.cache / "manifests" / f"{artifact.digest}.json").chmod(0o666)
    read, real = [], tree.sha256
    monkeypatch.setattr(tree, "sha256", lambda p: read.append(p.name) or real(p))
    store.reverify(artifact)
    assert len(read) == 3


def test_a_lost_manifest_is_made_again_from_the_bytes(store, build):
    artifact = put(store, build)
    manifest = store.cache / "manifests" / f"{artifact.digest}.json"
    manifest.unlink()
    store.reverify(artifact)
    assert tree.digest_of({p: v[0] for p, v in json.loads(manifest.read_text())["files"].items()}) == artifact.digest


def test_without_a_manifest_a_change_is_still_seen(store, build):
    artifact = put(store, build)
    (store.cache / "manifests" / f"{artifact.digest}.json").unlink()
    change(artifact.path / "layers.py", b"VALUE = 9\n")
    with pytest.raises(Tampered, match="do not add up"):
        store.reverify(artifact)


def test_a_cache_deleted_while_in_use_is_said_to_be_gone_and_can_be_filled_again(store, build):
    artifact = put(store, build)
    shutil.rmtree(store.cache)
    assert store.known(candidate()) is None
    with pytest.raises(StoreError, match="gone"):
        store.reverify(artifact)
    assert put(store, build) == artifact


def test_a_cache_deleted_in_the_middle_of_a_fetch_is_started_again(store, build):
    class Deletes(Folder):
        def fetch(self, candidate, into):
            if not self.fetched:
                shutil.rmtree(store.cache)
                self.fetched += 1
                (into / "__init__.py").write_text("")  # raises FileNotFoundError
            super().fetch(candidate, into)

    artifact = put(store, build, source=Deletes(build))
    store.reverify(artifact)


# -- faults of the machine ----------------------------------------------------------------------------------------


class Fails(Folder):
    def __init__(self, root, error):
        super().__init__(root)
        self.error = error

    def fetch(self, candidate, into):
        (into / "half.py").write_text("half")
        raise self.error


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), StoreError, "no space left"),
        (OSError(errno.EROFS, "Read-only file system"), StoreError, "cannot be written"),
        (OSError(errno.EIO, "I/O error"), StoreError, "I/O error"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), Unreachable, "connection failed"),
        (Unreachable("the hub is down"), Unreachable, "the hub is down"),
        (ValueError("a bug in a source"), ValueError, "a bug"),
    ],
)
def test_a_failed_fetch_leaves_nothing(store, build, error, kind, text):
    with pytest.raises(kind, match=text):
        put(store, build, source=Fails(build, error))
    assert snapshot(store.cache) == {}
    put(store, build)


def test_no_space_for_the_index_is_a_clean_error_and_the_next_try_adopts_the_artifact(store, build, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr("pathlib.Path.replace", full)
        with pytest.raises(StoreError, match="no space left"):
            put(store, build)
    assert not [p for p in snapshot(store.cache) if not p.startswith("artifacts/")]
    assert store.known(candidate()) is None
    store.reverify(put(store, build))


def test_staging_on_another_file_system_is_crossed(store, build, monkeypatch):
    real, crossed = Path.rename, []

    def rename(self, target):
        if self.parent.name == "staging":
            crossed.append(self)
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    artifact = put(store, build)
    assert crossed
    store.reverify(artifact)
    assert [p.name for p in (store.cache / "artifacts").iterdir()] == [artifact.digest]
    assert all(stat.S_IMODE(p.stat().st_mode) == 0o444 for p in artifact.path.iterdir())


def test_crossing_leaves_nothing_behind_when_another_writer_won(store, build, monkeypatch):
    real = Path.rename

    def rename(self, target):
        if self.parent.name == "staging":
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        shutil.copytree(self, target)  # somebody else arrives first
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    artifact = put(store, build)
    store.reverify(artifact)
    assert [p.name for p in (store.cache / "artifacts").iterdir()] == [artifact.digest]


def test_a_relative_cache_survives_a_change_of_directory(build, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store(Path("cache"))
    artifact = put(store, build)
    monkeypatch.chdir("/")
    assert artifact.path.is_absolute()
    store.reverify(artifact)
    assert store.known(candidate()) == artifact


def test_evidence_of_a_dependency_that_reads_differently_today_writes_nothing(store, build, tmp_path):
    below = put(store, write(tmp_path / "base", name="base"), name="org/base")
    put(store, build, depends=(below,))
    before = snapshot(store.cache)
    times = {p: p.stat().st_mtime_ns for p in store.cache.rglob("*")}
    today = dataclasses.replace(below, evidence=(Evidence("publisher", "asked now"),))
    assert put(store, build, depends=(today,)).depends == (today,)
    assert snapshot(store.cache) == before
    assert {p: p.stat().st_mtime_ns for p in store.cache.rglob("*")} == times


def test_a_rename_that_says_it_failed_but_did_not_is_believed_by_its_result(store, build, monkeypatch):
    real = Path.rename

    def rename(self, target):
        real(self, target)
        raise OSError(errno.ENOENT, "NFS repeated the request")

    monkeypatch.setattr(Path, "rename", rename)
    artifact = put(store, build)
    monkeypatch.undo()
    store.reverify(artifact)


def test_a_directory_in_the_way_is_tried_again(store, build, monkeypatch):
    real, tries = Path.rename, []

    def rename(self, target):
        tries.append(target)
        if len(tries) < 3:
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    put(store, build)
    assert len(tries) == 3


def test_a_damaged_artifact_under_the_right_name_is_replaced_not_adopted(store, build, caplog):
    digest = tree_digest(build)
    (store.cache / "artifacts" / digest).mkdir(parents=True)
    (store.cache / "artifacts" / digest / "__init__.py").write_text("evil")
    artifact = put(store, build)
    assert tree_digest(artifact.path) == digest
    assert "damaged" in caplog.text


def test_a_file_system_without_locks_works(store, build, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    store.reverify(put(store, build))


def test_a_lock_held_for_too_long_is_named(store, build, monkeypatch):
    monkeypatch.setattr("kernelswap.store._LOCK_SECONDS", 0.2)
    path = store.cache / "locks" / f"{record.key(candidate())}.lock"
    path.parent.mkdir(parents=True)
    with filelock.FileLock(path), pytest.raises(StoreError, match="another process has held"):
        put(store, build)


def in_a_process_of_its_own(*args):
    command = [sys.executable, "-m", "tests.store_processes", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX users")
def test_a_read_only_cache_serves_what_it_has_and_says_that_it_cannot_take_more(tmp_path):
    said = in_a_process_of_its_own("readonly", tmp_path)
    assert "cannot be written" in said
    assert "choose another cache" in said


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and limits per process")
def test_a_full_disk_is_a_clean_error_at_every_point(tmp_path):
    said = in_a_process_of_its_own("full", tmp_path).split()
    assert said[:4] == ["full"] * 4
    assert said[-1] == "fits"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_writer_killed_at_any_moment_leaves_a_cache_that_the_next_one_uses(tmp_path):
    said = in_a_process_of_its_own("kill", tmp_path, 100, 1)
    assert "'staged': 0" not in said  # else the kills came too late to show anything


# -- many at once -------------------------------------------------------------------------------------------------


def test_32_threads_fetch_once(store, build):
    source, found, barrier = Folder(build), [], threading.Barrier(32)

    def work():
        barrier.wait()
        found.append(put(store, build, source=source))

    threads = [threading.Thread(target=work) for _ in range(32)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 32
    assert len({a.digest for a in found}) == 1
    assert source.fetched == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_eight_processes_fetch_once(tmp_path):
    assert in_a_process_of_its_own("race", tmp_path) == "1 fetches\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_eight_processes_agree_where_there_are_no_locks(tmp_path):
    in_a_process_of_its_own("lockless", tmp_path)


def test_cleaning_takes_what_the_dead_left_and_leaves_the_living_alone(store, build):
    staging = store.cache / "staging"

    class Cleans(Folder):
        def fetch(self, candidate, into):
            (staging / "dead").mkdir()
            (staging / "dead" / "half.py").write_text("half")
            (staging / "dead.lock").write_text("")
            (staging / "young").mkdir()
            old = staging / "unlocked"
            old.mkdir()
            os.utime(old, (1, 1))
            (store.cache / "index").mkdir(exist_ok=True)
            (store.cache / "index" / ".half.json.1").write_text("{")
            os.utime(store.cache / "index" / ".half.json.1", (1, 1))
            assert Store(store.cache).clean() == 3
            assert into.exists()
            super().fetch(candidate, into)

    store.reverify(put(store, build, source=Cleans(build)))
    assert [p.name for p in staging.iterdir()] == ["young"]
    assert [p.suffix for p in (store.cache / "index").iterdir()] == [".json"]
