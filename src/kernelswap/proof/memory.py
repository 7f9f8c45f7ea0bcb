"""Memory and hidden state around a call: what was touched, shared, never written, kept; and the caller's random state."""

from __future__ import annotations

import ctypes
import functools
import gc
import itertools
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_EMPTY = {
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.empty_strided,
    torch.ops.aten.new_empty,
    torch.ops.aten.new_empty_strided,
}
LIGHT = 1 << 24
"""Bytes of module state up to which it is compared after every call, and computed with in one thread."""
CALLS = 24  # of a steady kernel, over which a leak of its output's size in C must show


class Poison(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own class is untyped
    """Fills what `torch.empty` and its kin return, from Python or C++, with NaN, and remembers every storage that was made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # same
        self.made: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """See the class."""
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in pytree.tree_leaves((args, kwargs)) if _plain(t)}  # noqa: SLF001  # what StorageWeakRef compares by
        for t in pytree.tree_leaves(out):
            if _plain(t) and t.untyped_storage()._cdata not in given:  # noqa: SLF001  # same; a view makes no memory
                if func.overloadpacket in _EMPTY and t.numel():
                    t.fill_(torch.nan if t.is_floating_point() or t.is_complex() else 1 if t.dtype == torch.bool else 101)
                ref = StorageWeakRef(t.untyped_storage())  # type: ignore[no-untyped-call]  # same
                self.made[ref.cdata] = ref
        return out

    def kept(self) -> int:
        """Storages made inside that somebody still holds."""
        return sum(not ref.expired() for ref in self.made.values())  # type: ignore[no-untyped-call]  # same


def stain(likes: Sequence[Tensor]) -> None:
    """Leave NaN in the blocks that an allocator hands out next for tensors of these sizes."""
    blocks = [torch.full_like(t, torch.nan) for t in likes if t.is_floating_point() for _ in range(2)]
    del blocks


def _bytes(tensor: Tensor) -> Tensor:
    """The whole storage below a tensor, so that a write beside a slice shows too."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


class Untouched:
    """Bytes of tensors, and which have changed since."""

    def __init__(self, held: Mapping[str, Tensor]) -> None:
        self.held = {n: t for n, t in held.items() if _plain(t)}
        self.before = {n: _bytes(t).clone() for n, t in self.held.items()}

    def changed(self) -> list[str]:
        """Names of those whose bytes differ."""
        return [n for n, t in self.held.items() if not torch.equal(_bytes(t), self.before[n])]

    def restore(self) -> None:
        """Write the bytes back."""
        for name in self.changed():
            _bytes(self.held[name]).copy_(self.before[name])


def _plain(value: Any) -> bool:
    """Whether this is a tensor with memory of its own that can be looked at."""
    return type(value) in _PLAIN and value.layout == torch.strided and not value.is_meta


_PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


def light(module: torch.nn.Module) -> bool:
    """Whether the weights are few."""
    return sum(p.numel() * p.element_size() for p in module.parameters()) <= LIGHT


def storages(values: Iterable[Tensor | None]) -> set[int]:
    """Addresses of the storages below."""
    return {t.untyped_storage().data_ptr() for t in values if t is not None and t.layout == torch.strided and t.numel()}


def overlap(values: Sequence[Tensor]) -> bool:
    """Whether two of the tensors span common addresses. Views beside each other in one buffer do not."""
    spans = []
    for t in values:
        if t.numel() and t.layout == torch.strided:
            last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
            spans.append((t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()))
    spans.sort()
    return any(a[1] > b[0] for a, b in itertools.pairwise(spans))


# -- the caller's state -------------------------------------------------------------------------------------------


@contextmanager
def quiet(device: torch.device) -> Iterator[None]:
    """The caller's random state, saved-tensor hooks, inference mode and autocast cache: as if nothing had happened inside."""
    cache = torch.is_autocast_cache_enabled()
    device = indexed(device)
    forked = [device.index] if device.type in ("cuda", "xpu", "npu") else []
    try:
        torch.set_autocast_cache_enabled(False)
        with (
            torch.random.fork_rng(forked, device_type=device.type if forked else "cuda"),
            torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
            torch.inference_mode(False),
            on(device),
        ):
            yield
    finally:
        torch.set_autocast_cache_enabled(cache)


def settings(device: torch.device) -> dict[str, Any]:
    """What torch is told for this thread or for all code, and a kernel has no business to change."""
    return {name: ask() for name, (ask, _) in {**_SETTINGS, **(_OF_CUDA if device.type == "cuda" else {})}.items()}


def changed(before: Mapping[str, Any], device: torch.device) -> list[str]:
    """Which of `settings` are no more what they were; they are put back."""
    found = [name for name, now in settings(device).items() if now != before[name]]
    for name in found:
        {**_SETTINGS, **_OF_CUDA}[name][1](before[name])
    return found


def _precision() -> str | None:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # set by torch's newer names, which refuses to be read by the old one
        return None


def _set_precision(value: str | None) -> None:
    if value is not None:
        torch.set_float32_matmul_precision(value)


_SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "grad mode": (torch.is_grad_enabled, torch._C._set_grad_enabled),  # noqa: SLF001  # the public one is a context manager that acts when made
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "number of threads": (torch.get_num_threads, torch.set_num_threads),
    "float32 matmul precision": (_precision, _set_precision),
    "deterministic mode": (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
}
_OF_CUDA: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "current device": (torch.cuda.current_device, torch.cuda.set_device),
    "current stream": (torch.cuda.current_stream, torch.cuda.set_stream),
}


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The same on another device: strides, the place in its storage, and what lies around it."""
    if tensor.device == device or not _plain(tensor):
        return tensor.to(device)
    storage = tensor.untyped_storage()
    size = storage.nbytes() // tensor.element_size()
    base = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage, 0, (size,), (1,))
    return base.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def indexed(device: torch.device) -> torch.device:
    """`cuda` as the current `cuda:N`."""
    index: int | None = device.index  # torch's stub says int
    if index is None and device.type in ("cuda", "xpu", "npu"):
        return torch.device(device.type, getattr(torch, device.type).current_device())
    return device


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Launches go to `device`: kernels take the current one, whatever their tensors say."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _generators(device: torch.device) -> list[torch.Generator]:
    found = [torch.default_generator]
    if device.type == "cuda":
        found.append(torch.cuda.default_generators[indexed(device).index])
    return found


def seed(device: torch.device, value: int) -> list[Tensor]:
    """Seed the generators that a call on `device` may draw from, and no other device's. Returns their states."""
    return [g.manual_seed(value).get_state() for g in _generators(device)]


