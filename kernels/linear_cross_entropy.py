"""The last layer and its loss in one: cross-entropy of hidden @ weight.T, whose logits go at once.

With hidden h (N, C), the head w (V, C), logits x = h w^T (N, V) and the loss of x (cross_entropy.py
has its formulas: softcap, label smoothing, z-loss), the gradients are two more products:

    dh = (dloss/dx) w        (N, C)
    dw = (dloss/dx)^T h      (V, C)

The logits are the largest tensor of a small model's training, and nobody wants them: only the loss,
dh and dw. So x is computed for a chunk of tokens at a time, the kernel replaces it by dloss/dx in
the same memory (one read, one write), both products take it from there, and the next chunk
overwrites it. dw adds up in float32: in bfloat16 a sum of many chunks would lose the small ones.
Backward has only to multiply dh and dw by the incoming gradient, which it does on the device; if it
is never called, nothing is owed. Without gradients (torch.no_grad) there are logits and loss only.

Peak memory beside the inputs, for n tokens a chunk and 2-byte types:

    2 n V                    one chunk of logits, which is also one chunk of their gradient
    2 N C + 2 n C + 8 V C    dh and a chunk of it; dw in float32 and the product added to it

against 4 N V and more for F.cross_entropy(h @ w.T, y): logits and their gradient, both whole.

FLOPs: 6 N C V for the three products, as without fusion; bytes: 4 N V for the kernel. N = 65,536,
C = 512, V = 4096: 825 GFLOP are 1044 us at an H200's 790 TFLOP/s, 1.07 GB are 250 us at its 4.3
TB/s. The bound is the matrix rate. Chunks cost little while each fills the GPU; recomputing logits
in backward, so as never to write them, would cost a fourth product, 348 us, to save the 250.

Letters used below: N tokens (all leading axes in one), n those of a chunk, C = d_model, V classes.

Sources: chunks, and the gradient in the forward pass: Liger-Kernel, Hsu et al. 2024 (arXiv
2410.10989); no logits in memory at all: Cut Your Losses, Wijmans et al. 2024 (2411.09009), which
pays where V is far larger than C.

Run: `python kernels/linear_cross_entropy.py` times it on a GPU (not yet measured); without one it
checks it in Triton's interpreter (7 s on 2 cores of an AMD EPYC (Zen 3)) and prints

    96 tokens, 64 x 4096, float32 on cpu, against float64: error of loss, dh, dw
      chunks of 96:  1.50 MiB of logits    2e-08    4e-07    4e-07
      chunks of 32:  0.50 MiB of logits    2e-08    4e-07    4e-07
      chunks of 25:  0.39 MiB of logits    2e-08    4e-07    4e-07
    checked: loss and both gradients to 2e-6, whatever the chunk
    no GPU: nothing to time
"""

from __future__ import annotations

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


DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Most logits that a chunk holds unless told otherwise: 512 MiB in bfloat16, 65,536 tokens at
# V = 4096. The products of a chunk should be large enough to fill the GPU. Not yet measured on one.
CHUNK_LOGITS = 2**28

# From here to `row_configuration` the text is that of cross_entropy.py (a test compares them), so
# that either file can be copied alone.
# Widest row -> (logits in a tile, warps). All hold 32 logits in each thread, four 16-byte loads of
# bfloat16. Wider rows take LONG_ROW tile by tile. From ahead-of-time compilation (kernels/aot.py):
# 92 to 128 registers, 194 to 254 in tiles, no spills. Not yet measured on a GPU.
ROWS = {4096: (4096, 4), 8192: (8192, 8), 16384: (16384, 16)}
LONG_ROW = (8192, 8)


