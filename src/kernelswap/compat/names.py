"""What `kernels` and its submodules offer, and where it is here: module -> {name: (module, name there; "" the module itself)}."""

from __future__ import annotations

_HERE = __package__ + "."


def _of(home: str, *names: str) -> dict[str, tuple[str, str]]:
    return {name: (_HERE + home, name) for name in names}


_LOADING = _of(
    "loading", "get_kernel", "get_local_kernel", "has_kernel", "install_kernel", "get_kernel_variants", "get_kernel_dep"
)
_LOADED = _of("loading", "get_loaded_kernels")
_LOCKED = _of("locked", "get_locked_kernel", "load_kernel")
_VALUES = _of("values", "LoadedKernel", "Metadata", "RepoInfo", "VariantAccepted", "VariantRejected")
_DEVICES = _of("devices", "CUDAProperties", "Device", "ROCMProperties")
_MODE = {"Mode": ("kernelswap.types", "Mode")}
_LAYERS = _of("repositories", "LayerRepository", "LocalLayerRepository", "LockedLayerRepository")
_FUNCS = _of("repositories", "FuncRepository", "LocalFuncRepository", "LockedFuncRepository")
_MAPPING = _of("mapping", "register_kernel_mapping", "use_kernel_mapping")
_DECORATORS = _of(
    "decorators",
    "replace_kernel_forward_from_hub",
    "use_kernel_forward_from_hub",
    "use_kernel_func_from_hub",
    "use_kernelized_func",
)
_KERNELIZE = _of("kernelizing", "KernelizeFallback", "kernelize")
_BENCHMARK = _of("benchmark", "Benchmark")
_NORMS = _of("benchmarks", "LayerNormBenchmark", "RMSNormBenchmark")
_ACTIVATIONS = _of("benchmarks", "SiluAndMulBenchmark")
_ATTENTION = _of("benchmarks", "FlashAttentionBenchmark", "FlashAttentionCausalBenchmark", "FlashAttentionVarlenBenchmark")
_LAYER = {**_DEVICES, **_MODE, **_LAYERS, **_FUNCS, **_MAPPING, **_DECORATORS, **_KERNELIZE}

MODULES: dict[str, dict[str, tuple[str, str]]] = {
    "kernels": {**_LOADING, **_LOADED, **_LOCKED, **_VALUES, **_BENCHMARK, **_LAYER},
    "kernels.layer": _LAYER,
    "kernels.layer.device": _DEVICES,
    "kernels.layer.func": _FUNCS,
    "kernels.layer.kernelize": {**_KERNELIZE, **_MAPPING},
    "kernels.layer.layer": {**_LAYERS, **_DECORATORS},
    "kernels.layer.mode": _MODE,
    "kernels.layer.repos": {},
    "kernels.benchmark": _BENCHMARK,
    "kernels.benchmarks": {**_ACTIVATIONS, **_ATTENTION, **_NORMS},
    "kernels.benchmarks.activation": _ACTIVATIONS,
    "kernels.benchmarks.attention": _ATTENTION,
    "kernels.benchmarks.layer_norm": _NORMS,
    "kernels.cli": _of("command", "main", "download_kernels"),
    "kernels.load": {**_LOADING, **_LOADED, **_LOCKED},
    "kernels.lockfile": _of("lockfile", "KernelLock", "VariantLock"),
    "kernels.locking": _LOCKED,
    "kernels.metadata": _of("values", "Metadata"),
    "kernels.utils": {**_LOADING, **_LOADED, **_LOCKED},
    "kernels.variants": _of("values", "VariantAccepted", "VariantRejected"),
}
