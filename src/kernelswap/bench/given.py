"""A user's own inputs for a model: a prompt, or a file of tensors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import KernelSwapError

if TYPE_CHECKING:
    from .subject import Subject

SUFFIXES = (".json", ".safetensors", ".npz", ".pt")


def with_prompt(subject: Subject, text: str) -> Subject:
    """The subject with this text instead of the one that comes with kernelswap."""
    batch = subject.tokenizer(text, return_tensors="pt")
    if not batch["input_ids"].numel():
        raise KernelSwapError("the prompt has no tokens", asked=f"--prompt {text!r}", todo="Give a text.")
    device = next(iter(subject.inputs.values())).device
    return replace(subject, prompt=text, inputs={k: v.to(device) for k, v in batch.items()})


def with_file(subject: Subject, path: Path) -> Subject:
    """The subject with the tensors of a file: what its forward takes, by name.

    Formats: `.json` (lists of numbers), `.safetensors`, `.npz`, `.pt` (tensors only: nothing in it is executed).

    Raises:
        KernelSwapError: it cannot be read, or holds something else.
    """
    import torch

    try:
        found = _read(path)
    except (OSError, ValueError, KeyError, RuntimeError, EOFError) as e:
        why = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise KernelSwapError(
            f"{path} cannot be read: {why}", todo="Give tensors by name, as the model's forward takes them."
        ) from e
    except Exception as e:  # torch.load raises pickle's errors, which are of no common class
        raise KernelSwapError(f"{path} holds more than tensors: {type(e).__name__}", todo="Save a dict of tensors.") from e
    if not isinstance(found, dict) or not found or not all(isinstance(k, str) for k in found):
        raise KernelSwapError(f"{path} holds no tensors by name", todo='Such as {"input_ids": [[1, 2, 3]]}.')
    device = next(iter(subject.inputs.values())).device
    try:
        inputs = {name: torch.as_tensor(value).to(device) for name, value in found.items()}
    except (TypeError, ValueError, RuntimeError) as e:
        raise KernelSwapError(f"{path}: {e}", todo="Every value is a tensor, or nested lists of numbers.") from e
    return replace(subject, prompt="", inputs=inputs)


def _read(path: Path) -> Any:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"it ends in none of {', '.join(SUFFIXES)}")
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    if path.suffix == ".npz":
        import numpy as np

        with np.load(path, allow_pickle=False) as held:
            return dict(held)
    import torch

    return torch.load(path, map_location="cpu", weights_only=True)
