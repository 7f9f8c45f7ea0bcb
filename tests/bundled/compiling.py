"""Compile what the bundled Triton kernels would launch on another GPU, without one: `python compiling.py CAPABILITY layers,loss,attention WIDTHS DTYPES`.

The host code runs on CPU tensors; below `bind`, this compiles for the capability that is asked for and launches nothing.
Prints one line of JSON for each compilation: kernel, constants, warps, bytes of shared memory, whether the GPU has that much.
"""

# ruff: noqa: T201 -- a script that prints

from __future__ import annotations

import importlib
import json
import sys
import types
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import mangle_type

SHARED = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB of shared memory that one block may have (CUDA C++ Programming Guide, technical specifications)."""


class TooMuch(triton.runtime.errors.OutOfResources):
    """What Triton raises when it loads such a kernel."""


def compiler(capability, seen):
    def bound(fn, args, device, num_warps, num_stages, overlap, constants):
        names = fn.arg_names
        signature = {n: _type(a) for n, a in zip(names, args, strict=False)} | dict.fromkeys(constants, "constexpr")
        aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(args) if _aligned(fn.params[i], a)}
        source = triton.compiler.ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=aligned)
        row = {"kernel": f"{fn.__module__.rpartition('.')[2]}.{fn.__name__}", "warps": num_warps, **constants}
        options = {"num_warps": num_warps, "num_stages": num_stages}
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        row["shared"] = made.metadata.shared
        row["fits"] = made.metadata.shared <= SHARED[capability] * 1024
        seen.append(row)
        print(json.dumps(row), flush=True)
        if not row["fits"]:
            raise TooMuch(made.metadata.shared, SHARED[capability] * 1024, "shared memory")
        return lambda blocks, stream, *call: None

    return bound


def _aligned(parameter, value):
    """As Triton specialises: memory of torch's is aligned; of integers, those that are and whose value it may look at."""
    return torch.is_tensor(value) or (isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize)


def _type(value):
    if torch.is_tensor(value):
        return mangle_type(value)
    return "fp32" if isinstance(value, float) else "i64" if value > 2**31 - 1 else "i32"


def modules(folder, *names, capability):
    package = types.ModuleType("compiled_" + folder.partition("/")[0])
    package.__path__ = [str(Path(__file__).parents[2] / "src" / "kernelswap" / "bundled" / folder)]
    sys.modules[package.__name__] = package
    launch = importlib.import_module(f"{package.__name__}._launch")
    launch.INTERPRETED = True  # CPU tensors are taken; nothing is launched
    seen = []
    launch._bound = compiler(capability, seen)
    launch.multiprocessors = lambda device: 100
    return types.SimpleNamespace(**{n: importlib.import_module(f"{package.__name__}.{n}") for n in names})


def layers(capability, widths, dtypes):
    it = modules("layers/build/torch-cuda", "rms_norm", "glu", "rope", "rope_gradients", "projections", capability=capability)
    for dtype in dtypes:
        for k in (1024, 12288):
            for rows in (1, 16):
                x, w = torch.zeros(rows, k, dtype=dtype), torch.zeros(64, k, dtype=dtype)
                it.projections.project(x, (w, w, w), (None, None, None))
                it.projections.gate_up(x, w, w)
        for n in widths:
            for m in (1, 100):
                x, w = torch.zeros(m, n, dtype=dtype), torch.zeros(n, dtype=dtype)
                it.rms_norm.rms_norm(x, w, 1e-6)
                it.rms_norm.add_rms_norm(x, x, w, 1e-6)
            leaf = x.requires_grad_()
            it.rms_norm.rms_norm(leaf, w, 1e-6).sum().backward()
            s, y = it.rms_norm.add_rms_norm(leaf, x.detach(), w, 1e-6)
            (s.sum() + y.sum()).backward()
        gate = torch.zeros(2, 64, dtype=dtype, requires_grad=True)
        for act in ("silu", "gelu", "gelu_tanh"):
            it.glu.act_mul(gate, gate, act).sum().backward()
        for d, hq, hk in ((64, 32, 32), (128, 32, 8), (256, 16, 1)):
            q, k = (torch.zeros(1, 3, h, d, dtype=dtype).transpose(1, 2).requires_grad_() for h in (hq, hk))
            cos, w = torch.zeros(1, 3, d, dtype=dtype), torch.zeros(d, dtype=dtype)
            for out in (it.rope.rope(q, k, cos, cos), it.rope.norm_rope(q, k, w, w, cos, cos, 1e-6)):
                (out[0].sum() + out[1].sum()).backward()
            it.rope_gradients.FUSED = True
            out = it.rope.norm_rope(q, k, w.requires_grad_(), w, cos, cos, 1e-6)
            (out[0].sum() + out[1].sum()).backward()
            it.rope_gradients.FUSED = False


