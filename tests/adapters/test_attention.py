"""`attn_implementation=`: which texts load which kernels, for which models, and what happens when one cannot be had."""

import json
import logging
import sys

import pytest
import torch
from tests.adapters import attention_world as world
from tests.adapters.attention_world import calls, out, pair
from transformers.integrations import hub_kernels

import kernelswap
from kernelswap.adapters.transformers import attention
from kernelswap.errors import Refused, SpecError

FLASH = "kernels-community/flash-attn2"
IDS = torch.arange(2 * 7).reshape(2, 7) + 2

pytestmark = pytest.mark.usefixtures("kernels")


def kernel_requests(hub):
    return [path for _, path in hub.requests() if "flash" in path or "stranger" in path or "itself" in path]


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)


def serves(text, swapper, loaded=None):
    """What the kernel is asked by one forward; other tests of this process may have asked it before."""
    before = len(calls(swapper, loaded or text))
    eager, model = pair("qwen3", text)
    with torch.no_grad():
        close(out(model, IDS), out(eager, IDS))
    return calls(swapper, loaded or text)[before:]


_SAYS = getattr(hub_kernels, "get_attn_kernel_version", None)
WITHOUT = _SAYS(FLASH) if _SAYS else 4
"""The version of flash-attn2 that is meant where none is named: what the release of Transformers says, if it says."""


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (FLASH, WITHOUT),
        (f"{FLASH}@v2.1.0", 2),
        (f"{FLASH}@v3", 3),
        (f"{FLASH}@3", 3),
        (f"{FLASH}@>=2.0,<3.0", 2),
        (f"{FLASH}@refs/pr/1", 4),
    ],
)
def test_a3_a4_tags_branches_constraints_and_refs_with_slashes(kernels, text, version):
    registered = world.registered(text)
    assert serves(text, kernels, text if "@" in text else f"{FLASH}@{version}")
    assert {k.artifact.metadata.version for k in kernels._kernels.values() if k.module is registered.module} == {version}


def test_a9_two_models_with_two_kernels_alternate_without_a_request(kernels, as_default_hub):
    _, one = pair("qwen3", FLASH)
    _, two = pair("qwen3", f"{FLASH}@v2.1.0")
    first, second = calls(kernels, f"{FLASH}@{WITHOUT}"), calls(kernels, f"{FLASH}@v2.1.0")
    before = len(as_default_hub.requests())
    for _ in range(3):
        a, b = len(first), len(second)
        out(one, IDS)
        assert (len(first) - a, len(second) - b) == (2, 0)
        out(two, IDS)
        assert (len(first) - a, len(second) - b) == (2, 2)
    assert len(as_default_hub.requests()) == before


def test_a10_a_function_is_chosen_by_name(kernels):
    named = "kernels-community/named"
    assert serves(f"{named}:my_attention", kernels, named) == ["my_attention"] * 2
    assert serves(f"{named}:nested.attention", kernels, named) == ["my_attention"] * 2
    assert serves(f"{named}:in_flash_style", kernels, named) == ["in_flash_style"] * 2
    with pytest.raises(ValueError, match=r"no function other; it has in_flash_style, my_attention"):
        attention.prepare(f"{named}:other")
    with pytest.raises(ValueError, match=r"no attention function that is known; it has in_flash_style(.|\n)*named:FUNCTION"):
        attention.prepare(named)


def test_the_other_shapes(kernels):
    from transformers.masking_utils import sdpa_mask

    assert serves("kernels-community/itself", kernels) == ["forward", "forward"]
    assert world.registered("kernels-community/itself").mask is sdpa_mask
    pytest.importorskip("transformers.integrations.msa_attention")
    from transformers.integrations.msa_attention import msa_attention_forward

    assert world.registered("kernels-community/sparse").forward is msa_attention_forward


def test_what_a_kernel_lacks_is_made_up_for_and_said_once(kernels, said):
    poor = "kernels-community/poor-flash"
    eager, model = pair("gemma2", poor)
    with torch.no_grad():
        close(out(model, IDS), out(eager, IDS))
        out(model, IDS)
    assert [line for line in said() if poor in line] == [
        f"{poor}: has no sliding window, soft cap; kernelswap/attention serves where that is needed",
        f"{poor}: has no soft cap; kernelswap/attention serves where that is needed",
    ]
    assert calls(kernels, poor) == []
    eager, model = pair("qwen3", poor)
    with torch.no_grad():
        close(out(model, IDS), out(eager, IDS))
    assert calls(kernels, poor) == ["varlen"] * 2, "a kernel without a plain function serves through the other"


def test_a_directory_and_the_bundled_kernel(kernels, make_repo):
    root = make_repo("mine", {"torch-cpu": {"code": world.FLASH, "files": world.OURS}})
    assert serves(f"dir://{root}", kernels)
    assert serves(str(root), kernels)
    for text in ("kernelswap/attention", "bundled://attention"):
        eager, model = pair("qwen3", text)
        close(out(model, IDS), out(eager, IDS))


