"""Layouts of modules whose weights accelerate keeps in other memory or on disk: as the reference has them, and taken back."""

import copy

import pytest
import torch
from tests.adapters.layouts import KERNEL
from tests.adapters.test_layouts import FUSED, PLACES, calls, config, same
from tests.adapters.world import IDS, close, logits, plain, serving
from tests.hub import kernel_files

import kernelswap
from kernelswap.adapters.transformers import layouts

PARTS = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
KINDS = ["disk", "some", "cpu", "folder"]

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*offloaded modules.*:UserWarning", "ignore:.*on a device type different:UserWarning"
)


@pytest.fixture
def installed(make_swapper):
    """With the prover of users: kernels are held against the originals on weights that are brought for the call."""
    swapper = make_swapper(prover=None)
    kernelswap.install(swapper)
    yield swapper
    kernelswap.uninstall()


@pytest.fixture(autouse=True)
def fused(published):
    published.repo(FUSED).branch("v1", kernel_files("torch-cpu", KERNEL, name="fused"))


@pytest.fixture
def away(qwen, tmp_path):
    """`away(kind, kernel_config=...)`: the small Qwen3 with weights on disk, on disk for one of two layers, in other memory."""
    from accelerate import cpu_offload, disk_offload

    def make(kind, **more):
        folder = str(tmp_path / f"offload-{kind}")
        if kind in ("disk", "some"):  # the files of the checkpoint themselves
            places = {part: "disk" if kind == "disk" or part == "model.layers.1" else "cpu" for part in PARTS}
            return qwen(
                device_map={**places, "model.rotary_emb": "cpu", "model.embed_tokens": "cpu"}, offload_folder=folder, **more
            )
        model = qwen()
        cpu_offload(model, execution_device="cpu") if kind == "cpu" else disk_offload(model, folder, execution_device="cpu")
        if more:
            model.set_use_kernels(True, more["kernel_config"])
        return model

    return make


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", ["RMSNormMLP", "ScaledNorm"])
def test_the_kernel_serves_and_the_weights_go_away_again(away, installed, kind, layer):
    model = away(kind, kernel_config=config() if layer == "RMSNormMLP" else config(layer, "model.layers.*.*layernorm"))
    places = [path for path, _ in layouts.layouts(model)]
    assert places == (PLACES if layer == "RMSNormMLP" else sorted(f"model.layers.{i}.{n}" for i in range(2) for n in NORMS))
    for _ in range(2):
        close(logits(model), logits(plain()))
    found = serving(installed, model)
    assert {found[path] for path in places} == {f"{FUSED}:{layer}"}
    if layer == "RMSNormMLP":
        before = len(calls(installed))
        logits(model)
        assert len(calls(installed)) - before == 2
    assert all(p.is_meta for p in model.model.layers[1].parameters())


NORMS = ["input_layernorm", "post_attention_layernorm"]


@pytest.mark.parametrize("kind", KINDS)
def test_switching_off_gives_the_very_modules_and_hooks_back(away, kind):
    model = away(kind)
    before = {path: (m, type(m), vars(m).get("_hf_hook")) for path, m in model.named_modules()}
    weights = dict(model.named_parameters())
    expected = logits(model)
    model.set_use_kernels(True, config())
    assert len(list(layouts.layouts(model))) == 2
    logits(model)
    model.use_kernels = False
    assert {path: (m, type(m), vars(m).get("_hf_hook")) for path, m in model.named_modules()} == before
    assert [name for name, _ in model.named_parameters()] == list(weights)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("kind", ["disk", "cpu"])
def test_where_the_kernel_cannot_serve_the_originals_do_on_weights_that_are_brought(away, installed, kind):
    model = away(kind, kernel_config=config("Wrong"))
    for _ in range(2):
        close(logits(model), logits(plain()))
    model = away(kind, kernel_config=config("OnlyInfers"))
    model.train()
    before = len(calls(installed))
    close(logits(model), logits(plain()))
    assert len(calls(installed)) == before


@pytest.mark.parametrize("kind", ["disk", "some"])
def test_what_is_saved_loads_without_kernels_and_hooks(away, tmp_path, kind):
    from transformers import AutoModelForCausalLM

    model = away(kind, kernel_config=config())
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert not list(layouts.layouts(again))
    same(again, plain())
    close(logits(model), logits(plain()))


