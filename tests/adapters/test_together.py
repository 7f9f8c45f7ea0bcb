"""Together with what people use Transformers with. Each loads as users do and compares with the same thing done without kernels."""

import subprocess
import sys

import pytest
import torch
from tests.adapters import world
from tests.adapters.world import IDS, close, logits, plain, serving
from tests.kernels import repository

from kernelswap.proof import Check
from kernelswap.types import Mode

PROMPT = torch.arange(2, 10)[None]
LIGER = "kernels-community/liger-kernels"


def test_c3_r2_models_on_cpu_and_disk(qwen, installed, tmp_path):
    """Weights of the first and of other modules are on the meta device until they are called."""
    installed._prover = Check(None)
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "disk", "lm_head": "cpu"}
    places |= {"model.layers.0": "disk", "model.layers.1": "cpu"}
    model = qwen(use_kernels=True, device_map=places, offload_folder=str(tmp_path / "offload"))
    found = serving(installed, model)
    assert found["model.layers.1.input_layernorm"] == found["model.layers.0.input_layernorm"] == found["model.norm"]
    expected = logits(plain())
    for _ in range(2):
        close(logits(model), expected)
        model.train()
        model.eval()
    assert installed.applied(model).refusals == ()
    model.use_kernels = False
    close(logits(model), expected)


def test_generate_with_dynamic_and_static_caches(qwen, installed):
    expected = plain().generate(PROMPT, max_new_tokens=12, do_sample=False)
    model = qwen(use_kernels=True)
    assert torch.equal(model.generate(PROMPT, max_new_tokens=12, do_sample=False), expected)
    static = model.generate(PROMPT, max_new_tokens=12, do_sample=False, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, expected)
    assert installed.applied(model).refusals == ()


def test_generate_compiles_a_static_cache(qwen, installed):
    """`generate` compiles the decoding step itself where it is told to; kernels that cannot be compiled give way in there."""
    from transformers import CompileConfig

    expected = plain().generate(PROMPT, max_new_tokens=6, do_sample=False)
    config = CompileConfig(backend="aot_eager", fullgraph=False, dynamic=False, mode=None)
    config._compile_all_devices = True  # else on accelerators only
    for asked in ({"use_kernels": True}, {"kernel_config": {"RMSNorm": f"{LIGER}:Compiles"}}):
        model = qwen(**asked)
        more = {"cache_implementation": "static", "compile_config": config, "max_new_tokens": 6, "do_sample": False}
        assert torch.equal(model.generate(PROMPT, **more), expected)
        assert getattr(model, "_compiled_call", None) is not None or hasattr(model, "_last_compile_config")
        assert serving(installed, model)["model.norm"]
        torch._dynamo.reset()


