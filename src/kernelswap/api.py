"""The straight path, in code: read this file first, then `provider.py`.

    find     spec -> Requirement -> [Candidate] -> Resolution
    kernel   Resolution -> Artifact -> Kernel
    provide  Kernel -> Implementation
    swap     model -> sites -> plan -> apply -> Applied

A `Swapper` holds everything together; two of them do not know each other. The functions at the end of the file are the
methods of one that is made from the environment when it is first needed.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, cast

from . import locking, render, sites, spec, whole
from . import mode as modes
from . import plan as planning
from . import table as tables
from .apply import Applied, apply, how_often
from .errors import TableError, UndoConflict
from .mapping import Table, preferences
from .mapping import rows as rows_of
from .plan import NotAsked, Wish
from .provider import Build, Provider, Terms
from .required import require as require_all
from .slots import attention as attention_slot
from .slots import module as module_slot
from .sources.configured import bundle_of
from .store import Store
from .types import (
    Artifact,
    Chooser,
    Implementation,
    Machine,
    Mode,
    Outcome,
    Progress,
    Prover,
    Resolution,
    Row,
    SiteKind,
    Source,
    Swap,
    Unasked,
    Use,
    Verdict,
    Verifier,
)

if TYPE_CHECKING:
    import torch.nn as nn
    from torch import Tensor

    from .proof.contest import Contest
    from .proof.speed import Speeds


class Swapper(Provider):
    """Kernels (`Provider`), and models that they are swapped into.

    Args, all optional; besides those of `Provider`:
        table: the rows that every `swap` starts from, instead of the default table.
        prover: compares kernels with originals; by default `proof.Check`, with its verdicts in the cache.
    """

    def __init__(  # noqa: PLR0913  # see `Provider`
        self,
        *,
        sources: Mapping[str, Source] | None = None,
        verifiers: Sequence[Verifier] | None = None,
        machine: Machine | None = None,
        store: Store | None = None,
        table: Sequence[Row] | None = None,
        prover: Prover | None = None,
        cache: Path | None = None,
        offline: bool = False,
        bundle: Path | None = None,
    ) -> None:
        given = {"sources": sources, "verifiers": verifiers, "machine": machine, "store": store, "cache": cache}
        super().__init__(**given, offline=offline, bundle=bundle)  # type: ignore[arg-type]  # each of its own type
        self._table, self._prover = table, prover
        self._applied: weakref.WeakKeyDictionary[nn.Module, Applied] = weakref.WeakKeyDictionary()
        self._verdicts: weakref.WeakKeyDictionary[nn.Module, dict[object, Verdict]] = weakref.WeakKeyDictionary()
        self._chosen: dict[Any, Implementation] = {}

    @property
    def table(self) -> tuple[Row, ...]:
        """The rows that every `swap` starts from."""
        with self._lock:
            if self._table is None:
                self._table = tables.default()
            return tuple(self._table)

    @property
    def prover(self) -> Prover:
        """Made when first needed: that imports torch."""
        with self._lock:
            if self._prover is None:
                from .proof import Check, Verdicts

                verdicts, bundle = Verdicts(self.environment.cache / "verdicts"), bundle_of(self.sources.get("hub"))
                if bundle is not None:
                    verdicts.lend(bundle.about.verdicts)
                self._prover = Check(verdicts, self.machine, traced=True)
            return self._prover

    def plan(  # noqa: PLR0913  # what a user may want, each under its name
        self,
        model: nn.Module,
        *,
        table: Table | None = None,
        inherit: bool = True,
        only: str | Iterable[str] | None = None,
        skip: str | Iterable[str] | None = None,
        prefer: Mapping[str, str | Sequence[str | Use]] | None = None,
        mode: Mode | None = None,
        loss: bool | Sequence[Row] = False,
        attention: bool | Unasked | None = None,
        graphs: bool = False,
        hub: bool = False,
        build: Build = "background",
        trust: bool | Sequence[str] = False,
        choose: Literal["table", "measured"] | Chooser = "table",
        progress: Progress | None = None,
    ) -> tuple[Outcome, ...]:
        """What `swap` with these arguments would do; the model is not touched. Kernels are fetched, loaded and proved.

        Raises:
            TypeError: `model` is no module.
            TableError: the table, `prefer`, `build`, `choose`, or a glob that names nothing in this model, is wrong.
            PlanConflict: two rows claim one module.
            ModeError: `mode` makes no sense.
            Tampered: bytes of a kernel differ from what was verified before.
            Refused: a kernel that the arguments name was refused.
        """
        sites.must_be_module(model)
        over, terms = rows_of(table, {row.layer for row in self.table}), Terms(build, trust, progress, self._meets)
        base = self.table if inherit else tuple(replace(row, use=(), rivals=()) for row in self.table)
        base += tuple(loss) if not isinstance(loss, bool) else tables.loss() if loss else ()
        preferred = preferences(prefer)
        named = {use.spec for row in over for use in row.use} | {use.spec for uses in preferred.values() for use in uses}
        with self._lock:
            former = self.applied(model)
            wish = Wish(
                mode=mode if mode is None or mode == Mode.TORCH_COMPILE else modes.wanted(mode),
                prefer=preferred,
                named=named,
                replacing={id(m) for m in former.modules()} if former is not None else (),
                chooser=self._chooser(choose),
            )
            rows, raced = tables.merge(base, over), wish.chooser is not None
            found = sites.find(model, rows, only=only, skip=skip, rivals=raced)
            if self.environment.disabled is not None:
                off = f"kernels are switched off: {self.environment.disabled}"
                found = tuple(replace(site, left_out=site.left_out or off) for site in found)

            def provide(text: str, device: str, kind: SiteKind) -> Implementation:
                if text not in named and not hub and self.is_remote(text):
                    raise NotAsked("is on the hub, and nothing is fetched unless you ask: hub=True")
                return self.provide(text, device, kind, terms=terms)

            verdicts = self._verdicts.setdefault(model, {})
            planned = planning.plan(model, found, provide, self.prover, machine=self.machine, wish=wish, verdicts=verdicts)
            wanted = whole.Wanted(
                attention, graphs, former is not None, self.environment.disabled,
                prefer=preferred, named=named, chooser=wish.chooser, runs=planning.runs(wish.mode),
            )  # fmt: skip
            by_name = whole.outcomes(
                model, planned, wanted, self.machine, lambda text, on: provide(text, on, "function"), _differs
            )
            return (*by_name, *planned)

    def swap(
        self,
        model: nn.Module,
        *,
        check: str = "first-use",
        require: str | Iterable[str] = (),
        lock: str | os.PathLike[str] | None = None,
        **wanted: Any,
    ) -> Applied:
        """Give the modules of `model` faster kernels where there are any that do the same. Takes back what it did before.

        Args:
            model: any `nn.Module`; its `__dict__`, parameters and hooks stay as they are.
            check: compare with the original on real tensors: `first-use`, `sample:N`, `always`, `off`.
            require: globs over layers and paths that a kernel must serve, all of them, in the mode that they are in; `attention`
                is what the model's `attn_implementation` names. A real call that refuses the kernel of one raises `Required` too,
                before anything is returned; the original serves the calls after it.
            lock: a directory whose `kernelswap.lock` is written anew where it does not say already what serves: each kernel's
                commit and the digest of every file. `policy.locked_only` is what holds to it.
            wanted: see `plan`. `table`: rows, or `{layer: spec}`, laid over this Swapper's table (`inherit=False`: alone).
                `only`, `skip`: globs over module paths, their ends, or layers. `prefer`: `{glob: spec or specs}` tried first.
                `mode`: `None` serves training and inference, live; `TORCH_COMPILE` alone likewise, with kernels that compile.
                `attention`: a Transformers model computes attention with the kernel that comes with the package, in place of
                `sdpa`. `graphs`: its decode steps on a static cache are captured once for each batch size in CUDA graphs and
                replayed inside `generate()`; with it comes `attention`, unless that is False.
                `loss`: in training, logits are computed when something reads them, which cross entropy does not; where something
                other than an optimiser's step has written to the weights since, they raise. `hub`: kernels of the table that are on the hub may be fetched;
                those that you name yourself always may. `build`: bundled kernels that are not compiled yet are compiled in
                the `background` (the original serves meanwhile), or you `wait`, or `never`. `trust`: publishers that you
                vouch for. `choose`: of several kernels that may serve, the `table`'s first, or the fastest for each size of
                call by what was `measured` on this machine (`measure`, `kernelswap bench`); what nobody measured yet is as
                the table has it. `progress`: told about downloads and compiling.

        Raises:
            Required: a site that `require` names stays as it is; every reason is listed.
            StoreError: the lock cannot be written.
            UndoConflict: something wrapped a module since the former swap; undo that first.
            Whatever `plan` raises. In all cases the model is as it was.
        """
        how_often(check)  # before anything is taken back
        with self._lock:
            outcomes = self.plan(model, **wanted)
            required = require_all(outcomes, (require,) if isinstance(require, str) else tuple(require), model)
            if lock is not None:
                locking.record(locking.serving(outcomes), Path(lock), cache=self.store.cache)
            former = self.applied(model)
            if former is not None:
                former.undo()
            compiled = Mode.TORCH_COMPILE in (wanted.get("mode") or Mode(0))
            applied = self._applied[model] = apply(
                model, outcomes, self.prover, check=check, compile=compiled, machine=self.machine, required=required
            )
            applied.lock_folder = Path(lock) if lock is not None else None
            return applied

    def measure(
        self,
        model: nn.Module,
        *,
        seconds: float = 60.0,
        mode: Mode | None = Mode.INFERENCE,
        compile: bool = True,  # noqa: A002  # the word that users know
        progress: Progress | None = None,
        **wanted: Any,
    ) -> Contest:
        """Time every candidate of every site of `model` against the original, and keep what was found for `choose="measured"`.

        Candidates are the kernels of the table (of the hub with `hub=True`), what is installed here, and the original under
        `torch.compile`. The model is not touched: copies of its modules are called, on inputs of several sizes. One process
        at a time measures on a machine. What was kept before is not measured again, so that whoever is stopped goes on.

        Args:
            model: as for `swap`; swapped or not.
            seconds: after which nothing new is begun.
            mode: `INFERENCE`, `TRAINING`, or None for both.
            compile: whether the original under `torch.compile` takes part; compiling takes most of its time.
            progress: told what is measured.
            wanted: as in `plan`.

        Raises:
            Whatever `plan` raises.
        """
        from .proof import contest

        speeds = self._speeds(compile=compile)
        wanted = {"build": "wait", **wanted, "mode": mode, "choose": speeds, "progress": progress}
        lock = self.store.cache / "measuring.lock"
        return contest.hold(speeds, lambda: self.plan(model, **wanted), seconds=seconds, lock=lock, progress=progress)

    def _meets(self, artifact: Artifact) -> str | None:
        """The first contact with native code is the prover's to make, if it can; see `proof.Check.meets`."""
        meets = getattr(self.prover, "meets", None)
        return None if meets is None else cast("str | None", meets(artifact))

    def _chooser(self, choose: str | Chooser) -> Chooser | None:
        if not isinstance(choose, str):
            return choose
        if choose not in {"table", "measured"}:
            raise TableError(f"choose={choose!r} says nothing", todo="Use 'table' or 'measured'.")
        return self._speeds(agree=self._job.once if self._job is not None else None) if choose == "measured" else None

    def _speeds(self, *, compile: bool = True, agree: Callable[[str, Callable[[], Any]], Any] | None = None) -> Speeds:  # noqa: A002  # as in `measure`
        from .proof import Verdicts
        from .proof.speed import Speeds

        store = getattr(self.prover, "store", None) or Verdicts(self.environment.cache / "verdicts")
        return Speeds(store, agree=agree, compile=compile, memo=self._chosen)

    def kernelize(self, model: nn.Module, *, mode: Mode | None = None, **wanted: Any) -> nn.Module:
        """`swap`, returning the model."""
        self.swap(model, mode=mode, **wanted)
        return model

    def unkernelize(self, model: nn.Module) -> nn.Module:
        """Take back what was done to `model`, also to a copy of a model that was swapped. Returns it.

        Raises:
            UndoConflict: something wrapped a module after the swap; nothing was changed.
        """
        from .replay import replays  # needs torch when it is imported; this file must not

        with self._lock:
            applied = self._applied.pop(model, None)
            if applied is not None:
                try:
                    applied.undo()
                except UndoConflict:
                    self._applied[model] = applied
                    raise
            for module in list(module_slot.swapped(model)):
                module_slot.release(module)
            attention_slot.release(model)
            replays.detach(model)
            return model

    def applied(self, model: nn.Module) -> Applied | None:
        """The handle of the last swap of `model`, if that is still in place."""
        with self._lock:
            applied = self._applied.get(model)
            if applied is not None and any(isinstance(o, Swap) for o in applied.outcomes) and not applied.in_place:
                del self._applied[model]  # by its own `undo`
                return None
            return applied

    def explain(self, model: nn.Module, *, long: bool = False) -> str:
        """What serves each site of `model` and why; for a model that is not swapped, what `swap` would do now."""
        applied = self.applied(model)
        if applied is not None:
            return applied.explain(long=long)
        outcomes = self.plan(model, build="never")
        return f"not swapped; swap(model) would do this:\n{render.outcomes(outcomes, long=long)}"

    def is_remote(self, text: str) -> bool:
        """Whether a kernel would have to be fetched, so that it is left alone unless somebody asks."""
        if self.environment.bundle is not None:
            return False
        requirement = spec.parse(text)
        return requirement.source == "hub" and requirement.name not in dict(self.environment.local_kernels)


