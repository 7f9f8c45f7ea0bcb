"""`choose="measured"`: what serves is what was the fastest here, by the size of the call; real kernels, timed on the spot."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests import swapping
from tests.hub import kernel_files
from tests.kernels import LAYERS, compiled
from tests.small import qwen3
from tests.swapping import CPU
from torch import nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from kernelswap import locking, sbom
from kernelswap.api import Swapper
from kernelswap.errors import TableError
from kernelswap.proof import Check, Verdicts, course, samples
from kernelswap.sources.hub import HubSource
from kernelswap.types import Kept, Mode, Row, Swap, Use

# Compiled kernels, so that the fast one is fast, of which two take their time: `Uneven` beyond 16 rows, `Slow` always.
SLOWED = """

class Uneven(nn.Module):
    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        for _ in range(20 if hidden_states.numel() > 16 * hidden_states.shape[-1] else 0):
            rms_norm(hidden_states, self.weight, self.variance_epsilon)
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class Slow(nn.Module):
    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        for _ in range(20):
            rms_norm(hidden_states, self.weight, self.variance_epsilon)
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class Raises(nn.Module):
    has_backward = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.shape[-2:-1] == (8,):  # no proof asks for eight rows
            raise RuntimeError("0 active drivers")
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)
"""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """A kernel repository in a folder, with the bundled kernels' sources under an id of its own and the layers above."""
    sources = tmp_path_factory.mktemp("sources") / "uneven"
    shutil.copytree(LAYERS, sources, ignore=shutil.ignore_patterns("__pycache__", "build"))
    layers = sources / "torch-ext" / "layers" / "layers.py"
    layers.write_text(layers.read_text() + SLOWED)
    toml = sources / "build.toml"
    toml.write_text(toml.read_text().replace('name = "layers"', 'name = "uneven"'))
    (sources / "torch-ext" / "layers").rename(sources / "torch-ext" / "uneven")
    build = compiled(sources, tmp_path_factory)
    root = tmp_path_factory.mktemp("repositories") / "uneven"
    shutil.copytree(build, root / "build" / build.name, ignore=shutil.ignore_patterns("__pycache__"))
    return root


def rows(native, *names):
    uses = tuple(Use(f"dir://{native}:{name}") for name in names)
    return (Row("RMSNorm", targets=("*RMSNorm",), needs=(("weight",), ("variance_epsilon",)), probe="rows", use=uses),)


@pytest.fixture
def make_swapper(tmp_path, native, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))

    def make(*names, cache="cache"):
        where = tmp_path / cache
        check = Check(Verdicts(where / "verdicts", key=tmp_path / "key"), contain="never")
        return Swapper(cache=where, table=rows(native, *names), prover=check, verifiers=(), offline=True)

    return make


def norms(width=256):
    return nn.Sequential(Qwen3RMSNorm(width), Qwen3RMSNorm(width)).eval()


def serving(outcome):
    """By size of the call: the layer that serves, or "" for the original."""
    assert isinstance(outcome, Swap), outcome.reason
    return {size: by.rpartition(":")[2] for size, by, _ in outcome.inference.measured}


def test_a_kernel_serves_only_the_sizes_at_which_it_beats_the_original(make_swapper):
    swapper = make_swapper("Uneven")
    model = qwen3(hidden_size=256, intermediate_size=256, head_dim=64)
    found = swapper.measure(model, seconds=120, compile=False)
    assert found.left == 0
    with swapper.swap(model, choose="measured", mode=Mode.INFERENCE, only=["input_layernorm"]) as applied:
        (outcome, *_) = [o for o in applied.outcomes if isinstance(o, Swap)]
        by_size = serving(outcome)
        assert by_size["1 row"] == by_size["2-16 rows"] == "Uneven", "compiled code beats six operators of torch"
        assert not any(by for size, by in by_size.items() if size not in {"1 row", "2-16 rows"})
        prompt = torch.randint(0, 64, (1, 40))
        with torch.no_grad(), applied.counting():
            cache = model(prompt, use_cache=True).past_key_values
        assert sum(applied.calls.values()) == 0, "40 rows: the original's"
        assert sum(applied.calls_of_original.values()) == 2
        with torch.no_grad(), applied.counting():
            model(prompt[:, :1], past_key_values=cache)
        assert sum(applied.calls.values()) == 2, "1 row: the kernel's"
        with torch.no_grad(), applied.counting():
            model(prompt)
        assert (sum(applied.calls.values()), sum(applied.calls_of_original.values())) == (0, 2), "the same once it is checked"
        assert "the original on 17-256 rows" in applied.explain()


