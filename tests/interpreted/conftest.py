"""Triton's kernels on CPU tensors. Triton decides at its first import, so tests/bundled/test_interpreted.py gives these tests a
process of their own; elsewhere they are not collected.
"""

import importlib
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

BUNDLED = Path(__file__).parents[2] / "src" / "kernelswap" / "bundled"
collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
TOLERANCES = {torch.bfloat16: 1.6e-2, torch.float16: 1e-3, torch.float32: 1e-5}
"""Those of tests/gpu, but for bfloat16: the interpreter cuts it off where a GPU rounds, twice the error."""

MODULES = ("rms_norm", "gated_norm", "layer_norm", "softmax", "glu", "rope", "rope_gradients", "projections")
"""The files with kernels of `layers`."""


def package(name, folder, *names):
    """The files of a build as a package of that name, without its `__init__`."""
    module = types.ModuleType(name)
    module.__path__ = [str(BUNDLED / folder)]
    sys.modules[name] = module
    return types.SimpleNamespace(**{n: importlib.import_module(f"{name}.{n}") for n in names})


@pytest.fixture(scope="session")
def layers():
    found = package("layers_interpreted", "layers/build/torch-cuda", "_launch", *MODULES, "layers")
    assert found._launch.INTERPRETED
    return found


@pytest.fixture(scope="session")
def attention():
    return package(
        "attention_interpreted", "attention/build/torch-universal", "_launch", "append", "decode", "dense", "flash", "forward"
    )


@pytest.fixture(autouse=True)
def as_on_a_gpu():
    """Overflow is silent there; numpy, in which the interpreter computes, warns."""
    torch.manual_seed(0)
    with np.errstate(all="ignore"):
        yield


@pytest.fixture
def launches(layers, monkeypatch):
    """The kernels that were launched, by name: what went through the formula instead leaves none."""
    seen = []
    for module in (getattr(layers, name) for name in MODULES):

        def bind(fn, *args, _bind=layers._launch.bind, **more):
            launch = _bind(fn, *args, **more)

            def noted(*call):
                seen.append(fn.__name__)
                launch(*call)

            return noted

        monkeypatch.setattr(module, "bind", bind)
        for name in ("_bound", "_forwards", "_backwards", "_adds", "_shapes", "_projects", "_gate_ups"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, {})
    return seen


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)).item()


def both(f, g, inputs):
    """Worst relative error of f's outputs and gradients against g's in float64; inputs must come out unwritten."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    kept = [x.detach().clone() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    got, want = f(*leaves), g(*exact)
    got, want = (got, want) if isinstance(got, tuple) else ((got,), (want,))
    assert [x.shape for x in got] == [x.shape for x in want]
    grads = [torch.randn_like(x) for x in got]
    torch.autograd.backward(got, grads)
    torch.autograd.backward(want, [x.double() for x in grads])
    assert all(torch.equal(a, b) for a, b in zip(leaves, kept, strict=True)), "an input was written to"
    pairs = [*zip(got, want, strict=True), *((a.grad, b.grad) for a, b in zip(leaves, exact, strict=True))]
    return max(relative(a, b) for a, b in pairs)
