"""Cross-entropy with its gradient in one pass over the logits, as one Triton kernel.

With logits x (V numbers a token), right class y, and the softcap c first, if there is one:

    x <- c tanh(x / c)                        slope dx = 1 - (x / c)^2, x being the capped logit
    lse  = m + ln sum_j exp(x_j - m)          m = max x: no exp can overflow
    loss = (1 - e) (lse - x_y) + e/V sum_j (lse - x_j) + z lse^2          e: label smoothing
    dloss/dx_j = (1 + 2 z lse) p_j - (1 - e) [j = y] - e/V                p_j = exp(x_j - lse)

The gradient needs nothing but x, m and the sum, so the program that has just computed the loss of a
row still holds all of it in registers: it writes the gradient there and then, divided by the number
of counted tokens, and autograd's backward finds it finished.

Bytes, for N tokens of bfloat16 logits: read 2 N V, write 2 N V, and 12 N beside that. At N = 65,536
and V = 4096 that is 1.07 GB, 250 us at an H200's 4.3 TB/s; ten operations an element are nothing.
The bound is memory. Written as separate operations, the maximum, the exponentials, their sum, the
loss and the gradient each read the logits or a float32 copy of them again.

What the gradient is multiplied by in backward (1 for `loss.backward()`, 1/4 with four accumulated
batches, the loss scale in float16) is known on the GPU only. A second kernel reads it there: if it
is 1 it leaves at once, otherwise it multiplies the gradient where it stands, one more read and
write. (A traced backward, of torch.compile, multiplies into a new tensor.) Nothing waits for the
host: the number of counted tokens is a tensor as well.

Rows of up to 16,384 logits stay in registers. A longer one is taken in tiles with a running maximum
and sum: the first tile stays, the others are read a second time, while they are in the cache
(128,256 logits are 251 KiB). 32,768 in registers would compile too, but spill 8 to 256 bytes.

Letters used below: N tokens (all leading axes in one), V classes (the vocabulary).

Sources: the running maximum: Milakov & Gimelshein 2018 (arXiv 1805.02867); gradient in the forward
pass: Liger-Kernel, Hsu et al. 2024 (2410.10989); z-loss: PaLM, Chowdhery et al. 2022 (2204.02311);
softcap: Gemma 2 (2408.00118, section 2; c = 30 for the logits).

Run: `python kernels/cross_entropy.py` times it on a GPU (not yet measured); without one it checks
the kernel in Triton's interpreter (6 s on 2 cores of an AMD EPYC (Zen 3)) and prints

    float32 on cpu, against float64:         error of loss   of gradient
      9 x 4096, plain                                    3e-08         5e-08
      9 x 4096, label_smoothing, z_loss, softcap         1e-07         3e-07
      3 x 50304, plain                                   6e-08         2e-08
      3 x 50304, label_smoothing, z_loss, softcap        7e-08         2e-07
    checked: loss and gradient to 2e-6
    no GPU: nothing to time
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
REDUCTIONS = ("mean", "sum", "none")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Widest row -> (logits in a tile, warps). All hold 32 logits in each thread, four 16-byte loads of
# bfloat16. Wider rows take LONG_ROW tile by tile. From ahead-of-time compilation (kernels/aot.py):
# 92 to 128 registers, 194 to 254 in tiles, no spills. Not yet measured on a GPU.
ROWS = {4096: (4096, 4), 8192: (8192, 8), 16384: (16384, 16)}
LONG_ROW = (8192, 8)
SCALE_TILE = {"BLOCK": 4096, "num_warps": 4}


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


@jit
def _scale_rows(
    x_ptr,  # (N, V) float32, bfloat16 or float16, contiguous, multiplied in place
    factors_ptr,  # (N,) float32, factors_stride apart: 0 where all rows share one
    factors_stride, V,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one row, BLOCK columns at a time; those past V are masked."""
    n = tl.program_id(0).to(tl.int64)
    factor = tl.load(factors_ptr + n * factors_stride)
    if factor == 1:
        return
    x_ptr += n * V
    for start in range(0, V, BLOCK):
        c = start + tl.arange(0, BLOCK)
        value = tl.load(x_ptr + c, mask=c < V, other=0.0).to(tl.float32) * factor
        tl.store(x_ptr + c, value.to(x_ptr.dtype.element_ty), mask=c < V)


def row_tiles(V: int) -> dict:
    """TILES, BLOCK and num_warps for rows of V logits."""
    for widest, (block, warps) in ROWS.items():
        if V <= widest:
            block = min(block, triton.next_power_of_2(V))
            return {"TILES": 1, "BLOCK": block, "num_warps": warps}
    block, warps = LONG_ROW
    return {"TILES": triton.cdiv(V, block), "BLOCK": block, "num_warps": warps}


