"""`import kernels` gives ours while installed, and nothing is left afterwards."""

import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import subprocess
import sys
import textwrap

import pytest

from kernelswap import compat
from kernelswap.compat import names, version

PUBLIC = [
    "get_kernel",
    "get_local_kernel",
    "get_locked_kernel",
    "load_kernel",
    "has_kernel",
    "install_kernel",
    "get_kernel_dep",
    "get_kernel_variants",
    "VariantAccepted",
    "VariantRejected",
    "get_loaded_kernels",
    "LoadedKernel",
    "RepoInfo",
    "Metadata",
    "kernelize",
    "KernelizeFallback",
    "Mode",
    "Device",
    "CUDAProperties",
    "ROCMProperties",
    "register_kernel_mapping",
    "use_kernel_mapping",
    "use_kernel_forward_from_hub",
    "replace_kernel_forward_from_hub",
    "use_kernelized_func",
    "use_kernel_func_from_hub",
    "LayerRepository",
    "LocalLayerRepository",
    "LockedLayerRepository",
    "FuncRepository",
    "LocalFuncRepository",
    "LockedFuncRepository",
    "Benchmark",
    "__version__",
]


def run(code, **env):
    given = {**os.environ, "PYTHONPATH": os.pathsep.join([p for p in sys.path if p]), "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=given, timeout=200, check=False
    )


def test_uninstall_leaves_no_trace():
    finders, modules = list(sys.meta_path), [name for name in sys.modules if name.partition(".")[0] == "kernels"]
    compat.install()
    assert compat.installed()
    importlib.import_module("kernels.layer.mode")
    assert importlib.metadata.version("kernels")
    compat.uninstall()
    assert not compat.installed()
    assert all(a is b for a, b in zip(sys.meta_path, finders, strict=True))
    assert [name for name in sys.modules if name.partition(".")[0] == "kernels"] == modules == []
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("kernels")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("kernels")
    compat.uninstall()


def test_installing_twice_is_installing_once():
    compat.install()
    finders = list(sys.meta_path)
    compat.install()
    assert sys.meta_path == finders
    compat.uninstall()


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there(kernels, name):
    assert name in kernels.__all__
    assert getattr(kernels, name)


@pytest.mark.parametrize("module", sorted(names.MODULES))
def test_every_submodule_has_its_names(kernels, module):  # installed
    found = importlib.import_module(module)
    assert importlib.util.find_spec(module) is not None
    assert all(getattr(found, name) is not None for name in names.MODULES[module])


def test_names_that_are_functions_and_modules_are_functions_when_asked_of_the_package(kernels):
    import kernels.layer.kernelize

    assert kernels.kernelize is kernels.layer.kernelize is sys.modules["kernels.layer.kernelize"].kernelize
    assert kernels.layer.mode.Mode is kernels.Mode


def test_a_module_that_is_not_served_is_named(kernels):  # installed
    with pytest.raises(ModuleNotFoundError, match=r"serves no module kernels\.secret"):
        importlib.import_module("kernels.secret")


def test_other_distributions_are_found_as_ever(kernels):  # installed
    assert importlib.metadata.version("pytest") == pytest.__version__
    assert "kernels" in {d.metadata["Name"] for d in importlib.metadata.distributions()}


@pytest.mark.parametrize(
    ("window", "version_"),
    [
        ({}, "0.18.2"),
        ({"MIN": "0.10.2"}, "0.18.2"),
        ({"MIN": "0.15.2", "MAX": "0.16"}, "0.15.2"),
        ({"MIN": "0.17.2", "MAX": "0.18"}, "0.17.2"),
        ({"MIN": "0.18.2", "MAX": "0.19.0"}, "0.18.2"),
        ({"MIN": "0.21.0", "MAX": "0.22"}, "0.21.0"),
    ],
)
def test_the_version_is_inside_the_window(window, version_):
    assert version.inside(window) == version_


def test_the_window_is_that_of_the_installed_transformers(kernels):
    from transformers.utils import import_utils

    assert version.window() == {"MIN": import_utils.KERNELS_MIN_VERSION, "MAX": import_utils.KERNELS_MAX_VERSION}
    assert kernels.__version__ == importlib.metadata.version("kernels")


