"""`kernelswap run`: an unmodified script, with kernelswap installed over what loads kernels in it."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import kernelswap

from ...errors import KernelSwapError
from .. import session
from ..output import Answer

if TYPE_CHECKING:
    from rich.console import Console

PANEL = "Models"
SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}


def command(
    script: Annotated[str, typer.Argument(help="A Python file, or a directory with __main__.py.", metavar="SCRIPT")],
    arguments: Annotated[list[str] | None, typer.Argument(help="What the script gets as sys.argv[1:].", metavar="ARGS")] = None,
    module: Annotated[bool, typer.Option("--module", "-m", help="SCRIPT is a module name, as in python -m.")] = False,
    lock: Annotated[
        Path | None,
        typer.Option("--lock", help="Have kernelswap.lock in this directory name every kernel that was loaded.", metavar="DIR"),
    ] = None,
    bundle: session.Bundle = None,
) -> Answer:
    """Run a script unchanged, with kernelswap serving the kernels it asks for.

    Options of kernelswap go before SCRIPT; everything after it belongs to the script. Its own exit status and its own
    tracebacks are passed on. `--json` prints what was done on stderr: stdout is the script's.
    """
    if not module and not Path(script).exists():
        raise KernelSwapError(f"there is no file {script}", todo="give the path of a Python file, or -m and a module name")
    if lock is not None and not lock.is_dir():
        raise KernelSwapError(f"there is no directory {lock}", todo="Name one that exists for --lock.")
    lock = lock.absolute() if lock is not None else None  # the script may change the working directory
    if bundle is not None:
        os.environ["KERNELSWAP_BUNDLE"] = str(bundle.absolute())  # for the processes that the script starts, too
    installed = _install()
    was_argv, was_path = list(sys.argv), list(sys.path)
    sys.argv[:] = [script, *(arguments or ())]
    code = 0
    try:
        if module:
            sys.path.insert(0, str(Path.cwd()))
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(script).resolve().parent))
            runpy.run_path(script, run_name="__main__")
    except SystemExit as e:
        code = _status(e)
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001  # the script's own, whatever it is; shown as Python shows it, less our frames
        _traceback()
        code = 1
    finally:
        sys.argv[:], sys.path[:] = was_argv, was_path
    data: dict[str, Any] = {"script": script, "installed": installed, "exit": code}
    if lock is not None:
        data["locked"] = _lock(lock)
    return Answer(data, lambda out: _say(data, out), code, stream="stderr")


def _lock(folder: Path) -> list[str]:
    """What changed in the lock, in words."""
    from ... import loader, locking

    return locking.record((kernel.artifact for kernel in loader.loaded()), folder, cache=session.cache_of(None))


def _say(data: dict[str, Any], out: Console) -> None:
    for line in data.get("locked", ()):
        out.print(f"locked: {line}", markup=False, soft_wrap=True)


def _install() -> bool:
    """Install over Transformers and `kernels`, where this version of kernelswap can."""
    install = getattr(kernelswap, "install", None)
    if install is None:
        return False
    install()
    return True


def _status(e: SystemExit) -> int:
    if e.code is None or isinstance(e.code, int):
        return e.code or 0
    sys.stderr.write(f"{e.code}\n")
    return 1


def _traceback() -> None:
    """As Python prints it, from the script's first frame on."""
    kind, value, trace = sys.exc_info()
    if kind is None or value is None:
        return
    frames = trace
    while frames is not None and _ours(frames.tb_frame.f_code.co_filename):
        frames = frames.tb_next
    sys.excepthook(kind, value.with_traceback(frames or trace), frames or trace)


def _ours(file: str) -> bool:
    return file == __file__ or file.startswith("<frozen runpy") or Path(file).name == "runpy.py"
