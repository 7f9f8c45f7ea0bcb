"""Tuning on a GPU: every first choice is right there, the script keeps what wins, and a later process launches with it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or torch.version.hip is not None, reason="needs an NVIDIA GPU"),
]
ROOT = Path(__file__).parents[2]


def run(*argv, cache):
    env = {**os.environ, "KERNELSWAP_CACHE": str(cache), "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True, check=False, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


SERVES = """
import json, sys, torch, kernelswap as ks
swapper = ks.Swapper(offline=True)
kernel = swapper.kernel("kernelswap/layers", device="cuda")
from importlib import import_module
rms = import_module(kernel.module.__name__ + ".rms_norm")
x, w = torch.randn(4096, 1024, device="cuda", dtype=torch.bfloat16), torch.randn(1024, device="cuda", dtype=torch.bfloat16)
y = rms.rms_norm(x, w, 1e-6).double()
f = x.double()
want = f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-6) * w.double()
found = swapper.provide("kernelswap/layers:RMSNorm", device="cuda").tuned
print(json.dumps([list(kernel.module.tuning.serving.values()), float((y - want).norm() / want.norm()), found]))
"""


def test_what_was_tuned_serves_in_a_later_process(tmp_path):
    out = tmp_path / "tuning.json"
    argv = (ROOT / "benchmarks" / "gpu_tune.py", out, "--shape", "K1=4096x1024", "--seconds", "60")
    run(*argv, cache=tmp_path / "cache")
    (row,) = json.loads(out.read_text())["tuned"]
    assert row["wrong"] == 0, row["trials"]["wrong"]
    (file,) = (tmp_path / "cache" / "tuning").glob("*.json")
    data = json.loads(file.read_text())
    record = data["choices"]["rms_norm.forward"][row["bucket"]]
    if record["config"] is None:  # as good as the default is: choose something that is not
        record["config"] = {"ROWS": 2, "PROGRAMS": 4}
        file.write_text(json.dumps(data))
    serving, error, told = json.loads(run("-c", SERVES, cache=tmp_path / "cache"))
    assert serving == [record["config"]]
    assert error < 4e-3
    assert told == ["rms_norm.forward (1 of 1 measured)"]
    assert json.loads(run("-c", SERVES, cache=tmp_path / "other"))[0] == []


@pytest.mark.parametrize(
    "shape",
    ["K1=100x4096", "K3=100x4096", "K4=100x32x8x128", "K5=100x3072", "K6=64x32000", "K8=1x8192x32x8x128", "K8=9x1024x16x8x64"],
)
def test_every_first_choice_is_right_on_this_gpu(tmp_path, shape):
    out = tmp_path / "tuning.json"
    run(ROOT / "benchmarks" / "gpu_tune.py", out, "--shape", shape, "--seconds", "45", cache=tmp_path / "cache")
    rows = json.loads(out.read_text())["tuned"]
    assert rows
    for row in rows:
        assert row["wrong"] == 0, row["trials"]["wrong"]
        assert row["trials"]["tried"], row["trials"]
