"""Somebody writes into the cache: records that lie, manifests that lie, bytecode next to the source."""

import copy
import json
import os
import py_compile
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.kernel_files import candidate, write

from kernelswap import loader, record
from kernelswap.errors import KernelSwapError, Tampered
from kernelswap.types import Artifact


@pytest.fixture
def artifact(world):
    return world.put(world.build({"__init__.py": "V = 1\n"}))


def index(world, c=None):
    return world.store.cache / "index" / f"{record.key(c or candidate())}.json"


def manifest(world, artifact):
    return world.store.cache / "manifests" / f"{artifact.digest}.json"


def plant(world, digest, build):
    """An attacker who can write to the cache puts a directory there under any name."""
    build.rename(world.store.cache / "artifacts" / digest)


@pytest.mark.parametrize(
    "change",
    [
        {"digest": "../../outside/build"},
        {"digest": "a" * 63},
        {"digest": "A" * 64},
        {"digest": 1},
        {"digest": None},
        {"format": 2},
        {"format": "1"},
        {"candidate": {"source": "test", "name": "org/other", "commit": "c" * 40, "variant": "torch-cpu"}},
        {"candidate": None},
        {"evidence": "trust me"},
        {"evidence": [["a"]]},
        {"depends": None},
        {"depends": [1]},
        {"depends": [{"candidate": {}, "requirement": {}}]},
        {"metadata": {"name": "x"}},
        {"metadata": []},
    ],
    ids=str,
)
def test_a_record_that_makes_no_sense_is_no_record(world, artifact, change):
    path = index(world)
    write(world.outside / "build", {"__init__.py": world.evil})
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert world.store.known(candidate()) is None
    assert world.load(world.put(world.build({"__init__.py": "V = 1\n"}))).V == 1  # and the next fetch repairs it
    assert world.store.known(candidate()) == artifact


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "[" * 100_000, "{}", "\x00" * 100])
def test_a_torn_record_is_no_record(world, artifact, text):
    index(world).write_text(text)
    assert world.store.known(candidate()) is None
    assert world.store.entries() == ()
    assert world.put(world.build({"__init__.py": "V = 1\n"})) == artifact


def test_a_record_that_points_to_a_planted_directory(world, artifact):
    digest = "a" * 64
    plant(world, digest, write(world.root / "evil", {"__init__.py": world.evil}))
    path = index(world)
    path.write_text(json.dumps({**json.loads(path.read_text()), "digest": digest}))
    found = world.store.known(candidate())
    assert found.digest == digest  # known is a claim; nothing has been imported
    with pytest.raises(Tampered, match="do not add up to aaaaaaaaaaaaaaaa"):
        world.load(found)


def test_a_record_with_other_metadata_than_the_artifact_has(world, artifact):
    """What a build says about itself is read from its own, digested bytes, never from a record next to it."""
    path = index(world)
    value = json.loads(path.read_text())
    assert value["metadata"] is None
    path.write_text(json.dumps({**value, "evidence": [["policy", "allowed by everybody"]]}))
    assert world.store.known(candidate()).metadata == artifact.metadata


def test_made_up_metadata_cannot_claim_to_be_complete(world):
    build = world.root / "old"
    build.mkdir()
    (build / "__init__.py").write_text("V = 1\n")
    world.put(build)
    path = index(world)
    value = json.loads(path.read_text())
    for change in ({"synthesised": []}, {"id": "../x"}, {"id": "a.b"}):
        path.write_text(json.dumps({**value, "metadata": {**value["metadata"], **change}}))
        assert world.store.known(candidate()) is None


def test_records_that_depend_on_each_other_in_a_circle_and_a_tree_that_doubles_at_each_level(world, artifact):
    path = index(world)
    value = json.loads(path.read_text())
    own = {"candidate": value["candidate"], "requirement": value["requirement"]}
    path.write_text(json.dumps({**value, "depends": [own, own]}))
    assert world.store.known(candidate()) is None
    names = [candidate(commit=f"{i:040x}") for i in range(60)]
    for this, below in zip(names, [*names[1:], None], strict=True):
        entries = [record.dump(Artifact(below, artifact.path, artifact.digest, artifact.metadata))] * 2 if below else []
        depends = [{"candidate": e["candidate"], "requirement": e["requirement"]} for e in entries]
        dumped = record.dump(Artifact(this, artifact.path, artifact.digest, artifact.metadata))
        index(world, this).write_text(json.dumps({**dumped, "depends": depends}))
    assert world.store.known(names[0]) is not None  # 2**60 paths, 60 records read


