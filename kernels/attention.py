"""FlashAttention, forward and backward: exact attention that never holds the (T, T) scores.

Row t of one head (a query) mixes the values of the columns s (keys) that it may see:

    forward    S_ts = scale q_t . k_s               scores; -inf where s is not visible
               L_t  = ln sum_s exp(S_ts)            log-sum-exp, in natural log
               P_ts = exp(S_ts - L_t)               weights, each row sums to 1
               o_t  = sum_s P_ts v_s
    backward   given do = dloss/do and dL = dloss/dL,
               dv_s  = sum_t P_ts do_t
               dP_ts = do_t . v_s
               dS_ts = P_ts (dP_ts - delta_t)       delta_t = o_t . do_t - dL_t, where
               dq_t  = scale sum_s dS_ts k_s        o_t . do_t is sum_s P_ts dP_ts
               dk_s  = scale sum_t dS_ts q_t

Forward works through the columns a block at a time. It holds the largest score so far (m), the sum
of exp(S - m) and the mix so far; when m grows, both are scaled down by exp(m_old - m_new), and at
the end the mix is divided by the sum. Saved are q, k, v, o and L: with L, P comes out of S in one
exponential, so that backward recomputes blocks of S. One kernel walks along the columns and sums
dq, a second walks along the rows and sums dk and dv. No two programs add to one number: there are
no atomics, and the same input gives the same bits.

What a row sees is an interval, whatever is combined: itself back to a window's or its document's
first token, and on to the last if not causal. Two vectors say it all, START_t = max(first token
of t's document, t - window + 1) and END_t = min(last token of it, t + window - 1):

    row t sees columns      START_t ... t  (causal)   or   START_t ... END_t
    column s is seen by     s ... END_s    (causal)   or   START_s ... END_s

Both grow with t, so the first and the last row of a block tell which column blocks it must visit,
and which of these all its rows see entirely: only the others are masked.

Cost with N = B T tokens, bfloat16, causal (half the scores; not causal is twice the FLOPs):
               FLOPs          bytes moved          27M model: N 65,536, T 512, H 4, G 2, D 128
    forward    2 N T H D      4 N D (H + G)        34 GFLOP  44 us   201 MB  47 us
    backward   7 N T H D      12 N D (H + G)       120 GFLOP 152 us  604 MB  140 us
The times are arithmetic, from 790 TFLOP/s and 4.3 TB/s, which an H200 reaches in matrix products
and copies: at T 512 both bind alike, at longer T the matrix rate alone. (5 N T H D would do for
backward, but then dq has to be summed across programs.) Unfused, forward alone also writes and
reads S and P, 8 N T H bytes: 1.07 GB, 250 us. The kernels are not yet measured on a GPU.

Letters used below: B batch rows, T positions, H query heads, G key/value heads (H/G query heads
share one), D head_dim; a block is BM rows or BN columns.

Sources: FlashAttention: Dao et al. 2022 (arXiv 2205.14135) and Dao 2023 (2307.08691); the running
maximum: Milakov & Gimelshein 2018 (1805.02867); sliding window: Beltagy et al. 2020 (2004.05150).

Run: `python kernels/attention.py`. With a GPU it times the kernels against torch's; without one
(13 s on 2 cores of an AMD EPYC (Zen 3)) it checks them in Triton's interpreter and prints, from
seed 0,

    largest differences to float64, T   65      o      L     dq     dk     dv
        causal                            7e-07  5e-07  1e-06  2e-06  9e-07
        full                              5e-07  5e-07  6e-07  5e-07  5e-07
        causal, window                    5e-07  4e-07  1e-06  1e-06  7e-07
        causal, documents                 5e-07  4e-07  1e-06  1e-06  9e-07
        full, window, documents           7e-07  4e-07  7e-07  1e-06  9e-07
    ok in Triton's interpreter; there is no GPU to time
"""

from __future__ import annotations

import math
import os

