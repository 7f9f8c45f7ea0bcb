"""`kernelswap benchmark`: the benchmarks that a kernel's authors ship with it."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import KernelSwapError, UnknownKernel
from .. import exits, session
from ..benchmark_view import draw, table
from ..output import Answer, progress
from .explain import where

if TYPE_CHECKING:
    from ...api import Swapper
    from ...bench.scripts import Asked, Workload
    from ...types import Artifact

PANEL = "Kernels"
_TORCH = {"rocm": "cuda", "metal": "mps", "cann": "npu"}
_SCRIPTS = "its benchmarks are scripts that no digest or signature covers, and the policy asks for one of"


def command(
    kernel: Annotated[str, typer.Argument(help="[source://]name[@version], or a directory.", metavar="KERNEL")],
    version: Annotated[str | None, typer.Option("--version", help="As in `name@version`.")] = None,
    branch: Annotated[str | None, typer.Option("--branch", help="Branch, tag or commit.")] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps...; default: that of the build.", metavar="DEVICE")
    ] = None,
    iterations: Annotated[int, typer.Option("--iterations", min=1, help="Timed calls of each side.")] = 100,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Calls of each side before them.")] = 10,
    no_compile: Annotated[bool, typer.Option("--no-compile", help="Do not time the reference under torch.compile.")] = False,
    output: Annotated[Path | None, typer.Option("--output", help="Write the results as JSON.", metavar="FILE")] = None,
    visual: Annotated[
        Path | None, typer.Option("--visual", help="Draw them: BASE_light.svg and BASE_dark.svg.", metavar="BASE")
    ] = None,
    rasterized: Annotated[bool, typer.Option("--rasterized", help="With --visual: PNG.")] = False,
    cache: session.Cache = None,
    offline: session.Offline = False,
    as_json: bool = False,
) -> Answer:
    """Run benchmarks/benchmark*.py of a kernel's repository as its authors wrote them: check the output, then measure.

    Their reference is timed beside the kernel, in turn with it, as it is and under torch.compile; warm, with emptied caches, and on
    CUDA devices also the kernel replayed from a CUDA graph. Times are medians, with half the distance between the quartiles.
    Exit code 1: an output is wrong, or a benchmark raised.
    """
    from ... import compat
    from ...bench import scripts
    from ...compat.benchmark import Benchmark
    from ...compat.loading import local_spec, spec_of
    from ...sources import benchmarks

    for file in filter(None, (output, visual)):
        if not file.absolute().parent.is_dir():
            raise KernelSwapError(f"there is no directory {file.parent}", todo="Name a file in one that exists.")
    local = Path(kernel).is_dir() and "://" not in kernel
    text = local_spec(kernel) if local else spec_of(kernel, branch, version)
    swapper = session.swapper(cache=cache, offline=offline)
    _allowed(swapper, text)
    on_cpu = device is not None and device.partition(":")[0] == "cpu"
    before = compat.installed()
    compat.install(swapper)  # the scripts import `kernels.benchmark`
    try:
        with progress(quiet=as_json) as tell, tempfile.TemporaryDirectory() as folder:
            loaded = swapper.kernel(text, device="cpu" if on_cpu else None)
            found = loaded.artifact
            place = where(device) if device is not None else _place(found)
            asked = scripts.Asked(place, iterations, warmup, compile=not no_compile)
            source = swapper.sources[found.candidate.requirement.source]
            files = benchmarks.fetch(source, found.candidate, Path(folder))
            with scripts.modules(files) as imported:
                rows = scripts.measure(imported, Benchmark, loaded.module, asked, progress=tell)
    finally:
        if not before:
            compat.uninstall()
    if not rows:
        raise UnknownKernel(f"{', '.join(f.name for f in files)} define no benchmark", asked=f"benchmarking {text}")
    data = _facts(text, found, asked, rows)
    if output is not None:
        output.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    if visual is not None:
        draw(rows, title=f"{text}, {data['machine']['device']}", base=visual, png=rasterized)
    wrong = any(row.bad for row in rows)
    return Answer(data, lambda out: table(data, rows, out), exits.NO if wrong else exits.OK)


def _allowed(swapper: Swapper, text: str) -> None:
    """Scripts are code of the publisher's outside every digest.

    Raises:
        Refused: the policy asks for evidence that they cannot have.
    """
    from ... import spec
    from ...errors import Refused
    from ...verifiers.policy import PolicyVerifier

    if spec.parse(text).source != "hub":
        return
    asks = ("digests", "require_digest", "require_signature", "locked_only")
    for verifier in swapper.verifiers:
        if isinstance(verifier, PolicyVerifier):
            wanted = [key for key in asks if getattr(verifier.policy, key)]
            if wanted:
                raise Refused(
                    f"{_SCRIPTS} {', '.join(wanted)} ({verifier.policy.origin(wanted[0])})",
                    asked=f"benchmarking {text}",
                    todo="Read the scripts, and run them from a directory of your own: `kernelswap benchmark DIR`.",
                )


def _place(found: Artifact) -> str:
    """The device of the build; that of a universal one is the first accelerator, else the CPU."""
    kind = found.metadata.backend
    if kind == "cpu" and found.candidate.variant.endswith("universal"):
        return where(None)
    return _TORCH.get(kind, kind)


def _facts(text: str, found: Artifact, asked: Asked, rows: list[Workload]) -> dict[str, Any]:
    import platform

    import torch

    name = torch.cuda.get_device_name(asked.device) if asked.device.startswith("cuda") else platform.machine()
    return {
        "kernel": text,
        "commit": found.candidate.commit,
        "variant": found.candidate.variant,
        "digest": found.digest,
        "machine": {
            "device": asked.device,
            "name": name,
            "torch": str(torch.__version__),
            "threads": torch.get_num_threads(),
        },
        "iterations": asked.iterations,
        "warmup": asked.warmup,
        "workloads": [{**asdict(row), "bad": row.bad} for row in rows],
    }