def test_paged_is_taken_off(kernels):
    assert attention.prepare(f"paged|{FLASH}") == FLASH
    assert attention.prepare("paged|eager") == "paged|eager"
    assert attention.prepare("paged|sdpa") == "paged|sdpa"


def test_at_run_time_and_back(kernels):
    eager, model = pair("qwen3", "sdpa")
    model.set_attn_implementation(FLASH)
    assert model.config._attn_implementation == FLASH
    before = len(calls(kernels, f"{FLASH}@{WITHOUT}"))
    close(out(model, IDS), out(eager, IDS))
    model.set_attn_implementation("sdpa")
    close(out(model, IDS), out(eager, IDS))
    assert len(calls(kernels, f"{FLASH}@{WITHOUT}")) == before + 2


def test_d6_sub_models_have_kernels_of_their_own(kernels):
    from transformers import AutoConfig, AutoModelForImageTextToText

    text = {**world.SIZE, "head_dim": 8, "sliding_window": 4}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 8,
        "patch_size": 4,
    }
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    made = AutoModelForImageTextToText.from_config(config, attn_implementation={"text_config": FLASH, "vision_config": "sdpa"})
    assert made.config.text_config._attn_implementation == FLASH
    assert made.config.vision_config._attn_implementation == "sdpa"
    made.set_attn_implementation({"text_config": "eager", "vision_config": "kernels-community/itself"})
    assert made.config.vision_config._attn_implementation == "kernels-community/itself"
    assert made.config.text_config._attn_implementation == "eager"


def test_a14_switched_off_nothing_is_fetched(monkeypatch, as_default_hub, said):
    monkeypatch.setenv("USE_HUB_KERNELS", "0")
    eager, _ = pair("qwen3", "eager")
    for text in (FLASH, "stranger/flash", "kernelswap/attention"):
        eager.set_attn_implementation(text)
        assert eager.config._attn_implementation == "sdpa"
        assert any(line.startswith(f"{text}: kernels are switched off") for line in said())
    assert kernel_requests(as_default_hub) == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("kernels-community/none", "none"),
        (f"{FLASH}@9", "v4"),
        ("kernels-community/for-cuda", "cu128"),
        ("bundled://nothing", "the bundled kernels are"),
    ],
)
def test_a_kernel_that_cannot_be_had_leaves_pytorchs_own_with_one_line(text, reason, said):
    assert attention.prepare(text) is None
    assert attention.prepare({"text_config": text, "": "sdpa"}) == {"text_config": None, "": "sdpa"}
    lines = [line for line in said() if line.startswith(text)]
    assert len(lines) == 1
    assert reason in lines[0]
    assert lines[0].endswith("attention is PyTorch's own")
    eager, _ = pair("gemma2", "eager")
    eager.set_attn_implementation(text)
    assert eager.config._attn_implementation in {"sdpa", "eager"}


def test_a_hub_that_cannot_be_reached_leaves_pytorchs_own(as_default_hub, said):
    as_default_hub.fault("*", "status", status=503)
    assert attention.prepare(FLASH) is None
    assert any(line.startswith(FLASH) and line.endswith("attention is PyTorch's own") for line in said())


def test_a_publisher_whom_nobody_vouches_for_is_an_error():
    with pytest.raises(Refused, match="stranger"):
        attention.prepare("stranger/flash")
    assert attention.prepare("stranger/flash", trust=True) == "stranger/flash"


def test_a_text_that_does_not_parse_is_an_error():
    with pytest.raises(SpecError):
        attention.prepare("kernels-community/flash-attn2@")


@pytest.mark.parametrize("where", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def test_a_kernel_that_a_configuration_file_names_is_never_fetched_nor_trusted(tmp_path, as_default_hub, said, where):
    from transformers import AutoModelForCausalLM

    eager, _ = pair("qwen3", "eager")
    eager.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    for text in ("stranger/flash", "kernels-community/itself"):
        path.write_text(json.dumps({**json.loads(path.read_text()), where: text}))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", allow_all_kernels=True)
        assert model.config._attn_implementation == "sdpa"
    assert kernel_requests(as_default_hub) == []
    lines = [line for line in said() if "named by the model's configuration" in line]
    assert [line.partition(":")[0] for line in lines] == (
        [] if where.endswith("internal") else ["stranger/flash", "kernels-community/itself"]
    )
    if where == "_attn_implementation":
        return  # Transformers lets this key of a file win over the argument
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation=FLASH)
    assert model.config._attn_implementation == FLASH


def test_saving_a_model_does_not_write_its_kernel(tmp_path):
    _, model = pair("qwen3", FLASH)
    model.save_pretrained(tmp_path / "model")
    assert FLASH not in (tmp_path / "model" / "config.json").read_text()


