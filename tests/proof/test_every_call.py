"""`check=` through the real path: what each mode catches, and what it costs, counted in forwards of the original."""

import copy
import os
import pathlib
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
from tests.hub import kernel_files

from kernelswap import Swapper
from kernelswap.errors import Required
from kernelswap.types import Row, Use

N = 64
FORWARDS = []
"""Rows of every forward of the original."""
KERNEL = """
import torch
from torch import nn

CALLS = []
WRONG = []

class Norm(nn.Module):
    def forward(self, x):
        out = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight
        rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
        CALLS.append(rows)
        return out * 1.01 if WRONG and WRONG[0](rows) else out
"""


class Norm(nn.Module):
    def __init__(self, n=N):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(n) + 0.5), 1e-6

    def forward(self, x):
        FORWARDS.append(x.numel() // x.shape[-1])
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def plain(norm, x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps) * norm.weight


@pytest.fixture
def world(tmp_path):
    """`(a fresh Swapper with the same cache, the kernel's module)`; as a new process would be, with what is on disk."""
    files = kernel_files("torch-cpu", "from . import layers", name="every", files={"layers.py": f"# {tmp_path}\n{KERNEL}"})
    for path, data in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    row = Row("Norm", targets=("Norm",), needs=(("weight",),), probe="rows", use=(Use(f"dir://{tmp_path}:Norm"),))

    def swapper():
        return Swapper(cache=tmp_path / "cache", table=(row,), offline=True)

    module = swapper().kernel(f"dir://{tmp_path}").module.layers
    return swapper, module


def swapped(swapper, **wanted):
    torch.manual_seed(0)
    norm = Norm().eval()
    applied = swapper().swap(norm, **wanted)
    assert "1 of 1 swapped" in applied.explain()
    return norm, applied


@pytest.mark.parametrize(("check", "caught"), [("always", 4), ("sample:3", 6), ("first-use", None), ("off", None)])
def test_a_kernel_that_turns_wrong_later_is_refused_at_the_next_call_that_is_checked(world, check, caught):
    """The call that is caught is answered by the original, and so is every one after it."""
    swapper, kernel = world
    norm, applied = swapped(swapper, check=check)
    x, right = torch.randn(3, N), []
    with torch.no_grad():
        for number in range(9):
            if number == 4:
                kernel.WRONG.append(lambda _: True)
            right.append(torch.equal(norm(x), plain(norm, x)))
    wrong = range(4, 9 if caught is None else caught)
    assert right == [number not in wrong for number in range(9)]
    assert bool(applied.refusals) == (caught is not None)
    if caught is not None:
        assert "differs in output" in applied.refusals[0][1]


@pytest.mark.parametrize("rows", [1, 7, 100, 300])
@pytest.mark.parametrize("wrong", [1, 16, 256, 1000])
def test_one_call_stands_for_calls_of_every_size(world, rows, wrong):
    """After the first call nothing is checked; a kernel that is wrong for another number of rows only must be found in it."""
    swapper, kernel = world
    norm, applied = swapped(swapper)
    low = {1: 1, 16: 2, 256: 17, 1000: 257}[wrong]
    kernel.WRONG.append(lambda n: low <= n <= wrong)
    x = torch.randn(rows, N)
    with torch.no_grad():
        assert torch.equal(norm(x), plain(norm, x))
    assert "differs in output" in applied.refusals[0][1]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("check", ["first-use", "always"])
def test_under_require_a_later_refusal_is_an_error_at_the_call_that_finds_it(world, check, training):
    """Before anything is returned; naming site, tensor and error. Whoever catches it goes on with the original."""
    swapper, kernel = world
    torch.manual_seed(0)
    model = nn.Sequential(Norm(), nn.Linear(N, N)).train(training)
    applied = swapper().swap(model, require=["Norm"], check=check)
    x, returned = torch.randn(3, N, requires_grad=training), []
    model[0].register_forward_hook(lambda *_: returned.append(1))
    if check == "always":
        with torch.set_grad_enabled(training):
            model(x)
        assert len(returned) == 1
    returned.clear()
    kernel.WRONG.append(lambda _: True)
    with torch.set_grad_enabled(training):
        with pytest.raises(
            Required, match=r"(?s)0 \(Norm\): dir://.* was refused at this call: differs in output.*error .*limit"
        ) as e:
            model(x)
        assert returned == []
        assert "call again to go on without the kernel" in str(e.value)
        assert torch.equal(model(x), model[1](plain(model[0], x)))
        assert type(model[0]).forward is Norm.forward
    assert "differs in output" in applied.refusals[0][1]


def test_a_refusal_of_what_is_not_required_is_no_error(world):
    swapper, kernel = world
    norm, _ = swapped(swapper, require=())
    kernel.WRONG.append(lambda _: True)
    x = torch.randn(3, N)
    with torch.no_grad():
        assert torch.equal(norm(x), plain(norm, x))


def test_a_copy_of_a_model_requires_what_the_model_does(world):
    swapper, kernel = world
    norm, _ = swapped(swapper, require="Norm")
    twin = copy.deepcopy(norm)
    kernel.WRONG.append(lambda _: True)
    with torch.no_grad(), pytest.raises(Required, match="differs in output"):
        twin(torch.randn(3, N))


def test_a_first_call_costs_one_more_forward_of_its_size_and_a_warm_start_none(world):
    swapper, kernel = world
    x = torch.randn(70_000, N)  # more than is looked at in float64
    for start in ("cold", "warm"):
        norm, _ = swapped(swapper)
        FORWARDS.clear(), kernel.CALLS.clear()
        with torch.no_grad():
            norm(x)
            norm(x)
        assert FORWARDS.count(70_000) == (1 if start == "cold" else 0)
        assert kernel.CALLS.count(70_000) == 2
    assert FORWARDS == []
    assert kernel.CALLS == [70_000] * 2


def test_a_warm_start_runs_no_original_in_training_either(world):
    swapper, kernel = world
    x = torch.randn(5, N, requires_grad=True)
    for _ in range(2):
        norm, applied = swapped(swapper)
        norm.train()
        FORWARDS.clear(), kernel.CALLS.clear()
        norm(x).sum().backward()
        assert not applied.refusals
    assert FORWARDS == []
    assert kernel.CALLS == [5]


def test_a_refusal_is_known_at_the_next_start_and_costs_the_original_alone(world):
    swapper, kernel = world
    norm, _ = swapped(swapper)
    kernel.WRONG.append(lambda _: True)
    x = torch.randn(5, N)
    with torch.no_grad():
        norm(x)
        norm, applied = swapped(swapper)  # accepted on random tensors, long before
        kernel.CALLS.clear()
        assert torch.equal(norm(x), plain(norm, x))
    assert kernel.CALLS == []
    assert "differs in output" in applied.refusals[0][1]


def test_a_kernel_that_raises_after_a_warm_start_leaves_that_call_and_all_after_it_to_the_original(world):
    swapper, kernel = world
    norm, _ = swapped(swapper)
    x = torch.randn(5, N)

    def fails(_):
        raise RuntimeError("out of registers")

    with torch.no_grad():
        norm(x)
        norm, applied = swapped(swapper)
        kernel.WRONG.append(fails)
        for _ in range(2):
            assert torch.equal(norm(x), plain(norm, x))
    assert "raises RuntimeError: out of registers" in applied.refusals[0][1]


def test_inference_mode_and_no_grad_share_a_verdict(world):
    swapper, _ = world
    x = torch.randn(5, N)
    norm, _ = swapped(swapper)
    with torch.no_grad():
        norm(x)
    norm, _ = swapped(swapper)
    FORWARDS.clear()
    with torch.inference_mode():
        norm(x)
    assert FORWARDS == []


def test_a_verdict_says_what_it_holds_for(world):
    swapper, _ = world
    norm, _ = swapped(swapper)
    with torch.no_grad():
        norm(torch.randn(5, N))
    about = [dict(v.details) for v in swapper().prover.store]
    assert {d["tensors"] for d in about} == {"random", "2-16 rows"}
    assert {d["mode"] for d in about} == {"inference", "training"}
    for d in about:
        assert d["kernel"].endswith(":Norm")
        assert len(d["digest"]) == 64
        assert (d["dtype"], d["build"], d["layer"]) == ("float32", "torch-cpu", "Norm")
        assert d["original"].endswith("test_every_call.Norm")
        assert torch.__version__ in d["machine"]


ORIGINAL = """
import torch.nn as nn

class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.kind = "silu"

    def forward(self, x):
        if self.kind in {"gelu", "silu", "relu", "tanh", "mish", "elu"} and x.ndim not in ({1, 2, 3}, frozenset()):
            return nn.functional.silu(x)
        return x
"""


def test_what_a_verdict_holds_for_is_the_same_in_every_process(tmp_path):
    """Sets have another order in each process; a key that did, too, would make every start a first one."""
    (tmp_path / "originals.py").write_text(ORIGINAL)
    code = "import originals; from kernelswap.proof import keys; print(keys._class_code(originals.Gate), keys._code(originals.Gate.forward))"
    paths = os.pathsep.join([str(tmp_path), str(pathlib.Path(__file__).parents[2] / "src")])
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(said) == 1
