"""How weights become those of a layout, and back: what of Transformers' weight conversions a layout's `conversion_mapping` needs.

What is used of Transformers is in `USED`. A way back is never derived from patterns: names and operations are remembered.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch.nn as nn
    from torch import Tensor

USED = (
    ("WeightRenaming", ("rename_source_key", "source_patterns", "target_patterns")),
    ("WeightConverter", ("rename_source_key", "source_patterns", "target_patterns", "operations")),
    ("Concatenate", ("convert", "reverse_op")),
)
"""(class of `transformers.core_model_loading`, what is used of it); none of it is documented."""


class Declined(Exception):
    """Why a layout cannot take the place of these modules; nothing was changed."""


@dataclass(frozen=True, slots=True)
class Step:
    """Weights that become weights of the layout. Names are those below the parent, patterns those of the conversion."""

    sources: Mapping[str, tuple[str, ...]]
    targets: Mapping[str, str]
    operations: tuple[Any, ...] = ()
    """None: it is the same tensor under another name."""
    patterns: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())

    def forth(self, tensors: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
        """The layout's tensors from those of the originals."""
        value: dict[str, Any] = {pattern: [tensors[n] for n in names] for pattern, names in self.sources.items()}
        for operation in self.operations:
            value = _convert(operation, value, self.patterns, config)
        return {name: _one(value.get(pattern), name) for pattern, name in self.targets.items()}

    def back(self, tensors: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
        """The originals' tensors from those of the layout."""
        value: dict[str, Any] = {pattern: [tensors[name]] for pattern, name in self.targets.items()}
        for operation in reversed(self.operations):
            value = _convert(operation.reverse_op, value, self.patterns[::-1], config)
        found: dict[str, Tensor] = {}
        for pattern, names in zip(self.sources, self.sources.values(), strict=True):
            got = value.get(pattern if self.operations else next(iter(self.targets)))
            got = list(got) if isinstance(got, (list, tuple)) else [got]
            if len(got) != len(names) or any(one is None for one in got):
                raise Declined(f"its conversion of {', '.join(names)} cannot be taken back")
            found.update(zip(names, got, strict=True))
        return found


def _convert(operation: Any, value: dict[str, Any], patterns: tuple[tuple[str, ...], tuple[str, ...]], config: Any) -> Any:
    # Theirs run under `no_grad`; a forward that takes weights apart must let gradients through.
    function = inspect.unwrap(type(operation).convert)
    sources, targets = list(patterns[0]), list(patterns[1])
    more = {"full_layer_name": targets[0], "model": None, "config": config, "missing_keys": None}
    return function(operation, dict(value), source_patterns=sources, target_patterns=targets, **more)


def _one(value: Any, name: str) -> Tensor:
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if value is None or isinstance(value, (list, tuple)):
        raise Declined(f"its conversion_mapping makes no single tensor of {name}")
    return value  # type: ignore[no-any-return]  # what conversions are made of


def steps(transforms: Any, names: Sequence[str], prefix: str, first: str, base: str) -> tuple[Step, ...]:
    """Where each of `names` goes; checkpoints' names have `base` and `prefix` before it.

    Raises:
        Declined: not into the layout.
    """
    renamings = [t for t in transforms if not hasattr(t, "operations")]
    converters = [t for t in transforms if hasattr(t, "operations")]
    found: list[Step] = []
    joined: dict[tuple[int, str], dict[str, tuple[str, ...]]] = {}
    for name in names:
        renamed, key, pattern, by = f"{base}{prefix}{name}", "", None, None
        for t in renamings:
            renamed, _ = t.rename_source_key(renamed)
        for by in converters:
            key, pattern = by.rename_source_key(renamed)
            if pattern is not None:
                break
        if pattern is None or by is None:
            found.append(Step({"": (name,)}, {"": _below(renamed, base + prefix, first, name)}))
            continue
        sources = joined.get((id(by), key))
        if sources is None:
            sources = joined[id(by), key] = {}
            found.append(Step(sources, _targets(by, key, base + prefix, first), tuple(by.operations), _patterns(by)))
        sources[pattern] = (*sources.get(pattern, ()), name)
    return tuple(found)


def _patterns(transform: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple(transform.source_patterns), tuple(transform.target_patterns)


def _targets(transform: Any, key: str, prefix: str, first: str) -> dict[str, str]:
    head, *rest = transform.target_patterns
    if rest and head not in key:
        raise Declined(f"its conversion to {', '.join(transform.target_patterns)} is not understood")
    keys = {head: key} | {pattern: key.replace(head, pattern, 1) for pattern in rest}
    return {pattern: _below(one, prefix, first, pattern) for pattern, one in keys.items()}


def _below(key: str, prefix: str, first: str, name: str) -> str:
    below = key.removeprefix(prefix)
    if below == key or not below.startswith(f"{first}."):
        raise Declined(f"its conversion_mapping takes {name} to {key}, which is not in {prefix}{first}")
    return below


def tensors(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Parameters and buffers by name, as `state_dict` would have them; the very objects."""
    found: dict[str, Tensor] = {}
    for name, module in modules.items():
        found |= {f"{name}.{n}": t for n, t in module.state_dict(keep_vars=True).items()}
    return found
