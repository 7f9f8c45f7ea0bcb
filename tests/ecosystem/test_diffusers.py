"""diffusers as it is: its norms and gated projections are swapped, and its attention backends take their kernels from here."""

import os
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from tests.cli.conftest import compiled_cache
from tests.hub import kernel_files

import kernelswap as ks

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own imports
    diffusers = pytest.importorskip("diffusers")

FLUX = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": [4, 4, 8],
}


def flux():
    model = diffusers.FluxTransformer2DModel(**FLUX).eval()
    ids = torch.zeros(16, 3)
    given = {
        "hidden_states": torch.randn(1, 16, 4),
        "encoder_hidden_states": torch.randn(1, 8, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": ids,
        "txt_ids": torch.zeros(8, 3),
    }
    return model, given


def unet():
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
    ).eval()
    return model, {"sample": torch.randn(1, 4, 16, 16), "timestep": 3, "encoder_hidden_states": torch.randn(1, 7, 32)}


def wan():
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=256,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    ).eval()
    given = {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "timestep": torch.tensor([5]),
        "encoder_hidden_states": torch.randn(1, 6, 16),
    }
    return model, given


MODELS = {
    # class of diffusers or torch -> how many of them the model has, all of which are served
    "flux": (flux, {"RMSNorm": 6, "LayerNorm": 6, "SiLU": 6, "GELU": 3}),
    "unet": (unet, {"LayerNorm": 12, "SiLU": 10, "GEGLU": 4}),
    "wan": (wan, {"RMSNorm": 8, "FP32LayerNorm": 7, "SiLU": 2, "GELU": 3}),
}


@pytest.fixture(scope="module")
def swapper(layers_build, tmp_path_factory):
    """One whose bundled CPU kernels are compiled."""
    return ks.Swapper(cache=compiled_cache(tmp_path_factory.mktemp("cache"), layers_build), offline=True)


@pytest.mark.parametrize("name", MODELS)
def test_norms_activations_and_gated_projections_of_a_model_are_swapped_and_given_back(swapper, name):
    make, wanted = MODELS[name]
    torch.manual_seed(0)
    model, given = make()
    with torch.no_grad():
        before = model(**given).sample
        applied = swapper.swap(model, build="wait")
        kept = {f"{o.site.path}: {o.reason}" for o in applied.outcomes if not hasattr(o, "inference")}
        assert not kept
        served = {}
        for outcome in applied.outcomes:
            served[outcome.site.target.rpartition(".")[2]] = served.get(outcome.site.target.rpartition(".")[2], 0) + 1
        assert served == wanted
        torch.testing.assert_close(model(**given).sample, before, atol=2e-5, rtol=1e-4)
        applied.undo()
        assert torch.equal(model(**given).sample, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("make", "layer"),
    [
        (lambda m: m.GEGLU(32, 48), "GEGLU"),
        (lambda m: m.GEGLU(32, 48, bias=False), "GEGLU"),
        (lambda m: m.SwiGLU(32, 48), "SwiGLU"),
        (lambda m: m.GELU(32, 48), "LinearGELU"),
        (lambda m: m.GELU(32, 48, approximate="tanh"), "LinearGELU"),
        (lambda m: m.ApproximateGELU(32, 48), "LinearQuickGELU"),
    ],
)
def test_each_projection_with_an_activation_has_its_kernel_with_gradients(swapper, make, layer, dtype):
    from diffusers.models import activations

    torch.manual_seed(0)
    module = torch.nn.Sequential(make(activations)).to(dtype)
    x = torch.randn(3, 40, 32, dtype=dtype, requires_grad=True)
    before = module(x)
    before.float().square().sum().backward()
    wanted, x.grad = x.grad, None
    applied = swapper.swap(module, build="wait")
    outcome = applied.outcomes[0]
    assert {o.reason for o in applied.outcomes[1:]} <= {"inside 0, which is swapped"}  # SwiGLU's own SiLU
    assert (outcome.site.layer, outcome.training.implementation.layer) == (layer, layer)
    after = module(x)
    after.float().square().sum().backward()
    near = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 5e-2, "rtol": 5e-2}
    torch.testing.assert_close(after, before, **near)
    torch.testing.assert_close(x.grad, wanted, **near)


