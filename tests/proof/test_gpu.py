"""The same on a GPU: needs one, never runs in CI. One to two minutes, most of them proofs of many small calls and child processes that start.

The zoo: one dtype of each kernel; more of it is `python benchmarks/zoo.py --device cuda:0`.
"""

import json
import os
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.hub import kernel_files
from tests.proof.test_quick import Site, fused
from tests.proof.test_zoo import SAYS
from tests.proof.zoo import ORIGINALS, RIGHT, WRONG, implementation, prove, site
from tests.proof.zoo_crash import artifact
from tests.proof.zoo_crash import implementation as crashing
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kernelswap import tree
from kernelswap.api import Swapper
from kernelswap.errors import Required
from kernelswap.proof import Check, quick
from kernelswap.types import Mode, Row, Run, Swap, Use

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def one_of(dtypes):
    return torch.bfloat16 if torch.bfloat16 in dtypes else dtypes[0]


@pytest.mark.parametrize("specimen", WRONG, ids=lambda s: s.name)
def test_a_wrong_kernel_is_refused_there_too(specimen):
    verdict = prove(Check(None), specimen, one_of(specimen.dtypes), 128, device="cuda:0")
    assert not verdict.accepted
    if specimen.name != "random_noise":
        assert any(text in verdict.reason for text in SAYS.get(specimen.name, ("differs in",))), verdict.reason


@pytest.mark.parametrize("specimen", RIGHT, ids=lambda s: s.name)
def test_a_right_kernel_is_accepted_there_too(specimen):
    verdict = prove(Check(None), specimen, one_of(specimen.dtypes), 130, device="cuda:0")
    assert verdict.accepted, verdict.reason
    assert dict(verdict.details)["reference"] == "float64"


