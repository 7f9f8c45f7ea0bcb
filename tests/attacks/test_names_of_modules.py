"""A kernel that calls its files like modules of somebody else, or its id like another kernel's."""

import sys

import pytest

from kernelswap.errors import BadMetadata, LoadFailed


def test_files_called_like_torch_or_os_shadow_nothing(world):
    import os

    files = {
        "__init__.py": "import os, json\nfrom . import layers\n",
        "os.py": world.evil,
        "json.py": world.evil,
        "layers.py": "import json, os\nV = os\n",
    }
    module = world.load(world.put(world.build(files)))
    assert module.os is os
    assert module.layers.V is os
    assert sys.modules["os"] is os


@pytest.mark.parametrize("id_", ["os", "sys", "json", "__main__", "builtins"])
def test_an_id_that_is_a_module_of_python(world, refused, id_):
    build = world.build({"__init__.py": world.evil}, id_=id_)
    refused(BadMetadata, "module of Python itself", lambda: world.put(build))


@pytest.mark.parametrize("id_", ["torch", "transformers", "kernelswap"])
def test_an_id_that_is_somebodys_package_replaces_nothing(world, id_):
    before = sys.modules.get(id_)
    module = world.load(world.put(world.build({"__init__.py": "V = 1\n"}, id_=id_)))
    assert sys.modules.get(id_) is before
    assert module.__name__ != id_
    assert sys.modules[module.__name__] is module


def test_a_kernel_cannot_be_loaded_over_something_that_has_its_name(world, refused, monkeypatch):
    import types

    artifact = world.put(world.build({"__init__.py": world.evil}))
    name = f"{artifact.metadata.id}_{artifact.digest[:12]}"
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    refused(LoadFailed, "something else is imported as", lambda: world.load(artifact))
    monkeypatch.delitem(sys.modules, name)


def test_a_failed_import_takes_its_submodules_along(world, refused):
    files = {
        "__init__.py": "from . import a, b\nraise OSError('libcuda.so.1')\n",
        "a.py": "",
        "b/__init__.py": "from . import c\n",
        "b/c.py": "",
    }
    artifact = world.put(world.build(files))
    refused(LoadFailed, r"OSError while importing it: libcuda\.so\.1", lambda: world.load(artifact))
