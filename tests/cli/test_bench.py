"""`kernelswap bench`: a model's candidates by size of call, the whole model with what won; and our own benchmarks."""

import ast
import json
import pathlib
import sys

import pytest
from tests import small
from tests.cli.test_demo import environment, run

from kernelswap.bench import ours
from kernelswap.errors import KernelSwapError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small Qwen3 with its tokenizer, in a directory."""
    from kernelswap.bench import subject

    size = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    return small.checkpoint(tmp_path_factory.mktemp("checkpoint"), subject.tokenizer(), **size)


def bench(checkpoint, cache, where, *more):
    argv = ("-m", "kernelswap", "bench", checkpoint, "--device", "cpu", "--threads", "1", "--no-compile", *more)
    return run(*argv, env=environment(cache, where, OMP_NUM_THREADS="1"), cwd=where)


@pytest.fixture(scope="module")
def done(checkpoint, warm_cache, tmp_path_factory):
    where = tmp_path_factory.mktemp("bench")
    first = bench(checkpoint, warm_cache, where, "--json", "--time-budget", "40", "--plot", where / "p.png")
    return first, where


@pytest.mark.slow
def test_every_kind_of_site_has_its_candidates_by_size_and_the_whole_model_its_times(done):
    process, where = done
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    data = json.loads(process.stdout)
    races = {(race["layer"], race["width"], race["mode"]): race for race in data["candidates"]}
    assert {("RMSNorm", "128", "inference"), ("RMSNorm", "128", "training"), ("SwiGLUMLP", "", "inference")} <= set(races)
    norm = races["RMSNorm", "128", "inference"]
    assert norm["count"] == 5
    one = next(lap for lap in norm["laps"] if lap["size"] == "1 row" and lap["candidate"] == "kernelswap/layers:RMSNorm")
    assert one["wins"] == (one["speedup"] > 1 + one["noise"])
    assert one["seconds"] > 0
    assert one["seconds_original"] > 0
    for race in races.values():
        for size, serves, times in race["serves"]:
            won = [lap for lap in race["laps"] if lap["size"] == size and lap["wins"]]
            assert times is None or serves in {lap["candidate"] for lap in won}, (race["layer"], size)
    model = data["model"]
    assert set(model["whole"]) == {"prefill", "decode", "training"}
    assert model["undone"] is True
    assert 0 < model["error_original"] < 1e-3
    assert 0 < model["error_kernel"] < 1e-3
    assert min(model["memory_kernel"], model["step_memory_original"], model["step_memory_kernel"]) > 0
    assert (where / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_same_command_goes_on_and_measures_nothing_twice(done, checkpoint, warm_cache):
    first = json.loads(done[0].stdout)
    process = bench(checkpoint, warm_cache, done[1], "--time-budget", "10", "--no-train")
    assert process.returncode == 0, process.stderr
    known = sum(len(race["laps"]) for race in first["candidates"] if race["mode"] == "inference")
    assert f"{known} known from before" in process.stdout
    assert "training" not in process.stdout
    assert max(map(len, process.stdout.splitlines())) <= 80


@pytest.mark.slow
def test_the_benchmark_of_the_kernels_runs_here_and_keeps_to_its_time(warm_cache, tmp_path):
    budget = ("--time-budget", "45")  # compiling the kernels is part of it
    argv = ("-m", "kernelswap", "bench", "kernels", "--device", "cpu", "--threads", "1", *budget, "--json", "--out", "k.json")
    process = run(*argv, env=environment(warm_cache, tmp_path), cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    data = json.loads(process.stdout)
    assert {"op", "rows", "n", "dtype", "ratio"} <= set(data["rows"][0])
    assert data["complete"] is False
    assert json.loads((tmp_path / "k.json").read_text())["rows"] == data["rows"]
    assert "The kernels of the CPU" in process.stderr


def test_a_benchmark_that_is_not_for_this_device_is_said(capsys):
    from kernelswap.cli import main

    with pytest.raises(KernelSwapError, match="kernels for cpu, cuda, none for mps"):
        ours.scripts("kernels", "mps:0")
    assert main(["bench", "kernels", "--device", "cpu", "--hub"]) != 0
    assert "takes no --hub" in capsys.readouterr().err
    assert main(["bench", "demo", "--quick"]) != 0
    assert "--quick and --only are for `bench kernels`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["demo", "--tune"], "--tune is for `bench kernels`"),
        (["kernels", "--shape", "K1=3x4"], "--shape, --of and --again are for --tune"),
        (["kernels", "--tune", "--device", "cpu"], "there is none here"),
    ],
)  # fmt: skip
def test_tuning_where_there_is_nothing_to_tune_says_so(argv, said, capsys):
    from kernelswap.cli import main

    assert main(["bench", *argv]) != 0
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err


def test_every_script_is_there_and_in_the_wheel_with_what_it_imports():
    root = pathlib.Path(__file__).parents[2]
    included = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    names = {p.removeprefix("benchmarks/").removesuffix(".py") for p in included if p.startswith("benchmarks/")}
    for what, kind in ours.SCRIPTS:
        for file, _ in ours.scripts(what, kind):
            todo, seen = [file.stem], set()
            while todo:
                seen.add(name := todo.pop())
                tree = ast.parse((root / "benchmarks" / f"{name}.py").read_text())
                imports = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module]
                imports += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
                todo += [i for i in imports if (root / "benchmarks" / f"{i}.py").is_file() and i not in seen]
            assert seen <= names, f"not in the wheel: {sorted(seen - names)}"


def test_a_plot_that_cannot_be_written_is_refused_before_the_work(capsys, tmp_path):
    from kernelswap.cli import main

    assert main(["bench", "demo", "--plot", str(tmp_path / "p.gif")]) != 0
    assert "ends in none of" in capsys.readouterr().err
