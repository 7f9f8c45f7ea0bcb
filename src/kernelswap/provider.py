"""From a spec to an implementation: find, resolve, materialize, import. What was loaded once is kept.

What a kernel depends on comes before it; bundled kernels with sources are compiled where no build fits.
"""

# long: one straight path from a spec to an implementation; who reads a half of it needs the other.

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args

import platformdirs

from . import build as building
from . import layers, loader, spec
from . import machine as machines
from . import metadata as metadata_file
from . import policy as policies
from .audit import Audit
from .background import Background
from .errors import (
    BuildFailed,
    KernelSwapError,
    LoadFailed,
    SpecError,
    TableError,
    UnknownKernel,
)
from .job import Job
from .lock import Lock
from .policy import Policy
from .resolve import no_variant, resolve
from .sources import configured
from .sources.bundle_file import Compiled
from .sources.bundled import BundledSource
from .sources.dependencies import Node, tree
from .sources.environment import Environment
from .sources.hub_client import HubClient
from .sources.installed import InstalledSource
from .store import Store
from .tuning import Tunings, hand_in
from .types import (
    Artifact,
    Candidate,
    Implementation,
    Judged,
    Kernel,
    Machine,
    Metadata,
    Progress,
    Requirement,
    Resolution,
    SiteKind,
    Source,
    Verifier,
)
from .verifiers import policy as policy_files
from .verifiers.policy import PolicyVerifier
from .verifiers.publisher import Publishers, PublisherVerifier
from .verifiers.signature import SignatureVerifier

Build = Literal["background", "wait", "never"]
MEMOISED = {"hub", "bundled", "folder", "bundle", "installed"}
"""Sources whose kernels do not change under their names while a process runs. A directory may be edited."""


OURS = {"bundled", "bundle"}
"""Sources of kernels that came with this package, or with a bundle of it: they may ask for measured configurations."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What one call allows and wants to hear."""

    build: Build = "wait"
    """A bundled kernel that is not compiled yet: compile it in the `background` (BuildFailed until it is there), `wait`, `never`."""
    trust: bool | Sequence[str] = False
    """Publishers that the call vouches for: `org`, `org/kernel`; True: whatever it asks for. A policy may say no all the same."""
    progress: Progress | None = None
    """Told about downloads and compiling."""
    meets: Callable[[Artifact], str | None] = lambda _: None
    """Asked before a verified kernel is imported: why it must not be, here, or None."""

    def __post_init__(self) -> None:
        if self.build not in get_args(Build):
            raise TableError(f"build={self.build!r} says nothing", todo=f"Use {', '.join(map(repr, get_args(Build)))}.")


