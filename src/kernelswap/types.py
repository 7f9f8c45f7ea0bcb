"""The values that the steps hand to each other. Frozen, no I/O, no torch at run time.

In the order of the straight path: Requirement, Machine, Candidate, Judged, Resolution, Artifact, Kernel,
Implementation, Row, Site, Choice, Swap/Kept, Verdict. The protocols at the end are the plug points.
"""

# long: the glossary in code; one place to look a value up beats four.

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, Protocol

from .errors import ModeError

if TYPE_CHECKING:
    import torch.nn as nn


# -- what was asked for -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Requirement:
    """`[source://]name[@version][:Layer]`, taken apart. `str()` gives the text back.

    At most one of `version`, `revision` and `constraints` is set.
    """

    name: str
    """`org/repo` for the hub, a path for `dir`, a kernel name for `bundled`."""
    source: str = "hub"
    version: int | None = None
    """API version N: branch `vN`."""
    revision: str | None = None
    """Branch, tag, `refs/pr/N` or commit, verbatim."""
    constraints: str | None = None
    """PEP 440 constraints as written, `>=2.0,<3.0`."""
    layer: str | None = None
    paged: bool = False
    """The text began with Transformers' deprecated `paged|`."""
    text: str | None = field(default=None, compare=False, repr=False)
    """As written, where it came from text."""

    def __str__(self) -> str:
        if self.text is not None:
            return self.text
        at = next((str(v) for v in (self.version, self.revision, self.constraints) if v is not None), None)
        return "".join(
            (
                "paged|" if self.paged else "",
                "" if self.source == "hub" and not self.name.startswith("kernelswap/") else f"{self.source}://",
                self.name,
                f"@{at}" if at is not None else "",
                f":{self.layer}" if self.layer else "",
            )
        )


# -- the world, looked at once ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Device:
    """One visible accelerator."""

    type: str
    """`cuda rocm xpu npu mps tpu neuron`; never `cpu`: the CPU is always there."""
    index: int
    name: str
    capability: tuple[int, int] | None = None
    """CUDA compute capability."""
    arch: str | None = None
    """`sm90`, `gfx942`."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Everything that decides which build runs here. After this, choosing is a pure function of it."""

    os: str
    """`linux darwin windows`."""
    cpu: str
    """`x86_64 aarch64`."""
    python: tuple[int, int] = (3, 10)
    free_threaded: bool = False
    torch: tuple[int, int] | None = None
    cxx11: bool | None = None
    """torch's C++11 ABI flag on linux; None elsewhere."""
    tvm_ffi: tuple[int, int] | None = None
    backend: str = "cpu"
    """`cpu cuda rocm metal xpu cann neuron tpu`, as variant names and metadata spell it."""
    backend_version: tuple[int, int] | None = None
    macos: tuple[int, int] | None = None
    devices: tuple[Device, ...] = ()
    why: tuple[tuple[str, str], ...] = ()
    """`(field, reason)`, e.g. `("backend", "torch.version.cuda is 12.8")`; one for every field."""


# -- what a build says about itself -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Dependency:
    """One entry of `kernel-depends`: a repository at a version or at a revision."""

    name: str
    version: int | None = None
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class Digest:
    """`algorithm` is `sha256` or `sha512`; `files` maps `/`-separated relative paths to base64 of the raw digest."""

    algorithm: str
    files: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Provenance:
    """Which builder made it from which commit; `dirty` sources only warn."""

    builder_version: str
    builder_commit: str | None = None
    builder_dirty: bool | None = None
    commit: str | None = None
    dirty: bool | None = None


@dataclass(frozen=True, slots=True)
class Metadata:
    """`metadata.json` of one build. Made by `metadata.parse` only."""

    name: str
    id: str
    """A Python identifier: `sys.modules` key and torch op namespace."""
    version: int
    license: str
    backend: str
    """`cann cpu cuda metal neuron rocm tpu xpu`, or `universal` for old builds that do not say."""
    archs: tuple[str, ...] = ()
    python_depends: tuple[str, ...] = ()
    kernel_depends: tuple[Dependency, ...] = ()
    minver: tuple[int, int, int] | None = None
    upstream: str | None = None
    source: str | None = None
    digest: Digest | None = None
    provenance: Provenance | None = None
    synthesised: tuple[str, ...] = ()
    """Keys that the file lacked (builds of older eras) and that were made up."""


