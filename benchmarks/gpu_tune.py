"""Find better configurations of the bundled Triton kernels on this device, by measuring them, and keep them for every later start.

    python benchmarks/gpu_tune.py [OUT.json] [--only K1,K4] [--quick] [--seconds 300] [--shape K1=8192x5120] [--model MODEL] [--again]

Each kernel names its space of configurations. Of each bucket of calls that a shape falls into: the default is timed against every
configuration of a list, then against those that differ in one value from the best, and so on until none is better or its share of the
time is up. A configuration is compared with float64 first, also on other sizes of its bucket with NaN beside the inputs; what is wrong
is not timed. The best one is then timed against the default once more, in turns, and kept if it wins by more than the noise. Who is
stopped goes on: what was looked at to the end is not looked at again. `--quick`: the shapes of targets that are hard to reach.
Kept in the directory of the cache (`tuning/`), and with what was tried in OUT.json.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_kernel_files import Kernels
from gpu_rows import _copy, _double, _run
from gpu_timing import CUDA, captured, empty_cache, first_line, free_bytes, relative, turns, write
from gpu_tune_cases import MAKERS, Case, cases
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

FEW, MANY = (9, 41) if CUDA else (1, 3)
"""Turns of a first look, and of the last word."""
CLEARLY = 0.002
"""Less than this is never a win, however quiet the machine."""
LESS_ACCURATE = 1.25
"""How much larger an error than the default's may be: other orders of a sum, not other arithmetic."""


BROKEN = 4
"""The exit code when a configuration took the device down: everything after it in this process would fail."""


class Lost(Exception):
    """The device does not answer any more, since a configuration was tried; `.change` is that one's."""

    def __init__(self, change: dict[str, Any], why: str) -> None:
        super().__init__(why)
        self.change = change


def lost() -> bool:
    """Whether the device is gone for this process, as after a read outside all memory."""
    try:
        if CUDA:
            torch.cuda.synchronize()
    except Exception:  # noqa: BLE001  # of whatever kind it is, nothing works any more
        return True
    return False


