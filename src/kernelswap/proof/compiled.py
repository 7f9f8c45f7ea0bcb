"""The original under `torch.compile`, as one more candidate for its own site."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import torch

from ..types import Artifact, Candidate, Implementation, Metadata, Requirement, Site

SPEC = "torch.compile"
"""What it is called where candidates are named by their spec."""


def compiled(site: Site, original: Callable[..., Any]) -> Implementation:
    """`original` compiled by inductor. That happens at its first call, once per process and kind of call.

    Dynamo keeps what it compiled with the code object, eight times at most: each site of its own kind gets its own.
    """
    function: Callable[..., Any] = original
    if isinstance(original, FunctionType):
        function = FunctionType(
            original.__code__.replace(), original.__globals__, original.__name__, original.__defaults__, original.__closure__
        )
        function.__kwdefaults__ = original.__kwdefaults__
    forward = torch.compile(function)
    digest = hashlib.sha256(f"{SPEC} {torch.__version__}".encode()).hexdigest()
    origin = Artifact(
        Candidate(Requirement("compile", source="torch"), "torch", SPEC, digest, "inductor"),
        Path(torch.__file__).parent,
        digest,
        Metadata(SPEC, "torch_compile", 1, "BSD-3-Clause", "universal"),
    )
    return Implementation(
        layer=site.target.rpartition(".")[2],
        kind="module" if site.kind == "module" else "function",
        forward=forward,
        backward=True,
        compiles=True,
        origin=origin,
    )
