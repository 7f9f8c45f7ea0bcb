"""Launch a compiled Triton kernel without Triton's Python binder.

`fn[grid](...)` re-derives types, alignments and a cache key at every call: about 14 us of host time. Here the caller
looks its specialisation up in a dict of its own and hands raw pointers to the C launcher: 2 to 3 us. Pointers are passed
as integers, which also skips a driver query per tensor.

Triton's launcher is private. `bind` looks at what is there and, where it does not know it, returns a launch through the
public `fn[grid]`: slower, never wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

try:
    from torch._C import _cuda_getCurrentRawStream as current_stream  # what Triton and Inductor use
    from torch._C import _cuda_getDevice as current_device
except ImportError:  # a CPU build of torch: the module imports, nothing launches

    def current_stream(device: int) -> int:
        return int(torch.cuda.current_stream(device).cuda_stream)

    current_device = torch.cuda.current_device

Launch = Callable[..., None]
"""`launch(blocks, stream, *args)`: tensors or integers that are pointers, then numbers, in the kernel's order."""


def bind(fn: Any, args: tuple[Any, ...], *, device: int, num_warps: int, num_stages: int = 3, **constants: Any) -> Launch:
    """Compile `fn` for arguments like `args` (tensors decide dtype and alignment) on `device`.

    Constants must be the last parameters of `fn`, in the order given. `args` are not touched: nothing runs.
    """
    with torch.cuda.device(device):
        kernel = fn.warmup(*args, grid=(1,), num_warps=num_warps, num_stages=num_stages, **constants)
        if hasattr(kernel, "result"):  # compiled in a pool
            kernel = kernel.result()
        fast = _raw(kernel, len(constants))
    if fast is not None:
        return fast

    def slow(blocks: int, stream: int, *call: Any) -> None:  # noqa: ARG001 -- Triton takes the current stream
        fn[(blocks,)](*call, num_warps=num_warps, num_stages=num_stages, **constants)

    slow.takes_tensors = True  # type: ignore[attr-defined]  # integers are not pointers to the public face
    return slow


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
