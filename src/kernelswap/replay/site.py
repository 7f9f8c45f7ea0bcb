"""The outcome that puts recordings in the place of a model's forward, and what generate() must know of it."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..slots import classes, obstacles
from ..types import Artifact, Candidate, Choice, Implementation, Kept, Metadata, Outcome, Requirement, Row, Site, Swap, Verdict
from . import caches, replays
from .recorder import CudaGraphs, Recorder
from .replays import Differs, Replays

if TYPE_CHECKING:
    import torch.nn as nn

LAYER = "graphs"
ROW = Row(layer=LAYER, note="decode steps on a static cache, recorded and replayed")


def outcome(
    model: nn.Module,
    differs: Differs,
    recorder: Recorder | None = None,
    *,
    append: caches.Append | None = None,
    taken: bool = False,
    replacing: bool = False,
    off: str = "",
) -> Outcome:
    """What becomes of `model` as a whole: its decode steps are recorded, or why not. The model is not touched.

    Args:
        model: whose `forward` generate() calls.
        differs: see `Replays`.
        recorder: by default CUDA graphs.
        append: see `Replays`.
        taken: whether the model itself, not what is in it, gets another kernel.
        replacing: a swap of ours on it is going to be undone first.
        off: why nothing is to be done at all.
    """
    import torch

    recorder = CudaGraphs() if recorder is None else recorder
    original = classes.original(model)
    tensor = next((p for p in model.parameters()), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    site = Site(
        path="",
        kind="module",
        layer=LAYER,
        target=f"{original.__module__}.{original.__qualname__}",
        device=str(device),
        dtype=str(tensor.dtype) if tensor is not None else "torch.float32",
        training=model.training,
        row=ROW,
    )
    reasons = (
        (bool(off), off),
        (
            not hasattr(model, "prepare_inputs_for_generation"),
            "the model has no generate() of Transformers, which makes the steps",
        ),
        (taken, "another kernel serves the model itself"),
        (device.type == "meta", "its weights are on the meta device, not loaded yet"),
    )
    why = next((why for so, why in reasons if so), None) or recorder.misfit(device)
    why = why or obstacles.obstacle(model, replacing=replacing)
    if why is not None:
        return Kept(site, why)
    found = Implementation(
        layer="CUDAGraph",
        kind="module",
        forward=forward(original, Replays(original.forward, recorder, differs, append)),
        backward=False,  # a call with gradients, and a model in training mode, has its own forward
        compiles=False,  # so has code that is compiled
        origin=_origin("captured" if isinstance(recorder, CudaGraphs) else type(recorder).__name__),
    )
    choice = Choice(found, verdict=Verdict(accepted=True, reason="each recording is compared with the step itself"))
    return Swap(site, choice, Choice(None, ((LAYER, "records no gradients"),)))


def forward(original: type[Any], mine: Replays) -> Callable[..., Any]:
    """The forward of a recorded model. Under the attribute `beside` are other methods that its class needs."""
    inner = original.forward

    @functools.wraps(inner)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return replays.of(self, mine)(self, args, kwargs)

    def _valid_auto_compile_criteria(self: Any, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
        """generate() compiles the steps of a static cache unless this says no; who asks for it by name still gets it."""
        cache = model_kwargs.get("past_key_values")
        if getattr(generation_config, "compile_config", None) is None and cache is not None and caches.misfit(cache) is None:
            return False
        answer: bool = original._valid_auto_compile_criteria(self, model_kwargs, generation_config)  # noqa: SLF001  # the seam
        return answer

    forward.replays = mine  # type: ignore[attr-defined]
    beside = (_valid_auto_compile_criteria,)
    forward.beside = {f.__name__: f for f in beside if hasattr(original, f.__name__)}  # type: ignore[attr-defined]
    return forward


def _origin(how: str) -> Artifact:
    """Not a kernel: the model's own forward, run by torch."""
    import torch

    digest = hashlib.sha256(f"{how} {torch.__version__}".encode()).hexdigest()
    return Artifact(
        Candidate(Requirement("graphs", source="torch"), "torch", "torch.cuda", digest, how),
        Path(torch.__file__).parent,
        digest,
        Metadata("torch.cuda", "torch_cuda_graph", 1, "BSD-3-Clause", "universal"),
    )
