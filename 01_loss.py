"""What a model is trained to minimise: cross-entropy and its family, values and gradients by hand.

The loss of a classifier, and a language model is one with V classes, is the surprise at the right
answer. With logits x (V numbers), right class y and p = softmax(x):

    cross-entropy     l = -ln p_y = lse(x) - x_y             lse(x) = ln sum_c exp(x_c)
                      dl/dx = p - onehot(y)                  what it believes minus what is true
    stable            lse(x) = m + ln sum_c exp(x_c - m)     m = max x: no exp can overflow
    any target q      l = sum_c q_c (lse - x_c)              q = onehot(y) is the line above
                      dl/dx = (sum_c q_c) p - q
    class weights and smoothing e
                      q_c = (1 - e) w_y [c = y] + e/V w_c
    z-loss            l + z w_y lse^2                        keeps lse near 0, where softmax is
                      dl/dx + 2 z w_y lse p                  exact in half precision
    binary            l = softplus(-x) if y = 1, softplus(x) if y = 0
                      dl/dx = sigmoid(x) - y
    focal             l = a_y (1 - p_y)^g (-ln p_y)          easy examples count less
    distillation      l = a T^2 KL(teacher_T || student_T) + (1 - a) l_y
                      p_T = softmax(x / T); T^2 undoes the 1/T^2 by which T shrinks the gradient

`linear_cross_entropy` is the last layer and its loss in one. Logits are the largest tensor of a
small model's training: 65,536 tokens x 4096 classes x 4 bytes = 1 GiB, and a loss that keeps them,
their softmax and their gradient takes three. Taken a chunk of tokens at a time they never exist as
a whole: l and dl/dx of a chunk come out of the same exponentials, dl/dx goes straight into the two
gradients that are wanted (hidden and weight), and the chunk's buffer serves the next one.

Letters used below: N tokens (all leading axes in one), V classes (the vocabulary), C = d_model.
All losses are in nats.

Sources: label smoothing: Szegedy et al. 2016 (arXiv 1512.00567, section 7); z-loss: PaLM,
Chowdhery et al. 2022 (2204.02311, section 5; z = 1e-4 there); focal loss: Lin et al. 2017
(1708.02002; g = 2, a = 0.25); distillation: Hinton et al. 2015 (1503.02531); linear cross-entropy
in chunks with the gradient in the forward pass: Liger-Kernel, Hsu et al. 2024 (2410.10989);
without logits in memory at all: Cut Your Losses, Wijmans et al. 2024 (2411.09009).

Run: `python 01_loss.py` (CPU, 4 s on 2 cores of an AMD EPYC (Zen 5)) prints

    logits 1000, 999     naive nan, stable 0.3133 nats
    equal logits         8.3178 nats = ln 4096, perplexity 4096.0
    cross_entropy, float64     loss   error to torch: loss     gradient
      plain                 11.2139                  2e-16        7e-18
      weight                11.3528                  2e-16        1e-17
      label_smoothing=0.1   11.2099                  2e-16        6e-17
      reduction='sum'     4586.4952                  2e-16        2e-15
    last layer and loss, float32              nats   largest tensor   error of gradients
      F.cross_entropy                       8.8476           32 MiB                0e+00
      chunk_tokens=512                      8.8476            8 MiB                2e-07
      chunk_tokens=128                      8.8476            2 MiB                2e-07
    checked: equals torch to 1e-12 in float64, chunks equal the whole to 1e-6 in float32
"""

from __future__ import annotations

import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

triton = None  # Triton kernels, for a GPU or Triton's interpreter, where kernels/ stands beside
if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET"):
    try:
        from kernels.cross_entropy import cross_entropy as fused_cross_entropy
        from kernels.linear_cross_entropy import linear_cross_entropy as fused_linear_cross_entropy
        from kernels.linear_cross_entropy import triton
    except ImportError:
        pass

IMPLEMENTATIONS = ("auto", "torch", "triton")

# Most logits that a chunk of `linear_cross_entropy` holds unless told otherwise: on a CPU 8 MiB of
# float32, 512 tokens at V = 4096: on 2 cores of an AMD EPYC (Zen 5) half of it takes 6% longer and
# twice 1 to 2% less; elsewhere 512 MiB, because a GPU needs large matrix products to be busy.
CHUNK_LOGITS_CPU = 2**21
CHUNK_LOGITS = 2**27


def require(good: bool, name: str, value, wanted: str) -> None:
    if not good:
        raise ValueError(f"{name}={value!r} must be {wanted}")