# -- choosing -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Candidate:
    """One build that exists somewhere. `commit` names bytes (a git commit or a content digest), never a branch."""

    requirement: Requirement
    source: str
    """Key of the Source that knows it: `hub`, `dir`, `bundled`, ..."""
    name: str
    """Repository after redirects; usually `requirement.name`."""
    commit: str
    variant: str


@dataclass(frozen=True, slots=True)
class Judged:
    """A candidate and why it was not chosen, in one sentence; `None` means that it fits."""

    candidate: Candidate
    rejected: str | None
    because: Literal["", "name", "chip", "packages", "unknown packages", "bad", "absent"] = ""
    """Where `rejected` is from: the build's name; or its metadata: chips or loader, Python packages that are missing, or that
    no kernel may ask for; or that it does not parse, or is not here."""


@dataclass(frozen=True, slots=True)
class Resolution:
    """The choice and everything that was considered for it, best first."""

    requirement: Requirement
    machine: Machine
    judged: tuple[Judged, ...]
    metadata: Metadata | None = None
    """Of the chosen candidate."""
    notes: tuple[str, ...] = ()
    """What a person should know: followed a redirect, used the cache because the hub is unreachable, ..."""

    @property
    def chosen(self) -> Candidate | None:
        """The best candidate that fits, or `None`."""
        return next((j.candidate for j in self.judged if j.rejected is None), None)


# -- on disk, and imported ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Evidence:
    """What one verifier saw."""

    verifier: str
    statement: str


