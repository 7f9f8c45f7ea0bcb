"""The processes of one job ask once, and agree."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
from tests.hub import kernel_files

from kernelswap.errors import NotCached, Unreachable
from kernelswap.job import Job
from kernelswap.sources.environment import Environment
from kernelswap.spec import parse
from kernelswap.types import Candidate

RANK = """
import pathlib, sys
from kernelswap.api import Swapper
from kernelswap.errors import KernelSwapError
from kernelswap.types import Machine
swapper = Swapper(cache=pathlib.Path(sys.argv[1]), machine=Machine(os="linux", cpu="x86_64", torch=(2, 13), cxx11=True))
try:
    print(swapper.kernel("org/kernel@1").artifact.digest, end="")
except KernelSwapError as e:
    print(type(e).__name__, end="")
"""
NAMED = (("WORLD_SIZE", "2"), ("MASTER_PORT", "1"))


@pytest.fixture
def launch(hub, tmp_path):
    """Start `n` ranks of a job with caches of its own; what each printed, and the requests."""

    def run(n, name="job", start=None):
        place = tmp_path / name
        place.mkdir(exist_ok=True)
        hub.log.clear()
        base = {k: v for k, v in os.environ.items() if k not in {"RANK", "LOCAL_RANK", "WORLD_SIZE", "HF_HUB_OFFLINE"}}
        base |= {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_CACHE": str(place / "hf"),
            "XDG_CONFIG_HOME": str(place),
            "HF_HUB_ETAG_TIMEOUT": "5",
        }
        base |= {"WORLD_SIZE": str(n), "MASTER_PORT": name}
        command = [sys.executable, "-c", RANK, str(place / "cache")]

        def rank(r):
            environ = {**base, "RANK": str(r), "LOCAL_RANK": str(r)}
            return subprocess.Popen(command, cwd=place, env=environ, stdout=subprocess.PIPE, text=True)

        if start is None:
            said = [p.communicate()[0] for p in [rank(r) for r in range(n)]]
        else:
            said = []
            for r in range(n):
                said.append(rank(r).communicate()[0])
                start()
        return said, hub.requests()

    hub.organization("org", trusted=True)
    return run


def publish(hub, value):
    hub.repo("org/kernel").branch("v1", kernel_files("torch-cpu", f"VALUE = {value}", name="kernel"))


def test_four_ranks_ask_no_more_than_one_process_does(launch, hub):
    publish(hub, 1)
    (alone,), requests_alone = launch(1, "alone")
    together, requests = launch(4, "together")
    assert together == [alone] * 4
    assert sorted(requests) == sorted(requests_alone)


def test_a_branch_that_moves_between_two_ranks_moves_for_neither(launch, hub):
    publish(hub, 1)
    (first, second), _ = launch(2, start=lambda: publish(hub, 2))
    assert first == second
    (other,), _ = launch(1, "another-job")
    assert other != first


def test_where_the_network_failed_for_one_it_has_failed_for_all(launch, hub):
    publish(hub, 1)
    hub.fault("*", "status", status=503)
    said, _ = launch(2, start=hub.clear)  # the hub is back for the second one
    assert said == ["Unreachable", "Unreachable"]


def test_a_process_alone_is_no_job(tmp_path):
    for environ in ({}, {"RANK": "0", "WORLD_SIZE": "1"}, {"WORLD_SIZE": "4"}, {"RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "x"}):
        assert Environment.read(environ).job == ()
    named = Environment.read({"RANK": "1", "WORLD_SIZE": "4", "MASTER_PORT": "29500"}).job
    assert named == (("WORLD_SIZE", "4"), ("MASTER_PORT", "29500"))
    assert Environment.read({"RANK": "3", "WORLD_SIZE": "4", "MASTER_PORT": "29500"}).job == named
    assert Job.of(tmp_path, ()) is None
    assert Job.of(tmp_path, named) == Job.of(tmp_path, named) != Job.of(tmp_path, NAMED)


def test_what_does_not_read_as_an_answer_is_none(tmp_path):
    job, wanted = Job.of(tmp_path, NAMED), parse("org/kernel@1")
    candidate = Candidate(wanted, "hub", "org/kernel", "c" * 40, "torch-cpu")
    with job.turn(wanted):
        job.agree(wanted, [candidate, replace(candidate, variant="torch-cuda")])
    assert job.agreed(wanted) == parse(f"org/kernel@{'c' * 40}")
    (path,) = job.folder.glob("*.agreed")
    for text in ("", "{}", "[1, 2]", '["org/kernel", "../../x"]', '["org/kernel"]', "[" * 5000):
        path.write_text(text)
        assert job.agreed(wanted) is None
    failed = path.with_suffix(".failed")
    for text in ("", "[]", '["Tampered", "a", null, null]', '["Unreachable", 1, null, null]', '["SystemExit", "a", null, null]'):
        failed.write_text(text)
        with job.turn(wanted):
            pass
    failed.write_text('["NotCached", "a", null, "b"]')
    with pytest.raises(NotCached), job.turn(wanted):
        pass


def test_an_answer_is_the_jobs_for_a_while(tmp_path):
    job, wanted = Job.of(tmp_path, NAMED), parse("org/kernel@1")
    with job.turn(wanted):
        job.agree(wanted, [Candidate(wanted, "hub", "org/kernel", "c" * 40, "torch-cpu")])
    with pytest.raises(Unreachable), job.turn(wanted):
        raise Unreachable("gone")
    for path in job.folder.iterdir():
        os.utime(path, (1, 1))
    assert job.agreed(wanted) is None
    with job.turn(wanted):
        pass


def test_where_nothing_can_be_written_each_asks_for_itself(tmp_path):
    (tmp_path / "jobs").write_text("in the way")
    job, wanted = Job.of(tmp_path, NAMED), parse("org/kernel@1")
    with job.turn(wanted):
        job.agree(wanted, [Candidate(wanted, "hub", "org/kernel", "c" * 40, "torch-cpu")])
    assert job.agreed(wanted) is None


def test_under_torchrun_the_hub_hears_what_it_hears_from_one_process(hub, tmp_path):
    """For real: two ranks that torch's own launcher starts."""
    pytest.importorskip("torch")
    script = tmp_path / "rank.py"
    script.write_text(
        RANK.replace("print(", "import os\n    print(os.environ['RANK'], ", 1).replace('end=""', 'end="\\n", flush=True', 1)
    )
    environ = {k: v for k, v in os.environ.items() if k not in {"RANK", "LOCAL_RANK", "WORLD_SIZE", "HF_HUB_OFFLINE"}}

    def run(n):
        hub.log.clear()
        place = tmp_path / f"of-{n}"
        place.mkdir()
        more = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(place / "hf"), "XDG_CONFIG_HOME": str(place), "HOME": str(place)}
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={n}",
            script,
            place / "cache",
        ]
        done = subprocess.run(launcher, cwd=place, env={**environ, **more}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return dict(line.split() for line in done.stdout.splitlines()), hub.requests()

    hub.organization("org", trusted=True)
    hub.repo("org/kernel").branch("v1", kernel_files("torch-cpu", "VALUE = 1", name="kernel"))
    alone, for_one = run(1)
    both, for_two = run(2)
    assert set(both) == {"0", "1"}
    assert set(both.values()) == {alone["0"]}
    assert len(alone["0"]) == 64
    assert len(for_two) == len(for_one)
