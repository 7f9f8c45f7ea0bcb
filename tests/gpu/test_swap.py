"""A model on a GPU, swapped through the default table with the kernels that come with the package."""

import pytest
import torch
import torch.nn as nn
from tests.swapping import Mlp, RMSNorm, frozen

from kernelswap.api import Swapper
from kernelswap.types import Kept, Swap

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or torch.version.hip is not None, reason="needs an NVIDIA GPU"),
]


@pytest.fixture(scope="module")
def swapper(tmp_path_factory):
    return Swapper(cache=tmp_path_factory.mktemp("gpu"), offline=True)


def qwen3(dtype=torch.bfloat16):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=512,
    )
    return transformers.Qwen3ForCausalLM(config).eval().to("cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_on_a_gpu_is_swapped_proved_and_given_back(swapper, dtype):
    model, ids = qwen3(dtype), torch.randint(0, 512, (2, 33), device="cuda")
    before = frozen(model)
    with torch.no_grad():
        original = model(ids).logits
        applied = swapper.swap(model)
        served = {
            o.site.layer: o.inference.implementation.origin.candidate.variant for o in applied.outcomes if isinstance(o, Swap)
        }
        assert served == dict.fromkeys(("RMSNorm", "SwiGLUMLP", "residual_norm", "norm_rotary"), "torch-cuda")
        found = model(ids).logits
        assert applied.refusals == ()
        torch.testing.assert_close(found, original, atol=0.05 if dtype == torch.bfloat16 else 1e-4, rtol=0.05)
        applied.undo()
        assert frozen(model) == before
        assert torch.equal(model(ids).logits, original)


def test_training_on_a_gpu_goes_through_kernels(swapper):
    model, ids = qwen3(torch.float32).train(), torch.randint(0, 512, (2, 33), device="cuda")

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    expected = gradients()
    with swapper.swap(model) as applied:
        found = gradients()
        assert applied.refusals == ()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_modules_on_two_devices_are_each_served_by_their_own_build(swapper):
    model = nn.ModuleList([RMSNorm(64).cuda(), RMSNorm(64), Mlp(64, nn.SiLU()).cuda()])
    here, there, mlp, _ = swapper.plan(model, build="never")
    assert here.inference.implementation.origin.candidate.variant == "torch-cuda"
    assert isinstance(there, Kept)
    assert there.reason == "kernelswap/layers:RMSNorm is not compiled on this machine yet"
    assert isinstance(mlp, Swap)


def test_each_gated_norm_is_served_by_the_kernel_that_computes_what_it_computes(swapper):
    pytest.importorskip("transformers")
    from transformers.models.bamba.modeling_bamba import BambaRMSNormGated
    from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1RMSNormGated
    from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

    norms = nn.ModuleList(
        [
            Qwen3NextRMSNormGated(128),
            MambaRMSNormGated(256, group_size=256),
            BambaRMSNormGated(256, group_size=64),
            FalconH1RMSNormGated(256, n_groups=2, norm_before_gate=True),
            FalconH1RMSNormGated(256, n_groups=2, norm_before_gate=False),
        ]
    ).to("cuda", torch.bfloat16)
    for norm in norms:
        nn.init.normal_(norm.weight)
    inputs = [torch.randn(2, 33, n.weight.shape[0], device="cuda", dtype=torch.bfloat16) for n in norms]
    expected = [n(x, x.flip(1)) for n, x in zip(norms, inputs, strict=True)]
    with swapper.swap(norms) as applied:
        served = [o.training.implementation.layer for o in applied.outcomes]
        assert served == ["RMSNormGated", "RMSNormGateFirst", "RMSNormGateFirst", "RMSNormGatedGroups", "RMSNormGatedGroups"]
        for norm, x, want in zip(norms, inputs, expected, strict=True):
            torch.testing.assert_close(norm(x, x.flip(1)), want, rtol=2e-2, atol=2e-2)
        assert applied.refusals == ()


@pytest.mark.parametrize(
    ("name", "serves"),
    [("Glm", "apply_rotary_pos_emb_pairs"), ("Cohere", "apply_rotary_pos_emb_pairs_wide"), ("Llama", "apply_rotary_pos_emb")],
)
def test_each_rotary_embedding_is_served_by_the_kernel_that_computes_what_it_computes(swapper, name, serves):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        vocab_size=512, pad_token_id=0,
    )  # fmt: skip
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().to("cuda", torch.bfloat16)
    ids = torch.randint(0, 512, (2, 33), device="cuda")
    with torch.no_grad():
        original = model(ids).logits
        with swapper.swap(model) as applied:
            rotary = [o for o in applied.outcomes if o.site.name == "apply_rotary_pos_emb"]
            assert [o.inference.implementation.layer for o in rotary] == [serves] * 2
            torch.testing.assert_close(model(ids).logits, original, atol=0.05, rtol=0.05)
            assert applied.refusals == ()
