"""The Triton kernels compile for GPUs that are not here, with what they would be launched with there, and fit into their memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.bundled.test_interpreted import BESIDE, TRITON

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not TRITON, reason="needs Triton, which `python3 dev.py test` brings on Linux"),
]
SCRIPT = Path(__file__).with_name("compiling.py")
KERNELS = {
    "rms_norm._forward", "rms_norm._add_forward", "rms_norm._backward", "rms_norm._sum_partials", "glu._forward", "glu._backward",
    "rope._forward", "rope_gradients._backward", "rope_gradients._sum_both", "projections._project", "projections._gate_up", "cross_entropy._sweeps", "cross_entropy._scale", "decode._split", "decode._join",
}  # fmt: skip


def compiled(tmp_path, *argv):
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(BESIDE))))
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, SCRIPT, *argv], env=env, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def fewer_stages(rows):
    """Of the attempts of each launch the last one, all of which must fit, and whether any launch needed more than one attempt."""
    last = {json.dumps({k: v for k, v in r.items() if k not in {"STAGES", "shared", "fits"}}): r for r in rows if "kernel" in r}
    assert all(r["fits"] for r in last.values()), [r for r in last.values() if not r["fits"]]
    return any(r["kernel"].endswith("_backward") and r.get("STAGES", 3) < 3 for r in last.values())


def test_every_kernel_fits_into_a_desktop_gpu(tmp_path):
    rows = compiled(
        tmp_path, "86", "layers,loss,attention", "16384", "bfloat16"
    )  # RTX 30 and 40: 99 KiB of shared memory a block
    assert {r["kernel"] for r in rows if "kernel" in r} >= KERNELS
    assert fewer_stages(rows)
    assert not [r for r in rows if "left_to_pytorch" in r]


def test_the_kernels_of_losses_and_attention_compile_for_a_newer_desktop_gpu(tmp_path):
    fewer_stages(compiled(tmp_path, "120", "loss,attention", "1", "bfloat16"))


@pytest.mark.parametrize("capability", ["90", "86"])
def test_what_tuning_tries_first_compiles(tmp_path, capability):
    """What a GPU has no room for, even with fewer stages, is left out and nothing else."""
    rows = compiled(tmp_path, capability, "configurations", "4096", "bfloat16")
    kernels = {r["kernel"] for r in rows if "kernel" in r}
    assert {"rms_norm._forward_staying", "rms_norm._add_staying", "rope._forward_staying", "decode._split"} <= kernels
    assert {r["left_out"] for r in rows if "left_out" in r} <= ({"decode"} if capability == "86" else set())


def test_rows_of_16384_numbers_are_trained_in_float32_on_an_h100(tmp_path):
    assert fewer_stages(compiled(tmp_path, "90", "layers", "16384", "float32"))


def test_on_a_small_old_gpu_large_heads_are_left_to_pytorch(tmp_path):
    rows = compiled(tmp_path, "75", "attention", "1", "float16")
    assert {r["left_to_pytorch"] for r in rows if "left_to_pytorch" in r} == {256}