@dataclass(frozen=True, slots=True)
class Artifact:
    """A directory that passed every verifier. Only `store` makes one, only `load` takes one."""

    candidate: Candidate
    path: Path
    digest: str
    """sha256 of the tree, hex (`store.tree_digest`)."""
    metadata: Metadata
    evidence: tuple[Evidence, ...] = ()
    depends: tuple[Artifact, ...] = ()
    """Kernel dependencies, verified before this one."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """An imported artifact."""

    artifact: Artifact
    module: ModuleType = field(compare=False, repr=False)


class Mode(enum.Flag):
    """What a kernel is wanted for. The field's own flags and rules.

    `INFERENCE | TRAINING` and `FALLBACK | anything` mean nothing: they raise `ModeError`, a ValueError.
    """

    FALLBACK = enum.auto()
    TRAINING = enum.auto()
    INFERENCE = enum.auto()
    TORCH_COMPILE = enum.auto()

    def __or__(self, other: Mode) -> Mode:
        made = super().__or__(other)
        if isinstance(made, Mode):  # else NotImplemented, for something that is no Mode
            made.checked()
        return made

    def checked(self) -> Mode:
        """The mode itself.

        Raises:
            ModeError: a combination that means nothing.
        """
        names = " | ".join(m.name or "" for m in _IN_ORDER if m in self)
        if Mode.INFERENCE in self and Mode.TRAINING in self:
            raise ModeError(f"{names}: INFERENCE and TRAINING exclude each other", todo="register the kernel once for each")
        if Mode.FALLBACK in self and self != Mode.FALLBACK:
            raise ModeError(f"{names}: FALLBACK stands alone", todo="leave FALLBACK out")
        return self


_IN_ORDER = (Mode.FALLBACK, Mode.INFERENCE, Mode.TRAINING, Mode.TORCH_COMPILE)


@dataclass(frozen=True, slots=True)
class Run:
    """What a module is about to do. What a kernel *can* do is in `Implementation`."""

    training: bool = False
    compiled: bool = False


@dataclass(frozen=True, slots=True)
class Implementation:
    """One layer or function of a kernel, ready to stand in for an original."""

    layer: str
    kind: Literal["module", "function"]
    forward: Callable[..., Any] = field(repr=False)
    """module: `forward(self, *args)`, bound to the original instance. function: called as the original is."""
    backward: bool
    compiles: bool
    origin: Artifact = field(repr=False)
    reads: tuple[str, ...] = ()
    """Attributes of `self` that forward touches, in the notation of `reads.py`: `weight` and `gate_proj.weight` are read as
    values, `gate_proj()` is only called, `*` is anything. LoRA and sharding decide by it.
    """
    parts: tuple[Implementation | None, ...] = ()
    """Where a measurement chose by the size of the call: what serves each bucket, None where the original does. Empty: this
    one everywhere. `forward.serving(*args, **kwargs)` then says which part a call goes to.
    """

    @property
    def kernels(self) -> tuple[Implementation, ...]:
        """What a lock or a bill of materials names: this one or its parts, each once; the original, compiled, is no kernel."""
        parts = dict.fromkeys(self.parts or (self,))
        return tuple(p for p in parts if p is not None and p.origin.candidate.source != "torch")

    builds: tuple[Judged, ...] = field(default=(), repr=False, compare=False)
    """What was considered when the build was chosen, best first."""
    tuned: tuple[str, ...] = field(default=(), compare=False)
    """Which functions of its kernel are launched with configurations that were measured on this device, in words."""

    def cannot(self, run: Run) -> str | None:
        """Why this cannot serve `run`, or `None`."""
        if run.training and not self.backward:
            return "has no backward"
        if run.compiled and not self.compiles:
            return "is not torch.compile friendly"
        return None


# -- the model ----------------------------------------------------------------------------------------------------

SiteKind = Literal["module", "function", "attention"]


@dataclass(frozen=True, slots=True)
class Use:
    """One candidate of a row: a spec, and where it may serve."""

    spec: str
    on: tuple[str, ...] = ()
    """`cpu`, `cuda`, `cuda:sm90`, `cuda:sm80+`, `rocm:gfx942`, `mps`...; empty: anywhere."""
    modes: tuple[Mode, ...] = ()
    """Empty: whatever the implementation says it can do."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table: a kind of site and what may serve it, in order of preference."""

    layer: str
    """The field's name for it: `RMSNorm`, `rotary_pos_emb`, ..."""
    kind: SiteKind = "module"
    targets: tuple[str, ...] = ()
    """Globs over class names (module) or function names (function). The decorated name `layer` always matches."""
    needs: tuple[tuple[str, ...], ...] = ()
    """Attributes the original must have; each entry is a set of alternatives, `("variance_epsilon", "eps")`.
    `act_fn=SiLU*` also asks for the class name of the attribute."""
    probe: str = ""
    """Recipe in `proof.inputs` that makes random inputs for it: `rows`, `mlp`, `elementwise`, `rotary`, ..."""
    use: tuple[Use, ...] = ()
    rivals: tuple[Use, ...] = ()
    """Candidates that serve only where a measurement on this machine chose them."""
    off: bool = False
    """Leave it alone, and say that the user asked for that."""
    note: str = ""
    statements: str = ""
    """kind function: not a call but a pattern of statements, by its name in `slots.passages`; `targets` and `needs` are then those
    of the norms that the statements call."""
    at: tuple[str, ...] = ()
    """Globs over paths, for what is told from its like by its place alone; empty: anywhere. It decides where to look, not what is
    the same: that is proved."""


@dataclass(frozen=True, slots=True)
class Site:
    """A place in a model where a swap could go. Values only: the module is found again by `path`."""

    path: str
    kind: SiteKind
    layer: str
    target: str
    """`module.qualname` of the original class, or of the function."""
    device: str
    """`cpu`, `cuda:0`: of this module (of its execution device under accelerate), never of the model."""
    dtype: str
    """`torch.float32` as text; of the module's first floating parameter, else of the nearest parent's."""
    training: bool
    row: Row = field(repr=False)
    name: str = ""
    """kind function: the global name that the module's forward looks up."""
    left_out: str = ""
    """Why it is not up for a swap at all (`skip=` of the user, the class's own condition); empty: it is."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What serves a site in one mode, and what was passed over: `(spec, why not)` in the order tried."""

    implementation: Implementation | None
    passed: tuple[tuple[str, str], ...] = ()
    verdict: Verdict | None = None
    measured: tuple[tuple[str, str, float | None], ...] = ()
    """Where a measurement chose: `(size of the call, what serves it, times faster than the original)`. What serves is a spec,
    empty for the original; the last is None where nothing was measured and the table decided."""
    later: tuple[str, ...] = ()
    """Specs that come after what serves and were not tried."""


