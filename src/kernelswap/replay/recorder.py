"""What records a step: a protocol, and CUDA graphs. Recording executes nothing on the device; replaying does."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Recording(Protocol):
    """One recorded run. Its tensors lie where they lay while it was recorded."""

    output: Any
    """What the run returned; every replay writes the same tensors again."""
    bytes: int
    """Memory that is held for it."""

    def replay(self) -> None:
        """Run it again, on what its input tensors hold now."""
        ...


class Recorder(Protocol):
    """Makes recordings."""

    def misfit(self, device: torch.device) -> str | None:
        """Why nothing can be recorded on this device, or `None`."""
        ...

    def record(self, run: Callable[[], Any], device: torch.device) -> Recording:
        """Record `run`.

        Raises:
            Exception: whatever stands in the way. The device is as it was, nothing was executed.
        """
        ...


class Graph:
    """A captured CUDA graph."""

    def __init__(self, graph: torch.cuda.CUDAGraph, output: Any, size: int) -> None:
        self.graph, self.output, self.bytes = graph, output, size

    def replay(self) -> None:
        """Launch it on the current stream."""
        self.graph.replay()


class CudaGraphs:
    """Captures CUDA graphs; all of them share one pool of memory, for they never run at the same time."""

    def __init__(self) -> None:
        self.places: dict[torch.device, tuple[Any, torch.cuda.Stream]] = {}
        self.alive: defaultdict[torch.device, weakref.WeakSet[Graph]] = defaultdict(weakref.WeakSet)

    def misfit(self, device: torch.device) -> str | None:
        """CUDA alone has graphs."""
        if device.type != "cuda":
            return f"the model is on {device.type}, and only CUDA has graphs to capture"
        return "this PyTorch is for ROCm, where capturing is not tested" if torch.version.hip is not None else None

    def record(self, run: Callable[[], Any], device: torch.device) -> Graph:
        """Capture `run` on a stream of its own. Other threads may go on using the device."""
        if device not in self.places or not self.alive[device]:  # PyTorch refuses a pool that no graph holds any more
            with torch.cuda.device(device):
                self.places[device] = torch.cuda.graph_pool_handle(), _stream(device)
        pool, side = self.places[device]
        graph, current, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device), 0
        with torch.cuda.device(device):
            try:
                with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                    before = torch.cuda.memory_reserved(device)
                    output = run()
            except BaseException:
                torch.cuda.set_stream(current)
                _mend(device, pool)
                self.places.pop(device, None)  # nothing that comes shares memory with what failed
                raise
        recorded = Graph(graph, output, max(0, torch.cuda.memory_reserved(device) - before))
        self.alive[device].add(recorded)
        return recorded


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Where recordings are made, one for all models: cuBLAS keeps 32 MiB for every stream that it ever met."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's own


def _mend(device: torch.device, pool: Any) -> None:
    """What PyTorch leaves open when a capture was broken by a synchronisation: the allocator's pool and the random generator."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    with contextlib.suppress(RuntimeError):  # it was closed
        torch._C._cuda_endAllocateToPool(index, pool)  # noqa: SLF001  # what torch.cuda.use_mem_pool calls
    torch.cuda.synchronize(device)
    try:
        torch.rand(1, device=device)
    except RuntimeError:  # it takes itself for captured still
        generator = torch.cuda.default_generators[index]
        generator.graphsafe_set_state(generator.clone_state())