def cross_entropy_reference(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
) -> Tensor:
    """Loss of each token by the formulas above, for autograd: (N, V), (N,) -> (N,)."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    counted = targets != ignore_index
    y = targets.where(counted, 0)  # an index that can be looked up
    lse = x.logsumexp(-1)  # (N,)
    losses = (1 - label_smoothing) * (lse - x.gather(-1, y.unsqueeze(-1)).squeeze(-1))
    losses = losses + z_loss * lse.square()
    if label_smoothing:
        losses = losses + label_smoothing * (lse - x.mean(-1))
    return losses.masked_fill(~counted, 0)


@jit
def _load_logits(row_ptr, columns, V, SOFTCAP: tl.constexpr):
    """Capped logits of a row, float32; -inf, whose exponential is 0, in the columns past V."""
    x = tl.load(row_ptr + columns, mask=columns < V, other=-float("inf")).to(tl.float32)
    if SOFTCAP > 0:
        # tanh(u) = 2 sigmoid(2 u) - 1; Triton's own tanh has neither interpreter nor AMD form
        x = SOFTCAP * (2 * tl.sigmoid(x * (2 / SOFTCAP)) - 1)
        x = tl.where(columns < V, x, -float("inf"))
    return x


@jit
def _store_gradient(
    row_ptr, x, columns, y, V, m, p_factor, factor,
    SMOOTHING: tl.constexpr, SHARE: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """factor * dloss/dx into a row of the gradient; p_factor * exp(x - m) is its part with p."""
    slope = tl.exp(x - m) * p_factor - tl.where(columns == y, (1 - SMOOTHING) * factor, 0.0)
    if SMOOTHING > 0:
        slope -= SHARE * factor
    if SOFTCAP > 0:
        slope *= 1 - (x / SOFTCAP) * (x / SOFTCAP)
    tl.store(row_ptr + columns, slope.to(row_ptr.dtype.element_ty), mask=columns < V)


@jit
def _cross_entropy(
    logits_ptr,  # (N, V) float32, bfloat16 or float16; rows logits_stride apart, each contiguous
    targets_ptr,  # (N,) int64
    scale_ptr,  # () float32: the factor of all losses and gradients
    losses_ptr,  # (N,) float32, written
    gradient_ptr,  # (N, V), written, rows gradient_stride apart; may be the logits themselves
    logits_stride, gradient_stride, V, ignore_index,
    SMOOTHING: tl.constexpr,  # e
    SHARE: tl.constexpr,  # e / V
    Z_LOSS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    TILES: tl.constexpr,  # BLOCK * TILES >= V
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one row. Columns past V are masked; all arithmetic is float32."""
    n = tl.program_id(0).to(tl.int64)  # int64: N V passes 2^31 at 524,288 rows of 4096
    logits_ptr += n * logits_stride
    gradient_ptr += n * gradient_stride
    columns = tl.arange(0, BLOCK)
    y = tl.load(targets_ptr + n)
    if y == ignore_index:  # the row is not even read
        tl.store(losses_ptr + n, 0.0)
        if WITH_GRADIENT:
            zeros = tl.zeros((BLOCK,), gradient_ptr.dtype.element_ty)
            for tile in range(TILES):
                c = tile * BLOCK + columns
                tl.store(gradient_ptr + c, zeros, mask=c < V)
        return

    first = _load_logits(logits_ptr, columns, V, SOFTCAP)
    m0 = tl.maximum(tl.max(first, 0), -3.0e38)  # finite, so that a tile of -inf gives 0, not nan
    m = m0
    total = tl.sum(tl.exp(first - m), 0)
    x_y = tl.sum(tl.where(columns == y, first, 0.0), 0)  # without another load
    below = tl.sum(tl.where(columns < V, m0 - first, 0.0), 0)  # sum_j (m0 - x_j)
    for tile in range(1, TILES):
        c = tile * BLOCK + columns
        x = _load_logits(logits_ptr, c, V, SOFTCAP)
        larger = tl.maximum(m, tl.max(x, 0))
        total = total * tl.exp(m - larger) + tl.sum(tl.exp(x - larger), 0)
        m = larger
        x_y += tl.sum(tl.where(c == y, x, 0.0), 0)
        below += tl.sum(tl.where(c < V, m0 - x, 0.0), 0)

    # lse - x_j as ln total + (m - x_j), so that logits of 10,000 cost no digits
    lse = m + tl.log(total)
    loss = tl.log(total) + (1 - SMOOTHING) * (m - x_y) + Z_LOSS * lse * lse
    if SMOOTHING > 0:
        loss += SMOOTHING * (m - m0) + SHARE * below
    # a class out of range cannot raise without stopping the GPU: its loss is nan
    loss = tl.where((y >= 0) & (y < V), loss, float("nan"))
    factor = tl.load(scale_ptr)
    tl.store(losses_ptr + n, factor * loss)
    if WITH_GRADIENT:
        p_factor = (1 + 2 * Z_LOSS * lse) / total * factor
        _store_gradient(
            gradient_ptr, first, columns, y, V, m, p_factor, factor, SMOOTHING, SHARE, SOFTCAP
        )
        for tile in range(1, TILES):
            c = tile * BLOCK + columns
            x = _load_logits(logits_ptr, c, V, SOFTCAP)
            _store_gradient(
                gradient_ptr, x, c, y, V, m, p_factor, factor, SMOOTHING, SHARE, SOFTCAP
            )


