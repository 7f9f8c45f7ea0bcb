"""`attn_implementation="org/repo[@ref | @constraints][:function]"`: attention kernels, each under its own name.

A text that the program itself passes (to `from_pretrained`, `from_config` or `set_attn_implementation`) is loaded and registered
as one more attention function of Transformers; every model that names it uses its own function, so models with different
kernels live side by side. A text that only a configuration file names is never fetched nor trusted: one line says so, and
PyTorch's own attention is used.

    the kernel offers                              it is called                            its mask
    the function that the text names               as it is, or as flash functions are     2-D
    flash_attn_forward, supports_lengths           as it is                                none, lengths, or 4-D
    flash_attn_varlen_func                         through `attention_flash`               2-D
    sparse_atten_func                              through Transformers' own function      4-D
    flash_attn_forward, supports_flash_attn        as it is                                4-D
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ... import spec
from ...errors import KernelSwapError, Refused, SpecError, Tampered, UnknownKernel
from ...slots import attention as slot
from ...slots import attention_masks as masks
from ...types import Requirement
from . import attention_pages
from .arrival import Arrivals
from .attention_flash import Flash, Functions
from .patches import Patches

if TYPE_CHECKING:
    from .switch import Switch

MODELING, FLASH_UTILS = "transformers.modeling_utils", "transformers.modeling_flash_attention_utils"
BATCHING = tuple(f"transformers.generation.continuous_batching.{name}" for name in ("continuous_api", "initialization", "cache"))
TOUCHED: tuple[tuple[str, str, str], ...] = (
    (MODELING, "PreTrainedModel.set_attn_implementation", "takes kernels for sub-models, too"),
    (MODELING, "PreTrainedModel._check_and_adjust_attn_implementation", "knows our names; refuses those of files; private"),
    (FLASH_UTILS, "lazy_import_flash_attention", "gives the functions of each kernel, without one slot for all; private"),
    *((name, "is_flash_attention_requested", "our kernels can do continuous batching") for name in BATCHING),
)
"""(module, attribute, why)."""

VERSIONS = {
    "kernels-community/flash-attn2": 4,
    "kernels-community/flash-attn3": 1,
    "kernels-community/vllm-flash-attn3": 1,
    "kernels-community/aiter-flash-attn": 2,
    "kernels-community/flash-attn4": 0,
    "kernels-community/metal-flash-sdpa": 2,
}
"""API version of a repository that is named without one; any other: 1. Transformers' own table goes first where it has one."""
BUNDLED = "kernelswap/attention"
_STANDARD = ("flash_attention_2", "flash_attention_3", "flash_attention_4")


@dataclass
class Registered:
    """An attention kernel in use."""

    module: ModuleType
    forward: Callable[..., Any]
    mask: Callable[..., Any]
    functions: Functions | None
    """With the names of flash-attention, where it has them."""
    imported: Any = None
    """What `lazy_import_flash_attention` answers, once asked."""