def test_a_first_call_leaves_both_generators_and_the_stream_alone():
    module = LlamaRMSNorm(128).cuda().bfloat16()
    x = torch.randn(4, 64, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        out, verdict = Check(None).first_call(
            site(module, "rows"), module, LlamaRMSNorm.forward, implementation(LlamaRMSNorm.forward), Run(training=True), (x,), {}
        )
        assert torch.cuda.current_stream() == side
    assert verdict.accepted, verdict.reason
    assert torch.equal(out, module(x))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(torch.cuda.get_rng_state(), states[1])


def test_memory_stays_bounded_in_a_large_call():
    module = LlamaRMSNorm(4096).cuda().bfloat16()
    x = torch.randn(16384, 4096, device="cuda", dtype=torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    with torch.no_grad():
        _, verdict = Check(None).first_call(
            site(module, "rows"), module, LlamaRMSNorm.forward, implementation(LlamaRMSNorm.forward), Run(), (x,), {}
        )
    assert verdict.accepted, verdict.reason
    whole = x.numel() * x.element_size()
    original = 3 * whole * 2  # the eager norm itself makes float32 copies
    assert torch.cuda.max_memory_allocated() - held < original + 4 * whole


# -- first contact --------------------------------------------------------------------------------------------------

TRITON = """        import triton, triton.language as tl
        from . import bad
        bad.launch(hidden_states)"""
OUTSIDE = """
import triton, triton.language as tl

@triton.jit
def kernel(x, far):
    tl.store(x + far, 1.0)

def launch(x):
    kernel[(1,)](x, 1 << 40)
"""
FOR_EVER = """
import triton, triton.language as tl

@triton.jit
def kernel(x):
    while tl.load(x, volatile=True) != 12345.0:
        tl.debug_barrier()

def launch(x):
    kernel[(1,)](x)
"""
CUDA = """        import ctypes, pathlib
        poke = ctypes.CDLL(str(pathlib.Path(__file__).parent / "_poke.so")).poke
        poke.argtypes = ctypes.c_void_p, ctypes.c_longlong
        if hidden_states.numel():
            poke(hidden_states.data_ptr(), 1 << 40)"""
POKE = """
__global__ void kernel(float *x, long long far) { x[far] = 1.0f; }
extern "C" void poke(void *x, long long far) { kernel<<<1, 1>>>((float *)x, far); }
"""


def grown(root, found, **files):
    """The artifact with more files in it."""
    for name, text in files.items():
        (root / f"{name}.py").write_text(text)
    return replace(found, digest=tree.digest_of(tree.hashes(root)))


def met(found, limit=120.0):
    """The verdict on a kernel that a child process has to meet first; and this process can still use its device."""
    module = LlamaRMSNorm(64).cuda()
    check = Check(None, time_limit=limit)
    try:
        verdict = check.equivalent(
            site(module, "rows"), module, LlamaRMSNorm.forward, crashing(found, LlamaRMSNorm.forward), Run()
        )
    finally:
        check.close()
    x = torch.randn(4, 64, device="cuda")
    torch.testing.assert_close(module(x).cpu(), module.cpu()(x.cpu()))
    return verdict


def test_a_triton_kernel_that_writes_out_of_bounds_does_not_reach_this_process(tmp_path):
    root = tmp_path / "kernel"
    verdict = met(grown(root, artifact(root, TRITON, native=False), bad=OUTSIDE))
    assert not verdict.accepted
    assert "in a child process" in verdict.reason
    assert "illegal memory access" in verdict.reason or "breaks the device" in verdict.reason, verdict.reason


def test_a_cuda_kernel_that_writes_out_of_bounds_does_not_reach_this_process(tmp_path):
    compiler = shutil.which("nvcc") or ("/usr/local/cuda/bin/nvcc" if Path("/usr/local/cuda/bin/nvcc").exists() else None)
    if compiler is None:
        pytest.skip("there is no nvcc")
    root = tmp_path / "kernel"
    found = artifact(root, CUDA, native=False)
    (tmp_path / "poke.cu").write_text(POKE)
    asked = (compiler, "-shared", "-Xcompiler", "-fPIC", "-arch=native", "-o", root / "_poke.so", tmp_path / "poke.cu")
    subprocess.run(asked, check=True, capture_output=True)
    verdict = met(grown(root, found))
    assert not verdict.accepted
    assert "in a child process" in verdict.reason
    assert "illegal memory access" in verdict.reason or "breaks the device" in verdict.reason, verdict.reason


def test_a_kernel_that_never_ends_on_the_device_is_given_up(tmp_path):
    root = tmp_path / "kernel"
    start = time.monotonic()
    verdict = met(grown(root, artifact(root, TRITON, native=False), bad=FOR_EVER), limit=10.0)
    assert not verdict.accepted
    assert "does not return within 10 s (tried in a child process)" in verdict.reason
    assert time.monotonic() - start < 40


# -- the first real call --------------------------------------------------------------------------------------------


def on_cuda(dtype=torch.bfloat16, n=256, **more):
    module = LlamaRMSNorm(n).to("cuda", dtype)
    nn.init.normal_(module.weight)
    return Site(module, LlamaRMSNorm.forward, fused, **more)


@pytest.mark.parametrize("training", [False, True])
def test_a_real_call_costs_one_forward_of_the_original_at_its_size(training):
    one = on_cuda(training=training)
    x = torch.randn(4000, 256, device="cuda", dtype=torch.bfloat16, requires_grad=training)
    out, verdict = one(x)
    assert verdict.accepted, verdict.reason
    assert torch.equal(out, fused(one.module, x))
    assert one.originals.count((x.numel(), torch.bfloat16)) == 1
    assert one.kernels.count(x.numel()) == 1 + training
    assert {size for size, _ in one.originals if size != x.numel()} <= {n * 256 for n in range(3 * quick.FEW + 1)}


@pytest.mark.parametrize("wrong", ["a row", "an input", "a gradient"])
def test_what_real_tensors_alone_show_is_found_on_the_device(wrong):
    one = on_cuda(torch.float32, training=wrong == "a gradient")
    x = torch.randn(3000, 256, device="cuda", requires_grad=wrong == "a gradient")
    before = x.detach().clone()

    def evil(self, x):
        out = fused(self, x)
        if len(x) == 3000 and wrong == "a row":
            out[2345] *= 1.02
        if wrong == "an input":
            x.mul_(2.0)
        return out * 1.02 - 0.02 * out.detach() if wrong == "a gradient" else out

    one.evil = evil
    out, verdict = one(x)
    says = {"a row": "differs in output", "an input": "changes its input", "a gradient": "differs in the gradient of"}
    assert says[wrong] in verdict.reason
    assert torch.equal(x, before)
    torch.testing.assert_close(out, LlamaRMSNorm.forward(one.module, before))


def test_under_require_the_call_that_finds_it_raises(tmp_path):
    def layers(factor):
        return f"""
import torch
from torch import nn

class Norm(nn.Module):
    def forward(self, hidden_states):
        out = torch.nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
        return out * ({factor} if hidden_states.shape[-2] == 77 else 1.0)
"""

    files = kernel_files("torch-cuda", "from . import layers", name="later", files={"layers.py": layers(1.01)})
    for path, data in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    row = Row("RMSNorm", targets=("*RMSNorm",), probe="rows", use=(Use(f"dir://{tmp_path}:Norm"),))
    model = nn.Sequential(LlamaRMSNorm(64)).cuda().eval()
    with torch.no_grad(), Swapper(cache=tmp_path / "cache", table=(row,), offline=True).swap(model, require="RMSNorm"):
        x = torch.randn(1, 77, 64, device="cuda")
        with pytest.raises(Required, match="differs in output"):
            model(x)
        assert torch.equal(model(x), LlamaRMSNorm.forward(model[0], x))


# -- measuring ------------------------------------------------------------------------------------------------------

SLOW = """
import torch
from torch import nn

class Slow(nn.Module):
    def forward(self, hidden_states):
        for _ in range(10):
            wide = hidden_states.float()
            hat = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
            out = self.weight * hat.to(hidden_states.dtype)
        return out
"""


@pytest.mark.parametrize("kernel", ["bundled", "slow"])
def test_what_is_measured_on_the_device_decides_between_kernel_and_original(tmp_path, kernel):
    """With cold L2 (`proof.measure`); the bundled kernel wins at the sizes that memory decides, one that works ten times over never."""
    use = Use("kernelswap/layers:RMSNorm")
    if kernel == "slow":
        for path, data in kernel_files("torch-cuda", "from . import layers", name="slow", files={"layers.py": SLOW}).items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes(data)
        use = Use(f"dir://{tmp_path}:Slow")
    row = Row("RMSNorm", targets=("*RMSNorm",), needs=(("weight",),), probe="rows", use=(use,))
    swapper = Swapper(cache=tmp_path / "cache", table=(row,), offline=True)
    model = nn.Sequential(LlamaRMSNorm(2048)).to("cuda", torch.bfloat16).eval()
    swapper.plan(model)  # compiles and proves, which is not to be on the clock below
    contest = swapper.measure(model, seconds=6.0, compile=False)
    assert contest.measured == 5
    with swapper.swap(model, choose="measured", mode=Mode.INFERENCE) as applied:
        (outcome,) = applied.outcomes
        if kernel == "slow":
            assert not isinstance(outcome, Swap), outcome
        else:
            served = {size: (by, times) for size, by, times in outcome.inference.measured}
            by, times = served["257-4096 rows"]
            assert by.endswith("layers:RMSNorm")
            assert times > 1.2
        x = torch.randn(2, 500, 2048, device="cuda", dtype=torch.bfloat16)
        with torch.no_grad():
            torch.testing.assert_close(model(x), LlamaRMSNorm.forward(model[0], x), atol=0.05, rtol=0.02)


def test_the_bench_verb_measures_a_small_model_there(tmp_path):
    from tests.cli.test_demo import environment, run

    argv = ("bench", "demo", "--device", "cuda", "--no-compile", "--no-train", "--time-budget", "12", "--json")
    surroundings = environment(tmp_path / "cache", tmp_path, CUDA_VISIBLE_DEVICES=os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
    process = run("-m", "kernelswap", *argv, env=surroundings, cwd=tmp_path)
    assert process.returncode in {0, 1}, process.stderr
    found = json.loads(process.stdout)
    assert found["measured"] > 0
    assert {race["device"].partition(":")[0] for race in found["candidates"]} == {"cuda"}
    laps = [lap for race in found["candidates"] if race["layer"] == "RMSNorm" for lap in race["laps"]]
    assert laps
    assert all(lap["seconds"] > 0 and lap["seconds_original"] > 0 for lap in laps)
    assert found["model"]["undone"] is True


def test_the_bundled_kernels_are_accepted():
    import importlib.util
    import sys

    import kernelswap

    root = Path(kernelswap.__file__).parent / "bundled" / "layers" / "build" / "torch-cuda"
    spec = importlib.util.spec_from_file_location("bundled_layers", root / "__init__.py", submodule_search_locations=[str(root)])
    package = sys.modules["bundled_layers"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    layers = SimpleNamespace(**vars(package.layers))
    cases = [
        ("llama", layers.RMSNorm.forward, "module"),
        ("gemma", layers.RMSNormZeroCentered.forward, "module"),
        ("mlp", layers.SwiGLUMLP.forward, "module"),
        ("rotary", getattr(package, "apply_rotary_pos_emb", None) or layers.apply_rotary_pos_emb, "function"),
    ]
    refused = []
    for name, forward, kind in cases:
        original = ORIGINALS[name]
        forward = getattr(forward, "forward", forward)  # noqa: PLW2901  # a function as a layer
        for width in (64, 1024) if name != "rotary" else (64, 128):
            for dtype in (torch.float32, torch.bfloat16):
                for training in (False, True) if dtype == torch.bfloat16 else (False,):
                    module = original.make(width).to("cuda", dtype)
                    where = replace(site(module, original.probe, kind), device="cuda:0", dtype=str(dtype))
                    verdict = Check(None).equivalent(
                        where,
                        module,
                        original.function or type(module).forward,
                        implementation(forward, kind),
                        Run(training=training),
                    )
                    if not verdict.accepted:
                        refused.append((name, width, dtype, training, verdict.reason))
    assert not refused
