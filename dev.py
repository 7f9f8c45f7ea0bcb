#!/usr/bin/env python3
"""Set everything up, then do one thing. Needs a Python from 3.10 on and a package index; nothing else.

    python3 dev.py demo [ARGS]   the main job: `kernelswap demo ARGS`
    python3 dev.py test [ARGS]   ruff, mypy, then `pytest ARGS`
    python3 dev.py transformers [oldest|all|MINOR...] [PYTEST ARGS]
                                 the tests that touch Transformers, on other releases: 5.10 5.15, say; all, unless named
    python3 dev.py docs          write the pages that are generated (docs/cli.md, docs/performance.md)
    python3 dev.py setup         only set up

Everything goes into .venv next to this file, pinned by requirements/constraints.txt. It is reused as it is when neither
those pins nor pyproject.toml nor the Python changed since; otherwise it is brought up to date in place.
KERNELSWAP_VENV names another directory. pip's own configuration and environment variables (indexes, proxies) are obeyed.
"""

# ruff: noqa: T201 -- a script that prints
# ruff: noqa: S603, S607 -- it runs pip, ruff, mypy and pytest; that is its purpose

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = Path(os.environ.get("KERNELSWAP_VENV") or ROOT / ".venv").resolve()
CONSTRAINTS = ROOT / "requirements" / "constraints.txt"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / ("python.exe" if os.name == "nt" else "python")
STAMP = VENV / "kernelswap.stamp"
INTERPRETER = VENV / "interpreter"
RELEASES = ROOT / "requirements" / "transformers.txt"
TOUCHING = ("tests/adapters", "tests/guide", "tests/ecosystem", "tests/compat/test_transformers.py")
TORCH = "2.13.0"
PIP = "26.3"  # knows --group (25.1) and --build-constraint (25.3)


def say(text: str) -> None:
    """To stderr: stdout belongs to the command that is run (`demo --json`)."""
    print(f"dev.py: {text}", file=sys.stderr, flush=True)


def call(*command: str | Path, **more: object) -> int:
    """The exit status. stdin is closed: nothing here asks questions."""
    return subprocess.call([str(c) for c in command], cwd=ROOT, stdin=subprocess.DEVNULL, **more)  # type: ignore[call-overload]  # **more


def must(*command: str | Path, doing: str) -> None:
    """Run, or stop with one line that says what failed."""
    if code := call(*command, stdout=sys.stderr):
        say(f"{doing} failed (exit {code}); its own words are above. Run the same command again once that is solved.")
        raise SystemExit(code)


