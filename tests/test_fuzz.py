"""The fuzzer runs and finds nothing in a moment; `benchmarks/fuzz.py --seconds 600` looks longer."""

import importlib.util
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


def test_what_was_once_not_survived_is_read_or_refused():
    """`tests/cases/fuzz/TARGET-WHAT`: what the fuzzer, or a reader of the code, found."""
    spec = importlib.util.spec_from_file_location("fuzz", ROOT / "benchmarks" / "fuzz.py")
    fuzz_file = importlib.util.module_from_spec(spec)
    sys.modules["fuzz"] = fuzz_file  # dataclasses look their module up
    spec.loader.exec_module(fuzz_file)
    kept = sorted((ROOT / "tests" / "cases" / "fuzz").iterdir())
    assert kept
    for file in kept:
        (target,) = [t for t in fuzz_file.TARGETS if file.name.startswith(f"{t.name.replace(' ', '-')}-")]
        count = {"inputs": 0, "read": 0, "refused": 0, "slowest_s": 0.0}
        assert fuzz_file.tried(target, file.read_bytes().decode("utf-8", "surrogatepass"), count) is None, file.name
    del sys.modules["fuzz"]
