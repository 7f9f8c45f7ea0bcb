"""The Triton kernels without a GPU: tests/interpreted in processes in which Triton interprets instead of compiling."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BESIDE = Path(sys.prefix) / "interpreter"  # where dev.py puts Triton, out of sight of every other test
TRITON = (BESIDE / "triton").is_dir() or importlib.util.find_spec("triton") is not None
FILES = sorted((ROOT / "tests" / "interpreted").glob("test_*.py"))


@pytest.mark.slow
@pytest.mark.skipif(not TRITON, reason="needs Triton, which `python3 dev.py test` brings on Linux")
@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_kernels_agree_with_float64_in_the_interpreter(file):
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "--tb=short", str(file)]
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(BESIDE))))
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    said = done.stdout.strip().splitlines()
    assert done.returncode == 0, "\n".join(said[-60:])
    assert " passed" in said[-1]
    assert "skipped" not in said[-1], said[-1]
