"""The parsers of `fuzz.py` under atheris, which looks for inputs that reach new code. Needs `pip install atheris`.

    python benchmarks/fuzz_atheris.py metadata [CORPUS_DIR] [-max_total_time=600] [any other option of libFuzzer]

The first argument is a target of `fuzz.py`; its good texts are the first corpus. An input that is not survived ends the run and
is written to `crash-*`: put it into tests/cases/fuzz as TARGET-WHAT.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["kernelswap"]):
    import fuzz


def main() -> None:
    targets = {t.name.replace(" ", "-"): t for t in fuzz.TARGETS}
    if len(sys.argv) < 2 or sys.argv[1] not in targets:
        sys.exit(f"name a target: {', '.join(targets)}")
    target = targets[sys.argv[1]]
    count: dict[str, float] = {"inputs": 0, "read": 0, "refused": 0, "slowest_s": 0.0}

    def one(data: bytes) -> None:
        wrong = fuzz.tried(target, data.decode("utf-8", "surrogateescape"), count)
        if wrong is not None:
            raise AssertionError(wrong)

    with tempfile.TemporaryDirectory() as seeds:
        for number, text in enumerate(target.seeds):
            (Path(seeds) / str(number)).write_bytes(fuzz.raw(text))
        own = [a for a in sys.argv[2:] if not a.startswith("-")] or [tempfile.mkdtemp()]
        options = [a for a in sys.argv[2:] if a.startswith("-")]
        atheris.Setup([sys.argv[0], *own, seeds, *options], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