@pytest.mark.parametrize("kind", ["some", "cpu"])
def test_the_state_has_the_names_of_the_model(away, kind):
    assert list(away(kind, kernel_config=config()).state_dict()) == list(plain().state_dict())


@pytest.mark.parametrize("kind", ["cpu", "folder"])
def test_hooks_that_are_taken_off_leave_layouts_that_hold_their_weights(away, installed, kind):
    from accelerate.hooks import remove_hook_from_module

    model = away(kind, kernel_config=config())
    logits(model)
    remove_hook_from_module(model, recurse=True)
    assert not [name for name, p in model.named_parameters() if p.is_meta]
    before = len(calls(installed))
    close(logits(model), logits(plain()))
    assert len(calls(installed)) - before == 2
    same(model, plain())
    model.use_kernels = False
    assert not [path for path, m in model.named_modules() if "_hf_hook" in vars(m)]
    same(model, plain())
    close(logits(model), logits(plain()))


@pytest.mark.parametrize("kind", ["some", "cpu"])
def test_a_copy_is_given_back_by_itself(away, kind):
    model = away(kind, kernel_config=config())
    twin = copy.deepcopy(model)
    close(logits(twin), logits(plain()))
    twin.use_kernels = False
    assert len(list(layouts.layouts(model))) == 2
    assert not list(layouts.layouts(twin))
    close(logits(twin), logits(plain()))
    close(logits(model), logits(plain()))


@pytest.mark.parametrize("kind", ["some", "cpu"])
def test_generation_gives_the_same_tokens(away, kind):
    more = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(away(kind, kernel_config=config()).generate(IDS, **more), plain().generate(IDS, **more))


def test_modules_of_which_only_one_is_offloaded_are_left_as_they_are(qwen, said):
    from accelerate import cpu_offload

    model = qwen()
    cpu_offload(model.model.layers[0].mlp, execution_device="cpu")
    model.set_use_kernels(True, config())
    assert [path for path, _ in layouts.layouts(model)] == PLACES[1:]
    assert any("is here while others are kept elsewhere between calls (offloaded)" in line for line in said())
    close(logits(model), logits(plain()))


def test_a_forward_hook_beside_the_offloading_is_not_gone_round(away, said):
    model = away("cpu")
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    model.set_use_kernels(True, config())
    assert [path for path, _ in layouts.layouts(model)] == PLACES[1:]
    assert any("has forward hooks" in line for line in said())


def test_a_second_module_with_weights_of_its_own_is_saved_and_released_too():
    """Two layers one after the other that become one; the place of the second has nothing, and is still asked by name."""
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_module
    from transformers.core_model_loading import Concatenate, WeightConverter
    from transformers.integrations.accelerate import load_offloaded_parameter

    class Scale(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(3))

        def forward(self, x):
            return x * self.weight

    class BothLayout(torch.nn.Module):
        conversion_mapping = (WeightConverter(["0.weight", "1.weight"], "0.both", operations=[Concatenate(dim=0)]),)

        def __init__(self, first, second):
            super().__init__()
            self.both = torch.nn.Parameter(torch.empty(6))

        def forward(self, x):
            raise NotImplementedError

    model = torch.nn.ModuleDict({"pair": torch.nn.Sequential(Scale(), Scale())})
    first, second = (one.weight.detach().clone() for one in model["pair"])
    cpu_offload(model, execution_device="cpu")
    layout = layouts.fuse(model, "pair", ("0", "1"), BothLayout)
    assert layout.both.is_meta
    x = torch.randn(2, 3)
    assert torch.equal(model["pair"](x), x * first * second)
    assert torch.equal(load_offloaded_parameter(model, "pair.1.weight"), second)
    assert torch.equal(load_offloaded_parameter(model, "pair.0.weight"), first)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(layout.both, torch.cat([first, second]))
    with torch.no_grad():
        layout.both.mul_(2)
    layouts.unfuse(model)
    assert torch.equal(model["pair"](x), x * (first * 2) * (second * 2))
    assert [name for name, _ in model.named_parameters()] == ["pair.0.weight", "pair.1.weight"]
