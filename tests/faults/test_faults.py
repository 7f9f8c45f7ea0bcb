"""Each fault on the whole way from a spec to an import: success, or the original with a reason, or a clear error. Never half
of something, a wait without end, or another kernel than the one asked for; and when the fault is gone, it works.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from tests.hub import kernel_files
from tests.swapping import CPU, LAYERS, Near

from kernelswap.api import Swapper
from kernelswap.errors import Refused, StoreError, Unreachable
from kernelswap.sources.hub import HubSource
from kernelswap.types import Kept, Swap
from kernelswap.verifiers.policy import PolicyVerifier

SPEC = "org/kernel@1"
MORE = f"""
from pathlib import Path

LENGTH = {60_000}


def read():
    return (Path(__file__).parent / "data.bin").read_bytes()
"""
CODE = "VALUE = 42\nfrom . import more, layers\n"
FILES = {"more.py": MORE, "layers.py": LAYERS, "data.bin": bytes(range(256)) * 234 + bytes(96)}


@pytest.fixture
def published(hub):
    hub.organization("org", trusted=True)
    commit = hub.repo("org/kernel").branch("v1", kernel_files("torch-cpu", CODE, name="kernel", files=FILES))
    hub.repo("org/other").branch("v1", kernel_files("torch-cpu", "VALUE = 1", name="other"))
    hub.log.clear()
    return commit


@pytest.fixture
def make(hub, hub_cache, tmp_path, published):
    """A Swapper as after a new start; the caches stay."""

    def swapper(**more):
        source = HubSource(hub_cache, more.pop("url", hub.url), backoff=0.02, **more)
        return Swapper(
            sources={"hub": source}, verifiers=[PolicyVerifier()], cache=tmp_path / "cache", machine=CPU, prover=Near()
        )

    return swapper


@pytest.fixture
def heals(make, hub, tmp_path, published):
    """After the test: without the fault the very kernel that was asked for loads, and nothing half is anywhere."""
    yield
    hub.clear()
    kernel = make(remember=0.0).kernel(SPEC)
    assert kernel.module.VALUE == 42
    assert kernel.artifact.candidate.commit == published
    assert len(kernel.module.more.read()) == kernel.module.more.LENGTH
    assert not any(make().store.verify_all().values())
    assert not list((tmp_path / "cache" / "staging").glob("*"))


def stored(tmp_path):
    return list((tmp_path / "cache" / "artifacts").glob("*"))


pytestmark = pytest.mark.usefixtures("heals")


# -- the hub is in trouble


def test_a_500_that_passes_is_not_noticed(make, hub):
    hub.fault("/api/*", "status", status=500, times=2)
    assert make().load(SPEC).VALUE == 42


def test_a_500_that_stays_is_called_a_network_failure(make, hub, tmp_path):
    hub.fault("/api/*", "status", status=500)
    with pytest.raises(Unreachable, match=r"network failure: the hub at .* answered 500"):
        make().load(SPEC)
    assert not stored(tmp_path)


@pytest.mark.parametrize(("kind", "more"), [("status", {"status": 500}), ("nonsense", {}), ("status", {"status": 403})])
def test_where_the_hub_is_in_trouble_the_original_stays_with_that_reason(make, hub, kind, more):
    hub.fault("/api/*", kind, **more)
    model = torch.nn.Sequential(torch.nn.LayerNorm(8))
    (outcome,) = make().plan(model, table={"LayerNorm": f"{SPEC}:LayerNorm"}, inherit=False)
    assert isinstance(outcome, Kept)
    assert "the hub at" in outcome.reason
    hub.clear()
    (outcome,) = make(remember=0.0).plan(model, table={"LayerNorm": f"{SPEC}:LayerNorm"}, inherit=False)
    assert isinstance(outcome, Swap)


def test_a_429_is_waited_for_as_it_asks(make, hub):
    hub.fault("*/refs", "status", status=429, retry_after=1, times=1)
    began = time.monotonic()
    assert make().load(SPEC).VALUE == 42
    assert time.monotonic() - began >= 1


def test_a_429_that_asks_for_an_hour_is_an_error_at_once(make, hub):
    hub.fault("*/refs", "status", status=429, retry_after=3600)
    began = time.monotonic()
    with pytest.raises(Unreachable, match=r"limits our requests \(429\), and asks to wait 3600 s"):
        make().load(SPEC)
    assert time.monotonic() - began < 20


def test_a_file_that_the_hub_does_not_give_out_is_called_a_network_failure_not_a_missing_file(make, hub, tmp_path):
    make().find(SPEC)
    hub.fault("*/resolve/*", "status", status=403)
    with pytest.raises(Unreachable, match=r"the hub at .* refused the token .403."):
        make().load(SPEC)
    assert not stored(tmp_path)


def test_a_name_that_dns_does_not_know_is_a_network_failure(make):
    with pytest.raises(Unreachable, match=r"network failure: the hub at http://kernels\.invalid did not answer"):
        make(url="http://kernels.invalid").load(SPEC)


# -- bytes on their way


@pytest.mark.parametrize("kind", ["drop", "truncate", "corrupt"])
def test_a_file_that_is_dropped_truncated_or_changed_once_comes_again(make, hub, kind):
    hub.fault("/lfs/*", kind, times=1, method="GET")
    assert make().load(SPEC).VALUE == 42


def test_wrong_bytes_of_the_right_length_are_refused(make, hub, tmp_path, hub_cache):
    hub.fault("/lfs/*", "corrupt")
    with pytest.raises(Unreachable, match="has other bytes than the hub lists, twice"):
        make().load(SPEC)
    assert not stored(tmp_path)


def test_truncated_files_are_refused(make, hub, tmp_path):
    hub.fault("/lfs/*", "truncate")
    with pytest.raises(Unreachable, match="network failure"):
        make().load(SPEC)
    assert not stored(tmp_path)


def test_bytes_that_differ_from_what_the_publisher_digested_are_refused(make, hub, tmp_path):
    """The hub itself lists and sends other bytes: only the build's own digests know."""
    files = kernel_files("torch-cpu", CODE, name="kernel", files=FILES)
    hub.repo("org/kernel").branch("v1", {**files, "build/torch-cpu/data.bin": bytes(len(FILES["data.bin"]))})
    with pytest.raises(Refused, match=r"data\.bin"):
        make().load(SPEC)
    assert not stored(tmp_path)
    hub.repo("org/kernel").branches["v1"] = next(c for c, f in hub.repo("org/kernel").commits.items() if f == files)


