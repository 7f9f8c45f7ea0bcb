"""The benchmarks of whole models run, at a size that says nothing, where there is no GPU; and greedy text is judged by its gaps."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.small import qwen3

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def scripts():
    """Modules of benchmarks/, which import each other by their bare names."""
    sys.path.insert(0, str(BENCHMARKS))
    before = set(sys.modules)
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in set(sys.modules) - before:
            if (BENCHMARKS / f"{name}.py").is_file():
                del sys.modules[name]


def script(name, *argv, env=None):
    command = [sys.executable, BENCHMARKS / name, *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, cwd=ROOT, env=env)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the size for machines without a GPU")
def test_every_row_of_the_whole_model_can_be_measured(tmp_path):
    out = tmp_path / "model.json"
    done = script(
        "gpu_model.py", out, "tiny", "--attention", "--only", "accuracy,prefill,decode,training,tokens,generate,train200"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["row"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == [
        "losses over training steps on text", "tiny logits error against float32", "tiny prefill 1x16", "tiny prefill 2x24", "tiny decode step batch 2",
        "tiny generate new lengths batch 2", "tiny greedy 24 tokens batch 2", "tiny training step 2x24",
    ]  # fmt: skip
    assert set(rows["tiny training step 2x24"]["losses"]) == {"original", "swapped", "swapped+attention", "swapped+loss"}
    losses = rows["losses over training steps on text"]
    assert losses["within_seeds"]
    assert all(run[-1] < run[0] - 0.1 for run in losses["losses"].values())
    assert set(rows["tiny prefill 1x16"]["speedup"]) == {"swapped", "swapped+attention"}
    assert rows["tiny greedy 24 tokens batch 2"]["against_original"]["swapped"]["sequences"] == 2
    kept = script("gpu_model.py", out, "tiny", "--only", "accuracy", "--add")
    assert kept.returncode == 0, kept.stderr
    assert {row["row"] for row in json.loads(out.read_text())["rows"]} == set(rows)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("gpu_model.py", "--attenton"), "--attenton: not known here"),
        (("gpu_model.py", "--only", "prefil"), "the parts are accuracy"),
        (("gpu_model.py", "8b"), "needs an NVIDIA GPU"),
        (("gpu_kernels.py",), "needs an NVIDIA GPU"),
        (("gpu_kernels.py", "--only", "K77"), "the kernels are H1, K1"),
    ],
)  # fmt: skip
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_a_wrong_word_or_no_gpu_is_said_and_not_raised(argv, said):
    done = script(*argv)
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr


INTERPRETER = Path(sys.prefix) / "interpreter"  # where dev.py puts Triton, out of sight of every other test


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the size for machines without a GPU")
@pytest.mark.skipif(
    not (INTERPRETER / "triton").is_dir() and importlib.util.find_spec("triton") is None,
    reason="needs Triton, in its interpreter",
)
def test_every_row_of_the_kernels_is_checked_and_written(tmp_path):
    out = tmp_path / "kernels.json"
    path = os.pathsep.join([str(ROOT / "src"), str(INTERPRETER)])
    environ = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path, "KERNELSWAP_CACHE": str(tmp_path / "cache")}
    done = script("gpu_kernels.py", out, "--quick", env=environ)
    assert done.returncode == 0, done.stdout + done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    data = json.loads(out.read_text())
    rows = data["rows"]
    assert {row["kernel"].split()[0] for row in rows} == {"H1", "K1", "K2", "K3", "K4", "K5", "K6", "K7", "K8", "K9", "K10"}
    for row in rows:
        if "shape" in row:
            assert row["error"] < row["tolerance"], row
            assert row["us"]["kernelswap"] > 0
    assert {t["row"] for t in data["targets"]} >= {"H1", "K1", "K9"}  # the others name sizes that are not measured here
    assert data["peers"]["QuACK"].startswith("not importable here")
    causal = next(row for row in rows if row["kernel"] == "K9 attention fwd")
    assert "No viable backend" in causal["out"]["SDPA cuDNN"]  # a rival that cannot run here takes no part and says why


@pytest.fixture
def interpreted(tmp_path):
    """The environment of a script whose kernels run in Triton's interpreter."""
    path = os.pathsep.join([str(ROOT / "src"), str(INTERPRETER)])
    return {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path, "KERNELSWAP_CACHE": str(tmp_path / "cache")}