def loss(capability, _, dtypes):
    it = modules("loss/build/torch-universal", "cross_entropy", capability=capability)
    for dtype in dtypes:
        z = torch.zeros(2, 151936, dtype=dtype, requires_grad=True)
        it.cross_entropy.cross_entropy(z, torch.zeros(2, dtype=torch.int64)).backward()


def configurations(capability, widths, dtypes):
    """What tuning tries first, of the kernels that it is for, where that is something else than the default compiled above."""
    it = modules("layers/build/torch-cuda", "rms_norm", "rope", "projections", "tuning", capability=capability)
    of = modules("attention/build/torch-universal", "decode", "tuning", capability=capability)
    for dtype in dtypes:
        x, w = torch.zeros(100, widths[0], dtype=dtype), torch.zeros(widths[0], dtype=dtype)
        q, k, cos, v = (torch.zeros(s, dtype=dtype) for s in ((1, 32, 3, 128), (1, 8, 3, 128), (1, 3, 128), (128,)))
        few = torch.zeros(64, min(4096, widths[0]), dtype=dtype)
        cache, one = torch.zeros(1, 8, 8000, 128, dtype=dtype), torch.zeros(1, 32, 1, 128, dtype=dtype)
        calls = {
            "rms_norm.forward": (it, lambda x=x, w=w: it.rms_norm.rms_norm(x, w, 1e-6)),
            "rms_norm.add": (it, lambda x=x, w=w: it.rms_norm.add_rms_norm(x, x, w, 1e-6)),
            "rope": (it, lambda q=q, k=k, v=v, cos=cos: it.rope.norm_rope(q, k, v, v, cos, cos, 1e-6)),
            "projections.project": (it, lambda x=x[:8, :4096], w=few: it.projections.project(x, (w, w, w), (None,) * 3)),
            "projections.gate_up": (it, lambda x=x[:1, :4096], w=few: it.projections.gate_up(x, w, w)),
            "decode": (of, lambda q=one, k=cache: of.decode.decode(q, k, k, scale=1.0)),
        }
        for name, (there, call) in calls.items():
            for change in there.tuning.SPACES[name].also:
                with there.tuning.Trial(name, change):
                    try:
                        call()
                    except TooMuch:
                        print(json.dumps({"left_out": name, **change}), flush=True)


def attention(capability, _, dtypes):
    it = modules("attention/build/torch-universal", "decode", capability=capability)
    for dtype in dtypes:
        for d, hq, hk in ((64, 32, 32), (128, 32, 8), (256, 16, 1), (96, 96, 2)):
            if dtype is not torch.float32:
                for keys in (100, 8000):
                    q, k = torch.zeros(1, hq, 1, d, dtype=dtype), torch.zeros(1, hk, keys, d, dtype=dtype)
                    try:
                        it.decode.decode(q, k, k, scale=1.0, length=torch.zeros(1, dtype=torch.int32))
                    except it.decode.Unfit:  # `dense.decode` goes on with PyTorch's kernels then
                        print(json.dumps({"left_to_pytorch": d}), flush=True)


if __name__ == "__main__":
    CAPABILITY = int(sys.argv[1])
    WIDTHS = [int(n) for n in sys.argv[3].split(",")]
    DTYPES = [getattr(torch, n) for n in sys.argv[4].split(",")]
    for what in sys.argv[2].split(","):
        {"layers": layers, "loss": loss, "attention": attention, "configurations": configurations}[what](
            CAPABILITY, WIDTHS, DTYPES
        )