def test_importing_it_imports_no_torch():
    done = run("import sys; from kernelswap import compat; compat.install(); import kernels; print('torch' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


def real(tmp_path):
    """A package called kernels, as pip would have installed it."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("__version__ = '0.17.2'\nget_kernel = 'theirs'\n")
    info = tmp_path / "kernels-0.17.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.17.2\n")
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path), *(p for p in sys.path if p)])}


def test_with_another_kernels_installed_ours_is_served_and_theirs_comes_back(tmp_path):
    done = run(
        """
        import importlib.metadata
        from kernelswap import compat
        compat.install()
        import kernels
        from kernels import get_kernel
        print(callable(get_kernel), importlib.metadata.version("kernels"))
        compat.uninstall()
        import kernels
        print(kernels.get_kernel, importlib.metadata.version("kernels"))
        """,
        **real(tmp_path),
    )
    assert done.stdout.split() == ["True", "0.18.2", "theirs", "0.17.2"], done.stderr


def test_another_kernels_that_was_imported_before_stays_and_it_is_said_what_to_do(tmp_path):
    done = run(
        """
        import kernels
        from kernelswap import compat
        compat.install()
        import kernels as again
        print(again is kernels, again.get_kernel)
        compat.uninstall()
        """,
        **real(tmp_path),
    )
    assert done.stdout.split() == ["True", "theirs"], done.stderr
    assert "Call kernelswap.install() before anything imports kernels" in done.stderr


def test_python_m_kernels_says_where_check_went(kernels, capsys):
    assert kernels.cli.main(["check"]) == 1
    assert "kernel-builder" in capsys.readouterr().err


RELEASES = {
    # parameters of each release that had others than the one before; those after `*` are keyword-only
    "get_kernel": {
        "0.14": "repo_id revision version backend user_agent trust_remote_code",
        "0.16": "repo_id revision version backend user_agent trust_remote_code check_arch",
        "0.17": "repo_id * revision version backend user_agent trust_remote_code check_arch",
    },
    "has_kernel": {
        "0.14": "repo_id revision version backend",
        "0.16": "repo_id revision version backend check_arch",
        "0.17": "repo_id * revision version backend trust_remote_code check_arch",
    },
    "get_local_kernel": {"0.14": "repo_path backend", "0.17": "repo_path * backend trust_remote_code user_agent"},
    "get_locked_kernel": {
        "0.12": "repo_id local_files_only",
        "0.17": "repo_id * lockfile trust_remote_code user_agent",
    },
    "load_kernel": {
        "0.12": "repo_id * lockfile",
        "0.15": "repo_id * lockfile backend revision",
        "0.17": "repo_id * lockfile backend",
        "as sglang calls it": "repo_id lockfile",
    },
    "install_kernel": {
        "0.12": "repo_id revision local_files_only variant_locks user_agent",
        "0.16": "repo_id * revision local_files_only backend variant_locks user_agent validate_dependencies",
        "0.17": "repo_id * revision version backend local_files_only user_agent trust_remote_code",
    },
    "get_kernel_variants": {"0.15": "repo_id revision version backend", "0.17": "repo_id * revision version backend"},
    "get_loaded_kernels": {"0.14": ""},
    "get_kernel_dep": {"0.17": "repo_id"},
    "kernelize": {"0.12": "model * mode device use_fallback"},
    "register_kernel_mapping": {"0.12": "mapping inherit_mapping"},
    "use_kernel_mapping": {"0.12": "mapping * inherit_mapping"},
    "use_kernel_forward_from_hub": {"0.12": "layer_name", "0.17": "layer_name condition"},
    "replace_kernel_forward_from_hub": {"0.12": "cls layer_name", "0.17": "cls layer_name condition"},
    "use_kernel_func_from_hub": {"0.12": "func_name"},
    "LayerRepository": {
        "0.12": "repo_id * layer_name revision version",
        "0.17": "repo_id * layer_name revision version trust_remote_code user_agent",
    },
    "LocalLayerRepository": {"0.12": "repo_path * package_name layer_name", "0.14": "repo_path * layer_name"},
    "LockedLayerRepository": {"0.12": "repo_id * lockfile layer_name", "0.14": "repo_id * lockfile layer_name trust_remote_code"},
    "FuncRepository": {"0.14": "repo_id * func_name revision version trust_remote_code"},
    "LocalFuncRepository": {"0.12": "repo_path * package_name func_name", "0.14": "repo_path * func_name"},
    "LockedFuncRepository": {"0.14": "repo_id * lockfile func_name trust_remote_code"},
    "Device": {"0.12": "type properties"},
    "CUDAProperties": {"0.12": "min_capability max_capability"},
    "ROCMProperties": {"0.15": "min_capability max_capability"},
    "LoadedKernel": {"0.14": "metadata module repo_info"},
    "RepoInfo": {"0.14": "repo_id revision"},
    "VariantAccepted": {"0.15": "variant"},
    "VariantRejected": {"0.15": "variant reason"},
}


@pytest.mark.parametrize(("name", "release"), [(name, r) for name, of in RELEASES.items() for r in of])
def test_every_form_in_which_some_release_took_its_arguments_is_taken(kernels, name, release):
    positional, _, keyword = RELEASES[name][release].partition("*")
    signature = inspect.signature(getattr(kernels, name))
    everything = positional.split() + keyword.split()
    signature.bind(**{p: p for p in everything})
    required = {
        p.name: None
        for p in signature.parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.default is p.empty and p.name in everything
    }
    bound = signature.bind(*positional.split(), **required).arguments
    assert [bound[p] for p in positional.split()] == positional.split()