import torch
import torch.nn.functional as F
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
HEAD_DIMS = (32, 64, 128)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    documents: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The equations as they stand, all scores at once; arguments as in `attention`.

    Returns: o (B, T, H, D) in q's dtype, L (B, H, T). Computed in float32, or float64 if q is.
    """
    B, T, H, D = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    share = H // k.shape[2]
    k, v = (x.repeat_interleave(share, dim=2).to(wide) for x in (k, v))  # (B, T, H, D)
    scores = torch.einsum("bthd,bshd->bhts", q.to(wide), k)  # (B, H, T, T)
    scores = scores * (1 / math.sqrt(D) if scale is None else scale)

    t = torch.arange(T, device=q.device)
    visible = torch.ones(1, T, T, dtype=torch.bool, device=q.device)
    if causal:
        visible = visible & (t <= t[:, None])
    if window is not None:
        visible = visible & ((t - t[:, None]).abs() < window)
    if documents is not None:
        run = F.pad((documents[:, 1:] != documents[:, :-1]).cumsum(1), (1, 0))  # (B, T)
        visible = visible & (run[:, None, :] == run[:, :, None])  # (B, T, T)
    scores = scores.masked_fill(~visible[:, None], -math.inf)
    o = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)
    return o.to(q.dtype), scores.logsumexp(-1)


def visible_limits(
    B: int, T: int, device: torch.device, window: int | None, documents: Tensor | None
) -> tuple[Tensor, Tensor]:
    """START and END of every position, (B, T) int32 each, as defined at the top of the file."""
    t = torch.arange(T, device=device, dtype=torch.int32).expand(B, T)
    start, end = torch.zeros_like(t), torch.full_like(t, T - 1)
    if documents is not None:
        new = documents[:, 1:] != documents[:, :-1]  # (B, T - 1) a document begins behind here
        start[:, 1:] = torch.where(new, t[:, 1:], 0)
        end[:, :-1] = torch.where(new, t[:, :-1], T - 1)
        start = start.cummax(1).values
        end = end.flip(1).cummin(1).values.flip(1)
    if window is not None:
        window = min(window, T)  # keeps to 32 bits
        start = torch.maximum(start, t - window + 1)
        end = torch.minimum(end, t + window - 1)
    return start.contiguous(), end.contiguous()


# Kernels. q (B, T, H, D), k and v (B, T, G, D) are float16, bfloat16 or float32 views with any
# strides but the last, which is 1: heads may lie in one packed projection. o, do, dq, dk, dv have
# the same shapes and are contiguous, as are lse (that is L), dlse and delta, (B, H, T) float32, and
# START and END, (B, T) int32, which are None without LIMITS.
# A program's block of rows or columns may reach beyond T: there loads give 0 and nothing is stored.
# Exponentials are taken to base 2, which the hardware has: exp(x) = exp2(x LOG2E).
# DOT is the dtype in which matrix products take their operands; they sum in float32. ("ieee"
# changes nothing but float32, which would be rounded to 10 bits of mantissa.)


@jit
def _place(program, T, heads, SIZE: tl.constexpr):
    """A program's first row or column of SIZE, its head, its batch row.

    The blocks of a head run side by side, so that what they share is read from the cache.
    """
    blocks = tl.cdiv(T, SIZE)
    b = (program // (blocks * heads)).to(tl.int64)  # b * stride passes 2^31
    return program % blocks * SIZE, program // blocks % heads, b


@jit
def _tile(x, lines, stride, T, D: tl.constexpr, DTYPE: tl.constexpr):
    """These rows or columns of a head, (lines, D)."""
    d = tl.arange(0, D)
    there = lines[:, None] < T
    return tl.load(x + lines[:, None] * stride + d[None, :], mask=there, other=0.0).to(DTYPE)


@jit
def _span(
    start, end, b, block, T,
    FROM_ITSELF: tl.constexpr, TO_ITSELF: tl.constexpr, LIMITS: tl.constexpr,
    SIZE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """What the SIZE rows (or columns) from `block` on see of the other axis, in blocks of STEP.

    Returns first, last (SIZE,): line i sees first_i ... last_i; then block boundaries:
    all of [free, free_stop) is seen by every line; [begin, free) and what follows free_stop, in
    all `masked` blocks, is seen in part.
    """
    lines = block + tl.arange(0, SIZE)
    top = tl.minimum(block + SIZE, T) - 1  # the last line that exists
    if LIMITS:
        start += b * T
        end += b * T
    first = lines
    begin, all_begin = block, top
    last = lines
    all_stop, stop = block + 1, top + 1
    if not FROM_ITSELF:
        first = tl.zeros([SIZE], tl.int32)
        begin, all_begin = 0, 0
        if LIMITS:
            first = tl.load(start + lines, mask=lines < T, other=0)
            begin, all_begin = tl.load(start + block), tl.load(start + top)
    if not TO_ITSELF:
        last = tl.zeros([SIZE], tl.int32) + (T - 1)
        all_stop, stop = T, T
        if LIMITS:
            last = tl.load(end + lines, mask=lines < T, other=T - 1)
            all_stop, stop = tl.load(end + block) + 1, tl.load(end + top) + 1
    begin = begin // STEP * STEP
    free = tl.minimum(tl.cdiv(all_begin, STEP), tl.cdiv(stop, STEP)) * STEP
    free_stop = tl.maximum(all_stop // STEP * STEP, free)
    masked = (free - begin) // STEP + tl.cdiv(stop - free_stop, STEP)
    return first, last, begin, free, free_stop, masked


@jit
def _block(i, begin, free, free_stop, STEP: tl.constexpr, PART: tl.constexpr):
    """The lines of block i of those seen in part (PART 0) or entirely (PART 1)."""
    # from i, and addresses from these, in each turn: Triton 3.6 spills if pointers are carried on
    block = free + i * STEP
    if PART == 0:
        block = begin + i * STEP
        block = tl.where(block < free, block, block + (free_stop - free))
    return block + tl.arange(0, STEP)


@jit
def _forward(
    q, k, v, start, end, o, lse,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, scale, T, H, G,
    CAUSAL: tl.constexpr, LIMITS: tl.constexpr, DOT: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Program: BM rows of one head of one batch row. Writes o and lse of these rows."""
    LOG2E: tl.constexpr = 1.4426950408889634
    row, h, b = _place(tl.program_id(0), T, H, BM)
    row = (tl.cdiv(T, BM) - 1) * BM - row  # if causal the last rows have most to do and go first
    q += b * stride_qb + h * stride_qh
    k += b * stride_kb + h // (H // G) * stride_kh
    v += b * stride_vb + h // (H // G) * stride_vh
    first, last, begin, free, free_stop, masked = _span(
        start, end, b, row, T, False, CAUSAL, LIMITS, BM, BN
    )
    rows = row + tl.arange(0, BM)
    q_tile = _tile(q, rows, stride_qt, T, D, DOT)
    m = tl.zeros([BM], tl.float32) - float("inf")
    total = tl.zeros([BM], tl.float32)
    mix = tl.zeros([BM, D], tl.float32)
    for part in tl.static_range(2):  # 0: blocks seen in part; 1: blocks seen entirely
        for i in range(masked if part == 0 else (free_stop - free) // BN):
            columns = _block(i, begin, free, free_stop, BN, part)
            k_tile = _tile(k, columns, stride_kt, T, D, DOT)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            scores *= scale * LOG2E  # (BM, BN)
            if part == 0:
                visible = (columns[None, :] >= first[:, None]) & (columns[None, :] <= last[:, None])
                scores = tl.where(visible, scores, float("-inf"))
            new_m = tl.maximum(m, tl.max(scores, 1))
            shift = new_m
            if part == 0:  # a row may have seen nothing yet, and -inf - -inf is NaN
                shift = tl.where(new_m == float("-inf"), 0.0, new_m)
            p = tl.exp2(scores - shift[:, None])
            shrink = tl.exp2(m - shift)
            total = total * shrink + tl.sum(p, 1)
            v_tile = _tile(v, columns, stride_vt, T, D, DOT)
            mix *= shrink[:, None]
            mix = tl.dot(p.to(DOT), v_tile, mix, input_precision="ieee")
            m = new_m
    o += (b * T * H + h) * D
    d = tl.arange(0, D)
    mix = (mix / total[:, None]).to(o.dtype.element_ty)
    tl.store(o + rows[:, None] * (H * D) + d[None, :], mix, mask=rows[:, None] < T)
    tl.store(lse + (b * H + h) * T + rows, (m + tl.log2(total)) / LOG2E, mask=rows < T)


@jit
def _backward_dq(
    q, k, v, start, end, o, lse, do, dlse, dq, delta,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, scale, T, H, G,
    CAUSAL: tl.constexpr, LIMITS: tl.constexpr, DOT: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Program: BM rows of one head of one batch row, as `_forward`. Writes their dq and delta."""
    LOG2E: tl.constexpr = 1.4426950408889634
    row, h, b = _place(tl.program_id(0), T, H, BM)
    row = (tl.cdiv(T, BM) - 1) * BM - row
    q += b * stride_qb + h * stride_qh
    k += b * stride_kb + h // (H // G) * stride_kh
    v += b * stride_vb + h // (H // G) * stride_vh
    first, last, begin, free, free_stop, masked = _span(
        start, end, b, row, T, False, CAUSAL, LIMITS, BM, BN
    )
    rows = row + tl.arange(0, BM)
    inside = rows < T
    q_tile = _tile(q, rows, stride_qt, T, D, DOT)
    here = (b * T * H + h) * D
    o_tile = _tile(o + here, rows, H * D, T, D, tl.float32)
    do_tile = _tile(do + here, rows, H * D, T, D, DOT)
    line = (b * H + h) * T + rows
    delta_t = tl.sum(o_tile * do_tile.to(tl.float32), 1)
    delta_t -= tl.load(dlse + line, mask=inside, other=0.0)
    tl.store(delta + line, delta_t, mask=inside)
    lse_t = tl.load(lse + line, mask=inside, other=0.0) * LOG2E
    grad = tl.zeros([BM, D], tl.float32)
    for part in tl.static_range(2):  # 0: blocks seen in part; 1: blocks seen entirely
        for i in range(masked if part == 0 else (free_stop - free) // BN):
            columns = _block(i, begin, free, free_stop, BN, part)
            k_tile = _tile(k, columns, stride_kt, T, D, DOT)
            v_tile = _tile(v, columns, stride_vt, T, D, DOT)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            p = tl.exp2(scores * (scale * LOG2E) - lse_t[:, None])  # (BM, BN)
            if part == 0:  # after exp2: an invisible score can be above lse, and inf * 0 is NaN
                visible = (columns[None, :] >= first[:, None]) & (columns[None, :] <= last[:, None])
                p = tl.where(visible, p, 0.0)
            dp = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee")
            ds = p * (dp - delta_t[:, None])
            grad = tl.dot(ds.to(DOT), k_tile, grad, input_precision="ieee")
    dq += here + rows[:, None] * (H * D) + tl.arange(0, D)[None, :]
    tl.store(dq, (grad * scale).to(dq.dtype.element_ty), mask=inside[:, None])


@jit
def _backward_dkv(
    q, k, v, start, end, lse, do, delta, dk, dv,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, scale, T, H, G,
    CAUSAL: tl.constexpr, LIMITS: tl.constexpr, DOT: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Program: BN columns of one key/value head of one batch row. Writes their dk and dv.

    Its tiles are transposed, (BN, BM), so that P and dS enter their products from registers.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    column, g, b = _place(tl.program_id(0), T, G, BN)  # if causal the first have most to do
    heads = H // G
    h = g * heads  # the first query head of the group
    q += b * stride_qb + h * stride_qh
    k += b * stride_kb + g * stride_kh
    v += b * stride_vb + g * stride_vh
    do += (b * T * H + h) * D
    lse += (b * H + h) * T
    delta += (b * H + h) * T
    first, last, begin, free, free_stop, masked = _span(
        start, end, b, column, T, CAUSAL, False, LIMITS, BN, BM
    )
    columns = column + tl.arange(0, BN)
    k_tile = _tile(k, columns, stride_kt, T, D, DOT)
    v_tile = _tile(v, columns, stride_vt, T, D, DOT)
    grad_k = tl.zeros([BN, D], tl.float32)
    grad_v = tl.zeros([BN, D], tl.float32)
    for part in tl.static_range(2):  # 0: blocks seen in part; 1: blocks seen entirely
        turns = masked if part == 0 else (free_stop - free) // BM
        # one loop over all heads of the group: a loop in a loop costs registers; D 128 spills
        for i in range(heads * turns):
            rows = _block(i % turns, begin, free, free_stop, BM, part)
            h = i // turns
            there = rows < T
            q_tile = _tile(q + h * stride_qh, rows, stride_qt, T, D, DOT)
            lse_t = tl.load(lse + h * T + rows, mask=there, other=0.0) * LOG2E
            scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
            p = tl.exp2(scores * (scale * LOG2E) - lse_t[None, :])  # (BN, BM)
            if part == 0:
                visible = (rows[None, :] >= first[:, None]) & (rows[None, :] <= last[:, None])
                p = tl.where(visible, p, 0.0)
            do_tile = _tile(do + h * D, rows, H * D, T, D, DOT)
            grad_v = tl.dot(p.to(DOT), do_tile, grad_v, input_precision="ieee")
            dp = tl.dot(v_tile, tl.trans(do_tile), input_precision="ieee")
            delta_t = tl.load(delta + h * T + rows, mask=there, other=0.0)
            ds = p * (dp - delta_t[None, :])
            grad_k = tl.dot(ds.to(DOT), q_tile, grad_k, input_precision="ieee")
    here = (b * T * G + g) * D + columns[:, None] * (G * D) + tl.arange(0, D)[None, :]
    inside = columns[:, None] < T
    tl.store(dk + here, (grad_k * scale).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + here, grad_v.to(dv.dtype.element_ty), mask=inside)


INTERPRETED = triton is not None and not isinstance(_forward, triton.JITFunction)
KERNELS = {"forward": _forward, "dq": _backward_dq, "dkv": _backward_dkv}

# (BM, BN, warps, stages) by chip and head_dim, chosen from what Triton 3.6 and 3.9 compile for
# sm_90, sm_80 and gfx942, without spills; not yet measured on a GPU. In bfloat16 products on sm_90
# are wgmma (which takes 64 rows or more for every 4 warps), and "other" claims at most 64 KiB of
# shared memory, which any chip has. Most registers on sm_90, of forward, dq and dkv: D 64 162, 165,
# 227, so that 3, 3 and 2 programs share a multiprocessor; D 128 254, 251, 248 for 1, 2 and 2.
# float32 is there to be exact, not fast: its tiles are small enough for every chip and head_dim.
CONFIGS = {
    "hopper": {"forward": (64, 64, 4, 3), "dq": (64, 64, 4, 2), "dkv": (64, 64, 4, 2)},
    "hopper, D 128": {"forward": (128, 64, 8, 3), "dq": (64, 64, 4, 2), "dkv": (32, 64, 4, 2)},
    "other": {"forward": (128, 32, 8, 2), "dq": (64, 32, 4, 2), "dkv": (32, 64, 8, 1)},
    "float32": {"forward": (16, 32, 4, 1), "dq": (16, 16, 8, 1), "dkv": (16, 16, 8, 1)},
}


def _constants(name: str, dtype: torch.dtype, D: int, hopper: bool) -> dict:
    row = "hopper" if hopper else "other"
    row = "hopper, D 128" if row == "hopper" and D > 64 else row
    if dtype == torch.float32 and not INTERPRETED:  # which has no registers, and is slow by tile
        row = "float32"
    BM, BN, warps, stages = CONFIGS[row][name]
    dot = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    # the interpreter multiplies the bit patterns of bfloat16 as if they were integers
    constants = {"DOT": tl.float32 if INTERPRETED else dot[dtype], "D": D, "BM": BM, "BN": BN}
    return constants | {"num_warps": warps, "num_stages": stages}


def _is_hopper(device: torch.device) -> bool:
    if device.type == "cpu":  # the interpreter: any will do
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


def _launch(name: str, pointers: tuple[Tensor | None, ...], causal: bool, scale: float) -> None:
    q, k, v, start = pointers[:4]
    B, T, H, D = q.shape
    G = k.shape[2]
    constants = _constants(name, q.dtype, D, _is_hopper(q.device))
    constants |= {"CAUSAL": causal, "LIMITS": start is not None}
    heads, size = (G, constants["BN"]) if name == "dkv" else (H, constants["BM"])
    strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]
    with torch.cuda.device_of(q):
        KERNELS[name][(B * heads * triton.cdiv(T, size),)](
            *pointers, *strides, scale, T, H, G, **constants
        )


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """o (B, T, H, D) in q's dtype and L (B, H, T) float32, contiguous and not filled."""
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, T), dtype=torch.float32)


