"""Feed every parser what nobody would write: each input is read or refused by a declared error, and quickly.

    python benchmarks/fuzz.py [--inputs 1000000] [--seconds 150] [--seed 1] [--only NAME] [--keep DIR] [--json FILE]

Inputs are good texts, mutated: pieces cut, doubled, spliced with others, bytes flipped, tokens of the formats put anywhere.
The same seed makes the same inputs, in chunks of a thousand. What raises anything else, takes over a second, or does not read
back, is printed and kept; exit code 1. With `--json`, a run goes on where the last one that wrote the file was stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import random
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from kernelswap import lock, metadata, policy, spec, strict, table, variant
from kernelswap.buildfile import parse as parse_build
from kernelswap.errors import KernelSwapError
from kernelswap.sources import bundle_file, configured, folder_files
from kernelswap.sources.hub import moved_to
from kernelswap.sources.hub_client import HubClient

SLOW = 1.0
"""Seconds that one input may take."""
CHUNK = 1000
COMMIT, DIGEST = "0123456789abcdef0123456789abcdef01234567", "ab" * 32
METADATA = {
    "name": "my-norm", "id": "_my_norm_cpu_0a1b2c3", "version": 1, "license": "MIT", "upstream": "https://example.org/x",
    "source": "https://example.org/y", "python-depends": ["einops"], "kernel-depends": [{"repo-id": "org/dep", "version": 1}],
    "kernels-minver": "0.12.0", "backend": {"type": "cuda", "archs": ["8.0", "9.0a", "sm_120+PTX"]},
    "digest": {"algorithm": "sha256", "files": {"__init__.py": "47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="}},
    "provenance": {"kernel-builder": {"version": "0.1.0", "sha": COMMIT, "dirty": False}, "kernel": {"sha": COMMIT, "dirty": True}},
}  # fmt: skip  # a sample
LOCKS = (
    [{"dependency": {"repo-id": "org/k", "version": 1}, "lock": {"commit": COMMIT}}],
    [{"repo_id": "org/k", "sha": COMMIT, "variants": {"torch-cpu": {"hash": f"sha256-{DIGEST}", "hash_type": "git_lfs_concat"}}}],
    {
        "format_version": 1,
        "entries": [
            {
                "source": "hub",
                "name": "org/k",
                "version": 1,
                "commit": COMMIT,
                "builds": {"torch-cpu": {"tree": DIGEST, "files": {"__init__.py": DIGEST}}},
            }
        ],
    },
)
SPECS = (
    "org/repo@1:RMSNorm",
    "hub://org/repo@>=1.0,<2:SiLU",
    "dir:///a/b c/@x:Layer",
    "kernelswap/layers:RMSNorm",
    f"org/k@{COMMIT}",
    "paged|org/k@refs/pr/1:f",
    "dir://C:\\x\\y:Z",
    "./here",
    "bundled://layers@2",
)
VARIANTS = (
    "torch29-cxx11-cu128-x86_64-linux",
    "torch-cpu",
    "torch210-cxx98-rocm71-aarch64-linux",
    "torch-universal",
    "torch212-metal-aarch64-darwin",
    "torch29-cu128-x86_64-windows",
    "tvm-ffi01-cu128-x86_64-linux",
    "torch29-cxx11-xpu20253-x86_64-linux",
    "torch-ext",
)
TABLES = (
    '[[swap]]\nlayer = "RMSNorm"\nkind = "function"\ntargets = ["*Norm"]\nneeds = ["weight", "a|b", ["c"]]\nprobe = "rows"\nuse = ["org/n@1:N", {spec = "org/n@2:N", on = ["cuda:sm90+"], modes = ["inference"]}]\noff = true\nnote = "x"\n',
)
POLICIES = (
    f'[policy]\nsources = ["hub", "dir"]\npublishers = ["trusted", "org/k"]\ndigests = ["sha256:{DIGEST}"]\nrequire_digest = true\nrequire_signature = false\nsigners = ["kernels-community", {{issuer = "https://i", repository = "https://r", workflows = ["https://w"]}}]\nno_native_code = true\nlocked_only = true\n',
    "[tool.kernelswap.policy]\nlocked_only = true\n",
)
BUILDS = (
    '[general]\nname = "my-norm"\nversion = 1\nedition = 5\nlicense = "MIT"\nbackends = ["cpu"]\n\n[torch]\nsrc = ["torch-ext/a.cpp"]\n\n[kernel.x]\nbackend = "cpu"\ndepends = ["torch"]\nsrc = ["a.cpp"]\n',
)
REFS = {
    "branches": [{"name": "v1", "ref": "refs/heads/v1", "targetCommit": COMMIT}],
    "tags": [{"name": "v1.0", "targetCommit": COMMIT}],
}
TREE = [
    {"type": "directory", "path": "build", "oid": COMMIT, "size": 0},
    {"type": "file", "path": "build/torch-cpu/__init__.py", "oid": COMMIT, "size": 12},
    {"type": "file", "path": "build/torch-cpu/a.so", "oid": COMMIT, "size": 1 << 24, "lfs": {"oid": DIGEST, "size": 1 << 24}},
]
STATUSES = (
    f'kind = "redirect"\ndestination = "org/new"\nrevision = "{COMMIT}"\n',
    'kind = "redirect"\ndestination = "org/new"\n',
)
NAMES = {"format": 1, "branches": {"v1": COMMIT}, "tags": {"v1.0": COMMIT}, "asked": {">=1,<2": COMMIT}, "moved": "org/new"}
FILES = {"format": 1, "files": {"build/torch-cpu/__init__.py": [12, DIGEST], "build/torch-cpu/a/b.so": [1 << 24, DIGEST]}}
BUNDLE = {
    "format": 1, "version": "0.1", "model": "org/model", "machines": ["linux x86_64 torch 2.13 cpu"], "publishers": {"org": True},
    "compiled": {"layers": DIGEST}, "verdicts": {"format": 1, "verdicts": []},
    "kernels": [{"spec": "org/k@1", "name": "org/k", "commit": COMMIT, "variant": "torch-cpu", "digest": DIGEST, "evidence": [["digest", "fine"]]}],
}  # fmt: skip  # a sample
ORDERS = ('[sources]\norder = ["https://mirror.example/k", "hub", "s3://bucket/k"]\nseconds = 30\n',)
TOKENS = (
    "{", "}", "[", "]", '"', "'", ":", ",", "\\", "/", "//", "://", "@", "|", "..", "../", "\n", "\r\n", "\t", " ", "\0", "null", "true", "NaN", "-1",
    "1e999", "9" * 400, "0", "\u202e", "\ud800", "\U0001f600", "\u0130", "\\u0000", "\\ud800", '"a":1,"a":2', "[" * 40, "{'a':" * 9, "__init__", "__globals__",
    "C:", "CON", "~", "$(x)", "`x`", ";", "#", "=", "==", ">=", "[[", "]]", '"""', "1979-05-27", "inf", "0x1F", "a" * 300, "e\u0301", "é", "%2e%2e", "file://",
)  # fmt: skip  # one glance is enough for a list of tokens


