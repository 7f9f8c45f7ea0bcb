"""Exit codes: one table, printed by `kernelswap --help`, in docs/cli.md, and used by every verb."""

from __future__ import annotations

from ..errors import KernelSwapError

OK, NO, USAGE, MACHINE, NETWORK, PUBLISHER, KERNEL, BUG, INTERRUPTED = 0, 1, 2, 3, 4, 5, 6, 70, 130

TABLE = (
    (OK, "done; the answer is yes"),
    (NO, "done; the answer is no: nothing was swapped, no build fits, a file changed"),
    (USAGE, "the command, a spec, a table or a config is wrong, or names something that does not exist"),
    (MACHINE, "this machine lacks something: a package, a compiler, space, a fitting build"),
    (NETWORK, "the source could not be asked, or offline and never fetched"),
    (PUBLISHER, "refused: verification failed, policy forbids it, or metadata does not parse"),
    (KERNEL, "the kernel's own code raised"),
    (BUG, "an error that kernelswap did not expect; `--debug` shows where"),
    (INTERRUPTED, "interrupted"),
)

_BY_FAULT = {"caller": USAGE, "machine": MACHINE, "network": NETWORK, "publisher": PUBLISHER, "kernel": KERNEL}


def of(error: KernelSwapError) -> int:
    """The code for an error: by whose fault it is."""
    return _BY_FAULT[error.fault]


def lines() -> list[str]:
    """The table as text, one line each."""
    return [f"{code:>3}  {meaning}" for code, meaning in TABLE]
