"""Cross entropy with its gradient: two sweeps over each row of logits, the second one out of L2.

    loss = logsumexp(z) - z[target]          dz = softmax(z) - onehot(target)

A row of 151936 bf16 logits is 304 KB, more than shared memory; with one row per multiprocessor in flight the rows of a
wave (40 MB) fit in the H200's 60 MB of L2, so the second read costs no device memory traffic. Logits are not written to.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["ignore", "scale", "rows"])
def _forward_backward(
    Z, T, LOSS, DZ, scale, ignore, rows,
    V: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
    """LOSS: (rows,) float32. DZ: dloss/dlogits * scale, in Z's dtype; may be Z itself."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(T + row)
    base = row * V
    col = tl.arange(0, BLOCK)
    m = tl.full((BLOCK,), float("-inf"), tl.float32)
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, V, BLOCK, num_stages=STAGES):
        z = tl.load(Z + base + start + col, mask=start + col < V, other=float("-inf"), eviction_policy="evict_last").to(tl.float32)
        new = tl.maximum(m, z)
        acc = acc * tl.exp2((m - tl.where(new == float("-inf"), 0.0, new)) * 1.4426950408889634) + tl.exp2((z - tl.where(new == float("-inf"), 0.0, new)) * 1.4426950408889634)
        m = new
    top = tl.max(m, axis=0)
    total = tl.sum(acc * tl.exp2((m - top) * 1.4426950408889634), axis=0)
    lse = top + tl.log(total)
    if target != ignore:
        zt = tl.load(Z + base + target).to(tl.float32)
        tl.store(LOSS + row, lse - zt)
    else:
        tl.store(LOSS + row, 0.0)
    if GRAD:
        live = tl.where(target != ignore, scale, 0.0)
        for start in tl.range(0, V, BLOCK, num_stages=STAGES):
            at = start + col
            z = tl.load(Z + base + at, mask=at < V, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
            p = tl.exp2((z - lse) * 1.4426950408889634)
            tl.store(DZ + base + at, (p - tl.where(at == target, 1.0, 0.0)) * live, mask=at < V, cache_modifier=".cs")
