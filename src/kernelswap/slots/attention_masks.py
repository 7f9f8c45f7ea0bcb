"""Masks for attention kernels, in the form that each kind reads. Called by Transformers once per forward and kind of layer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def _masking() -> Any:
    return sys.modules["transformers.masking_utils"]  # who calls us has imported it


def four_dimensional() -> Callable[..., Any]:
    """Transformers' mask for scaled_dot_product_attention: `None` where `is_causal` says it all, else bool (B, 1, Sq, Sk)."""
    return _masking().sdpa_mask  # type: ignore[no-any-return]  # Transformers has no stubs for it


def two_dimensional(
    batch_size: int, q_length: int, kv_length: int, q_offset: Any = 0, kv_offset: int = 0, attention_mask: Any = None, **rest: Any
) -> Any:
    """Transformers' mask for flash kernels: `None`, or bool (B, keys) of which keys are tokens.

    Where more keys are there than tokens (a static cache) and no mask was given, one is made: flash kernels align at the end.
    """
    if attention_mask is None and kv_offset == 0 and kv_length > q_length:
        live = int(q_offset) + q_length
        if live < kv_length:
            import torch

            return torch.ones((batch_size, live), dtype=torch.bool, device=rest.get("device"))
    found = _masking().flash_attention_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        attention_mask=attention_mask, **rest,
    )  # fmt: skip
    shorter = found is None and attention_mask is not None and kv_offset == 0 and attention_mask.shape[-1] < kv_length
    return attention_mask if shorter else found  # without padding it still says how much of a static cache lives


def with_lengths(  # noqa: PLR0913, PLR0917  # Transformers' signature
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Any = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,  # noqa: FBT001, FBT002  # same
    **rest: Any,
) -> Any:
    """As `four_dimensional`, and for one token `None` (every key lives and is seen) or int32 (B, 1, 1, 1), how many do.

    A static cache is longer than what lives in it; the length stays on the device. With a padding mask, in half precision on a GPU, int32
    (B, 1, 1, 1 + keys): how many live, then which of them are seen; nothing is read back. Elsewhere the padding mask is looked at
    once, and where it hides nothing, lengths say it all.
    """
    import torch

    masking = _masking()
    function = masking.causal_mask_function if mask_function is None else mask_function
    exporting = getattr(torch.compiler, "_is_exporting_flag", False)  # Dynamo before 2.14 takes `is_exporting()` for True
    plain = attention_mask is None and allow_is_causal_skip and function is masking.causal_mask_function and not exporting
    whole = 1 < q_length == kv_length and kv_offset == 0 and not isinstance(q_offset, torch.Tensor) and q_offset == 0
    if plain and whole and (local_size is None or kv_length < local_size):
        return None  # `is_causal` says it all, also under capture and compile, where most releases make a mask
    if q_length == 1 and not torch.compiler.is_compiling():
        found = _one_token(
            torch,
            batch_size,
            kv_length,
            q_offset,
            kv_offset,
            function,
            attention_mask,
            local_size,
            rest.get("dtype"),
            rest.get("device"),
        )
        if found is not False:
            return found
    return masking.sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=function, attention_mask=attention_mask, local_size=local_size, allow_is_causal_skip=allow_is_causal_skip,
        **rest,
    )  # fmt: skip


def _one_token(  # noqa: PLR0911, PLR0913, PLR0917  # what the mask of one token depends on
    torch: Any,
    batch: int,
    keys: int,
    offset: Any,
    kv_offset: int,
    function: Any,
    mask: Any,
    local_size: int | None,
    dtype: Any,
    device: Any,
) -> Any:
    """`None`, lengths, or False: it takes a mask of four dimensions."""
    static = isinstance(offset, torch.Tensor)
    if static and function is _masking().causal_mask_function and kv_offset == 0 and offset.numel() == 1:
        offset = offset.reshape(())  # of one dimension before 5.15
        if mask is None:
            return (offset + 1).to(torch.int32).expand(batch).contiguous().view(batch, 1, 1, 1)
        if mask.ndim != 2 or mask.shape[-1] > keys:
            return False
        if _reads_packed(torch, offset, dtype):
            return packed(torch, offset, mask, keys)
        if not _capturing(torch, mask, offset) and bool(_prefix(torch, mask, offset)):
            return (offset + 1).to(torch.int32).expand(batch).contiguous().view(batch, 1, 1, 1)
        return False
    if not static and local_size is not None and keys <= local_size and _slides(function):
        live = offset + 1 - kv_offset  # a static cache of the window's size may not be full
        if live < keys:
            return torch.full((batch, 1, 1, 1), live, dtype=torch.int32, device=device) if mask is None else False
        return None if mask is None or (not _capturing(torch, mask, offset) and bool(mask[:, -keys:].all())) else False
    return False


def _reads_packed(torch: Any, offset: Any, dtype: Any) -> bool:
    """Whether the kernel for one token, which takes the mask as it is, is going to serve."""
    return offset.is_cuda and dtype in {torch.bfloat16, torch.float16}


def packed(torch: Any, offset: Any, mask: Any, keys: int) -> Any:
    """How many keys live and which are seen, int32 (B, 1, 1, 1 + keys), of a padding mask (B, up to keys)."""
    found = torch.zeros((mask.shape[0], 1, 1, 1 + keys), dtype=torch.int32, device=mask.device)
    found[..., 0] = offset + 1
    found[:, 0, 0, 1 : 1 + mask.shape[-1]] = mask != 0
    return found


def _prefix(torch: Any, mask: Any, last: Any) -> Any:
    """Whether the tokens up to position `last`, and no others, are there, in every row."""
    at = torch.arange(mask.shape[-1], device=mask.device)
    return ((at <= last) == mask.bool()).all() & (mask.shape[-1] > last)


def _capturing(torch: Any, mask: Any, offset: Any) -> bool:
    on_gpu = any(isinstance(x, torch.Tensor) and x.is_cuda for x in (mask, offset))
    return mask is not None and on_gpu and bool(torch.cuda.is_current_stream_capturing())


def _slides(function: Callable[..., Any]) -> bool:
    """Whether it is a causal sliding window and nothing else; chunks, which look alike from outside, are not."""
    for cell in getattr(function, "__closure__", None) or ():
        parts = cell.cell_contents
        if isinstance(parts, tuple) and all(callable(part) for part in parts):
            names = {part.__qualname__.partition(".")[0] for part in parts}
            return names == {"sliding_window_overlay", "causal_mask_function"}
    return False