class Provider:
    """Sources, verifiers, a machine and a cache, held together, with what was found and loaded through them.

    Args, all optional; what is left out comes from the environment and this machine:
        sources: by the name that a spec uses (`hub`, `dir`, `bundled`).
        verifiers: on top of contents and digests, which are always verified; default: what the policy files of the project
            around the working directory and of the user ask for.
        machine: what to choose for.
        store: where verified kernels are kept.
        cache: the directory of store, compiled kernels and verdicts; ignored for what is given itself.
        offline: ask no server.
        bundle: a file of `kernelswap bundle`. Kernels come from it and from this machine alone; no socket is opened.

    Thread-safe. It keeps to what it has once loaded: a branch that moves meanwhile changes nothing for it.
    """

    def __init__(
        self,
        *,
        sources: Mapping[str, Source] | None = None,
        verifiers: Sequence[Verifier] | None = None,
        machine: Machine | None = None,
        store: Store | None = None,
        cache: Path | None = None,
        offline: bool = False,
        bundle: Path | None = None,
    ) -> None:
        environment = Environment.read(os.environ)
        bundle = bundle or (environment.bundle if sources is None else None)
        offline = offline or environment.offline or bundle is not None
        self.environment = environment = replace(environment, cache=cache or environment.cache, offline=offline, bundle=bundle)
        policy, lock = _policy() if verifiers is None else (policies.DEFAULT, None)
        self.sources = dict(_sources(environment, self._tell, lock) if sources is None else sources)
        self.verifiers = tuple(_verifiers(environment, self.sources.get("hub"), policy, lock) if verifiers is None else verifiers)
        self.store = store or Store(environment.cache)
        self.audit = Audit(self.store.cache / "audit.jsonl")
        self.tunings = Tunings(self.store.cache / "tuning")
        self._job = Job.of(self.store.cache, environment.job)
        self._machine = machine
        self._lock = threading.RLock()
        self._background = Background()
        self._terms = Terms()  # of the call that holds the lock
        self._kernels: dict[tuple[Requirement, str | None], Kernel] = {}
        self._implementations: dict[tuple[str, str, SiteKind], Implementation] = {}
        self._judged: dict[tuple[str, str, str, str], tuple[Judged, ...]] = {}

    @property
    def machine(self) -> Machine:
        """Looked at once, when first needed: that imports torch."""
        with self._lock:
            if self._machine is None:
                self._machine = machines.look()
            return self._machine

    def find(self, text: str, *, machine: Machine | str | None = None, device: str | None = None) -> Resolution:
        """Which build of a kernel would be used, and why each other one would not. Fetches metadata at most.

        Args:
            text: `[source://]name[@version][:Layer]`.
            machine: another one to choose for; as text, what is different there: `torch=2.14,cuda=13.2,sm=120`.
            device: `cuda:1`, `cpu`; default: every visible one.

        Raises:
            SpecError: the text does not parse.
            UnknownKernel: no such source, kernel or version.
            Unreachable, NotCached: the source could not be asked.
        """
        here = machines.override(self.machine, machine) if isinstance(machine, str) else machine or self.machine
        return self._resolve(spec.parse(text), _machine_for(here, device), device)

    def kernel(self, text: str, *, device: str | None = None, terms: Terms | None = None) -> Kernel:
        """The kernel, fetched, verified and imported, what it depends on before it.

        Raises:
            NoVariant: no build fits; the message has every build with its reason.
            Refused, Tampered, LoadFailed, MissingDependency, BuildFailed, StoreError: see `errors`; also what `find` raises.
        """
        requirement = replace(spec.parse(text), layer=None, text=None)
        with self._lock:
            known = self._kernels.get((requirement, device))
            if known is None:
                artifact = self.artifact(text, device=device, terms=terms)
                known = self._import(artifact, (terms or Terms()).meets(artifact))
                if artifact.candidate.source in MEMOISED:
                    self._kernels[requirement, device] = known
            return known

    def artifact(self, text: str, *, device: str | None = None, terms: Terms | None = None) -> Artifact:
        """The kernel and what it depends on, fetched and verified; none of its code has run.

        Raises:
            As `kernel`, except for what an import may raise.
        """
        requirement = replace(spec.parse(text), layer=None, text=None)
        with self._lock:
            self._terms = terms or Terms()
            try:
                with self._turn(requirement):
                    return self._artifact(self._node(requirement, _machine_for(self.machine, device), device))
            finally:
                self._terms = Terms()

    def load(self, text: str, *, device: str | None = None, trust: bool | Sequence[str] = False) -> ModuleType:
        """The module of `kernel`. A layer that the text names must be there, and changes nothing else. `trust`: see `Terms`.

        Raises:
            UnknownKernel: it has no such layer; also what `kernel` raises.
        """
        kernel, layer = self.kernel(text, device=device, terms=Terms(trust=trust)), spec.parse(text).layer
        if layer is not None:
            layers.implementation(kernel, layer)
        return kernel.module

    def provide(self, text: str, device: str = "cpu", kind: SiteKind = "module", *, terms: Terms | None = None) -> Implementation:
        """The layer or function that the text names, for modules on `device`.

        Raises:
            SpecError: the text names no layer.
            UnknownKernel, LayerMismatch: the kernel has none of that name that can serve; also what `kernel` raises.
        """
        with self._lock:
            known = self._implementations.get((text, device, kind))
            if known is not None:
                return known
            layer = spec.parse(text).layer
            if layer is None:
                raise SpecError("a layer must be named", text=text, span=(len(text), len(text)), todo=f"{text}:RMSNorm, say")
            kernel = self.kernel(text, device=device, terms=terms)
            found = layers.function(kernel, layer) if kind == "function" else layers.implementation(kernel, layer)
            found = replace(
                found,
                builds=self._judged.get(_bytes_of(kernel.artifact.candidate), ()),
                tuned=self._tuned(kernel.artifact, device),
            )
            if kernel.artifact.candidate.source in MEMOISED:
                self._implementations[text, device, kind] = found
            return found

    def build(self, *, progress: Progress | None = None) -> list[Path]:
        """Compile the bundled kernels that have sources for this machine, unless that was done; the directories of the builds.

        Raises:
            BuildFailed: nothing can be compiled here, or the compiler reported errors.
        """
        source = self.bundled
        names = source.names() if source is not None else ()
        built, problems = [], []
        for name in names:
            for machine in dict.fromkeys((_machine_for(self.machine, "cpu"), self.machine)):
                job = self._buildable(name, machine)
                if isinstance(job, str):
                    problems.append(job)
                elif job is not None:
                    built.append(building.compile(*job, progress=progress))
        if not built:
            raise BuildFailed(
                "\n".join(dict.fromkeys(problems)) or "no bundled kernel has sources", asked="compile the bundled kernels"
            )
        return built

    def _tell(self, step: str, done: float, total: float) -> None:
        """What the hub reports goes to whoever asked for the kernel."""
        if self._terms.progress is not None:
            self._terms.progress(step, done, total)

    def _tuned(self, artifact: Artifact, device: str) -> tuple[str, ...]:
        """See `Implementation.tuned`."""
        kind, _, index = device.partition(":")
        if artifact.candidate.source not in OURS or kind != "cuda":
            return ()
        return self.tunings.tuned(artifact.digest, int(index or 0))

    def _turn(self, requirement: Requirement) -> contextlib.AbstractContextManager[None]:
        """For what is on a hub, one process of a job at a time."""
        return self._job.turn(requirement) if self._job is not None and requirement.source == "hub" else contextlib.nullcontext()

    def _resolve(self, requirement: Requirement, machine: Machine, device: str | None, *, agree: bool = False) -> Resolution:
        source, job = self.source(requirement), self._job if agree and requirement.source == "hub" else None
        agreed = job.agreed(requirement) if job is not None else None
        if agreed is not None:
            found, notes = source.find(agreed)
            candidates: Sequence[Candidate] = tuple(replace(c, requirement=requirement) for c in found)
        else:
            candidates, notes = source.find(requirement)
            if job is not None:
                job.agree(requirement, candidates)
        # a device says nothing about another backend's builds, and cpu builds have no architectures
        on = device if device is not None and device != "cpu" else None
        return resolve(requirement, candidates, machine, lambda c: _metadata(source, c), device=on, notes=notes)

    def metadata(self, candidate: Candidate) -> Metadata:
        """What a build says about itself, from its source.

        Raises:
            BadMetadata: it does not parse; also what reading raises.
        """
        return _metadata(self.source(candidate.requirement), candidate)

    def source(self, requirement: Requirement) -> Source:
        """The source that a requirement names.

        Raises:
            UnknownKernel: there is none of that name.
        """
        if requirement.source not in self.sources:
            raise UnknownKernel(
                f"there is no source {requirement.source!r}; there is {', '.join(sorted(self.sources)) or 'none'}",
                asked=f"looking for {requirement}",
            )
        return self.sources[requirement.source]

    def _node(self, requirement: Requirement, machine: Machine, device: str | None) -> Node:
        def find(wanted: Requirement) -> Resolution:
            found = self._resolve(wanted, machine, device, agree=True)
            if found.chosen is None and wanted.source == "bundled" and self._compiled(wanted, machine):
                found = self._resolve(wanted, machine, device)
            if found.chosen is None:
                raise no_variant(found)
            return found

        return tree(find(requirement), find)

    def _artifact(self, node: Node) -> Artifact:
        below = tuple(self._artifact(child) for child in node.depends)
        chosen, metadata = node.resolution.chosen, node.resolution.metadata
        assert chosen is not None and metadata is not None  # noqa: PT018  # `_node` raised otherwise
        self._judged[_bytes_of(chosen)] = node.resolution.judged
        source = self.source(node.resolution.requirement)
        trust = self._terms.trust
        verifiers = [replace(v, trust=trust) if trust and isinstance(v, PublisherVerifier) else v for v in self.verifiers]
        return self.store.materialize(chosen, metadata, source, verifiers, below)

    def _import(self, artifact: Artifact, why_not: str | None) -> Kernel:
        """On record before its code runs."""
        self.audit.loading(artifact)
        try:
            if why_not is not None:
                raise LoadFailed(why_not, asked=f"importing {artifact.candidate.requirement}")
            kernel = loader.load(artifact, reverify=self.store.reverify)
        except KernelSwapError as e:
            self.audit.failed(artifact, e.reason)
            raise
        if artifact.candidate.source in OURS:
            hand_in(kernel.module, artifact.digest, self.tunings)
        return kernel

    # -- compiling what came with us

    @property
    def bundled(self) -> BundledSource | None:
        """The kernels that come with us, where they are a source."""
        source = self.sources.get("bundled")
        source = source.source if isinstance(source, Compiled) else source
        return source if isinstance(source, BundledSource) else None

    def _buildable(self, name: str, machine: Machine) -> tuple[Path, Machine, Path] | str | None:
        """What `build.compile` takes, or why not; `None` where there are no sources."""
        source = self.bundled
        if source is None:
            return None
        root = source.root / name
        file = building.sources(root)
        return None if file is None else building.misfit(file, machine) or (root, machine, source.compiled(name))

    def _compiled(self, requirement: Requirement, machine: Machine) -> bool:
        """Whether it has been compiled now.

        Raises:
            BuildFailed: it has not, though it could be, with the reason.
        """
        job = self._buildable(requirement.name, machine)
        if job is None or isinstance(job, str):
            return False  # the builds and their reasons say it all
        build = self._terms.build
        if build == "never":
            raise BuildFailed("is not compiled on this machine yet", todo="`kernelswap build` does it, or build='wait'.")
        if building.compiler() is None:
            raise BuildFailed(
                "is compiled on the machine, and there is no C++ compiler", todo="Install g++ or clang++, or set CXX."
            )
        if build == "wait":
            building.compile(*job, progress=self._terms.progress)
            return True
        begun = self._background.start(*job)
        if begun.failed is not None:
            raise BuildFailed(f"compiling it failed: {begun.failed}", todo="`kernelswap build` shows the compiler's report.")
        if begun.done.is_set():
            return True
        raise BuildFailed("is being compiled in the background; the next swap will use it", todo="Or wait: build='wait'.")