class Linear8bit(torch.nn.Linear):
    """As quantisers do it: int8 weights under the name of the original's, a scale, and a forward that undoes it."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.bias = linear.bias
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.weight = torch.nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


READS_INSIDE = "from torch import nn\n\n\nclass Mlp(nn.Module):\n    def forward(self, x):\n        up = nn.functional.linear(x, self.up_proj.weight)\n        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * up)\n"


@pytest.mark.parametrize("when", ["before", "after"])
def test_linear_layers_that_a_quantiser_replaced_are_left_alone(qwen, installed, published, said, when):
    published.repo("kernels-community/mlp").branch("v1", world.kernel("mlp", READS_INSIDE))
    config = {"SwiGLUMLP": "kernels-community/mlp:Mlp"}

    def quantise(model):
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if type(child) is torch.nn.Linear and name != "lm_head":
                    setattr(module, name, Linear8bit(child))
        return model

    expected = logits(quantise(plain()))
    model = qwen(kernel_config=config) if when == "after" else quantise(qwen())
    if when == "after":
        quantise(model)
    else:
        model.set_use_kernels(True, config)
    linears = [m for m in model.modules() if isinstance(m, Linear8bit)]
    assert len(linears) == 14
    assert {type(m) for m in linears} == {Linear8bit}
    close(logits(model), expected)
    if when == "before":
        assert serving(installed, model)["model.norm"] == "layers:RMSNorm"
        assert serving(installed, model)["model.layers.0.mlp"] == "layers:SwiGLUMLP"  # it calls them
        assert any("kernels-community/mlp" in line and "quantised" in line for line in said())


def test_compiled_in_compile_mode(qwen, installed):
    model = qwen(kernel_config={"RMSNorm": f"{LIGER}:Compiles"})
    model.kernelize(mode=Mode.INFERENCE | Mode.TORCH_COMPILE)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=False)
    expected = logits(plain())
    for _ in range(2):
        close(logits(compiled), expected)
    assert serving(installed, model)["model.norm"].endswith(":Compiles")


def losses(model, **more):
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in torch.randint(2, 60, (8, 6), generator=torch.Generator().manual_seed(0))]
    args = TrainingArguments(
        num_train_epochs=1,
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        learning_rate=1e-2,
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        **more,
    )
    trainer = Trainer(model=model, args=args, train_dataset=rows)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_and_gradient_checkpointing(qwen, installed, tmp_path, checkpointing):
    more = {"output_dir": str(tmp_path / "out"), "gradient_checkpointing": checkpointing}
    expected = losses(plain(), **more)
    model = qwen(kernel_config={"RMSNorm": f"{LIGER}:Trains"})
    found = losses(model, **more)
    assert found == pytest.approx(expected, rel=1e-4)
    assert serving(installed, model.train())["model.norm"].endswith(":Trains")


@pytest.mark.filterwarnings("ignore:.*base_model_name_or_path:UserWarning")
def test_lora_on_top_and_below(qwen, installed):
    import peft

    config = peft.LoraConfig(target_modules=["gate_proj", "q_proj"], r=2)
    made = []
    for base in (plain(), qwen(use_kernels=True)):
        torch.manual_seed(0)
        made.append(peft.get_peft_model(base, config).eval())
    reference, model = made
    with torch.no_grad():
        for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert p.shape == q.shape
            if "lora_B" in name:
                p.add_(0.3)
                q.add_(0.3)
    expected = logits(reference)
    close(logits(model), expected)
    model.base_model.model.set_use_kernels(True)  # decided anew, now that adapters are there
    close(logits(model), expected)
    assert serving(installed, model.base_model.model)["model.norm"] == "layers:RMSNorm"
    model.train()(IDS, labels=IDS).loss.backward()
    reference.train()(IDS, labels=IDS).loss.backward()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, atol=1e-4, rtol=1e-3)


def test_pipeline(qwen, installed, published):
    from transformers import pipeline

    model = qwen(use_kernels=True)

    generated = pipeline("text-generation", model="Qwen/Qwen3-0.6B", model_kwargs={"use_kernels": True}, tokenizer=_tokenizer())
    assert generated.model.use_kernels
    close(logits(generated.model), logits(model))


def _tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w1")


def test_what_is_saved_loads_without_kernelswap(qwen, installed, tmp_path):
    model = qwen(use_kernels=True, kernel_config={"RMSNorm": f"{LIGER}:LigerRMSNorm"})
    expected = logits(model)
    model.save_pretrained(tmp_path / "saved")
    model.kernel_config.save_pretrained(tmp_path / "saved")
    torch.save(expected, tmp_path / "expected")
    code = (
        "import sys, torch, transformers\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'saved')!r})\n"
        f"expected = torch.load({str(tmp_path / 'expected')!r})\n"
        "torch.testing.assert_close(model(torch.arange(14).reshape(2, 7)).logits, expected, atol=2e-5, rtol=1e-4)\n"
        "assert 'kernelswap' not in sys.modules and not model.use_kernels"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "kernel" not in (tmp_path / "saved" / "config.json").read_text()


def test_an_attention_class_of_the_model_takes_an_attention_kernel(qwen, installed):
    """The guide's KernelConfig on a model that has the class that it names."""
    before = plain("llama")
    config = {"LlamaAttention": "kernels-community/flash-attn2:FlashAttention2", "RMSNorm": f"{LIGER}:LigerRMSNorm"}
    model = qwen(of="org/llama", kernel_config=config)
    assert model.config._attn_implementation == "kernels-community/flash-attn2"
    assert serving(installed, model)["model.norm"] == f"{LIGER}:LigerRMSNorm"
    close(logits(model), logits(before))
    model.use_kernels = False
    assert model.config._attn_implementation == before.config._attn_implementation
    assert torch.equal(logits(model), logits(before))


def test_an_attention_kernel_that_cannot_be_had_is_one_line(qwen, installed, said):
    model = qwen(of="org/llama", kernel_config={"LlamaAttention": "kernels-community/none:FlashAttention2"})
    assert model.config._attn_implementation == "sdpa"
    assert len([line for line in said() if "kernels-community/none" in line]) == 1
    close(logits(model), logits(plain("llama")))


def test_c7_a_kernel_for_one_mode_leaves_the_other_mode_as_it_was(qwen, installed):
    model = qwen(kernel_config={"RMSNorm": {"training": f"{LIGER}:Trains"}})
    assert serving(installed, model)["model.norm"] == "layers:RMSNorm"
    assert serving(installed, model.train())["model.norm"] == f"{LIGER}:Trains"


def test_the_kernels_that_come_with_kernelswap_proven_and_checked_as_for_users(make_swapper, published, tmp_path, layers_build):
    import transformers

    import kernelswap

    repository(layers_build, tmp_path / "bundled" / "layers")
    swapper = make_swapper(prover=Check(None), machine=None)
    kernelswap.install(swapper)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B", use_kernels=True)
        found = serving(swapper, model)
        assert {served.partition(":")[0] for served in found.values()} == {"layers"}
        assert {"model.norm", "model.layers.0.mlp", "model.layers.0.self_attn|apply_rotary_pos_emb"} <= set(found)
        reference = plain()
        close(logits(model), logits(reference))
        model.train()(IDS, labels=IDS).loss.backward()
        reference.train()(IDS, labels=IDS).loss.backward()
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, atol=1e-4, rtol=1e-3)
        assert swapper.applied(model).refusals == ()
    finally:
        kernelswap.uninstall()


def test_a_model_of_another_architecture_works_the_same(installed, published):
    import transformers

    config = transformers.AutoConfig.for_model("gemma2", **world.SIZE, head_dim=8)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    expected = logits(model)
    model.set_use_kernels(True)
    assert serving(installed, model)["model.norm"] == "layers:RMSNormZeroCentered"
    close(logits(model), expected)
