"""The same on a GPU: needs one, never runs in CI."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tests.proof.test_zoo import SAYS, draws
from tests.proof.zoo import ORIGINALS, RIGHT, WRONG, implementation, prove, site
from tests.proof.zoo_crash import artifact
from tests.proof.zoo_crash import implementation as crashing
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kernelswap.proof import Check
from kernelswap.types import Run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize(("specimen", "dtype"), draws(WRONG))
def test_a_wrong_kernel_is_refused_there_too(specimen, dtype):
    verdict = prove(Check(None), specimen, dtype, 128, device="cuda:0")
    assert not verdict.accepted
    if specimen.name != "random_noise":
        assert any(text in verdict.reason for text in SAYS.get(specimen.name, ("differs in",))), verdict.reason


@pytest.mark.parametrize(("specimen", "dtype"), draws(RIGHT))
def test_a_right_kernel_is_accepted_there_too(specimen, dtype):
    for training in {False, specimen.training}:
        verdict = prove(Check(None), replace(specimen, training=training), dtype, 130, device="cuda:0")
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


TRITON = """
        import triton, triton.language as tl
        from . import bad
        bad.launch(hidden_states)
"""
BAD = """
import triton, triton.language as tl

@triton.jit
def kernel(x, far):
    tl.store(x + far, 1.0)

def launch(x):
    kernel[(1,)](x, 1 << 40)
"""


def test_an_illegal_memory_access_does_not_reach_this_process(tmp_path):
    root = tmp_path / "kernel"
    found = artifact(root, TRITON.strip("\n"), native=False)
    (root / "bad.py").write_text(BAD)
    from kernelswap import tree

    found = replace(found, digest=tree.digest_of(tree.hashes(root)))
    module = LlamaRMSNorm(64).cuda()
    check = Check(None)
    verdict = check.equivalent(site(module, "rows"), module, LlamaRMSNorm.forward, crashing(found, LlamaRMSNorm.forward), Run())
    check.close()
    assert not verdict.accepted
    assert "illegal memory access" in verdict.reason or "in a child process" in verdict.reason
    assert torch.ones(3, device="cuda").sum().item() == 3.0


def test_the_bundled_kernels_are_accepted():
    import importlib.util
    import sys
    from pathlib import Path

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
        for width in (64, 128, 1024) if name != "rotary" else (64, 128):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                for training in (False, True):
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
