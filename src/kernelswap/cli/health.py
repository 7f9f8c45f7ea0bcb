"""What `doctor` looks at: versions, driver, compiler, caches, the hub, and every kernel of the default table."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as Late
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import KernelSwapError
from ..tuning import Tunings, place, won
from ..types import Machine, Resolution, Row

PACKAGES = (
    *("kernelswap", "torch", "triton", "transformers", "huggingface_hub", "safetensors", "accelerate", "peft"),
    *("kernels", "apache-tvm-ffi", "typer", "rich", "sigstore"),
)
VARIABLES = (
    *("KERNELSWAP_CACHE", "HF_HOME", "HF_HUB_CACHE", "KERNELS_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"),
    *("LOCAL_KERNELS", "USE_HUB_KERNELS", "DISABLE_KERNEL_MAPPING", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "CXX"),
    *("CUDA_HOME", "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "OMP_NUM_THREADS"),
)
COMMIT = 40  # hex digits


@dataclass(frozen=True)
class Line:
    """One finding. `ok` is None where it is neither good nor bad."""

    name: str
    value: str
    ok: bool | None = None


def versions() -> list[Line]:
    """What is installed, of what matters here."""
    return [Line(name, _version(name)) for name in PACKAGES]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def driver(machine: Machine) -> Line:
    """The accelerator's driver, by its own tool; never longer than five seconds."""
    commands: Mapping[str, Sequence[str]] = {
        "cuda": ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "rocm": ("rocm-smi", "--showdriverversion", "--csv"),
        "xpu": ("xpu-smi", "--version"),
        "cann": ("npu-smi", "info", "-m"),
    }
    command = commands.get(machine.backend)
    if command is None:
        seen = shutil.which("nvidia-smi") or shutil.which("rocm-smi")
        if seen and machine.backend == "cpu":
            return Line("driver", f"{Path(seen).name} is here, but this torch is built for the CPU", ok=False)
        return Line("driver", f"none needed for {machine.backend}", ok=True)
    if shutil.which(command[0]) is None:
        return Line("driver", f"{command[0]} is not on the path, so its version is not known")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)  # noqa: S603  # fixed words
    except (OSError, subprocess.TimeoutExpired) as e:
        return Line("driver", f"{command[0]} did not answer: {e}", ok=False)
    words = (done.stdout or done.stderr).strip().splitlines()
    return Line("driver", words[-1] if words else f"{command[0]} said nothing", ok=done.returncode == 0)


def compiler(path: str | None) -> Line:
    """The C++ compiler that sources are compiled with."""
    if path is None:
        return Line("compiler", "no c++, g++ or clang++ on the path; kernels with sources cannot be compiled here", ok=False)
    try:
        done = subprocess.run([*path.split(), "--version"], capture_output=True, text=True, timeout=5, check=False)  # noqa: S603  # the compiler that would be run anyway
    except (OSError, subprocess.TimeoutExpired) as e:
        return Line("compiler", f"{path} does not answer: {e}", ok=False)
    return Line("compiler", f"{path}: {(done.stdout.splitlines() or ['?'])[0]}", ok=done.returncode == 0)


def directory(name: str, path: Path) -> Line:
    """A cache: where, whether it can be written, how much room is left."""
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        free = shutil.disk_usage(existing).free / 2**30
    except OSError as e:
        return Line(name, f"{path}: {e.strerror or e}", ok=False)
    writable = os.access(existing, os.W_OK)
    state = "" if path.exists() else ", not made yet"
    return Line(name, f"{path}{state}, {free:.0f} GiB free{'' if writable else ', NOT writable'}", ok=writable and free > 1)


def tuning(tunings: Tunings, machine: Machine) -> Line:
    """Which bundled kernels have configurations that were measured on this device, with these versions."""
    if machine.backend != "cuda" or not machine.devices:
        return Line("tuning", f"none needed for {machine.backend}")
    at = place(0)
    found = [file for file in tunings if all(file.get(name) == value for name, value in at.items())]
    told = [f"{file.get('kernel') or 'a kernel'}: {', '.join(names)}" for file in found if (names := won(file["choices"]))]
    if told:
        return Line("tuning", f"{'; '.join(told)} on {at['device']}", ok=True)
    looked = f"{len(found)} kernels looked at, the defaults serve" if found else "nothing measured on this device"
    return Line("tuning", f"{looked}; kernelswap bench kernels --tune")


