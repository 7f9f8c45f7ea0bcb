"""Small real layers, kernels for them, and provers that do no more than say yes, say no, or remember."""

import threading
from pathlib import Path

import torch
from torch import nn

from kernelswap.apply import apply
from kernelswap.types import Artifact, Candidate, Choice, Implementation, Metadata, Requirement, Row, Site, Swap, Verdict


class RMSNorm(nn.Module):
    def __init__(self, size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, size))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        variance = hidden_states.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states.float() * torch.rsqrt(variance + self.variance_epsilon)).to(hidden_states.dtype)


def rms_norm_kernel(self, hidden_states):
    """The same numbers to within rounding, with other saved tensors than the original."""
    return nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


def off_by_one_kernel(self, hidden_states):
    """Tells by its output that it ran."""
    return RMSNorm.forward(self, hidden_states) + 1


class MLP(nn.Module):
    def __init__(self, size=8):
        super().__init__()
        self.gate_proj = nn.Linear(size, 2 * size, bias=False)
        self.up_proj = nn.Linear(size, 2 * size, bias=False)
        self.down_proj = nn.Linear(2 * size, size, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def reading_mlp_kernel(self, x):
    gate, up = x @ self.gate_proj.weight.T, x @ self.up_proj.weight.T
    return self.down_proj(nn.functional.silu(gate) * up) + 1


READING = ("gate_proj.weight", "up_proj.weight", "down_proj()")
CALLING = ("gate_proj()", "up_proj()", "down_proj()", "act_fn()")


def scale(x, by=2.0):
    return x * by


def scale_kernel(x, by=2.0):
    return x * by + 1


class Scaled(nn.Module):
    """Looks `scale` up as a global, as attention layers do with their rotary embedding."""

    def __init__(self, size=4):
        super().__init__()
        self.norm = RMSNorm(size)

    def forward(self, x):
        return scale(self.norm(x), by=3.0)


class Block(nn.Module):
    def __init__(self, size=8):
        super().__init__()
        self.norm1, self.mlp, self.norm2 = RMSNorm(size), MLP(size), RMSNorm(size)

    def forward(self, x):
        return self.norm2(x + self.mlp(self.norm1(x)))


class Model(nn.Module):
    def __init__(self, layers=2, size=8):
        super().__init__()
        self.layers = nn.ModuleList(Block(size) for _ in range(layers))
        self.norm = RMSNorm(size)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


# -- kernels and plans --------------------------------------------------------------------------------------------

ORIGIN = Artifact(
    candidate=Candidate(Requirement("org/test"), source="dir", name="org/test", commit="0" * 40, variant="torch-cpu"),
    path=Path("nowhere"),
    digest="0" * 64,
    metadata=Metadata(name="test", id="test", version=1, license="Apache-2.0", backend="cpu"),
)


def kernel(forward, *, kind="module", backward=True, compiles=True, reads=(), layer="RMSNorm"):
    return Implementation(
        layer=layer, kind=kind, forward=forward, backward=backward, compiles=compiles, origin=ORIGIN, reads=tuple(reads)
    )


BOTH = object()


def swap(path, inference, training=BOTH, *, name="", device="cpu", dtype="torch.float32", verdict=None):
    """A Swap for `path`; `training=None` keeps the original there."""
    training = inference if training is BOTH else training
    kind = "function" if name else "module"
    layer = (inference or training).layer
    site = Site(
        path,
        kind,
        layer,
        target="here",
        device=device,
        dtype=dtype,
        training=False,
        row=Row(layer, kind, probe="rows"),
        name=name,
    )
    verdict = verdict or Verdict(accepted=True, reason="equal on random tensors")
    return Swap(site, Choice(inference, verdict=verdict), Choice(training, verdict=verdict))


def everywhere(model, forward, cls=RMSNorm, **more):
    """Swap every module of that class."""
    one = kernel(forward, **more)
    return [swap(path, one) for path, m in model.named_modules() if isinstance(m, cls)]


def as_now(module):
    """What undo must bring back exactly: class, `__dict__` by identity of its values, and hooks."""
    return [(type(m), {k: id(v) for k, v in vars(m).items()}, dict(m._forward_hooks)) for m in module.modules()]


# -- provers ------------------------------------------------------------------------------------------------------


class Prover:
    """Runs both and accepts, or refuses with `reason`. `calls` are those it was asked to compare."""

    def __init__(self, reason=None):
        self.reason, self.calls, self.lock = reason, [], threading.Lock()

    def equivalent(self, site, module, original, candidate, run):
        return Verdict(accepted=True, reason="not looked at")

    def first_call(self, site, module, original, candidate, run, args, kwargs, *, anew=False):
        with self.lock:
            self.calls.append((site.path, run))
        bound = (module, *args) if site.kind == "module" else args
        theirs, ours = original(*bound, **kwargs), candidate.forward(*bound, **kwargs)
        if self.reason is not None:
            return theirs, Verdict(accepted=False, reason=self.reason)
        return ours, Verdict(accepted=True, reason="accepted on the first call")


def swapped(module=None, implementation=None, *, training=..., check="off", prover=None, **more):
    """One module, swapped as a model of its own."""
    module = module or RMSNorm(8)
    implementation = implementation or kernel(off_by_one_kernel)
    training = implementation if training is ... else training
    return module, apply(module, [swap("", implementation, training)], prover or Prover(), check=check, **more)


class Comparing(Prover):
    """Accepts what is close to the original on the tensors of the call."""

    def first_call(self, site, module, original, candidate, run, args, kwargs, *, anew=False):
        bound = (module, *args) if site.kind == "module" else args
        theirs, ours = original(*bound, **kwargs), candidate.forward(*bound, **kwargs)
        with self.lock:
            self.calls.append((site.path, run))
        try:
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
        except AssertionError as e:
            return theirs, Verdict(accepted=False, reason=str(e).splitlines()[0])
        return ours, Verdict(accepted=True, reason="close on the first call")