def row_configuration(V: int) -> tuple[int, int, int]:
    """Logits in a tile, tiles in a row, warps."""
    for widest, (block, warps) in ROWS.items():
        if V <= widest:
            return min(block, triton.next_power_of_2(V)), 1, warps
    block, warps = LONG_ROW
    return block, triton.cdiv(V, block), warps


def product_dtype(x: Tensor) -> torch.dtype:
    """The type in which a matrix product of x runs: autocast's where that is on, else its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def product_in_float32(a: Tensor, b: Tensor) -> Tensor:
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()  # on a CPU rounded to their type, once for each chunk


def loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    chunk_tokens: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    hidden_gradient: bool,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the losses (), dh (N, C) and dw (V, C) float32 or empty if not wanted, times scale.

    hidden (N, C) and weight (V, C) are multiplied in dtype; scale () float32 is on the device.
    """
    N, V = len(hidden), len(weight)
    h, w = hidden.to(dtype), weight.to(dtype)
    d_hidden = torch.empty_like(hidden if hidden_gradient else hidden[:0])
    d_weight = torch.zeros_like(weight if weight_gradient else weight[:0], dtype=torch.float32)
    losses = hidden.new_empty(N, dtype=torch.float32)
    buffer = h.new_empty(min(N, chunk_tokens), V)
    block, tiles, warps = row_configuration(V)
    for first in range(0, N, chunk_tokens):
        part = slice(first, min(first + chunk_tokens, N))
        x = buffer[: part.stop - first]
        torch.mm(h[part], w.T, out=x)  # (n, V) logits
        with torch.cuda.device_of(x):
            _cross_entropy[(len(x),)](
                x, targets[part], scale, losses[part], x, V, V, V, ignore_index,
                label_smoothing, label_smoothing / V, z_loss, softcap,
                hidden_gradient or weight_gradient, tiles, block, num_warps=warps,
            )  # fmt: skip
        if hidden_gradient:
            d_hidden[part] = x @ w  # (n, C); x is now dloss/dx
        if weight_gradient:
            d_weight += product_in_float32(x.T, h[part])  # (V, C)
    return losses.sum(), d_hidden, d_weight


linear_cross_entropy_op = torch.library.custom_op(
    "kernels::linear_cross_entropy", loss_and_gradients, mutates_args=()
)


@linear_cross_entropy_op.register_fake
def _(hidden, weight, targets, scale, dtype, chunk_tokens, *options):
    *_, hidden_gradient, weight_gradient = options
    d_hidden = torch.empty_like(hidden if hidden_gradient else hidden[:0])
    d_weight = torch.empty_like(weight if weight_gradient else weight[:0], dtype=torch.float32)
    return hidden.new_empty((), dtype=torch.float32), d_hidden, d_weight


def save_gradients(ctx, inputs, output):
    _, d_hidden, d_weight = output
    ctx.mark_non_differentiable(d_hidden, d_weight)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(d_hidden, d_weight)
    ctx.wanted, ctx.weight_dtype = inputs[-2:], inputs[1].dtype


def backward(ctx, upstream, *_):
    # both are constants to autograd: a second derivative would silently lack its share
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "create_graph=True asks for a second derivative, and the Triton linear_cross_entropy "
            "has none; use implementation='reference'"
        )
    d_hidden, d_weight = ctx.saved_tensors
    hidden_gradient, weight_gradient = ctx.wanted
    d_hidden = (d_hidden * upstream).to(d_hidden.dtype) if hidden_gradient else None
    d_weight = (d_weight * upstream).to(ctx.weight_dtype) if weight_gradient else None
    return d_hidden, d_weight, *(None,) * 10


linear_cross_entropy_op.register_autograd(backward, setup_context=save_gradients)


def _require(good: bool, name: str, value, wanted: str) -> None:
    if not good:
        raise ValueError(f"{name}={value!r} must be {wanted}")


def _use_triton(implementation: str, x: Tensor) -> bool:
    """Whether the kernel runs; raises where it was asked for and cannot."""
    _require(
        implementation in ("auto", "reference", "triton"),
        "implementation", implementation, "'auto', 'reference' or 'triton'",
    )  # fmt: skip
    if implementation != "triton":
        able = triton is not None and x.is_cuda and x.dtype in DTYPES
        return implementation == "auto" and able
    if triton is None:
        raise ImportError("implementation='triton' needs Triton: pip install triton")
    interpreted = not isinstance(_cross_entropy, triton.JITFunction)
    wanted = "a GPU; for Triton's interpreter set TRITON_INTERPRET=1 before importing this file"
    _require(x.is_cuda or interpreted, "hidden.device", str(x.device), wanted)
    _require(x.dtype in DTYPES, "hidden.dtype", x.dtype, f"one of {DTYPES}")
    return True


