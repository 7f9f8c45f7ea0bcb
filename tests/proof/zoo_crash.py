"""Kernels that take the process down, as files: a child process loads them, never the one that runs the tests."""

import base64
import hashlib
import json

import torch

from kernelswap import tree
from kernelswap.types import Artifact, Candidate, Implementation, Metadata, Requirement

HEAD = """
import torch
import torch.nn as nn

class layers:
    pass

def norm(self, x):
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon) * self.weight.float()).to(x.dtype)
"""
LAYER = """
class Norm(nn.Module):
    weight: torch.Tensor
    variance_epsilon: float
    has_backward = True

    def forward(self, hidden_states):
{body}
        return norm(self, hidden_states)
"""
CRASHES = {
    "segfaults": "        import ctypes\n        ctypes.string_at(0)",
    "aborts": "        import os\n        os.abort()",
    "exits": "        import os\n        os._exit(3)",
    "is_killed": "        import os, signal\n        os.kill(os.getpid(), signal.SIGKILL)",
    "hangs": "        import threading\n        threading.Event().wait()",
    "segfaults_on_nothing": "        import ctypes\n        hidden_states.numel() or ctypes.string_at(0)",
}
HARMLESS = {
    "is_fine": "",
    "prints": "        print('hello' * 10)\n        import os\n        os.write(1, b'x' * 100)",
    "raises": "        raise RuntimeError('out of registers')",
}


def artifact(root, body, *, native=True, source="dir"):
    """A kernel repository with one layer, `Norm`, on disk."""
    root.mkdir(parents=True)
    code = HEAD.replace("class layers:\n    pass\n", "") + LAYER.format(body=body)
    (root / "__init__.py").write_text("from . import layers\n")
    (root / "layers.py").write_text(code)
    if native:
        (root / "_kernel.abi3.so").write_bytes(b"\x7fELF")
    digest = {
        p: base64.b64encode(hashlib.sha256((root / p).read_bytes()).digest()).decode() for p in ("__init__.py", "layers.py")
    }
    (root / "metadata.json").write_text(
        json.dumps({"name": "crash", "version": 1, "digest": {"algorithm": "sha256", "files": digest}})
    )
    metadata = Metadata("crash", "_crash_cpu_0a1b2c3", 1, "Apache-2.0", "cpu")
    candidate = Candidate(Requirement("org/crash"), source, "org/crash", "c" * 40, "torch-cpu")
    return Artifact(candidate, root, tree.digest_of(tree.hashes(root)), metadata)


def never_called(self, hidden_states):
    """What a kernel that takes its process down is here: calling it means that nobody noticed."""
    return hidden_states


def raising(self, hidden_states):
    raise RuntimeError("out of registers")


def norm(self, hidden_states):
    wide = hidden_states.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
    return (wide * scale * self.weight.float()).to(hidden_states.dtype)


def implementation(found, forward):
    """As the parent would have it; `forward` is what runs here when the child survived."""
    return Implementation("Norm", "module", forward, backward=True, compiles=False, origin=found)