@dataclass(frozen=True, slots=True)
class Swap:
    """At least one mode is served by a kernel; the other may keep the original."""

    site: Site
    inference: Choice
    training: Choice

    def serving(self, *, training: bool) -> Choice:
        """The choice for one mode."""
        return self.training if training else self.inference


@dataclass(frozen=True, slots=True)
class Kept:
    """The original stays, in every mode."""

    site: Site
    reason: str
    passed: tuple[tuple[str, str], ...] = ()


Outcome = Swap | Kept


@dataclass(frozen=True, slots=True)
class Unasked:
    """Where a model's attention is swapped though nobody asked for that by name."""

    keeps: Callable[[Any, str], str | None]
    """`keeps(config, device)`: why that configuration of the model keeps what it has, or `None`."""
    trains: bool
    """Whether it serves modules in training."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of a check or a measurement, and what it holds for."""

    accepted: bool
    reason: str
    """One sentence; for a refusal it names the tensor and the size of the error."""
    key: str = ""
    """Digest over (artifact digest, layer, machine, torch, dtype, bucket, mode, check version)."""
    error_original: float | None = None
    """Largest row-relative error of the original against the float64 reference."""
    error_kernel: float | None = None
    seconds_original: float | None = None
    seconds_kernel: float | None = None
    details: tuple[tuple[str, str], ...] = ()


# -- plug points --------------------------------------------------------------------------------------------------


class Source(Protocol):
    """Where candidates come from. It finds, reads and fetches; it never decides."""

    def find(self, requirement: Requirement) -> tuple[Sequence[Candidate], Sequence[str]]:
        """All builds of what is asked for, in any order, and notes for the Resolution.

        Raises:
            UnknownKernel: no such repository, or no such version (the message lists those that exist).
            Unreachable, NotCached: could not be asked, and what is here does not answer.
        """
        ...

    def read(self, candidate: Candidate, name: str) -> bytes | None:
        """One small file of the build (`metadata.json`), or None when the build has no such file."""
        ...

    def fetch(self, candidate: Candidate, into: Path) -> None:
        """Copy every file of the build below `into`, which exists and is empty."""
        ...


class Verifier(Protocol):
    """One reason to trust a directory."""

    def check(self, candidate: Candidate, metadata: Metadata, staged: Path) -> Evidence:
        """Say why `staged` is fine, or raise `Refused` naming every problem."""
        ...


class Prover(Protocol):
    """Compares a kernel with the original it would replace. `original(module, *args)` and `candidate.forward` are unbound."""

    def equivalent(
        self, site: Site, module: nn.Module, original: Callable[..., Any], candidate: Implementation, run: Run
    ) -> Verdict:
        """Before the swap, on random tensors made by `site.row.probe`: do the two compute the same thing?"""
        ...

    def first_call(
        self,
        site: Site,
        module: nn.Module,
        original: Callable[..., Any],
        candidate: Implementation,
        run: Run,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        anew: bool = False,
    ) -> tuple[Any, Verdict]:
        """On the real tensors of the first call. The output is the original's when the kernel is refused.

        `anew`: whatever was found before, for the calls that `check="always"` and `"sample:N"` pick; passed only for them.
        """
        ...


class Chooser(Protocol):
    """Picks among candidates that all may serve. Without one, the first of a row does."""

    def choose(
        self,
        site: Site,
        module: nn.Module,
        original: Callable[..., Any],
        accepted: Sequence[tuple[str, Implementation, Verdict]],
        run: Run,
    ) -> Choice:
        """What serves (None: the original), its verdict, and what of `accepted` was passed over with the reason.

        `accepted`: spec, implementation and the verdict of its proof, in the order of the table; may be empty.
        """
        ...


class Progress(Protocol):
    """Long work reports here; the CLI draws it, the library default is silent."""

    def __call__(self, step: str, done: float, total: float) -> None:
        """`done` of `total` in any unit; `total` 0 when unknown; `done == total` ends the step."""
        ...
