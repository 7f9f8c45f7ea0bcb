"""A policy file decides wherever in its project a program is started, and a lock goes with it."""

import os

import pytest
from tests.hub import kernel_files
from tests.swapping import CPU, Near

from kernelswap.api import Swapper
from kernelswap.errors import BadMetadata, Refused, TableError, UnknownKernel
from kernelswap.lock import Lock, Locked
from kernelswap.verifiers import policy


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "project" / "src").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "project" / "src")
    return tmp_path / "project"


@pytest.fixture
def make_swapper(project, hub, hub_cache, tmp_path, monkeypatch):
    hub.organization("org", trusted=True)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HUB_CACHE", str(hub_cache))
    return lambda: Swapper(cache=tmp_path / "cache", machine=CPU, prover=Near())


def publish(hub, value):
    return hub.repo("org/kernel").branch("v1", kernel_files("torch-cpu", f"VALUE = {value}", name="kernel"))


def test_the_default_swapper_obeys_the_project_from_any_directory_of_it(make_swapper, project, make_repo):
    root = make_repo("any", {"torch-cpu": ""})
    make_swapper().load(f"dir://{root}")
    (project / "pyproject.toml").write_text("[tool.kernelswap.policy]\nsources = ['hub']\n")
    with pytest.raises(Refused, match=r"the source dir is not among those of .*project.pyproject\.toml"):
        make_swapper().load(f"dir://{root}")


def test_the_users_file_counts_where_the_project_says_nothing(make_swapper, tmp_path, project, make_repo):
    (tmp_path / "config" / "kernelswap").mkdir(parents=True)
    (tmp_path / "config" / "kernelswap" / "kernelswap.toml").write_text("[policy]\nsources = ['hub']\n")
    root = make_repo("any", {"torch-cpu": ""})
    with pytest.raises(Refused, match="is not among those of"):
        make_swapper().load(f"dir://{root}")
    (project / "kernelswap.toml").write_text("[policy]\nsources = ['dir']\n")
    make_swapper().load(f"dir://{root}")


def test_a_policy_outside_of_the_repository_or_above_the_home_is_not_ours(project, tmp_path):
    (tmp_path / "kernelswap.toml").write_text("[policy]\nlocked_only = true\n")
    assert policy.project(project / "src") == tmp_path  # the home directory itself is the last
    (project / ".git").mkdir()
    assert policy.project(project / "src") == project / "src"


def test_the_way_up_ends_at_home(tmp_path, monkeypatch):
    (tmp_path / "home" / "work").mkdir(parents=True)
    (tmp_path / "kernelswap.toml").write_text("[policy]\nlocked_only = true\n")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert policy.project(tmp_path / "home" / "work") == tmp_path / "home" / "work"


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give a file away")
def test_a_policy_that_somebody_else_put_above_us_is_an_error(project):
    (project / "kernelswap.toml").write_text("[policy]\npublishers = ['evil']\n")
    os.chown(project / "kernelswap.toml", 12345, -1)
    with pytest.raises(TableError, match="belongs to another user"):
        policy.project(project / "src")
    (project / "kernels.lock").write_text("[]")
    os.chown(project / "kernels.lock", 12345, -1)
    with pytest.raises(TableError, match="belongs to another user"):
        policy.read_lock(project / "src")


def test_a_project_that_is_locked_gets_the_locked_commit_after_the_branch_moved(make_swapper, project, hub):
    commit = publish(hub, 1)
    publish(hub, 2)
    (project / "kernelswap.toml").write_text("[policy]\nlocked_only = true\n")
    (project / "kernelswap.lock").write_text(Lock((Locked("org/kernel", commit, version=1),)).dumps())
    assert make_swapper().load("org/kernel@1").VALUE == 1
    with pytest.raises(UnknownKernel, match="the lock has org/kernel"):
        make_swapper().load("org/other@1")


def test_locked_only_without_a_lock_loads_nothing_from_elsewhere(make_swapper, project, hub):
    publish(hub, 1)
    (project / "kernelswap.toml").write_text("[policy]\nlocked_only = true\n")
    with pytest.raises(Refused, match="no lock names it"):
        make_swapper().load("org/kernel@1")
    (project / "kernels.lock").write_text("{")
    with pytest.raises(BadMetadata, match=r"kernels\.lock"):
        make_swapper()


def test_a_lock_that_nobody_made_binding_pins_nothing(make_swapper, project, hub):
    commit = publish(hub, 1)
    publish(hub, 2)
    (project / "kernelswap.lock").write_text(Lock((Locked("org/kernel", commit, version=1),)).dumps())
    assert make_swapper().load("org/kernel@1").VALUE == 2


def test_the_hub_is_still_asked_whom_it_trusts_when_locked(make_swapper, project, hub):
    commit = publish(hub, 1)
    hub.organization("org", trusted=False)
    (project / "kernelswap.toml").write_text("[policy]\nlocked_only = true\n")
    (project / "kernelswap.lock").write_text(Lock((Locked("org/kernel", commit, version=1),)).dumps())
    with pytest.raises(Refused, match="not a trusted publisher"):
        make_swapper().load("org/kernel@1")