def states(device: torch.device) -> list[Tensor]:
    """Of the generators that a call on `device` may draw from."""
    return [g.get_state() for g in _generators(device)]


def restore(device: torch.device, held: Sequence[Tensor]) -> None:
    """Set them back to what `states` returned."""
    for generator, state in zip(_generators(device), held, strict=True):
        generator.set_state(state)


def same_seed(device: torch.device, states: Sequence[Tensor]) -> bool:
    """Whether nobody drew since `seed` returned `states`."""
    return all(torch.equal(g.get_state(), s) for g, s in zip(_generators(device), states, strict=True))


def settle(device: torch.device) -> None:
    """Wait, so that an error of a launch is raised where it belongs."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


_user = threading.local()


def _user_count() -> int:
    count: int = getattr(_user, "count", 0)
    return count


@contextmanager
def one_thread(*, wanted: bool) -> Iterator[None]:
    """What we compute on small tensors runs in this thread alone.

    On a busy machine each parallel region waits for threads that are not scheduled, and a check has thousands.
    """
    count = torch.get_num_threads()
    if not wanted or count == 1 or _user_count() or not _threads_can_change():
        yield
        return
    _user.count = count
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)
        _user.count = 0


@contextmanager
def users_threads() -> Iterator[None]:
    """Both run as they will run for the user: the kernel's threads are part of what is checked, a product's are part of its rounding.

    MKL sums the 65536 terms of the last of 11 rows one after another where two threads share the rows.
    """
    count = _user_count()
    if not count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(1)


def users_count() -> int:
    """How many threads that are."""
    return _user_count() or torch.get_num_threads()


def set_threads(count: int) -> None:
    """In a thread that has just begun, which otherwise may take as many as there are cores."""
    if _threads_can_change():
        torch.set_num_threads(count)


@functools.cache
def _threads_can_change() -> bool:
    return "ATen parallel backend: OpenMP" in torch.__config__.parallel_info()  # others take a number once


# -- what stays ---------------------------------------------------------------------------------------------------


def leak(ask: Callable[[], Any], device: torch.device) -> str | None:
    """What a kernel keeps after every call, or `None`. Caches that fill once are fine."""
    kept = []
    for _ in range(3):
        poison = Poison()
        with poison:
            ask()
        kept.append(poison)
    if kept[-1].kept():
        gc.collect()
        alive = [p.kept() for p in kept]
        if all(alive):
            return f"{alive[-1]} more tensor{'s' if alive[-1] > 1 else ''} stay{'' if alive[-1] > 1 else 's'} after every call"
    size = 0
    for _ in range(2):  # twice, because another thread may allocate meanwhile
        before = _allocated(device)
        if before is None:
            return None
        for _ in range(CALLS):
            out = ask()
        size = max((t.untyped_storage().nbytes() for t in out.outputs), default=0)
        del out
        grown = (_allocated(device) or 0) - before
        if size < 4096 or grown < CALLS * size / 2:
            return None
    return f"{grown // CALLS} bytes stay after every call"


def _allocated(device: torch.device) -> int | None:
    """Bytes in use that a C allocator knows of: torch's for cuda, glibc's for cpu."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    info = _mallinfo()
    if device.type != "cpu" or info is None:
        return None
    held = info()
    return int(held.uordblks + held.hblkhd)


class _Info(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    ]


@functools.cache
def _mallinfo() -> Callable[[], Any] | None:
    if sys.platform != "linux":
        return None
    function = getattr(ctypes.CDLL(None), "mallinfo2", None)  # glibc 2.33 and later
    if function is not None:
        function.restype = _Info
    return function


# -- torch.compile ------------------------------------------------------------------------------------------------


def compiled(function: Callable[..., Any], backend: str) -> tuple[Callable[..., Any], list[int]]:
    """`function` under `torch.compile`, and a list that gets one entry per graph that was really compiled.

    The frame that dynamo sees has a code object of its own: the caller's recompile limit is not used up.
    """
    import torch._dynamo

    graphs: list[int] = []
    inner = torch._dynamo.lookup_backend(backend)  # noqa: SLF001  # the public `torch.compile(backend=name)` hides the count

    def counting(graph: Any, examples: Any) -> Any:
        graphs.append(len(list(graph.graph.nodes)))
        return inner(graph, examples)

    def entry(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    fresh = types.FunctionType(entry.__code__.replace(), entry.__globals__, "entry", None, entry.__closure__)
    return torch.compile(fresh, backend=counting, dynamic=False), graphs
