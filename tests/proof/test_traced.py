"""A kernel from elsewhere that says it compiles is believed when it has been seen to, and only as far as that."""

import pytest
import torch
import torch.nn as nn
from tests.hub import kernel_files

from kernelswap import Swapper
from kernelswap.proof import Check
from kernelswap.types import Row, Use

KERNEL = """
import torch
from torch import nn

class Norm(nn.Module):
    can_torch_compile = {claims}

    def forward(self, x):
        out = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight
        return {result}
"""
RIGHT = "out"
WRONG = "out * 1.01 if torch.compiler.is_compiling() else out"


class Norm(nn.Module):
    def __init__(self, n=64):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(n) + 0.5), 1e-6

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def swapped(where, result, *, claims=True, name="traced"):
    code = KERNEL.format(claims=claims, result=result)
    files = kernel_files("torch-cpu", "from . import layers", name=name, files={"layers.py": f"# {where}\n{code}"})
    for path, data in files.items():
        (where / path).parent.mkdir(parents=True, exist_ok=True)
        (where / path).write_bytes(data)
    row = Row("Norm", targets=("Norm",), needs=(("weight",),), probe="rows", use=(Use(f"dir://{where}:Norm"),))
    torch.manual_seed(0)
    norm = Norm().eval()
    return norm, Swapper(cache=where / "cache", table=(row,), offline=True).swap(norm)


def test_a_kernel_wrong_only_under_compile_serves_eager_calls_and_compiled_code_gets_the_original(tmp_path):
    norm, applied = swapped(tmp_path, WRONG)
    x = torch.randn(5, 64)
    with torch.no_grad():
        plain = Norm.forward(norm, x)
        assert torch.equal(norm(x), plain)
        assert not applied.refusals
        fast = torch.compile(norm, backend="eager")
        torch.testing.assert_close(fast(x), plain, rtol=1e-6, atol=1e-6)
    assert not applied.outcomes[0].inference.implementation.compiles
    assert "not under torch.compile, where the original serves: under torch.compile it differs in output" in applied.explain(
        long=True
    )


def test_a_kernel_that_compiles_as_it_says_is_left_alone(tmp_path):
    _, applied = swapped(tmp_path, RIGHT)
    assert applied.outcomes[0].inference.implementation.compiles
    details = dict(applied.outcomes[0].inference.verdict.details)
    assert details["compiled"] == "1 graph by aot_eager"
    assert "not under torch.compile" not in applied.explain(long=True)


def test_one_that_does_not_say_so_is_not_asked(tmp_path):
    _, applied = swapped(tmp_path, WRONG, claims=False)
    assert "compiled" not in dict(applied.outcomes[0].inference.verdict.details)
    assert not applied.outcomes[0].inference.implementation.compiles


def test_what_was_found_is_known_at_the_next_start(tmp_path, monkeypatch):
    swapped(tmp_path, WRONG)

    def never(*_):
        raise AssertionError("traced again")

    monkeypatch.setattr(Check, "_under_trace", never)
    _, applied = swapped(tmp_path, WRONG)
    assert not applied.outcomes[0].inference.implementation.compiles
