"""The command line. One file in `verbs/` per verb; `app` finds them, adds what all have, and turns errors into exit codes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run `kernelswap ARGV`; the exit status of `exits.py`. Without the `[cli]` extra: one line that says so."""
    try:
        for extra in ("typer", "rich"):
            importlib.import_module(extra)
    except ModuleNotFoundError as e:
        sys.stderr.write(f"kernelswap: the command line needs {e.name}: pip install 'kernelswap[cli]'\n")
        return 3
    from .app import run

    return run(sys.argv[1:] if argv is None else list(argv))
