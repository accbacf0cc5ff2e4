"""RMSNorm, with the residual addition before it, in one pass over memory each way.

For each row x of C numbers (N rows), with r the residual branch, if there is one:

    s    = x + r                                the stream; s = x without r
    rstd = 1 / sqrt(mean(s^2) + eps)
    y    = g * n,   n = s * rstd                g the gain

Backward, from dy and the gradient ds that reaches s from elsewhere (the residual path itself):

    dn = g * dy
    dx = dr = rstd * (dn - n * mean(dn * n)) + ds
    dg = sum over rows of dy * n

Bytes in bf16, a = 2NC being one pass over an activation: forward reads x and writes y, 2a; with the
addition it reads x, r and writes s, y: 4a, where addition and norm apart move 5a. Backward reads s,
dy and writes dx, 3a; ds folded in makes it 4a, apart 6a. rstd (4N) and g are small. About 5NC FLOPs
forward and 10NC backward: one or two per byte, where a GPU needs a hundred to be busy. Memory is
the bound, so the bytes not moved are the time saved: 65,536 rows of 512 are 67 MB a pass, 16 us at
the 4.3 TB/s that a copy reaches on an H200, whatever is computed on the way.

Everything is computed in float32 and rounded once, on writing; y is made of the rounded s, because
backward sees no other. The sum for dg is deterministic: a fixed number of programs each add up
their own rows, and one more sum adds the programs.

Sources: Zhang & Sennrich 2019 (arXiv 1910.07467). Run: `python kernels/rmsnorm.py` times it on a
GPU; without one it checks the kernels in Triton's interpreter and prints, from seed 0,

    100 rows of 96, torch.float32, in the interpreter (no GPU to time); errors against float64:
    y 7.0e-07, x + r 2.4e-07, dx 6.1e-07, dg 3.8e-06
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
# Backward's programs, each with a private sum for dg: four for each of the 132 multiprocessors of
# an H100 or H200, where at most 128 registers and 4 warps let four run at once. Not yet measured on
# a GPU.
PROGRAMS = 528


def rmsnorm_reference(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The equations as they stand, in float32 (float64 for float64)."""
    s = x if residual is None else x + residual
    wide = s.to(torch.promote_types(s.dtype, torch.float32))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)  # (..., 1)
    y = (wide * rstd * weight).to(dtype or s.dtype)
    return y if residual is None else (y, s)


@jit
def _forward(
    x_ptr,  # (N, C), rows x_stride apart; in every tensor here columns are adjacent
    r_ptr,  # (N, C), rows r_stride apart, or None
    g_ptr,  # (C,)
    y_ptr,  # (N, C) contiguous, written
    s_ptr,  # (N, C) contiguous, written; None without r
    rstd_ptr,  # (N,) float32, written
    x_stride,
    r_stride,
    N,
    C,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, at least C
):
    """Program i takes rows i * ROWS ... of which the last program's may reach beyond N."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    mask = (rows < N)[:, None] & (cols < C)[None, :]  # what is masked reads 0 and adds 0 to a sum
    wide = rows.to(tl.int64)[:, None]  # N * C may pass 2^31
    x = tl.load(x_ptr + wide * x_stride + cols[None, :], mask, other=0.0).to(tl.float32)
    if r_ptr is not None:
        x += tl.load(r_ptr + wide * r_stride + cols[None, :], mask, other=0.0).to(tl.float32)
        s = x.to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + wide * C + cols[None, :], s, mask)
        x = s.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / C + eps)  # (ROWS,)
    g = tl.load(g_ptr + cols, cols < C, other=0.0).to(tl.float32)
    tl.store(y_ptr + wide * C + cols[None, :], x * rstd[:, None] * g[None, :], mask)
    tl.store(rstd_ptr + rows, rstd, rows < N)


@jit
def _backward(
    dy_ptr,  # (N, C) contiguous
    ds_ptr,  # (N, C) contiguous, or None
    s_ptr,  # (N, C), rows s_stride apart
    g_ptr,  # (C,)
    rstd_ptr,  # (N,) float32
    dx_ptr,  # (N, C) contiguous, written
    dg_ptr,  # (programs, C) float32, written: one partial sum for each program
    s_stride,
    N,
    C,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program i takes the tiles i, i + programs, ... of ROWS rows, and row i of dg."""
    cols = tl.arange(0, BLOCK)
    g = tl.load(g_ptr + cols, cols < C, other=0.0).to(tl.float32)[None, :]
    dg = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS)
        mask = (rows < N)[:, None] & (cols < C)[None, :]
        wide = rows.to(tl.int64)[:, None]
        rstd = tl.load(rstd_ptr + rows, rows < N, other=0.0)[:, None]
        s = tl.load(s_ptr + wide * s_stride + cols[None, :], mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + wide * C + cols[None, :], mask, other=0.0).to(tl.float32)
        n = s * rstd
        dn = g * dy
        dx = rstd * (dn - n * (tl.sum(dn * n, 1) / C)[:, None])
        if ds_ptr is not None:  # past the norm: this gradient is not differentiated again
            dx += tl.load(ds_ptr + wide * C + cols[None, :], mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + wide * C + cols[None, :], dx, mask)
        dg += dy * n
    row = tl.program_id(0).to(tl.int64) * C
    tl.store(dg_ptr + row + cols, tl.sum(dg, 0), cols < C)


