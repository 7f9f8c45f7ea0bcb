"""Attention and the loss of causal language models by `use_kernels=True` alone: on the devices where they win, and nowhere against
what a program said. Where a test needs them to win on the CPU, the table says so for it."""

import copy
import dataclasses
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from tests.adapters import world
from tests.adapters.world import IDS, SIZE, close, logits

import kernelswap
from kernelswap import table
from kernelswap.adapters.transformers.config import KernelConfig
from kernelswap.machine import look
from kernelswap.types import Device, Kept, Mode, Swap

LABELS = IDS.clone()
LABELS[0, :2] = -100
BUNDLED = Path(kernelswap.__file__).parent / "bundled"


@pytest.fixture
def bundled(installed, tmp_path):
    """The Swapper, with the kernels for attention and for the loss that come with the package."""
    for name in ("attention", "loss"):
        shutil.copytree(BUNDLED / name, tmp_path / "bundled" / name)
    return installed


EVERYWHERE = tuple(dataclasses.replace(r, use=tuple(dataclasses.replace(u, on=()) for u in r.use)) for r in table.wins())


@pytest.fixture
def winning(bundled, monkeypatch):
    """The same, where both win on every device."""
    monkeypatch.setattr(table, "wins", lambda: EVERYWHERE)
    return bundled


def outcome(swapper, model, layer):
    return next(o for o in swapper.applied(model).outcomes if o.site.layer == layer)


def lazy(model):
    """Whether a training step leaves logits that nobody reads alone."""
    found = model.train()(IDS, labels=LABELS).logits
    model.eval()
    return type(found) is not torch.Tensor


def setting(model):
    return str(model.config._attn_implementation).partition(" (")[0]


# -- where ------------------------------------------------------------------------------------------------------------


def test_they_win_on_nvidia_gpus_attention_in_inference_and_the_loss_in_training():
    attention, head = table.wins()
    nvidia = dataclasses.replace(look(), backend="cuda", devices=(Device("cuda", 0, "H200", (9, 0)),))
    amd = dataclasses.replace(look(), backend="rocm", devices=(Device("cuda", 0, "MI300", None, "gfx942"),))
    for row, modes in ((attention, (Mode.INFERENCE,)), (head, (Mode.TRAINING,))):
        (use,) = row.use
        assert use.modes == modes
        assert table.misfit(use, "cuda:0", nvidia) is None
        assert table.misfit(use, "cuda:0", amd) == "is for cuda, this is cuda:0"
        assert table.misfit(use, "cpu", nvidia) == "is for cuda, this is cpu"
    assert (head.targets, head.at, head.probe) == (("Linear",), ("lm_head", "*.lm_head"), "head")


def test_on_a_cpu_nothing_of_it_happens_and_the_report_says_why(qwen, bundled):
    model = qwen(use_kernels=True, device_map="cpu")
    assert setting(model) == "sdpa"
    assert not lazy(model)
    lines = bundled.explain(model).splitlines()
    assert any(
        " attention " in x and "is for cuda, this is cpu; attn_implementation='kernelswap/attention' asks for it" in x
        for x in lines
    )
    assert any(" LMHead " in x and "no kernel in the table is for cpu" in x for x in lines)


def test_where_they_win_they_serve_and_are_taken_back(qwen, winning):
    plain = world.plain()
    expected = logits(plain, IDS)
    model = qwen(use_kernels=True, device_map="cpu")
    assert setting(model) == "kernelswap/attention"
    close(logits(model, IDS), expected)
    more = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(IDS, **more), plain.generate(IDS, **more))
    found = outcome(winning, model, "attention")
    assert found.inference.verdict.accepted
    assert found.training.implementation is None  # no gain was measured there
    assert lazy(model)
    out, want = (m.train()(IDS, labels=LABELS) for m in (model, plain))
    for one in (out, want):
        one.loss.backward()
    torch.testing.assert_close(out.loss, want.loss)
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    model.use_kernels = False
    assert model.config._attn_implementation == "sdpa"
    assert not lazy(model)
    assert torch.equal(logits(model, IDS), expected)
    model.use_kernels = True
    assert setting(model) == "kernelswap/attention"


