"""Rotary positions on queries and keys, with QK-norm before them, read from the packed projection.

A packed row holds, for one token, H query heads, G key heads and G value heads of D numbers. A
query or key head x at position t becomes, with (a, b) the two halves of n and c, s the cosines
and sines of t's D/2 angles:

    n = gain * x * rstd,  rstd = 1 / sqrt(mean(x^2) + eps)       QK-norm; without it n = x
    y = (a c - b s, b c + a s)                                   each pair (a_i, b_i) turned

Backward turns the gradient back, the inverse of a rotation being its transpose, and then goes
through the norm, whose rstd is cheaper to compute again than to keep:

    dn = (da c + db s, db c - da s),   (da, db) the halves of dy
    dgain = sum over tokens and heads of dn * x * rstd
    dx = rstd * (gain dn - x rstd * mean(gain dn * x rstd))      without QK-norm dx = dn

Bytes in bf16, p = 2 N (H + 2G) D being one pass over the packed tensor of N tokens: forward reads
it and writes q, k, v, 2p; backward reads dq, dk, dv, with QK-norm also the queries and keys of x,
and writes the packed dx: 2p, or 2.75p at H = 2G. Values are copied along, a quarter of p: so q, k,
v come out separate, and their gradients go in separate and come out packed, in one pass. Views
would leave PyTorch to join the three gradients, 2p more. In eager PyTorch norm and rotation are
some fifteen operations, each with a pass of its own. About 20 FLOPs per number, under 10 per byte,
where a GPU needs a hundred to be busy: memory is the bound. At N = 65,536, H = 4, G = 2, D = 128 a
pass is 134 MB, so forward needs at least 62 us and backward 86 us at the 4.3 TB/s that a copy
reaches on an H200. The tables of angles stay in the cache.

All arithmetic is in float32, rounded once on writing; angles too, as bfloat16 has no odd number
above 256: a radian's error. The sum for the gains is deterministic: a fixed number of programs
each add up their own rows.

Sources: Su et al. 2021 (arXiv 2104.09864), in the half-split form of GPT-NeoX and Llama; QK-norm:
Henry et al. 2020 (2010.04245), in Qwen3's form: per head, with gain, before the rotation.

Run: `python kernels/rope.py` times it on a GPU; without one it checks the kernels in Triton's
interpreter and prints, from seed 0,

    2 rows of 9 tokens, heads 4 + 2 * 2 of 128, torch.float32, in the interpreter (no GPU to time)
    errors against float64:
    q 5.1e-07, k 5.3e-07, v 0.0e+00, dx 6.3e-07, dq_gain 2.9e-06, dk_gain 2.2e-06
"""

from __future__ import annotations

import os
from functools import partial

import torch
from torch import Tensor

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated
try:
    import triton
    import triton.language as tl
except ImportError:  # the reference works without it
    triton = None


def jit(kernel):
    return triton.jit(kernel) if triton else kernel


