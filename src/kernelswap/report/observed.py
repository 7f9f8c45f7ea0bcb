"""What a short run of a model measured, as values. Whoever measures makes them; the report shows them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Speed:
    """One kind of site at one shape: original and kernel in turns, seconds per call."""

    layer: str
    original: str
    """Name of the class or function."""
    kernel: str
    """Layer and build that were measured."""
    shape: str
    """What the call looked like, in a word: `prefill`, `decode`, `256 rows`."""
    rows: int
    """Rows of the call; a row is the last dimension of its first tensor."""
    seconds_original: float
    """Medians."""
    seconds_kernel: float
    speedup: float
    """Median over the turns' own ratios; above 1 the kernel is faster."""
    low: float
    """Quartiles of those ratios."""
    high: float
    bytes: int | None = None
    """Least traffic with memory: inputs, outputs and parameters once each. None: arithmetic, not memory, is the limit."""
    width: int | None = None
    """Of the last dimension."""


@dataclass(frozen=True, slots=True)
class Step:
    """The whole model in one phase, without and with kernels, seconds."""

    phase: str
    """`prefill`, `decode`, `forward`, `training`."""
    seconds_original: float
    seconds_kernel: float
    speedup: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Share:
    """The part of one phase of the original model that was spent inside one module or function."""

    path: str
    name: str
    """Of the function that the module looks up; empty for the module itself."""
    phase: str
    share: float
    """0 to 1, of the whole model's time; what is inside the module is included."""
    calls: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """A kernel that was refused on the tensors of this run."""

    path: str
    layer: str
    reason: str


@dataclass(frozen=True, slots=True)
class Observed:
    """A short run, measured."""

    how: str
    """One sentence: on what, with how many threads, how long."""
    speeds: tuple[Speed, ...] = ()
    steps: tuple[Step, ...] = ()
    shares: tuple[Share, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    bandwidth: float | None = None
    """Bytes a second that a copy of this device's memory reaches, reading and writing; the roof of what only moves memory."""