@torch.library.custom_op(
    "kernels::attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? start, Tensor? end, bool causal, float scale)"
    " -> (Tensor, Tensor)",
)
def _attention(q, k, v, start, end, causal, scale):
    o, lse = _outputs(q)
    _launch("forward", (q, k, v, start, end, o, lse), causal, scale)
    return o, lse


@torch.library.custom_op(
    "kernels::attention_backward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? start, Tensor? end, Tensor o, Tensor lse,"
    " Tensor do, Tensor dlse, bool causal, float scale) -> (Tensor, Tensor, Tensor)",
)
def _attention_backward(q, k, v, start, end, o, lse, do, dlse, causal, scale):
    do, dlse = do.contiguous(), dlse.contiguous()  # the gradient of a sum has stride 0
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    delta = torch.empty_like(lse)  # written by the first kernel for the second
    _launch("dq", (q, k, v, start, end, o, lse, do, dlse, dq, delta), causal, scale)
    _launch("dkv", (q, k, v, start, end, lse, do, delta, dk, dv), causal, scale)
    return dq, dk, dv


_attention.register_fake(lambda q, *_: _outputs(q))
_attention_backward.register_fake(lambda *x: tuple(t.new_empty(t.shape) for t in x[:3]))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)  # q, k, v, START, END, o, L


