"""One model of Transformers: kernels on, off, in another mode. What cannot be had is said in one line for each reason."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ... import api, layers, spec, table
from ... import mode as modes
from ...errors import KernelSwapError, ModeError, Refused, Tampered, UndoConflict
from ...provider import Terms
from ...slots import module as module_slot
from ...sources.environment import Environment
from ...types import Kept, Mode, Outcome, Swap, Use
from . import choices, layouts, unasked
from . import wanted as wanting
from .config import KernelConfig
from .mapping import mode_of

if TYPE_CHECKING:
    import torch.nn as nn

log = logging.getLogger("kernelswap.transformers")


@dataclass
class State:
    """What was asked for one model."""

    config: KernelConfig | None = None
    mode: Mode | None = None
    """As `Swapper.swap` takes it."""
    trust: bool = False
    attention: list[tuple[Any, str]] = field(default_factory=list)
    """Models whose attention was switched, and what they had before."""


class Switch:
    """Kernels for models, by one Swapper.

    Args:
        swapper: makes the swaps; `None`: the default one, made when first needed.
        build: what to do about bundled kernels that are not compiled on this machine yet; see `Swapper.swap`. Whoever writes
            `use_kernels=True` has asked for kernels, so by default the first one waits (some twenty seconds, once).
    """

    def __init__(self, swapper: api.Swapper | None = None, *, build: str = "wait") -> None:
        self._swapper, self.build = swapper, build
        self._states: weakref.WeakKeyDictionary[nn.Module, State] = weakref.WeakKeyDictionary()
        self._said: set[str] = set()
        self._lock = threading.RLock()
        self.choices = choices.Choices()
        """What is known of the attention settings of models."""

    @property
    def swapper(self) -> api.Swapper:
        """The Swapper that serves."""
        return self._swapper or api.default()

    def is_by(self, swapper: api.Swapper) -> bool:
        """Whether `swapper` serves."""
        return self._swapper is swapper

    def disabled(self) -> str | None:
        """Why no kernel may be used in this process, or `None`. The environment is read anew: scripts set it late."""
        return Environment.read(os.environ).disabled or self.swapper.environment.disabled

    def is_on(self, model: nn.Module) -> bool:
        """Whether kernels were asked for: for this model, a part of it, or the model that it is a copy of."""
        return (
            model in self._states
            or next(iter(module_slot.swapped(model)), None) is not None
            or next(layouts.layouts(model), None) is not None
        )

    def on(self, model: nn.Module, config: Any = None, mode: Any = None, *, trust: bool = False) -> None:
        """Give `model` the kernels that the table and `config` name. What it had before is taken back first.

        Args:
            model: any `nn.Module`.
            config: a KernelConfig, or a mapping; `None`: the one that this model had.
            mode: INFERENCE or TRAINING, each with or without TORCH_COMPILE, of any library; `None`: follows `train()` and
                `eval()`. So does INFERENCE: a kernel that only infers never serves a module in training. With TRAINING only
                kernels with a backward serve, in `eval()` as well. TORCH_COMPILE is kept over `train()` and `eval()`.
            trust: vouch for the publishers of whatever the config names.

        Raises:
            TableError: the config makes no sense for this model.
            ModeError: the mode makes no sense.
            Refused, Tampered: trust is at stake. In all cases the model is as it was.
        """
        with self._lock:
            former = self._states.get(model, State())
            config = KernelConfig.of(config) if config is not None else former.config
            state = State(config, _live(mode), trust or (former.trust and config is former.config))
            why = self.disabled()
            if why is not None:
                self._say(f"kernels are switched off: {why}")
                return
            before = self._held(model)
            try:
                self._swap(model, state, former)
            except BaseException as e:
                if self._held(model) != before:
                    self._back(model)
                    if model in self._states:
                        self._swap(model, former, State())
                if not isinstance(e, UndoConflict) or model not in self._states:
                    raise
                # Something (torch.compile, hooks of another library) sits on top: what is there goes on.
                self._say(f"the kernels of this {type(model).__name__} stay as they were: {e.reason}")

    @staticmethod
    def _held(model: nn.Module) -> tuple[list[str], bool]:
        return [path for path, _ in layouts.layouts(model)], next(iter(module_slot.swapped(model)), None) is not None

    def _back(self, model: nn.Module) -> None:
        """Kernels out, then the modules back that layouts replaced."""
        self.swapper.unkernelize(model)
        layouts.unfuse(model)

    def _swap(self, model: nn.Module, state: State, former: State) -> None:
        if next(layouts.layouts(model), None) is not None:  # what a config names is what the model was
            self._back(model)
        inherit = state.config is None or state.config.inherit_mapping
        loss = unasked.loss_rows() if inherit and self.swapper.table == table.default() else ()
        wanted = wanting.want(
            model, state.config, (*self.swapper.table, *loss), has_layer=self._has_layer(state), layout_of=self._layout_of(state)
        )
        self._fuse(model, wanted)
        with self._without_attention(former):
            applied = self.swapper.swap(
                model,
                table=wanted.rows,
                inherit=inherit,
                loss=() if unasked.the_loss_is_named(wanted) else loss,
                attention=bool(loss) and unasked.attention(model, wanted, self.swapper.machine, self.choices.chosen),
                prefer=wanted.prefer,
                skip=wanted.skip,
                mode=state.mode,
                hub=True,
                build=self.build,
                trust=True if state.trust else wanted.trust,
                progress=self._progress,
            )
        self._states[model] = state
        self._attention(model, wanted, state)
        for line in (*wanted.notes, *lines(applied.outcomes, wanted.named)):
            self._say(line)
        idle = {o.site.path for o in applied.outcomes if isinstance(o, Kept)}
        layouts.unfuse(model, [path for path, _ in layouts.layouts(model) if path in idle])

    def _fuse(self, model: nn.Module, wanted: wanting.Wanted) -> None:
        """Layouts into the model; one line for each reason why one stays out."""
        if not wanted.fused:
            return
        self.swapper.unkernelize(model)
        kept: dict[str, dict[str, int]] = {}
        single = [fuse.path for fuse in wanted.fused if fuse.single]
        made: dict[str, Any] = {}
        why: str | None = "how it was made is not known"
        try:
            made = layouts.constructed(model, single) if single else {}
        except layouts.Declined as e:
            why = str(e)
        for fuse in wanted.fused:
            found = why
            if not fuse.single or fuse.path in made:
                found = layouts.attempt(model, fuse.parent, fuse.names, fuse.layout, made.get(fuse.path))
            if found is not None:
                counts = kept.setdefault(f"{fuse.use.spec}: {found}", {})
                counts[fuse.layer] = counts.get(fuse.layer, 0) + 1
        for reason, counts in kept.items():
            wanted.notes.append(f"{reason}; PyTorch goes on for {', '.join(f'{layer} ({n})' for layer, n in counts.items())}")
        taken = {type(layout).__name__ for _, layout in layouts.layouts(model)}
        wanted.rows = [
            row
            for row in wanted.rows
            if not row.targets or row.targets[0] not in {f.layout.__name__ for f in wanted.fused} - taken
        ]

    def off(self, model: nn.Module) -> None:
        """Give `model` back as it was.

        Raises:
            UndoConflict: something wrapped a module since; undo that first. Nothing was changed.
        """
        with self._lock:
            self._back(model)
            self._restore_attention(self._states.pop(model, State()))

    def load(self, text: str, *, trust: bool = False) -> Any:
        """The module of a kernel, for code of Transformers that calls its functions.

        Raises:
            Refused: kernels are switched off; else what `Swapper.load` raises.
        """
        why = self.disabled()
        if why is not None:
            raise Refused(f"kernels are switched off: {why}", asked=f"loading {text}")
        return self.swapper.load(text, trust=trust)

    def _attention(self, model: Any, wanted: wanting.Wanted, state: State) -> None:
        """Attention kernels that the config names for classes of attention modules: for the model, as `attn_implementation`."""
        device = str(next((p.device for p in model.parameters()), "cpu"))
        for name, uses in wanted.attention:
            before = model.config._attn_implementation  # noqa: SLF001  # its only name
            misfits = [table.misfit(use, device, self.swapper.machine) for use in uses]
            for text in [wanting.attention_spec(use) for use, why in zip(uses, misfits, strict=True) if why is None]:
                if self._attend(model, name, text, trust=state.trust or bool(wanted.trust)):
                    state.attention.append((weakref.ref(model), before))
                    break
            if None not in misfits:
                self._say(f"{name}: {wanting.attention_spec(uses[0])} {misfits[0]}; attention stays {before}")

    def _attend(self, model: Any, name: str, text: str, *, trust: bool) -> bool:
        """Whether `text` computes attention now; a line says why it does not."""
        try:
            with choices.ours():
                model.set_attn_implementation(text, allow_all_kernels=trust)
        except (Refused, Tampered):
            raise
        except (KernelSwapError, ImportError, ValueError, OSError) as e:
            reason = e.reason if isinstance(e, KernelSwapError) else str(e).partition("\n")[0]
            self._say(f"{name}: {text}: {reason}; attention stays {model.config._attn_implementation}")  # noqa: SLF001  # its only name
            return False
        return bool(model.config._attn_implementation == text)  # noqa: SLF001  # same

    @staticmethod
    def _restore_attention(state: State) -> list[tuple[Any, str, str]]:
        """What was switched: the model, what it had before, and what it had until now."""
        gone = []
        while state.attention:
            ref, before = state.attention.pop()
            if (model := ref()) is not None:
                gone.append((model, before, model.config._attn_implementation))  # noqa: SLF001  # its only name
                with choices.ours():
                    model.set_attn_implementation(before)
        return gone

    @contextlib.contextmanager
    def _without_attention(self, state: State) -> Iterator[None]:
        """The attention of `state` is taken back, for good unless what follows fails."""
        gone = self._restore_attention(state)
        try:
            yield
        except BaseException:
            for model, before, text in reversed(gone):
                with choices.ours():
                    model.set_attn_implementation(text)
                state.attention.append((weakref.ref(model), before))
            raise

    def _layout_of(self, state: State) -> wanting.LayoutOf:
        trust: Any = state.trust or [name for entry in state.config.entries() for name in entry.trust] if state.config else False

        def of(use: Use, device: str) -> Any:
            layer = spec.parse(use.spec).layer
            why = table.misfit(use, device, self.swapper.machine)
            if why is not None or layer is None:
                return why
            try:
                return layers.layout(self.swapper.kernel(use.spec, device=device, terms=Terms(trust=trust)), layer)
            except Refused:
                raise
            except KernelSwapError as e:
                return e.reason

        return of

    def _has_layer(self, state: State) -> Callable[[str], bool]:
        def has(text: str) -> bool:
            try:
                kernel = self.swapper.kernel(text, terms=Terms(trust=state.trust))
                found = layers.implementation(kernel, spec.parse(text).layer or "")
            except Tampered:
                raise
            except KernelSwapError:
                return False
            return found.kind == "module"  # a function computes attention for the whole model

        return has

    def _progress(self, step: str, done: float, total: float) -> None:
        if step.startswith("compile") and done < total:
            self._say(f"compiling {step.removeprefix('compile ')} for this machine; this happens once, and takes a moment")

    def _say(self, line: str) -> None:
        """Each line once in a process: forty models that lack a kernel for one reason say so once."""
        with self._lock:
            if line not in self._said:
                self._said.add(line)
                log.warning(line)


def _live(mode: Any) -> Mode | None:
    """What `Swapper.swap` is asked, so that `train()` and `eval()` go on working after it.

    Raises:
        ModeError: it is no mode, or one that says neither inference nor training.
    """
    if mode is None:
        return None
    found = mode_of(mode)
    if found is None:
        raise ModeError(
            f"{mode!r} is not a mode", todo="Use Mode.INFERENCE or Mode.TRAINING, with or without `| Mode.TORCH_COMPILE`."
        )
    wanted = modes.wanted(found)
    if Mode.TRAINING in wanted:
        return wanted
    return Mode.TORCH_COMPILE if Mode.TORCH_COMPILE in wanted else None


def lines(outcomes: Sequence[Outcome], named: set[str]) -> list[str]:
    """What a user wants to know of a swap, one line for each reason: kernels that were tried and could not serve.

    Kernels of the default table that are for other devices are no news; kernels that the user named always are.
    """
    grouped: dict[tuple[str, str, bool], dict[str, int]] = {}
    for outcome in outcomes:
        kept = isinstance(outcome, Kept)
        passed = outcome.passed if isinstance(outcome, Kept) else _passed_in_both(outcome)
        tried = [(text, why) for text, why in passed if (kept and text in named) or not why.startswith(_NO_NEWS)]
        tried = [(text, why) for text, why in tried if kept or text in named]
        if tried:
            text, why = tried[0]
            asked = spec.parse(text)
            key = (text.removesuffix(f":{asked.layer}") if asked.layer else text), why, kept
            layers = grouped.setdefault(key, {})
            layers[outcome.site.layer] = layers.get(outcome.site.layer, 0) + 1
    found = []
    for (kernel, why, kept), layers in grouped.items():
        finding = f"{kernel} {why}" if why.startswith(_FINDINGS) else f"{kernel}: {why}"
        where = ", ".join(f"{layer} ({count})" for layer, count in layers.items())
        found.append(f"{finding}; {'PyTorch goes on' if kept else 'another kernel serves'} for {where}")
    return found


_NO_NEWS = ("is for ", "is registered for ")
_FINDINGS = ("is ", "has ", "differs ")


def _passed_in_both(swap: Swap) -> list[tuple[str, str]]:
    """What was passed over in either mode, and serves in neither."""
    inference, training = dict(swap.inference.passed), dict(swap.training.passed)
    return [(text, why) for text, why in inference.items() if text in training]
