"""The last layer and its loss in one: cross-entropy of hidden @ weight.T, whose logits go at once.

With hidden h (N, C), the head w (V, C), logits x = h w^T (N, V) and the loss of x by the kernel of
cross_entropy.py (which has its formulas: softcap, label smoothing, z-loss, and has to lie beside
this file), the gradients are two more products:

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
checks it in Triton's interpreter (6 s on 2 cores of an AMD EPYC (Zen 3)) and prints

    24 tokens, 64 x 4096, float32 on cpu, against float64: error of loss, dh, dw
      chunks of 24:  0.38 MiB of logits    7e-08    5e-07    5e-07
      chunks of  8:  0.12 MiB of logits    7e-08    5e-07    4e-07
      chunks of  7:  0.11 MiB of logits    7e-08    6e-07    5e-07
    checked: loss and both gradients to 2e-6, whatever the chunk
    no GPU: nothing to time
"""

from __future__ import annotations

import importlib
import os
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated
# the file beside this one: of the same package, or of the folder that this one is run in
ce = importlib.import_module(f"{__package__}.cross_entropy" if __package__ else "cross_entropy")
triton = ce.triton  # None without Triton: the reference works without it

# Most logits that a chunk holds unless told otherwise: 512 MiB in bfloat16, 65,536 tokens at
# V = 4096. The products of a chunk should be large enough to fill the GPU. Not yet measured on one.
CHUNK_LOGITS = 2**28
REDUCTIONS = ("mean", "sum")


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
    options = ignore_index, label_smoothing, z_loss, softcap, hidden_gradient or weight_gradient
    for first in range(0, N, chunk_tokens):
        part = slice(first, min(first + chunk_tokens, N))
        x = buffer[: part.stop - first]
        torch.mm(h[part], w.T, out=x)  # (n, V) logits
        ce.run_kernel(x, targets[part], scale, losses[part], x, *options)
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
    if hidden.ndim == 0 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        shapes = tuple(hidden.shape), tuple(weight.shape)
        wanted = "((..., C), (V, C)) with the same C"
        raise ValueError(f"(hidden.shape, weight.shape)={shapes} must be {wanted}")
    if weight.device != hidden.device:
        raise ValueError(f"weight.device='{weight.device}' must be {hidden.device}, as hidden")
    if reduction not in REDUCTIONS:
        wanted = "'mean' or 'sum'; for 'none' call cross_entropy(hidden @ weight.T, targets, ...)"
        raise ValueError(f"reduction={reduction!r} must be {wanted}")
    V, C = weight.shape
    if chunk_tokens is None:
        chunk_tokens = max(1, CHUNK_LOGITS // V)
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} must be >= 1")
    options = ignore_index, label_smoothing, z_loss, softcap
    ce.check("hidden", hidden, targets, V, options)
    kernel = ce.use_triton(implementation, "hidden", hidden)
    y = targets.reshape(-1).long()  # (N,)
    h = hidden.reshape(len(y), C)
    count = (y != ignore_index).sum().clamp(min=1)  # () on the device
    if not kernel:
        losses = ce.cross_entropy_reference(h @ weight.to(h.dtype).T, y, *options)
        return losses.sum() / count if reduction == "mean" else losses.sum()
    one = torch.ones((), device=h.device)
    scale = one / count if reduction == "mean" else one
    dtype = product_dtype(h)
    # p / N is 0 in float16, whose smallest number is 6e-8: there backward divides, in float32
    half = dtype == torch.float16
    enabled = torch.is_grad_enabled()
    loss, _, _ = linear_cross_entropy_op(
        h, weight, y, one if half else scale, dtype, chunk_tokens, *options,
        enabled and h.requires_grad, enabled and weight.requires_grad,
    )  # fmt: skip
    return loss * scale if half else loss


def benchmark() -> None:
    """Forward and backward: ms, the rate of the three products, and the peak of memory."""
    print(f"{torch.cuda.get_device_name()}; cold cache")

    def plain(hidden, weight, targets):
        return F.cross_entropy(hidden @ weight.T, targets)

    def step(function, h, w, y):
        return torch.autograd.grad(function(h, w, y), (h, w))

    for N, C, V in ((65536, 512, 4096), (4096, 2048, 50304)):
        h = torch.randn(N, C, device="cuda", dtype=torch.bfloat16).requires_grad_()
        w = (torch.randn(V, C, device="cuda") / C**0.5).bfloat16().requires_grad_()
        y = torch.randint(V, (N,), device="cuda")
        for name, function in (
            ("torch", plain),
            ("compiled", torch.compile(plain, dynamic=False)),
            ("triton", linear_cross_entropy),
            ("triton, 8 chunks", partial(linear_cross_entropy, chunk_tokens=N // 8)),
        ):
            ms = triton.testing.do_bench(partial(step, function, h, w, y))
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step(function, h, w, y)
            peak = (torch.cuda.max_memory_allocated() - before) / 2**20
            rate = 6e-9 * N * C * V / ms
            print(f"{N:7} x {V:6} {name:17}{ms:8.3f} ms {rate:5.0f} TFLOP/s {peak:6.0f} MiB")


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    N, C, V = 24, 64, 4096
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
    for chunk_tokens in (24, 8, 7):
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