needs_interpreter = pytest.mark.skipif(
    torch.cuda.is_available() or (not (INTERPRETER / "triton").is_dir() and importlib.util.find_spec("triton") is None),
    reason="needs Triton, in its interpreter",
)


@pytest.mark.slow
@needs_interpreter
def test_tuning_looks_at_every_row_keeps_what_it_found_and_goes_on(tmp_path, interpreted):
    out = tmp_path / "tuning.json"
    shapes = [f"--shape={s}" for s in ("K8=1x200x4x2x16", "K2=3x24", "K3=3x24", "K4=2x2x1x16", "K6=2x64")]
    for _ in range(4):  # a few seconds each, as on a machine that is taken away again and again
        done = script("gpu_tune.py", out, "--add", *shapes, "--seconds", "15", env=interpreted)
        assert done.returncode == 0, done.stdout + done.stderr
        data = json.loads(out.read_text())
        if "not looked at" not in done.stdout:
            break
    assert {row["kernel"] for row in data["tuned"]} == {"decode", "rms_norm.backward", "rms_norm.add", "rope", "cross_entropy"}
    files = [json.loads(file.read_text()) for file in (tmp_path / "cache" / "tuning").glob("*.json")]
    kept = {(name, bucket): record for file in files for name, some in file["choices"].items() for bucket, record in some.items()}
    for row in data["tuned"]:
        record = kept[row["kernel"], row["bucket"]]
        assert row["wrong"] == row["left_out"] == 0, row["trials"]
        assert record["tried"] >= 1
        if record["config"] is not None:
            assert record["times"] > 1 + record["noise"]
            assert record["config"] == record["best"]
    assert {(k["device"], k["digest"]) for k in data["kept"]} == {(f["device"], f["digest"]) for f in files}


@pytest.mark.slow
@needs_interpreter
def test_what_was_looked_at_to_the_end_is_not_looked_at_again(tmp_path, interpreted):
    argv = ["--shape=K7=9x8x50", "--shape=SM=2x16"]
    first = script("gpu_tune.py", tmp_path / "a.json", *argv, "--seconds", "120", env=interpreted)
    assert "left out: PyTorch serves it here" in first.stdout
    again = script("gpu_tune.py", tmp_path / "a.json", "--add", *argv, "--seconds", "120", env=interpreted)
    assert "(known)" in again.stdout, first.stdout + again.stdout
    (row,) = json.loads((tmp_path / "a.json").read_text())["tuned"]
    assert row["complete"]
    assert row["trials"]["tried"], "what the first run tried is told still"


