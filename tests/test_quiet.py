"""Nothing is sent to anybody beyond the requests for the kernels that somebody asks for."""

import os
import subprocess
import sys

from tests.hub import kernel_files

ASK = """
import pathlib, sys
met = set()
sys.addaudithook(lambda event, args: met.add(args[1]) if event == "socket.connect" else met.add(args[:2]) if event == "socket.getaddrinfo" else None)
import torch
import kernelswap as ks
from kernelswap.api import Swapper
swapper = Swapper(cache=pathlib.Path(sys.argv[1]))
swapper.load("org/kernel@1")
model = torch.nn.Sequential(torch.nn.LayerNorm(8)).eval()
with swapper.swap(model, build="never") as applied:
    model(torch.ones(1, 8))
    applied.explain()
print(sorted({str(where[0]) for where in met if isinstance(where, tuple)}))
print(sorted({int(where[1]) for where in met if isinstance(where, tuple)}))
"""


def test_the_hub_is_the_only_one_that_hears_of_a_load_and_of_nothing_else(hub, tmp_path):
    hub.organization("org", trusted=True)
    hub.repo("org/kernel").branch("v1", kernel_files("torch-cpu", "VALUE = 1", name="kernel"))
    hub.log.clear()
    environ = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "TELEMETRY" not in k}
    environ |= {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": str(tmp_path / "hf"),
        "HOME": str(tmp_path),
        "XDG_CONFIG_HOME": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", ASK, tmp_path / "cache"], env=environ, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    hosts, ports = map(eval, done.stdout.splitlines())
    assert set(hosts) <= {"127.0.0.1", "localhost"}
    assert ports == [hub.port]
    asked = {path.split("/resolve/")[0] for _, path in hub.requests()}
    assert all("org" in path for path in asked), asked
