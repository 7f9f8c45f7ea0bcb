"""Attention of a Transformers model, switched by its own setting: `config._attn_implementation`, of the model and of its parts.

The setting becomes a name of our own, under which a function is registered that meets the original at the first real call of
each kind (a prompt, one token, with gradients or not, ...) and from then on calls the kernel. Masks are made in the form that
the kernel reads, which is the original's but for one token over a static cache: there it is how many keys live.

A setting is a `str` that knows what it replaced: pickles hold that, and copies of a model keep the registration for as long as
one of them lives. Nothing of Transformers is imported: who has such a model has done that.
"""

from __future__ import annotations

import dataclasses
import itertools
import linecache
import re
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..types import Choice, Implementation, Kept, Outcome, Prover, Row, Run, Site, Swap, Unasked, Use, Verdict
from . import attention_masks, batching, check, forwards
from .state import Part, Service, Standing

if TYPE_CHECKING:
    import torch.nn as nn
    from torch import Tensor

LAYER = "attention"
SPEC = "kernelswap/attention:flash_attn_forward"
ROW = Row(layer=LAYER, kind="attention", use=(Use(SPEC),))
_SETTING = "_attn_implementation_internal"  # behind the property, whose setter reaches into sub-configurations
_SWITCHED = ("sdpa",)
SMALL = 1 << 22
"""Elements of a tensor, and 16 times as many scores, up to which a call is proved as it is; of a larger one a part."""
ROWS = 512  # of such a part

Function = Callable[..., Any]
Provide = Callable[[str, str], "Implementation | str"]


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


def outcomes(model: nn.Module, provide: Provide, *, replacing: bool = False, unasked: Unasked | None = None) -> list[Outcome]:
    """One for each configuration of `model` that says what computes attention, or one that says why there is none.

    Args:
        model: any module; it is not touched.
        provide: `provide(spec, device)`: the kernel, or why not.
        replacing: a swap of ours on it is going to be undone first.
        unasked: where it serves; `None`: it was asked for by name, so wherever it can.
    """
    found = list(settings(model))
    if not found:
        return [Kept(_site(model, "", model), "it is no model of Transformers, whose setting says what computes attention")]
    return [_outcome(model, path, part, provide, unasked, replacing=replacing) for path, part in found]


def _outcome(model: nn.Module, path: str, part: Any, provide: Provide, unasked: Unasked | None, *, replacing: bool) -> Outcome:
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
    kernel = provide(SPEC, site.device)
    if isinstance(kernel, str):
        return Kept(site, f"{SPEC}: {kernel}", ((SPEC, kernel),))
    kernel = dataclasses.replace(kernel, compiles=True)  # it goes by torch's operators there, which its tests cover
    choice = Choice(kernel, verdict=Verdict(accepted=True, reason="to be proved on its first real calls"))
    idle = Choice(None, ((SPEC, "is for training where it is asked for by name"),))
    return Swap(site, choice, choice if unasked is None or unasked.trains else idle)


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

    def __init__(self, part: Part, config: Any, meeting: _Meeting, setting: Setting) -> None:
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
    meeting = _Meeting(part, _functions()[original], prover, every=every, compiled=compiled)
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


# -- a call ---------------------------------------------------------------------------------------------------------


