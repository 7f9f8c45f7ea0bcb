"""`kernelswap lock-rollback`: the lock before."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ...errors import KernelSwapError
from .. import session
from ..output import Answer, plain

PANEL = "Kernels"


def command(
    project: Annotated[Path, typer.Argument(help="The directory of the lock.", metavar="[DIR]")] = Path(),
    to: Annotated[int, typer.Option("--to", min=1, help="Which one: 1 is the last that was replaced.", metavar="N")] = 1,
    show: Annotated[
        bool, typer.Option("--list", help="Only list those that are kept, and what going back would change.")
    ] = False,
    cache: session.Cache = None,
) -> Answer:
    """Bring back a lock that `kernelswap lock` replaced in a directory, on this machine; say what that changes.

    The lock that it replaces is kept in turn: a second call takes the first one back. `kernelswap download` then fetches exactly
    what the lock names.
    """
    from ... import lock as locks
    from ... import locking

    at = session.cache_of(cache)
    now = locking.former(project) or locks.Lock()
    kept = locking.before(project, at, now)
    if not kept:
        raise KernelSwapError(
            f"no other lock of {project.resolve()} is kept on this machine",
            todo="If it is under version control, take it from there.",
        )
    if show:
        rows: list[dict[str, Any]] = [
            {"n": n, "replaced": session.moment(k.at), "changes": locks.diff(now, k.lock)} for n, k in enumerate(kept, 1)
        ]
        lines = [line for r in rows for line in (f"{r['n']}  replaced {r['replaced']}", *(f"     {c}" for c in r["changes"]))]
        return Answer({"locks": rows}, plain("\n".join(lines)))
    if to > len(kept):
        raise KernelSwapError(
            f"{len(kept)} other locks are kept", asked=f"going back to number {to}", todo="`--list` shows them."
        )
    back = kept[to - 1]
    theirs = (project / locking.THEIRS).is_file() or not (project / locking.OURS).is_file()
    files = [str(path) for path in locking.write(back.lock, project, theirs=theirs, cache=at)]
    changes = locks.diff(now, back.lock)
    were = "as they were" if len(files) > 1 else "as it was"
    lines = [*changes, f"wrote {' and '.join(files)}, {were} until {session.moment(back.at)}"]
    return Answer({"files": files, "changes": changes, "replaced": session.moment(back.at)}, plain("\n".join(lines)))
