"""The base class of the benchmarks that kernels ship: `benchmarks/benchmark*.py` of a repository."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any


class Benchmark:
    """One workload: `setup_x`, or else `setup`, makes tensors; `benchmark_x` calls the kernel; `verify_x` gives the right answer.

    What is measured is left in `out`, where it is compared with what `verify_x` returns.
    """

    seed: int | None = None
    """For the generators of Python and torch, before `setup`."""
    device: str = "cpu"
    kernel: Any = None
    """The module of the kernel; set before `setup`."""
    out: Any = None

    def setup(self) -> None:
        """Make what every workload needs that has no `setup_x` of its own."""

    @classmethod
    def workloads(cls) -> tuple[str, ...]:
        """Names of the workloads: of `benchmark_x`, x."""
        names = (n for n in dir(cls) if n.startswith("benchmark_") and callable(getattr(cls, n)))
        return tuple(sorted(n.removeprefix("benchmark_") for n in names))

    def prepare(self, workload: str) -> None:
        """`setup_x` where there is one, else `setup`."""
        if self.seed is not None:
            import torch

            torch.manual_seed(self.seed)
            random.seed(self.seed)
        own: Callable[[], object] = getattr(self, f"setup_{workload}", self.setup)
        own()

    def verified(self, workload: str) -> tuple[Any, Any] | None:
        """`(out, the right answer)`; `None` where the benchmark has none. `verify_x` may put `out` together itself."""
        verify: Callable[[], Any] | None = getattr(self, f"verify_{workload}", None)
        if verify is None:
            return None
        right = verify()
        return self.out, right