def run_kernel(
    logits: Tensor, targets: Tensor, scale: Tensor, losses: Tensor, gradient: Tensor, *options
) -> None:
    """Writes losses (N,) and gradient (N, V), both times scale ().

    The gradient may be the logits themselves; options are those of `cross_entropy_op`.
    """
    ignore_index, e, z_loss, softcap, with_gradient = options
    N, V = logits.shape
    with torch.cuda.device_of(logits):
        _cross_entropy[(N,)](
            logits, targets, scale, losses, gradient, logits.stride(0), V, V, ignore_index,
            e, e / V, z_loss, softcap, with_gradient, **row_tiles(V),
        )  # fmt: skip


def _outputs(logits: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """Losses (N,) float32 and their gradient (N, V), or (0, V) if not wanted."""
    N, V = logits.shape
    losses = logits.new_empty(N, dtype=torch.float32)
    return losses, logits.new_empty(N if with_gradient else 0, V)


@torch.library.custom_op(
    "kernels::cross_entropy",
    mutates_args=(),
    schema="(Tensor logits, Tensor targets, Tensor scale, int ignore_index, float label_smoothing,"
    " float z_loss, float softcap, bool with_gradient) -> (Tensor, Tensor)",
)
def cross_entropy_op(logits, targets, scale, *options):
    losses, gradient = _outputs(logits, options[-1])
    run_kernel(logits, targets, scale, losses, gradient, *options)
    return losses, gradient


cross_entropy_op.register_fake(lambda logits, *options: _outputs(logits, options[-1]))


@torch.library.custom_op("kernels::scale_rows_", mutates_args=("x",))
def scale_rows_(x: Tensor, factors: Tensor) -> None:
    """Row n of x (N, V) times factors[n], in place."""
    N, V = x.shape
    with torch.cuda.device_of(x):
        _scale_rows[(N,)](x, factors, factors.stride(0), V, **SCALE_TILE)


def save_gradient(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros (N, V) for the gradient's own gradient
    ctx.save_for_backward(output[1])


def backward(ctx, upstream, _):
    # the gradient is a constant to autograd: a second derivative would silently lack its share
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "create_graph=True asks for a second derivative, and the Triton cross_entropy has "
            "none; use implementation='reference'"
        )
    (gradient,) = ctx.saved_tensors
    if type(gradient) is Tensor:
        scale_rows_(gradient, upstream)
    else:  # torch.compile traces a stand-in, and a graph's backward may run again: a new tensor
        gradient = (gradient * upstream.unsqueeze(-1)).to(gradient.dtype)
    return gradient, *(None,) * 7


cross_entropy_op.register_autograd(backward, setup_context=save_gradient)


def use_triton(implementation: str, name: str, x: Tensor) -> bool:
    """Whether the kernel runs on x, called `name`; raises where it was asked for and cannot."""
    if implementation not in IMPLEMENTATIONS:
        wanted = "'auto', 'reference' or 'triton'"
        raise ValueError(f"implementation={implementation!r} must be {wanted}")
    if implementation != "triton":
        able = triton is not None and x.is_cuda and x.dtype in DTYPES
        return implementation == "auto" and able
    if triton is None:
        raise ImportError("implementation='triton' needs Triton: pip install triton")
    if not x.is_cuda and isinstance(_cross_entropy, triton.JITFunction):
        wanted = "a GPU; for Triton's interpreter set TRITON_INTERPRET=1 before importing this file"
        raise ValueError(f"{name}.device={str(x.device)!r} must be {wanted}")
    if x.dtype not in DTYPES:
        raise ValueError(f"{name}.dtype={x.dtype} must be one of {DTYPES}")
    return True


def check(name: str, x: Tensor, targets: Tensor, V: int, options: tuple) -> None:
    """ValueError for targets in V classes that do not fit x, called `name`, and for options."""
    ignore_index, label_smoothing, z_loss, softcap = options
    if targets.is_floating_point() or targets.is_complex():
        wanted = "an integer type: targets are class indices"
        raise ValueError(f"targets.dtype={targets.dtype} must be {wanted}")
    lead = tuple(x.shape[:-1])
    if targets.shape != lead:
        raise ValueError(f"targets.shape={tuple(targets.shape)} must be {lead}, as {name}")
    if targets.device != x.device:
        raise ValueError(f"targets.device='{targets.device}' must be {x.device}, as {name}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing} must be in [0, 1)")
    if not z_loss >= 0:
        raise ValueError(f"z_loss={z_loss} must be >= 0")
    if not softcap >= 0:
        raise ValueError(f"softcap={softcap} must be >= 0; 0 is none")
    # on a GPU the look at the values would wait for it
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= V))]
        if len(wrong):
            wanted = f"a class in [0, {V - 1}] or ignore_index={ignore_index}"
            raise ValueError(f"targets={wrong[:1].tolist()} must be {wanted}")


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    weight: None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
    implementation: str = "auto",
) -> Tensor:
    """-ln softmax(logits) at the targets, in nats: torch's arguments, plus z_loss and softcap.

    Args:
        logits (..., V) float, the class axis last; not changed. Rows may lie apart (a slice of a
            padded vocabulary), but each is contiguous.
        targets (...) integer: classes in [0, V), or ignore_index. A class out of range raises on
            a CPU; in the kernel, which cannot raise without stopping the GPU, its loss is nan.
        weight: None. Class weights are refused: no language model uses them.
        ignore_index: a token with this target adds neither loss nor gradient, nor to the count.
        label_smoothing in [0, 1): e; z_loss >= 0: z; softcap >= 0: c, 0 for none; see above.
        reduction: "mean" over the tokens that count (0 if none does), "sum", or "none".
        implementation: "auto" is "triton" for float32, bfloat16 and float16 on a GPU where Triton
            is installed, and "reference" otherwise.
    Returns: () or, for "none", (...); float32 (float64 for float64, which the reference alone
        takes). The gradient has the type of the logits.
    With "triton", backward runs once (a second one, after retain_graph=True, raises RuntimeError)
    and has no second derivative. Raises: ValueError for shapes, types and values outside these.
    """
    V = logits.shape[-1] if logits.ndim else 0
    if V == 0:
        shape = tuple(logits.shape)
        raise ValueError(f"logits.shape={shape} must be (..., V) with at least one class")
    if weight is not None:
        wanted = "None: torch.nn.functional.cross_entropy has them"
        raise ValueError(f"weight={weight!r} must be {wanted}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} must be one of {REDUCTIONS}")
    options = ignore_index, label_smoothing, z_loss, softcap
    check("logits", logits, targets, V, options)
    kernel = use_triton(implementation, "logits", logits)
    if kernel and V > 1 and logits.stride(-1) != 1:
        stride = logits.stride(-1)
        raise ValueError(f"logits.stride(-1)={stride} must be 1; call .contiguous() first")
    y = targets.reshape(-1).long()  # (N,)
    x = logits.reshape(len(y), V)
    count = (y != ignore_index).sum().clamp(min=1)  # () on the device
    if not kernel:
        losses = cross_entropy_reference(x, y, *options)
        losses = losses / count if reduction == "mean" else losses
    else:
        one = torch.ones((), device=x.device)
        scale = one / count if reduction == "mean" else one
        # p / N is 0 in float16, whose smallest number is 6e-8: there backward divides, in float32
        half = x.dtype == torch.float16
        with_gradient = torch.is_grad_enabled() and x.requires_grad
        losses, _ = cross_entropy_op(x, y, one if half else scale, *options, with_gradient)
        losses = losses * scale if half else losses
    return losses.reshape(targets.shape) if reduction == "none" else losses.sum()


