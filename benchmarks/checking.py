"""What does the check of a first call add? Times of the process, so that a busy machine counts for little.

    python benchmarks/checking.py [--out benchmarks/results/checking.json]

Each row: the original's forward (with backward in training), and what a first call adds to the kernel's own time, when random tensors have
accepted the kernel and no verdict on a real call is known. Medians of five.

Then whole models of 28 layers: the swap, whose proofs run on random tensors, and the first and second forward (or training step) after it, without
verdicts and with those of a former start; medians of three. Wants a C++ compiler, for the kernels that ship with kernelswap.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]
os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402  # after the number of threads is set
import torch.nn.functional as F  # noqa: E402  # torch's own spelling
from tests.proof.zoo import ORIGINALS, by_name, implementation, site  # noqa: E402  # same
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb  # noqa: E402  # same
from transformers.models.qwen3.modeling_qwen3 import Qwen3Config, Qwen3ForCausalLM, Qwen3MLP  # noqa: E402  # same

from kernelswap import Swapper  # noqa: E402  # same
from kernelswap.proof import Check, Verdicts  # noqa: E402  # same
from kernelswap.types import Run  # noqa: E402  # same


def timed(ask, runs=5):
    ask()
    taken = []
    for _ in range(runs):
        start = time.thread_time()
        ask()
        taken.append(time.thread_time() - start)
    return statistics.median(taken)


def one(name, module, functions, args, probe, *, kind="module", training=False, thorough=False):
    original, kernel = functions
    check, run = Check(None), Run(training=training)
    check.thorough = thorough
    asked = site(module, probe, kind), module, original, implementation(kernel, kind, digest="d")
    verdict = check.equivalent(*asked, run)
    assert verdict.accepted, verdict.reason
    given = (module, *args) if kind == "module" else args
    if training:
        args[0].requires_grad_()

    def forward(function):
        out = function(*given)
        if training:
            torch.autograd.grad(out, [args[0], *module.parameters()], torch.ones_like(out))

    def first():
        for key in [k for k in check._memo if k[0] == "real"]:
            del check._memo[key]
        _, verdict = check.first_call(*asked, run, args, {})
        assert verdict.accepted, verdict.reason

    with torch.set_grad_enabled(training):
        times = [timed(lambda f=f: forward(f)) for f in (original, kernel)]
        added = timed(first) - (times[1] if not training else 0)
    print(
        f"{name:44} original {1e3 * times[0]:7.2f} ms   added {1e3 * added:7.1f} ms = {added / times[0]:6.1f} of it", flush=True
    )
    return {
        "call": name,
        "thorough": thorough,
        "original_ms": 1e3 * times[0],
        "kernel_ms": 1e3 * times[1],
        "added_ms": 1e3 * added,
    }


def spent(ask):
    start = time.thread_time()
    ask()
    return 1e3 * (time.thread_time() - start)


def whole(hidden, tokens, *, layers=28, training=False, runs=3):
    """Milliseconds of one model: plain, and swapped at a first and at a later start."""
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 128, "head_dim": 64}
    config = Qwen3Config(hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, vocab_size=1000, **heads)
    model, ids = Qwen3ForCausalLM(config).train(training), torch.randint(0, 1000, (1, tokens))

    def step():
        with torch.set_grad_enabled(training):
            out = model(ids, labels=ids if training else None, use_cache=False)
        if training:
            out.loss.backward()

    found = {"plain": [timed(step) * 1e3]}
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            for start in ("cold", "warm"):
                swapper = Swapper(offline=True, prover=Check(Verdicts(Path(folder))))
                held = []
                times = {"swap": spent(lambda s=swapper, h=held: h.append(s.swap(model, build="wait")))}
                times |= {name: spent(step) for name in ("first", "second")}
                assert held[0].refusals == (), held[0].refusals
                held[0].undo()
                for name, taken in times.items():
                    found.setdefault(f"{start}_{name}", []).append(taken)
    row = {"call": f"{layers} layers of {hidden}, {tokens} tokens{', training' if training else ''}"}
    row |= {f"{name}_ms": statistics.median(taken) for name, taken in found.items()}
    print(
        f"{row['call']:44}"
        + "".join(f" {n.removesuffix('_ms').replace('_', ' ')} {v:.0f} ms " for n, v in row.items() if n != "call")
    )
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--thorough", action="store_true", help="as `kernelswap check` looks")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)

    def norm(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)

    def mlp(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((2, 5, 64), (1, 64, 1024), (1, 1024, 1024), (4, 2048, 2048)):
            module, x = LlamaRMSNorm(shape[-1]).to(dtype), torch.randn(shape).to(dtype)
            name = f"RMSNorm {'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
            rows.append(one(name, module, (LlamaRMSNorm.forward, norm), (x,), "rows", thorough=arguments.thorough))
    for shape in ((1, 64, 1024), (1, 1024, 1024)):
        module, x = LlamaRMSNorm(shape[-1]), torch.randn(shape)
        name = f"RMSNorm {'x'.join(map(str, shape))} training"
        rows.append(one(name, module, (LlamaRMSNorm.forward, norm), (x,), "rows", training=True, thorough=arguments.thorough))
    for hidden, inner, tokens in ((64, 128, 8), (512, 1536, 64), (1024, 3072, 256)):
        module, x = Qwen3MLP(Qwen3Config(hidden_size=hidden, intermediate_size=inner)), torch.randn(1, tokens, hidden)
        name = f"MLP {hidden}x{inner}, {tokens} tokens"
        rows.append(one(name, module, (Qwen3MLP.forward, mlp), (x,), "mlp", thorough=arguments.thorough))
    q, k, angle = torch.randn(1, 4, 512, 64), torch.randn(1, 2, 512, 64), torch.randn(1, 512, 32).repeat(1, 1, 2)
    given, module, kernel = (q, k, angle.cos(), angle.sin()), ORIGINALS["rotary"].make(64), by_name()["rotary_by_halves"].make()
    rows.append(
        one(
            "rotary, 512 tokens",
            module,
            (apply_rotary_pos_emb, kernel),
            given,
            "rotary",
            kind="function",
            thorough=arguments.thorough,
        )
    )
    models = [whole(128, 32), whole(128, 32, training=True), whole(1024, 64)]
    if arguments.out:
        result = {"torch": torch.__version__, "threads": 1, "rows": rows, "models": models}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
