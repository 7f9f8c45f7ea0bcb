"""Write a bundle (`sources/bundle_file.py`): every kernel that may serve a model on the machines named, in one file.

For a machine that is not this one nothing can be proved, so that of every kind of site all candidates for that machine go in,
and it is proved there which one serves. For this machine the model is swapped and called once as well, and the verdicts go
along: where the file is used on a machine of the same kind, nothing is proved again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import machine as machine_file
from . import sites, table
from ._version import __version__
from .api import Swapper
from .errors import KernelSwapError, StoreError
from .lock import Lock, Locked, LockedBuild
from .provider import Terms
from .sources import bundle_file
from .sources.bundled import BundledSource
from .sources.hub_cache import Refs
from .sources.mirror import Mirror, refs_of
from .tree import hashes
from .types import Artifact, Candidate, Machine
from .verifiers.publisher import PublisherVerifier

if TYPE_CHECKING:
    import torch.nn as nn

_DEVICES = {"cpu": "cpu", "metal": "mps", "cann": "npu:0", "rocm": "cuda:0"}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What goes into a bundle."""

    model: nn.Module | None = None
    name: str = ""
    """What the model is called."""
    exercise: Callable[[], object] = field(default=lambda: None, repr=False)
    """Calls the model once, so that its first calls are proved."""
    specs: Sequence[str] = ()
    """Kernels beside those of the table."""
    machines: Sequence[str] = ()
    """What is different there, as in `--machine`; none: this machine."""
    hub: bool = False
    """Kernels of the table that are on the hub, too."""


@dataclass(frozen=True, slots=True)
class Written:
    """What a bundle holds."""

    file: Path
    sha256: str
    about: bundle_file.About
    left_out: tuple[tuple[str, str], ...]
    """(machine and spec, why it is not in it)."""


def write(file: Path, swapper: Swapper, wanted: Wanted, terms: Terms) -> Written:
    """Write `file`, or leave it as it was.

    Raises:
        KernelSwapError: a kernel that `wanted.specs` names cannot be had for any of the machines, or nothing would be in the file.
        StoreError: it cannot be written.
    """
    packing = _Packing(swapper, wanted, terms)
    with tempfile.TemporaryDirectory() as folder:
        about, lock = packing.fill(Mirror(Path(folder)))
        (Path(folder) / bundle_file.ABOUT).write_bytes(about_json(about))
        (Path(folder) / bundle_file.LOCK).write_text(lock.dumps(), encoding="utf-8")
        digest = _zip(Path(folder), file)
    return Written(file, digest, about, tuple(packing.left_out))


def about_json(about: bundle_file.About) -> bytes:
    """`bundle.json`."""
    value = {name: getattr(about, name) for name in about.__slots__}
    return (json.dumps({"format": bundle_file.FORMAT, **value}, indent=1) + "\n").encode()


