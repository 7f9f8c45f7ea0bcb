"""What every verb prints with: an `Answer` (text or JSON), progress on stderr, errors in three parts."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..errors import KernelSwapError
from . import exits

if TYPE_CHECKING:
    from rich.console import Console

    from ..types import Progress


@dataclass(frozen=True)
class Answer:
    """What a verb found. `data` is plain JSON; `text` prints the same facts for a person."""

    data: Mapping[str, Any]
    text: Callable[[Console], None]
    code: int = exits.OK
    stream: Literal["stdout", "stderr"] = field(default="stdout")
    """`run` answers on stderr: its stdout is the script's."""

    def show(self, *, as_json: bool) -> None:
        """Print it."""
        if as_json:
            stream = sys.stdout if self.stream == "stdout" else sys.stderr
            stream.write(json.dumps(self.data, indent=2, default=str, allow_nan=False) + "\n")
        else:
            self.text(console(stderr=self.stream == "stderr"))


def console(*, stderr: bool = False) -> Console:
    """A rich console as wide as the terminal; 80 where there is none to ask (COLUMNS says otherwise)."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=False)


def plain(text: str) -> Callable[[Console], None]:
    """Print text as it is: no markup, no wrapping."""
    return lambda out: out.print(text, markup=False, soft_wrap=True)


@contextmanager
def progress(*, quiet: bool = False) -> Iterator[Progress]:
    """Bars on stderr while the block runs; nothing where stderr is no terminal, except a line when a step begins."""
    err = console(stderr=True)
    if quiet or not err.is_terminal:
        begun: set[str] = set()

        def line(step: str, done: float, total: float) -> None:  # noqa: ARG001  # the face of Progress
            if step not in begun and not quiet:
                begun.add(step)
                err.print(f"... {step}", markup=False, style="dim", soft_wrap=True)

        yield line
        return

    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def draw(step: str, done: float, total: float) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=total or None)
            bars.update(tasks[step], completed=done, total=total or None)
            if total and done >= total:
                bars.update(tasks.pop(step), visible=False)

        yield draw


_NEXT = {
    "caller": "`{verb} --help` shows what can be asked",
    "machine": "`kernelswap doctor` says what this machine has",
    "network": "`kernelswap doctor` asks the hub; what was fetched before is served with --offline",
    "publisher": "nothing of it was loaded; tell its publisher",
    "kernel": "`--debug` shows its traceback; tell its publisher",
}


def parts(error: KernelSwapError, asked: str) -> tuple[str, str, str]:
    """Asked, found, do next; completed where the error does not say."""
    verb = " ".join(asked.split()[:2])
    return error.asked or asked, error.found, error.todo or _NEXT[error.fault].format(verb=verb)


def complain(error: KernelSwapError, asked: str, *, as_json: bool) -> None:
    """The three parts on stderr; with `as_json` also an object on stdout, so that a pipe always gets JSON."""
    three = parts(error, asked)
    say_three(*three)
    if as_json:
        names = dict(zip(("asked", "found", "next"), three, strict=True))
        data = {"error": {"type": type(error).__name__, "fault": error.fault, **names}}
        sys.stdout.write(json.dumps(data, indent=2) + "\n")


def say_three(asked: str, found: str, todo: str) -> None:
    """Three labelled parts on stderr; further lines of a part stand under its first."""
    err = console(stderr=True)
    for label, text, style in (("asked", asked, "dim"), ("found", found, "bold red"), ("next", todo, "bold")):
        body = textwrap.indent(text.strip("\n"), " " * 7).lstrip(" ")
        err.print(f"[{style}]{label + ':':<6}[/] ", end="", highlight=False)
        err.print(body, markup=False, soft_wrap=True)
