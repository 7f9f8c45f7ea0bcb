"""`kernelswap lock-diff`: what changed between two locks, in words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...errors import KernelSwapError
from .. import exits, session
from ..output import Answer, plain

if TYPE_CHECKING:
    from ...lock import Lock

PANEL = "Kernels"


def command(
    first: Annotated[Path, typer.Argument(help="A lock, or a directory with one.", metavar="[OLD]")] = Path(),
    second: Annotated[
        Path | None,
        typer.Argument(help="The same; without it, OLD is compared with the lock that it replaced.", metavar="[NEW]"),
    ] = None,
    cache: session.Cache = None,
) -> Answer:
    """Say in words what changed between two locks of any format: kernels, commits, builds, files.

    With one directory or none: between its lock and the one before, as kept on this machine. Exit code 1: something changed.
    """
    from ... import lock as locks
    from ... import locking

    if second is not None:
        old, new, names = read(first), read(second), [str(first), str(second)]
    else:
        new = read(first)
        folder = first if first.is_dir() else first.parent
        kept = locking.before(folder, session.cache_of(cache), new)
        if not kept:
            raise KernelSwapError(f"no other lock of {folder.resolve()} is kept on this machine", todo="Name two locks.")
        old, names = kept[0].lock, [session.moment(kept[0].at), str(first)]
    changes = locks.diff(old, new)
    data = {"old": names[0], "new": names[1], "changes": changes}
    return Answer(data, plain("\n".join(changes or ["nothing changed"])), exits.NO if changes else exits.OK)


def read(path: Path) -> Lock:
    """The lock in a file, or in a directory.

    Raises:
        KernelSwapError: there is none.
        BadMetadata: it does not parse.
    """
    from ... import lock as locks
    from ... import locking

    found = None
    if path.is_dir():
        found = locking.former(path)
    elif path.is_file():
        found = locks.parse(path.read_bytes(), what=str(path))
    if found is None:
        what = f"no {locking.OURS} or {locking.THEIRS} in" if path.is_dir() else "no file"
        raise KernelSwapError(f"there is {what} {path}", todo="`kernelswap lock` writes locks.")
    return found
