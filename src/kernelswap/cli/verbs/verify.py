"""`kernelswap verify`: hash what is in the cache again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import KernelSwapError
from .. import exits, session
from ..output import Answer

if TYPE_CHECKING:
    from rich.console import Console

PANEL = "Kernels"


def command(
    spec: Annotated[str | None, typer.Argument(help="One kernel; without it, the whole cache.", metavar="[SPEC]")] = None,
    cache: session.Cache = None,
    offline: session.Offline = False,
) -> Answer:
    """Hash every file of the kernels in the cache again, and compare with what was verified.

    Exit code 1: something differs, is missing, or was added; every file is named. Nothing is imported.
    """
    swapper = session.swapper(cache=cache, offline=offline)
    store = swapper.store
    known = {a.digest: a for a in store.entries()}
    wanted = _digests(swapper, spec, known) if spec else None
    rows: list[dict[str, Any]] = []
    for digest, wrong in sorted(store.verify_all().items()):
        if wanted is not None and digest not in wanted:
            continue
        artifact = known.get(digest)
        rows.append(
            {
                "name": artifact.candidate.name if artifact else None,
                "variant": artifact.candidate.variant if artifact else None,
                "digest": digest,
                "path": str(store.cache / "artifacts" / digest),
                "wrong": wrong,
            }
        )
    bad = sum(row["wrong"] is not None for row in rows)
    data = {"cache": str(store.cache), "artifacts": rows, "wrong": bad}

    def text(out: Console) -> None:
        for row in rows:
            name = f"{row['name'] or '(no name)'} {row['variant'] or ''} {row['digest'][:12]}".replace("  ", " ")
            out.print(f"{'WRONG ' if row['wrong'] else 'intact'} {name}", markup=False, soft_wrap=True)
            if row["wrong"]:
                out.print("       " + row["wrong"].replace("\n", "\n       "), markup=False, soft_wrap=True)
        out.print(f"{len(rows) - bad} of {len(rows)} intact in {store.cache}", markup=False, soft_wrap=True)
        if bad:
            out.print("next: delete the directories named above; the next use fetches and verifies them again", soft_wrap=True)

    return Answer(data, text, exits.NO if bad else exits.OK)


def _digests(swapper: Any, spec: str, known: dict[str, Any]) -> set[str]:
    """Those of every build in the cache that `spec` names; no network."""
    from ... import spec as specs

    requirement = specs.parse(spec)
    found = {d for d, a in known.items() if requirement.name in {a.candidate.requirement.name, a.candidate.name}}
    if not found:
        raise KernelSwapError(
            f"no build of {requirement.name} is in {swapper.store.cache}",
            todo=f"`kernelswap load {spec}` fetches and verifies it",
        )
    return found
