"""`kernelswap bench kernels|model`: the benchmarks behind the published figures, run on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import KernelSwapError

SCRIPTS = {
    ("kernels", "cpu"): ("cpu_layers.py", ("--quick",), ("--quick",)),
    ("kernels", "cuda"): ("gpu_kernels.py", (), ("--quick",)),
    ("model", "cuda"): ("gpu_model.py", ("0.6b", "8b", "--all"), ("0.6b", "--attention")),
}
"""By what is asked and the device: the script, its arguments, and those of a short run."""
WRONG = 3
"""The exit code of a script that measured everything and found an output of ours wrong."""


def script(what: str, device: str, *, quick: bool = False) -> tuple[Path, tuple[str, ...]]:
    """The file and its arguments.

    Raises:
        KernelSwapError: there is none for this device.
    """
    kind = device.partition(":")[0]
    if (what, kind) not in SCRIPTS:
        there = ", ".join(sorted(k for w, k in SCRIPTS if w == what))
        raise KernelSwapError(f"there is a benchmark of the {what} for {there}, none for {kind}", asked=f"bench {what}")
    name, long, short = SCRIPTS[what, kind]
    for folder in (Path(str(resources.files("kernelswap"))) / "benchmarks", Path(__file__).parents[3] / "benchmarks"):
        if (folder / name).is_file():
            return folder / name, short if quick else long
    raise KernelSwapError(
        f"{name} is not part of this installation", asked=f"bench {what}", todo="Install kernelswap from its wheel."
    )


def run(
    what: str,
    device: str,
    *,
    line: Callable[[str], Any],
    seconds: float | None = None,
    out: Path | None = None,
    quick: bool = False,
    only: str | None = None,
    threads: int | None = None,
) -> Any:
    """The rows and the machine, as the script writes them. `line` gets what it prints; after `seconds` it is ended.

    A script writes after every row, so that what was measured by then counts. `out`: where it writes; on a GPU, rows that are there
    and are not measured again stay. `only`: rows, by the script's own names. `right` in the answer: no output of ours was wrong.

    Raises:
        KernelSwapError: it failed, or there was not time for one row.
    """
    file, arguments = script(what, device, quick=quick)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "rows.json" if out is None else out.absolute()
        here = device == "cpu"
        more = (*arguments, *(("--only", only) if only else ()), *(("--threads", str(threads)) if threads and here else ()))
        more = (*more, "--output", str(output)) if here else (*more, "--add", str(output))
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        if device.startswith("cuda:"):
            environ["CUDA_VISIBLE_DEVICES"] = device.partition(":")[2]
        process = subprocess.Popen(  # noqa: S603  # our own interpreter and our own script
            [sys.executable, str(file), *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ
        )
        timer = _after(seconds, process)
        said = []
        assert process.stdout is not None
        for text in process.stdout:
            said.append(text.rstrip())
            line(said[-1])
        code = process.wait()
        ended = timer is not None and not timer.is_alive()
        if timer is not None:
            timer.cancel()
        if code not in {0, WRONG} and not ended:
            raise KernelSwapError(f"{file.name} ended with exit code {code}: {said[-1] if said else ''}", asked=f"bench {what}")
        if not output.is_file():
            raise KernelSwapError("the time was up before the first row", asked=f"bench {what}", todo="Give it more time.")
        return {**json.loads(output.read_text(encoding="utf-8")), "complete": not ended, "right": code != WRONG}


def _after(seconds: float | None, process: subprocess.Popen[str]) -> Any:
    import threading

    if seconds is None:
        return None
    timer = threading.Timer(seconds, process.terminate)
    timer.daemon = True
    timer.start()
    return timer