@pytest.mark.slow
@needs_interpreter
def test_a_configuration_that_is_wrong_is_not_timed_and_never_kept(tmp_path, interpreted):
    """The kernel is broken for one value of its space: its rows are stored half."""
    broken = """
import sys
sys.argv = ["gpu_tune.py", sys.argv[1], "--shape=K1=4x24", "--seconds=60"]
import gpu_tune
run = gpu_tune.Run(gpu_tune.arguments())
rms = run.kernels.of("kernelswap/layers").rms_norm
bind = rms.bind
def broken(fn, args, *, num_warps, **more):
    launch = bind(fn, args, num_warps=num_warps, **more)
    return (lambda blocks, stream, *call: launch(1, stream, *call)) if more["ROWS"] == 2 and "STAGES" not in more else launch
rms.bind = broken
raise SystemExit(run.run())
"""
    path = os.pathsep.join([str(BENCHMARKS), interpreted["PYTHONPATH"]])
    command = [sys.executable, "-c", broken, str(tmp_path / "a.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**interpreted, "PYTHONPATH": path})
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads((tmp_path / "a.json").read_text())["tuned"]
    assert row["complete"]
    assert row["wrong"] >= 1
    assert all(w["ROWS"] == 2 for w in row["trials"]["wrong"])
    assert all(t.get("ROWS") != 2 or t.get("PROGRAMS") for t in row["trials"]["tried"])
    assert (row["config"] or {}).get("ROWS") != 2 or row["config"]["PROGRAMS"]


@pytest.mark.slow
@needs_interpreter
def test_a_configuration_that_takes_the_device_down_is_not_tried_again(tmp_path, interpreted):
    """As a read outside all memory does: every later call of the process fails. Here one raises, and the device says it is gone."""
    broken = """
import sys
sys.argv = ["gpu_tune.py", sys.argv[1], "--shape=K5=2x24", "--seconds=100"]
import gpu_tune
def main():
    Run, down = gpu_tune.Run, []
    def made(asked):
        run = Run(asked)
        glu = run.kernels.of("kernelswap/layers").glu
        bind = glu.bind
        def fatal(fn, args, *, num_warps, **more):
            if num_warps == 2:
                down.append(1)
            if down:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return bind(fn, args, num_warps=num_warps, **more)
        glu.bind = fatal
        return run
    gpu_tune.Run, gpu_tune.lost = made, lambda: bool(down)
    return gpu_tune.main()
raise SystemExit(main())
"""
    path = os.pathsep.join([str(BENCHMARKS), interpreted["PYTHONPATH"]])
    command = [sys.executable, "-c", broken, str(tmp_path / "a.json")]

    def once():
        return subprocess.run(command, capture_output=True, text=True, check=False, env={**interpreted, "PYTHONPATH": path})

    first = once()
    assert first.returncode == 4, first.stdout + first.stderr
    assert "'num_warps': 2} took the device down (RuntimeError: CUDA error: an illegal memory access" in first.stdout
    for _ in range(12):  # each one that is fatal, once
        again = once()
        if again.returncode == 0:
            break
        assert again.returncode == 4, again.stderr
    (file,) = (tmp_path / "cache" / "tuning").glob("*.json")
    (record,) = json.loads(file.read_text())["choices"]["glu.forward"].values()
    assert again.returncode == 0, again.stdout
    assert record["complete"]
    assert len(record["broke"]) >= 2
    assert all(change["num_warps"] == 2 for change in record["broke"])
    assert (record["config"] or {}).get("num_warps") != 2


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--only", "K9"), "the kernels are K1, K2"),
        (("--shape", "K9=1x2"), "--shape K9=1x2: the kernels are K1, K2"),
        (("--shape", "K1=12"), "--shape K1=12: not a shape of K1; one is K1=16384x4096"),
        (("--shape", "K1=axb"), "not a shape of K1"),
        (("--shape", "K8=0x5"), "not a shape of K8"),
        (("--model", "/not/here"), "--model /not/here: no configuration of a language model"),
    ],
)  # fmt: skip
@needs_interpreter
def test_a_wrong_shape_or_model_is_said_and_not_raised(argv, said, interpreted):
    done = script("gpu_tune.py", *argv, "--seconds", "1", env=interpreted)
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@needs_interpreter
def test_the_shapes_of_a_model_are_those_of_its_configuration(tmp_path, interpreted):
    qwen3().save_pretrained(tmp_path / "model")
    code = f"import gpu_tune_cases as c; print(*c.of_model({str(tmp_path / 'model')!r}), sep=chr(10))"
    path = os.pathsep.join([str(BENCHMARKS), interpreted["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**interpreted, "PYTHONPATH": path}
    )
    shapes = done.stdout.split("\n")
    assert "K1 16384x32" in shapes
    assert "K4 1x4x2x8" in shapes
    assert "K5 16384x48" in shapes
    assert "K7 8192x32x64" in shapes


def test_a_rival_that_is_wrong_is_not_timed_and_ours_fails_the_run(scripts, tmp_path):
    rows = scripts("gpu_rows")
    board = rows.Board(tmp_path / "x.json", quick=True, seconds=9, only={"K1"})
    inputs = [(torch.randn(4, 8),)]
    right, wrong = (lambda x: x * 2), (lambda x: x * 2.1)

    def raises(x):
        raise RuntimeError("no\nmore")

    entry = board.compare("K1 x", "4x8", 1.0, inputs, {"kernelswap": right, "near": wrong, "none": raises}, right, 1e-3)
    assert set(entry["us"]) == {"kernelswap"}
    assert entry["out"]["near"].startswith("wrong: relative error 5.0e-02")
    assert entry["out"]["none"] == "RuntimeError: no"
    assert board.failed == 0
    entry = board.compare("K1 y", "4x8", 1.0, inputs, {"kernelswap": wrong, "near": right}, right, 1e-3)
    assert "us" not in entry
    assert board.failed == 1
    assert [row["kernel"] for row in json.loads((tmp_path / "x.json").read_text())["rows"]] == ["K1 x", "K1 y"]


def kernel_row(kernel, shape, floor=1.0, **us):
    return {"kernel": kernel, "shape": shape, "floor_us": floor, "us": us}


def model_row(name, **speedup):
    return {"row": name, "ms": {}, "speedup": {k.replace("__", "+"): v for k, v in speedup.items()}}


@pytest.mark.parametrize(
    ("row", "rows", "met", "said"),
    [
        ("K1", [kernel_row("K1 RMSNorm fwd", "16384x4096", 95.0, kernelswap=100.0)], True, "0.950"),
        ("K1", [kernel_row("K1 RMSNorm fwd", "16384x4096", 94.8, kernelswap=100.0)], False, "0.948"),
        ("K1", [kernel_row("K1 RMSNorm fwd", "1x4096", kernelswap=1.0, Liger=1.1),
                kernel_row("K1 RMSNorm fwd", "16x4096", kernelswap=1.0, Liger=0.9)], False, "0.90x Liger at 16x4096, the worst of 2"),
        ("K5", [kernel_row("K5 SiLU*mul fwd", "1x14336", kernelswap=1.5, eager=2.0)], False, "1.50 us"),
        ("K9", [kernel_row("K9 attention fwd", "8x2048 eager", kernelswap=100.0, SDPA=99.5)], True, "0.99x SDPA"),
        ("E0", [model_row("0.6b prefill 1x16", swapped=1.2), model_row("8b decode step batch 1", swapped=0.97)], False,
         "0.97x at 8b decode step batch 1, the worst of 2; 1 below 1"),
        ("E6", [model_row("0.6b training step 4x2048", swapped=1.9, swapped__loss=2.2, **{"layer.compile()": 1.8})], True,
         "2.20x (swapped+loss), 1.22x layer.compile()"),
        ("E6", [{"row": "0.6b training step 4x2048", "peak_gib": {"original": 32.0, "swapped+loss": 14.4}}], False, "14.4 GiB"),
        ("text", [{"row": "x", "against_original": {"swapped": {"sequences": 2, "identical": 1, "differences": [{"below": False}]}}}],
         False, "1 of 2 sequences identical, 0 part below the resolution, 1 above it"),
    ],
)  # fmt: skip
def test_targets_are_judged_by_the_rows_alone(scripts, row, rows, met, said):
    (verdict,) = [v for v in scripts("targets").judge(rows) if v.met is not None and v.row == row]
    assert verdict.met is met
    assert verdict.measured.startswith(said)


def test_who_was_faster_is_said(scripts):
    rows = [
        kernel_row("K1 RMSNorm fwd", "1x4096", kernelswap=1.0, Liger=0.8, eager=3.0),
        kernel_row("K1 RMSNorm fwd", "4x4096", kernelswap=1.0, Liger=0.995),
        model_row("0.6b prefill 1x16", swapped=0.8, Liger=0.5),
    ]
    assert scripts("targets").losers(rows) == ["K1 RMSNorm fwd, 1x4096: Liger by 25%", "0.6b prefill 1x16: original by 25%"]


def test_text_that_departs_is_shown_with_the_gap_where_it_does(scripts):
    import copy

    compare = scripts("gpu_generate").compare
    original, wrong = qwen3(vocab_size=256), qwen3(vocab_size=256)
    with torch.no_grad():
        wrong.model.layers[1].mlp.down_proj.weight.mul_(-1)
    prompts = torch.randint(0, 255, (3, 8))
    found = compare({"original": original, "same": copy.deepcopy(original), "wrong": wrong}, prompts, 16, original)
    assert found["same"] == {"sequences": 3, "identical": 3, "tokens_equal": 1.0, "differences": []}
    differences = found["wrong"]["differences"]
    assert {d["sequence"] for d in differences} == {0, 1, 2}
    assert not all(d["below"] for d in differences)
    for d in differences:
        assert d["gap"] == pytest.approx(d["gap_float32"], abs=1e-4)  # the original is its own float32
        assert d["below"] == (d["gap"] <= d["resolution"])


@pytest.mark.parametrize("logit", [0.7, 1.0, 5.3, -5.3, 1000.0])
def test_the_resolution_is_the_distance_to_the_next_bfloat16(scripts, logit):
    here = torch.tensor(abs(logit), dtype=torch.float32).bfloat16()
    lower = here.view(torch.int16) & ~0x7F  # the power of two below, where the same distance holds
    following = (lower + 1).view(torch.bfloat16)
    assert scripts("gpu_generate").resolution(logit) == (following.float() - lower.view(torch.bfloat16).float()).item()
