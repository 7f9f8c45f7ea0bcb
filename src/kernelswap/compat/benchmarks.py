"""`kernels.benchmarks`: workloads that several published kernels inherit (activation, layer-norm, flash-attn2, flash-attn3).

Each has the workloads small, medium and large, in float16, on the device that it is given. The answers are computed here in
float32, by PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .benchmark import Benchmark

if TYPE_CHECKING:
    from torch import Tensor


class _ThreeSizes(Benchmark):
    """The subclass says `make(*sizes[name])`, `call()` and `answer()`."""

    seed = 42
    sizes: dict[str, tuple[Any, ...]]

    def make(self, *size: Any) -> None:
        """Tensors of one size."""
        raise NotImplementedError

    def call(self) -> None:
        """The kernel, into `out`."""
        raise NotImplementedError

    def answer(self) -> Tensor:
        """What `out` should be."""
        raise NotImplementedError

    def setup_small(self) -> None:
        """Small."""
        self.make(*self.sizes["small"])

    def setup_medium(self) -> None:
        """Medium."""
        self.make(*self.sizes["medium"])

    def setup_large(self) -> None:
        """Large."""
        self.make(*self.sizes["large"])

    def benchmark_small(self) -> None:
        """Small."""
        self.call()

    benchmark_medium = benchmark_large = benchmark_small

    def verify_small(self) -> Tensor:
        """Small."""
        return self.answer()

    verify_medium = verify_large = verify_small

    def random(self, *shape: int) -> Tensor:
        """Normal, float16."""
        import torch

        return torch.randn(shape, device=self.device, dtype=torch.float16)


class SiluAndMulBenchmark(_ThreeSizes):
    """`silu_and_mul(out, x)`: `out = silu(x[..., :d]) * x[..., d:]`, x (B, S, 2 d), out (B, S, d)."""

    sizes = {"small": (8, 1024, 1024), "medium": (8, 2048, 2048), "large": (8, 4096, 4096)}  # noqa: RUF012  # never written

    def make(self, batch: int, length: int, width: int) -> None:
        """As in the class."""
        self.x, self.out = self.random(batch, length, 2 * width), self.random(batch, length, width).zero_()

    def call(self) -> None:
        """As in the class."""
        self.kernel.silu_and_mul(self.out, self.x)

    def answer(self) -> Tensor:
        """As in the class."""
        from torch.nn.functional import silu

        gate, value = self.x.float().chunk(2, dim=-1)
        return (silu(gate) * value).to(self.x.dtype)


class _Norm(_ThreeSizes):
    sizes = {"small": (2, 128, 768), "medium": (4, 512, 2048), "large": (8, 1024, 4096)}  # noqa: RUF012  # never written
    eps = 1e-5
    rms: bool

    def make(self, batch: int, length: int, width: int) -> None:
        """`x` (B, S, N) and a weight (N,) of ones."""
        self.x, self.weight = self.random(batch, length, width), self.random(width).fill_(1)
        self.out = self.x.new_zeros(self.x.shape)

    def call(self) -> None:
        """The entry of the layer-norm kernel, which has an argument for everything that it could add."""
        unused = dict.fromkeys(("beta", "rowscale", "colscale", "x0_subset", "z_subset", "gen"))
        rows = self.x.reshape(-1, self.x.shape[-1])
        made = self.kernel.dropout_add_ln_fwd(
            input=rows,
            gamma=self.weight,
            dropout_p=0.0,
            epsilon=self.eps,
            rowscale_const=1.0,
            z_numrows=self.x.shape[1],
            residual_in_fp32=False,
            is_rms_norm=self.rms,
            **unused,
        )
        self.out = made[0].reshape(self.x.shape)

    def answer(self) -> Tensor:
        """In float32."""
        import torch.nn.functional as F  # noqa: N812  # torch's own convention

        norm = F.rms_norm if self.rms else F.layer_norm
        return norm(self.x.float(), self.weight.shape, self.weight.float(), eps=self.eps).to(self.x.dtype)


class LayerNormBenchmark(_Norm):
    """`dropout_add_ln_fwd(is_rms_norm=False)`, without bias, residual or dropout."""

    rms = False


class RMSNormBenchmark(_Norm):
    """`dropout_add_ln_fwd(is_rms_norm=True)`."""

    rms = True


class FlashAttentionBenchmark(_ThreeSizes):
    """`flash_attn_func(q, k, v, causal=)`, each (B, S, heads, head size)."""

    sizes = {  # noqa: RUF012  # never written
        "small": (2, 128, 8, 64),
        "medium": (4, 512, 16, 64),
        "large": (8, 1024, 32, 128),
    }
    causal = False

    def make(self, *shape: int) -> None:
        """As in the class."""
        self.q, self.k, self.v = (self.random(*shape) for _ in range(3))
        self.out = self.q.new_zeros(self.q.shape)

    def call(self) -> None:
        """Some kernels return more than the output; that comes first."""
        made = self.kernel.flash_attn_func(self.q, self.k, self.v, causal=self.causal)
        self.out = made if hasattr(made, "shape") else made[0]

    def answer(self) -> Tensor:
        """By PyTorch's own attention."""
        return _attention(self.q, self.k, self.v, causal=self.causal)


class FlashAttentionCausalBenchmark(FlashAttentionBenchmark):
    """The same, causal."""

    causal = True


class FlashAttentionVarlenBenchmark(_ThreeSizes):
    """`flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k)` over sequences of several lengths, packed: (tokens, heads, head size)."""

    sizes = {  # noqa: RUF012  # never written
        "small": ((32, 48, 64), 8, 64),
        "medium": ((128, 192, 256, 200, 150), 16, 64),
        "large": ((256, 384, 512, 448, 320, 512, 480, 400), 32, 128),
    }

    def make(self, lengths: tuple[int, ...], heads: int, size: int) -> None:
        """As in the class."""
        import torch

        self.q, self.k, self.v = (self.random(sum(lengths), heads, size) for _ in range(3))
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        self.lengths, self.cu_seqlens, self.max_seqlen = lengths, ends.to(self.device), max(lengths)
        self.out = self.q.new_zeros(self.q.shape)

    def call(self) -> None:
        """Some kernels return more than the output; that comes first."""
        ends, longest = self.cu_seqlens, self.max_seqlen
        made = self.kernel.flash_attn_varlen_func(self.q, self.k, self.v, ends, ends, longest, longest)
        self.out = made if hasattr(made, "shape") else made[0]

    def answer(self) -> Tensor:
        """One sequence after the other."""
        import torch

        parts = zip(*(torch.split(t, list(self.lengths)) for t in (self.q, self.k, self.v)), strict=True)
        return torch.cat([_attention(*(t[None] for t in part), causal=False)[0] for part in parts])


def _attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """(B, S, heads, head size), in the dtype of `q`; the CPU computes half precision in float32."""
    from torch.nn.functional import scaled_dot_product_attention as attention

    def heads(t: Tensor) -> Tensor:
        return (t.float() if t.device.type == "cpu" else t).transpose(1, 2)

    return attention(heads(q), heads(k), heads(v), is_causal=causal).transpose(1, 2).to(q.dtype)
