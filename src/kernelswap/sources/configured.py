"""The sources that a user wants asked, in order: from `kernelswap.toml` or KERNELSWAP_SOURCES.

    [sources]
    order   = ["https://mirror.example/kernels", "hub", "s3://bucket/kernels", "/srv/kernels"]
    seconds = 30            # for finding a kernel, over all of them together

A project's file goes over the user's, and the environment over both. Without any of them there is the hub.
"""

from __future__ import annotations

import difflib
import hashlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import TableError
from ..lock import Lock
from ..types import Progress, Source
from .bundle_file import BundleSource, Compiled
from .bundled import BundledSource
from .chain import Chain
from .directory import DirectorySource
from .environment import Environment
from .folder import FolderSource, Memory
from .folder_transports import transport
from .hub import HubSource
from .overrides import Overrides
from .pinned import Pinned

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = "kernelswap.toml"
HUB = "hub"
_KEYS = "order", "seconds"
_MOST, _MOST_BYTES = 20, 1 << 20


@dataclass(frozen=True, slots=True)
class Order:
    """Which sources, and the seconds for finding a kernel in all of them. `hub` is the hub; the rest is for `transport`.

    Paths in a file are relative to its directory.
    """

    names: tuple[str, ...] = (HUB,)
    seconds: float = 30.0
    origin: str = "the default"


def parse(text: str, *, where: str) -> Order | None:
    """`[sources]` of a `kernelswap.toml`; None where there is none.

    Raises:
        TableError: every problem at once, one a line.
    """
    if len(text) > _MOST_BYTES:
        raise TableError(f"{where}: {len(text)} characters, at most {_MOST_BYTES} are read")
    try:
        table: Any = tomllib.loads(text).get("sources")
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise TableError(f"{where}: not TOML: {e or 'nested too deeply'}") from e
    if table is None:
        return None
    if not isinstance(table, dict):
        raise TableError(f"{where}: sources is not a table")
    problems = []
    for key in table.keys() - set(_KEYS):
        near = difflib.get_close_matches(key, _KEYS, n=1)
        problems.append(f"unknown key {key!a}" + (f", did you mean {near[0]}?" if near else f"; there are {', '.join(_KEYS)}"))
    order, seconds = table.get("order", [HUB]), table.get("seconds", 30)
    if not isinstance(order, list) or not 0 < len(order) <= _MOST or not all(isinstance(n, str) and n.strip() for n in order):
        problems.append(f"order: expected a list of 1 to {_MOST} sources: hub, a path, https://..., s3://...")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= 3600:
        problems.append("seconds: expected a number up to 3600")
    if problems:
        raise TableError("\n".join(f"{where}: [sources] {p}" for p in sorted(problems)))
    return Order(tuple(name.strip() for name in order), float(seconds), where)


def read(*directories: Path | None) -> Order:
    """That of the first directory whose `kernelswap.toml` says anything about it.

    Raises:
        TableError: a file is wrong or cannot be read.
    """
    for directory in directories:
        if directory is None:
            continue
        file = directory / FILE
        try:
            found = parse(file.read_text(encoding="utf-8"), where=str(file))
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as e:
            raise TableError(f"{file} cannot be read: {e}") from e
        if found is not None:
            return replace(found, names=tuple(_from(directory, name) for name in found.names))
    return Order()


def _from(directory: Path, name: str) -> str:
    return name if name == HUB or "://" in name else str(directory / Path(name).expanduser())


def make(
    environment: Environment, order: Order, bundled: BundledSource, *, lock: Lock | None, progress: Progress
) -> dict[str, Source]:
    """The sources by the name that a spec uses. With a bundle, it stands for everything that is not on this machine.

    Raises:
        TableError: the order names something that is no source.
        UnknownKernel, BadMetadata: there is no such bundle, or it is damaged.
    """
    here: Source = bundled
    if environment.bundle is not None:
        bundle = BundleSource.open(environment.bundle)
        hub: Source = bundle
        here = Compiled(bundled, bundle, bundle.about.compiled)
    else:
        names = environment.sources or order.names
        each = [_one(name, environment, progress) for name in names]
        hub = each[0] if len(each) == 1 else Chain(each, order.seconds)
    if lock is not None:  # a branch that moved on since is found at its locked commit
        hub = Pinned(hub, lock)
    if environment.local_kernels:
        hub = Overrides(hub, dict(environment.local_kernels))
    return {"hub": hub, "dir": DirectorySource(), "bundled": here}


def _one(name: str, environment: Environment, progress: Progress) -> Source:
    if name == HUB:
        return HubSource(
            environment.hub_cache,
            endpoint=environment.endpoint,
            offline=environment.offline,
            token=environment.token,
            timeout=environment.timeout,
            progress=progress,
        )
    memory = Memory(environment.cache / "folders" / hashlib.sha256(name.encode()).hexdigest()[:16])
    return FolderSource(transport(name, timeout=environment.timeout), memory, environment.offline, progress)


def hub_of(source: Source | None) -> HubSource | None:
    """The hub in what `make` made, if it is among it."""
    if isinstance(source, Overrides | Pinned):
        return hub_of(source.source)
    if isinstance(source, Chain):
        return next((found for one in source.sources if (found := hub_of(one)) is not None), None)
    return source if isinstance(source, HubSource) else None


def bundle_of(source: Source | None) -> BundleSource | None:
    """The bundle in what `make` made."""
    if isinstance(source, Overrides | Pinned):
        return bundle_of(source.source)
    return source if isinstance(source, BundleSource) else None


def offline(source: Source) -> Source:
    """The same, and no server is asked."""
    if isinstance(source, Overrides | Pinned):
        return replace(source, source=offline(source.source))
    if isinstance(source, Chain):
        return replace(source, sources=tuple(map(offline, source.sources)))
    return replace(source, offline=True) if isinstance(source, HubSource | FolderSource) else source
