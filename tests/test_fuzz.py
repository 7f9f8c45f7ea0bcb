"""The fuzzer runs and finds nothing in a moment; `benchmarks/fuzz.py --seconds 600` looks longer."""

import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def fuzz(*more):
    command = [sys.executable, ROOT / "benchmarks" / "fuzz.py", "--seed", "7", *more]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT / "src")})


def test_no_parser_raises_anything_undeclared_in_a_moment_of_fuzzing(tmp_path):
    done = fuzz("--inputs", "1000", "--json", tmp_path / "counts.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "counts.json").read_text())
    assert found["not_survived"] == 0
    assert all(target["inputs"] == 1000 and target["read"] and target["refused"] for target in found["targets"].values())


def test_a_stopped_run_goes_on_with_other_inputs(tmp_path):
    for inputs in (1000, 3000):
        assert fuzz("--inputs", str(inputs), "--only", "spec", "--json", tmp_path / "counts.json").returncode == 0
    counts = json.loads((tmp_path / "counts.json").read_text())["targets"]["spec"]
    fuzz("--inputs", "3000", "--only", "spec", "--json", tmp_path / "at-once.json")
    at_once = json.loads((tmp_path / "at-once.json").read_text())["targets"]["spec"]
    assert counts["inputs"] == 3000
    assert (counts["read"], counts["refused"]) == (at_once["read"], at_once["refused"])