class _Meeting:
    """Original and kernel: which one answers."""

    def __init__(self, part: Part, original: Function, prover: Prover, *, every: int | None, compiled: bool) -> None:
        kernel = part.inference.kernel
        assert kernel is not None  # `outcomes` made it
        self.part, self.original, self.kernel = part, original, kernel
        self.prover, self.every, self.compiled = prover, every, compiled
        self.met: set[Any] = set()
        self.counting = False
        self.lock, self.inside = threading.RLock(), threading.local()

    def function(self) -> Function:
        """What Transformers calls."""
        part, kernel, original, met = self.part, self.kernel.forward, self.original, self.met
        tracing, never = forwards.tracing_now(), self.every is None

        def attention(
            module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
        ) -> Any:
            service = part.training if module.training else part.inference
            idle = service.choice.implementation is None or service.standing == "refused"
            if tracing():
                trusted = not idle and (service.standing == "accepted" or self.compiled)
                return (kernel if trusted else original)(module, query, key, value, attention_mask, *args, **kwargs)
            if idle or kwargs.get("cache") is not None:
                if self.counting:
                    part.count(by_kernel=False)
                return original(module, query, key, value, _written_out(attention_mask, key), *args, **kwargs)
            part.calls += 1
            if not never and (self.every or _kind(module, query, key, attention_mask) not in met):
                return self.meet(service, module, (query, key, value, attention_mask, *args), kwargs)
            if self.counting:
                part.count(by_kernel=True)
            return kernel(module, query, key, value, attention_mask, *args, **kwargs)

        return attention

    def meet(self, service: Service, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call, checked where that is due."""
        gradients = forwards.wants_gradients(args[:3])
        kind = _kind(module, args[0], args[1], args[3])
        output, by_kernel = check.UNANSWERED, True
        with self.lock:
            due = kind not in self.met or (bool(self.every) and self.part.calls % (self.every or 1) == 0)
            if due and (getattr(self.inside, "a_check", False) or check.nothing_to_compare((args, kwargs))):
                return self.by_original(module, *args, **kwargs)
            if due:
                self.inside.a_check = True
                try:
                    output, verdict = self.verdict(module, args, kwargs, gradients=gradients, anew=kind in self.met)
                finally:
                    self.inside.a_check = False
                self.met.add(kind)
                service.settle(verdict, whole=True)
                by_kernel = verdict.accepted
                if self.part.required and not by_kernel:
                    raise check.required(self.part, self.kernel, verdict)
        if self.counting:
            self.part.count(by_kernel=by_kernel)
        if output is not check.UNANSWERED:
            return output
        return (self.kernel.forward if by_kernel else self.by_original)(module, *args, **kwargs)

    def by_original(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any) -> Any:
        """What served before, which knows no lengths."""
        return self.original(module, query, key, value, _written_out(mask, key), *args, **kwargs)

    def verdict(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, gradients: bool, anew: bool
    ) -> tuple[Any, Verdict]:
        """The output, where the check has one that may be the answer, and what was found."""
        run, in_the_open = Run(training=gradients), gradients or module.training or bool(check.modes())
        more = {"anew": True} if anew else {}
        calls = [(args, kwargs)] if _small(args) else [_part(args, kwargs), *([] if gradients else [(args, kwargs)])]
        output, verdict = check.UNANSWERED, Verdict(accepted=True, reason="")
        worst = verdict
        try:
            with check.aside(str(args[0].device)):
                for given, named in calls:
                    site, kernel = self.part.site, self.kernel
                    output, verdict = self.prover.first_call(
                        site, module, self.by_original, kernel, run, (module, *given), named, **more
                    )
                    if not verdict.accepted:
                        return check.UNANSWERED, verdict
                    worst = verdict if worst.error_kernel is None else worst
        except Exception as e:  # noqa: BLE001  # a kernel, or a check, may raise anything; the reason is kept
            return check.UNANSWERED, Verdict(accepted=False, reason=f"raised {type(e).__name__} while being checked: {e}")
        whole = len(calls) == 1 or not gradients
        return (output if whole and not in_the_open else check.UNANSWERED), worst


def _kind(module: Any, query: Tensor, key: Tensor, mask: Any) -> tuple[Any, ...]:
    """What calls have in common that one check stands for."""
    return (
        query.shape[2] == 1,
        query.shape[2] == key.shape[2],
        None if mask is None else (mask.dtype, mask.shape[-1] == 1),
        query.dtype,
        query.device,
        query.requires_grad,
        module.training,
        getattr(module, "is_causal", True),
        getattr(module, "sliding_window", None) is None,
    )


def _written_out(mask: Any, key: Tensor) -> Any:
    """A mask that everybody reads: of lengths, which keys take part, bool (B, 1, 1, keys)."""
    import torch

    if mask is None or mask.dtype is not torch.int32 or mask.ndim != 4:
        return mask
    live = torch.arange(key.shape[2], device=key.device) < mask[..., :1]
    return live if mask.shape[-1] == 1 else live & (mask[..., 1:] != 0)


def _small(args: Sequence[Any]) -> bool:
    query, key = args[0], args[1]
    scores = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
    return bool(max(query.numel(), key.numel(), args[2].numel()) <= SMALL and scores <= 16 * SMALL)


def _part(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The first sequence, the first head of the keys with the query heads that share it, and of a prompt the first rows."""
    query, key, value, mask, *rest = args
    if kwargs.get("position_bias") is not None or kwargs.get("cu_seq_lens_q") is not None:
        return args, kwargs
    group, queries, keys = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    rows = min(queries, ROWS)
    if rows < queries:
        # as many keys more than queries as there were, if any: which of them a query sees goes by that
        keys = rows if keys == queries else keys if mask is not None else min(keys, rows + 1)
    if mask is not None:  # lengths have a column more than there are keys
        mask = mask[:1] if not mask.is_floating_point() and mask.element_size() > 1 else mask[:1, :group, :rows, :keys]
    named = {**kwargs, "s_aux": kwargs["s_aux"][:group]} if kwargs.get("s_aux") is not None else kwargs
    return (query[:1, :group, :rows], key[:1, :1, :keys], value[:1, :1, :keys], mask, *rest), named