def test_a_kernel_that_never_wins_is_not_used_and_the_reason_has_the_figures(make_swapper):
    swapper, model = make_swapper("Slow"), norms()
    swapper.measure(model, seconds=60, compile=False)
    outcomes = swapper.plan(model, choose="measured", mode=Mode.INFERENCE)
    assert all(isinstance(o, Kept) for o in outcomes)
    assert "measured, and the original is the fastest" in outcomes[0].reason
    assert "x on 1 row" in outcomes[0].reason
    assert all(isinstance(o, Swap) for o in swapper.plan(model, mode=Mode.INFERENCE)), "the table knows no better"


def test_the_fastest_serves_wherever_it_stands_in_the_table(make_swapper):
    swapper, model = make_swapper("Slow", "RMSNorm", "Uneven"), norms()
    swapper.measure(model, seconds=120, compile=False)
    by_size = serving(swapper.plan(model, choose="measured", mode=Mode.INFERENCE)[0])
    assert by_size["17-256 rows"] == by_size["257-4096 rows"] == "RMSNorm"
    assert "Slow" not in by_size.values()


def test_what_nobody_measured_is_as_the_table_has_it(make_swapper):
    swapper, model = make_swapper("Slow"), norms()
    (first, _) = swapper.plan(model, choose="measured", mode=Mode.INFERENCE)
    assert first.inference.implementation.layer == "Slow"
    assert {by for _, by, times in first.inference.measured if times is None} == {swapper.table[0].use[0].spec}


def test_a_measurement_holds_in_other_processes_and_for_nothing_else(make_swapper, native):
    swapper, model = make_swapper("RMSNorm"), norms()
    found = swapper.measure(model, seconds=60, compile=False)
    assert found.measured == 5, "one candidate, five sizes; equal modules are one"
    assert make_swapper("RMSNorm").measure(model, seconds=60, compile=False).measured == 0
    missing = {}
    for name, other in {
        "width": norms(128),
        "dtype": norms().bfloat16(),
        "another kernel": model,
        "threads": model,
        "training": model,
    }.items():
        again = make_swapper("Uneven" if name == "another kernel" else "RMSNorm")
        torch.set_num_threads(2 if name == "threads" else 1)
        mode = Mode.TRAINING if name == "training" else Mode.INFERENCE
        missing[name] = again.measure(other, seconds=0, compile=False, mode=mode).left
    assert set(missing.values()) == {5}, missing


def test_an_edited_kernel_is_measured_anew(make_repo, tmp_path):
    left = []
    for line in ("", "\n# edited"):
        code = swapping.LAYERS + line
        root = make_repo("plain", {"torch-cpu": {"code": "from . import layers", "files": {"layers.py": code}}})
        check = Check(Verdicts(tmp_path / "cache" / "verdicts", key=tmp_path / "key"))
        swapper = Swapper(cache=tmp_path / "cache", machine=CPU, table=rows(root, "RMSNorm"), prover=check, verifiers=())
        left.append(swapper.measure(norms(64), seconds=0, compile=False).left)
        swapper.measure(norms(64), seconds=60, compile=False)
    assert left == [5, 5]


def test_a_record_that_somebody_else_wrote_chooses_nothing(make_swapper):
    swapper, model = make_swapper("Slow", "RMSNorm"), norms()
    swapper.measure(model, seconds=60, compile=False)
    for file in Path(swapper.prover.store.path).rglob("*.json"):
        held = json.loads(file.read_text())
        if "x as fast" in held["verdict"]["reason"]:
            held["verdict"] |= {"accepted": True, "details": [["speedup", "99"], ["noise", "0"]]}
            file.write_text(json.dumps(held))
    again = make_swapper("Slow", "RMSNorm")
    (first, _) = again.plan(model, choose="measured", mode=Mode.INFERENCE)
    assert {times for _, _, times in first.inference.measured} == {None}
    assert first.inference.implementation.layer == "Slow", "nothing is known, and the table decides"


def test_a_candidate_that_raises_loses_with_its_reason(make_swapper):
    swapper, model = make_swapper("Raises"), norms()
    found = swapper.measure(model, seconds=60, compile=False)
    (entry,) = found.speeds.entries.values()
    verdict = found.speeds.known(entry, entry.candidates[0][1], 1)
    assert not verdict.accepted
    assert "0 active drivers" in verdict.reason
    by_size = serving(swapper.plan(model, choose="measured", mode=Mode.INFERENCE)[0])
    assert (by_size["1 row"], by_size["2-16 rows"]) == ("Raises", ""), "where it did not raise it may serve"


