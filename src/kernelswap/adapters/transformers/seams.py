"""Where Transformers is taken over, and how it is given back.

Everything of Transformers that is touched is in `TOUCHED`; tests/adapters/test_seams.py says which of them a release has moved.
What is missing there is left out here: a part of the integration, not all of it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from ...errors import KernelSwapError, Tampered
from . import attention, choices
from .arrival import Arrivals
from .config import KernelConfig
from .patches import Patches
from .switch import Switch, log

MODELING, AUTO, HUB_KERNELS, CONFIG = (
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.integrations.hub_kernels",
    "transformers.utils.kernel_config",
)

TOUCHED: tuple[tuple[str, str, str], ...] = (
    (MODELING, "PreTrainedModel.from_pretrained", "takes use_kernels, kernel_config and allow_all_kernels"),
    (MODELING, "PreTrainedModel._from_config", "the same, for from_config of the Auto classes; private"),
    (MODELING, "PreTrainedModel.set_use_kernels", "switches on and off"),
    (MODELING, "PreTrainedModel.use_kernels", "says whether they are on; False switches them off"),
    (MODELING, "PreTrainedModel.train", "does not decide anew: slots follow the mode by themselves"),
    (MODELING, "PreTrainedModel.kernelize", "a method again, where a release has none"),
    (
        AUTO,
        "AutoModelForCausalLM.from_pretrained",
        "sees attn_implementation before it is in a configuration; so do all Auto classes",
    ),
    (AUTO, "AutoModelForCausalLM.from_config", "the same"),
    (CONFIG, "KernelConfig", "is ours"),
    (HUB_KERNELS, "kernelize", "is ours"),
    (HUB_KERNELS, "get_kernel", "loads through us"),
    (HUB_KERNELS, "lazy_load_kernel", "loads through us; reads the private table _HUB_KERNEL_MAPPING"),
    (HUB_KERNELS, "use_kernel_forward_from_hub", "takes a condition on a class; without one it is theirs"),
    (HUB_KERNELS, "allow_all_hub_kernels", "is entered where from_config vouches for kernels; not replaced"),
)
"""(module, attribute, why). Attention has its own table in `attention.py`."""

_loading: ContextVar[bool] = ContextVar("kernelswap_loading", default=False)


class Seams:
    """One installation over Transformers."""

    def __init__(self, switch: Switch) -> None:
        self.switch = switch
        self.patches = Patches()
        arrivals = {MODELING: self._modeling, AUTO: self._auto, HUB_KERNELS: self._hub_kernels, CONFIG: self._config}
        self._arrivals = Arrivals(arrivals)
        self._lock = threading.RLock()

    def open(self) -> None:
        """Take over what is imported, now or later. Imports nothing of Transformers."""
        with self._lock:
            self._arrivals.start()
            attention.install(self.switch)

    def close(self) -> tuple[str, ...]:
        """Give everything back. Models keep their kernels. Names what somebody else has replaced meanwhile."""
        with self._lock:
            attention.uninstall()
            self._arrivals.stop()
            return self.patches.undo()

    # -- one module each ------------------------------------------------------------------------------------------

    def _config(self, module: ModuleType) -> None:
        theirs = vars(module).get("KernelConfig")
        if theirs is not None and theirs is not KernelConfig:
            self.patches.put(module, "KernelConfig", KernelConfig)
            self.patches.replace(theirs, KernelConfig)

    def _modeling(self, module: ModuleType) -> None:
        cls, switch, put = module.PreTrainedModel, self.switch, self.patches.put
        own = vars(cls)
        for name in ("from_pretrained", "_from_config"):
            if isinstance(own.get(name), classmethod):
                put(cls, name, classmethod(self._loader(own[name].__func__)))

        for name, value in _methods(cls, switch).items():
            if name == "kernelize" or name in own:
                put(cls, name, value)

    def _loader(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """`from_pretrained` or `_from_config` that knows our three keywords."""
        switch, fresh = self.switch, original.__name__ == "_from_config"

        @functools.wraps(original)
        def load(cls: Any, *args: Any, **kwargs: Any) -> Any:
            config = kwargs.pop("kernel_config", None)
            config = KernelConfig.of(config) if config is not None else None
            use = bool(kwargs.get("use_kernels")) or config is not None
            trust = bool(kwargs.get("allow_all_kernels"))
            said = kwargs.get("attn_implementation")
            self._prepare(kwargs, trust=trust)
            before: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
            if fresh:
                kwargs.pop("use_kernels", None)
                if kwargs.pop("allow_all_kernels", False):
                    before = _vouched()
            was = _loading.set(True)
            try:
                with before, choices.asked(said):
                    loaded = original(cls, *args, **kwargs)
            finally:
                _loading.reset(was)
            if use:
                model = loaded[0] if isinstance(loaded, tuple) else loaded
                switch.on(model, config, trust=trust)
                _keep_config(model, config)
            return loaded

        return load

    def _auto(self, module: ModuleType) -> None:
        # Each class has its own copy of the two; a copy that was made of ours would outlive `close`. So the classes are taken
        # over when they exist, and never what they are copied from.
        for cls in [one for one in vars(module).values() if isinstance(one, type) and one.__name__.startswith("Auto")]:
            for name in ("from_pretrained", "from_config"):
                found = vars(cls).get(name)
                if isinstance(found, classmethod):
                    self.patches.put(cls, name, classmethod(self._auto_loader(found.__func__)))

    def _auto_loader(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def load(cls: Any, *args: Any, **kwargs: Any) -> Any:
            said = kwargs.get("attn_implementation")
            self._prepare(kwargs, trust=bool(kwargs.get("allow_all_kernels")))
            with choices.asked(said):
                return original(cls, *args, **kwargs)

        return load

    def _prepare(self, kwargs: dict[str, Any], *, trust: bool) -> None:
        """Load the attention kernels that a call names, and hand Transformers what it understands."""
        if kwargs.get("attn_implementation") is None:
            return
        found = attention.prepare(kwargs.pop("attn_implementation"), trust=trust)
        if found is not None:
            kwargs["attn_implementation"] = found

    def _hub_kernels(self, module: ModuleType) -> None:
        switch = self.switch

        def kernelize(model: Any, mode: Any = None) -> None:
            """Kernels on, for a `Mode`; without one they follow `train()` and `eval()`."""
            switch.on(model, getattr(model, "kernel_config", None), mode)

        def get_kernel(
            kernel_name: str,
            revision: str | None = None,
            version: int | str | None = None,
            allow_all_kernels: bool = False,  # noqa: FBT001, FBT002
            **_: Any,
        ) -> ModuleType:
            """A kernel's module."""
            at = revision if revision is not None else version
            found: ModuleType = switch.load(kernel_name if at is None else f"{kernel_name}@{at}", trust=allow_all_kernels)
            return found

        theirs = module.lazy_load_kernel if hasattr(module, "lazy_load_kernel") else None
        known = getattr(module, "_HUB_KERNEL_MAPPING", {})
        loaded = getattr(module, "_KERNEL_MODULE_MAPPING", {})

        def lazy_load_kernel(kernel_name: str, mapping: dict[str, Any] = loaded) -> ModuleType | None:
            """A kernel that Transformers knows by a short name, or None where there is none here."""
            if isinstance(mapping.get(kernel_name), ModuleType):
                return mapping[kernel_name]  # type: ignore[no-any-return]  # asked on the line above
            about = known.get(kernel_name)
            if about is None:
                return theirs(kernel_name, mapping) if theirs is not None else None
            mapping[kernel_name] = self._lazily(kernel_name, about, trust=bool(getattr(module, "ALLOW_ALL_KERNELS", False)))
            return mapping[kernel_name]  # type: ignore[no-any-return]  # set on the line above

        ours = {"kernelize": kernelize, "get_kernel": get_kernel, "lazy_load_kernel": lazy_load_kernel}
        ours |= {_DECORATOR: _decorator(vars(module)[_DECORATOR])} if _DECORATOR in vars(module) else {}
        for name, value in ours.items():
            former = self.patches.put(module, name, value) if name in vars(module) else None
            if former is not None:
                self.patches.replace(former, value)

    def _lazily(self, name: str, about: dict[str, Any], *, trust: bool) -> ModuleType | None:
        at = about.get("revision") or about.get("version") or 1
        try:
            module: ModuleType = self.switch.load(f"{about['repo_id']}@{at}", trust=trust)
        except Tampered:
            raise
        except KernelSwapError as e:
            log.warning("%s: %s", name, e.reason)
        else:
            return module
        try:
            return importlib.import_module(name.replace("-", "_"))
        except ImportError:
            return None