def test_uninstall_gives_every_attribute_back_and_models_keep_their_kernel(kernels):
    import transformers.modeling_flash_attention_utils as utils
    from transformers import PreTrainedModel

    eager, model = pair("qwen3", FLASH)
    taken = {name: sys.modules[module] for module, name, _ in attention.TOUCHED if module in sys.modules}
    assert utils.lazy_import_flash_attention.__wrapped__ is not utils.lazy_import_flash_attention
    wrapped = [vars(PreTrainedModel)["set_attn_implementation"], vars(PreTrainedModel)["_check_and_adjust_attn_implementation"]]
    originals = [w.__wrapped__ for w in wrapped] + [utils.lazy_import_flash_attention.__wrapped__]
    kernelswap.uninstall()
    after = [vars(PreTrainedModel)[w.__name__] for w in wrapped] + [utils.lazy_import_flash_attention]
    assert all(a is b for a, b in zip(after, originals, strict=True))
    assert taken
    with torch.no_grad():
        close(out(model, IDS), out(eager, IDS))
    assert attention.prepare(FLASH) == FLASH, "nothing is done without an installation"


def test_code_of_transformers_that_asks_for_flash_functions_gets_those_of_the_kernel(kernels):
    import transformers.modeling_flash_attention_utils as utils

    module = world.registered(FLASH).module
    found = utils.lazy_import_flash_attention(FLASH)
    assert found is utils.lazy_import_flash_attention(FLASH)
    assert found[0][:3] == (module.flash_attn_func, module.flash_attn_varlen_func, module.flash_attn_with_kvcache)


def test_a_request_for_weights_is_answered_once(said):
    _, model = pair("qwen3", FLASH)
    model.config._output_attentions = True
    for _ in range(2):
        world.registered(FLASH).forward(
            model.model.layers[0].self_attn, *torch.randn(3, 1, 4, 3, 8), None, output_attentions=True
        )
    assert len([line for line in said() if "gives no attention weights" in line]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("text", ["kernelswap/attention", FLASH])
def test_continuous_batching(kernels, text, caplog):
    from transformers import ContinuousBatchingConfig, GenerationConfig

    pytest.importorskip("transformers.generation.continuous_batching.initialization")

    caplog.set_level(logging.ERROR)
    eager, model = pair("qwen3", text)
    asked = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(use_cuda_graph=False, num_blocks=16, max_batch_tokens=64)  # else most of the memory
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    found = model.generate_batch(prompts, generation_config=asked, continuous_batching_config=batching, progress_bar=False)
    for prompt, answer in zip(prompts, found.values(), strict=True):
        wanted = eager.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False)[0, len(prompt) :]
        assert answer.generated_tokens == wanted.tolist()
    if text == FLASH:
        assert "varlen" in calls(kernels, f"{FLASH}@{WITHOUT}")


def test_a_standard_name_whose_package_is_not_installed_is_its_kernel_or_pytorch_with_a_line(kernels, as_default_hub, said):
    """Transformers knows a kernel for each of these names; where that cannot be had, a line says so and the model runs."""
    eager, model = pair("qwen3", "sdpa")
    model.set_attn_implementation("flash_attention_2")
    assert any(
        line.startswith("flash_attention_2: the package is not installed, kernels-community/flash-attn2") for line in said()
    )
    before = len(calls(kernels, f"{FLASH}@{WITHOUT}"))
    close(out(model, IDS), out(eager, IDS))
    assert len(calls(kernels, f"{FLASH}@{WITHOUT}")) > before
    model.set_attn_implementation("flash_attention_3")  # the tests' hub has none
    assert [line for line in said() if "flash-attn3" in line and line.endswith("attention is PyTorch's own")]
    assert model.config._attn_implementation == "sdpa"
    close(out(model, IDS), out(eager, IDS))


@pytest.fixture
def poisoned():
    """What `torch.empty` returns is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["kernelswap/attention", FLASH])
def test_continuous_batching_with_a_block_table(kernels, text, caplog, monkeypatch, poisoned):
    """Transformers takes this path on GPUs only; the kernel of the tests can do it anywhere. Before 5.20 the pages are `torch.empty`."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    setting_up = pytest.importorskip("transformers.generation.continuous_batching.initialization")
    monkeypatch.setattr(setting_up, "ensure_decode_fast_path_is_available", lambda *_: None)
    caplog.set_level(logging.ERROR)
    eager, model = pair("qwen3", text)
    asked = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(max_blocks_per_request=4, use_cuda_graph=False, num_blocks=16, max_batch_tokens=64)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    found = model.generate_batch(prompts, generation_config=asked, continuous_batching_config=batching, progress_bar=False)
    for prompt, answer in zip(prompts, found.values(), strict=True):
        wanted = eager.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False)[0, len(prompt) :]
        assert answer.generated_tokens == wanted.tolist()
    if text == FLASH:
        assert "kvcache" in calls(kernels, f"{FLASH}@{WITHOUT}")
