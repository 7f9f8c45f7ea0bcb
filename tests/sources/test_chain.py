import threading

import pytest
from tests.contract.sources import SourceContract, Subject
from tests.hub import kernel_files

from kernelswap.errors import Refused, UnknownKernel, Unreachable
from kernelswap.sources.chain import Chain
from kernelswap.sources.directory import DirectorySource
from kernelswap.types import Requirement


class Says:
    """A source that raises, or never answers."""

    def __init__(self, key, error=None):
        self.key, self.error, self.asked, self.gate = key, error, 0, threading.Event()

    def find(self, requirement):
        self.asked += 1
        if self.error is None:
            self.gate.wait(30)
            return (), ()
        raise self.error


class TestSecondServes(SourceContract):
    @pytest.fixture
    def subject(self, make_repo, tmp_path):
        root = make_repo("demo", {"torch-cpu": "x = 1"})
        files = {p.removeprefix("build/torch-cpu/"): d for p, d in kernel_files("torch-cpu", "x = 1").items()}
        chain = Chain((Says("mirror", Unreachable("no route")), DirectorySource()))
        return Subject(chain, Requirement(str(root)), {"torch-cpu": files}, Requirement(str(tmp_path / "none")))

    def test_an_unknown_name_says_what_was_asked_what_is_so_and_what_to_do(self, subject):
        """Here nobody can say that it is unknown: the mirror did not answer."""
        with pytest.raises(Unreachable) as e:
            subject.source.find(subject.unknown)
        assert [line.split(":")[0] for line in e.value.found.splitlines()] == ["mirror", "dir"]
        assert e.value.todo

    def test_who_was_passed_over_is_a_note(self, subject):
        assert subject.source.find(subject.known)[1] == ("mirror passed over: no route",)

    def test_a_candidate_from_another_process_goes_to_the_source_with_its_key(self, subject):
        (candidate,) = subject.source.find(subject.known)[0]
        assert Chain(subject.source.sources).read(candidate, "__init__.py") == b"x = 1"


def test_unknown_everywhere_is_unknown_and_lists_who_was_asked():
    with pytest.raises(UnknownKernel, match="one: not here\ntwo: nor here"):
        Chain((Says("one", UnknownKernel("not here")), Says("two", UnknownKernel("nor here")))).find(Requirement("org/x"))


def test_a_refusal_is_not_answered_by_asking_somebody_else():
    second = Says("two", UnknownKernel("nor here"))
    with pytest.raises(Refused):
        Chain((Says("one", Refused("bad")), second)).find(Requirement("org/x"))
    assert second.asked == 0


def test_a_silent_source_costs_no_more_than_the_budget(make_repo):
    silent = Says("silent")
    root = make_repo("demo", {"torch-cpu": "x = 1"})
    with pytest.raises(Unreachable, match="silent did not answer within"):
        Chain((silent,), budget=0.02).find(Requirement(str(root)))
    with pytest.raises(Unreachable, match="dir was not asked"):
        Chain((silent, DirectorySource()), budget=0.02).find(Requirement(str(root)))
    silent.gate.set()
