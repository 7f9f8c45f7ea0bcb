"""`kernelswap verify`: hash again, and compare: the cache, a lock, a repository, a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import KernelSwapError
from .. import exits, session
from ..output import Answer

if TYPE_CHECKING:
    from rich.console import Console

    from ...api import Swapper
    from ...verifying import Seen

PANEL = "Kernels"


def command(
    spec: Annotated[str | None, typer.Argument(help="One kernel; without it, the whole cache.", metavar="[SPEC]")] = None,
    lock: Annotated[
        Path | None,
        typer.Option("--lock", help="Compare the cache with this lock, or with the one in this directory.", metavar="FILE"),
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Every build of SPEC as its source has it now; none is kept.")
    ] = False,
    bundle: Annotated[
        Path | None, typer.Option("--bundle", help="What this file of `kernelswap bundle` holds.", metavar="FILE")
    ] = None,
    cache: session.Cache = None,
    offline: session.Offline = False,
) -> Answer:
    """Hash every file of the kernels in the cache again, and compare with what was verified, or with a lock.

    Exit code 1: something differs, is missing, or was added; every file is named. Nothing is imported.
    """
    from ... import verifying
    from ...sources.bundle_file import BundleSource

    if sum(given for given in (spec is not None, lock is not None, bundle is not None)) > 1:
        raise KernelSwapError("a kernel, a lock and a bundle are three questions", todo="ask for one of them")
    if published and spec is None:
        raise KernelSwapError("--published needs a kernel", todo="name one: kernelswap verify --published org/kernel@1")
    if bundle is not None:
        return _answer(list(verifying.bundled(BundleSource.open(bundle))), f"the bundle {bundle}")
    swapper = session.swapper(cache=cache, offline=offline)
    if lock is not None:
        return _answer(list(verifying.locked(swapper.store, _read(lock))), str(swapper.store.cache))
    if published and spec is not None:
        from ... import spec as specs

        return _answer(list(verifying.published(swapper, specs.parse(spec))), f"what its source has of {spec}")
    rows = list(verifying.cache(swapper.store))
    if spec is not None:
        wanted = _digests(swapper, spec)
        rows = [row for row in rows if row.digest in wanted]
    return _answer(rows, str(swapper.store.cache))


def _answer(rows: list[Seen], where: str) -> Answer:
    bad = sum(row.wrong is not None for row in rows)
    names = ("name", "variant", "digest", "path")
    found: list[dict[str, Any]] = [
        {**{n: getattr(row, n) or None for n in names}, "here": row.here, "wrong": row.wrong} for row in rows
    ]
    data = {"cache": where, "artifacts": found, "wrong": bad}

    def text(out: Console) -> None:
        for row in rows:
            name = " ".join(filter(None, (row.name or "(no name)", row.variant, row.digest[:12])))
            state = "intact" if row.wrong is None else "WRONG " if row.here else "absent"
            out.print(f"{state} {name}", markup=False, soft_wrap=True)
            if row.wrong:
                out.print("       " + row.wrong.replace("\n", "\n       "), markup=False, soft_wrap=True)
        out.print(f"{len(rows) - bad} of {len(rows)} intact in {where}", markup=False, soft_wrap=True)
        if any(row.wrong and row.path for row in rows):
            paths = ", ".join(sorted({row.path for row in rows if row.wrong and row.path}))
            out.print(f"next: delete {paths}; the next use fetches and verifies it again", markup=False, soft_wrap=True)
        elif any(not row.here for row in rows):
            out.print("next: `kernelswap download` fetches what a lock names", markup=False, soft_wrap=True)

    return Answer(data, text, exits.NO if bad else exits.OK)


def _read(lock: Path) -> Any:
    from ... import lock as locks
    from ... import locking

    if not lock.is_dir():
        try:
            return locks.parse(lock.read_bytes(), what=str(lock))
        except OSError as e:
            raise KernelSwapError(f"{lock} cannot be read: {e.strerror}", todo="name a lock, or the directory of one") from e
    found = locking.former(lock)
    if found is None:
        raise KernelSwapError(f"there is no lock in {lock}", todo=f"`kernelswap lock {lock}` writes one")
    return found


def _digests(swapper: Swapper, spec: str) -> set[str]:
    """Those of every build in the cache that `spec` names; no network."""
    from ... import spec as specs

    requirement = specs.parse(spec)
    entries = swapper.store.entries()
    found = {a.digest for a in entries if requirement.name in {a.candidate.requirement.name, a.candidate.name}}
    if not found:
        raise KernelSwapError(
            f"no build of {requirement.name} is in {swapper.store.cache}",
            todo=f"`kernelswap load {spec}` fetches and verifies it; --published looks at what its source has",
        )
    return found
