"""`kernelswap bench kernels|model`: the benchmarks behind the published figures, run on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import KernelSwapError

SCRIPTS: dict[tuple[str, str], tuple[tuple[str, tuple[str, ...], tuple[str, ...] | None], ...]] = {
    ("kernels", "cpu"): (("cpu_layers.py", ("--quick",), ("--quick",)),),
    ("kernels", "cuda"): (("gpu_kernels.py", (), ("--quick",)),),
    ("model", "cuda"): (
        ("gpu_model.py", ("0.6b", "8b", "--all"), ("0.6b", "--attention")),
        ("gpu_decode.py", ("0.6b", "8b", "--compile", "--long"), None),
    ),
    ("tuning", "cuda"): (("gpu_tune.py", (), ("--quick",)),),
}
"""By what is asked and the device: scripts, each with its arguments and those of a short run; `None`: no part of a short one."""
WRONG = 3
"""The exit code of a script that measured everything and found an output of ours wrong."""


def scripts(what: str, device: str, *, quick: bool = False) -> list[tuple[Path, tuple[str, ...]]]:
    """The files and their arguments.

    Raises:
        KernelSwapError: there are none for this device.
    """
    kind = device.partition(":")[0]
    if (what, kind) not in SCRIPTS:
        there = ", ".join(sorted(k for w, k in SCRIPTS if w == what))
        raise KernelSwapError(f"there is a benchmark of the {what} for {there}, none for {kind}", asked=f"bench {what}")
    folders = (Path(str(resources.files("kernelswap"))) / "benchmarks", Path(__file__).parents[3] / "benchmarks")
    found = []
    for name, long, short in SCRIPTS[what, kind]:
        file = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if file is None:
            raise KernelSwapError(
                f"{name} is not part of this installation", asked=f"bench {what}", todo="Install kernelswap from its wheel."
            )
        arguments = short if quick else long
        if arguments is not None:
            found.append((file, arguments))
    return found


def run(  # noqa: PLR0913  # what a person may ask for
    what: str,
    device: str,
    *,
    line: Callable[[str], Any],
    seconds: float | None = None,
    out: Path | None = None,
    quick: bool = False,
    only: str | None = None,
    threads: int | None = None,
    more: Sequence[str] = (),
) -> Any:
    """The rows and the machine, as the scripts write them. `line` gets what they print; after `seconds` they are ended.

    A script writes after every row, so that what was measured by then counts. `out`: where it writes; on a GPU, rows that are there
    and are not measured again stay. `only`: rows, by the first script's own names, and no other script. `right` in the answer: no
    output of ours was wrong. `more`: further arguments of the script.

    Raises:
        KernelSwapError: one failed, or there was not time for one row.
    """
    todo = scripts(what, device, quick=quick)[: 1 if only else None]
    here = device == "cpu"
    options = (*(("--only", only) if only else ()), *(("--threads", str(threads)) if threads and here else ()))
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    if device.startswith("cuda:"):
        environ["CUDA_VISIBLE_DEVICES"] = device.partition(":")[2]
    began, ended, right = time.monotonic(), False, True
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "rows.json" if out is None else out.absolute()
        for file, arguments in todo:
            command = [str(file), *arguments, *options, *more, *(("--output",) if here else ("--add",)), str(output)]
            left = None if seconds is None else max(1.0, seconds - (time.monotonic() - began))
            code, last, ended = _through(command, environ, left, line)
            if code not in {0, WRONG} and not ended:
                raise KernelSwapError(f"{file.name} ended with exit code {code}: {last}", asked=f"bench {what}")
            right = right and code != WRONG
            if ended:
                break
        if not output.is_file():
            raise KernelSwapError("the time was up before the first row", asked=f"bench {what}", todo="Give it more time.")
        return {**json.loads(output.read_text(encoding="utf-8")), "complete": not ended, "right": right}


def _through(
    command: list[str], environ: dict[str, str], seconds: float | None, line: Callable[[str], Any]
) -> tuple[int, str, bool]:
    """Exit code, the last line, and whether the time was up."""
    process = subprocess.Popen(  # noqa: S603  # our own interpreter and our own script
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ
    )
    timer = _after(seconds, process)
    last = ""
    assert process.stdout is not None
    for text in process.stdout:
        last = text.rstrip()
        line(last)
    code = process.wait()
    ended = timer is not None and not timer.is_alive()
    if timer is not None:
        timer.cancel()
    return code, last, ended


def _after(seconds: float | None, process: subprocess.Popen[str]) -> Any:
    import threading

    if seconds is None:
        return None
    timer = threading.Timer(seconds, process.terminate)
    timer.daemon = True
    timer.start()
    return timer