def test_a_class_of_the_same_name_that_is_something_else_is_left_alone(swapper):
    class GEGLU(torch.nn.Module):  # of another library: value and gate the other way round
        def __init__(self):
            super().__init__()
            self.proj = torch.nn.Linear(8, 16)

        def forward(self, hidden_states, *args, **kwargs):
            gate, half = self.proj(hidden_states).chunk(2, dim=-1)
            return half * torch.nn.functional.gelu(gate)

    (outcome,) = swapper.swap(torch.nn.Sequential(GEGLU()), build="wait").outcomes
    assert not hasattr(outcome, "inference")


# -- attention, through `kernels` ----------------------------------------------------------------------------------------

FLASH = """
import torch
from torch.nn.functional import scaled_dot_product_attention as attention

from . import flash_attn_interface

CALLS = []


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), return_attn_probs=False):
    CALLS.append(q.shape)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return attention(q, k, v, is_causal=causal, scale=softmax_scale).transpose(1, 2)
"""
INTERFACE = """
def _flash_attn_forward(*args, **kwargs):
    raise NotImplementedError


_flash_attn_backward = _flash_attn_varlen_forward = _flash_attn_varlen_backward = _flash_attn_forward
"""
SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")
when = sys.argv[1]
import kernelswap
if when == "first":
    kernelswap.install()
from diffusers import FluxTransformer2DModel
from diffusers.utils import import_utils, is_kernels_available, is_kernels_version
before = import_utils._kernels_available, import_utils._kernels_version
if when == "later":
    assert not is_kernels_available()
    kernelswap.install()
assert is_kernels_available() and is_kernels_version(">=", "0.14.0")
import torch
torch.manual_seed(0)
model = FluxTransformer2DModel(**{flux}).eval()
given = dict(hidden_states=torch.randn(1, 16, 4), encoder_hidden_states=torch.randn(1, 8, 32), pooled_projections=torch.randn(1, 32),
             timestep=torch.tensor([0.5]), img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(8, 3))
with torch.no_grad():
    native = model(**given).sample
    model.set_attention_backend("flash_hub")
    served = model(**given).sample
torch.testing.assert_close(served, native, atol=1e-5, rtol=1e-4)
import kernels
(loaded,) = kernels.get_loaded_kernels()
print("CALLS", len(loaded.module.CALLS), loaded.repo_info.repo_id, loaded.metadata.version)
try:
    model.set_attention_backend("sage_hub")
except ValueError as e:
    print("REFUSED", "not published by a trusted kernel publisher" in " ".join(str(e).split()))
kernelswap.uninstall()
print("AFTER", is_kernels_available(), when == "first" or all(a is b for a, b in zip(before, (import_utils._kernels_available, import_utils._kernels_version))))
"""


@pytest.mark.parametrize("when", ["first", "later"])
def test_an_attention_backend_of_the_hub_takes_its_kernel_from_here_whenever_diffusers_was_imported(
    hub, hub_cache, tmp_path, when
):
    hub.organization("kernels-community", trusted=True)
    hub.organization("SageAttention", trusted=False)
    files = kernel_files("torch-cpu", FLASH, name="flash-attn2", version=3, files={"flash_attn_interface.py": INTERFACE})
    hub.repo("kernels-community/flash-attn2").branch("v3", files)
    env = {
        **{k: v for k, v in os.environ.items() if k not in {"LOCAL_KERNELS", "USE_HUB_KERNELS", "HF_HUB_OFFLINE"}},
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": str(hub_cache),
        "HF_HOME": str(tmp_path / "hf"),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "KERNELSWAP_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    script = textwrap.dedent(SCRIPT).replace("{flux}", repr(FLUX))
    done = subprocess.run(
        [sys.executable, "-c", script, when], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "CALLS 2 kernels-community/flash-attn2 3" in done.stdout
    assert "REFUSED True" in done.stdout
    assert "AFTER False True" in done.stdout