IMPLEMENTATIONS = ("auto", "reference", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Backward's programs with QK-norm, each with private sums for the gains: five for each of the 132
# multiprocessors of an H100 or H200, where 96 registers and 4 warps let five run at once. Not yet
# measured on a GPU.
PROGRAMS = 660


def rope_reference(
    x: Tensor, cos: Tensor, sin: Tensor, gain: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """The equations for heads of one kind, x (B, T, H, D), in float32 (float64 for float64)."""
    n = x.to(torch.promote_types(x.dtype, torch.float32))
    if gain is not None:
        n = n * torch.rsqrt(n.square().mean(-1, keepdim=True) + eps) * gain
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # (T, 1, D/2)
    a, b = n.chunk(2, dim=-1)  # (B, T, H, D/2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


@jit
def _locate(tile, N, H: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr):
    """Tile `tile` of ROWS heads each: first those of all queries, then of all keys, then values.

    Returns part (0 queries, 1 keys, 2 values) and for each row of the tile: its number in the
    part's (N, heads), its token, its head among all H + 2G, and whether it exists.
    """
    q_tiles, k_tiles = tl.cdiv(N * H, ROWS), tl.cdiv(N * G, ROWS)
    part = (tile >= q_tiles).to(tl.int32) + (tile >= q_tiles + k_tiles).to(tl.int32)
    heads = tl.where(part == 0, H, G)
    first_tile = tl.where(part == 0, 0, q_tiles + (part - 1) * k_tiles)
    first_head = tl.where(part == 0, 0, H + (part - 1) * G)
    row = (tile - first_tile) * ROWS + tl.arange(0, ROWS)
    return part, row, row // heads, first_head + row % heads, row < N * heads


@jit
def _forward(
    x_ptr,  # (B, T, H + 2G, D) of strides x_b, x_t, x_h, 1
    cos_ptr,  # (T, D/2) float32 contiguous
    sin_ptr,  # (T, D/2) float32 contiguous
    q_gain_ptr,  # (D,), or None: no norm
    k_gain_ptr,  # (D,)
    q_ptr,  # (B, T, H, D) contiguous, written
    k_ptr,  # (B, T, G, D) contiguous, written
    v_ptr,  # (B, T, G, D) contiguous, written
    N,  # B * T
    T,
    x_b,
    x_t,
    x_h,
    eps,
    H: tl.constexpr,
    G: tl.constexpr,
    HALF: tl.constexpr,  # D / 2
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, at least HALF
):
    """Program i takes tile i. Values run through it too: not normed, turned by the angle 0."""
    part, row, token, head, exists = _locate(tl.program_id(0), N, H, G, ROWS)
    y_ptr = tl.where(part == 0, q_ptr, tl.where(part == 1, k_ptr, v_ptr))
    col = tl.arange(0, BLOCK)[None, :]
    mask = exists[:, None] & (col < HALF)
    changed = col < tl.where(part < 2, HALF, 0)  # no number of a value
    b, t = (token // T).to(tl.int64), (token % T).to(tl.int64)  # an offset may pass 2^31
    x_ptr += (b * x_b + t * x_t + head * x_h)[:, None] + col
    lower = tl.load(x_ptr, mask, other=0.0).to(tl.float32)
    upper = tl.load(x_ptr + HALF, mask, other=0.0).to(tl.float32)
    if q_gain_ptr is not None:
        gain_ptr = tl.where(part == 0, q_gain_ptr, k_gain_ptr) + col
        rstd = tl.rsqrt(tl.sum(lower * lower + upper * upper, 1) / (2 * HALF) + eps)
        rstd = tl.where(part < 2, rstd, 1.0)[:, None]
        lower *= rstd * tl.load(gain_ptr, changed, other=1.0).to(tl.float32)
        upper *= rstd * tl.load(gain_ptr + HALF, changed, other=1.0).to(tl.float32)
    angle = (t * HALF)[:, None] + col
    cos = tl.load(cos_ptr + angle, exists[:, None] & changed, other=1.0)
    sin = tl.load(sin_ptr + angle, exists[:, None] & changed, other=0.0)
    y_ptr += row.to(tl.int64)[:, None] * (2 * HALF) + col
    tl.store(y_ptr, lower * cos - upper * sin, mask)
    tl.store(y_ptr + HALF, upper * cos + lower * sin, mask)


@jit
def _backward(
    dq_ptr,  # (B, T, H, D) contiguous
    dk_ptr,  # (B, T, G, D) contiguous
    dv_ptr,  # (B, T, G, D) contiguous
    x_ptr,  # as in _forward; None without gains
    cos_ptr,
    sin_ptr,
    q_gain_ptr,
    k_gain_ptr,
    dx_ptr,  # (B, T, H + 2G, D) contiguous, written
    d_gain_ptr,  # (2, programs, D) float32, written: each program's sums for q_gain and k_gain
    N,
    T,
    x_b,
    x_t,
    x_h,
    eps,
    H: tl.constexpr,
    G: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program i takes the tiles i, i + programs, ... and row i of both sums."""
    col = tl.arange(0, BLOCK)[None, :]
    if q_gain_ptr is not None:
        dq_gain = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
        dk_gain = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
    tiles = tl.cdiv(N * H, ROWS) + 2 * tl.cdiv(N * G, ROWS)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        part, row, token, head, exists = _locate(tile, N, H, G, ROWS)
        dy_ptr = tl.where(part == 0, dq_ptr, tl.where(part == 1, dk_ptr, dv_ptr))
        mask = exists[:, None] & (col < HALF)
        changed = col < tl.where(part < 2, HALF, 0)
        b, t = (token // T).to(tl.int64), (token % T).to(tl.int64)
        angle = (t * HALF)[:, None] + col
        cos = tl.load(cos_ptr + angle, exists[:, None] & changed, other=1.0)
        sin = tl.load(sin_ptr + angle, exists[:, None] & changed, other=0.0)
        dy_ptr += row.to(tl.int64)[:, None] * (2 * HALF) + col
        d_a = tl.load(dy_ptr, mask, other=0.0).to(tl.float32)
        d_b = tl.load(dy_ptr + HALF, mask, other=0.0).to(tl.float32)
        d_lower, d_upper = d_a * cos + d_b * sin, d_b * cos - d_a * sin
        if q_gain_ptr is not None:
            x = x_ptr + (b * x_b + t * x_t + head * x_h)[:, None] + col
            lower = tl.load(x, exists[:, None] & changed, other=0.0).to(tl.float32)
            upper = tl.load(x + HALF, exists[:, None] & changed, other=0.0).to(tl.float32)
            rstd = tl.rsqrt(tl.sum(lower * lower + upper * upper, 1) / (2 * HALF) + eps)
            # of what was not read; with eps = 0 that is infinite, and times 0 not a number
            rstd = tl.where(part < 2, tl.where(exists, rstd, 0.0), 0.0)[:, None]
            lower, upper = lower * rstd, upper * rstd
            is_q, is_k = (part == 0).to(tl.float32), (part == 1).to(tl.float32)
            dq_gain = dq_gain[0] + is_q * d_lower * lower, dq_gain[1] + is_q * d_upper * upper
            dk_gain = dk_gain[0] + is_k * d_lower * lower, dk_gain[1] + is_k * d_upper * upper
            gain_ptr = tl.where(part == 0, q_gain_ptr, k_gain_ptr) + col
            d_lower *= tl.load(gain_ptr, changed, other=1.0).to(tl.float32)
            d_upper *= tl.load(gain_ptr + HALF, changed, other=1.0).to(tl.float32)
            mean = (tl.sum(d_lower * lower + d_upper * upper, 1) / (2 * HALF))[:, None]
            d_lower = tl.where(part < 2, rstd * (d_lower - lower * mean), d_lower)
            d_upper = tl.where(part < 2, rstd * (d_upper - upper * mean), d_upper)
        dx = dx_ptr + (token.to(tl.int64) * (H + 2 * G) + head)[:, None] * (2 * HALF) + col
        tl.store(dx, d_lower, mask)
        tl.store(dx + HALF, d_upper, mask)
    if q_gain_ptr is not None:
        q_sum = d_gain_ptr + tl.program_id(0) * (2 * HALF) + col
        k_sum = q_sum + tl.num_programs(0) * (2 * HALF)
        tl.store(q_sum, tl.sum(dq_gain[0], 0)[None, :], col < HALF)
        tl.store(q_sum + HALF, tl.sum(dq_gain[1], 0)[None, :], col < HALF)
        tl.store(k_sum, tl.sum(dk_gain[0], 0)[None, :], col < HALF)
        tl.store(k_sum + HALF, tl.sum(dk_gain[1], 0)[None, :], col < HALF)


INTERPRETED = triton is not None and not isinstance(_forward, triton.JITFunction)


def _tile(N: int, H: int, G: int, D: int) -> tuple[int, dict]:
    """The number of tiles, and HALF, ROWS, BLOCK, num_warps: 8 numbers a thread and half.

    Compiled for sm_90 by Triton 3.9, D = 128: 36 registers forward (with QK-norm 44), 35 backward
    (96; 3.6 the same), no spills, 16-byte accesses to all big tensors. Not yet measured on a GPU.
    """
    block = max(16, triton.next_power_of_2(D // 2))
    rows = max(1, 1024 // block)
    tiles = triton.cdiv(N * H, rows) + 2 * triton.cdiv(N * G, rows)
    return tiles, {"HALF": D // 2, "ROWS": rows, "BLOCK": block, "num_warps": 4}


@torch.library.custom_op(
    "kernels::rope",
    mutates_args=(),
    schema="(Tensor x, Tensor cos, Tensor sin, Tensor? q_gain, Tensor? k_gain, float eps, int H,"
    " int G) -> (Tensor, Tensor, Tensor)",
)
def _rope(x, cos, sin, q_gain, k_gain, eps, H, G):
    """q, k, v of x (B, T, H + 2G, D); with G = 0 only q, while k and v have no heads."""
    B, T, _, D = x.shape
    q, k, v = (x.new_empty((B, T, heads, D)) for heads in (H, G, G))
    tiles, tile = _tile(B * T, H, G, D)
    if tiles:
        sizes = B * T, T, *x.stride()[:3]
        with torch.cuda.device_of(x):
            _forward[(tiles,)](x, cos, sin, q_gain, k_gain, q, k, v, *sizes, eps, H, G, **tile)
    return q, k, v


@_rope.register_fake
def _(x, cos, sin, q_gain, k_gain, eps, H, G):
    return tuple(x.new_empty((*x.shape[:2], heads, x.shape[3])) for heads in (H, G, G))


@torch.library.custom_op(
    "kernels::rope_backward",
    mutates_args=(),
    schema="(Tensor dq, Tensor dk, Tensor dv, Tensor? x, Tensor cos, Tensor sin, Tensor? q_gain,"
    " Tensor? k_gain, float eps) -> (Tensor, Tensor)",
)
def _rope_backward(dq, dk, dv, x, cos, sin, q_gain, k_gain, eps):
    """dx (B, T, H + 2G, D), and the gradients of both gains: (2, D) float32, (2, 0) without."""
    dq, dk, dv = (a.contiguous() for a in (dq, dk, dv))  # those of a sum have stride 0
    B, T, H, D = dq.shape
    G = dk.shape[2]
    tiles, tile = _tile(B * T, H, G, D)
    # only the sums over rows call for a limit
    programs = tiles if x is None else min(tiles, PROGRAMS)
    dx = dq.new_empty((B, T, H + 2 * G, D))
    d_gain = dq.new_empty((2, programs, D if x is not None else 0), dtype=torch.float32)
    if tiles:
        sizes = B * T, T, *((0, 0, 0) if x is None else x.stride()[:3])
        with torch.cuda.device_of(dq):
            _backward[(programs,)](
                dq, dk, dv, x, cos, sin, q_gain, k_gain, dx, d_gain, *sizes, eps, H, G, **tile
            )
    return dx, d_gain.sum(1)


@_rope_backward.register_fake
def _(dq, dk, dv, x, cos, sin, q_gain, k_gain, eps):
    B, T, H, D = dq.shape
    dx = dq.new_empty((B, T, H + 2 * dk.shape[2], D))
    return dx, dq.new_empty((2, D if x is not None else 0), dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    x, *tables_and_gains, ctx.eps, _, _ = inputs
    x = x if tables_and_gains[2] is not None else None  # a rotation alone does not need it
    ctx.save_for_backward(x, *tables_and_gains)


def _differentiate(ctx, dq, dk, dv):
    dx, d_gain = _rope_backward(dq, dk, dv, *ctx.saved_tensors, ctx.eps)
    gains = ctx.saved_tensors[3:]
    dq_gain, dk_gain = (None if g is None else d.to(g.dtype) for g, d in zip(gains, d_gain))
    return dx, None, None, dq_gain, dk_gain, None, None, None


_rope.register_autograd(_differentiate, setup_context=_setup_context)


def _check(name: str, x: Tensor, tables: dict, gains: dict) -> None:
    D = x.shape[-1] if x.ndim == 4 else 0
    if D == 0 or D % 2:
        raise ValueError(f"{name}.shape={tuple(x.shape)} must be (B, T, heads, D) with even D")
    if len(gains) == 1:
        raise ValueError(f"the gains given={list(gains)} must be both or none")
    for label, a in (tables | gains).items():
        shape = (x.shape[1], D // 2) if label in tables else (D,)
        if a.shape != shape:
            raise ValueError(f"{label}.shape={tuple(a.shape)} must be {shape} for {name}'s shape")


def _check_triton(name: str, x: Tensor, tables: dict, gains: dict) -> None:
    if triton is None:
        raise ImportError("implementation='triton' needs Triton: pip install triton")
    if not (x.is_cuda or INTERPRETED):
        wanted = "a GPU, or a CPU with TRITON_INTERPRET=1 set before Python starts"
        raise ValueError(f"{name}.device={x.device} must be {wanted}")
    if x.shape[-1] > 2048:
        wanted = "at most 2048: a head lives in registers"
        raise ValueError(f"{name}.shape[-1]={x.shape[-1]} must be {wanted}")
    if x.stride(-1) != 1:
        raise ValueError(f"{name}.stride(-1)={x.stride(-1)} must be 1; call .contiguous() first")
    for label, a in ({name: x} | tables | gains).items():
        wanted = DTYPES[:1] if label in tables else DTYPES
        if a.dtype not in wanted:
            raise ValueError(f"{label}.dtype={a.dtype} must be one of {wanted}")
        if a.device != x.device:
            raise ValueError(f"{label}.device={a.device} must be {x.device}, as {name}")
        if a is not x and not a.is_contiguous():
            raise ValueError(f"{label}.stride()={a.stride()} must be contiguous")
    kinds = [a.dtype for a in gains.values()]
    if len(set(kinds)) > 1:
        raise ValueError(f"the gains' dtypes={kinds} must be the same")


def _use_triton(
    implementation: str, name: str, x: Tensor, cos: Tensor, sin: Tensor, gains: dict
) -> bool:
    """Whether the kernels turn x; ValueError for shapes that do not fit, and what they cannot."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} must be one of {IMPLEMENTATIONS}")
    gains = {label: gain for label, gain in gains.items() if gain is not None}
    arguments = name, x, {"cos": cos, "sin": sin}, gains
    _check(*arguments)
    able = triton is not None and x.is_cuda and x.dtype in DTYPES
    if implementation == "reference" or (implementation == "auto" and not able):
        return False
    _check_triton(*arguments)
    return True


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    q_gain: Tensor | None = None,
    k_gain: Tensor | None = None,
    eps: float = 1e-6,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """q and k, normed if gains are given, and turned by their positions' angles.

    Args:
        q (B, T, H, D), k (B, T, G, D); views of anything will do, with a last stride of 1.
        cos, sin (T, D/2) float32: the tables' rows of these T positions.
        q_gain, k_gain (D,): both for QK-norm, or neither.
        implementation: "auto" takes the kernels for float32, bfloat16 and float16 on a GPU where
            Triton is installed, else the reference. Two launches; `rope_qkv` needs one.
    """
    gains = {"q_gain": q_gain, "k_gain": k_gain}
    turned = []
    for name, x, gain in (("q", q, q_gain), ("k", k, k_gain)):
        if _use_triton(implementation, name, x, cos, sin, gains):
            x, _, _ = torch.ops.kernels.rope(x, cos, sin, gain, gain, eps, x.shape[2], 0)
        else:
            x = rope_reference(x, cos, sin, gain, eps)
        turned.append(x)
    return turned[0], turned[1]


def rope_qkv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    n_head: int,
    n_kv_head: int,
    *,
    q_gain: Tensor | None = None,
    k_gain: Tensor | None = None,
    eps: float = 1e-6,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`rope` for a packed projection, in one launch each way: q, k, v as separate tensors.

    Args:
        qkv (B, T, H + 2G, D) with H = n_head, G = n_kv_head: queries, then keys, then values.
        The others: see `rope`.
    Returns: q (B, T, H, D), k (B, T, G, D), v (B, T, G, D), contiguous from the kernels; v is a
        copy there and a view from the reference.
    """
    H, G = n_head, n_kv_head
    gains = {"q_gain": q_gain, "k_gain": k_gain}
    kernels = _use_triton(implementation, "qkv", qkv, cos, sin, gains)
    if H < 1 or G < 1 or qkv.shape[2] != H + 2 * G:
        wanted = f"(B, T, n_head + 2 n_kv_head = {H + 2 * G}, D), at least one head of each"
        raise ValueError(f"qkv.shape={tuple(qkv.shape)} must be {wanted}")
    if kernels:
        return torch.ops.kernels.rope(qkv, cos, sin, q_gain, k_gain, eps, H, G)
    q, k, v = qkv.split((H, G, G), dim=2)
    q, k = rope_reference(q, cos, sin, q_gain, eps), rope_reference(k, cos, sin, k_gain, eps)
    return q, k, v


def benchmark(H: int = 4, G: int = 2, D: int = 128) -> None:
    """Errors against float64; on a GPU also ms and GB/s of both passes, from a cold cache."""
    torch.manual_seed(0)
    gpu = torch.cuda.is_available()
    on_gpu = {"dtype": torch.bfloat16, "device": "cuda"}
    B, T, kind = (128, 512, on_gpu) if gpu else (2, 9, {})
    frequency = 10_000.0 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    angle = torch.outer(torch.arange(T, dtype=torch.float64), frequency)  # (T, D/2) radians
    exact_tables = [table.to(kind.get("device", "cpu")) for table in (angle.cos(), angle.sin())]
    tables = [table.float() for table in exact_tables]
    x, gains = torch.randn((B, T, H + 2 * G, D), **kind), 1 + 0.1 * torch.randn((2, D), **kind)
    inputs = [a.requires_grad_() for a in (x, *gains.unbind())]
    dy = [torch.randn((B, T, heads, D), **kind) for heads in (H, G, G)]

    def run(f, implementation, inputs, tables):
        x, q_gain, k_gain = inputs
        options = {"q_gain": q_gain, "k_gain": k_gain, "implementation": implementation}
        outputs = f(x, *tables, H, G, **options)
        like = [a.to(b) for a, b in zip(dy, outputs)]
        return *outputs, *torch.autograd.grad(outputs, inputs, like)

    wide = [a.detach().double().requires_grad_() for a in inputs]
    exact = run(rope_qkv, "reference", wide, exact_tables)
    ours = run(rope_qkv, "triton", inputs, tables)
    errors = [(a - b).abs().max().item() for a, b in zip(ours, exact)]
    place = f"on {torch.cuda.get_device_name()}" if gpu else "in the interpreter (no GPU to time)"
    print(f"{B} rows of {T} tokens, heads {H} + 2 * {G} of {D}, {x.dtype}, {place}")
    names = ("q", "k", "v", "dx", "dq_gain", "dk_gain")
    listed = ", ".join(f"{name} {error:.1e}" for name, error in zip(names, errors))
    print(f"errors against float64:\n{listed}")
    if not gpu:
        assert max(errors) < 2e-5, "this is not RoPE with QK-norm"
        return
    passes = 4 + (H + G) / (H + 2 * G)  # forward 2, backward 2 and the normed part of x
    for name, f, implementation in (
        ("eager", rope_qkv, "reference"),
        ("compiled", torch.compile(rope_qkv), "reference"),
        ("triton", rope_qkv, "triton"),
    ):
        ms = triton.testing.do_bench(partial(run, f, implementation, inputs, tables))
        print(f"{name:9}{ms:8.3f} ms {1e-6 * passes * x.nbytes / ms:6.0f} GB/s")


if __name__ == "__main__":
    benchmark()