def test_in_training_pytorchs_attention_computes(qwen, winning, monkeypatch):
    model = qwen(use_kernels=True, device_map="cpu")
    with winning.applied(model).counting():
        model.train()(IDS, labels=LABELS).loss.backward()
        assert winning.applied(model).calls[""] == 0
        model.eval()(IDS)
        assert winning.applied(model).calls[""] == SIZE["num_hidden_layers"]


# -- what a program said ----------------------------------------------------------------------------------------------


def configured(**more):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained("Qwen/Qwen3-0.6B", **more)


ASKED = {
    "sdpa": lambda: {"attn_implementation": "sdpa"},
    "eager": lambda: {"attn_implementation": "eager"},
    "a kernel that is not there": lambda: {"attn_implementation": "kernels-community/none"},
    "in a configuration": lambda: {"config": configured(attn_implementation="sdpa")},
}


@pytest.mark.parametrize("how", ASKED)
def test_an_attention_that_the_program_chose_stays(qwen, winning, how):
    model = qwen(use_kernels=True, device_map="cpu", **ASKED[how]())
    assert setting(model) == ("eager" if how == "eager" else "sdpa")
    assert isinstance(outcome(winning, model, "attention"), Kept)
    assert lazy(model)
    model.use_kernels = False
    model.use_kernels = True
    assert setting(model) == ("eager" if how == "eager" else "sdpa")


def test_an_attention_that_is_chosen_later_stays_too(qwen, winning):
    model = qwen(use_kernels=True, device_map="cpu")
    model.set_attn_implementation("sdpa")
    model.kernelize()
    assert setting(model) == "sdpa"
    assert "the program chose it" in outcome(winning, model, "attention").reason


def test_every_way_to_make_a_model_leaves_the_choice_to_us(published, winning):
    import transformers

    config = configured()
    made = [
        transformers.AutoModelForCausalLM.from_config(config, use_kernels=True),
        transformers.Qwen3ForCausalLM(config),
        transformers.Qwen3ForCausalLM.from_pretrained("Qwen/Qwen3-0.6B"),
        transformers.AutoModel.from_pretrained("Qwen/Qwen3-0.6B"),
        transformers.Qwen3ForCausalLM(config).model,
    ]
    for model in made:
        model.set_use_kernels(True)
        assert setting(model) == "kernelswap/attention"


def test_a_model_from_before_the_installation_keeps_its_attention(published, make_swapper, monkeypatch):
    model = world.plain()
    swapper = make_swapper()
    monkeypatch.setattr(table, "wins", lambda: EVERYWHERE)
    kernelswap.install(swapper)
    try:
        model.set_use_kernels(True)
        assert setting(model) == "sdpa"
        assert "before kernelswap was there to see" in swapper.explain(model)
    finally:
        kernelswap.uninstall()


OFF = {
    "the name": ({"attention": ""}, "attention"),
    "the class": ({"Qwen3Attention": None}, "attention"),
    "the class on this device": ({"Qwen3Attention": {"cpu": ""}}, "attention"),
    "some layers": ({"model.layers.0.*": ""}, "attention"),
    "the head": ({"LMHead": ""}, "loss"),
    "the head by its path": ({"lm_head": ""}, "loss"),
    "the loss": ({"ForCausalLMLoss": ""}, "loss"),
    "both": ({"attention|LMHead": ""}, "both"),
    "another device": ({"Qwen3Attention": {"cuda": ""}}, "none"),
    "a layer that is neither": ({"RMSNorm": ""}, "none"),
}


@pytest.mark.parametrize("name", OFF)
def test_what_a_config_leaves_alone_is_left_alone(qwen, winning, name):
    mapping, which = OFF[name]
    model = qwen(use_kernels=True, kernel_config=KernelConfig(mapping), device_map="cpu")
    assert (setting(model) == "sdpa") == (which in {"attention", "both"})
    assert lazy(model) == (which not in {"loss", "both"})


def test_a_config_that_inherits_nothing_has_neither(qwen, winning):
    model = qwen(use_kernels=True, kernel_config=KernelConfig({"RMSNorm": ""}, inherit_mapping=False), device_map="cpu")
    assert setting(model) == "sdpa"
    assert not lazy(model)