class _Packing:
    def __init__(self, swapper: Swapper, wanted: Wanted, terms: Terms) -> None:
        self.swapper, self.wanted, self.terms = swapper, wanted, terms
        self.left_out: list[tuple[str, str]] = []
        self.artifacts: dict[tuple[str, str, str], Artifact] = {}
        bundled = swapper.bundled
        assert bundled is not None  # nobody makes a Swapper without them for this
        self.bundled: BundledSource = bundled

    def fill(self, mirror: Mirror) -> tuple[bundle_file.About, Lock]:
        here = self.swapper.machine
        machines = [(text, machine_file.override(here, text)) for text in self.wanted.machines] or [("", here)]
        for text, machine in machines:
            for artifact in self._for(text, machine):
                self._take(artifact)
        verdicts = self._proved(here) if self.wanted.model is not None and any(m == here for _, m in machines) else {}
        lock, compiled = Lock(), {}
        for artifact in self.artifacts.values():
            found = artifact.candidate
            if found.source == "bundled":
                compiled[found.name] = self.bundled.source_digest(self.bundled.root / found.name)
                mirror.put(_packed(found), artifact.path)
                mirror.name(_packed(found), Refs())
            else:
                mirror.put(found, artifact.path)
                mirror.name(found, refs_of(self.swapper.sources["hub"], found.name))
            lock = lock.with_entry(_locked(artifact))
        if not self.artifacts and not verdicts:
            raise KernelSwapError(
                "\n".join(f"{what}: {why}" for what, why in self.left_out)
                or "no kernel would serve it that is not installed with kernelswap",
                asked=f"writing a bundle for {self.wanted.name or 'these kernels'}",
                todo="name kernels with --kernel, or take those of the hub with --hub",
            )
        about = bundle_file.About(
            __version__,
            self.wanted.name,
            tuple(text or _said(here) for text, _ in machines),
            dict(self._publishers()),
            compiled,
            tuple(_about(a) for a in self.artifacts.values()),
            verdicts,
        )
        return about, lock

    def _for(self, text: str, machine: Machine) -> Iterator[Artifact]:
        """What may serve on one machine, what it depends on before it."""
        same = machine == self.swapper.machine
        swapper = self.swapper if same else self._like(machine=machine)
        device = machine.devices[0].type + ":0" if machine.devices else _DEVICES.get(machine.backend, f"{machine.backend}:0")
        # what is compiled is compiled for this machine
        terms = Terms("wait" if same else "never", self.terms.trust, self.terms.progress)
        for one, named in self._specs(machine, device).items():
            try:
                yield swapper.artifact(one, device="cpu" if device == "cpu" else None, terms=terms)
            except KernelSwapError as e:  # noqa: PERF203  # a handful of specs, each with its reason
                if named:
                    raise
                self.left_out.append((f"{one} for {text or 'this machine'}", e.reason))

    def _specs(self, machine: Machine, device: str) -> dict[str, bool]:
        """Specs without their layers, and whether the user named them."""
        found = {}
        for row in {site.layer: site.row for site in self._sites()}.values():
            for use in row.use:
                if table.misfit(use, device, machine) is None and (self.wanted.hub or not self.swapper.is_remote(use.spec)):
                    found[use.spec.rpartition(":")[0]] = False
        return {**found, **dict.fromkeys(self.wanted.specs, True)}

    def _sites(self) -> Sequence[Any]:
        return sites.find(self.wanted.model, self.swapper.table) if self.wanted.model is not None else ()

    def _take(self, artifact: Artifact) -> None:
        for below in artifact.depends:
            self._take(below)
        found = artifact.candidate
        if found.source == "bundled" and (self.bundled.root / found.name / "build" / found.variant).is_dir():
            return  # comes with kernelswap, wherever that is installed
        if found.source in {"dir", "local"}:
            self.left_out.append((str(found.requirement), "is a directory of this machine"))
            return
        self.artifacts[found.name, found.commit, found.variant] = artifact

    def _proved(self, machine: Machine) -> dict[str, Any]:
        """Verdicts of a swap and one call, made for this file alone."""
        from .proof import Check, Verdicts

        model = self.wanted.model
        assert model is not None
        with tempfile.TemporaryDirectory() as folder:
            verdicts = Verdicts(Path(folder) / "verdicts", key=Path(folder) / "key")
            check = Check(verdicts, machine, traced=True)
            try:
                swapper = self._like(machine=machine, prover=check)
                with swapper.swap(model, hub=self.wanted.hub, build="wait", trust=self.terms.trust, progress=self.terms.progress):
                    self.wanted.exercise()
            finally:
                check.close()
            return verdicts.export()

    def _publishers(self) -> Iterator[tuple[str, bool]]:
        """What is known of the hub's word about those whose kernels are in the file."""
        known = next((v.publishers for v in self.swapper.verifiers if isinstance(v, PublisherVerifier)), None)
        for org in sorted({name.partition("/")[0] for name, _, _ in self.artifacts if "/" in name}):
            if known is not None:
                with contextlib.suppress(KernelSwapError):
                    yield org, known.trusted(org, afresh=False)[0]

    def _like(self, **other: Any) -> Swapper:
        base = self.swapper
        given: dict[str, Any] = {"sources": base.sources, "verifiers": base.verifiers, "store": base.store, "table": base.table}
        return Swapper(**given, cache=base.environment.cache, offline=base.environment.offline, **other)


def _packed(candidate: Candidate) -> Candidate:
    """Where a compiled kernel is in the file, apart from any that a hub could have."""
    name = f"{bundle_file.COMPILED}/{candidate.name}"
    return replace(
        candidate, name=name, requirement=replace(candidate.requirement, name=name, version=None, revision=None, constraints=None)
    )


def _locked(artifact: Artifact) -> Locked:
    found, asked = artifact.candidate, artifact.candidate.requirement
    build = LockedBuild(found.variant, tree=artifact.digest, files=tuple(hashes(artifact.path).items()))
    return Locked(asked.name, found.commit, asked.source, asked.version, asked.revision, asked.constraints, (build,))


def _about(artifact: Artifact) -> Mapping[str, Any]:
    found = artifact.candidate
    return {
        "spec": str(found.requirement),
        "name": found.name,
        "commit": found.commit,
        "variant": found.variant,
        "digest": artifact.digest,
        "evidence": [[e.verifier, e.statement] for e in artifact.evidence],
    }


def _said(machine: Machine) -> str:
    torch = ".".join(map(str, machine.torch or ()))
    return f"{machine.os} {machine.cpu} torch {torch} {machine.backend}" + (
        f" {machine.devices[0].arch}" if machine.devices else ""
    )


def _zip(folder: Path, file: Path) -> str:
    """The folder as one file, the same bytes for the same contents; its sha256."""
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as packed:
            for path in sorted(p for p in folder.rglob("*") if p.is_file()):
                info = zipfile.ZipInfo(path.relative_to(folder).as_posix(), (1980, 1, 1, 0, 0, 0))
                info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
                with path.open("rb") as source, packed.open(info, "w", force_zip64=path.stat().st_size > 1 << 30) as target:
                    while piece := source.read(1 << 20):
                        target.write(piece)
        state = hashlib.sha256()
        with temporary.open("rb") as stream:
            while piece := stream.read(1 << 20):
                state.update(piece)
        temporary.replace(file)
    except OSError as e:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise StoreError(
            f"{file} cannot be written: {e.strerror or e}", todo="Name another file with -o, or free some space."
        ) from e
    return state.hexdigest()