def benchmark() -> None:
    """Forward and backward in ms, and the GB/s of one read and one write of the logits."""
    print(f"{torch.cuda.get_device_name()}; cold cache")

    def step(function, logits, targets):
        return torch.autograd.grad(function(logits, targets), logits)

    for N, V in ((65536, 4096), (4096, 128256)):
        logits = torch.randn(N, V, device="cuda", dtype=torch.bfloat16).requires_grad_()
        targets = torch.randint(V, (N,), device="cuda")
        for name, function in (
            ("torch", F.cross_entropy),
            ("compiled", torch.compile(F.cross_entropy, dynamic=False)),
            ("triton", cross_entropy),
        ):
            ms = triton.testing.do_bench(partial(step, function, logits, targets))
            rate = 2e-6 * logits.nbytes / ms
            print(f"{N:7} x {V:6} {name:9}{ms:8.3f} ms {rate:6.0f} GB/s")


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"float32 on {device}, against float64:         error of loss   of gradient")
    worst = 0.0
    torch.manual_seed(0)
    for N, V, options in (
        (9, 4096, {}),
        (9, 4096, {"label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 30.0}),
        (3, 50304, {}),
        (3, 50304, {"label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 30.0}),
    ):
        logits = (3 * torch.randn(N, V, device=device)).requires_grad_()
        targets = torch.randint(V, (N,), device=device)
        targets[::3] = -100
        wide = logits.detach().double().requires_grad_()
        found = cross_entropy(logits, targets, implementation="triton", **options)
        wanted = cross_entropy(wide, targets, implementation="reference", **options)
        (g,), (wanted_g,) = torch.autograd.grad(found, logits), torch.autograd.grad(wanted, wide)
        loss = ((found - wanted) / wanted).abs().item()
        gradient = ((g - wanted_g).norm() / wanted_g.norm()).item()
        label = f"{N} x {V}, {', '.join(options) or 'plain'}"
        print(f"  {label:48}{loss:8.0e}{gradient:14.0e}")
        worst = max(worst, loss, gradient)
    if not worst < 2e-6:
        raise SystemExit(f"FAILED: error {worst:.1e}, wanted below 2e-6")
    print("checked: loss and gradient to 2e-6")
    if device == "cuda":
        benchmark()
    else:
        print("no GPU: nothing to time")


if __name__ == "__main__":
    main()
