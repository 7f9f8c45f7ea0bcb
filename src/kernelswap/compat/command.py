"""`python -m kernels VERB`: the verbs of `kernelswap`, under the name that scripts call."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

MOVED = {"check": "`kernels check` has moved to `kernel-builder check-abi`."}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given and given[0] in MOVED:
        sys.stderr.write(MOVED[given[0]] + "\n")
        return 1
    app: Any = importlib.import_module("kernelswap.cli.app")  # the command line is above this row; it is asked for by name
    return int(app.run(given))


def download_kernels(args: Any) -> None:
    """As `kernels download`: `args.project_dir` with its `kernels.lock`, `args.all_variants`.

    Raises:
        SystemExit: it failed.
    """
    argv = ["download", str(args.project_dir), *(["--all-variants"] if getattr(args, "all_variants", False) else [])]
    code = main(argv)
    if code:
        raise SystemExit(code)
