"""What candidates for a model's attention are timed on: prompts of several lengths, and one token over a cache.

Heads, sizes and scale are those of the model's own attention modules, by the names that Transformers gives them. Where some layers
see a window of tokens and others all of them, each kind is measured, and may be served, by itself.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..slots.attention_calls import looked_at
from ..slots.attention_kernels import serves
from ..types import Implementation, Run, Site
from . import keys, rotary, samples
from .check import Check
from .course import ELSEWHERE, TORCH, Given, Sides, backward, by_torch
from .inputs import Subject

PROMPTS = (64, 512, 4096)
"""Bounds of the buckets of prompts, in tokens."""
KEYS = 1024
"""Bound between a short cache and a long one, in tokens."""
MOST_SCORES = {"cuda": 1 << 31, "cpu": 1 << 26}
"""Query times key, over heads and sequences, of the largest call that is measured: a second or so."""


@dataclass(frozen=True, slots=True)
class Form:
    """A bucket of calls, and the call that stands for it."""

    name: str
    queries: int
    keys: int
    batch: int = 1
    static: bool = False
    """One token over a cache of fixed size, of which `LIVE` holds tokens."""


LIVE = 0.75
_MANY = 8
FORMS = (
    Form("prompts to 64", 48, 48),
    Form("prompts of 65-512", 384, 384),
    Form("prompts of 513-4096", 2048, 2048),
    Form("prompts over 4096", 8192, 8192),
    *(
        Form(f"{who}, {cache} {size}", 1, keys, batch, static)
        for static, cache in ((False, "cache"), (True, "static cache"))
        for batch, who in ((1, "1 token"), (_MANY, "a batch of tokens"))
        for keys, size in ((512, f"to {KEYS}"), (4096, f"over {KEYS}"))
    ),
)
ORDER = (4, 1, 5, 2, 0, 6, 8, 7, 9, 10, 3, 11)
"""Forms by how soon they are worth knowing: a step, a prompt, then what lies between and beyond."""


def bucket(query: Tensor, key: Tensor, mask: Tensor | None) -> int:
    """The form that a call is of. Plain comparisons: compiled code guards on them."""
    queries = query.shape[2]
    if queries > 1:
        for i, bound in enumerate(PROMPTS):
            if queries <= bound:
                return i
        return len(PROMPTS)
    static = mask is not None and mask.dtype is torch.int32
    return 4 + 4 * static + 2 * (query.shape[0] > 1) + (key.shape[2] > KEYS)


def of(site: Site, part: nn.Module, original: Callable[..., Any], run: Run) -> AttentionCourse | None:
    """The course for one configuration; None: no module of it says how many heads it has."""
    kinds = _kinds(part)
    return AttentionCourse(site, tuple(kinds.values()), original, run) if kinds else None


def _kinds(part: nn.Module) -> dict[bool, nn.Module]:
    """One attention module for each kind of layer, by whether it has a window; all tokens first."""
    found: dict[bool, nn.Module] = {}
    for module in _attentions(part):
        found.setdefault(getattr(module, "sliding_window", None) is not None, module)
    return dict(sorted(found.items()))


def _attentions(part: nn.Module) -> Iterator[nn.Module]:
    for module in part.modules():
        if (
            "Attention" in type(module).__name__
            and hasattr(module, "is_causal")
            and getattr(module, "config", None) is part.config
        ):
            yield module


class AttentionCourse:
    """See `course.Course`. The bucket of a call is its form, and after those of layers that see everything come those of a window."""

    unit: str = "call"

    def __init__(self, site: Site, modules: tuple[nn.Module, ...], original: Callable[..., Any], run: Run) -> None:
        self.site, self.modules, self.original, self.run = site, modules, original, run
        windowed = [len(modules) > 1 and i == len(modules) - 1 for i in range(len(modules))]
        self.names = tuple(f"{'window: ' if w else ''}{form.name}" for w in windowed for form in FORMS)
        self.at = tuple(f"{form.batch}x{form.queries} over {form.keys}" for _ in modules for form in FORMS)
        self.order = tuple(i + k * len(FORMS) for i in ORDER for k in range(len(modules)))

    def _here(self, bucket: int) -> tuple[nn.Module, Form]:
        kind, form = divmod(bucket, len(FORMS))
        return self.modules[kind], FORMS[form]

    def about(self) -> Any:
        """See `Course`."""
        sizes = [_size(module) for module in self.modules]
        return [keys.subject(self.site, module, self.original) for module in self.modules], sizes

    def occurs(self, bucket: int) -> bool:
        """See `Course`."""
        module, form = self._here(bucket)
        heads, few, width, _ = _size(module)
        window = getattr(module, "sliding_window", None)
        beyond = window is not None and form.queries == 1 and form.keys > window  # such a cache holds the window and no more
        step = form.queries == 1 and (self.run.training or not getattr(module, "is_causal", True))
        scores, kind = form.batch * heads * form.queries * form.keys, self.site.device.partition(":")[0]
        most = MOST_SCORES.get(kind, MOST_SCORES["cuda"])
        return not (beyond or step) and scores <= most and form.batch * few * form.keys * width <= samples.MOST

    def like(self, bucket: int) -> int | None:
        """See `Course`. Of forms of one token the shorter cache stands for the longer one."""
        form = bucket % len(FORMS)
        return bucket - 1 if 0 < form <= len(PROMPTS) or (form > len(PROMPTS) and form % 2) else None

    def given(self, bucket: int, salt: int = 0) -> Given:
        """Query (B, HQ, Sq, D), key (B, HK, Sk, D), value (B, HK, Sk, DV), as projections and caches leave them."""
        module, form = self._here(bucket)
        heads, few, width, deep = _size(module)
        subject = Subject(
            self.site,
            module,
            self.original,
            torch.device(self.site.device),
            getattr(torch, self.site.dtype.removeprefix("torch.")),
        )
        query = subject.normal(form.batch, form.queries, heads, width, salt=salt).transpose(1, 2)
        key = subject.normal(form.batch, form.keys, few, width, salt=salt + 31).transpose(1, 2)
        value = subject.normal(form.batch, form.keys, few, deep, salt=salt + 62).transpose(1, 2)
        return (query, key.contiguous(), value.contiguous()) if form.queries == 1 else (query, key, value)

    def sides(self, candidate: Implementation, bucket: int) -> Sides:
        """See `Course`."""
        module, form = self._here(bucket)
        mask, named = self._mask(module, form), _named(module)

        def side(function: Callable[..., Any]) -> Callable[..., Any]:
            def called(query: Tensor, key: Tensor, value: Tensor) -> Any:
                return function(module, query, key, value, mask, **named)

            return backward(called, None, ()) if self.run.training else called

        return side(self.original), side(candidate.forward)

    def differs(self, candidate: Implementation, given: Given, bucket: int, verifier: Check) -> str | None:
        """See `Course`. A large call is looked at in part in float64, and as a whole beside the original."""
        module, form = self._here(bucket)
        mask, named = self._mask(module, form), _named(module)
        if not serves(candidate, module, *given, mask, **named):
            return ELSEWHERE
        tensors = tuple(t.detach().requires_grad_() for t in given) if self.run.training else given
        for args, more in looked_at((*tensors, mask), named, gradients=self.run.training):
            if candidate.origin.candidate.source == TORCH:
                why = by_torch(self.site, None, self.original, candidate, (module, *args), more)
            else:
                _, verdict = verifier.first_call(self.site, module, self.original, candidate, self.run, (module, *args), more)
                why = None if verdict.accepted else verdict.reason
            if why is not None:
                return why
        return None

    def release(self) -> None:
        """See `Course`: nothing is held."""

    def mixture(self, parts: Sequence[Implementation | None], lead: Implementation) -> Implementation:
        """See `Course`. `forward.serving` gives the number of the part that a call goes to, and 0 where that is the original."""
        several, original, forms = len(self.modules) > 1, self.original, len(FORMS)
        used = [p for p in dict.fromkeys(parts) if p is not None]
        functions = tuple(None if p is None else p.forward for p in parts)
        asked = tuple(None if p is None else getattr(p.forward, "serving", None) for p in parts)
        named = tuple(0 if p is None else used.index(p) + 1 for p in parts)  # as `attention_kernels.numbered` counts

        def at(module: Any, query: Tensor, key: Tensor, mask: Any) -> int:
            window = several and getattr(module, "sliding_window", None) is not None
            return bucket(query, key, mask) + forms * window

        def serving(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any) -> int:
            i = at(module, query, key, mask)
            ask = asked[i]
            return named[i] if ask is None or ask(module, query, key, value, mask, *args, **kwargs) else 0

        @functools.wraps(original)
        def forward(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any) -> Any:
            i = at(module, query, key, mask)
            ask, function = asked[i], functions[i]
            if function is None or (ask is not None and not ask(module, query, key, value, mask, *args, **kwargs)):
                function = original
            return function(module, query, key, value, mask, *args, **kwargs)

        forward.serving = serving  # type: ignore[attr-defined]  # asked by whoever counts or checks calls
        return dataclasses.replace(
            lead,
            forward=forward,
            backward=all(p.backward for p in used),
            compiles=all(p.compiles for p in used),
            parts=tuple(parts),
        )

    def _mask(self, module: nn.Module, form: Form) -> Tensor | None:
        """As `attention_masks.with_lengths` makes it."""
        device, window = torch.device(self.site.device), getattr(module, "sliding_window", None)
        if form.static:
            return torch.full((form.batch, 1, 1, 1), int(LIVE * form.keys), dtype=torch.int32, device=device)
        if form.queries == 1 or window is None or form.keys <= window:
            return None
        apart = torch.arange(form.queries, device=device)[:, None] - torch.arange(form.keys, device=device)
        seen: Tensor = (apart >= 0) & (apart < window) if getattr(module, "is_causal", True) else apart.abs() < window
        return seen[None, None]


def _named(module: nn.Module) -> dict[str, Any]:
    """What such a module passes besides tensors."""
    found = {
        "scaling": getattr(module, "scaling", None),
        "sliding_window": getattr(module, "sliding_window", None),
        "softcap": getattr(module, "attn_logit_softcapping", None),
        "s_aux": getattr(module, "sinks", None),
    }
    return {"dropout": 0.0, **{name: value for name, value in found.items() if value is not None}}


def _size(module: nn.Module) -> tuple[int, int, int, int]:
    """Heads of the query and of keys and values, elements of a head of query and key, and of one of the value."""
    about, config = rotary.heads(module), getattr(module, "config", None)
    heads = about.whole[0]
    few = heads // int(getattr(module, "num_key_value_groups", 1) or 1)
    own = (
        getattr(holder, name, None) for name in ("qk_head_dim", "attention_head_size", "head_dim") for holder in (module, config)
    )
    width = next((int(size) for size in own if size), about.size)
    return heads, few, width, int(getattr(module, "v_head_dim", None) or width)