def test_a_stale_etag_does_not_change_what_is_loaded(make, hub):
    hub.fault("*/resolve/*", "stale-etag")
    assert len(make().load(SPEC).more.read()) == 60_000


def test_a_slow_drip_of_a_file_ends_with_the_patience(make, hub, tmp_path):
    hub.fault("/lfs/*", "slow", seconds=0.6, method="GET")
    began = time.monotonic()
    with pytest.raises(Unreachable, match=r"network failure: the hub at .* was not done after 2 s"):
        make(patience=1.0).load(SPEC)
    assert time.monotonic() - began < 15
    assert not stored(tmp_path)


def test_a_slow_drip_of_an_answer_ends_with_the_patience(make, hub):
    hub.fault("*/refs", "hold")
    began = time.monotonic()
    with pytest.raises(Unreachable, match=r"network failure: the hub at .* was not done after 0 s"):
        make(patience=0.3).load(SPEC)
    assert time.monotonic() - began < 15


# -- the machine


@pytest.fixture
def elsewhere(hub, published):
    """Runs one of `processes` in a directory that other users can read."""
    root = Path(tempfile.mkdtemp())
    root.chmod(0o755)

    def run(what, *more):
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "KERNELSWAP"))}
        command = [sys.executable, "-m", "tests.faults.processes", what, hub.url, str(root), *map(str, more)]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=900)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    yield run
    shutil.rmtree(root, ignore_errors=True)


posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@posix
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kill_9_at_100_random_points_leaves_caches_that_the_next_start_uses(elsewhere):
    killed = int(elsewhere("kill", 100).split()[-1])
    assert killed > 50  # else the kills came too late to show anything


@posix
def test_two_processes_with_32_threads_each_get_the_same_kernel(elsewhere, hub):
    elsewhere("crowd", 32)
    assert len(hub.requests("/lfs/*")) <= 4  # HEAD and GET of the one large file, by each process at most


@posix
def test_a_full_disk_is_a_clean_error_at_every_point(elsewhere):
    *short, last = elsewhere("full").splitlines()
    assert last == "loaded"
    assert {line.split(" ")[0] for line in short} <= {"StoreError", "loaded"}
    assert any("StoreError" in line for line in short)


@posix
def test_a_read_only_cache_serves_what_it_has_and_says_that_it_cannot_take_more(elsewhere):
    kind, *said = elsewhere("readonly").splitlines()
    assert kind == "StoreError"
    assert "cannot be written" in "\n".join(said)


def test_without_symbolic_links_everything_works_offline_too(elsewhere):
    elsewhere("links")


@pytest.mark.parametrize("years", [-30, -1, 1, 30])
def test_a_clock_that_is_years_off_changes_nothing(elsewhere, years):
    elsewhere("clock", years)


def test_a_cache_deleted_while_in_use_is_filled_again(make, tmp_path, hub_cache):
    swapper = make()
    kernel = swapper.kernel(SPEC)
    for cache in (tmp_path / "cache", hub_cache):
        shutil.rmtree(cache)
    assert kernel.module.VALUE == 42
    assert swapper.kernel(SPEC).module is kernel.module
    with pytest.raises(StoreError, match="is gone: the cache was deleted"):
        swapper.store.reverify(kernel.artifact)
    assert make().kernel(SPEC).artifact.digest == kernel.artifact.digest


@pytest.mark.parametrize("code", ["ESTALE", "EBUSY", "EIO", "EACCES"])
@pytest.mark.parametrize("times", [1, 1000])
def test_a_rename_that_fails_as_on_nfs_works_again_or_is_a_clean_error(make, tmp_path, monkeypatch, code, times):
    import errno

    real, left = os.rename, [times]

    def rename(source, target, **more):
        if "artifacts" in str(target) and left[0]:
            left[0] -= 1
            raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)), str(source))
        return real(source, target, **more)

    monkeypatch.setattr(os, "rename", rename)
    if times == 1 and code != "EACCES":
        assert make().load(SPEC).VALUE == 42
    else:
        with pytest.raises(StoreError):
            make().load(SPEC)
        assert not stored(tmp_path)
    monkeypatch.setattr(os, "rename", real)
