"""The order of sources: from files and the environment to a Swapper that goes on to the next one."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.hub import kernel_files
from tests.swapping import CPU, Near

from kernelswap.api import Swapper
from kernelswap.errors import Refused, TableError, UnknownKernel, Unreachable
from kernelswap.sources import configured
from kernelswap.sources.chain import Chain
from kernelswap.sources.configured import Order
from kernelswap.sources.hub import HubSource
from kernelswap.sources.mirror import Mirror
from kernelswap.types import Requirement

SPEC = "org/kernel@1"


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


@pytest.fixture
def make_swapper(project, hub, hub_cache, tmp_path, monkeypatch):
    hub.organization("org", trusted=True)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HUB_CACHE", str(hub_cache))
    return lambda **more: Swapper(cache=tmp_path / "cache", machine=CPU, prover=Near(), **more)


@pytest.fixture
def mirror(hub, tmp_path, project):
    """The hub's kernel in a folder of the project, named by its file; then the hub has another one."""
    hub.repo("org/kernel").branch("v1", kernel_files("torch-cpu", "VALUE = 'mirrored'", name="kernel"))
    Mirror(project / "mirror").add(HubSource(tmp_path / "other", hub.url), Requirement("org/kernel", version=1))
    hub.repo("org/kernel").branch("v1", kernel_files("torch-cpu", "VALUE = 'new'", name="kernel", unique="1111111"))
    (project / "kernelswap.toml").write_text("[sources]\norder = ['mirror', 'hub']\nseconds = 20\n")


def test_the_first_source_serves(make_swapper, mirror):
    resolution = make_swapper().find(SPEC)
    assert resolution.chosen.source == "folder"
    assert make_swapper().load(SPEC).VALUE == "mirrored"


def test_the_next_one_serves_what_the_first_does_not_have(make_swapper, mirror, hub):
    hub.repo("org/more").branch("v1", kernel_files("torch-cpu", "VALUE = 'more'", name="more"))
    swapper = make_swapper()
    assert swapper.load("org/more@1").VALUE == "more"
    (note,) = swapper.find("org/more@1").notes
    assert note.startswith("passed over: the folder ")
    assert "has no org/more" in note


def test_the_environment_goes_over_the_files(make_swapper, mirror, monkeypatch):
    monkeypatch.setenv("KERNELSWAP_SOURCES", "hub ./mirror")
    assert make_swapper().load(SPEC).VALUE == "new"


def test_a_hub_that_is_gone_leaves_it_to_the_mirror(make_swapper, mirror, monkeypatch, hub):
    monkeypatch.setenv("KERNELSWAP_SOURCES", "hub ./mirror")
    swapper = make_swapper()
    swapper.verifiers[1].publishers.trusted("org", afresh=True)
    hub.stop()
    assert swapper.load(SPEC).VALUE == "mirrored"


def test_a_mirror_vouches_for_nobody(make_swapper, mirror, hub):
    hub.organization("org", trusted=False)
    with pytest.raises(Refused, match="org is not a trusted publisher"):
        make_swapper().load(SPEC)


def test_where_no_hub_is_asked_the_policy_names_publishers(make_swapper, mirror, project, hub):
    (project / "kernelswap.toml").write_text("[sources]\norder = ['mirror']\n")
    with pytest.raises(Unreachable, match="whether org is a trusted publisher is not known here: no hub is asked here"):
        make_swapper().load(SPEC)
    (project / "kernelswap.toml").write_text("[sources]\norder = ['mirror']\n[policy]\npublishers = ['org']\n")
    assert make_swapper().load(SPEC).VALUE == "mirrored"
    assert not hub.requests("/api/kernels/org/kernel/refs")[2:]


def test_a_policy_can_leave_folders_out(make_swapper, mirror, project):
    (project / "kernelswap.toml").write_text("[sources]\norder = ['mirror']\n[policy]\nsources = ['hub', 'bundled']\n")
    with pytest.raises(Refused, match="the source folder is not among those of"):
        make_swapper().load(SPEC)


def test_a_lock_holds_for_whichever_source_serves(make_swapper, mirror, project):
    (project / "kernelswap.toml").write_text("[sources]\norder = ['mirror']\n[policy]\nlocked_only = true\n")
    (project / "kernelswap.lock").write_text('{"format_version": 1, "entries": []}')
    with pytest.raises(UnknownKernel, match="the lock has no kernel"):
        make_swapper().load(SPEC)


def test_the_users_file_counts_where_the_project_says_nothing(tmp_path):
    for name, text in {"user": "[sources]\norder = ['/srv/k']\n", "project": "[policy]\nlocked_only = true\n"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "kernelswap.toml").write_text(text)
    assert configured.read(tmp_path / "project", tmp_path / "user").names == ("/srv/k",)
    assert configured.read(tmp_path / "project", None) == Order()


def test_offline_reaches_every_source_of_a_chain(tmp_path):
    chain = Chain((HubSource(tmp_path), HubSource(tmp_path / "b")))
    assert [s.offline for s in configured.offline(chain).sources] == [True, True]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sources = 1", "sources is not a table"),
        ("[sources]\norder = []", "order: expected a list of 1 to 20"),
        ("[sources]\norder = ['']", "order: expected"),
        ("[sources]\norder = 'hub'", "order: expected"),
        ("[sources]\nseconds = 0", "seconds: expected a number"),
        ("[sources]\nseconds = true", "seconds: expected a number"),
        ("[sources]\nordr = ['hub']", "unknown key 'ordr', did you mean order?"),
        ("[sources", "not TOML"),
        ("a = " + "[" * 5000, "not TOML"),
    ],
)
def test_what_is_wrong_is_named(text, said):
    with pytest.raises(TableError, match=r"^f\.toml: ") as e:
        configured.parse(text, where="f.toml")
    assert said in e.value.found


@given(st.text())
def test_any_text_is_read_or_refused(text):
    for tried in (text, f"[sources]\norder = [{text!r}]", f"[sources]\n{text}"):
        with contextlib.suppress(TableError):
            configured.parse(tried, where="f.toml")
