"""A repository that writes its way out: `..` and absolute paths in every field that could become one."""

import json

import pytest
from tests.kernel_files import Folder, b64, candidate, metadata_of, snapshot

from kernelswap import metadata as metadata_file
from kernelswap.errors import BadMetadata, Refused
from kernelswap.policy import Policy
from kernelswap.verifiers.policy import PolicyVerifier

PATHS = [
    "../outside/evil.py",
    "a/../../outside/evil.py",
    "/etc/passwd",
    "C:\\evil.py",
    "..\\evil.py",
    "a//b.py",
    "./a.py",
    "a/",
    "~/evil.py:x",
]


@pytest.mark.parametrize("path", PATHS)
def test_in_the_digest_list(world, refused, path):
    build = world.build({"__init__.py": ""})
    about = json.loads((build / "metadata.json").read_text())
    about["digest"]["files"][path] = b64((world.outside / "evil.py").read_bytes())
    (build / "metadata.json").write_text(json.dumps(about))
    refused(BadMetadata, "digest.files", lambda: world.put(build))


NAMES = ["../../outside/evil", "/etc/passwd", "a.b", "", ".", "__main__", "a\nb"]


@pytest.mark.parametrize(("field", "value"), [*(("name", n) for n in NAMES), *(("id", n) for n in [*NAMES, "os", "class"])])
def test_in_the_name_and_the_id(world, refused, field, value):
    build = world.build({"__init__.py": world.evil})
    about = json.loads((build / "metadata.json").read_text())
    (build / "metadata.json").write_text(json.dumps({**about, field: value}))
    refused(BadMetadata, field, lambda: world.put(build))


@pytest.mark.parametrize("value", ["../../outside/evil", "a/../b", "/a/b", "a/b/c", "a--b/c"])
def test_in_a_dependency(world, refused, value):
    build = world.build({"__init__.py": world.evil}, **{"kernel-depends": [{"repo-id": value, "version": 1}]})
    refused(BadMetadata, "kernel-depends", lambda: world.put(build))


@pytest.mark.parametrize("field", ["name", "commit", "variant", "source"])
def test_in_what_a_source_says_about_a_candidate(world, field):
    """A source may be lied to by a server; whatever it hands on becomes no path in the cache."""
    build = world.build({"__init__.py": ""})
    outside = snapshot(world.root)
    names = {field: "../../../outside/x"}
    artifact = world.store.materialize(candidate(**names), metadata_of(build), Folder(build))
    assert artifact.path.parent == world.store.cache / "artifacts"
    assert {p: h for p, h in snapshot(world.root).items() if not p.startswith("cache/")} == outside
    assert world.store.known(candidate(**names)) == artifact
    assert world.store.known(candidate()) is None


def test_in_the_files_that_a_source_fetches(world, refused):
    """The staging directory is all that a Source is given; one that writes elsewhere is caught by what then is missing."""

    class Escapes:
        def fetch(self, candidate, into):
            (into / ".." / ".." / ".." / "outside" / "sub").mkdir()
            (into / "link").symlink_to(world.outside)

    build = world.build({"__init__.py": ""})
    before = snapshot(world.outside)
    with pytest.raises(Refused, match="symbolic link"):
        world.put(build, source=Escapes())
    assert snapshot(world.outside) == before
    assert snapshot(world.store.cache) == {}


def test_in_a_policys_digest_lookup(world, refused):
    """A directory that calls itself like an artifact is hashed, not believed."""
    build = world.build({"__init__.py": ""})
    fake = world.root / "artifacts" / ("a" * 64)
    fake.parent.mkdir()
    build.rename(fake)
    verifier = PolicyVerifier(Policy(digests=("a" * 64,), sources=("test",)))
    refused(Refused, "is not among those", lambda: world.put(fake, [verifier]))


def test_metadata_is_parsed_without_touching_the_disk(world):
    data = (world.build({"__init__.py": ""}) / "metadata.json").read_bytes()
    assert metadata_file.parse(data, package="../../outside", path_hint="../../outside").name == "my-norm"
    assert metadata_of(world.root / "nowhere", "../../outside").synthesised