def _policy() -> tuple[Policy, Lock | None]:
    """What the files of the project around the working directory and of the user say; with the lock, if that is all that may be loaded."""
    policy = policy_files.read(policy_files.project(Path.cwd()), platformdirs.user_config_path("kernelswap"))
    return policy, (policy_files.read_lock(Path.cwd()) if policy.locked_only else None)


def _sources(environment: Environment, progress: Progress, lock: Lock | None) -> dict[str, Source]:
    """In the order that the environment or the files of the project and of the user say."""
    order = configured.read(policy_files.project(Path.cwd()), platformdirs.user_config_path("kernelswap"))
    ours = Path(__file__).parent / "bundled"
    bundled = BundledSource(ours, environment.cache / "built", building.source_digest)
    made = configured.make(environment, order, bundled, lock=lock, progress=progress)
    return {**made, "installed": InstalledSource(ours / "installed")}


def _verifiers(environment: Environment, source: Source | None, policy: Policy, lock: Lock | None) -> list[Verifier]:
    """What the policy asks for. A hub of our own making is asked whom it trusts, unless this is offline."""
    hub, bundle = configured.hub_of(source), configured.bundle_of(source)
    ask = None
    if hub is not None and not environment.offline:
        ask = HubClient(hub.endpoint.rstrip("/"), hub.token, hub.timeout).trusts
    told = bundle.about.publishers if bundle is not None else {}
    publishers = PublisherVerifier(Publishers(environment.cache / "publishers", ask, told), policy)
    return [PolicyVerifier(policy, lock), publishers, SignatureVerifier(policy)]


def _machine_for(machine: Machine, device: str | None) -> Machine:
    return machines.for_backend(machine, "cpu") if device == "cpu" else machine


def _bytes_of(candidate: Candidate) -> tuple[str, str, str, str]:
    return candidate.source, candidate.name, candidate.commit, candidate.variant


def _metadata(source: Source, candidate: Candidate) -> Metadata:
    data = source.read(candidate, "metadata.json")
    hint = f"{candidate.commit}/{candidate.variant}"
    return metadata_file.parse(data if data is not None else b"{}", package=candidate.name, path_hint=hint)