def _differentiate(ctx, do, dlse):
    gradients = _attention_backward(*ctx.saved_tensors, do, dlse, ctx.causal, ctx.scale)
    return *gradients, None, None, None, None


_attention.register_autograd(_differentiate, setup_context=_setup_context)


def _check(q: Tensor, k: Tensor, v: Tensor, window: int | None, documents: Tensor | None) -> None:
    if q.ndim != 4 or q.numel() == 0 or not q.is_floating_point():
        wanted = "floating-point (B, T, H, D), none of them 0"
        raise ValueError(f"q.shape={tuple(q.shape)} of {q.dtype} must be {wanted}")
    B, T, H, D = q.shape
    G = k.shape[2] if k.ndim == 4 else 0
    if k.shape != (B, T, G, D) or G == 0 or H % G:
        wanted = f"({B}, {T}, G, {D}) as q, with G dividing H={H}"
        raise ValueError(f"k.shape={tuple(k.shape)} must be {wanted}")
    if v.shape != k.shape:
        raise ValueError(f"v.shape={tuple(v.shape)} must be {tuple(k.shape)}, as k")
    for name, x in (("k", k), ("v", v), ("documents", documents)):
        if x is not None and x.device != q.device:
            raise ValueError(f"{name}.device={x.device} must be {q.device}, as q")
        if x is not documents and x.dtype != q.dtype:
            raise ValueError(f"{name}.dtype={x.dtype} must be {q.dtype}, as q")
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1: a token sees itself")
    if documents is not None and documents.shape != (B, T):
        raise ValueError(f"documents.shape={tuple(documents.shape)} must be {(B, T)}, as q")
    if documents is not None and (documents.is_floating_point() or documents.is_complex()):
        raise ValueError(f"documents.dtype={documents.dtype} must be an integer type: they are ids")