def require_shape(name: str, x: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    require(x.shape == shape, f"{name}.shape", tuple(x.shape), f"{tuple(shape)}, {meaning}")


def values_visible(x: Tensor) -> bool:
    """Whether looking at x's values is free: a GPU would have to stop and report them."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def use_triton(implementation: str, x: Tensor) -> bool:
    """Whether the kernels do the work on x: with "auto", where Triton is there and x on a GPU."""
    require(implementation in IMPLEMENTATIONS, "implementation", implementation,
            f"one of {IMPLEMENTATIONS}")  # fmt: skip
    if implementation == "triton" and triton is None:
        raise ImportError(
            "implementation='triton' needs a GPU (or TRITON_INTERPRET=1), the folder kernels/ "
            "beside this file, and Triton: pip install triton"
        )
    on_gpu = triton is not None and x.is_cuda and x.dtype != torch.float64
    return implementation == "triton" or (implementation == "auto" and on_gpu)


def check_classes(
    targets: Tensor,
    shape: tuple[int, ...],
    V: int,
    ignore_index: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> None:
    """Raises ValueError unless targets are class indices of this shape and the options in range.

    On a GPU a class out of range trips the device-side assertion of the lookup instead.
    """
    integer = not (targets.is_floating_point() or targets.is_complex())
    require(integer, "targets.dtype", targets.dtype, "an integer type: targets are class indices")
    require_shape("targets", targets, shape, "what comes before the last axis, the classes")
    require(0 <= label_smoothing < 1, "label_smoothing", label_smoothing, "in [0, 1)")
    require(z_loss >= 0, "z_loss", z_loss, ">= 0")
    if values_visible(targets):
        wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= V))]
        wanted = f"a class in [0, {V - 1}] or ignore_index={ignore_index}"
        require(len(wrong) == 0, "targets", wrong[:1].tolist(), wanted)


def reduce(losses: Tensor, reduction: str, total: Tensor | int) -> Tensor:
    """losses as they are, their sum, or their sum over total."""
    wanted = ("none", "mean", "sum")
    require(reduction in wanted, "reduction", reduction, f"one of {wanted}")
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / total


class HandGradient(torch.autograd.Function):
    """losses as they are, with slope = dlosses/dx as their derivative, for each pair x, slope.

    All that autograd is told in this file. A slope of more axes than the losses belongs to them
    row by row; a slope of None says that nobody asked for the gradient of x.
    """

    @staticmethod
    def forward(ctx, losses, *pairs):
        ctx.dtypes = [x.dtype for x in pairs[::2]]
        ctx.save_for_backward(*pairs[1::2])
        return losses.clone()

    @staticmethod
    def backward(ctx, upstream):
        # slope is a constant to autograd: a second derivative would silently lack its share
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "create_graph=True asks for a second derivative, and the losses written by hand "
                "have none; use torch.nn.functional's"
            )
        gradients = []
        for dtype, slope in zip(ctx.dtypes, ctx.saved_tensors):
            if slope is not None:
                axes = (1,) * (slope.ndim - upstream.ndim)
                slope = (slope * upstream.reshape(*upstream.shape, *axes)).to(dtype)
            gradients += [slope, None]
        return None, *gradients


def log_softmax(x: Tensor) -> Tensor:
    """ln softmax(x) along the last axis: (..., V) -> (..., V), in x's dtype.

    Subtracting the maximum changes nothing, since softmax(x + a) = softmax(x), but then the
    largest exponential is 1: none overflows, and their sum is at least 1. Half precision is
    computed in float32. A class with logit -inf gets -inf and takes no part.
    """
    z = x.to(torch.promote_types(x.dtype, torch.float32))
    z = z - z.amax(-1, keepdim=True).detach()  # a constant shift: no gradient flows through it
    return (z - z.exp().sum(-1, keepdim=True).log()).to(x.dtype)


def cross_entropy_reference(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean of -ln p(target), as the equation says it: (..., V) and (...) int64 -> ().

    All that follows is this, with options, in less memory and with its gradient by hand.
    """
    return -log_softmax(logits).gather(-1, targets.unsqueeze(-1)).mean()


def token_losses_(
    z: Tensor,
    targets: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    gradient: bool,
) -> Tensor:
    """Cross-entropy of each token: (N,). Overwrites its logits z (N, V) by dl/dz if gradient.

    Without gradient z is left in an unspecified state. One buffer passes through the whole
    derivation: logits, shifted logits, exponentials, gradient.
    """
    V = z.shape[-1]
    rows = torch.arange(len(z), device=z.device)
    valid = targets != ignore_index  # (N,)
    y = torch.where(valid, targets, 0)  # (N,) an index that can be looked up
    weight_y = valid.to(z.dtype)  # (N,) 0 where ignored
    if class_weight is not None:
        weight_y = weight_y * class_weight[y]

    m = z.amax(-1, keepdim=True)  # (N, 1)
    z.sub_(m)
    on_target = (1 - label_smoothing) * weight_y  # (N,) q at the target, without its e/V share
    q_sum, q_dot_z = on_target, on_target * z[rows, y]
    if label_smoothing:
        share = z.new_full((V,), label_smoothing / V)  # (V,) q of the other classes: e/V w_c
        if class_weight is not None:
            share = share * class_weight
        q_sum = q_sum + valid * share.sum()
        q_dot_z = q_dot_z + (z * share).masked_fill(share == 0, 0).sum(-1)  # 0 * -inf is 0 here
    z.exp_()
    total = z.sum(-1)  # (N,) in [1, V]
    log_total = total.log()
    lse = m.squeeze(-1) + log_total  # (N,)
    # sum_c q_c (lse - x_c), taken after the shift, where x of 10,000 costs no digits
    losses = q_sum * log_total - q_dot_z + z_loss * weight_y * lse.square()
    if gradient:
        # dl/dx = (sum q + 2 z w_y lse) p - q, with p = exp(z) / total
        z.mul_(((q_sum + 2 * z_loss * weight_y * lse) / total).unsqueeze(-1))
        z[rows, y] -= on_target
        if label_smoothing:
            z.sub_(valid.unsqueeze(-1) * share)
    return losses.masked_fill(~valid, 0)  # an ignored token's 0 * -inf is 0 too


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    implementation: str = "auto",
) -> Tensor:
    """-ln softmax(logits) at the targets, in nats: the arguments of torch's, plus z_loss.

    Args:
        logits (..., V) float: the class axis is the last one, so that a model's (B, T, V) goes in
            as it is. torch wants it second; for (N, V) that is the same.
        targets (...) integer: classes in [0, V), or ignore_index.
        weight (V,): what a token of each class counts.
        ignore_index: a token with this target adds neither loss nor gradient, nor to the mean's
            denominator.
        label_smoothing in [0, 1): e, the share of the target spread over all classes. With it a
            class of logit -inf makes the loss infinite, as in torch; the gradient stays finite.
        z_loss >= 0: z, adds z * lse^2 to each token's loss, which then counts with the token's
            class weight like the rest of it.
        reduction: "mean" divides the sum by the sum of the counted tokens' class weights.
        implementation: "torch" is this file; "triton" the kernel of kernels/cross_entropy.py, in
            which backward runs once only; "auto" is "triton" for logits on a GPU without class
            weights, where it is there.
    Returns: () or, for "none", (...); float32 for half-precision logits (torch rounds it to their
        type), which are computed in float32; their gradient comes in their own type.
    With no token to count the mean is 0 and its gradient 0. torch says nan there, which would
    turn every weight to nan in the one step that got a batch of padding only.
    No second derivative. Raises: ValueError for shapes, types and values outside these.
    """
    if use_triton(implementation, logits) and (weight is None or implementation == "triton"):
        options = {"label_smoothing": label_smoothing, "z_loss": z_loss, "reduction": reduction}
        options |= {"ignore_index": ignore_index, "implementation": "triton"}
        return fused_cross_entropy(logits, targets, weight=weight, **options)
    V = logits.shape[-1] if logits.ndim else 0
    require(V > 0, "logits.shape", tuple(logits.shape), "(..., V) with at least one class")
    check_classes(targets, logits.shape[:-1], V, ignore_index, label_smoothing, z_loss)
    wide = torch.promote_types(logits.dtype, torch.float32)
    if weight is not None:
        require_shape("weight", weight, (V,), "one for each class")
        weight = weight.detach().to(wide)
    y = targets.reshape(-1).long()  # (N,)
    x = logits.reshape(len(y), V)
    gradient = torch.is_grad_enabled() and x.requires_grad
    with torch.no_grad():
        z = x.to(wide, copy=True)  # the caller's logits stay as they are
        losses = token_losses_(z, y, weight, ignore_index, label_smoothing, z_loss, gradient)
        counted = y != ignore_index
        total = counted.sum() if weight is None else (weight[y.where(counted, 0)] * counted).sum()
        total = total.where(total != 0, 1)
    if gradient:
        losses = HandGradient.apply(losses, x, z)
    return reduce(losses.reshape(targets.shape), reduction, total)