def test_a_config_asks_for_either_where_they_do_not_serve_by_themselves(qwen, bundled):
    config = KernelConfig({"attention": "kernelswap/attention", "LMHead": "kernelswap/loss:LMHead"})
    model = qwen(use_kernels=True, kernel_config=config, device_map="cpu")
    assert setting(model) == "kernelswap/attention"
    assert lazy(model)
    close(logits(model, IDS), logits(world.plain(), IDS))
    model.use_kernels = False
    assert setting(model) == "sdpa"
    assert not lazy(model)


def test_an_attention_kernel_that_a_config_names_goes_first_and_ours_follows_when_it_is_taken_back(qwen, winning):
    config = KernelConfig({"Qwen3Attention": "kernels-community/flash-attn2:FlashAttention2"})
    model = qwen(use_kernels=True, kernel_config=config, device_map="cpu")
    assert setting(model) == "kernels-community/flash-attn2"
    model.set_use_kernels(True, kernel_config=KernelConfig())
    assert setting(model) == "kernelswap/attention"
    model.set_use_kernels(True, kernel_config=config)
    assert setting(model) == "kernels-community/flash-attn2"
    with pytest.raises(kernelswap.errors.TableError):
        model.set_use_kernels(True, kernel_config=KernelConfig({"Qwen3Atention": ""}))
    assert setting(model) == "kernels-community/flash-attn2"
    model.use_kernels = False
    assert setting(model) == "sdpa"


@pytest.mark.parametrize("name", ["attention", "Qwen3Attention"])
def test_of_several_attention_kernels_the_first_for_the_device_that_can_be_had_serves(qwen, bundled, said, name):
    mapping = {name: {"cuda": "org/gpu:F", "cpu": ["org/none:F", "kernelswap/attention:flash_attn_forward"]}}
    model = qwen(use_kernels=True, kernel_config=KernelConfig(mapping), device_map="cpu")
    assert setting(model) == "kernelswap/attention"
    assert [line.partition(":")[0] for line in said() if "org/" in line] == ["org/none"]
    model.set_use_kernels(True, kernel_config=KernelConfig({name: {"cuda": "org/gpu:F"}}))
    assert setting(model) == "sdpa"
    assert said()[-1] == f"{name}: org/gpu is for cuda, this is cpu; attention stays sdpa"


def test_a_kernel_that_a_config_names_for_other_devices_is_no_news_where_another_serves(qwen, bundled, said):
    qwen(
        use_kernels=True,
        kernel_config=KernelConfig({"RMSNorm": {"cuda": "org/gpu:Norm", "rocm": "org/amd:Norm"}}),
        device_map="cpu",
    )
    assert not [line for line in said() if "org/" in line]


def test_a_swapper_with_a_table_of_its_own_has_what_that_says(published, make_swapper, monkeypatch):
    monkeypatch.setattr(table, "wins", lambda: EVERYWHERE)
    kernelswap.install(make_swapper(table=table.default()[:1]))
    try:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B", use_kernels=True)
        assert setting(model) == "sdpa"
        assert not lazy(model)
    finally:
        kernelswap.uninstall()


# -- nothing breaks ---------------------------------------------------------------------------------------------------