def _check_triton(q: Tensor, k: Tensor, v: Tensor) -> None:
    if triton is None:
        raise ImportError("implementation='triton' needs Triton: pip install triton")
    if not (q.is_cuda or INTERPRETED):
        wanted = "a GPU, or a CPU with TRITON_INTERPRET=1 set before Python starts"
        raise ValueError(f"q.device={q.device} must be {wanted}")
    if q.dtype not in DTYPES:
        raise ValueError(f"q.dtype={q.dtype} must be one of {DTYPES}")
    if q.shape[3] not in HEAD_DIMS:
        raise ValueError(f"head_dim={q.shape[3]} must be one of {HEAD_DIMS}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(3) != 1:
            raise ValueError(f"{name}.stride(3)={x.stride(3)} must be 1; call .contiguous() first")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    documents: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Each query's mix of the values it may see: (B, T, H, D), contiguous, in q's dtype.

    Args:
        q (B, T, H, D); k, v (B, T, G, D), one dtype; query head h uses key/value head h // (H / G).
        causal: position t sees the positions up to t; else all.
        window: of these only those less than `window` away (behind, and ahead if not causal).
        documents: (B, T) integer ids; of these only those in the same run of equal ids.
        scale: of the scores; None: 1 / sqrt(D).
        return_lse: also return L (B, H, T) float32, the log-sum-exp of each query's scores;
            gradients flow through it too.
        implementation: "triton" is the kernels: float16, bfloat16 or float32, D in 32, 64, 128,
            last strides 1, on a GPU or in Triton's interpreter; "reference" holds all scores, for
            any dtype, D and device; "auto" is "triton" for tensors of such dtype and D on a GPU
            if Triton is installed, else "reference".
    No dropout, and no second derivative through the kernels.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} must be one of {IMPLEMENTATIONS}")
    _check(q, k, v, window, documents)
    if implementation == "auto":
        good = q.is_cuda and q.dtype in DTYPES and q.shape[3] in HEAD_DIMS
        implementation = "triton" if good and triton is not None else "reference"
    if implementation == "reference":
        o, lse = attention_reference(
            q, k, v, causal=causal, window=window, documents=documents, scale=scale
        )
        return (o, lse) if return_lse else o
    _check_triton(q, k, v)
    B, T, _, D = q.shape
    start = end = None
    if documents is not None or window is not None:
        start, end = visible_limits(B, T, q.device, window, documents)
    scale = 1 / math.sqrt(D) if scale is None else scale
    o, lse = torch.ops.kernels.attention(q, k, v, start, end, causal, scale)
    return (o, lse) if return_lse else o


