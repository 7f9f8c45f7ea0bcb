"""The fuzzer runs and finds nothing in a moment; `benchmarks/fuzz.py --seconds 600` looks longer."""

import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def test_no_parser_raises_anything_undeclared_in_a_second_of_fuzzing(tmp_path):
    command = [
        sys.executable,
        ROOT / "benchmarks" / "fuzz.py",
        "--seconds",
        "1",
        "--seed",
        "7",
        "--json",
        tmp_path / "counts.json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT / "src")})
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "counts.json").read_text())
    assert found["problems"] == 0
    assert all(target["read"] and target["refused"] for target in found["targets"].values())
