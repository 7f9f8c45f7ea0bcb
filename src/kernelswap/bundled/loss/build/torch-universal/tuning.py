"""Which configuration a kernel is launched with: its own formula's, or one that was measured on the device at hand and handed in.

A kernel names the values that its configuration may take (`space`), beside the formula of its default, and asks (`bound`, `choose`)
when it binds a launch, never at a call. Whoever loads this repository may hand in what was measured:

    use(find)       find(kernel, bucket, device) -> {name: value}, or None where nothing was; the first one handed in counts

A bucket says in words what a launch is bound for. A choice that names something else than the kernel does, or a value outside its
space, is none; one that the GPU has no room for gives way to the default. Nothing here reads a file or the environment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Config = dict[str, Any]
Find = Callable[[str, str, int], "Mapping[str, Any] | None"]


@dataclass(frozen=True)
class Space:
    """What one kernel may be launched with."""

    caches: tuple[dict[Any, Any], ...]
    """Where its bound launches are kept."""
    axes: Mapping[str, tuple[Any, ...]]
    also: tuple[Mapping[str, Any], ...]
    """Changes of several values at once that are worth a try."""
    needs: Mapping[str, str]
    """Of a name, the one without which (0, False) it changes nothing."""

    def holds(self, default: Config, change: Mapping[str, Any]) -> bool:
        """Whether `change` of `default` is inside."""
        return all(
            name in default and (_same(value, default[name]) or any(_same(value, v) for v in self.axes.get(name, ())))
            for name, value in change.items()
        )

    def neighbours(self, config: Config) -> Iterator[Config]:
        """Every configuration that differs from this one in one value that matters."""
        for name, values in self.axes.items():
            if name in config and config.get(self.needs.get(name, ""), True):
                yield from ({**config, name: value} for value in values if not _same(value, config[name]))

    def reduced(self, config: Config) -> Config:
        """The same without what changes nothing, so that equal configurations compare equal."""
        return {name: value for name, value in config.items() if config.get(self.needs.get(name, ""), True)}


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)


SPACES: dict[str, Space] = {}
serving: dict[tuple[str, str, int], Config] = {}
"""Kernel, bucket and device of every launch that was bound with a measured choice, and that choice."""
_find: list[Find] = []
_trials: dict[str, Trial] = {}


def space(
    kernel: str, *caches: dict[Any, Any], also: Sequence[Mapping[str, Any]] = (), needs: Mapping[str, str] | None = None,
    **axes: tuple[Any, ...],
) -> None:  # fmt: skip
    """Name the values that the configuration of `kernel` may take besides its default's."""
    SPACES[kernel] = Space(caches, axes, tuple(also), needs or {})


def use(find: Find) -> None:
    """Ask `find` for what was measured. What is bound already stays; where one was handed in before, that one is asked."""
    if not _find:
        _find.append(find)


def choose(kernel: str, default: Config, bucket: str, device: int) -> Config:
    """`default`, or `default` with what was measured for this bucket on this device."""
    trial = _trials.get(kernel)
    if trial is not None:
        return trial.of(bucket, default)
    found = _find[0](kernel, bucket, device) if _find else None
    if not found or not SPACES[kernel].holds(default, found):
        return default
    serving[kernel, bucket, device] = dict(found)
    return {**default, **found}


def bound(kernel: str, default: Config, bucket: str, device: int, make: Callable[[Config], Any]) -> Any:
    """`make` of what is chosen, or of `default` where the GPU cannot run that."""
    chosen = choose(kernel, default, bucket, device)
    if chosen is default or kernel in _trials:
        return make(chosen)
    try:
        return make(chosen)
    except _unfit():
        serving.pop((kernel, bucket, device), None)
        return make(default)


def _unfit() -> Any:
    """What Triton raises for a kernel that is too much for a GPU, or for the assembler."""
    try:
        from triton.errors import TritonError
    except ImportError:  # older Triton
        from triton.runtime.errors import OutOfResources as TritonError
    return TritonError


class Trial:
    """While it is entered, `kernel` is bound with `change` of its default, whatever was measured; before and after as ever.

    What it has bound is kept from one time to the next, so that two trials may take turns.
    """

    def __init__(self, kernel: str, change: Mapping[str, Any], bucket: str | None = None) -> None:
        """`bucket`: the only one that is changed; by default all that are met."""
        self.kernel, self.change, self.bucket = kernel, dict(change), bucket
        self.defaults: dict[str, Config] = {}
        """By the buckets that were asked for."""
        self._mine: list[dict[Any, Any]] = [{} for _ in SPACES[kernel].caches]
        self._others: list[dict[Any, Any]] = []

    def of(self, bucket: str, default: Config) -> Config:
        self.defaults[bucket] = default
        if self.bucket not in {None, bucket}:
            return default
        return {**default, **{name: value for name, value in self.change.items() if name in default}}

    def __enter__(self) -> Trial:
        if self.kernel in _trials:
            raise RuntimeError(f"{self.kernel} is being tried already")
        _trials[self.kernel] = self
        self._others = self._exchanged(self._mine)
        return self

    def __exit__(self, *_: object) -> None:
        del _trials[self.kernel]
        self._mine = self._exchanged(self._others)

    def _exchanged(self, into: Sequence[dict[Any, Any]]) -> list[dict[Any, Any]]:
        caches = SPACES[self.kernel].caches
        held = [dict(cache) for cache in caches]
        for cache, content in zip(caches, into, strict=True):
            cache.clear()
            cache.update(content)
        return held


def size(n: int, *bounds: int) -> str:
    """The range that a count falls into, in words: `1-64`, `65-4096`, `over 4096` of the bounds 64 and 4096."""
    low = 1
    for bound_ in bounds:
        if n <= bound_:
            return f"{low}-{bound_}"
        low = bound_ + 1
    return f"over {bounds[-1]}"