def test_a_training_loop_that_reads_its_logits_after_the_step_reads_what_it_would(qwen, winning):
    def run(model):
        optimizer, seen = torch.optim.AdamW(model.train().parameters(), 1e-2), []
        for _ in range(3):
            out = model(IDS, labels=LABELS)
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append((out.loss.item(), out.logits.detach().clone()))
        return seen

    for mine, theirs in zip(run(qwen(use_kernels=True, device_map="cpu")), run(world.plain()), strict=True):
        assert mine[0] == pytest.approx(theirs[0], rel=1e-3)
        torch.testing.assert_close(mine[1], theirs[1], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("more", [{}, {"label_smoothing_factor": 0.1}, {"gradient_checkpointing": True}], ids=str)
def test_trainer_with_metrics_that_read_logits(qwen, winning, tmp_path, more):
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": IDS[i % 2], "labels": LABELS[i % 2]} for i in range(8)]

    def run(model, name):
        arguments = TrainingArguments(
            tmp_path / name, per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=1, report_to=[],
            use_cpu=True, save_strategy="no", logging_steps=1, seed=0, disable_tqdm=True, **more,
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=data, eval_dataset=data,
            compute_metrics=lambda found: {"mean": float(found.predictions.mean())},
        )  # fmt: skip
        trainer.train()
        return [x["loss"] for x in trainer.state.log_history if "loss" in x], trainer.evaluate()

    model = qwen(use_kernels=True, device_map="cpu")
    (losses, found), (theirs, wanted) = run(model, "ours"), run(world.plain(), "theirs")
    assert losses == pytest.approx(theirs, rel=2e-3)
    assert found["eval_mean"] == pytest.approx(wanted["eval_mean"], abs=2e-3)
    assert winning.applied(model).refusals == ()


@pytest.mark.filterwarnings("ignore::UserWarning:torch.*")
def test_generation_on_a_static_cache_compiled_and_with_beams(qwen, winning):
    model, plain = qwen(use_kernels=True, device_map="cpu"), world.plain()
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    for more in (
        {"cache_implementation": "static"},
        {"num_beams": 2},
        {"attention_mask": mask},
        {"return_dict_in_generate": True, "output_scores": True},
    ):
        found, want = (m.generate(IDS, max_new_tokens=5, do_sample=False, **more) for m in (model, plain))
        sequences = [x if isinstance(x, torch.Tensor) else x.sequences for x in (found, want)]
        assert torch.equal(*sequences), more
    torch.compiler.reset()
    with torch.no_grad():
        close(torch.compile(model, backend="eager")(IDS).logits, plain(IDS).logits)
    torch.compiler.reset()


def test_attention_weights_are_had_where_they_would_be(qwen, winning):
    model = qwen(use_kernels=True, device_map="cpu")
    found, want = (m(IDS, output_attentions=True).attentions for m in (model, world.plain()))
    assert [x is None for x in found] == [x is None for x in want]
    model.set_attn_implementation("eager")
    assert all(x is not None for x in model(IDS, output_attentions=True).attentions)


def test_copies_pickles_saved_files_and_models_made_of_the_configuration(qwen, winning, tmp_path):
    from transformers import AutoModelForCausalLM

    model = qwen(use_kernels=True, device_map="cpu")
    expected = logits(model, IDS)
    close(logits(copy.deepcopy(model), IDS), expected)
    close(logits(pickle.loads(pickle.dumps(model)), IDS), expected)
    other = type(model)(model.config)
    other.load_state_dict(model.state_dict())
    close(logits(other.eval(), IDS), expected)
    assert setting(model) == "kernelswap/attention"
    made = AutoModelForCausalLM.from_config(copy.deepcopy(model.config))
    made.load_state_dict(model.state_dict())
    close(logits(made.eval(), IDS), expected)
    model.save_pretrained(tmp_path / "saved")
    assert "kernelswap" not in (tmp_path / "saved" / "config.json").read_text()
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), IDS), expected)


def test_models_without_a_head_or_with_other_losses_are_served_without_one(published, winning):
    import transformers

    size = {k: v for k, v in SIZE.items() if k != "num_key_value_heads"}
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**size)).eval()
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0, dropout_rate=0.0
        )
    )
    ctc = transformers.Wav2Vec2ForCTC(
        transformers.Wav2Vec2Config(
            vocab_size=16, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, conv_dim=(16, 16),
            conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4, hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, layerdrop=0.0,
            feat_proj_dropout=0.0, mask_time_prob=0.0,
        )
    )  # fmt: skip
    for model, given in (
        (bert, {"input_ids": IDS, "labels": LABELS}),
        (t5, {"input_ids": IDS, "labels": LABELS}),
        (ctc, {"input_values": torch.randn(2, 800), "labels": IDS[:, :3] + 1}),
    ):
        model.train()
        for dropout in (m for m in model.modules() if isinstance(m, torch.nn.Dropout)):
            dropout.p = 0.0
        want = model(**given)
        model.set_use_kernels(True)
        out = model(**given)
        torch.testing.assert_close(out.loss, want.loss, atol=1e-5, rtol=1e-4)
        out.loss.backward()
        torch.testing.assert_close(out.logits, want.logits, atol=1e-5, rtol=1e-4)
        assert isinstance(outcome(winning, model, "attention"), Swap | Kept)
        model.use_kernels = False
