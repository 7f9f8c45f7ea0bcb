"""Kernels with compiled code, compiled once per test run and shared by its workers.

def test_x(native_build): ...   # build/<variant> of tests/kernels/native: op `twice`, layer `Twice`, version 3
def test_y(layers_build): ...   # build/<variant> of the bundled CPU layers
"""

import importlib.util
import json
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from kernelswap import build, machine

NATIVE = Path(__file__).parent / "native"
LAYERS = Path(build.__file__).parent / "bundled" / "layers"


def this_cpu():
    """This machine, as a CPU build sees it."""
    return machine.for_backend(machine.look(), "cpu")


def compiled(source, tmp_path_factory):
    """The build of `source` for this CPU, below the run's own temporary directory."""
    if build.compiler() is None:
        pytest.skip("no C++ compiler on this machine")
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    return build.compile(source, this_cpu(), shared / "compiled" / source.name)


def load(path, *, as_name=None):
    """Import a build under its id, as a loader does, without one."""
    name = as_name or json.loads((path / "metadata.json").read_bytes())["id"]
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path / "__init__.py", submodule_search_locations=[str(path)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def opened(name, build_path):
    """The package of a bundled build under `name`, as long as this lasts; its submodules go with it."""
    spec = importlib.util.spec_from_file_location(name, build_path / "__init__.py", submodule_search_locations=[str(build_path)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    try:
        yield module
    finally:
        for inside in [m for m in sys.modules if m.partition(".")[0] == name]:
            del sys.modules[inside]


def repository(build_path, root):
    """A repository on disk that holds this one build, as a directory source or a hub has it."""
    target = root / "build" / build_path.name
    shutil.copytree(build_path, target, ignore=shutil.ignore_patterns("__pycache__"))
    return root


@pytest.fixture(scope="session")
def native_build(tmp_path_factory):
    return compiled(NATIVE, tmp_path_factory)


@pytest.fixture(scope="session")
def layers_build(tmp_path_factory):
    return compiled(LAYERS, tmp_path_factory)


@pytest.fixture(scope="session")
def layers_alone(tmp_path_factory):
    """The bundled CPU layers under an id of their own: opened here directly, they must not meet those that a Swapper loads."""
    return compiled(under_an_id_of_its_own(LAYERS, tmp_path_factory), tmp_path_factory)


@pytest.fixture(scope="session")
def native_of_a_hub(tmp_path_factory):
    """`native_build` under an id of its own, for tests that load it while another has opened that one."""
    return compiled(under_an_id_of_its_own(NATIVE, tmp_path_factory), tmp_path_factory)


def under_an_id_of_its_own(source, tmp_path_factory):
    """A copy of a source whose build has another id: that carries the digest of the sources."""
    own = tmp_path_factory.mktemp("sources") / f"{source.name}_alone"
    shutil.copytree(source, own, ignore=shutil.ignore_patterns("__pycache__", "build"))
    with (own / "build.toml").open("a") as file:
        file.write("# for tests that open the build beside another\n")
    return own
