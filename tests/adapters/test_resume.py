"""Transformers' `Trainer` stopped and resumed on models with kernels: as if it had not been stopped."""

import logging

import pytest
import torch
from tests.adapters.layouts import KERNEL
from tests.adapters.test_layouts import FUSED, calls, config, same
from tests.adapters.world import close, logits, plain, serving
from tests.hub import kernel_files

from kernelswap.adapters.transformers import layouts

LIGER = "kernels-community/liger-kernels"
SWAPPED, LAYOUT = {"RMSNorm": f"{LIGER}:Trains"}, "layout"


@pytest.fixture(autouse=True)
def fused(published):
    published.repo(FUSED).branch("v1", kernel_files("torch-cpu", KERNEL, name="fused"))


@pytest.fixture(params=["swapped", LAYOUT])
def model(request, qwen):
    """`model()`: the small Qwen3 with kernels in its norms, or with a layout in the place of norms and MLPs."""

    def make():
        made = qwen(kernel_config=config() if request.param == LAYOUT else SWAPPED)
        assert len(list(layouts.layouts(made))) == (2 if request.param == LAYOUT else 0)
        return made

    return make


def train(model, folder, *, resume=None, until=6, **more):
    """Losses by step. Everything that a run has of its own takes part: momenta, schedule, order of the data, dropout's seed."""
    from transformers import Trainer, TrainingArguments

    rows = torch.randint(2, 60, (16, 6), generator=torch.Generator().manual_seed(0))
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=2,
        logging_steps=1,
        report_to=[],
        save_strategy="steps",
        save_steps=3,
        learning_rate=1e-2,
        warmup_steps=2,
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        **more,
    )
    trainer = Trainer(model=model, args=args, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    if until < args.max_steps:
        trainer.add_callback(stopping(until))
    trainer.train(resume_from_checkpoint=resume)
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def stopping(at):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step >= at
            return control

    return Stop()


def test_resumed_training_goes_on_as_if_it_had_not_been_stopped(model, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    whole = model()
    expected = train(whole, tmp_path / "whole")
    first = train(model(), tmp_path / "parts", until=3)
    assert list(first) == [1, 2, 3]
    resumed = model()
    found = train(resumed, tmp_path / "parts", resume=True)
    assert {step: found[step] for step in expected} == expected
    assert len(set(expected.values())) == 6, "every step changes the loss"
    same(resumed, whole)
    assert not [r for r in caplog.records if "missing keys" in r.getMessage() or "unexpected keys" in r.getMessage()]


def test_its_losses_are_those_of_the_model_without_kernels(model, installed, tmp_path):
    made = model()
    before = len(calls(installed)) if list(layouts.layouts(made)) else 0
    found = train(made, tmp_path / "out", weight_decay=0.0)
    assert list(found.values()) == pytest.approx(list(train(plain(), tmp_path / "plain", weight_decay=0.0).values()), rel=1e-4)
    if list(layouts.layouts(made)):
        assert len(calls(installed)) > before
    else:
        assert serving(installed, made.train())["model.norm"].endswith(":Trains")


def test_a_checkpoint_loads_without_kernels(model, tmp_path):
    from transformers import AutoModelForCausalLM

    made = model()
    train(made, tmp_path / "out", until=3)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-3")
    assert not list(layouts.layouts(again))
    same(again, made)
    close(logits(again), logits(made.eval()))


def test_what_was_trained_plainly_resumes_on_a_swapped_model_and_back(qwen, tmp_path):
    """A swap changes no parameter: momenta fit, too. Layouts join parameters, so an optimiser's state is theirs alone."""
    expected = train(plain(), tmp_path / "whole")
    train(plain(), tmp_path / "there", until=3)
    found = train(qwen(kernel_config=SWAPPED), tmp_path / "there", resume=True)
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-4)
    train(qwen(kernel_config=SWAPPED), tmp_path / "back", until=3)
    found = train(plain(), tmp_path / "back", resume=True)
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-4)


def test_momenta_of_a_layout_are_refused_by_a_model_without_it(qwen, tmp_path):
    train(qwen(kernel_config=config()), tmp_path / "out", until=3)
    with pytest.raises(ValueError, match="parameter group"):
        train(plain(), tmp_path / "out", resume=True)