INTERPRETED = triton is not None and not isinstance(_forward, triton.JITFunction)


def _tile(C: int) -> dict:
    """ROWS, BLOCK, num_warps for rows of C: 16 numbers a thread. Not yet measured on a GPU.

    Registers on sm_90, forward and backward, by Triton 3.9 (in brackets 3.6), all without spills
    and with 16-byte accesses to x, r, y, s, dy and dx: C = 512 in float32, without residual 40 and
    114 (40, 119), with it 48 and 117 (48, 128); with it in bfloat16 40 and 107 (40, 126), at C =
    8192 49 and 94 (51, 123).
    """
    block = max(16, triton.next_power_of_2(C))
    warps = min(max(block // 512, 4), 16)
    return {"ROWS": max(1, 2048 // block), "BLOCK": block, "num_warps": warps}


def _outputs(x: Tensor, residual: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """y and s (N, C), rstd (N,). Without residual s is empty: an op may not return its input."""
    s_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    s = x.new_empty((0,) if residual is None else x.shape, dtype=s_dtype)
    return x.new_empty(x.shape, dtype=dtype), s, x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.custom_op("kernels::rmsnorm", mutates_args=())
def _rmsnorm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    N, C = x.shape
    y, s, rstd = _outputs(x, residual, dtype)
    tile = _tile(C)
    written, r_stride = (None, 0) if residual is None else (s, residual.stride(0))
    if N:
        with torch.cuda.device_of(x):
            _forward[(triton.cdiv(N, tile["ROWS"]),)](
                x, residual, weight, y, written, rstd, x.stride(0), r_stride, N, C, eps, **tile
            )
    return y, s, rstd


@torch.library.custom_op("kernels::rmsnorm_backward", mutates_args=())
def _rmsnorm_backward(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """dx (N, C) in the type of s, dg (C,) in that of weight."""
    N, C = s.shape
    dx = s.new_empty((N, C))
    tile = _tile(C)
    programs = min(PROGRAMS, triton.cdiv(N, tile["ROWS"]))
    dg = s.new_empty((programs, C), dtype=torch.float32)
    dy = dy.contiguous()  # the gradient of a sum has stride 0
    ds = None if ds is None else ds.contiguous()
    if N:
        with torch.cuda.device_of(s):
            _backward[(programs,)](dy, ds, s, weight, rstd, dx, dg, s.stride(0), N, C, **tile)
    return dx, dg.sum(0).to(weight.dtype)


_rmsnorm.register_fake(lambda x, weight, eps, residual, dtype: _outputs(x, residual, dtype))
_rmsnorm_backward.register_fake(
    lambda dy, ds, s, weight, rstd: (s.new_empty(s.shape), weight.new_empty(weight.shape))
)


def _setup_context(ctx, inputs, output):
    x, weight, _, residual, _ = inputs
    _, s, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.dtypes = x.dtype, None if residual is None else residual.dtype
    ctx.save_for_backward(x if residual is None else s, weight, rstd)


def _differentiate(ctx, dy, ds, _):
    x_dtype, r_dtype = ctx.dtypes
    dx, dg = _rmsnorm_backward(dy, None if r_dtype is None else ds, *ctx.saved_tensors)
    return dx.to(x_dtype), dg, None, None if r_dtype is None else dx.to(r_dtype), None


_rmsnorm.register_autograd(_differentiate, setup_context=_setup_context)


def _check(x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    C = x.shape[-1] if x.ndim else 0
    if C == 0:
        raise ValueError(f"x.shape={tuple(x.shape)} must be (..., C) with C at least 1")
    if weight.shape != (C,):
        raise ValueError(f"weight.shape={tuple(weight.shape)} must be ({C},), as x.shape[-1]")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual.shape={tuple(residual.shape)} must be {tuple(x.shape)}, as x")


def _check_triton(x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    if triton is None:
        raise ImportError("implementation='triton' needs Triton: pip install triton")
    if not (x.is_cuda or INTERPRETED):
        wanted = "a GPU, or a CPU with TRITON_INTERPRET=1 set before Python starts"
        raise ValueError(f"x.device={x.device} must be {wanted}")
    C = x.shape[-1]
    if C > 8192:
        raise ValueError(f"x.shape[-1]={C} must be at most 8192: a row lives in registers")
    for name, a in (("x", x), ("weight", weight), ("residual", residual)):
        if a is None:
            continue
        if a.dtype not in DTYPES:
            raise ValueError(f"{name}.dtype={a.dtype} must be one of {DTYPES}")
        if a.device != x.device:
            raise ValueError(f"{name}.device={a.device} must be {x.device}, as x")
        if a.stride(-1) != 1 and C > 1:
            stride = a.stride(-1)
            raise ValueError(f"{name}.stride(-1)={stride} must be 1; call .contiguous() first")


def rmsnorm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """y = x / sqrt(mean(x^2) + eps) * weight; with a residual (y of x + residual, x + residual).

    Args:
        x (..., C); residual of x's shape; weight (C,), the gain. They may differ in type.
        dtype: of y; None: that of x + residual. With the type of the product that y goes into
            (autocast's), the stream stays float32 and y is not written in it first.
        implementation: "auto" takes the kernels for float32, bfloat16 and float16 on a GPU where
            Triton is installed, else the reference. The kernels want C <= 8192, a last axis of
            stride 1 and one of these types for all (ValueError, also with "auto"), and copy x only
            if its other axes cannot be seen as one.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} must be one of {IMPLEMENTATIONS}")
    _check(x, weight, residual)
    able = triton is not None and x.is_cuda and x.dtype in DTYPES
    if implementation == "reference" or (implementation == "auto" and not able):
        return rmsnorm_reference(x, weight, eps, residual, dtype)
    _check_triton(x, weight, residual)
    C = x.shape[-1]
    rows = None if residual is None else residual.reshape(-1, C)
    if dtype is None:
        dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype} must be one of {DTYPES}")
    y, s, _ = torch.ops.kernels.rmsnorm(x.reshape(-1, C), weight, eps, rows, dtype)
    return y.view(x.shape) if residual is None else (y.view(x.shape), s.view(x.shape))


def benchmark() -> None:
    """Errors against float64; on a GPU also ms and GB/s of both passes, from a cold cache."""
    torch.manual_seed(0)
    gpu = torch.cuda.is_available()
    on_gpu = {"dtype": torch.bfloat16, "device": "cuda"}
    N, C, kind = (65_536, 512, on_gpu) if gpu else (100, 96, {})
    x, r, dy, ds = torch.randn((4, N, C), **kind)
    inputs = [a.requires_grad_() for a in (x.clone(), torch.randn(C, **kind), r.clone())]

    def run(f, inputs):
        x, g, r = inputs
        y, s = f(x, g, 1e-6, r)
        return y, s, *torch.autograd.grad((y, s), inputs, (dy.to(y), ds.to(y)))

    exact = run(rmsnorm_reference, [a.detach().double().requires_grad_() for a in inputs])
    ours = run(partial(rmsnorm, implementation="triton"), inputs)
    y, s, dx, dg, _ = ((a - b).abs().max().item() for a, b in zip(ours, exact))
    place = f"on {torch.cuda.get_device_name()}" if gpu else "in the interpreter (no GPU to time)"
    print(f"{N} rows of {C}, {x.dtype}, {place}; errors against float64:")
    print(f"y {y:.1e}, x + r {s:.1e}, dx {dx:.1e}, dg {dg:.1e}")
    if not gpu:
        assert max(y, s, dx, dg) < 2e-5, "this is not RMSNorm"
        return
    for name, f in (
        ("eager", rmsnorm_reference),
        ("compiled", torch.compile(rmsnorm_reference)),
        ("triton", rmsnorm),
    ):
        ms = triton.testing.do_bench(partial(run, f, inputs))
        print(f"{name:9}{ms:8.3f} ms {8e-6 * x.nbytes / ms:6.0f} GB/s")  # 4 passes each way


if __name__ == "__main__":
    benchmark()