def _differs(mine: Tensor, original: Tensor) -> str | None:
    from .proof.whole import differs

    return differs(mine, original)


# -- one Swapper for the process ------------------------------------------------------------------------------------

_default: Swapper | None = None
_default_lock = threading.Lock()


def default() -> Swapper:
    """The Swapper behind the functions below: made from the environment at the first call."""
    global _default  # noqa: PLW0603  # the one place where the process has a Swapper of its own
    with _default_lock:
        if _default is None:
            _default = Swapper()
        return _default


def find(text: str, *, machine: Machine | str | None = None, device: str | None = None) -> Resolution:
    """`Swapper.find` of the default Swapper."""
    return default().find(text, machine=machine, device=device)


def load(text: str, *, device: str | None = None, trust: bool | Sequence[str] = False) -> ModuleType:
    """`Swapper.load` of the default Swapper."""
    return default().load(text, device=device, trust=trust)


def plan(model: nn.Module, **wanted: Any) -> tuple[Outcome, ...]:
    """`Swapper.plan` of the default Swapper."""
    return default().plan(model, **wanted)


def swap(model: nn.Module, **wanted: Any) -> Applied:
    """`Swapper.swap` of the default Swapper."""
    return default().swap(model, **wanted)


def measure(model: nn.Module, *, seconds: float = 60.0, **wanted: Any) -> Contest:
    """`Swapper.measure` of the default Swapper."""
    return default().measure(model, seconds=seconds, **wanted)


def kernelize(model: nn.Module, *, mode: Mode | None = None, **wanted: Any) -> nn.Module:
    """`Swapper.kernelize` of the default Swapper."""
    return default().kernelize(model, mode=mode, **wanted)


def unkernelize(model: nn.Module) -> nn.Module:
    """`Swapper.unkernelize` of the default Swapper."""
    return default().unkernelize(model)


def explain(model: nn.Module, *, long: bool = False) -> str:
    """`Swapper.explain` of the default Swapper."""
    return default().explain(model, long=long)
