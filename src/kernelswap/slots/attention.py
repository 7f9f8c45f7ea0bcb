"""Attention of a Transformers model, switched by its own setting: `config._attn_implementation`, of the model and of its parts.

The setting becomes a name of our own, under which a function is registered that meets the original at the first real call of
each kind (a prompt, one token, with gradients or not, ...) and from then on calls the kernel. Masks are made in the form that
the kernel reads, which is the original's but for one token over a static cache: there it is how many keys live.

A setting is a `str` that knows what it replaced: pickles hold that, and copies of a model keep the registration for as long as
one of them lives. Nothing of Transformers is imported: who has such a model has done that.
"""

from __future__ import annotations

import itertools
import linecache
import re
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ..types import Choice, Implementation, Kept, Outcome, Prover, Row, Site, Swap, Unasked, Use
from . import attention_calls, attention_masks, batching
from .state import Part, Service, Standing

if TYPE_CHECKING:
    import torch.nn as nn

LAYER = "attention"
SPEC = "kernelswap/attention:flash_attn_forward"
ROW = Row(
    layer=LAYER,
    kind="attention",
    use=(Use(SPEC),),
    rivals=(
        Use("installed://flash-attn:flash_attn_func", on=("cuda",)),
        Use("kernels-community/flash-attn3@1:flash_attn_func", on=("cuda:sm90",)),
        Use("kernels-community/flash-attn2@4:flash_attn_func", on=("cuda",)),
    ),
)
_SETTING = "_attn_implementation_internal"  # behind the property, whose setter reaches into sub-configurations
_SWITCHED = ("sdpa",)

Kernels = Sequence[tuple[str, Implementation | str]]
"""By spec: a kernel that may serve, or why that one may not."""


class Choose(Protocol):
    """Which kernel serves one mode, and what it was chosen by."""

    def __call__(self, site: Site, part: nn.Module, original: Callable[..., Any], kernels: Kernels, *, training: bool) -> Choice:
        """No implementation: the original serves."""
        ...


