"""`kernelswap verdicts`: what was proved on this machine, in words; taken along, and taken over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import KernelSwapError
from .. import exits, session
from ..output import Answer

if TYPE_CHECKING:
    from rich.console import Console

    from ...types import Verdict

PANEL = "This machine"


def command(
    glob: Annotated[str, typer.Argument(help="Only kernels or layers that this names: *RMSNorm.", metavar="[GLOB]")] = "*",
    export: Annotated[
        Path | None, typer.Option("--export", help="Write them to FILE, to go with a lock.", metavar="FILE")
    ] = None,
    take: Annotated[
        Path | None, typer.Option("--import", help="Take over the verdicts of FILE; you vouch for them.", metavar="FILE")
    ] = None,
    lock: Annotated[
        Path | None,
        typer.Option(
            "--lock", help="Only verdicts of builds that the lock of DIR names, as `--export` takes them along.", metavar="DIR"
        ),
    ] = None,
    cache: session.Cache = None,
) -> Answer:
    """List the verdicts that are kept here: which kernel, for what, on which tensors, accepted or refused, with the errors.

    A verdict holds for one build, machine, torch, dtype, layout and size; change one and it is void. Verdicts are signed with a
    key of your own: what somebody else wrote into the cache counts for nothing, and --import is the way to accept theirs.
    """
    from ... import render

    store: Any = getattr(session.swapper(cache=cache, offline=True).prover, "store", None)
    taken = _take(store, take) if take is not None else None
    locked = None if lock is None else _locked(lock)
    found = [v for v in store if _named(v, glob) and (locked is None or dict(v.details).get("digest") in locked)]
    if export is not None:
        keys = {v.key for v in found}
        data = store.export()
        data["verdicts"] = [v for v in data["verdicts"] if v["key"] in keys]
        _write(export, data)
    plain = {
        "directory": str(store.path),
        "verdicts": [render.verdict_json(v) for v in found],
        "imported": taken,
        "exported": str(export) if export is not None else None,
    }

    def text(out: Console) -> None:
        _show(found, plain, out)

    return Answer(plain, text, exits.OK)


def _locked(folder: Path) -> set[str]:
    """Digests of the builds that the lock of a directory names."""
    from ... import locking

    file, lock = locking.there(folder)
    if lock is None:
        raise KernelSwapError(f"there is no {file}", todo="`kernelswap lock`, or swap(model, lock=DIR), writes one.")
    return {build.tree for entry in lock.entries for build in entry.builds if build.tree is not None}


def _named(verdict: Verdict, glob: str) -> bool:
    from fnmatch import fnmatchcase

    about = dict(verdict.details)
    return glob == "*" or any(fnmatchcase(about.get(key, ""), glob) for key in ("kernel", "layer", "original", "digest"))


def _show(found: list[Verdict], plain: dict[str, Any], out: Console) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from ...report.text import error

    if plain["imported"] is not None:
        out.print(f"{plain['imported']} verdicts are taken over")
    groups: dict[tuple[str, str, str], list[Verdict]] = {}
    for v in found:
        about = dict(v.details)
        if "kernel" in about:
            groups.setdefault((about["kernel"], about.get("digest", "")[:12], about.get("layer", "")), []).append(v)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False, header_style="bold")
    for name, right in (("kernel, for", False), ("on", False), ("error", True), ("original", True)):
        table.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=right)
    for (kernel, digest, layer), members in sorted(groups.items()):
        table.add_row(Text.assemble(kernel, (f" {digest}\n{layer}", "dim")), "", "", "")
        for v in sorted(members, key=lambda v: [text for _, text in v.details[-4:]]):
            about = dict(v.details)
            on = ", ".join(filter(None, (about.get("dtype"), about.get("tensors"), about.get("mode"))))
            measured = f"\n{v.reason.partition(' on ')[0]}" if "speedup" in about else ""
            words = (
                Text.assemble(on or "?", measured)
                if v.accepted or measured
                else Text.assemble(on, ("\nrefused: " + v.reason, "red"))
            )
            table.add_row("", words, error(v.error_kernel), error(v.error_original))
    if groups:
        out.print(table)
    older = len(found) - sum(map(len, groups.values()))
    if older:
        out.print(f"{older} more of an earlier kernelswap, which do not say what they hold for")
    refused = sum(not v.accepted for v in found)
    out.print(f"{len(found)} verdicts, {refused} of them refusals, in {plain['directory']}", markup=False, soft_wrap=True)
    if plain["exported"]:
        out.print(f"written to {plain['exported']}", markup=False, soft_wrap=True)


def _take(store: Any, path: Path) -> int:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise KernelSwapError(f"{path} cannot be read: {e}", todo="Give a file that --export wrote.") from e
    if not isinstance(held, dict):
        raise KernelSwapError(f"{path} holds no verdicts", todo="Give a file that --export wrote.")
    taken: int = store.import_(held)
    return taken


def _write(path: Path, value: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    except OSError as e:
        raise KernelSwapError(f"{path} cannot be written: {e.strerror}", todo="Name another file for --export.") from e
