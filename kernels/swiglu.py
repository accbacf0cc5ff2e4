"""SwiGLU's elementwise half: silu(gate) * up from the packed output of one matrix product.

A row holds M numbers of gate, then M of up (N rows). With sig(g) = 1 / (1 + exp(-g)):

    y     = g * sig(g) * u
    dgate = dy * u * sig(g) * (1 + g * (1 - sig(g)))        silu'(g), times dy u
    dup   = dy * g * sig(g)

Bytes in bf16, s = 2NM being one pass over an (N, M) tensor: forward reads g, u and writes y, 3s;
backward reads dy, g, u and writes both gradients, 5s. In eager PyTorch silu and the product are
apart, 5s and 9s, and backward then joins the halves of the gradient for the matrix product before
it: 4s more. Here it is written joined. About 5 and 12 FLOPs per element, one or two per byte, where
a GPU needs a hundred to be busy: memory is the bound. At N = 65,536 and M = 1536 a pass is 201 MB,
so forward needs at least 140 us and backward 234 us at the 4.3 TB/s that a copy reaches on an H200.

All arithmetic is in float32, rounded once on writing. Sources: Shazeer 2020 (arXiv 2002.05202).

Run: `python kernels/swiglu.py` times it on a GPU; without one it checks the kernels in Triton's
interpreter and prints, from seed 0,

    7 rows of 2 * 1100, torch.float32, in the interpreter (no GPU to time)
    errors against float64: y 7.0e-07, d(gate, up) 5.4e-07
"""

from __future__ import annotations