def largest_errors(device: str, T: int, **options) -> list[float]:
    """Differences of o, L, dq, dk, dv to the float64 reference, for float32 normal numbers."""
    B, H, G, D = 1, 2, 1, 64
    shapes = [(B, T, H, D), (B, T, G, D), (B, T, G, D)]
    leaves = [torch.randn(shape, device=device) for shape in shapes]
    upstream = [torch.randn(shape, device=device) for shape in ((B, T, H, D), (B, H, T))]
    results = []
    for dtype, implementation in ((torch.float32, "triton"), (torch.float64, "reference")):
        x = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        out = attention(*x, **options, return_lse=True, implementation=implementation)
        results.append((*out, *torch.autograd.grad(out, x, [u.to(dtype) for u in upstream])))
    return [(a - b).abs().max().item() for a, b in zip(*results)]


def check(device: str, T: int) -> None:
    print(f"largest differences to float64, T {T:4}      o      L     dq     dk     dv")
    documents = (3 * torch.arange(T, device=device) // T)[None]  # (1, T)
    for name, options in (
        ("causal", {}),
        ("full", {"causal": False}),
        ("causal, window", {"window": T // 4}),
        ("causal, documents", {"documents": documents}),
        ("full, window, documents", {"causal": False, "window": T // 4, "documents": documents}),
    ):
        errors = largest_errors(device, T, **options)
        print(f"    {name:32}" + "".join(f"{error:7.0e}" for error in errors))
        assert max(errors) < 2e-5, "this is not attention"


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def milliseconds(way, B: int, T: int, H: int, G: int, D: int) -> tuple[float, float]:
    """Of forward, and of forward + backward: bfloat16, causal, q, k, v views of one projection."""
    qkv = torch.randn(B, T, H + 2 * G, D, dtype=torch.bfloat16, device="cuda")
    leaves = [x.requires_grad_() for x in qkv.split((H, G, G), dim=2)]
    do = torch.randn(B, T, H, D, dtype=torch.bfloat16, device="cuda")
    forward = triton.testing.do_bench(lambda: way(*leaves))
    return forward, triton.testing.do_bench(lambda: torch.autograd.grad(way(*leaves), leaves, do))


def benchmark() -> None:
    """Errors, then times beside torch's on a GPU; without one, errors in the interpreter."""
    torch.manual_seed(0)
    if not torch.cuda.is_available():
        check("cpu", 65)
        print("ok in Triton's interpreter; there is no GPU to time")
        return
    check("cuda", 500)
    print(f"{torch.cuda.get_device_name()}; TFLOP/s count 2 products forward and 5 backward")
    for shape in ((128, 512, 4, 2, 128), (128, 512, 8, 8, 64), (8, 4096, 16, 4, 128)):
        print("B {}, T {}, H {}, G {}, D {}: forward, then with backward".format(*shape))
        B, T, H, _, D = shape
        gflop = 2 * B * T * T * H * D / 1e9
        for name, way in (("triton", attention), ("torch's SDPA", sdpa)):
            forward, both = milliseconds(way, *shape)
            print(f"    {name:16}{forward:8.3f} ms {gflop / forward:6.0f} TFLOP/s", end="")
            print(f"{both:8.3f} ms {3.5 * gflop / both:6.0f} TFLOP/s")


if __name__ == "__main__":
    benchmark()
