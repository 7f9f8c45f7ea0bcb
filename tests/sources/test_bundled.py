import pytest
from tests.contract.sources import SourceContract, Subject
from tests.hub import kernel_files

from kernelswap.errors import UnknownKernel
from kernelswap.sources.bundled import BundledSource
from kernelswap.types import Requirement


def digest(root):
    return (root / "build.toml").read_text() if (root / "build.toml").is_file() else "none"


def of(name, **more):
    return Requirement(name, source="bundled", **more)


@pytest.fixture
def source(tmp_path):
    return BundledSource(tmp_path / "bundled", tmp_path / "built", digest)


def files(variant, **more):
    return {p.removeprefix(f"build/{variant}/"): d for p, d in kernel_files(variant, name="layers", **more).items()}


class TestPackagedAndCompiled(SourceContract):
    @pytest.fixture
    def subject(self, source, make_repo, tmp_path):
        root = make_repo("layers", {"torch-cuda": "triton = 1"}, where=source.root)
        (root / "build.toml").write_text("sources-one")
        for state, code in (("sources-one", "new = 1"), ("sources-zero", "old = 1")):
            make_repo("layers", {"torch-cpu": code}, where=tmp_path / state)
            (tmp_path / state / "layers").rename(
                (source.built / "layers").mkdir(parents=True, exist_ok=True) or source.built / "layers" / state
            )
        builds = {"torch-cuda": files("torch-cuda", code="triton = 1"), "torch-cpu": files("torch-cpu", code="new = 1")}
        return Subject(source, of("layers"), builds, of("leyers"))

    def test_builds_of_other_sources_than_the_installed_ones_are_not_seen(self, subject):
        root = subject.source.root / "layers"
        (root / "build.toml").write_text("sources-two")
        found, notes = subject.source.find(of("layers"))
        assert [c.variant for c in found] == ["torch-cuda"]
        assert "not compiled on this machine yet" in notes[0]


def test_the_name_may_be_written_as_in_a_spec(source, make_repo):
    make_repo("layers", {"torch-cpu": ""}, where=source.root)
    assert source.find(of("kernelswap/layers"))[0][0].name == "layers"


@pytest.mark.parametrize("name", ["leyers", "..", "../bundled/layers", "", ".", "/etc"])
def test_what_is_not_bundled_is_unknown(source, make_repo, name):
    make_repo("layers", {"torch-cpu": ""}, where=source.root)
    with pytest.raises(UnknownKernel, match="the bundled kernels are: layers"):
        source.find(of(name))


def test_a_misspelling_gets_a_suggestion(source, make_repo):
    make_repo("layers", {"torch-cpu": ""}, where=source.root)
    with pytest.raises(UnknownKernel, match=r"did you mean bundled://layers\?"):
        source.find(of("layer"))


def test_the_kernels_of_this_package_are_found(tmp_path):
    import kernelswap

    root = __import__("pathlib").Path(kernelswap.__file__).parent / "bundled"
    source = BundledSource(root, tmp_path, digest)
    for name in source.names():
        source.find(of(name))
    assert "layers" in source.names()


def test_python_sources_beside_the_builds_are_no_build(source, make_repo):
    root = make_repo("layers", {"torch-cuda": "triton = 1"}, where=source.root)
    (root / "torch-ext" / "layers").mkdir(parents=True)
    found, _ = source.find(of("layers"))
    assert [c.variant for c in found] == ["torch-cuda"]
