"""A layer name that walks from the kernel into the interpreter."""

import pytest

from kernelswap import layers, loader
from kernelswap.errors import LayerMismatch, UnknownKernel

LAYERS = """
import builtins
import os
import torch.nn as nn

def __getattr__(name):
    builtins.attacked = name
    raise AttributeError(name)

class Honest(nn.Module):
    def forward(self, x):
        return x
"""


@pytest.mark.parametrize(
    "name",
    [
        "__globals__", "__builtins__", "__dict__", "__class__", "__loader__", "__getattr__", "_private", "Honest.forward", "os.system",
        "..Honest", "Honest\0", " Honest", "Honest;os", "import", "None", "", "Ho\u200bnest",
    ],
)  # fmt: skip  # one name after another
def test_names_that_are_refused_before_anything_is_looked_up(world, refused, name):
    kernel = loader.load(world.put(world.build({"__init__.py": "from . import layers\n", "layers.py": LAYERS})))
    refused(UnknownKernel, "cannot be the name of a layer", lambda: layers.implementation(kernel, name))
    refused(UnknownKernel, "cannot be the name of a layer", lambda: layers.function(kernel, name))


@pytest.mark.parametrize("name", ["os", "nn", "builtins"])
def test_what_a_kernel_imported_is_not_on_offer(world, refused, name):
    code = LAYERS.replace("builtins.attacked = name\n", "pass\n")
    kernel = loader.load(world.put(world.build({"__init__.py": "from . import layers\n", "layers.py": code})))
    refused(UnknownKernel, "it offers Honest", lambda: layers.implementation(kernel, name))


def test_a_function_of_the_operating_system_is_no_layer(world, refused):
    code = "from os import system, popen\nfrom subprocess import run\nfrom builtins import exec as execute\n"
    kernel = loader.load(world.put(world.build({"__init__.py": "from . import layers\n", "layers.py": code})))
    for name in ("system", "popen", "run", "execute"):
        refused(UnknownKernel, "it offers none", lambda name=name: layers.implementation(kernel, name))


def test_a_layer_with_a_constructor_is_never_constructed(world, refused):
    code = f"import torch.nn as nn\nclass Evil(nn.Module):\n    def __init__(self):\n        exec({world.evil!r})\n    def forward(self, x): return x\n"
    kernel = loader.load(world.put(world.build({"__init__.py": "from . import layers\n", "layers.py": code})))
    refused(LayerMismatch, "has a constructor", lambda: layers.implementation(kernel, "Evil"))
    refused(LayerMismatch, "has a constructor", lambda: layers.function(kernel, "Evil"))


def test_a_new_method_is_a_constructor_too(world, refused):
    code = f"import torch.nn as nn\nclass Evil(nn.Module):\n    def __new__(cls):\n        exec({world.evil!r})\n        return super().__new__(cls)\n    def forward(self, x): return x\n"
    kernel = loader.load(world.put(world.build({"__init__.py": "from . import layers\n", "layers.py": code})))
    refused(LayerMismatch, "has a constructor", lambda: layers.function(kernel, "Evil"))