def test_training_is_measured_apart_with_its_backward(make_swapper):
    swapper, model = make_swapper("RMSNorm"), norms().train()
    found = swapper.measure(model, seconds=120, compile=False, mode=None)
    runs = [entry.run.training for entry in found.speeds.entries.values()]
    assert sorted(runs) == [False, True]
    forward, both = (found.speeds.known(e, e.candidates[0][1], 3) for e in found.speeds.entries.values())
    assert both.seconds_original > 1.5 * forward.seconds_original, "forward and backward"


def test_the_first_real_call_checks_the_kernel_and_not_the_original_in_its_place(make_swapper):
    swapper, model = make_swapper("Uneven"), norms()
    swapper.measure(model, seconds=60, compile=False)
    checked = []
    first_call, swapper.prover.first_call = swapper.prover.first_call, lambda *a: checked.append(a[5][0].shape) or first_call(*a)
    with swapper.swap(model, choose="measured", mode=Mode.INFERENCE), torch.no_grad():
        model(torch.randn(1, 64, 256))
        assert not checked, "a size that the original serves"
        model(torch.randn(1, 4, 256))
        assert set(checked) == {(1, 4, 256)}, "what is known of the first one is looked up for its like"


def test_the_model_is_as_it_was_and_answers_as_it_did(make_swapper):
    swapper, model = make_swapper("Uneven"), norms()
    before, x = swapping.frozen(model), torch.randn(2, 9, 256)
    with torch.no_grad():
        expected = [model(x[:, :n]) for n in (1, 9)]
        swapper.measure(model, seconds=60, compile=False)
        assert swapping.frozen(model) == before
        with swapper.swap(model, choose="measured"):
            for n, wanted in zip((1, 9), expected, strict=True):
                torch.testing.assert_close(model(x[:, :n]), wanted, rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(model[0](hidden_states=x[:, :n]), nn.Module.__call__(model[0], x[:, :n]))
        assert swapping.frozen(model) == before


def test_equal_modules_share_their_class(make_swapper):
    swapper, model = make_swapper("Uneven"), norms()
    swapper.measure(model, seconds=60, compile=False)
    with swapper.swap(model, choose="measured", check="off"):
        assert type(model[0]) is type(model[1])
        first = type(model[0])
    with swapper.swap(model, choose="measured", check="off"):
        assert type(model[0]).forward is first.forward, "the next swap too: compiled code guards on it"


def test_a_lock_and_a_bill_of_materials_name_every_kernel_that_may_serve(make_swapper):
    swapper, model = make_swapper("Slow", "RMSNorm"), norms()
    outcomes = swapper.plan(model, mode=Mode.INFERENCE)
    (kernel,) = [outcomes[0].inference.implementation.origin]
    other = replace(outcomes[0].inference.implementation, origin=replace(kernel, digest="f" * 64))
    mixed = samples.ROWS, [outcomes[0].inference.implementation, other, None, None, None], Qwen3RMSNorm.forward
    both = replace(outcomes[0].inference, implementation=course.mixture(*mixed, outcomes[0].inference.implementation))
    plan = [replace(outcomes[0], inference=both)]
    assert [a.digest for a in locking.serving(plan)] == [kernel.digest, "f" * 64]
    named = {c["bom-ref"] for c in sbom.bill(plan)["components"]}
    assert {f"kernel:{kernel.digest}", f"kernel:{'f' * 64}"} <= named


def test_choose_takes_two_words(make_swapper):
    with pytest.raises(TableError, match="choose='fastest'"):
        make_swapper("RMSNorm").plan(norms(), choose="fastest")


# -- other processes ------------------------------------------------------------------------------------------------

SCRIPT = """
import sys, torch
from pathlib import Path
from torch import nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from kernelswap.api import Swapper
from kernelswap.proof import Check, Verdicts
from kernelswap.types import Mode, Row, Use
where, native, what = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
names = ["Slow", "RMSNorm"]
use = tuple(Use(f"dir://{native}:{n}") for n in names)
table = (Row("RMSNorm", targets=("*RMSNorm",), needs=(("weight",), ("variance_epsilon",)), probe="rows", use=use),)
check = Check(Verdicts(where / "verdicts", key=where / "key"), contain="never")
swapper = Swapper(cache=where, table=table, prover=check, verifiers=(), offline=True)
model = nn.Sequential(Qwen3RMSNorm(256)).eval()
if what == "measure":
    found = swapper.measure(model, seconds=300, compile=False)
    print(found.measured, found.left)
else:
    (outcome,) = swapper.plan(model, choose="measured", mode=Mode.INFERENCE)
    print([by.rpartition(":")[2] for _, by, _ in outcome.inference.measured])
"""


def start(where, native, what, **environ):
    base = {k: v for k, v in os.environ.items() if k not in {"RANK", "LOCAL_RANK", "WORLD_SIZE"}}
    environ = {**base, "OMP_NUM_THREADS": "1", "XDG_CONFIG_HOME": str(where), **environ}
    command = [sys.executable, "-c", SCRIPT, str(where), str(native), what]
    return subprocess.Popen(command, cwd=where, env=environ, stdout=subprocess.PIPE, text=True)


def speeds(where):
    found = {}
    for file in (where / "verdicts").rglob("*.json"):
        data = file.read_bytes()
        if b"x as fast" in data:
            found[file.name] = data
    return found


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_whoever_is_killed_half_way_goes_on_from_there(native, tmp_path):
    process = start(tmp_path, native, "measure")
    deadline = time.monotonic() + 120
    while len(speeds(tmp_path)) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = speeds(tmp_path)
    assert 3 <= len(kept) < 10
    said, _ = start(tmp_path, native, "measure").communicate()
    assert said.split() == [str(10 - len(kept)), "0"], "two candidates at five sizes"
    assert kept.items() <= speeds(tmp_path).items(), "nothing was measured twice"


@pytest.mark.slow
def test_one_rank_decides_for_all(native, tmp_path):
    job = {"WORLD_SIZE": "2", "MASTER_PORT": "7"}
    before, _ = start(tmp_path, native, "plan", **job, RANK="0", LOCAL_RANK="0").communicate()
    start(tmp_path, native, "measure").communicate()  # meanwhile somebody measures
    after, _ = start(tmp_path, native, "plan", **job, RANK="1", LOCAL_RANK="1").communicate()
    alone, _ = start(tmp_path, native, "plan").communicate()
    assert before == after == f"{['Slow'] * 5}\n"
    assert "Slow" not in alone
    assert "RMSNorm" in alone


# -- the original under torch.compile -------------------------------------------------------------------------------


class Chain(nn.Module):
    """36 operators that inductor makes one of."""

    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(256)), 1e-6

    def forward(self, hidden_states):
        for _ in range(12):
            hidden_states = torch.relu(hidden_states * 1.01 + self.weight)
        return hidden_states