class Bucket:
    """The configurations of one kernel for one bucket of calls, tried in turns with the default."""

    def __init__(self, case: Case, kernels: Kernels, name: str, bucket: str) -> None:
        self.case, self.name, self.bucket = case, name, bucket
        self.tuning = kernels.of(case.repository).tuning
        self.space = self.tuning.SPACES[name]
        self.inputs = case.inputs()
        self.kinds: set[torch.dtype] = set()
        self.changes: list[dict[str, Any]] = []
        self.wrong: list[dict[str, Any]] = []
        self.left_out: list[dict[str, Any]] = []
        self.tried: list[dict[str, Any]] = []
        plain = self.trial({})
        self.exact = [(args, dy, self._exact(args, dy)) for args, dy in (self.inputs[0], *case.others())]
        self.errors = [self._errors(plain, *one) for one in self.exact]
        self.default = dict(plain.defaults[bucket])
        if bad := [e for errors in self.errors for e in errors if not e < case.tolerance]:
            raise ValueError(f"the default itself is wrong: relative error {max(bad):.1e}")

    def trial(self, change: dict[str, Any]) -> Any:
        return self.tuning.Trial(self.name, change, self.bucket)

    # -- correctness --

    def _exact(self, args: Any, dy: Any) -> list[Tensor]:
        if self.case.exact is not None:
            return self.case.exact(*args)
        doubled = tuple(_double(t) for t in args), None if dy is None else tuple(_double(t) for t in dy)
        return [t.to(torch.float32) for t in _run(self.case.reference, *doubled, self.case.wanted)]

    def _errors(self, trial: Any, args: Any, dy: Any, exact: Sequence[Tensor]) -> list[float]:
        copied = tuple(_copy(t) for t in args)
        # the memory that results will lie in holds NaN, not the right answer of the configuration before
        poison = [torch.full(t.shape, float("nan"), dtype=kind, device=t.device) for kind in self.kinds for t in exact]
        del poison
        with trial:
            got = _run(self.case.call, copied, dy, self.case.wanted)
        if not all(torch.equal(a.detach(), b) for a, b in zip(copied, args, strict=True) if torch.is_tensor(a)):
            return [float("inf")]  # it wrote to an input
        self.kinds = {t.dtype for t in got}
        return [relative(a, b) for a, b in zip(got, exact, strict=True)]

    def mistaken(self, trial: Any) -> float | None:
        """The error of a configuration that is wrong, on the inputs or beside them; None: it is right."""
        for one, of_default in zip(self.exact, self.errors, strict=True):
            for error, usual in zip(self._errors(trial, *one), of_default, strict=True):
                if not (error < self.case.tolerance and error <= LESS_ACCURATE * usual + 1e-7):
                    return error
        return None

    # -- time --

    def runner(self, change: dict[str, Any]) -> Callable[[], object]:
        """All buffers one after the other, in a CUDA graph where that can be."""
        trial = self.trial(change)

        def once(args: Any, dy: Any) -> None:
            if dy is None:
                with torch.no_grad():
                    self.case.call(*args)
                return
            leaves = [t.detach().requires_grad_() if i in self.case.wanted else t for i, t in enumerate(args)]
            out = self.case.call(*leaves)
            outs = list(out) if isinstance(out, tuple) else [out]
            torch.autograd.grad(outs, [leaves[i] for i in self.case.wanted], list(dy))

        calls = [lambda one=one: once(*one) for one in self.inputs for _ in range(self.case.repeat)]

        def every() -> None:
            with trial:
                for call in calls:
                    call()

        if not CUDA or self.case.queued:
            every()
            return every
        with trial:
            return captured(calls).replay

    def race(self, runs: dict[str, Callable[[], object]], replays: int) -> tuple[dict[str, float], float, float]:
        """Medians, how many times as fast as the first the second is, and how uncertain that is (2 standard errors)."""
        count = len(self.inputs) * self.case.repeat
        took = turns(runs, dict.fromkeys(runs, count), replays)
        first, second = took.values()
        ratios = sorted(a / b for a, b in zip(first, second, strict=True))
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios * 3)
        noise = 2 * 1.2533 * (high - low) / 1.349 / len(ratios) ** 0.5
        return {name: statistics.median(t) for name, t in took.items()}, statistics.median(ratios), max(noise, CLEARLY)

    def attempt(self, change: dict[str, Any], default: Callable[[], object]) -> float:
        """Times as fast as the default at a first look; 0 where it cannot run or is wrong."""
        try:
            error = self.mistaken(self.trial(change))
            if error is not None:
                self.wrong.append({**change, "error": error})
                return 0.0
            took, ratio, _ = self.race({"default": default, "this": self.runner(change)}, FEW)
        except Exception as e:  # too much for this GPU, or for the compiler: it takes no part
            if lost():
                raise Lost(change, first_line(e)) from e
            self.left_out.append({**change, "why": first_line(e)})
            return 0.0
        self.tried.append({**change, "us": round(took["this"], 3), "times": round(ratio, 4)})
        return ratio

    def search(self, until: float, former: dict[str, Any]) -> dict[str, Any]:
        """The record of this bucket. It goes on from `former`, and tries one configuration at least."""
        default, complete = self.runner({}), True
        best, best_ratio = former.get("best") or dict[str, Any](), former.get("times", 1.0)
        changes = self.changes = list(former.get("seen", ()))
        seen = [self.space.reduced({**self.default, **change}) for change in ({}, *changes)]
        todo = [dict(c) for c in self.space.also if set(c) <= set(self.default)]
        while todo:
            change = todo.pop(0)
            config = self.space.reduced({**self.default, **change})
            if config not in seen:
                if time.monotonic() > until and len(changes) > len(former.get("seen", ())):
                    complete = False
                    break
                seen.append(config)
                changes.append(change)
                ratio = self.attempt(change, default)
                if ratio > best_ratio:
                    best, best_ratio = change, ratio
            if not todo:
                here = self.space.reduced({**self.default, **best})
                near = [c for c in self.space.neighbours({**self.default, **best}) if self.space.reduced(c) not in seen]
                todo = [{k: v for k, v in c.items() if v != self.default[k]} for c in near if self.space.reduced(c) != here]
        record: dict[str, Any] = {"config": None, "default": self.default, "shape": self.case.shape, "complete": complete}
        if best:
            took, ratio, noise = self.race({"default": default, "best": self.runner(best)}, MANY)
            record |= {"best": best, "us": took["best"], "default_us": took["default"], "times": ratio, "noise": noise}
            if ratio > 1 + noise:
                record["config"] = best
        elif self.tried:
            record["default_us"] = min(t["us"] * t["times"] for t in self.tried)
        return {
            **{k: round(v, 4) if isinstance(v, float) else v for k, v in record.items()},
            "tried": len(changes),
            "wrong": len(self.wrong) + former.get("wrong", 0),
            "left_out": len(self.left_out) + former.get("left_out", 0),
            "seen": changes,
            **({"broke": former["broke"]} if former.get("broke") else {}),
            "when": dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%d"),
        }