def test_a_manifest_that_vouches_for_changed_bytes(world, artifact, refused):
    path = artifact.path / "__init__.py"
    path.chmod(0o644)
    path.write_text(world.evil)
    value = json.loads(manifest(world, artifact).read_text())
    import hashlib

    value["files"]["__init__.py"][0] = hashlib.sha256(world.evil.encode()).hexdigest()
    manifest(world, artifact).write_text(json.dumps(value))
    refused(Tampered, "do not add up", lambda: world.load(artifact))


def test_a_manifest_with_the_times_of_changed_bytes_that_others_could_have_written(world, artifact, refused):
    path = artifact.path / "__init__.py"
    path.chmod(0o644)
    path.write_text(world.evil)
    found = path.stat()
    value = json.loads(manifest(world, artifact).read_text())
    value["files"]["__init__.py"][1:] = [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
    manifest(world, artifact).write_text(json.dumps(value))
    later = found.st_ctime_ns + 60_000_000_000
    os.utime(manifest(world, artifact), ns=(later, later))
    manifest(world, artifact).chmod(0o664)
    refused(Tampered, r"'__init__\.py' differs", lambda: world.load(artifact))
    # Even where only this user can write it: the loader compares what it compiles with the hash, not with the times.
    manifest(world, artifact).chmod(0o644)
    refused(Tampered, r"__init__\.py was changed", lambda: world.load(artifact))


def test_a_manifest_with_wrong_hashes_of_right_bytes_is_not_believed_either(world, artifact):
    value = json.loads(manifest(world, artifact).read_text())
    value["files"]["__init__.py"][0] = "0" * 64
    manifest(world, artifact).write_text(json.dumps(value))
    assert world.load(artifact).V == 1


@pytest.mark.parametrize(
    "value", ["", "[]", '{"format":1,"files":{}}', '{"format":1,"files":{"../x":["a"]}}', '{"format":1,"files":1}', "[" * 99_999]
)
def test_a_damaged_manifest_means_that_everything_is_hashed(world, artifact, value):
    manifest(world, artifact).write_text(value)
    assert world.load(artifact).V == 1


def test_bytecode_next_to_the_source_is_found_and_would_not_be_run(world, artifact):
    source = world.root / "evil.py"
    source.write_text(world.evil)
    honest = artifact.path / "__init__.py"
    os.utime(source, ns=(honest.stat().st_atime_ns, honest.stat().st_mtime_ns))
    cached = artifact.path / "__pycache__" / f"__init__.{sys.implementation.cache_tag}.pyc"
    py_compile.compile(str(source), cfile=str(cached), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    with pytest.raises(Tampered, match="was added"):
        world.load(artifact)
    files = {p: h for p, h in _hashes(artifact).items() if "__pycache__" not in p}
    assert loader.load(artifact, reverify=lambda _: files).module.V == 1


def _hashes(artifact):
    from kernelswap import tree

    return tree.hashes(artifact.path)


def test_a_staging_directory_planted_by_somebody_else_is_never_published(world, artifact):
    planted = world.store.cache / "staging" / "planted"
    planted.mkdir(parents=True)
    (planted / "__init__.py").write_text(world.evil)
    (world.store.cache / "staging" / "planted.lock").write_text("")
    world.put(world.build({"__init__.py": "V = 2\n"}), commit="d" * 40)
    assert not planted.exists()
    assert world.store.verify_all().keys() == {artifact.digest, world.store.known(candidate(commit="d" * 40)).digest}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8) | st.just("a" * 64),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
@given(data=st.data())
def test_any_change_to_a_record_gives_the_kernel_nothing_or_a_declared_error(world, data):
    honest = world.root / "honest.json"
    if not honest.exists():
        world.put(world.build({"__init__.py": "V = 1\n"}))
        index(world).rename(honest)
    value = json.loads(honest.read_text())
    target = changed = copy.deepcopy(value)
    for _ in range(data.draw(st.integers(0, 2))):
        inner = [k for k, v in target.items() if isinstance(v, dict)]
        if not inner:
            break
        target = target[data.draw(st.sampled_from(inner))]
    target[data.draw(st.sampled_from([*target, "new"]))] = data.draw(JSON)
    index(world).write_text(json.dumps(changed))
    try:
        found = world.store.known(candidate())
        assert found is None or world.store.reverify(found)
        world.store.entries()
    except KernelSwapError:
        pass