@dataclass
class Attention:
    """The attention kernels of one installation."""

    switch: Switch
    patches: Patches = field(default_factory=Patches)
    registered: dict[str, Registered] = field(default_factory=dict)
    passed: set[str] = field(default_factory=set)
    """Standard names that the program itself passed."""
    lock: Any = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        seams = {MODELING: self._modeling, FLASH_UTILS: self._flash_utils, **dict.fromkeys(BATCHING, self._batching)}
        self.arrivals = Arrivals(seams)

    # -- from a text to a registered function --------------------------------------------------------------------

    def prepare(self, wanted: Any, *, trust: bool) -> Any:
        """What to hand to Transformers instead of `wanted`, which the program passed: `None` stands for PyTorch's own."""
        if isinstance(wanted, Mapping):
            return {key: self.prepare(value, trust=trust) for key, value in wanted.items()}
        if not isinstance(wanted, str):
            return wanted
        key = wanted if wanted == "paged|eager" else wanted.removeprefix("paged|")
        if not names_a_kernel(key):
            self.passed.add(key)
            return wanted
        why = self.switch.disabled()
        if why is not None:
            self._say(f"{key}: kernels are switched off: {why}; attention is PyTorch's own")
            return None
        with self.lock:
            if key not in self.registered:
                try:
                    self._register(key, trust=trust)
                except (Refused, Tampered, UnusableKernel, SpecError):
                    raise
                except KernelSwapError as e:
                    self._say(f"{key}: {e.reason}; attention is PyTorch's own")
                    return None
        return key

    def _register(self, key: str, *, trust: bool) -> None:
        asked = _with_version(spec.parse(key))
        module = self.switch.swapper.load(str(replace(asked, layer=None, paged=False, text=None)), trust=trust)
        found = self._classify(module, asked, key)
        modeling, masking = (importlib.import_module(name) for name in (MODELING, "transformers.masking_utils"))
        release = sys.modules["transformers"].__version__
        modeling.ALL_ATTENTION_FUNCTIONS.register(key, attention_pages.understood(found.forward, release))
        masking.ALL_MASK_ATTENTION_FUNCTIONS.register(key, found.mask)
        self.registered[key] = found

    def _classify(self, module: ModuleType, asked: Requirement, key: str) -> Registered:
        functions = Functions.of(module)
        if asked.layer is not None and asked.layer not in Functions.NAMES:
            named = _attribute(module, asked.layer, key)
            if not _is_flash(named):
                return Registered(module, named, masks.two_dimensional, functions)
            return self._flash(key, module, Functions(named, None, None))
        if callable(getattr(module, "flash_attn_forward", None)) and getattr(module, "supports_lengths", False):
            return Registered(module, module.flash_attn_forward, masks.with_lengths, functions)
        if functions is not None and (functions.varlen is not None or asked.layer is not None):
            return self._flash(key, module, functions)
        if hasattr(module, "sparse_atten_func"):
            return Registered(module, _msa(key), masks.four_dimensional(), functions)
        if hasattr(module, "flash_attn_forward") and hasattr(module, "supports_flash_attn"):
            return Registered(module, module.flash_attn_forward, masks.four_dimensional(), functions)
        raise UnusableKernel(
            f"has no attention function that is known; it has {_callables(module)}",
            asked=f"attn_implementation={key!r}",
            todo=f"Name one of its functions: {key.partition(':')[0]}:FUNCTION.",
        )

    def _flash(self, key: str, module: ModuleType, functions: Functions) -> Registered:
        def fallback() -> Functions:
            found = Functions.of(self.switch.swapper.load(BUNDLED))
            assert found is not None  # its own face
            return found

        return Registered(module, Flash(key, functions, fallback, self._say).forward, masks.two_dimensional, functions)

    def _say(self, line: str) -> None:
        self.switch._say(line)  # noqa: SLF001  # one set of lines for the whole adapter

    # -- seams ----------------------------------------------------------------------------------------------------

    def _modeling(self, module: ModuleType) -> None:
        cls = module.PreTrainedModel
        own = vars(cls)
        if "set_attn_implementation" in own:
            self.patches.put(cls, "set_attn_implementation", self._setter(own["set_attn_implementation"]))
        if "_check_and_adjust_attn_implementation" in own:
            name = "_check_and_adjust_attn_implementation"
            self.patches.put(cls, name, self._checker(own[name]))

    def _setter(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def set_attn_implementation(model: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> Any:
            self.switch.choices.chose(part.config for _, part in slot.settings(model))
            trust = bool(kwargs.get("allow_all_kernels", args[0] if args else False))
            wanted = self.prepare(attn_implementation, trust=trust)
            if isinstance(wanted, dict):  # Transformers has no word for "as it is" but silence
                wanted = {key: value for key, value in wanted.items() if value is not None}
            return original(model, wanted, *args, **kwargs)

        return set_attn_implementation

    def _checker(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def check(model: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> Any:
            key = attn_implementation
            if key is None and model.config._attn_implementation is None:  # noqa: SLF001  # its only name
                self.switch.choices.resolved(model.config)
            if isinstance(key, slot.Setting) and not key.over:
                return key  # of a model that is swapped: what it is registered under serves this one as well
            if isinstance(key, str) and key != "paged|eager":
                key = key.removeprefix("paged|")
            if isinstance(key, str) and key in self.passed and (kernel := self._instead(model, key)) is not None:
                found: str | None = self.prepare(kernel, trust=False)
                if found is None:  # a line said why, and that attention is PyTorch's own
                    return original(model, None, *args, **kwargs)
                self._say(f"{key}: the package is not installed, {found} serves")
                return found
            if not names_a_kernel(key):
                return original(model, attn_implementation, *args, **kwargs)
            if key in self.registered and self.switch.disabled() is None:
                return self._compatible(model, key)
            if key not in self.registered:
                self._say(
                    f"{key}: is named by the model's configuration and not by this program, so nothing is loaded; attention is "
                    f"PyTorch's own (attn_implementation={key!r} asks for it)"
                )
            return original(model, None, *args, **kwargs)

        return check

    def _instead(self, model: Any, name: str) -> str | None:
        """The kernel for `flash_attention_N` where its package is not installed, or `None`: then Transformers decides."""
        if name not in _STANDARD:
            return None
        utils = importlib.import_module(FLASH_UTILS)
        known = getattr(utils, "FLASH_ATTENTION_COMPATIBILITY_MATRIX", {}).get(int(name[-1]), {})
        available = known.get("general_availability_check")
        kernel: str | None = getattr(utils, "FLASH_ATTN_KERNEL_FALLBACK", {}).get(name)
        listed = getattr(model, "_compatible_flash_implementations", None)
        if available is None or available() or kernel is None or not model._supports_flash_attn or listed:  # noqa: SLF001  # as Transformers
            return None
        return kernel

    def _compatible(self, model: Any, key: str) -> str:
        """`key`, or what the model's authors list instead of flash kernels that miss something the model needs."""
        listed = getattr(model, "_compatible_flash_implementations", None) or []
        if not listed or key in listed or "flash" not in key:
            return key
        own = type(model).__module__.startswith("transformers.")
        for other in listed:
            if names_a_kernel(other) and self.prepare(other, trust=own) is not None:
                self._say(f"{key}: {type(model).__name__} works with {', '.join(listed)}; {other} serves")
                return str(other)
        return key  # what it lacks is made up for, with a line, when it is asked for

    def _flash_utils(self, module: ModuleType) -> None:
        original = module.lazy_import_flash_attention

        @functools.wraps(original)
        def lazy_import_flash_attention(implementation: str | None, *args: Any, **kwargs: Any) -> Any:
            found = self.registered.get(implementation or "")
            if found is None or found.functions is None:
                return original(implementation, *args, **kwargs)
            if found.imported is None:
                f, define = found.functions, module._lazy_define_process_function  # noqa: SLF001  # the original's own
                varlen, paged = (define(one) if one is not None else dict for one in (f.varlen, f.kvcache))
                both = hasattr(module, "_process_with_kvcache_kwargs_fn")  # since 5.2x; before it, the first alone
                ours = (f.func, f.varlen, f.kvcache, module._pad_input, module._unpad_input)  # noqa: SLF001  # same
                found.imported = (ours, (varlen, paged) if both else varlen)
            return found.imported

        self.patches.put(module, "lazy_import_flash_attention", lazy_import_flash_attention)
        self.patches.replace(original, lazy_import_flash_attention)

    def _batching(self, module: ModuleType) -> None:
        original = vars(module).get("is_flash_attention_requested")
        if original is None:
            return

        @functools.wraps(original)
        def is_flash_attention_requested(
            config: Any = None, requested_attention_implementation: str | None = None, version: Any = None
        ) -> Any:
            name = requested_attention_implementation if config is None else config._attn_implementation  # noqa: SLF001  # its only name
            found = self.registered.get(name or "")
            if found is not None and found.functions is not None and found.functions.varlen is not None:
                return version is None or found.functions.kvcache is not None
            return original(config, requested_attention_implementation, version)

        self.patches.put(module, "is_flash_attention_requested", is_flash_attention_requested)


class UnusableKernel(UnknownKernel):
    """It was loaded, and has nothing to call: a mistake of whoever named it, not of this machine."""


# -- the face -----------------------------------------------------------------------------------------------------------

_open: list[Attention] = []


def install(switch: Switch) -> None:
    """Take over from here on; imports nothing of Transformers."""
    uninstall()
    _open.append(Attention(switch))
    _open[-1].arrivals.start()


def uninstall() -> None:
    """Give Transformers' attributes back. What is registered stays, for the models that use it."""
    while _open:
        attention = _open.pop()
        attention.arrivals.stop()
        attention.patches.undo()


def prepare(attn_implementation: Any, *, trust: bool = False) -> Any:
    """For an `attn_implementation` that the program passed: kernels loaded and registered; what Transformers is to be given.

    Args:
        attn_implementation: a text, a dict of them by sub-model (nested, too), or None. What names no kernel comes back as it is.
        trust: vouch for the publishers (`allow_all_kernels`).

    Returns:
        The same without `paged|`; `None` in place of a kernel that is not available here, after one line that says why.

    Raises:
        SpecError: it does not parse.
        Refused, Tampered: trust is at stake.
        UnusableKernel: there is no such function, or no attention in that kernel.
    """
    return _open[-1].prepare(attn_implementation, trust=trust) if _open else attn_implementation


def names_a_kernel(text: Any) -> bool:
    """Whether Transformers' own names are of another form: theirs have neither a slash nor a backslash."""
    return isinstance(text, str) and ("/" in text or "\\" in text)


def _with_version(asked: Requirement) -> Requirement:
    if asked.source != "hub" or (asked.version, asked.revision, asked.constraints) != (None, None, None):
        return asked
    theirs = getattr(sys.modules.get("transformers.integrations.hub_kernels"), "get_attn_kernel_version", None)
    version = theirs(asked.name) if theirs is not None else VERSIONS.get(asked.name, 1)
    return replace(asked, version=version)


def _attribute(module: ModuleType, name: str, key: str) -> Callable[..., Any]:
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise UnusableKernel(f"has no function {name}; it has {_callables(module)}", asked=f"attn_implementation={key!r}")
    return found  # type: ignore[no-any-return]  # asked on the line above


def _callables(module: ModuleType) -> str:
    names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_") and not inspect.isclass(v)]
    return ", ".join(sorted(names)[:12]) or "none"


def _is_flash(function: Callable[..., Any]) -> bool:
    """Whether it takes q, k and v first, as flash functions do, and not a module."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return False
    return names[:1] in (["q"], ["query"])


def _msa(key: str) -> Callable[..., Any]:
    try:
        module = importlib.import_module("transformers.integrations.msa_attention")
    except ImportError as e:
        raise UnusableKernel(
            "is a block-sparse kernel, which this release of Transformers does not know", asked=f"attn_implementation={key!r}"
        ) from e
    return module.msa_attention_forward  # type: ignore[no-any-return]  # Transformers has no stubs for it