class Run:
    """One run of the tuner: its rows, and where choices are kept."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        self.kernels = Kernels(asked.cache)
        self.tunings, self.place = self.kernels.tunings, self.kernels.place
        self.rows: list[dict[str, Any]] = []
        if asked.add and asked.out is not None and asked.out.is_file():
            self.rows = json.loads(asked.out.read_text()).get("tuned", [])
        self.files: set[str] = set()
        self.failed = 0
        self.looked: set[tuple[str, str]] = set()
        self.end = time.monotonic() + asked.seconds

    def case(self, case: Case, until: float, *, new: bool) -> None:
        """Look at the buckets that a case falls into: at those never looked at, or at those not looked at to the end."""
        if case.bytes_needed > free_bytes():
            if new:
                print(f"{case.row:4} {case.shape:24} left out: needs {case.bytes_needed / 2**30:.0f} GiB", flush=True)
            return
        digest = self.kernels.digest(case.repository)
        with self.kernels.of(case.repository).tuning.Trial(case.kernel, {}) as seen:
            args, dy = case.inputs()[0]
            _run(case.call, tuple(_copy(t) for t in args), dy, case.wanted)
        del args, dy
        if not seen.defaults and new:
            print(f"{case.row:4} {case.shape:24} left out: PyTorch serves it here", flush=True)
        for bucket in seen.defaults:
            done = (case.kernel, bucket) in self.looked
            known = self.tunings.read(digest, self.place).get(case.kernel, {}).get(bucket)
            known = None if self.asked.again and not done else known
            if known is not None and (new or known.get("complete")):
                if new and not done:
                    self.say(case, bucket, known, "known")
                continue
            if time.monotonic() > self.end:
                return
            self.looked.add((case.kernel, bucket))
            empty_cache()
            try:
                found = Bucket(case, self.kernels, case.kernel, bucket)
            except Exception as e:  # noqa: BLE001  # said, and the others go on
                self.failed += 1
                print(f"{case.row:4} {case.shape:24} FAILED: {first_line(e)}", flush=True)
                continue
            try:
                record = found.search(min(until, self.end), known or {})
            except Lost as e:  # a later run does not try that one again
                record = {**(known or {"config": None, "default": found.default, "shape": case.shape}), "complete": False}
                record |= {"seen": found.changes, "tried": len(found.changes), "broke": [*record.get("broke", ()), e.change]}
                self.tunings.put(digest, self.place, case.kernel, bucket, record, kernel=case.repository)
                raise
            self.tunings.put(digest, self.place, case.kernel, bucket, record, kernel=case.repository)
            self.files.add(str(self.tunings.file(digest, self.place)))
            self.say(case, bucket, record, "", tried=found.tried, wrong=found.wrong, left_out=found.left_out)
            del found
            empty_cache()

    def say(self, case: Case, bucket: str, record: dict[str, Any], note: str, **more: Any) -> None:
        same = [r for r in self.rows if (r["kernel"], r["bucket"]) == (case.kernel, bucket)]
        self.rows = [r for r in self.rows if r not in same]
        told = more or (same[0].get("trials", {}) if same else {})
        self.rows.append(
            {"row": case.row, "kernel": case.kernel, "bucket": bucket, **record, **({"trials": told} if told else {})}
        )
        self.save()
        if record["config"]:
            text = " ".join(f"{k}={v}" for k, v in record["config"].items())
            result = f"{record['default_us']:.2f} -> {record['us']:.2f} us, {record['times']:.3f}x: {text}"
        elif "times" in record:
            result = f"the default stays: the best was {record['times']:.3f}x, noise {record['noise']:.3f}"
        else:
            result = "the default stays: nothing was faster"
        open_ = "" if record["complete"] else ", not all tried"
        print(f"{case.row:4} {case.kernel} {case.shape}: {result} ({note or record['tried']}{open_})", flush=True)

    def save(self) -> None:
        if self.asked.out is not None:
            kept = [{"repository": r, "digest": self.kernels.digest(r), **self.place} for r in self.kernels.loaded()]
            write([], self.asked.out, kept=kept, tuned=self.rows)

    def run(self) -> int:
        todo = [c for c in cases(self.kernels, self.asked) if c.row in self.asked.only or not self.asked.only]
        for new in (True, False):
            for number, case in enumerate(todo):
                left = self.end - time.monotonic()
                if left <= 0:
                    if new:
                        print(f"{len(todo) - number} shapes not looked at: the time is up. The same command goes on.")
                    break
                self.case(case, time.monotonic() + case.weight * left / sum(c.weight for c in todo[number:]), new=new)
        self.save()
        for file in sorted(self.files):
            print(f"kept in {file}")
        return 3 if self.failed else 0


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, help="where the rows go")
    parser.add_argument("--only", default="", help=f"of {','.join(MAKERS)}")
    parser.add_argument("--quick", action="store_true", help="the shapes of targets that are hard to reach")
    parser.add_argument("--seconds", type=float, default=300.0, help="in all; compiling is most of it")
    parser.add_argument("--shape", action="append", default=[], help="K1=ROWSxN and so on, instead of ours")
    parser.add_argument("--model", help="the shapes of a model: an id or a directory")
    parser.add_argument("--add", action="store_true", help="keep what OUT.json has of other buckets")
    parser.add_argument("--again", action="store_true", help="look again at what is known")
    parser.add_argument("--cache", type=Path, help="the directory of the cache; by default kernelswap's own")
    given = parser.parse_args(argv)
    given.only = set(filter(None, given.only.upper().split(",")))
    if unknown := given.only - set(MAKERS):
        parser.error(f"--only {','.join(sorted(unknown))}: the kernels are {', '.join(MAKERS)}")
    if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("tuning needs an NVIDIA GPU; PyTorch sees none here")
    return given


def main() -> int:
    torch.manual_seed(0)
    run = Run(arguments())
    try:
        return run.run()
    except Lost as e:
        print(f"{e.change} took the device down ({e}). The same command goes on without it.", flush=True)
        return BROKEN


if __name__ == "__main__":
    raise SystemExit(main())
