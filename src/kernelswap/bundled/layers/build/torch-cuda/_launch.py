"""Launch a compiled Triton kernel without Triton's Python binder.

`fn[grid](...)` re-derives types, alignments and a cache key at every call: about 14 us of host time. Here the caller
looks its specialisation up in a dict of its own and hands raw pointers to the C launcher: 2 to 3 us. Pointers are passed
as integers, which also skips a driver query per tensor.

Triton's launcher is private. `bind` looks at what is there and, where it does not know it, returns a launch through the
public `fn[grid]`: slower, never wrong. The same serves Triton's interpreter (`TRITON_INTERPRET=1` before the first import of
Triton), in which the kernels run on CPU tensors, slowly: that is how they are tested where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import mangle_type

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""The kernels run on CPU tensors and only there: launch where `x.is_cuda is not INTERPRETED`."""

if hasattr(torch._C, "_cuda_getDevice") and not INTERPRETED:
    from torch._C import _cuda_getCurrentRawStream as current_stream  # what Triton and Inductor use
    from torch._C import _cuda_getDevice as current_device
else:  # nothing to ask: what a CPU tensor's `get_device()` says, and a stream that nobody reads

    def current_stream(device: int) -> int:  # noqa: ARG001
        return 0

    def current_device() -> int:
        return -1

_HERE = nullcontext()


def on(device: int) -> Any:
    """A context in which `device` is the current one. Nothing where it is already: `torch.cuda.device` costs 4 us a time."""
    return _HERE if device == current_device() else torch.cuda.device(device)


Launch = Callable[..., None]
"""`launch(blocks, stream, *args)`: tensors or integers that are pointers, then numbers, in the kernel's order."""


def bind(fn: Any, args: tuple[Any, ...], *, device: int, num_warps: int, num_stages: int = 3, overlap: bool = False, **constants: Any) -> Launch:
    """Compile `fn` for arguments like `args` (tensors decide dtype and alignment) on `device`.

    Constants must be the last parameters of `fn`, in the order given. `args` are not touched: nothing runs.
    overlap: the launch may begin before the kernel ahead of it on the stream has ended, and `fn` waits for that one itself
    (programmatic dependent launch, compute capability 9.0 on). `STAGES` among the constants is how many blocks of a loop are on
    their way at once; where their memory is more than this GPU has, there are fewer. Where one tensor is not aligned to 16 bytes, none
    is taken to be: callers tell launches apart by the low bits of all pointers together.
    """
    if any(isinstance(a, torch.Tensor) and a.data_ptr() & 15 for a in args):
        args = tuple(a.new_empty(2)[1:] if isinstance(a, torch.Tensor) else a for a in args)
    while True:
        try:
            return _bound(fn, args, device, num_warps, num_stages, overlap, constants)
        except OutOfResources:
            if constants.get("STAGES", 1) < 2:
                raise
            constants["STAGES"] -= 1


def _bound(
    fn: Any, args: tuple[Any, ...], device: int, num_warps: int, num_stages: int, overlap: bool, constants: dict[str, Any]
) -> Launch:
    more = {"launch_pdl": True} if overlap else {}
    with torch.cuda.device(device):
        kernel = fn.warmup(*args, grid=(1,), num_warps=num_warps, num_stages=num_stages, **more, **constants)
        if hasattr(kernel, "result"):  # compiled in a pool
            kernel = kernel.result()
        fast = _raw(kernel, len(constants))
    if fast is not None:
        return fast
    # of the tensors only what they are is kept, not their memory
    examples = [torch.empty(0, dtype=a.dtype) if isinstance(a, torch.Tensor) else None for a in args]

    def pointer(value: Any, example: Any) -> Any:
        if not isinstance(example, torch.Tensor):
            return value
        return _interpreted(value, example) if INTERPRETED else _Address(value, example.dtype)

    def slow(blocks: int, stream: int, *call: Any) -> None:  # noqa: ARG001 -- Triton takes the current stream
        given = map(pointer, call, examples)
        fn[(blocks,)](*given, num_warps=num_warps, num_stages=num_stages, **more, **constants)

    return slow


class _Address:
    """A pointer as Triton's public face takes it: an integer would be taken for a number."""

    __slots__ = ("address", "dtype")

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self.address = address
        self.dtype = dtype

    def data_ptr(self) -> int:
        return self.address


def _interpreted(address: int, example: torch.Tensor) -> Any:
    """A pointer as the interpreter holds it, after its own conversion of tensors: that one wants a whole tensor."""
    import numpy as np
    from triton.runtime.interpreter import TensorHandle

    kind = tl.str_to_ty(mangle_type(example), None)
    return tl.tensor(TensorHandle(np.array([address], dtype=np.uint64), kind), kind)


def multiprocessors(device: int) -> int:
    """How many there are; asked once per device. A few where the kernels are interpreted: programs share the work as on a GPU."""
    if device not in _multiprocessors:
        _multiprocessors[device] = 4 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count
    return _multiprocessors[device]


_multiprocessors: dict[int, int] = {}


def _raw(kernel: Any, constants: int) -> Launch | None:
    """The C launcher with everything but grid, stream and arguments filled in; None where this Triton differs."""
    runner = getattr(kernel, "run", None)
    launch = getattr(runner, "launch", None)
    known = ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "launch_pdl")
    if launch is None or not all(hasattr(runner, name) for name in known):
        return None
    if runner.global_scratch_size or runner.profile_scratch_size:
        return None
    function, packed = kernel.function, kernel.packed_metadata
    cooperative, pdl = runner.launch_cooperative_grid, runner.launch_pdl
    rest = (None,) * constants  # the launcher counts them and looks at none

    def fast(blocks: int, stream: int, *call: Any) -> None:
        launch(blocks, 1, 1, stream, function, cooperative, pdl, None, None, packed, None, None, None, *call, *rest)

    return fast