import os
from functools import partial

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
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Columns of a program, 8 for each of 128 threads: in bf16 one access of 16 bytes a tensor (two
# threads share them on gfx942, where a warp has 64). Compiled for sm_90 by Triton 3.9 and 3.6: at
# most 32 registers, no spills. Not yet measured on a GPU.
TILE = {"BLOCK": 1024, "num_warps": 4}


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """The equation as it stands, in float32 (float64 for float64)."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


@jit
def _forward(
    x_ptr,  # (N, 2M), rows x_stride apart, columns one apart: gate, then up
    y_ptr,  # (N, M) contiguous, written
    x_stride,
    M,
    BLOCK: tl.constexpr,
):
    """Program (i, j) takes row i, columns j * BLOCK ... of both halves, as far as they go."""
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)  # N * M may pass 2^31
    gate = tl.load(x_ptr + row * x_stride + cols, cols < M, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + M + cols, cols < M, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * M + cols, gate * tl.sigmoid(gate) * up, cols < M)


@jit
def _backward(
    dy_ptr,  # (N, M) contiguous
    x_ptr,  # (N, 2M), rows x_stride apart, columns one apart
    dx_ptr,  # (N, 2M) contiguous, written: dgate, then dup
    x_stride,
    M,
    BLOCK: tl.constexpr,
):
    """Program (i, j) as in _forward."""
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    dy = tl.load(dy_ptr + row * M + cols, cols < M, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + row * x_stride + cols, cols < M, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + M + cols, cols < M, other=0.0).to(tl.float32)
    sig = tl.sigmoid(gate)
    tl.store(dx_ptr + row * 2 * M + cols, dy * up * sig * (1 + gate * (1 - sig)), cols < M)
    tl.store(dx_ptr + row * 2 * M + M + cols, dy * gate * sig, cols < M)


INTERPRETED = triton is not None and not isinstance(_forward, triton.JITFunction)


@torch.library.custom_op("kernels::swiglu", mutates_args=())
def _swiglu(x: Tensor) -> Tensor:
    N, M = x.shape[0], x.shape[1] // 2
    y = x.new_empty((N, M))
    if y.numel():
        with torch.cuda.device_of(x):
            _forward[N, triton.cdiv(M, TILE["BLOCK"])](x, y, x.stride(0), M, **TILE)
    return y


@torch.library.custom_op("kernels::swiglu_backward", mutates_args=())
def _swiglu_backward(dy: Tensor, x: Tensor) -> Tensor:
    N, M = dy.shape
    dx = x.new_empty((N, 2 * M))
    if dy.numel():
        dy = dy.contiguous()  # the gradient of a sum has stride 0
        with torch.cuda.device_of(x):
            _backward[N, triton.cdiv(M, TILE["BLOCK"])](dy, x, dx, x.stride(0), M, **TILE)
    return dx


_swiglu.register_fake(lambda x: x.new_empty((x.shape[0], x.shape[1] // 2)))
_swiglu_backward.register_fake(lambda dy, x: x.new_empty(x.shape))
# Saved is the packed input alone, which is not overwritten: it may be needed a second time.
_swiglu.register_autograd(
    lambda ctx, dy: _swiglu_backward(dy, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def _check_triton(x: Tensor) -> None:
    if triton is None:
        raise ImportError("implementation='triton' needs Triton: pip install triton")
    if not (x.is_cuda or INTERPRETED):
        wanted = "a GPU, or a CPU with TRITON_INTERPRET=1 set before Python starts"
        raise ValueError(f"gate_up.device={x.device} must be {wanted}")
    if x.dtype not in DTYPES:
        raise ValueError(f"gate_up.dtype={x.dtype} must be one of {DTYPES}")
    if x.stride(-1) != 1:
        raise ValueError(f"gate_up.stride(-1)={x.stride(-1)} must be 1; call .contiguous() first")


def swiglu(gate_up: Tensor, *, implementation: str = "auto") -> Tensor:
    """silu(gate) * up.

    Args:
        gate_up (..., 2M): gate in the first M columns, up in the others.
        implementation: "auto" takes the kernels for float32, bfloat16 and float16 on a GPU where
            Triton is installed, else the reference. The kernels want a last axis of stride 1, and
            copy only if the other axes cannot be seen as one.
    Returns: (..., M) of the same type.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} must be one of {IMPLEMENTATIONS}")
    width = gate_up.shape[-1] if gate_up.ndim else 0
    if width == 0 or width % 2:
        wanted = "(..., 2M): an even number of columns, at least 2"
        raise ValueError(f"gate_up.shape={tuple(gate_up.shape)} must be {wanted}")
    able = triton is not None and gate_up.is_cuda and gate_up.dtype in DTYPES
    if implementation == "reference" or (implementation == "auto" and not able):
        return swiglu_reference(gate_up)
    _check_triton(gate_up)
    y = torch.ops.kernels.swiglu(gate_up.reshape(-1, width))
    return y.view(*gate_up.shape[:-1], width // 2)


def benchmark() -> None:
    """Errors against float64; on a GPU also ms and GB/s of both passes, from a cold cache."""
    torch.manual_seed(0)
    gpu = torch.cuda.is_available()
    on_gpu = {"dtype": torch.bfloat16, "device": "cuda"}
    N, M, kind = (65_536, 1536, on_gpu) if gpu else (7, 1100, {})
    x = torch.randn((N, 2 * M), **kind).requires_grad_()
    dy = torch.randn((N, M), **kind)

    def run(f, x):
        y = f(x)
        return y, torch.autograd.grad(y, x, dy.to(y))[0]

    exact = run(swiglu_reference, x.detach().double().requires_grad_())
    ours = run(partial(swiglu, implementation="triton"), x)
    y, dx = ((a - b).abs().max().item() for a, b in zip(ours, exact))
    place = f"on {torch.cuda.get_device_name()}" if gpu else "in the interpreter (no GPU to time)"
    print(f"{N} rows of 2 * {M}, {x.dtype}, {place}")
    print(f"errors against float64: y {y:.1e}, d(gate, up) {dx:.1e}")
    if not gpu:
        assert max(y, dx) < 2e-5, "this is not SwiGLU"
        return
    for name, f in (
        ("eager", swiglu_reference),
        ("compiled", torch.compile(swiglu_reference)),
        ("triton", swiglu),
    ):
        ms = triton.testing.do_bench(partial(run, f, x))
        print(f"{name:9}{ms:8.3f} ms {8e-6 * dy.nbytes / ms:6.0f} GB/s")  # 3 passes and 5


if __name__ == "__main__":
    benchmark()