def hub(endpoint: str, *, offline: bool, seconds: float) -> Line:
    """Whether the hub answers, in time. Any answer counts, also one that refuses."""
    if offline:
        return Line("hub", f"{endpoint}: not asked (offline)")
    start = time.perf_counter()
    request = urllib.request.Request(f"{endpoint}/api/models?limit=1", method="HEAD")  # noqa: S310  # the configured endpoint
    pool = ThreadPoolExecutor(1)  # name resolution has no time limit of its own
    try:
        pool.submit(_ask, request, seconds).result(timeout=seconds)
    except (OSError, Late) as e:
        reason = getattr(e, "reason", e)
        return Line("hub", f"{endpoint}: no answer within {seconds:g} s ({reason or type(e).__name__})", ok=False)
    except ValueError as e:
        return Line("hub", f"{endpoint}: {e}", ok=False)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return Line("hub", f"{endpoint}: answered in {(time.perf_counter() - start) * 1e3:.0f} ms", ok=True)


def _ask(request: urllib.request.Request, seconds: float) -> None:
    try:
        with urllib.request.urlopen(request, timeout=seconds):  # noqa: S310  # same
            pass
    except urllib.error.HTTPError:
        pass  # it answered


def variables(environ: Mapping[str, str]) -> list[Line]:
    """Those that are set and change what happens. Tokens are named, never shown."""
    found = [Line(name, environ[name]) for name in VARIABLES if environ.get(name)]
    if environ.get("HF_TOKEN"):
        found.append(Line("HF_TOKEN", "set"))
    return found


def kernels(
    rows: Sequence[Row],
    machine: Machine,
    find: Callable[[str], Resolution],
    misfit: Callable[..., str | None],
    *,
    also: Sequence[str] = (),
    hub_down: bool,
    compiles: bool,
    seconds: float,
) -> list[Line]:
    """Every kernel that the table names, and those of `also`, once: the build that would load here, or why none would.

    `misfit(use, device, machine)` is `table.misfit`. With `hub_down` the hub is not asked again; `compiles`: there is a
    compiler for bundled sources.
    """
    device = machine.devices[0].type if machine.devices else "cpu"
    device = {"rocm": "cuda"}.get(device, device)
    specs: dict[str, str | None] = dict.fromkeys(also)  # without the layer -> why it is not for this device, None: it is
    for row in rows:
        for use in row.use:
            name = use.spec.rsplit(":", 1)[0] if "://" not in use.spec else use.spec
            why = misfit(use, device, machine)
            if specs.get(name, "") is not None:
                specs[name] = why and why.partition(", this is ")[0]
    asked = [name for name, why in specs.items() if why is None and not (hub_down and not name.startswith("kernelswap/"))]
    pool = ThreadPoolExecutor(8)
    futures = {name: pool.submit(_would_load, name, find, compiles=compiles) for name in asked}
    done, _ = wait(futures.values(), timeout=seconds)
    found = {name: future.result() for name, future in futures.items() if future in done}
    late, down = f"not known: no answer within {seconds:g} s", "not known: the hub does not answer"
    pool.shutdown(wait=False, cancel_futures=True)
    return [_short(found.get(name) or Line(name, why or (late if name in futures else down))) for name, why in specs.items()]


def _short(line: Line) -> Line:
    """A commit in a name by its first twelve digits: a column has to hold it."""
    name, at, version = line.name.partition("@")
    return replace(line, name=name + at + (version[:12] if len(version) == COMMIT else version))


def _would_load(name: str, find: Callable[[str], Resolution], *, compiles: bool) -> Line:
    try:
        resolution = find(name)
    except KernelSwapError as e:
        return Line(name, e.reason, ok=False)
    chosen = resolution.chosen
    if chosen is not None:
        return Line(name, f"{chosen.variant} would load", ok=True)
    if resolution.notes and name.startswith("kernelswap/"):  # it has sources
        missing = "" if compiles else "; there is no C++ compiler here"
        return Line(name, resolution.notes[0] + missing, ok=None if compiles else False)
    best = next((j for j in resolution.judged if j.rejected), None)
    why = f"no build fits; the nearest is {best.candidate.variant}: {best.rejected}" if best else "it has no builds"
    return Line(name, why, ok=False)
