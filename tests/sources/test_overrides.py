import pytest
from tests.contract.sources import SourceContract, Subject
from tests.hub import kernel_files

from kernelswap.errors import UnknownKernel
from kernelswap.sources.directory import DirectorySource
from kernelswap.sources.overrides import Overrides
from kernelswap.types import Requirement


class KnowsNothing:
    """Whatever reaches it was not overridden."""

    def find(self, requirement):
        raise UnknownKernel("not here", asked=f"looking for {requirement}", todo="nothing")

    def read(self, candidate, name):
        raise AssertionError(candidate)

    fetch = read


class TestOverridden(SourceContract):
    @pytest.fixture
    def subject(self, make_repo, tmp_path):
        root = make_repo("mine", {"torch-cpu": "mine = 1"})
        source = Overrides(KnowsNothing(), {"org/demo": root})
        files = {p.removeprefix("build/torch-cpu/"): d for p, d in kernel_files("torch-cpu", "mine = 1", name="mine").items()}
        return Subject(source, Requirement("org/demo", version=3), {"torch-cpu": files}, Requirement(str(tmp_path / "no")))

    def test_the_answer_says_so(self, subject):
        _, notes = subject.source.find(subject.known)
        assert "org/demo is overridden by the directory" in notes[0]

    @pytest.mark.parametrize("asked", [{"version": 9}, {"revision": "main"}, {"constraints": ">=7"}, {}])
    def test_whatever_version_was_asked_for(self, subject, asked):
        found, _ = subject.source.find(Requirement("org/demo", **asked))
        assert [c.variant for c in found] == ["torch-cpu"]


class TestTheRestIsTheWrappedSource(SourceContract):
    @pytest.fixture
    def subject(self, make_repo, tmp_path):
        root = make_repo("theirs", {"torch-cpu": "theirs = 1"})
        source = Overrides(DirectorySource(), {"org/demo": tmp_path / "none"})
        files = {p.removeprefix("build/torch-cpu/"): d for p, d in kernel_files("torch-cpu", "theirs = 1", name="theirs").items()}
        return Subject(source, Requirement(str(root)), {"torch-cpu": files}, Requirement(str(tmp_path / "no")))


def test_a_directory_that_is_not_there_is_not_replaced_by_the_repository(make_repo, tmp_path):
    source = Overrides(DirectorySource(), {"org/demo": tmp_path / "gone"})
    with pytest.raises(UnknownKernel, match="there is no directory"):
        source.find(Requirement("org/demo"))
