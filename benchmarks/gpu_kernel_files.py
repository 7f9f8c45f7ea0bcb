"""The bundled kernels below their layers, as a model gets them: found, verified, loaded, with what was measured on this device."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import torch
from gpu_timing import CUDA

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

REPOSITORIES = {
    "kernelswap/layers": (
        "layers/build/torch-cuda",
        (*("rms_norm", "layer_norm", "gated_norm", "softmax"), *("glu", "rope", "rope_gradients", "projections", "tuning")),
    ),
    "kernelswap/attention": ("attention/build/torch-universal", ("decode", "dense", "forward", "tuning")),
    "kernelswap/loss": ("loss/build/torch-universal", ("cross_entropy", "loss", "tuning")),
}


class Kernels:
    """In an interpreter, where no build for a GPU is chosen, the files of those builds."""

    def __init__(self, cache: Path | None = None, *, tuned: bool = True) -> None:
        """`tuned` False: with the configurations of the kernels' own formulas."""
        import kernelswap as ks
        from kernelswap.tuning import place

        self.swapper = ks.Swapper(cache=cache)
        self.tunings = self.swapper.tunings
        self.place = place(torch.cuda.current_device() if CUDA else -1)
        self._tuned = tuned
        self._loaded: dict[str, tuple[types.SimpleNamespace, str]] = {}

    def of(self, repository: str) -> types.SimpleNamespace:
        """Its files with kernels, as modules."""
        return self._load(repository)[0]

    def digest(self, repository: str) -> str:
        """What measurements of it hold for."""
        return self._load(repository)[1]

    def tuned(self) -> list[str]:
        """In words, what is launched with measured configurations."""
        index = torch.cuda.current_device() if CUDA else -1
        return [text for _, digest in self._loaded.values() if self._tuned for text in self.tunings.tuned(digest, index)]

    def loaded(self) -> list[str]:
        """The repositories that were asked for."""
        return sorted(self._loaded)

    def _load(self, repository: str) -> tuple[types.SimpleNamespace, str]:
        if repository not in self._loaded:
            folder, names = REPOSITORIES[repository]
            package: Any
            if CUDA:
                kernel = self.swapper.kernel(repository, device="cuda")
                package, digest = kernel.module, kernel.artifact.digest
            else:
                import kernelswap
                from kernelswap import tree
                from kernelswap.tuning import hand_in

                root = Path(kernelswap.__file__).parent / "bundled" / folder
                package = types.ModuleType("interpreted_" + folder.partition("/")[0])
                package.__path__ = [str(root)]
                sys.modules[package.__name__] = package
                digest = tree.digest_of({path: h for path, h in tree.hashes(root).items() if path.endswith(".py")})
                package.tuning = importlib.import_module(f"{package.__name__}.tuning")
                hand_in(package, digest, self.tunings)
            if not self._tuned:
                package.tuning._find.clear()
            modules = {n: importlib.import_module(f"{package.__name__}.{n}") for n in names}
            self._loaded[repository] = types.SimpleNamespace(**modules), digest
        return self._loaded[repository]
