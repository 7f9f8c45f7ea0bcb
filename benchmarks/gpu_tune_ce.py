# ruff: noqa: N803, PLR0913, PLR0917 -- a kernel takes pointers and constants, and those have names in capitals
"""Which launch of the cross entropy kernel is fastest: `python benchmarks/gpu_tune_ce.py [rows] [vocab]`. Bytes: logits read once, gradient written once.

The second sweep of a row is free only if its logits are still in L2. 8 warps of 4096 columns leave room for two rows in each
multiprocessor, 80 MB of a 151936-word vocabulary at once, which is more than an H200's L2. Programs that stay (`stay`: so many for each
multiprocessor, going from row to row) bound that. What wins goes into `bundled/loss`; the numbers go into LOG.md.
"""

from __future__ import annotations

import itertools
import sys

import torch
import triton
import triton.language as tl
from gpu_timing import device_us, element_wise_bandwidth, relative


@triton.jit
def sweeps(
    Z, T, LOSS, DZ, by, rows, programs,
    V: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, STORE: tl.constexpr,
    BACK: tl.constexpr,
):  # fmt: skip
    """BACK: the second sweep goes from the row's end to its start: what was read last is what is surely still there."""
    col = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), rows, programs):
        base = row.to(tl.int64) * V
        target = tl.load(T + row)
        m = tl.full((BLOCK,), float("-inf"), tl.float32)
        acc = tl.zeros((BLOCK,), tl.float32)
        for start in tl.range(0, V, BLOCK, num_stages=STAGES):
            z = tl.load(Z + base + start + col, mask=start + col < V, other=float("-inf"), eviction_policy=FIRST).to(tl.float32)
            new = tl.maximum(m, z)
            safe = tl.where(new == float("-inf"), 0.0, new)
            acc = acc * tl.exp2((m - safe) * 1.4426950408889634) + tl.exp2((z - safe) * 1.4426950408889634)
            m = new
        top = tl.max(m, axis=0)
        lse = top + tl.log(tl.sum(acc * tl.exp2((m - top) * 1.4426950408889634), axis=0))
        tl.store(LOSS + row, lse - tl.load(Z + base + target).to(tl.float32))
        for n in tl.range(0, (V + BLOCK - 1) // BLOCK, num_stages=STAGES):
            at = ((V + BLOCK - 1) // BLOCK - 1 - n) * BLOCK + col if BACK else n * BLOCK + col
            z = tl.load(Z + base + at, mask=at < V, other=float("-inf"), eviction_policy=SECOND).to(tl.float32)
            d = tl.exp2((z - lse) * 1.4426950408889634) - tl.where(at == target, 1.0, 0.0)
            tl.store(DZ + base + at, d * by, mask=at < V, cache_modifier=STORE)


HINTS = {"hints": ("evict_last", "evict_first", ".cs"), "none": ("", "", "")}


def main() -> None:
    rows, vocab = (int(a) for a in (*sys.argv[1:], 4096, 151936)[:2])
    torch.manual_seed(0)
    sets = [torch.randn(rows, vocab, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    out = torch.empty_like(sets[0])
    target = torch.randint(0, vocab, (rows,), device="cuda")
    losses = torch.empty(rows, device="cuda")
    units = torch.cuda.get_device_properties(0).multi_processor_count
    want = sets[0][:16].double().requires_grad_()
    torch.nn.functional.cross_entropy(want, target[:16], reduction="sum").backward()
    floor = rows * vocab * 4 / element_wise_bandwidth() * 1e6
    found = []
    shapes = [(4096, 8), (2048, 8), (8192, 8), (8192, 16), (16384, 16), (8192, 32), (16384, 32)]
    for (block, warps), stages, stay, hints, back in itertools.product(shapes, (1, 3), (0, 1, 2), HINTS, (False, True)):
        if back and (hints != "hints" or not stay):
            continue

        def run(z: torch.Tensor, block=block, warps=warps, stages=stages, stay=stay, hints=hints, back=back) -> None:
            programs = stay * units if stay else rows
            first, second, store = HINTS[hints]
            sweeps[(min(programs, rows),)](
                z, target, losses, out, 1.0, rows, programs, V=vocab, BLOCK=block, STAGES=stages, FIRST=first, SECOND=second,
                STORE=store, BACK=back, num_warps=warps,
            )  # fmt: skip

        name = f"block {block} warps {warps} stages {stages} stay {stay} {hints}{' back' if back else ''}"
        try:
            run(sets[0])
            error = relative(out[:16], want.grad)
            assert error < 5e-3, f"{name}: {error}"
            took, spread = device_us({"x": [lambda z=z: run(z) for z in sets]})["x"]
        except (RuntimeError, triton.errors.TritonError) as e:
            print(f"{name}: {str(e).splitlines()[0]}", flush=True)
            continue
        found.append((took, spread, name))
    for took, spread, name in sorted(found)[:25]:
        print(f"{took:8.1f} us  {floor / took:.3f} of the floor  spread {spread:.3f}  {name}")
    base = next(f for f in found if f[2] == "block 4096 warps 8 stages 3 stay 0 hints")
    print(f"{base[0]:8.1f} us  {floor / base[0]:.3f} of the floor  {base[2]}, as it is now but for one stage")


if __name__ == "__main__":
    main()