@pytest.mark.slow
def test_the_original_under_compile_is_a_candidate_and_serves_where_it_wins(make_swapper, native):
    swapper = make_swapper("Slow")
    swapper._table = (Row("Chain", targets=("Chain",), probe="rows", use=(Use(f"dir://{native}:Slow"),)),)
    model = nn.Sequential(Chain()).eval()
    found = swapper.measure(model, seconds=240)
    (outcome,) = found.outcomes
    if not isinstance(outcome, Swap):
        assert "raises" in outcome.reason, outcome.reason  # inductor needs a compiler: then it loses with that reason
        pytest.skip(outcome.reason)
    by_size = serving(outcome)
    assert "torch.compile" in by_size.values(), outcome
    with swapper.swap(model, choose="measured", mode=Mode.INFERENCE), torch.no_grad():
        x = torch.randn(1, 1024, 256)
        torch.testing.assert_close(model(x), Chain.forward(model[0], x), rtol=1e-5, atol=1e-6)


def test_kernels_of_the_hub_take_part_when_asked_for(hub, hub_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = kernel_files("torch-cpu", "from . import layers", name="norm", files={"layers.py": swapping.LAYERS})
    hub.organization("org", trusted=True)
    hub.repo("org/norm").branch("v1", files)
    row = Row("RMSNorm", targets=("*RMSNorm",), probe="rows", use=(Use("org/norm@1:RMSNorm"),))
    sources = {"hub": HubSource(hub_cache, endpoint=hub.url, backoff=0.01)}
    check = Check(Verdicts(tmp_path / "verdicts", key=tmp_path / "key"), contain="never")
    swapper = Swapper(cache=tmp_path / "cache", sources=sources, table=(row,), prover=check, machine=CPU, verifiers=())
    model = norms(64)
    assert swapper.measure(model, seconds=60, compile=False).measured == 0
    assert hub.requests() == [], "nothing is fetched unless somebody asks"
    found = swapper.measure(model, seconds=60, compile=False, hub=True)
    assert found.measured == 5
    (entry,) = found.speeds.entries.values()
    assert [spec for spec, _ in entry.candidates] == ["org/norm@1:RMSNorm"]