def accelerator() -> str | None:
    """`cuda` or `rocm` where such a chip's driver is here, by its own tool or device node."""
    if shutil.which("nvidia-smi") and not subprocess.call(
        ["nvidia-smi", "-L"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ):
        return "cuda"
    return "rocm" if Path("/dev/kfd").exists() else None


def torch_requirement() -> str:
    """Without an NVIDIA chip `==`, which a `+cpu` build satisfies and outranks; with one `===`, which only the plain build does."""
    return f"torch==={TORCH}" if accelerator() == "cuda" else f"torch=={TORCH}"


def wanted() -> str:
    """What the environment must have been made from."""
    parts = [sys.version, str(VENV), torch_requirement(), PIP]
    parts += [p.read_text(encoding="utf-8") for p in (CONSTRAINTS, ROOT / "pyproject.toml")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def make_environment() -> None:
    """A venv with pip in it. Debian's Python may come without ensurepip; then any pip from 22.3 on can serve from outside."""
    try:
        venv.create(VENV, with_pip=True, clear=PYTHON.exists() and not works())
    except (subprocess.CalledProcessError, OSError) as e:
        say(f"no pip inside the new environment ({e.__class__.__name__}); trying the pip of {sys.executable}")
        venv.create(VENV, with_pip=False, clear=True)
        if call(sys.executable, "-m", "pip", "--python", PYTHON, "install", "-qq", f"pip=={PIP}", stdout=sys.stderr):
            say("there is no usable pip. On Debian and Ubuntu: install the package python3-venv, then run this again.")
            raise SystemExit(1) from None


def works() -> bool:
    """Whether the environment's Python starts and is this one's version (a moved or half-made one does not)."""
    code = f"import pip, sys; sys.exit(sys.version_info[:2] != {sys.version_info[:2]!r})"
    try:
        return not subprocess.call([str(PYTHON), "-c", code], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except OSError:
        return False


def setup() -> None:
    """Bring .venv to what is wanted; nothing when it is."""
    if sys.version_info < (3, 10) or sys.version_info[:3] == (3, 13, 0):
        say(
            f"needs Python 3.10 or later, and not 3.13.0, on which torch.compile misses a swap; this is {sys.version.split()[0]} ({sys.executable})."
        )
        raise SystemExit(2)
    stamp = wanted()
    if STAMP.exists() and STAMP.read_text().strip() == stamp and works():
        return
    start = time.monotonic()
    if not works():
        say(f"making {VENV}")
        make_environment()
    say(f"installing from {CONSTRAINTS.relative_to(ROOT)}, torch first; a few minutes the first time, seconds later")
    pip = (PYTHON, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--progress-bar", "off")
    must(*pip, f"pip=={PIP}", doing="updating pip")
    pip = (*pip, "-c", CONSTRAINTS)
    must(*pip, torch_requirement(), doing="installing torch")
    must(*pip, "--build-constraint", CONSTRAINTS, "-e", ".[all]", "--group", "dev", doing="installing kernelswap")
    STAMP.write_text(stamp + "\n")
    say(f"ready after {time.monotonic() - start:.0f} s")


def interpreter() -> None:
    """Triton, beside the environment and not in it: the tests run the GPU kernels in its interpreter, nothing else should see it."""
    pins = [line.partition(";")[0].strip() for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines()]
    pin = next(p for p in pins if p.startswith("triton=="))
    if sys.platform != "linux" or accelerator() == "cuda" or (INTERPRETER / f"{pin.replace('==', '-')}.dist-info").exists():
        return  # no wheels; torch has brought its own; here already
    shutil.rmtree(INTERPRETER, ignore_errors=True)
    say(f"installing {pin} into {INTERPRETER}")
    pip = (PYTHON, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-deps", "--target", INTERPRETER, pin)
    if call(*pip, stdout=sys.stderr):
        say(f"no {pin} for this Python; the tests that interpret GPU kernels will say that they were skipped")


def releases(python: tuple[int, ...] = sys.version_info[:2]) -> dict[str, list[str]]:
    """`{"5.10": pins}`: the other supported releases of Transformers that this Python can have, oldest first."""
    lines = [line.split("#")[0].split() for line in RELEASES.read_text(encoding="utf-8").splitlines()]
    found = {}
    for line in filter(None, lines):
        needs = [tuple(int(n) for n in one.removeprefix("python>=").split(".")) for one in line if one.startswith("python>=")]
        if all(python >= one for one in needs):
            found[line[0].removeprefix("transformers==").rpartition(".")[0]] = [one for one in line if "==" in one]
    return found


def release(minor: str) -> Path:
    """A directory that holds one release of Transformers with what it pins, to be put before the environment's own."""
    pins = releases()[minor]
    folder = VENV / f"transformers-{minor}"
    stamp = folder / "kernelswap.stamp"
    if not stamp.exists() or stamp.read_text() != " ".join(pins):
        shutil.rmtree(folder, ignore_errors=True)
        say(f"installing {pins[0]} into {folder}")
        pip = (PYTHON, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-deps", "--target", folder)
        must(*pip, *pins, doing=f"installing {pins[0]}")
        stamp.write_text(" ".join(pins))
    return folder


def transformers(args: list[str]) -> int:
    """Tests on other releases of Transformers; every one of them runs, the first failure is the exit status."""
    known = list(releases())
    named = {"oldest": known[:1], "all": known, **{a: [a] for a in args if a.count(".") == 1 and a.replace(".", "").isdigit()}}
    asked = [minor for a in args for minor in named.get(a, [])] or known
    rest = [a for a in args if a not in named]
    if unknown := [minor for minor in asked if minor not in known]:
        say(f"{', '.join(unknown)}: not in {RELEASES.relative_to(ROOT)}, which has {', '.join(known)}")
        return 2
    codes = []
    for minor in asked:
        path = os.pathsep.join([str(release(minor)), *filter(None, [os.environ.get("PYTHONPATH")])])
        say(f"Transformers {minor}")
        touching = [] if any(a.startswith("tests") for a in rest) else TOUCHING
        codes.append(pytest([*touching, *rest], PYTHONPATH=path, KERNELSWAP_TRANSFORMERS=minor))
    return next((c for c in codes if c), 0)


def pytest(args: list[str], **env: str) -> int:
    """Pytest on all cores, unless `-n` says otherwise."""
    workers = [] if any(a.startswith("-n") for a in args) else ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "loadfile"]
    # a worker per core: torch's own threads on top of that would only wait for each other
    alone = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")} if workers else {}
    return call(PYTHON, "-m", "pytest", "-q", *workers, *args, env={**os.environ, **alone, **env})


def demo(args: list[str]) -> int:
    """The main job."""
    return call(PYTHON, "-m", "kernelswap", "demo", *args)


def test(args: list[str]) -> int:
    """Linters, then tests; all of them run, the first failure is the exit status. Ends with pytest's closing line."""
    codes = [call(PYTHON, "-m", "ruff", "check", "."), call(PYTHON, "-m", "ruff", "format", "--check", "-q", ".")]
    codes.append(call(PYTHON, "-m", "mypy"))
    interpreter()
    codes.append(pytest(args))
    return next((c for c in codes if c), 0)


def docs(args: list[str]) -> int:
    """The generated pages."""
    return call(PYTHON, ROOT / "docs" / "generate.py", *args)


def main(argv: list[str]) -> int:
    """Parse by hand: before the set-up there is only the standard library."""
    verbs = {"demo": demo, "test": test, "transformers": transformers, "docs": docs, "setup": lambda _: 0}
    if not argv or argv[0] not in verbs:
        print(__doc__)
        return 0 if argv and argv[0] in {"-h", "--help", "help"} else 2
    setup()
    return verbs[argv[0]](argv[1:])


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