@dataclass(frozen=True)
class Target:
    """One parser: what it is fed, how it is called, and what a good answer must satisfy."""

    name: str
    seeds: tuple[str, ...]
    call: Callable[[str], object]
    holds: Callable[[str, object], bool] = lambda _text, _value: True


def raw(text: str) -> bytes:
    """As it would come from a file; lone surrogates are bytes that are not UTF-8."""
    return text.encode("utf-8", "surrogatepass")


def as_json(*values: object) -> tuple[str, ...]:
    return tuple(json.dumps(v, indent=indent) for v in values for indent in (None, 1))


class Answers(HubClient):
    """The hub's client, with the wire replaced by a text."""

    text = ""

    def _get(self, url: str, asked: str) -> tuple[bytes, None]:  # noqa: ARG002  # the client's own signature
        return raw(self.text), None


HUB = Answers("http://hub.invalid")


def answered(text: str, ask: Callable[[], object]) -> object:
    Answers.text = text
    return ask()


TARGETS = (
    Target("spec", SPECS, spec.parse, lambda _, value: spec.parse(str(replace(value, text=None))) == value),
    Target("variant", VARIANTS, variant.parse),
    Target("strict", as_json(METADATA), lambda t: strict.loads(raw(t), what="it", max_bytes=1 << 20)),
    Target("metadata", as_json(METADATA), lambda t: metadata.parse(raw(t), package="org/my-norm", path_hint="c/v")),
    Target(
        "lock", as_json(*LOCKS), lambda t: lock.parse(raw(t)), lambda _, value: lock.parse(value.dumps()).dumps() == value.dumps()
    ),
    Target("table", TABLES, lambda t: table.parse(t, where="t.toml")),
    Target("policy", POLICIES, lambda t: policy.combine(policy.parse(t, where="kernelswap.toml"))),
    Target("policy in pyproject", POLICIES, lambda t: policy.combine(policy.parse(t, where="pyproject.toml"))),
    Target("build.toml", BUILDS, parse_build),
    Target("hub refs", as_json(REFS), lambda t: answered(t, lambda: HUB.refs("o/n", tries=1))),
    Target("hub listing", as_json(TREE), lambda t: answered(t, lambda: HUB.listing("o/n", COMMIT, tries=1))),
    Target("hub revision", as_json({"sha": COMMIT}), lambda t: answered(t, lambda: HUB.commit_of("o/n", "x", tries=1))),
    Target("hub publisher", as_json({"trustedKernelPublisher": True}), lambda t: answered(t, lambda: HUB.trusts("o", tries=1))),
    Target("folder names", as_json(NAMES), lambda t: folder_files.parse_names(raw(t))),
    Target("folder listing", as_json(FILES), lambda t: folder_files.parse_files(raw(t))),
    Target("bundle", as_json(BUNDLE), lambda t: bundle_file.parse(raw(t))),
    Target("sources", ORDERS, lambda t: configured.parse(t, where="kernelswap.toml")),
    Target("hub redirect", STATUSES, lambda t: moved_to(raw(t), where="it")),
)


