"""A decoder-only transformer (GPT) of today's kind, small enough to read in one sitting.

A GPT maps token ids to a score for every possible next token. The default is the 27M-parameter
model that `06_train.py` trains; `PRESETS` holds smaller ones for machines without a GPU.

The equations, per layer and per position t:

    RMSNorm     n(x)  = g * x / sqrt(mean(x^2) + eps)
    attention   q, k, v = split(W_qkv n(x))                  queries, keys, values
                q, k  = R_t n(q), R_t n(k)                   QK-norm, then rotation by position
                p_s   = softmax_{s <= t}(q_t . k_s / sqrt(D))
                x     = x + W_out sum_s p_s v_s
    SwiGLU      gate, up = split(W_gate_up n(x));   x = x + W_down(silu(gate) * up)
    RoPE        R_t turns the pair (x_i, x_{i+D/2}) by the angle t * theta^(-2i/D), so that
                (R_t q) . (R_s k) depends on q, k and the distance t - s only
    head        logits = E n(x)                              E is the embedding table (tied)

Letters used below: B batch rows, T positions, S positions read so far (by `Decoder`, with these T),
C = d_model, H query heads, G = n_kv_head key/value heads (H/G queries share one: GQA), D = C/H,
M = d_mlp, V vocabulary.

Start: output projections (W_out, W_down) begin at zero, so the first forward pass is the
embedding followed by the head. With tied weights such a model echoes its input: the logit of the
input token is sqrt(C) * |E_i|, about C * std. At std 0.02 and C 512 that is 10, and the first
loss is 10.4 instead of ln V = 8.3. Std 2.5 / C keeps that logit at 2.5 and the loss at ln V to
within 0.1. A smaller std loses more later: a few updates on, the outputs of the layers drown it.

Sources: Vaswani et al. 2017 (arXiv 1706.03762); RMSNorm: Zhang & Sennrich 2019 (1910.07467);
RoPE: Su et al. 2021 (2104.09864), in the half-split form of GPT-NeoX and Llama; SwiGLU: Shazeer
2020 (2002.05202); GQA: Ainslie et al. 2023 (2305.13245); QK-norm: Henry et al. 2020 (2010.04245),
in Qwen3's form (per head, with gain, before the rotation); tied embeddings: Press & Wolf 2017
(1608.05859); attention by blocks: FlashAttention, Dao et al. 2022 (2205.14135); top-p: Holtzman
et al. 2020 (1904.09751); min-p: Nguyen et al. 2024 (2407.01082).

Run: `python 03_gpt.py` (CPU, 6 s on 2 cores of an AMD EPYC (Zen 5)) prints, from seed 0,

    preset      parameters   MFLOP/token   loss at step 0        ln V
    27m         27,273,728         188.7           8.3207      8.3178
    8m           8,320,000          61.7           8.3336      8.3178
    0.5m           459,520           3.5           6.9919      6.9315
    memorising one row of 64 tokens: step   0, loss 6.9869 nats/token
    memorising one row of 64 tokens: step  40, loss 0.0404 nats/token
    memorising one row of 64 tokens: step  80, loss 0.0114 nats/token
    memorising one row of 64 tokens: step 120, loss 0.0074 nats/token
    changing tokens 40..64 moves the logits of 0..39 by at most 0.0e+00
    200 tokens: 0.08 s with the KV cache, 0.28 s recomputing everything
    ok: causal, the cache changes nothing, and the row is recited from its first token
"""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

triton = None  # Triton kernels, for a GPU or Triton's interpreter, where kernels/ stands beside
if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET"):
    try:
        from kernels.attention import HEAD_DIMS
        from kernels.attention import attention as fused_attention
        from kernels.rmsnorm import rmsnorm as fused_rmsnorm
        from kernels.rope import rope_qkv as fused_rope
        from kernels.swiglu import swiglu as fused_swiglu
        from kernels.swiglu import triton
    except ImportError:
        pass

