import pytest
from tests.kernel_files import Folder, candidate, metadata_of, write

from kernelswap import tree
from kernelswap.errors import Refused, TableError
from kernelswap.lock import Lock, Locked, LockedBuild
from kernelswap.policy import DEFAULT, Policy
from kernelswap.store import Store
from kernelswap.verifiers.policy import PolicyVerifier, read


@pytest.fixture
def build(tmp_path):
    return write(tmp_path / "repo")


def check(build, policy=DEFAULT, lock=None, **names):
    names = {"source": "hub", **names}
    return PolicyVerifier(policy, lock).check(candidate(**names), metadata_of(build), build)


def test_the_default_allows(build):
    assert check(build).statement == "allowed by the default policy"


def test_a_source_outside_the_list_is_refused_before_any_byte(build):
    verifier = PolicyVerifier(Policy(sources=("dir",), origins=(("sources", "kernelswap.toml"),)))
    with pytest.raises(Refused, match=r"the source hub is not among those of kernelswap\.toml: dir"):
        verifier.precheck(candidate(source="hub"), metadata_of(build))


def test_required_digests(tmp_path, build):
    policy = Policy(require_digest=True)
    check(build, policy)
    with pytest.raises(Refused, match="publishes no digests"):
        check(write(tmp_path / "old", digest=False), policy)


def test_only_the_listed_digests(build):
    check(build, Policy(digests=(tree.digest(build),)))
    with pytest.raises(Refused, match="is not among those of"):
        check(build, Policy(digests=("a" * 64,)))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("k.abi3.so", b"anything"),
        ("K.DLL", b"anything"),
        ("data.json", b"\x7fELF\x02\x01\x01"),
        ("helper.py", b"MZ\x90\x00"),
        ("kernel.cubin", b"x"),
        ("kernel.ptx", b"//"),
        ("lib.a", b"!<arch>\n"),
        ("deep/shader.metallib", b"MTLB"),
    ],
)
def test_no_native_code_goes_by_name_and_by_first_bytes(tmp_path, name, data):
    build = write(tmp_path / "n", {"__init__.py": "", name: data})
    check(build)
    with pytest.raises(Refused, match="allows no native code"):
        check(build, Policy(no_native_code=True))


def test_no_native_code_leaves_python_alone(build):
    check(build, Policy(no_native_code=True))


def lock(build, commit="c" * 40, state=None):
    builds = (LockedBuild("torch-cpu", state or tree.digest(build)),)
    return Lock((Locked("org/my-norm", commit, version=1, builds=builds),))


def test_locked_only(build):
    policy = Policy(locked_only=True)
    check(build, policy, lock(build))
    with pytest.raises(Refused, match="no lock names it"):
        check(build, policy)
    with pytest.raises(Refused, match="no lock names it"):
        check(build, policy, lock(build), name="org/other")
    with pytest.raises(Refused, match="the lock has it at dddddddddddd"):
        check(build, policy, lock(build, "d" * 40))


def test_the_tree_in_a_lock_counts_whether_or_not_the_policy_asks(build):
    with pytest.raises(Refused, match="the lock states the tree"):
        check(build, DEFAULT, lock(build, state="b" * 64))


def test_what_is_bundled_is_part_of_this_package(build):
    check(build, Policy(locked_only=True, no_native_code=True, require_digest=True, digests=("a" * 64,)), source="bundled")
    with pytest.raises(Refused):
        check(build, Policy(sources=("hub",)), source="bundled")


def test_every_problem_is_listed(tmp_path):
    build = write(tmp_path / "n", {"__init__.py": "", "k.so": b"\x7fELF", "l.so": b"\x7fELF"}, digest=False)
    with pytest.raises(Refused) as e:
        check(build, Policy(sources=("dir",), require_digest=True, no_native_code=True, locked_only=True, digests=("a" * 64,)))
    assert len(e.value.found.splitlines()) == 6


def test_a_policy_that_became_stricter_refuses_what_is_already_in_the_store(tmp_path, build):
    store = Store(tmp_path / "cache")
    artifact = store.materialize(candidate(source="hub"), metadata_of(build), Folder(build), [PolicyVerifier()])
    strict = PolicyVerifier(Policy(digests=("a" * 64,)))
    with pytest.raises(Refused):
        store.known(candidate(source="hub"), [strict])
    assert store.known(candidate(source="hub"), [PolicyVerifier(Policy(digests=(artifact.digest,)))]) is not None


def test_files_are_read_project_over_user_and_a_broken_one_is_no_policy_at_all(tmp_path):
    project, user = tmp_path / "project", tmp_path / "user"
    project.mkdir()
    user.mkdir()
    assert read(project, user) == read(None, None) == DEFAULT
    (user / "kernelswap.toml").write_text("[policy]\nlocked_only = true\nno_native_code = true\n")
    (project / "pyproject.toml").write_text("[tool.kernelswap.policy]\nlocked_only = false\n")
    found = read(project, user)
    assert (found.locked_only, found.no_native_code) == (False, True)
    assert found.origin("locked_only") == str(project / "pyproject.toml")
    (project / "kernelswap.toml").write_text("[policy]\nrequire_digest = true\n")
    assert read(project, user).require_digest
    assert read(project, user).locked_only
    (user / "kernelswap.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(TableError, match="cannot be read"):
        read(project, user)