VALUES = (
    None,
    True,
    False,
    0,
    -1,
    10**30,
    1.5,
    "",
    "x",
    "../x",
    "a" * 300,
    [],
    {},
    [[]],
    {"": ""},
    "org/k",
    COMMIT,
    DIGEST,
    ["a", "a"],
)


def replaced(value: object, rng: random.Random) -> object:
    """`value` with one thing in it, anywhere, other, gone, or under another name."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        kind = rng.randrange(8)
        rest = {k: v for k, v in value.items() if k != key}
        if kind < 3:
            return (rest, {**rest, rng.choice(TOKENS): value[key]}, {**value, rng.choice(TOKENS): rng.choice(VALUES)})[kind]
        return {**value, key: replaced(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        return [*value[:at], *([replaced(value[at], rng)] * rng.choice((1, 1, 1, 2, 0))), *value[at + 1 :]]
    if isinstance(value, str) and rng.random() < 0.6:
        at = rng.randrange(len(value) + 1)
        return value[:at] + rng.choice(TOKENS) + value[at + rng.randrange(3) :]
    return rng.choice(VALUES)


def mutated(text: str, others: tuple[str, ...], rng: random.Random) -> str:
    """A few changes; of JSON half the time to a value in it, so that it stays JSON."""
    if text[-1:] in {"}", "]"} and rng.random() < 0.5:
        return json.dumps(replaced(json.loads(text), rng))
    for _ in range(1 + int(rng.expovariate(0.7))):
        a = rng.randrange(len(text) + 1)
        b = min(len(text), a + int(rng.expovariate(0.15)))
        kind = rng.randrange(7)
        if kind == 0:
            text = text[:a] + text[b:]
        elif kind == 1:
            text = text[:a] + rng.choice(TOKENS) + text[a:]
        elif kind == 2:
            text = text[:a] + rng.choice(TOKENS) + text[b:]
        elif kind == 3:
            text = text[:b] + text[a:b] * rng.randint(1, 3) + text[b:]
        elif kind == 4:
            other = rng.choice(others)
            cut = rng.randrange(len(other) + 1)
            text = text[:a] + other[cut:]
        elif kind == 5 and text:
            at = min(a, len(text) - 1)
            text = text[:at] + chr(ord(text[at]) ^ (1 << rng.randrange(8))) + text[at + 1 :]
        else:
            text = text[:a] + chr(rng.choice((rng.randrange(128), rng.randrange(0x3000), rng.randrange(0x110000)))) + text[a:]
    return text


def tried(target: Target, text: str, count: dict[str, float]) -> str | None:
    """What went wrong with one input, or None."""
    wrong = None
    began = time.perf_counter()
    try:
        value = target.call(text)
        count["read"] += 1
        if not target.holds(text, value):
            wrong = f"does not read back: {value!r}"
    except KernelSwapError as e:
        count["refused"] += 1
        wrong = None if e.reason else "refused without a reason"
    except Exception:  # noqa: BLE001  # any other is what this looks for
        wrong = traceback.format_exc()
    took = time.perf_counter() - began
    count["inputs"] += 1
    count["slowest_s"] = max(count["slowest_s"], round(took, 4))
    return wrong if wrong is not None or took <= SLOW else f"took {took:.1f} s"


def keep(target: Target, text: str, wrong: str, directory: Path | None) -> None:
    """Say what went wrong, and keep the input."""
    print(f"{target.name}: {text[:500]!a}\n{wrong}", file=sys.stderr)
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{target.name.replace(' ', '-')}-{hashlib.sha256(raw(text)).hexdigest()[:12]}").write_bytes(raw(text))


def chunk(target: Target, seed: int, number: int, count: dict[str, float], directory: Path | None) -> int:
    """The inputs of one chunk; how many were not survived."""
    rng, problems = random.Random(f"{seed}/{target.name}/{number}"), 0
    for _ in range(CHUNK):
        text = mutated(rng.choice(target.seeds), target.seeds, rng)
        wrong = tried(target, text, count)
        if wrong is not None:
            problems += 1
            keep(target, text, wrong, directory)
    return problems


def begun(file: Path | None, seed: int) -> dict[str, dict[str, float]]:
    """The counts so far."""
    counts = {t.name: {"inputs": 0, "read": 0, "refused": 0, "not_survived": 0, "slowest_s": 0.0} for t in TARGETS}
    if file is not None and file.exists():
        former = json.loads(file.read_text())
        if former["seed"] == seed:
            counts |= {name: count for name, count in former["targets"].items() if name in counts}
    return counts


def write(file: Path, seed: int, counts: dict[str, dict[str, float]]) -> None:
    total = {key: sum(int(c[key]) for c in counts.values()) for key in ("inputs", "not_survived")}
    temporary = file.with_suffix(".tmp")
    about = {"python": platform.python_version(), "seed": seed, **total, "targets": counts}
    temporary.write_text(json.dumps(about, indent=1) + "\n")
    temporary.replace(file)


def main() -> int:
    """Chunk after chunk, the target with the fewest inputs first, until each has enough or the time is up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=1_000_000, help="for each parser")
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="one parser, by name")
    parser.add_argument("--keep", type=Path, help="where inputs that were not survived are kept")
    parser.add_argument("--json", type=Path, help="write the counts here, and go on from those that are there")
    args = parser.parse_args()
    counts = begun(args.json, args.seed)
    targets = [t for t in TARGETS if args.only in {None, t.name}]
    problems, end = 0, time.monotonic() + args.seconds
    while time.monotonic() < end and problems < 50:
        target = min(targets, key=lambda t: counts[t.name]["inputs"])
        count = counts[target.name]
        if count["inputs"] >= args.inputs:
            break
        failed = chunk(target, args.seed, int(count["inputs"]) // CHUNK, count, args.keep)
        count["not_survived"] += failed
        problems += failed
        if args.json:
            write(args.json, args.seed, counts)
    for name, c in counts.items():
        print(f"{name:<20} {c['inputs']:>9} inputs {c['read']:>8} read {c['refused']:>8} refused  slowest {c['slowest_s']:.3f} s")
    lost = sum(int(c["not_survived"]) for c in counts.values())
    print(f"{sum(int(c['inputs']) for c in counts.values())} inputs, {lost} not survived (seed {args.seed})")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