_DECORATOR = "use_kernel_forward_from_hub"


def _decorator(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def use_kernel_forward_from_hub(layer_name: str, condition: Callable[[Any], bool] | None = None) -> Callable[..., Any]:
        decorate = theirs(layer_name)

        def mark(target: Any) -> Any:
            marked = decorate(target)
            if condition is not None and isinstance(marked, type):
                setattr(marked, "kernel_layer_name", layer_name)  # noqa: B010  # mypy knows of no such attribute
                setattr(marked, "kernel_condition", staticmethod(condition))  # noqa: B010  # same
            return marked

        return mark

    return use_kernel_forward_from_hub


@contextlib.contextmanager
def _vouched() -> Iterator[None]:
    module = importlib.import_module(HUB_KERNELS)
    with module.allow_all_hub_kernels():
        yield


def _methods(cls: Any, switch: Switch) -> dict[str, Any]:
    """What PreTrainedModel gets."""

    def set_use_kernels(self: Any, use_kernels: bool, kernel_config: Any = None, mode: Any = None) -> None:  # noqa: FBT001
        """Switch kernels on (with a `KernelConfig`, and for a `Mode`, if given) or off."""
        if _loading.get():
            return  # `from_pretrained` does it itself, when weights and hooks are where they belong
        if use_kernels:
            switch.on(self, kernel_config if kernel_config is not None else getattr(self, "kernel_config", None), mode)
            _keep_config(self, kernel_config)
        elif switch.is_on(self):
            switch.off(self)

    def kernelize(self: Any, mode: Any = None) -> None:
        """Kernels on, for a `Mode`; without one they follow `train()` and `eval()`."""
        self.set_use_kernels(True, mode=mode)

    def read(self: Any) -> bool:
        return switch.is_on(self)

    def write(self: Any, value: bool) -> None:  # noqa: FBT001
        if bool(value) != switch.is_on(self):
            self.set_use_kernels(bool(value))

    def train(self: Any, mode: bool = True) -> Any:  # noqa: FBT001, FBT002
        return super(cls, self).train(mode)

    doc = "Whether this model uses kernels; set it to switch them on or off."
    return {
        "set_use_kernels": set_use_kernels,
        "kernelize": kernelize,
        "use_kernels": property(read, write, doc=doc),
        "train": train,
    }


def _keep_config(model: Any, config: Any) -> None:
    """Where Transformers keeps it; also on models of releases that have no such attribute."""
    if config is not None:
        model.kernel_config = KernelConfig.of(config)