class Setting(str):
    """The name under which a swapped model's attention is registered."""

    __slots__ = ("__weakref__", "original", "over")
    original: str
    over: bool
    """The swap it belongs to was undone."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Setting:
        return _made(str(self), self.original)

    def __reduce__(self) -> tuple[Any, ...]:  # a saved file needs no kernelswap
        return str, (str(self.original),)


def outcomes(
    model: nn.Module,
    offered: Callable[[Site], Kernels],
    choose: Choose,
    *,
    replacing: bool = False,
    unasked: Unasked | None = None,
) -> list[Outcome]:
    """One for each configuration of `model` that says what computes attention, or one that says why there is none.

    Args:
        model: any module; it is not touched.
        offered: `offered(site)`: what there is for it, one at least.
        choose: `choose(site, part, original, kernels, training=)`: which of them serves one mode. `original` takes masks as a
            swapped model's are made.
        replacing: a swap of ours on it is going to be undone first.
        unasked: where it serves; `None`: it was asked for by name, so wherever it can.
    """
    found = list(settings(model))
    if not found:
        return [Kept(_site(model, "", model), "it is no model of Transformers, whose setting says what computes attention")]
    return [_outcome(model, path, part, offered, choose, unasked, replacing=replacing) for path, part in found]


def _outcome(
    model: nn.Module,
    path: str,
    part: Any,
    offered: Callable[[Site], Kernels],
    choose: Choose,
    unasked: Unasked | None,
    *,
    replacing: bool,
) -> Outcome:
    setting = getattr(part.config, _SETTING)
    if isinstance(setting, Setting) and replacing:
        setting = setting.original
    site = _site(model, path, part)
    reasons = (
        (isinstance(setting, Setting), "it is swapped already; undo that swap first"),
        (isinstance(setting, str) and "/" in setting, f"a kernel that was asked for computes it already: {setting}"),
        (
            setting not in _SWITCHED,
            f"its attention implementation is {setting!r}; what replaces 'sdpa' does not stand in for that",
        ),
        (_asks_by_name(part), f"its code asks whether the setting is {setting!r}, which another name would not answer"),
        (not part._can_set_attn_implementation(), "its attention is written out in the model, not looked up by name"),  # noqa: SLF001  # as Transformers asks
    )
    why = next((why for so, why in reasons if so), None) or (unasked.keeps(part.config, site.device) if unasked else None)
    if why is not None:
        return Kept(site, why)
    kernels, original = offered(site), attention_calls.understanding(_functions()[setting])
    calm, learning = (choose(site, part, original, kernels, training=training) for training in (False, True))
    if unasked is not None and not unasked.trains:
        learning = Choice(None, ((SPEC, "is for training where it is asked for by name"),))
    if calm.implementation is None and learning.implementation is None:
        return Kept(site, _one_reason(calm, learning, kernels), calm.passed)
    return Swap(site, calm, learning)


def _one_reason(calm: Choice, learning: Choice, kernels: Kernels) -> str:
    met = {spec for spec, kernel in kernels if not isinstance(kernel, str)}
    beaten = dict(p for choice in (learning, calm) for p in choice.passed if p[0] in met or p[0] not in {LAYER, *dict(kernels)})
    if met and beaten:
        return "measured, and the original is the fastest: " + "; ".join(f"{spec}: {why}" for spec, why in beaten.items())
    spec, why = calm.passed[0]
    return f"{spec}: {why}"


def settings(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every part of `model` with a configuration of its own, by path."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        config = getattr(module, "config", None)
        known = hasattr(config, _SETTING) and hasattr(module, "set_attn_implementation")
        if known and getattr(config, _SETTING) is not None and id(config) not in seen:
            seen.add(id(config))
            yield path, module


def _asks_by_name(part: Any) -> bool:
    """Whether the file of the model compares its setting with names: for the form of a mask, or which keys are seen."""
    file = getattr(sys.modules.get(type(part).__module__), "__file__", None) or ""
    return any(_BY_NAME.search(line) for line in linecache.getlines(file))


_BY_NAME = re.compile(r"_attn_implementation\s*(?:==|!=|in|not in)[^#]*[\"']sdpa[\"']")


def _site(model: nn.Module, path: str, part: Any) -> Site:
    tensor = next((p for p in part.parameters() if p.is_floating_point()), None)
    return Site(
        path=path,
        kind="attention",
        layer=LAYER,
        target=_target(part),
        device=str(tensor.device) if tensor is not None else "cpu",
        dtype=str(tensor.dtype) if tensor is not None else "torch.float32",
        training=model.training,
        row=ROW,
    )


def _target(part: Any) -> str:
    setting = getattr(getattr(part, "config", None), _SETTING, None)
    setting = setting.original if isinstance(setting, Setting) else setting
    found = _functions().get(setting or "")
    return f"{found.__module__}.{found.__qualname__}" if found is not None else f"{setting or type(part).__qualname__}"


# -- in place -------------------------------------------------------------------------------------------------------


class Switched:
    """The attention of one configuration, and of those below it that had the same setting and no outcome of their own."""

    def __init__(self, part: Part, config: Any, meeting: attention_calls.Meeting, setting: Setting) -> None:
        self.part, self.config, self.meeting, self.setting = part, config, meeting, weakref.ref(setting)
        self.original = getattr(config, _SETTING)

    def conflict(self) -> str | None:
        """Whoever set another implementation since has the last word; that is no conflict."""
        return None

    def restore(self) -> None:
        """The setting is what it was, the very object. Twice is fine."""
        if (setting := self.setting()) is not None:
            setting.over = True
        if isinstance(getattr(self.config, _SETTING), Setting):
            setattr(self.config, _SETTING, self.original)


def install(model: nn.Module, swap: Swap, prover: Prover, *, every: int | None = 0, compiled: bool = False) -> Switched:
    """Switch what `swap` is for.

    Args:
        model: which was planned for.
        swap: of `outcomes`.
        prover: asked at the first call of each kind; at every n-th too where `every` is n > 0; never where it is None.
        every: see `prover`.
        compiled: compiled code may hold the kernel before a call has proved it.
    """
    module: Any = model.get_submodule(swap.site.path)
    standing: Standing = "accepted" if every is None else "open"
    part = Part(swap, Service(swap.inference, standing), Service(swap.training, standing))
    original = getattr(module.config, _SETTING)
    meeting = attention_calls.Meeting(part, _functions()[original], prover, every=every, compiled=compiled)
    name = f"{SPEC.partition(':')[0]} (swap {next(_NUMBERS)})"
    functions, masks = _registries()
    functions.register(name, meeting.function())
    masks.register(name, attention_masks.with_lengths)
    setting = _made(name, original)
    switched = Switched(part, module.config, meeting, setting)
    setattr(module.config, _SETTING, setting)
    return switched


def release(model: nn.Module) -> None:
    """Give every setting of `model` back, whoever switched it; for copies, which no handle knows."""
    for _, part in settings(model):
        setting = getattr(part.config, _SETTING)
        if isinstance(setting, Setting):
            setting.over = True
            setattr(part.config, _SETTING, setting.original)


def _asides(model: Any) -> list[batching.Step]:
    """For each setting of ours in `model`, what puts it aside."""

    def of(config: Any, setting: Setting) -> batching.Step:
        def aside() -> Callable[[], None]:
            setattr(config, _SETTING, setting.original)
            return back

        def back() -> None:
            if not setting.over and getattr(config, _SETTING) == setting.original:
                setattr(config, _SETTING, setting)

        return aside

    found = ((part.config, getattr(part.config, _SETTING)) for _, part in settings(model))
    return [of(config, setting) for config, setting in found if isinstance(setting, Setting)]


_NUMBERS = itertools.count(1)
_LIVING: dict[str, int] = {}
"""How many settings have each registered name."""
_AROUND_BATCHING: list[Callable[[], None]] = []
"""What ends that settings step aside for continuous batching; while one lives."""


def _made(name: str, original: str) -> Setting:
    setting = Setting(name)
    setting.original, setting.over = original, False
    if not _LIVING:
        _AROUND_BATCHING.append(batching.installed(_asides))
    _LIVING[name] = _LIVING.get(name, 0) + 1
    weakref.finalize(setting, _gone, name).atexit = False
    return setting


def _gone(name: str) -> None:
    """The last one takes the registration with it."""
    _LIVING[name] -= 1
    if not _LIVING[name]:
        del _LIVING[name]
        while not _LIVING and _AROUND_BATCHING:
            _AROUND_BATCHING.pop()()
        for registry in _registries():
            type(registry)._global_mapping.pop(name, None)  # noqa: SLF001  # it registers there and has no word for the contrary


def _registries() -> tuple[Any, Any]:
    return (
        sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS,
        sys.modules["transformers.masking_utils"].ALL_MASK_ATTENTION_FUNCTIONS,
    )


def _functions() -> Any:
    module = sys.modules.get("transformers.modeling_utils")
    return {} if module is None else module.ALL_ATTENTION_FUNCTIONS
