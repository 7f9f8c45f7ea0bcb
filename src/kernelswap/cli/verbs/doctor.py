"""`kernelswap doctor`: what this machine has, and which kernels would load here."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import exits, session
from ..output import Answer, progress

if TYPE_CHECKING:
    from rich.console import Console

PANEL = "This machine"


def command(
    kernels: Annotated[
        list[str] | None, typer.Argument(metavar="[KERNEL]...", help="Say it of these, too.", show_default=False)
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", help="How long to wait for the hub.", min=0.1, metavar="S")] = 5.0,
    cache: session.Cache = None,
    offline: session.Offline = False,
    as_json: bool = False,
) -> Answer:
    """Say what this machine has, and for every kernel of the default table, and for those that you name, whether it would
    load here, and why not.

    Backend, driver, versions, compiler, caches, the hub. Loads nothing and compiles nothing. Exit code 1: no bundled
    kernel can run here, neither as it is nor compiled.
    """
    with progress(quiet=as_json) as report:
        report("looking at this machine", 0, 0)
        found = _look(kernels or [], seconds, cache, offline=offline)
        report("looking at this machine", 1, 1)
    able = any(line["ok"] is not False for line in found["kernels"] if line["name"].startswith("kernelswap/"))

    def text(out: Console) -> None:
        _show(found, out)

    return Answer(found, text, exits.OK if able else exits.NO)


def _look(asked: list[str], seconds: float, cache: Any, *, offline: bool) -> dict[str, Any]:
    from ... import build, machine, render, spec, table
    from ...sources.environment import Environment
    from .. import health

    by_themselves = [use.spec for row in table.wins() for use in row.use]
    also = [text.removesuffix(f":{spec.parse(text).layer}") for text in (*by_themselves, *asked)]
    environment = Environment.read(os.environ)
    offline = offline or environment.offline
    here = machine.look()
    swapper = session.swapper(cache=cache, offline=offline)
    hub = health.hub(environment.endpoint, offline=offline, seconds=seconds)
    sections: dict[str, list[health.Line]] = {
        "versions": health.versions(),
        "tools": [
            health.driver(here),
            health.compiler(build.compiler()),
            health.directory("kernels", cache or environment.cache),
            health.directory("hub cache", environment.hub_cache),
            health.tuning(swapper.tunings, here),
            hub,
        ],
        "environment": health.variables(os.environ),
        "kernels": health.kernels(
            table.default(),
            here,
            swapper.find,
            table.misfit,
            also=also,
            hub_down=hub.ok is False,
            compiles=build.compiler() is not None,
            seconds=4 * seconds,
        ),
    }
    plain = {name: [dataclasses.asdict(line) for line in lines] for name, lines in sections.items()}
    return {"machine": render.machine_json(here), **plain}


def _show(found: dict[str, Any], out: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    from .. import views

    def heading(text: str) -> None:
        out.print(Text(text, style="bold"))

    heading("machine")
    views.machine(found["machine"], out)
    for name in ("versions", "tools", "environment", "kernels"):
        if not found[name]:
            continue
        out.print()
        heading(name)
        grid = Table.grid(padding=(0, 1, 0, 0))
        grid.add_column(no_wrap=True)
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        for line in found[name]:
            mark = {True: ("ok", "green"), False: ("no", "red"), None: ("", "")}[line["ok"]]
            grid.add_row(Text(*mark), line["name"], Text(line["value"], style="dim" if line["value"] == "not installed" else ""))
        out.print(grid)