def _check(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, options: dict
) -> None:
    fits = hidden.ndim > 0 and weight.ndim == 2 and hidden.shape[-1] == weight.shape[1]
    shapes = tuple(hidden.shape), tuple(weight.shape)
    _require(fits, "(hidden.shape, weight.shape)", shapes, "((..., C), (V, C)) with the same C")
    integer = not (targets.is_floating_point() or targets.is_complex())
    _require(integer, "targets.dtype", targets.dtype, "an integer type: targets are class indices")
    lead = tuple(hidden.shape[:-1])
    _require(targets.shape == lead, "targets.shape", tuple(targets.shape), f"{lead}, hidden's own")
    for name, x in (("weight", weight), ("targets", targets)):
        same = x.device == hidden.device
        _require(same, f"{name}.device", str(x.device), f"{hidden.device}, as hidden")
    smoothing, z_loss, softcap = options.values()
    _require(0 <= smoothing < 1, "label_smoothing", smoothing, "in [0, 1)")
    _require(z_loss >= 0, "z_loss", z_loss, ">= 0")
    _require(softcap >= 0, "softcap", softcap, ">= 0; 0 is none")
    # on a GPU the look at the values would wait for it
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        V = len(weight)
        wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= V))]
        wanted = f"a class in [0, {V - 1}] or ignore_index={ignore_index}"
        _require(len(wrong) == 0, "targets", wrong[:1].tolist(), wanted)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    chunk_tokens: int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
    implementation: str = "auto",
) -> Tensor:
    """`cross_entropy(hidden @ weight.T, targets)`, with no more logits in memory than one chunk's.

    Args:
        hidden (..., C) float; weight (V, C) float, the head without bias; any strides.
        targets (...) integer: classes in [0, V), or ignore_index. A class out of range raises on
            a CPU; in the kernel, which cannot raise without stopping the GPU, the loss is nan.
        chunk_tokens: tokens whose logits exist at once; None: as many as fit `CHUNK_LOGITS`. It
            changes the time and the memory, not the result. The reference holds all logits.
        ignore_index: a token with this target adds neither loss nor gradient, nor to the count.
        label_smoothing in [0, 1): e; z_loss >= 0: z; softcap >= 0: c, 0 for none.
        reduction: "mean" over the tokens that count (0 if none does) or "sum". Both gradients are
            finished before the loss is returned and can then be scaled by one number only, while
            "none" would need one for each token beforehand.
        implementation: "auto" is "triton" for float32, bfloat16 and float16 on a GPU where Triton
            is installed, and "reference" otherwise.
    Returns: () float32 (float64 for float64, which the reference alone takes). Gradients come in
        their tensor's type. Under torch.autocast the products run in its type.
    No second derivative with "triton". Raises: ValueError for shapes, types and values outside
    these.
    """
    options = {"label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": softcap}
    _check(hidden, weight, targets, ignore_index, options)
    wanted = "'mean' or 'sum' here; for 'none' call cross_entropy(hidden @ weight.T, targets, ...)"
    _require(reduction in ("mean", "sum"), "reduction", reduction, wanted)
    V, C = weight.shape
    if chunk_tokens is None:
        chunk_tokens = max(1, CHUNK_LOGITS // V)
    _require(chunk_tokens >= 1, "chunk_tokens", chunk_tokens, ">= 1")
    kernel = _use_triton(implementation, hidden)
    y = targets.reshape(-1).long()  # (N,)
    h = hidden.reshape(len(y), C)
    count = (y != ignore_index).sum().clamp(min=1)  # () on the device
    if not kernel:
        losses = cross_entropy_reference(h @ weight.to(h.dtype).T, y, ignore_index, **options)
        return losses.sum() / count if reduction == "mean" else losses.sum()
    one = torch.ones((), device=h.device)
    scale = one / count if reduction == "mean" else one
    dtype = product_dtype(h)
    # p / N is 0 in float16, whose smallest number is 6e-8: there backward divides, in float32
    half = dtype == torch.float16
    enabled = torch.is_grad_enabled()
    loss, _, _ = linear_cross_entropy_op(
        h, weight, y, one if half else scale, dtype, chunk_tokens, ignore_index,
        *options.values(), enabled and h.requires_grad, enabled and weight.requires_grad,
    )  # fmt: skip
    return loss * scale if half else loss


def aot_cases() -> list[dict]:
    """What to compile without a GPU: the kernel in place; cross_entropy.py has the other sizes."""
    V = 4096
    block, tiles, warps = row_configuration(V)
    signature = {"logits_ptr": "*bf16", "targets_ptr": "*i64", "scale_ptr": "*fp32"}
    signature |= {"losses_ptr": "*fp32", "gradient_ptr": "*bf16", "logits_stride": "i32"}
    signature |= {"gradient_stride": "i32", "V": "i32", "ignore_index": "i32"}
    constexprs = {"SMOOTHING": 0.0, "SHARE": 0.0, "Z_LOSS": 1e-4, "SOFTCAP": 30.0}
    constexprs |= {"WITH_GRADIENT": True, "TILES": tiles, "BLOCK": block}
    return [
        {
            "name": f"linear_cross_entropy V {V}, z-loss, softcap",
            "kernel": _cross_entropy,
            "signature": signature | dict.fromkeys(constexprs, "constexpr"),
            "constexprs": constexprs,
            "divisible": [name for name in signature if name != "ignore_index"],
            "options": {"num_warps": warps, "num_stages": 3},
            "expect": {"vector16"},
        }
    ]


def benchmark() -> None:
    """Forward and backward: ms, the rate of the three products, and the peak of memory."""

    def plain(hidden, weight, targets):
        return F.cross_entropy(hidden @ weight.T, targets)

    def chunks_of(chunk_tokens):
        return lambda *inputs: linear_cross_entropy(*inputs, chunk_tokens=chunk_tokens)

    print(f"{torch.cuda.get_device_name()}; warm cache, median")
    compiled = torch.compile(plain)
    for N, C, V in ((65536, 512, 4096), (131072, 512, 4096), (4096, 2048, 50304)):
        h = torch.randn(N, C, device="cuda", dtype=torch.bfloat16).requires_grad_()
        w = (torch.randn(V, C, device="cuda") / C**0.5).bfloat16().requires_grad_()
        y = torch.randint(V, (N,), device="cuda")
        for name, function in (
            ("torch", plain),
            ("torch.compile", compiled),
            ("triton", linear_cross_entropy),
            ("triton, 8 chunks", chunks_of(N // 8)),
        ):

            def step(function=function, h=h, w=w, y=y):
                return torch.autograd.grad(function(h, w, y), (h, w))

            ms = triton.testing.do_bench(step, return_mode="median")
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step()
            peak = (torch.cuda.max_memory_allocated() - before) / 2**20
            rate = 6 * N * C * V / ms / 1e9
            print(f"{N:7} x {V:6} {name:17}{ms:8.3f} ms {rate:5.0f} TFLOP/s {peak:6.0f} MiB")


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    N, C, V = 96, 64, 4096
    h = torch.randn(N, C, device=device).requires_grad_()
    w = (3 * torch.randn(V, C, device=device) / C**0.5).requires_grad_()
    y = torch.randint(V, (N,), device=device)
    y[::3] = -100
    options = {"label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 30.0}
    wide = [x.detach().double().requires_grad_() for x in (h, w)]
    exact = linear_cross_entropy(*wide, y, implementation="reference", **options)
    wanted = [exact, *torch.autograd.grad(exact, wide)]
    print(f"{N} tokens, {C} x {V}, float32 on {device}, against float64: error of loss, dh, dw")
    worst = 0.0
    for chunk_tokens in (96, 32, 25):
        loss = linear_cross_entropy(
            h, w, y, chunk_tokens=chunk_tokens, implementation="triton", **options
        )
        found = [loss, *torch.autograd.grad(loss, (h, w))]
        errors = [((a - b).norm() / b.norm()).item() for a, b in zip(found, wanted)]
        size = chunk_tokens * V * 4 / 2**20
        figures = "".join(f"{error:9.0e}" for error in errors)
        print(f"  chunks of {chunk_tokens:2}: {size:5.2f} MiB of logits{figures}")
        worst = max(worst, *errors)
    if not worst < 2e-6:
        raise SystemExit(f"FAILED: error {worst:.1e}, wanted below 2e-6")
    print("checked: loss and both gradients to 2e-6, whatever the chunk")
    if device == "cuda":
        benchmark()
    else:
        print("no GPU: nothing to time")


if __name__ == "__main__":
    main()
