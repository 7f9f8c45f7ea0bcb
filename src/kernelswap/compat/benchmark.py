"""The base class of the benchmarks that kernels ship: `benchmarks/benchmark*.py` of a repository."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


class Benchmark:
    """One workload: `setup` or `setup_x` makes tensors, `benchmark_x` calls the kernel, `verify_x` gives the right answer.

    What is measured is left in `out`, where it is compared with what `verify_x` returns.
    """

    seed: int | None = None
    """For torch's generators, before `setup`."""
    device: str = "cpu"
    kernel: Any = None
    """The module of the kernel; set before `setup`."""
    out: Any = None

    def setup(self) -> None:
        """Make what every workload needs."""

    @classmethod
    def workloads(cls) -> tuple[str, ...]:
        """Names of the workloads: of `benchmark_x`, x."""
        return tuple(sorted(n.removeprefix("benchmark_") for n in dir(cls) if n.startswith("benchmark_")))

    def prepare(self, workload: str) -> None:
        """`setup`, then `setup_x` where there is one."""
        if self.seed is not None:
            import torch

            torch.manual_seed(self.seed)
        self.setup()
        more: Callable[[], object] | None = getattr(self, f"setup_{workload}", None)
        if more is not None:
            more()

    def verified(self, workload: str) -> Iterator[tuple[Any, Any]]:
        """`(out, the right answer)`, where the benchmark has one."""
        verify: Callable[[], Any] | None = getattr(self, f"verify_{workload}", None)
        if verify is not None:
            yield self.out, verify()