def product_dtype(x: Tensor) -> torch.dtype:
    """The type in which a matrix product of x runs: autocast's where that is on, else its own."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:  # autocast spares float64
        return torch.get_autocast_dtype(device)
    return x.dtype


def chunked_sum(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int, options: tuple
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Sum of the losses of hidden (N, C) @ weight.T (C, V), and its gradients where required."""
    N, V = len(hidden), len(weight)
    narrow = product_dtype(hidden)  # of matrix products
    wide = torch.promote_types(narrow, torch.float32)  # of everything else
    enabled = torch.is_grad_enabled()
    d_hidden = torch.empty_like(hidden) if enabled and hidden.requires_grad else None
    d_weight = torch.zeros_like(weight, dtype=wide) if enabled and weight.requires_grad else None
    gradient = d_hidden is not None or d_weight is not None
    with torch.no_grad():
        h, w = hidden.to(narrow), weight.to(narrow)
        # bfloat16 on a CPU: the product with w in columns is 5x faster than with w in rows
        w_columns = w if narrow == wide or not gradient else w.T.contiguous().T
        buffer = h.new_empty((min(N, chunk_tokens), V), dtype=wide)
        narrow_buffer = buffer if narrow == wide else torch.empty_like(buffer, dtype=narrow)
        loss = buffer.new_zeros(())
        for first in range(0, N, chunk_tokens):
            part = slice(first, min(first + chunk_tokens, N))
            z, product = buffer[: part.stop - first], narrow_buffer[: part.stop - first]
            torch.mm(h[part], w.T, out=product)  # (n, V) logits
            if narrow != wide:
                z.copy_(product)
            loss += token_losses_(z, targets[part], None, *options, gradient).sum()
            if narrow != wide and gradient:
                product.copy_(z)  # (n, V) now dl/dlogits
            if d_hidden is not None:
                d_hidden[part] = product @ w_columns  # (n, C)
            if d_weight is not None and narrow == wide:
                d_weight.addmm_(product.T, h[part])  # (V, C)
            elif d_weight is not None:
                d_weight += product.T @ h[part]  # (V, C) the chunks add up in float32
    return loss, d_hidden, d_weight


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    chunk_tokens: int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    implementation: str = "auto",
) -> Tensor:
    """`cross_entropy(hidden @ weight.T, targets)`, with no more logits in memory than one chunk's.

    Args:
        hidden (..., C) float; weight (V, C) float, the head without bias; targets (...) integer.
        chunk_tokens: tokens whose logits exist at once; None: as many as fit `CHUNK_LOGITS`. It
            changes the time and the memory, not the result.
        The others: see `cross_entropy`. reduction is "mean" or "sum": the gradients of hidden and
            weight are finished before the loss is returned and can then be scaled by one number
            only, while "none" would need one for each token beforehand.
        implementation: as in `cross_entropy`, with kernels/linear_cross_entropy.py.
    Returns: () float32 (float64 for float64).
    Under torch.autocast the matrix products run in its type, the softmax in float32. The weight's
    gradient adds up in float32, and both gradients come in their tensor's type.
    No second derivative. Raises: ValueError for shapes, types and values outside these.
    """
    if use_triton(implementation, hidden):
        options = {"label_smoothing": label_smoothing, "z_loss": z_loss, "reduction": reduction}
        options |= {"ignore_index": ignore_index, "chunk_tokens": chunk_tokens}
        options |= {"implementation": "triton"}
        return fused_linear_cross_entropy(hidden, weight, targets, **options)
    require(
        hidden.ndim > 0 and weight.ndim == 2 and hidden.shape[-1] == weight.shape[1],
        "(hidden.shape, weight.shape)",
        (tuple(hidden.shape), tuple(weight.shape)),
        "((..., C), (V, C)) with the same C",
    )
    V, C = weight.shape
    check_classes(targets, hidden.shape[:-1], V, ignore_index, label_smoothing, z_loss)
    require(
        reduction in ("mean", "sum"),
        "reduction",
        reduction,
        "'mean' or 'sum' here; for 'none' call cross_entropy(hidden @ weight.T, targets, ...)",
    )
    if chunk_tokens is None:
        most = CHUNK_LOGITS_CPU if hidden.device.type == "cpu" else CHUNK_LOGITS
        chunk_tokens = max(1, most // V)
    require(chunk_tokens >= 1, "chunk_tokens", chunk_tokens, ">= 1")
    y = targets.reshape(-1).long()  # (N,)
    flat = hidden.reshape(len(y), C)
    options = (ignore_index, label_smoothing, z_loss)
    loss, d_hidden, d_weight = chunked_sum(flat, weight, y, chunk_tokens, options)
    if d_hidden is not None or d_weight is not None:
        loss = HandGradient.apply(loss, flat, d_hidden, weight, d_weight)
    return reduce(loss, reduction, (y != ignore_index).sum().clamp(min=1))


def softplus(x: Tensor) -> Tensor:
    """ln(1 + exp(x)) = -ln sigmoid(-x), by the exponential that cannot overflow."""
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


def binary_cross_entropy_with_logits(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None = None,
    *,
    pos_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """-y ln sigmoid(x) - (1 - y) ln sigmoid(-x) of each logit, in nats: torch's arguments.

    Args:
        logits, targets (...) float of one shape; targets in [0, 1], no gradient flows to them.
        weight: factor of each element's loss; pos_weight: factor of its y term alone. Both are
            broadcast to logits' shape. "mean" divides by the number of elements.
    Computed and returned in float32 for half precision. Raises: ValueError for other shapes.
    """
    require_shape("targets", targets, logits.shape, "the shape of logits")
    wide = torch.promote_types(logits.dtype, torch.float32)
    with torch.no_grad():
        x, y = logits.to(wide), targets.to(wide)
        a = y if pos_weight is None else y * pos_weight
        losses = (1 - y) * softplus(x) + a * softplus(-x)
        slope = (1 - y) * torch.sigmoid(x) - a * torch.sigmoid(-x)  # sigmoid(x) - y for a = y
    losses = HandGradient.apply(losses, logits, slope)
    if weight is not None:
        losses = losses * weight
    return reduce(losses, reduction, max(1, losses.numel()))


def focal_loss(
    logits: Tensor,
    targets: Tensor,
    gamma: float = 2.0,
    alpha: float | None = 0.25,
    *,
    reduction: str = "mean",
) -> Tensor:
    """Binary cross-entropy times (1 - p)^gamma, p being the probability given to the truth.

    What the model already knows (p near 1) hardly counts: at gamma = 2 and p = 0.9 a hundredth.
    gamma = 0 and alpha = None is `binary_cross_entropy_with_logits`.

    Args:
        logits, targets (...) of one shape; targets 0 or 1 (checked on a CPU only).
        gamma >= 0; alpha in [0, 1]: factor of the targets 1, while 1 - alpha is that of the
            targets 0; None: no factor. (torchvision.ops.sigmoid_focal_loss takes alpha before
            gamma, writes -1 for None and returns "none" by default.)
    """
    require_shape("targets", targets, logits.shape, "the shape of logits")
    require(gamma >= 0, "gamma", gamma, ">= 0")
    require(alpha is None or 0 <= alpha <= 1, "alpha", alpha, "None or in [0, 1]")
    if values_visible(targets):
        wrong = targets[(targets != 0) & (targets != 1)]
        require(len(wrong) == 0, "targets", wrong[:1].tolist(), "0 or 1")
    wide = torch.promote_types(logits.dtype, torch.float32)
    with torch.no_grad():
        y = targets.to(wide)
        s = 2 * y - 1  # so that p, the probability of the truth, is sigmoid(s x)
        a = 1.0 if alpha is None else alpha * y + (1 - alpha) * (1 - y)
        u = s * logits.to(wide)
        p, miss, log_p = torch.sigmoid(u), torch.sigmoid(-u), -softplus(-u)  # miss = 1 - p
        losses = -a * miss**gamma * log_p
        slope = s * a * miss**gamma * (gamma * p * log_p - miss)
    losses = HandGradient.apply(losses, logits, slope)
    return reduce(losses, reduction, max(1, losses.numel()))


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    temperature: float,
    alpha: float,
    *,
    ignore_index: int = -100,
) -> Tensor:
    """alpha T^2 KL(teacher_T || student_T) + (1 - alpha) cross-entropy, mean over counted tokens.

    Args:
        student, teacher (..., V) logits; only the student gets a gradient. targets (...) integer.
        temperature T > 0: both distributions of the KL are softmax(logits / T).
        alpha in [0, 1]: share of the teacher.
        ignore_index: a token with this target counts in neither term.
    """
    require_shape("teacher", teacher, student.shape, "the shape of student")
    require(temperature > 0, "temperature", temperature, "> 0")
    require(0 <= alpha <= 1, "alpha", alpha, "in [0, 1]")
    hard = cross_entropy(student, targets, ignore_index=ignore_index)
    wide = torch.promote_types(student.dtype, torch.float32)
    log_q = log_softmax(student.to(wide) / temperature)
    log_p = log_softmax(teacher.detach().to(wide) / temperature)
    p = log_p.exp()
    # dKL/dstudent = (q - p) / T; a class that the teacher rules out (p = 0) adds 0, not 0 * inf
    kl = (p * (log_p - log_q).masked_fill(p == 0, 0)).sum(-1)  # (...)
    counted = targets != ignore_index
    soft = kl.masked_fill(~counted, 0).sum() / counted.sum().clamp(min=1)
    return alpha * temperature**2 * soft + (1 - alpha) * hard


def perplexity(nats: float) -> float:
    """exp(mean loss): among how many equally likely tokens the model seems to be choosing."""
    return math.inf if nats >= 709 else math.exp(nats)  # exp(710) exceeds float64


def bits_per_byte(nats: float, tokens: float, bytes: float) -> float:
    """nats/token of `tokens` tokens that stand for `bytes` bytes of text, in bits/byte.

    A vocabulary of longer tokens has fewer and harder ones, so a loss per token says nothing
    across vocabularies; per byte of the same text it does.
    """
    require(tokens >= 0, "tokens", tokens, ">= 0")
    require(bytes > 0, "bytes", bytes, "> 0")
    return nats / math.log(2) * tokens / bytes


class LargestTensor(TorchDispatchMode):
    """Within it, `bytes` is the size of the largest tensor that any operation returned."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result


def demo() -> None:
    torch.manual_seed(0)
    x = torch.tensor([[1000.0, 999.0]])
    naive = -(x.exp() / x.exp().sum()).log()[0, 0]
    y = torch.tensor([0])
    print(f"logits 1000, 999     naive {naive:.4f}, stable {cross_entropy(x, y):.4f} nats")
    flat = cross_entropy(torch.zeros(1, 4096), y).item()
    print(f"equal logits         {flat:.4f} nats = ln 4096, perplexity {perplexity(flat):.1f}")

    N, V = 512, 1000
    logits = (3 * torch.randn(N, V, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(V, (N,))
    targets[::5] = -100
    print("cross_entropy, float64     loss   error to torch: loss     gradient")
    worst = 0.0
    for label, options in (
        ("plain", {}),
        ("weight", {"weight": torch.rand(V, dtype=torch.float64)}),
        ("label_smoothing=0.1", {"label_smoothing": 0.1}),
        ("reduction='sum'", {"reduction": "sum"}),
    ):
        ours = cross_entropy(logits, targets, **options)
        wanted = F.cross_entropy(logits, targets, **options)
        gradients = (torch.autograd.grad(loss, logits)[0] for loss in (ours, wanted))
        errors = (ours - wanted).abs().item() / wanted.item(), torch.dist(*gradients).item()
        print(f"  {label:20}{ours.item():9.4f}{errors[0]:23.0e}{errors[1]:13.0e}")
        worst = max(worst, *errors)

    N, C, V = 2048, 128, 4096
    hidden = torch.randn(N, C).requires_grad_()
    head = (torch.randn(V, C) / C**0.5).requires_grad_()
    targets = torch.randint(V, (N,))
    print("last layer and loss, float32              nats   largest tensor   error of gradients")
    for chunk_tokens in (None, 512, 128):
        with LargestTensor() as largest:
            if chunk_tokens is None:
                loss = F.cross_entropy(hidden @ head.T, targets)
            else:
                loss = linear_cross_entropy(hidden, head, targets, chunk_tokens=chunk_tokens)
            gradients = torch.autograd.grad(loss, (hidden, head))
        if chunk_tokens is None:
            wanted = gradients
        error = max(((a - b).norm() / b.norm()).item() for a, b in zip(gradients, wanted))
        label = "F.cross_entropy" if chunk_tokens is None else f"chunk_tokens={chunk_tokens}"
        print(f"  {label:36}{loss.item():8.4f}{largest.bytes / 2**20:13.0f} MiB{error:21.0e}")
        worst = max(worst, error * 1e-6)  # float32: 1e-6 there is like 1e-12 above

    if not worst < 1e-12:
        raise SystemExit(f"FAILED: error {worst:.1e}, wanted below 1e-12")
    print("checked: equals torch to 1e-12 in float64, chunks equal the whole to 1e-6 in float32")


if __name__ == "__main__":
    demo()