IMPLEMENTATIONS = ("auto", "torch", "triton")
WEIGHT_SCALE = 0.5  # std of a matrix, times sqrt(C): 0.022 at C = 512, where GPT-2 has 0.02
EMBEDDING_SCALE = 2.5  # std of the embedding, times C: see "Start" above


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int = 4096  # V
    seq_len: int = 512  # longest context in tokens
    n_layer: int = 8
    n_head: int = 4  # H query heads of D = d_model / n_head each
    n_kv_head: int = 2  # G key/value heads; G = H is multi-head, G = 1 multi-query attention
    d_model: int = 512  # C
    d_mlp: int = 1536  # M; a multiple of 128 keeps matrix products aligned
    rope_theta: float = 10_000.0  # RoPE base, 1e4: Su et al.
    qk_norm: bool = True  # True: Qwen3's layout, False: Llama's
    norm_eps: float = 1e-6
    implementation: str = "auto"  # "torch", "triton", or "auto": triton on a GPU that has it

    def __post_init__(self):
        if self.implementation not in IMPLEMENTATIONS:
            wanted = ", ".join(map(repr, IMPLEMENTATIONS))
            raise ValueError(f"implementation={self.implementation!r} must be one of {wanted}")
        for name in ("vocab_size", "seq_len", "n_layer", "n_head", "n_kv_head", "d_model", "d_mlp"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.d_model % (2 * self.n_head):
            raise ValueError(
                f"d_model={self.d_model} must be a multiple of 2 * n_head = {2 * self.n_head}, "
                "because RoPE turns pairs of each head's channels"
            )
        if self.n_head % self.n_kv_head:
            raise ValueError(
                f"n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}"
            )

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_head


PRESETS = {
    "27m": GPTConfig(),
    "8m": GPTConfig(n_layer=6, n_head=4, n_kv_head=2, d_model=320, d_mlp=896),
    "0.5m": GPTConfig(
        vocab_size=1024, seq_len=256, n_layer=2, n_head=4, n_kv_head=4, d_model=128, d_mlp=256
    ),
}


def parameter_count(config: GPTConfig) -> int:
    """The number of trainable numbers in the model; the tied embedding counts once."""
    c, kv_width = config.d_model, config.n_kv_head * config.head_dim
    attention = c * (c + 2 * kv_width) + c * c
    mlp = 3 * c * config.d_mlp
    gains = 2 * c + (2 * config.head_dim if config.qk_norm else 0)
    return config.vocab_size * c + config.n_layer * (attention + mlp + gains) + c


def flops_per_token(config: GPTConfig) -> int:
    """Floating-point operations of forward and backward, per trained token at full context.

    6 per weight that takes part in a matrix product (2 forward, 4 backward; the tied table counts
    as the head) and 12 * n_layer * seq_len * d_model for attention scores and mixing, counted in
    full as if nothing were masked, like PaLM (Chowdhery et al. 2022, arXiv 2204.02311, appendix B).
    """
    c, kv_width = config.d_model, config.n_kv_head * config.head_dim
    per_layer = c * (c + 2 * kv_width) + c * c + 3 * c * config.d_mlp
    matrices = config.n_layer * per_layer + config.vocab_size * c
    return 6 * matrices + 12 * config.n_layer * config.seq_len * c


def activation_bytes(
    config: GPTConfig, tokens: int, dtype: torch.dtype = torch.float32, fused: bool = False
) -> int:
    """Bytes that the forward pass of so many tokens keeps for the backward pass.

    Args:
        dtype: of matrix products, float32 or autocast's.
        fused: with the kernels of a GPU, which also keep what enters the norms, softmax's log-sum
            and silu(gate) * up.
    """
    C, M, H, G, D = (
        config.d_model, config.d_mlp, config.n_head, config.n_kv_head, config.head_dim
    )  # fmt: skip
    scales = 2  # rstd of the norms, in float32
    # x_hat of the two norms, what attention gives, gate|up, q|k|v; with kernels silu(gate) * up,
    # and q, k, v apart, beside the projection only for QK-norm's backward
    narrow = 3 * C + 2 * M + fused * M
    narrow += (H + 2 * G) * D * (1 + (fused and config.qk_norm))
    per_layer = 4 * scales + dtype.itemsize * narrow + fused * 4 * (2 * C + H)
    # rows of weights that autocast copies; without kernels only of W_out
    copied = (C + fused * ((H + 2 * G) * D + 3 * M)) * (dtype != torch.float32)
    copies = dtype.itemsize * config.n_layer * C * copied
    return tokens * (config.n_layer * per_layer + 4 * (C + 1)) + copies


def use_triton(implementation: str, x: Tensor) -> bool:
    """Whether the kernels do the work on x: with "auto", where Triton is there and x on a GPU."""
    if implementation == "triton" and triton is None:
        raise ImportError(
            "implementation='triton' needs a GPU (or TRITON_INTERPRET=1), the folder kernels/ "
            "beside this file, and Triton: pip install triton"
        )
    on_gpu = triton is not None and x.is_cuda and x.dtype != torch.float64
    return implementation == "triton" or (implementation == "auto" and on_gpu)


def norm_gradient(slope: Tensor, x_hat: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """dL/dx of x_hat = x * rstd, rstd = 1 / sqrt(mean(x^2) + eps), from slope = dL/dx_hat.

        dL/dx = rstd * (slope - x_hat * mean),   mean = that of slope * x_hat along the last axis
    The norm forgets how long x is, so the part of the slope along x_hat does not reach x.
    Args: slope (..., C), in rstd's type, overwritten; x_hat (..., C); mean, rstd (..., 1).
    """
    return slope.addcmul_(x_hat, mean, value=-1).mul_(rstd)


class Normalise(torch.autograd.Function):
    """RMSNorm with its gradient by hand: it keeps x and one number a row, autograd two x more."""

    @staticmethod
    def forward(ctx, x, gain, eps):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)  # (..., 1)
        ctx.save_for_backward(x, gain, rstd)
        return (wide * rstd).mul_(gain).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, gain, rstd = ctx.saved_tensors
        x_hat = x * rstd  # (..., C)
        product = dy * x_hat
        d_gain = product.reshape(-1, *gain.shape).sum(0)
        mean = product.mul_(gain).mean(-1, keepdim=True)  # (..., 1)
        slope = dy.to(rstd.dtype) * gain
        return norm_gradient(slope, x_hat, mean, rstd).to(x.dtype), d_gain.to(gain.dtype), None


def rms_norm(x: Tensor, gain: Tensor, eps: float, implementation: str = "auto") -> Tensor:
    """x over its root mean square along the last axis, times gain. No second derivative.

    Args: x (..., C); gain (C,), or (H, C) for x (..., H, C). Half-precision input is normalised in
        float32 and cast back.
    """
    if use_triton(implementation, x):
        return fused_rmsnorm(x, gain, eps, implementation="triton")
    if torch.is_grad_enabled():
        return Normalise.apply(x, gain, eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (F.rms_norm(wide, wide.shape[-1:], eps=eps) * gain).to(x.dtype)  # the same numbers


def product_dtype(x: Tensor) -> torch.dtype:
    """The type in which a matrix product of x runs: autocast's where that is on, else its own."""
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if on and x.dtype != torch.float64:  # autocast spares float64
        return torch.get_autocast_dtype(device)
    return x.dtype


def pieces(x: Tensor, numbers: int) -> list[slice]:
    """Slices of x's first axis, for what should lie in a CPU's cache from operation to operation.

    On a CPU each has at most so many numbers, but at least one row; elsewhere there is one slice.
    The callers' numbers, 1 to 4 MB, were found by trial on 2 cores of an AMD EPYC (Zen 5).
    """
    rows = len(x)
    if x.device.type == "cpu":
        rows = numbers * rows // max(1, x.numel())
    return [slice(first, first + max(1, rows)) for first in range(0, len(x), max(1, rows))]


class NormedLinear(torch.autograd.Function):
    """rms_norm(x, gain) @ weight.T as x_hat @ scaled.T, x_hat = x * rstd in the product's type.

    The gain goes into the weight, scaled = weight * gain, whose O rows are fewer than a batch's. So
        dL/dscaled = dy^T x_hat,   dL/dweight = dL/dscaled * gain,
        dL/dgain = sum over the O rows of dL/dscaled * weight,
        dL/dx_hat = dy @ scaled, and on by `norm_gradient`
    Shapes: x (..., C), N rows in all; gain (C,); weight (O, C); y (..., O).
    """

    @staticmethod
    def forward(ctx, x, gain, weight, eps):
        C, wide = x.shape[-1], torch.promote_types(x.dtype, torch.float32)
        flat = x.reshape(-1, C)  # (N, C)
        x_hat = torch.empty_like(flat, dtype=product_dtype(x))
        rstd = flat.new_empty((len(flat), 1), dtype=wide)
        for part in pieces(flat, 2**18):
            length = torch.linalg.vector_norm(flat[part], dim=-1, keepdim=True, dtype=wide)
            rstd[part] = torch.rsqrt(length.square() / C + eps)
            x_hat[part] = flat[part] * rstd[part]
        ctx.save_for_backward(x_hat, rstd, gain, weight)
        ctx.dtype = x.dtype
        scaled = (weight * gain).to(x_hat.dtype)  # (O, C)
        return F.linear(x_hat, scaled).view(*x.shape[:-1], len(weight))  # (..., O)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x_hat, rstd, gain, weight = ctx.saved_tensors
        shape, dy = dy.shape, dy.reshape(-1, len(weight))  # (N, O)
        d_scaled = (dy.T @ x_hat).to(weight.dtype)  # (O, C)
        d_gain = (d_scaled * weight).sum(0)  # (C,)
        slope = dy @ (weight * gain).to(dy.dtype)  # (N, C)
        mean = (slope * x_hat).mean(-1, keepdim=True, dtype=rstd.dtype)  # (N, 1)
        dx = norm_gradient(slope.to(rstd.dtype), x_hat, mean, rstd)
        dx = dx.to(ctx.dtype).view(*shape[:-1], len(gain))  # (..., C)
        return dx, d_gain.to(gain.dtype), d_scaled.mul_(gain), None


def normed_linear(
    x: Tensor, gain: Tensor, weight: Tensor, eps: float, implementation: str = "auto"
) -> Tensor:
    """rms_norm(x, gain) @ weight.T, (..., O): x (..., C), gain (C,), weight (O, C).

    No second derivative.
    """
    if use_triton(implementation, x):
        n = fused_rmsnorm(x, gain, eps, dtype=product_dtype(x), implementation="triton")
        return F.linear(n, weight)
    return NormedLinear.apply(x, gain, weight, eps)


def rope_table(seq_len: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle t * theta^(-2i/D): two float32 tensors (seq_len, D/2)."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)  # (D/2,)
    angle = torch.outer(torch.arange(seq_len, dtype=torch.float64), frequency)  # radians
    return angle.cos().float(), angle.sin().float()


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (x_i, x_{i+D/2}) of every head turned by its position's angle.

    Args: x (..., T, H, D); cos, sin (T, D/2), the table's rows for these T positions.
    """
    first, second = x.chunk(2, dim=-1)  # (..., T, H, D/2) each
    cos, sin = cos.to(x.dtype).unsqueeze(1), sin.to(x.dtype).unsqueeze(1)  # (T, 1, D/2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def positioned(qk: Tensor, gain: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """R_t n(x) of queries and keys, or without gain R_t x: in float32 (float64 for float64).

    Args: qk (..., T, H + G, D), a head a row; gain (H + G, D) or None; cos, sin (T, D/2).
    """
    wide = qk.to(torch.promote_types(qk.dtype, torch.float32))
    return rope(wide if gain is None else rms_norm(wide, gain, eps, "torch"), cos, sin)


def positioned_gradient(slope, x, gain, cos, sin, eps):
    """dL/dx and dL/dgain (or None) of y = positioned(x, gain, ...), from slope = dL/dy.

    The gradient of a rotation is the rotation back. With x_hat = x * rstd and the slope turned back
        dL/dgain = sum over the positions of slope * x_hat,
        dL/dx_hat = slope * gain, and on by `norm_gradient`
    Args: slope, x (T, H + G, D). In float32, as `positioned`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    slope = rope(slope.to(wide), cos, -sin)
    if gain is None:
        return slope, None
    x = x.to(wide)
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)  # (T, H + G, 1)
    x_hat = x * rstd
    product = slope * x_hat
    d_gain = product.sum(0)  # (H + G, D)
    mean = product.mul_(gain).mean(-1, keepdim=True)
    return norm_gradient(slope.mul_(gain), x_hat, mean, rstd), d_gain


class SelfAttention(torch.autograd.Function):
    """Causal attention of `positioned` queries and keys, by blocks: training on a CPU.

    FlashAttention's idea in plain torch: queries are taken in blocks, each against the keys up to
    its own end, so that the scores of a block stay in the cache and most of those that the mask
    forbids are never computed. Nothing but the packed projection is kept for backward, which
    computes q, k and p = softmax(s) of s = q k^T / sqrt(D) again, and with dp = dy v^T:
        dv = p^T dy,   ds = p * (dp - sum of p * dp over the keys),
        dq = ds k / sqrt(D),   dk = ds^T q / sqrt(D),   and on by `positioned_gradient`
    Under bfloat16 s, p and the sums of dk and dv over the blocks are rounded to it, where torch's
    fused kernel, which takes longer, has float32 inside: the longer T, the more it matters.
    Args: qkv (B, T, H + 2G, D), a head a row: queries, keys, values; the others as in `positioned`.
    Returns: (B, T, H, D).
    """

    @staticmethod
    def heads(qkv, gain, cos, sin, G, eps):
        """q (B G, T R, D) over sqrt(D), the R = H/G heads of a key together; k, v (B G, T, D)."""
        (B, T, _, D), H = qkv.shape, qkv.shape[2] - 2 * G
        q = qkv.new_empty(B, G, T, H // G, D)
        k, v = qkv.new_empty(2, B, G, T, D)
        for n in range(B):  # one at a time: what lies between stays in the cache
            qk = positioned(qkv[n, :, : H + G], gain, cos, sin, eps)  # (T, H + G, D)
            q[n] = qk[:, :H].mul_(D**-0.5).unflatten(1, (G, -1)).transpose(0, 1)
            k[n], v[n] = qk[:, H:].transpose(0, 1), qkv[n, :, H + G :].transpose(0, 1)
        return q.view(B * G, -1, D), k.view(B * G, T, D), v.view(B * G, T, D)

    @staticmethod
    def blocks(q, k):
        """Each block's rows of q, the number of keys that they see, and their weights p.

        q, k as from `heads`; a block is n positions.
        """
        T, R = k.shape[1], q.shape[1] // k.shape[1]
        size = 256 // q.dtype.itemsize  # positions: 128 in bfloat16, 64 in float32
        for first in range(0, T, size):
            last = min(first + size, T)
            rows = slice(first * R, last * R)
            scores = q[:, rows] @ k[:, :last].mT  # (B G, n R, last), n = last - first
            future = torch.ones(last - first, last - first, dtype=torch.bool).triu_(1)
            limit = torch.where(future, -math.inf, math.inf).to(q.dtype).repeat_interleave(R, 0)
            scores[..., first:].clamp_(max=limit)  # masked_fill_ would take longer
            yield rows, last, torch.softmax(scores, -1)

    @staticmethod
    def forward(ctx, qkv, gain, cos, sin, G, eps):
        ctx.save_for_backward(qkv, gain, cos, sin)
        ctx.options = G, eps
        (B, T, _, D), R = qkv.shape, qkv.shape[2] // G - 2
        y = qkv.new_empty(B, T, G, R, D)
        for part in pieces(qkv, 2**21):
            q, k, v = SelfAttention.heads(qkv[part], gain, cos, sin, G, eps)
            y_part = torch.empty_like(q)
            for rows, end, p in SelfAttention.blocks(q, k):
                y_part[:, rows] = p @ v[:, :end]
            y[part] = y_part.view(-1, G, T, R, D).transpose(1, 2)
        return y.flatten(2, 3)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        qkv, gain, cos, sin = ctx.saved_tensors
        G, eps = ctx.options
        (_, T, _, D), H = qkv.shape, qkv.shape[2] - 2 * G
        d_qkv = torch.empty_like(qkv)
        wide = torch.promote_types(qkv.dtype, torch.float32)
        d_gain = None if gain is None else torch.zeros_like(gain, dtype=wide)
        for part in pieces(qkv, 2**21):
            q, k, v = SelfAttention.heads(qkv[part], gain, cos, sin, G, eps)
            dy_part = dy[part].unflatten(2, (G, -1)).transpose(1, 2).reshape(q.shape)
            dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
            for rows, end, p in SelfAttention.blocks(q, k):
                dv[:, :end].baddbmm_(p.mT, dy_part[:, rows])
                dp = dy_part[:, rows] @ v[:, :end].mT
                ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
                dq[:, rows] = ds @ k[:, :end]
                dk[:, :end].baddbmm_(ds.mT, q[:, rows])
            dq = dq.mul_(D**-0.5).view(-1, G, T, H // G, D).transpose(1, 2).flatten(2, 3)
            dk, dv = (x.view(-1, G, T, D).transpose(1, 2) for x in (dk, dv))  # (rows, T, G, D)
            for n, row in enumerate(range(len(qkv))[part]):
                slope, x = torch.cat((dq[n], dk[n]), dim=1), qkv[row, :, : H + G]  # (T, H + G, D)
                slope, of_gain = positioned_gradient(slope, x, gain, cos, sin, eps)
                d_qkv[row, :, : H + G], d_qkv[row, :, H + G :] = slope, dv[n]
                if gain is not None:
                    d_gain += of_gain
        return d_qkv, d_gain if gain is None else d_gain.to(gain.dtype), None, None, None, None


def attention(q: Tensor, k: Tensor, v: Tensor, implementation: str = "auto") -> Tensor:
    """Causal attention: position t of q sees the keys up to its own place.

    The T queries are the last T of the S positions that k and v hold.

    Args:
        q (B, T, H, D); k, v (B, S, G, D) with S >= T and H a multiple of G.
        implementation: "reference" writes the maths out; "torch" is torch's fused kernel, which
            never holds the (T, S) scores; "triton" is ours, where T = S and for a D that it takes
            (else "torch"); "auto" is "triton" on a GPU and "torch" elsewhere.
    Returns: (B, T, H, D). No second derivative but by "reference".
    """
    if implementation not in (*IMPLEMENTATIONS, "reference"):
        wanted = "one of " + ", ".join(map(repr, (*IMPLEMENTATIONS, "reference")))
        raise ValueError(f"implementation={implementation!r} must be {wanted}")
    T, H, D = q.shape[1:]
    S, G = k.shape[1:3]
    if S < T or H % G:
        wanted = f"(B, at least {T}, a divisor of {H}, {D})"
        raise ValueError(f"k.shape={tuple(k.shape)} must be {wanted} for q.shape={tuple(q.shape)}")
    if T == S and use_triton(implementation, q) and D in HEAD_DIMS:
        return fused_attention(q, k, v, implementation="triton")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, positions, D)
    visible = None
    if 1 < T < S or implementation == "reference":
        visible = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    if implementation != "reference":
        causal = visible is None and T > 1  # a single query is the last one: it sees everything
        y = F.scaled_dot_product_attention(q, k, v, visible, is_causal=causal, enable_gqa=H > G)
    else:
        k, v = (x.repeat_interleave(H // G, dim=1) for x in (k, v))  # (B, H, S, D)
        scores = q @ k.transpose(-2, -1) / math.sqrt(D)  # (B, H, T, S)
        y = scores.masked_fill(~visible, -math.inf).softmax(-1) @ v  # (B, H, T, D)
    return y.transpose(1, 2)  # (B, T, H, D)


class RMSNorm(nn.Module):
    def __init__(self, width: int, config: GPTConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.config.norm_eps, self.config.implementation)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        c, d = config.d_model, config.head_dim
        # one product for all three: rows are H query heads, then G key heads, then G value heads
        self.qkv = nn.Linear(c, (config.n_head + 2 * config.n_kv_head) * d, bias=False)
        self.out = nn.Linear(c, c, bias=False)
        self.q_norm = RMSNorm(d, config) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(d, config) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        H, G = self.config.n_head, self.config.n_kv_head
        eps, implementation = self.config.norm_eps, self.config.implementation
        qkv = normed_linear(x, gain, self.qkv.weight, eps, implementation)
        qkv = qkv.unflatten(-1, (H + 2 * G, -1))  # (B, T, H + 2G, D)
        q_gain = k_gain = None
        if self.config.qk_norm:
            q_gain, k_gain = self.q_norm.weight, self.k_norm.weight  # (D,)
        if use_triton(implementation, qkv):  # on a GPU
            options = {"q_gain": q_gain, "k_gain": k_gain, "eps": eps, "implementation": "triton"}
            q, k, v = fused_rope(qkv, cos.float(), sin.float(), H, G, **options)
            return self.out(attention(q, k, v, "triton").flatten(2))  # (B, T, C)
        per_head = None
        if self.config.qk_norm:
            per_head = torch.cat((q_gain.expand(H, -1), k_gain.expand(G, -1)))  # (H + G, D)
        if qkv.device.type == "cpu" and torch.is_grad_enabled():  # training on a CPU
            y = SelfAttention.apply(qkv, per_head, cos, sin, G, eps)
        else:  # evaluation on a CPU, or a GPU without the kernels
            qk, v = qkv.split((H + G, G), dim=2)
            q, k = positioned(qk, per_head, cos, sin, eps).to(v.dtype).split((H, G), dim=2)
            y = attention(q, k, v, implementation)
        return self.out(y.flatten(2))  # y (B, T, H, D), out (B, T, C)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of the two halves of the last axis: (..., 2M) -> (..., M)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class GatedProduct(torch.autograd.Function):
    """swiglu(gate_up) @ weight.T, keeping gate_up alone: silu * up is cheap to compute again.

    With s = sigmoid(gate), silu = gate * s, h = silu * up, and dh what its product leaves:
        dL/dup = dh * silu,   dL/dgate = dh * up * (s + silu * (1 - s))
    On a CPU by blocks of rows, so that what lies between stays in the cache.
    """

    @staticmethod
    def forward(ctx, gate_up, weight):
        ctx.save_for_backward(gate_up, weight)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.linear(F.silu(gate).mul_(up), weight)  # (..., C)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate_up, weight = ctx.saved_tensors
        shape, narrow = gate_up.shape, weight.to(dy.dtype)
        dy, gate_up = dy.flatten(0, -2), gate_up.flatten(0, -2)  # (rows, C), (rows, 2M)
        gradient = torch.empty_like(gate_up)
        d_gate, d_up = gradient.chunk(2, dim=-1)  # (rows, M) each
        h = torch.empty_like(gate_up[:, : weight.shape[1]])  # (rows, M)
        for part in pieces(gate_up, 2**20):
            gate, up = gate_up[part].chunk(2, dim=-1)
            silu, dh = F.silu(gate), dy[part] @ narrow
            h[part] = silu * up
            d_up[part] = silu.mul_(dh)
            d_gate[part] = torch.ops.aten.silu_backward(dh.mul_(up), gate)
        return gradient.view(shape), (dy.T @ h).to(weight.dtype)  # (..., 2M), (C, M)


class MLP(nn.Module):
    """SwiGLU: a gated layer, silu(gate) * up, between two projections."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.gate_up = nn.Linear(config.d_model, 2 * config.d_mlp, bias=False)  # rows: gate, up
        self.down = nn.Linear(config.d_mlp, config.d_model, bias=False)

    def forward(self, x: Tensor, gain: Tensor) -> Tensor:
        eps, implementation = self.config.norm_eps, self.config.implementation
        gate_up = normed_linear(x, gain, self.gate_up.weight, eps, implementation)  # (B, T, 2M)
        if use_triton(self.config.implementation, gate_up):
            return self.down(fused_swiglu(gate_up, implementation="triton"))  # (B, T, C)
        if torch.is_grad_enabled():
            return GatedProduct.apply(gate_up, self.down.weight)  # (B, T, C)
        return self.down(swiglu(gate_up))  # (B, T, C)


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.d_model, config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(x, self.attention_norm.weight, cos, sin)
        return x + self.mlp(x, self.mlp_norm.weight)


def next_token_probabilities(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """The distribution that `generate` samples from: (..., V) float32, each row sums to 1.

    Applied in this order, each to what the one before left, renormalised:
        temperature: softmax(logits / temperature); 0 puts all mass on the largest logit.
        top_k: the k most likely tokens.
        top_p: the fewest most likely tokens whose mass reaches p.
        min_p: the tokens at least min_p times as likely as the most likely one.
    Raises: ValueError for a value outside its range.
    """
    for name, value, good, wanted in (
        ("temperature", temperature, temperature >= 0, ">= 0"),
        ("top_k", top_k, top_k is None or top_k >= 1, "None or >= 1"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "None or in (0, 1]"),
        ("min_p", min_p, min_p is None or 0 <= min_p <= 1, "None or in [0, 1]"),
    ):
        if not good:
            raise ValueError(f"{name}={value} must be {wanted}")
    logits = logits.float()
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1)
    p = torch.softmax(logits / temperature, dim=-1)
    if top_k is not None or top_p is not None:  # sorting takes longer than all the rest
        p, token = p.sort(dim=-1, descending=True, stable=True)
        if top_k is not None:
            p[..., top_k:] = 0
        if top_p is not None:
            mass_before = p.cumsum(-1) - p  # (..., V) mass of the tokens more likely than this one
            p = p.masked_fill(mass_before >= top_p * p.sum(-1, keepdim=True), 0)
        p = torch.zeros_like(p).scatter_(-1, token, p)  # back into vocabulary order
    if min_p is not None:
        p = p.masked_fill(p < min_p * p.amax(-1, keepdim=True), 0)
    return p / p.sum(-1, keepdim=True)


def draw(p: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One token of each row, as likely as p (B, V) says: (B, 1) int64.

    By the first place where the mass so far reaches a uniform number: one random number a row,
    where torch.multinomial takes V. The number is above 0, so a token of mass 0 is never drawn.
    """
    mass = p.cumsum(-1)  # (B, V)
    uniform = 1 - torch.rand(len(p), 1, generator=generator, device=p.device)  # in (0, 1]
    token = torch.searchsorted(mass, uniform * mass[:, -1:])
    return token.clamp(max=p.shape[-1] - 1)  # past the end where p holds a NaN


def packed(weight: Tensor, rows: int) -> Tensor:
    """The weight for `packed_product` with so many rows: on a CPU in the order that oneDNN reads.

    A product of few rows lasts as long as its weight takes to be read, and torch's own product on
    a CPU reads at a fraction of what memory gives. (results/generation.py times `Decoder`.)
    """
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return weight
    if weight.dtype == torch.bfloat16:
        able = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    else:
        able = weight.dtype == torch.float32
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows) if able else weight


def packed_product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T: x (..., K), weight (N, K) as `packed` gives it."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


class Decoder:
    """The model reading on: it keeps the keys and values of what it has read (a KV cache).

    So a new token costs one position. The equations are those of the layers above, without what
    only a gradient needs.

    Args:
        batch: B, the rows that are read side by side.
        capacity: the most positions that it will read, at most seq_len.
    It may hold copies of the weights: after a change of the model, make a new one.
    """

    @torch.no_grad()
    def __init__(self, model: GPT, batch: int, capacity: int):
        config, table = model.config, model.embedding.weight
        H, G, D = config.n_head, config.n_kv_head, config.head_dim
        if capacity > config.seq_len:
            raise ValueError(f"capacity={capacity} must be at most seq_len={config.seq_len}")
        self.model, self.length, self.head = model, 0, packed(table, batch)
        on_cpu = table.device.type == "cpu"  # whose many small products are fastest in float32
        dtype = torch.promote_types(table.dtype, torch.float32) if on_cpu else table.dtype
        shape = (config.n_layer, 2, batch, G, capacity, D)
        self.cache = torch.empty(shape, dtype=dtype, device=table.device)
        self.layers = []
        for block in model.blocks:
            heads, mlp, qk_gain = block.attention, block.mlp, None
            if config.qk_norm:
                gains = heads.q_norm.weight.expand(H, -1), heads.k_norm.weight.expand(G, -1)
                qk_gain = torch.cat(gains)  # (H + G, D)
            gains = block.attention_norm.weight, qk_gain, block.mlp_norm.weight
            layers = heads.qkv, heads.out, mlp.gate_up, mlp.down
            self.layers.append((*gains, *(packed(layer.weight, batch) for layer in layers)))

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """Logits (B, V) of the token after ids (B, T) int64, which continue what has been read."""
        config, (B, T), start = self.model.config, ids.shape, self.length
        end = start + T
        H, G, D, eps = config.n_head, config.n_kv_head, config.head_dim, config.norm_eps
        if B != self.cache.shape[2]:
            raise ValueError(f"ids have {B} rows; wanted batch={self.cache.shape[2]}")
        if T < 1:
            raise ValueError("ids have no position; wanted at least one")
        if end > self.cache.shape[4]:
            raise ValueError(f"{end} positions; wanted at most capacity={self.cache.shape[4]}")
        x = F.embedding(ids, self.model.embedding.weight)  # (B, T, C)
        tables = self.model.cos[start:end], self.model.sin[start:end]  # (T, D/2)
        cos, sin = (table.to(x.dtype) for table in tables)
        for layer, (keys, values) in zip(self.layers, self.cache):  # (B, G, capacity, D) each
            attention_gain, qk_gain, mlp_gain, w_qkv, w_out, w_gate_up, w_down = layer
            qkv = packed_product(rms_norm(x, attention_gain, eps, "torch"), w_qkv)
            qk, v = qkv.unflatten(-1, (H + 2 * G, D)).split((H + G, G), dim=2)
            if qk_gain is not None:
                qk = rms_norm(qk, qk_gain, eps, "torch")  # (B, T, H + G, D)
            q, k = rope(qk, cos, sin).split((H, G), dim=2)
            q = q.to(keys.dtype)
            keys[:, :, start:end] = k.transpose(1, 2)
            values[:, :, start:end] = v.transpose(1, 2)
            seen_k, seen_v = keys[:, :, :end], values[:, :, :end]  # (B, G, S, D)
            if T == 1:  # one query sees everything: no mask
                q = q.reshape(B, G, H // G, D) / math.sqrt(D)
                y = (q @ seen_k.mT).softmax(-1) @ seen_v  # (B, G, H/G, D)
                y = y.view(B, 1, H, D)
            else:
                y = attention(q, seen_k.transpose(1, 2), seen_v.transpose(1, 2), "torch")
            x = x + packed_product(y.flatten(2).to(x.dtype), w_out)  # y (B, T, H, D)
            gate_up = packed_product(rms_norm(x, mlp_gain, eps, "torch"), w_gate_up)
            x = x + packed_product(swiglu(gate_up), w_down)
        self.length = end
        return packed_product(rms_norm(x[:, -1], self.model.norm.weight, eps, "torch"), self.head)


class GPT(nn.Module):
    def __init__(self, config: GPTConfig = GPTConfig()):  # noqa: B008 (frozen)
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)  # E, also the head
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config)
        cos, sin = rope_table(config.seq_len, config.head_dim, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        std = WEIGHT_SCALE / math.sqrt(config.d_model)
        nn.init.normal_(self.embedding.weight, std=EMBEDDING_SCALE / config.d_model)
        for block in self.blocks:
            nn.init.normal_(block.attention.qkv.weight, std=std)
            nn.init.normal_(block.mlp.gate_up.weight, std=std)
            nn.init.zeros_(block.attention.out.weight)
            nn.init.zeros_(block.mlp.down.weight)

    def hidden(self, ids: Tensor) -> Tensor:
        """The last hidden state, normalised, before the head: (B, T, C) for ids (B, T) int64."""
        T = ids.shape[1]
        if T > self.config.seq_len:
            raise ValueError(
                f"{T} positions do not fit into seq_len={self.config.seq_len}; "
                "shorten the input or build the model with a larger seq_len"
            )
        x = self.embedding(ids)  # (B, T, C)
        for block in self.blocks:
            x = block(x, self.cos[:T], self.sin[:T])
        return self.norm(x)

    def forward(self, ids: Tensor) -> Tensor:
        """Next-token logits (B, T, V) for ids (B, T) int64."""
        return F.linear(self.hidden(ids), self.embedding.weight)

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        generator: torch.Generator | None = None,
        stop: int | None = None,
    ) -> Tensor:
        """ids (B, T) continued by up to max_new_tokens sampled tokens each: (B, T + new) int64.

        Args:
            temperature, top_k, top_p, min_p: see `next_token_probabilities`.
            generator: source of randomness on ids' device; None: torch's default.
            stop: token that ends a row; the row is filled up with it, and generation ends early
                when every row has ended.
        Raises: ValueError when T + max_new_tokens exceeds seq_len, or ids is empty.
        """
        B, T = ids.shape
        if T < 1:
            raise ValueError("ids has no tokens; start from at least one, e.g. the end-of-text id")
        if T + max_new_tokens > self.config.seq_len:
            raise ValueError(
                f"{T} given + {max_new_tokens} new tokens exceed seq_len={self.config.seq_len}; "
                f"max_new_tokens can be at most {self.config.seq_len - T}"
            )
        decoder = Decoder(self, B, T + max_new_tokens)
        ended = torch.zeros(B, 1, dtype=torch.bool, device=ids.device)
        new = ids
        for _ in range(max_new_tokens):
            p = next_token_probabilities(decoder(new), temperature, top_k, top_p, min_p)  # (B, V)
            new = draw(p, generator)  # (B, 1)
            if stop is not None:
                new = new.masked_fill(ended, stop)
                ended |= new == stop
            ids = torch.cat((ids, new), dim=1)
            if stop is not None and ended.all():
                break
        return ids


# Interchange with Hugging Face transformers: Llama's layout, or Qwen3's when there is QK-norm.

HUGGINGFACE_FIELDS = {
    "vocab_size": "vocab_size",
    "seq_len": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "head_dim": "head_dim",
    "d_model": "hidden_size",
    "d_mlp": "intermediate_size",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
}


HUGGINGFACE_PLAIN = {  # what this file does not vary; each with the values that say so
    "rope_scaling": (None,),
    "rope_type": ("default", None),
    "partial_rotary_factor": (1.0, None),
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
}


def huggingface_layout(config: GPTConfig) -> dict[str, dict[str, int]]:
    """For each tensor of ours the names of theirs that, stacked by rows, make it, with rows."""
    c, m, kv_width = config.d_model, config.d_mlp, config.n_kv_head * config.head_dim
    layout = {"embedding": {"embed_tokens": config.vocab_size}, "norm": {"norm": c}}
    for i in range(config.n_layer):
        theirs, ours = f"layers.{i}", f"blocks.{i}"
        attention = f"{theirs}.self_attn"
        layout |= {
            f"{ours}.attention_norm": {f"{theirs}.input_layernorm": c},
            f"{ours}.attention.qkv": {
                f"{attention}.q_proj": c,
                f"{attention}.k_proj": kv_width,
                f"{attention}.v_proj": kv_width,
            },
            f"{ours}.attention.out": {f"{attention}.o_proj": c},
            f"{ours}.mlp_norm": {f"{theirs}.post_attention_layernorm": c},
            f"{ours}.mlp.gate_up": {f"{theirs}.mlp.gate_proj": m, f"{theirs}.mlp.up_proj": m},
            f"{ours}.mlp.down": {f"{theirs}.mlp.down_proj": c},
        }
        if config.qk_norm:
            layout[f"{ours}.attention.q_norm"] = {f"{attention}.q_norm": config.head_dim}
            layout[f"{ours}.attention.k_norm"] = {f"{attention}.k_norm": config.head_dim}
    return {
        f"{ours}.weight": {f"model.{name}.weight": rows for name, rows in parts.items()}
        for ours, parts in layout.items()
    }


def import_safetensors():
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("this needs the safetensors package: pip install safetensors") from error
    return safetensors.torch


def to_huggingface(model: GPT, folder: str | Path) -> None:
    """Writes config.json and model.safetensors, which `AutoModelForCausalLM` loads."""
    config, state, tensors = model.config, model.state_dict(), {}
    for ours, parts in huggingface_layout(config).items():
        rows = state[ours].split(list(parts.values()))
        tensors |= {name: part.clone() for name, part in zip(parts, rows)}
    described = {
        "architectures": ["Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if config.qk_norm else "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": True,
    }
    described |= {theirs: getattr(config, ours) for ours, theirs in HUGGINGFACE_FIELDS.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    import_safetensors().save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")


def from_huggingface(folder: str | Path) -> GPT:
    """The model in a folder that `to_huggingface` wrote, or in another tied Llama's or Qwen3's.

    Raises: ValueError when the folder's model is of a kind that this file does not implement.
    """
    folder = Path(folder)
    described = json.loads((folder / "config.json").read_text())
    described |= described.get("rope_parameters") or {}  # where transformers 5 keeps rope_theta
    kind, tied = described.get("model_type"), described.get("tie_word_embeddings")
    if kind not in ("llama", "qwen3") or not tied:
        raise ValueError(
            f"{folder}: model_type={kind!r}, tie_word_embeddings={tied}; "
            "wanted 'llama' or 'qwen3' with tied embeddings"
        )
    for name, plain in HUGGINGFACE_PLAIN.items():
        if described.get(name, plain[0]) not in plain:
            raise ValueError(f"{folder}: {name}={described[name]!r}; wanted {plain[0]!r}")
    fields = {ours: described.get(theirs) for ours, theirs in HUGGINGFACE_FIELDS.items()}
    head_dim = fields.pop("head_dim")
    fields["n_kv_head"] = fields["n_kv_head"] or fields["n_head"]  # left out where they are equal
    absent = [HUGGINGFACE_FIELDS[ours] for ours, value in fields.items() if value is None]
    if absent:
        raise ValueError(f"{folder / 'config.json'} lacks {', '.join(absent)}")
    config = GPTConfig(**fields, qk_norm=kind == "qwen3")
    if head_dim not in (None, config.head_dim):
        raise ValueError(f"{folder}: head_dim={head_dim}; wanted d_model/n_head={config.head_dim}")
    tensors = import_safetensors().load_file(folder / "model.safetensors")
    model = GPT(config)
    model.load_state_dict(
        {
            ours: torch.cat([tensors[name] for name in parts])
            for ours, parts in huggingface_layout(config).items()
        }
    )
    return model


def demo() -> None:
    torch.manual_seed(0)
    print("preset      parameters   MFLOP/token   loss at step 0        ln V")
    for name, config in PRESETS.items():
        model = GPT(config)
        ids = torch.randint(config.vocab_size, (2, config.seq_len + 1))
        with torch.no_grad():
            loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        print(
            f"{name:8s} {parameter_count(config):13,d} {flops_per_token(config) / 1e6:13.1f} "
            f"{loss:16.4f} {math.log(config.vocab_size):11.4f}"
        )
        assert parameter_count(config) == sum(p.numel() for p in model.parameters())
        assert abs(loss - math.log(config.vocab_size)) < 0.1, "a fresh model should know nothing"

    # one repeated row is learned by heart, which shows that gradients reach what they must
    model, ids = GPT(PRESETS["0.5m"]), torch.randint(1024, (1, 65))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(121):
        loss = F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 40 == 0:
            print(f"memorising one row of 64 tokens: step {step:3d}, loss {loss:.4f} nats/token")

    with torch.no_grad():
        changed = ids.clone()
        changed[0, 40:] = torch.randint(1024, (25,))
        leak = (model(ids)[:, :40] - model(changed)[:, :40]).abs().max()
        print(f"changing tokens 40..64 moves the logits of 0..39 by at most {leak:.1e}")

        greedy = model.generate(ids[:, :1], 64, temperature=0)
        start = time.perf_counter()
        long = model.generate(ids[:, :1], 200, temperature=0)
        cached = time.perf_counter() - start
        start = time.perf_counter()
        slow = ids[:, :1]
        for _ in range(200):
            slow = torch.cat((slow, model(slow)[:, -1].argmax(-1, keepdim=True)), dim=1)
        full = time.perf_counter() - start
    print(f"200 tokens: {cached:.2f} s with the KV cache, {full:.2f} s recomputing everything")
    assert leak == 0 and torch.equal(long, slow) and torch.equal(greedy, ids)
    print("ok: causal, the cache changes nothing, and the row is recited from its first token")


if __name__ == "__main__":
    demo()
