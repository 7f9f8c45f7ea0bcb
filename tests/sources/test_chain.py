import threading
import time

import pytest
from tests.contract.sources import SourceContract, Subject
from tests.hub import kernel_files

from kernelswap.errors import Refused, UnknownKernel, Unreachable
from kernelswap.sources.chain import Chain
from kernelswap.sources.directory import DirectorySource
from kernelswap.sources.folder import FolderSource
from kernelswap.sources.folder_transports import DirectoryTransport
from kernelswap.sources.hub import HubSource
from kernelswap.sources.mirror import Mirror
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
        assert subject.source.find(subject.known)[1] == ("passed over: mirror: no route",)

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


def test_a_silent_source_costs_no_more_than_its_share_of_the_budget(make_repo):
    silent = Says("silent")
    root = make_repo("demo", {"torch-cpu": "x = 1"})
    with pytest.raises(Unreachable, match="silent did not answer within"):
        Chain((silent,), budget=0.02).find(Requirement(str(root)))
    began = time.monotonic()
    found, notes = Chain((silent, Says("other", Unreachable("no route")), DirectorySource()), budget=1.5).find(
        Requirement(str(root))
    )
    assert time.monotonic() - began < 1.5
    assert [c.variant for c in found] == ["torch-cpu"]
    assert [n.split()[2].rstrip(":") for n in notes] == ["silent", "other"]
    silent.gate.set()


class Breaks:
    """A source that finds, and then does not deliver: it writes half of it."""

    def __init__(self, source, key="first"):
        self.source, self.key = source, key

    def find(self, requirement):
        return self.source.find(requirement)

    def read(self, candidate, name):
        raise Unreachable("the connection was dropped")

    def fetch(self, candidate, into):
        (into / "half").write_bytes(b"x")
        raise Unreachable("the connection was dropped")


@pytest.fixture
def hub_and_folder(hub, hub_cache, tmp_path):
    hub.repo("org/demo").branch("v1", kernel_files("torch-cpu", "x = 1"))
    source = HubSource(hub_cache, hub.url)
    Mirror(tmp_path / "folder").add(source, Requirement("org/demo", version=1))
    return source, FolderSource(DirectoryTransport(tmp_path / "folder"))


def test_what_one_source_breaks_off_the_next_delivers_whole(hub_and_folder, tmp_path, caplog):
    source, folder = hub_and_folder
    chain = Chain((Breaks(source), folder))
    (candidate,) = chain.find(Requirement("org/demo", version=1))[0]
    (tmp_path / "into").mkdir()
    chain.fetch(candidate, tmp_path / "into")
    assert sorted(p.name for p in (tmp_path / "into").iterdir()) == ["__init__.py", "metadata.json"]
    assert chain.read(candidate, "__init__.py") == b"x = 1"
    assert "comes from the folder" in caplog.text


def test_another_commit_is_never_delivered_instead(hub_and_folder, hub, tmp_path):
    source, folder = hub_and_folder
    hub.repo("org/demo").branch("v1", kernel_files("torch-cpu", "x = 2"))
    chain = Chain((Breaks(HubSource(source.cache, hub.url)), folder))
    (candidate,) = chain.find(Requirement("org/demo", version=1))[0]
    with pytest.raises(Unreachable, match="dropped"):
        chain.fetch(candidate, tmp_path)
    assert candidate.commit == hub.repo("org/demo").branches["v1"]


def test_a_hub_that_goes_away_in_the_middle_is_made_up_for(hub_and_folder, hub, hub_cache, tmp_path):
    """For real: the hub drops every file, the folder has them."""
    _, folder = hub_and_folder
    chain = Chain((HubSource(tmp_path / "cold", hub.url, backoff=0.01), folder))
    (candidate,) = chain.find(Requirement("org/demo", version=1))[0]
    hub.fault("*/resolve/*", "status", status=403)
    (tmp_path / "into").mkdir()
    chain.fetch(candidate, tmp_path / "into")
    assert (tmp_path / "into" / "__init__.py").read_bytes() == b"x = 1"
