"""Which Swapper serves, and the variations of it that calls ask for: offline, from a lock, without a look at architectures."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

from .. import api
from ..lock import Lock
from ..sources import configured
from ..sources.overrides import Overrides
from ..sources.pinned import Pinned
from ..types import Prover, Source

_lock = threading.RLock()
_given: list[api.Swapper] = []
_varied: weakref.WeakKeyDictionary[api.Swapper, dict[Hashable, api.Swapper]] = weakref.WeakKeyDictionary()


def use(swapper: api.Swapper | None) -> None:
    """Serve everything from `swapper`; `None`: from the default one."""
    with _lock:
        _given[:] = [swapper] if swapper is not None else []


def swapper() -> api.Swapper:
    """The Swapper that serves."""
    with _lock:
        return _given[0] if _given else api.default()


def varied(*, offline: bool = False, lock: Lock | None = None, check_arch: bool = True) -> api.Swapper:
    """The Swapper that serves, or one like it with another hub or machine; the same one for the same arguments."""
    base = swapper()
    offline = offline and not base.environment.offline
    if not offline and lock is None and check_arch:
        return base
    with _lock:
        made = _varied.setdefault(base, {})
        key = (offline, lock, check_arch)
        if key not in made:
            sources = dict(base.sources)
            if "hub" in sources:
                sources["hub"] = _hub(sources["hub"], offline=offline, lock=lock)
            machine = base.machine if check_arch else replace(base.machine, devices=())
            made[key] = like(base, sources=sources, machine=machine)
        return made[key]


def like(base: api.Swapper, **other: Any) -> api.Swapper:
    """A Swapper that shares store, verifiers and verdicts with `base`, except for what `other` says."""
    given = {
        "sources": base.sources,
        "verifiers": base.verifiers,
        "store": base.store,
        "cache": base.environment.cache,
        "offline": base.environment.offline,
        **other,
    }
    return api.Swapper(**given)


def for_layers(prover: Callable[[Prover], Prover]) -> api.Swapper:
    """The one whose table is empty: what is registered with `register_kernel_mapping` is all that it knows.

    Args:
        prover: makes its prover from that of the Swapper that serves.
    """
    base = swapper()
    with _lock:
        made = _varied.setdefault(base, {})
        if "layers" not in made:
            made["layers"] = like(base, machine=base.machine, table=(), prover=prover(base.prover))
        return made["layers"]


def _hub(source: Source, *, offline: bool, lock: Lock | None) -> Source:
    """Overrides stay outermost: LOCAL_KERNELS stands in for what is locked, too."""
    if isinstance(source, Overrides):
        return replace(source, source=_hub(source.source, offline=offline, lock=lock))
    source = configured.offline(source) if offline else source
    return source if lock is None else Pinned(source, lock)
