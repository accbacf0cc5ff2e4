"""AdamW's step for a whole list of tensors in one launch, and the global norm of their gradients.

For every number p with gradient g and moments m, v, at step t = 1, 2, ...:

    g = k g,  k = min(1, max_norm / (norm + 1e-6))    clipping, if a norm is given
    m = beta1 m + (1 - beta1) g
    v = beta2 v + (1 - beta2) g g
    p = p - lr weight_decay p - (lr c2 / c1) m / (sqrt(v) + eps c2)
        with c1 = 1 - beta1^t and c2 = sqrt(1 - beta2^t)

Bytes: p, m, v read and written, g read, all float32: 28 per parameter, for about 16 FLOPs. Memory
is the bound: 27M parameters are 756 MB, 176 us at the 4.3 TB/s that a copy reaches on an H200. As
seven operations on whole tensors, the form of 04_adamw.py, it is 72 bytes, since m, v, p and a
temporary are read and written again and again. Clipping in place would read and write g once more,
8 bytes: here the factor is applied to g on its way. The norm reads g: 4 bytes, 25 us.

One launch serves tensors of any number and size through a table in GPU memory, a row for every
CHUNK numbers: their addresses in p, g, m, v, how many they are, and the tensor's weight decay. A
flat buffer for all parameters would need no table, but the model, its gradients and every
checkpoint would have to be laid out for it. The table is made and copied to the
GPU when addresses are new; gradients that keep their memory, by zero_grad(set_to_none=False), need
that once.

lr, step and norm may be tensors on the GPU. A captured CUDA graph then takes new values at each
replay; nothing here waits for the GPU. What is derived from them is computed once, in float64, by
a launch of a single program: in float32, 1 - 0.999^t at t = 1 has only four digits left.

Sources: Loshchilov & Hutter 2017 (arXiv 1711.05101) in the form of PyTorch; the factor k and its
1e-6: torch.nn.utils.clip_grad_norm_.

Run: `python kernels/adamw.py` times it on a GPU; without one it checks the kernels in Triton's
interpreter and prints, from seed 0,

    8209 parameters in 4 tensors, float32, in the interpreter (no GPU to time)
    after 5 clipped steps 7.7e-07 from torch.optim.AdamW in float64, norm 1.0e-08
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Sequence
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
# Numbers a program handles: 8 for each of 256 threads, two loads of 16 bytes from each tensor.
# Compiled for sm_90: 58 registers with Triton 3.9, 48 with 3.6, no spills. Not yet measured on a
# GPU.
TILE = {"CHUNK": 2048, "num_warps": 8}
TABLES = 16  # kept, for when the same addresses come again: 0.6 MB each for 27M parameters


def adamw_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    lr: float | Tensor,
    step: int | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: Sequence[float],
    norm: Tensor | None,
    max_norm: float,
) -> None:
    """The equations as they stand, one tensor after the other; all but grads are changed."""
    beta1, beta2 = betas
    k = 1.0 if norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0)
    c1, c2 = 1 - beta1**step, (1 - beta2**step) ** 0.5
    for p, g, m, v, decay in zip(params, grads, exp_avgs, exp_avg_sqs, weight_decay):
        g = k * g
        m.lerp_(g, 1 - beta1)
        v.lerp_(g * g, 1 - beta2)
        p.copy_(p - lr * decay * p - (lr * c2 / c1) * m / (v.sqrt() + eps * c2))


def grad_norm_reference(grads: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all numbers of all gradients together: () float32."""
    return torch.stack([g.float().square().sum() for g in grads]).sum().sqrt()


@jit
def _scalars(
    lr_ptr,  # () any float
    step_ptr,  # () any float or integer
    norm_ptr,  # () any float, or None: no clipping
    out_ptr,  # (4,) float32, written: k, lr, lr c2 / c1, eps c2
    log2_beta1,  # float32 will do: what it is off by, relatively, is what 1 - beta^t is off by
    log2_beta2,
    eps,
    max_norm,
):
    """A single program."""
    k = 1.0
    if norm_ptr is not None:
        k = max_norm / (tl.load(norm_ptr).to(tl.float32) + 1e-6)
        k = tl.where(k > 1.0, 1.0, k)  # unlike a minimum it lets a nan through, as torch does
    lr, step = tl.load(lr_ptr).to(tl.float64), tl.load(step_ptr).to(tl.float64)
    c1 = 1 - tl.exp2(step * log2_beta1)
    c2 = tl.sqrt(1 - tl.exp2(step * log2_beta2))
    tl.store(out_ptr, k)
    tl.store(out_ptr + 1, lr)
    tl.store(out_ptr + 2, lr * c2 / c1)
    tl.store(out_ptr + 3, eps * c2)


@jit
def _update(
    p_ptr, g_ptr, m_ptr, v_ptr, count, decay, scalars_ptr, b1, a1, b2, a2, CHUNK: tl.constexpr
):  # fmt: skip
    """The step for `count` numbers of one tensor; the rest of CHUNK is not touched."""
    k, lr = tl.load(scalars_ptr), tl.load(scalars_ptr + 1)
    size, small = tl.load(scalars_ptr + 2), tl.load(scalars_ptr + 3)
    i = tl.arange(0, CHUNK)
    p = tl.load(p_ptr + i, i < count, other=0.0)
    g = tl.load(g_ptr + i, i < count, other=0.0) * k
    m = tl.load(m_ptr + i, i < count, other=0.0)
    v = tl.load(v_ptr + i, i < count, other=0.0)
    m = b1 * m + a1 * g
    v = b2 * v + a2 * g * g
    p -= lr * decay * p + size * m / (tl.sqrt(v) + small)
    tl.store(p_ptr + i, p, i < count)
    tl.store(m_ptr + i, m, i < count)
    tl.store(v_ptr + i, v, i < count)


@jit
def _adamw(
    table_ptr,  # (chunks, 6) int64: addresses of p, g, m, v; count; bits of the float32 decay
    scalars_ptr,  # (4,) float32 from _scalars
    b1,  # beta1
    a1,  # 1 - beta1, which float32 would not get right to more than four digits
    b2,
    a2,
    CHUNK: tl.constexpr,
):
    """Program i takes chunk i, 16 bytes at a time if it is whole and its addresses allow.

    The compiler knows nothing of numbers that come out of memory: it has to be told of both.
    """
    row = table_ptr + tl.program_id(0) * 6
    p, g, m, v = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    count = tl.load(row + 4)
    decay = tl.load(row + 5).to(tl.int32).to(tl.float32, bitcast=True)
    aligned = (p | g | m | v) % 16 == 0
    kind = tl.pointer_type(tl.float32)
    p, g, m, v = p.to(kind), g.to(kind), m.to(kind), v.to(kind)
    if (count == CHUNK) & aligned:
        p, g = tl.multiple_of(p, 16), tl.multiple_of(g, 16)
        m, v = tl.multiple_of(m, 16), tl.multiple_of(v, 16)
        _update(p, g, m, v, CHUNK, decay, scalars_ptr, b1, a1, b2, a2, CHUNK)
    else:
        _update(p, g, m, v, count, decay, scalars_ptr, b1, a1, b2, a2, CHUNK)


@jit
def _square_sum(
    table_ptr,  # (chunks, 3) int64: address of g; count; unused
    sum_ptr,  # (chunks,) float32, written
    CHUNK: tl.constexpr,
):
    """Program i sums chunk i: no atomics, so equal gradients have equal norms to the last bit."""
    row = table_ptr + tl.program_id(0) * 3
    g, count = tl.load(row), tl.load(row + 1)
    i = tl.arange(0, CHUNK)
    if (count == CHUNK) & (g % 16 == 0):
        x = tl.load(tl.multiple_of(g.to(tl.pointer_type(tl.float32)), 16) + i)
    else:
        x = tl.load(g.to(tl.pointer_type(tl.float32)) + i, i < count, other=0.0)
    tl.store(sum_ptr + tl.program_id(0), tl.sum(x * x, 0))


INTERPRETED = triton is not None and not isinstance(_adamw, triton.JITFunction)
_tables: OrderedDict[tuple, Tensor] = OrderedDict()  # the last TABLES, by what they were made of
_captured: list[Tensor] = []  # tables that a CUDA graph reads at every replay: never freed


def _table(lists: Sequence[Sequence[Tensor]], decay: Sequence[float]) -> Tensor:
    """A row (address in each of the lists, count, bits of the decay) for each chunk: int64."""
    first, CHUNK = lists[0], TILE["CHUNK"]
    device = first[0].device
    addresses = [tuple(x.data_ptr() for x in tensors) for tensors in lists]
    sizes = tuple(x.numel() for x in first)
    key = (device, sizes, tuple(decay), *addresses)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if key not in _tables:
        if capturing:
            raise RuntimeError(
                "these tensors must have been used once before a CUDA graph is captured; run a "
                "step first and keep the gradients' memory: zero_grad(set_to_none=False)"
            )
        count = torch.tensor(sizes)
        chunks = (count + CHUNK - 1) // CHUNK  # (tensors,)
        owner = torch.repeat_interleave(chunks)  # (chunks,) the tensor that each is part of
        offset = (torch.arange(len(owner)) - (chunks.cumsum(0) - chunks)[owner]) * CHUNK
        table = torch.empty((len(owner), len(lists) + 2), dtype=torch.int64)
        table[:, :-2] = torch.tensor(addresses).T[owner] + 4 * offset[:, None]
        table[:, -2] = (count[owner] - offset).clamp(max=CHUNK)
        table[:, -1] = torch.tensor(decay, dtype=torch.float32).view(torch.int32)[owner]
        if device.type == "cuda":  # from pinned memory, else the copy would wait for the GPU
            table = table.pin_memory().to(device, non_blocking=True)
        _tables[key] = table
        while len(_tables) > TABLES:
            _tables.popitem(last=False)
    _tables.move_to_end(key)
    if capturing:
        _captured.append(_tables[key])
    return _tables[key]


@torch.library.custom_op(
    "kernels::adamw",
    mutates_args=("params", "exp_avgs", "exp_avg_sqs"),
    schema="(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
    " Tensor lr, Tensor step, float beta1, float beta2, float eps, float[] weight_decay,"
    " Tensor? norm, float max_norm) -> ()",
)
def _adamw_op(
    params, grads, exp_avgs, exp_avg_sqs, lr, step, beta1, beta2, eps, weight_decay, norm, max_norm
):
    table = _table((params, grads, exp_avgs, exp_avg_sqs), weight_decay)
    scalars = torch.empty(4, dtype=torch.float32, device=table.device)
    rates = beta1, 1 - beta1, beta2, 1 - beta2
    log2 = [math.log2(beta) if beta else -math.inf for beta in (beta1, beta2)]
    if len(table):
        with torch.cuda.device_of(table):
            _scalars[(1,)](lr, step, norm, scalars, *log2, eps, max_norm, num_warps=1)
            _adamw[(len(table),)](table, scalars, *rates, **TILE)


@torch.library.custom_op("kernels::grad_norm", mutates_args=())
def _grad_norm_op(grads: list[Tensor]) -> Tensor:
    table = _table((grads,), [0.0] * len(grads))
    sums = torch.empty(len(table), dtype=torch.float32, device=table.device)
    if len(table):
        with torch.cuda.device_of(table):
            _square_sum[(len(table),)](table, sums, **TILE)
    return sums.sum(dtype=torch.float64).sqrt().float()


_grad_norm_op.register_fake(lambda grads: grads[0].new_empty((), dtype=torch.float32))


def _use_triton(implementation: str, lists: dict[str, Sequence[Tensor]]) -> bool:
    """Whether to take the kernels; with "triton", ValueError if they cannot serve these lists."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} must be one of {IMPLEMENTATIONS}")
    first = next(iter(lists.values()))[0]
    if implementation == "auto":
        able = triton is not None and first.is_cuda
        return able and all(
            x.dtype == torch.float32 and x.device == first.device and x.is_contiguous()
            for tensors in lists.values()
            for x in tensors
        )
    if implementation == "reference":
        return False
    if triton is None:
        raise ImportError("implementation='triton' needs Triton: pip install triton")
    if not (first.is_cuda or INTERPRETED):
        wanted = "a GPU, or a CPU with TRITON_INTERPRET=1 set before Python starts"
        raise ValueError(f"{next(iter(lists))}[0].device={first.device} must be {wanted}")
    for name, tensors in lists.items():
        for i, x in enumerate(tensors):
            if x.device != first.device:
                wanted = f"{first.device}, as the first"
                raise ValueError(f"{name}[{i}].device={x.device} must be {wanted}")
            if x.dtype != torch.float32:
                raise ValueError(f"{name}[{i}].dtype={x.dtype} must be torch.float32")
            if not x.is_contiguous():
                wanted = "contiguous; take implementation='reference' for it"
                raise ValueError(f"{name}[{i}].stride()={x.stride()} must be {wanted}")
    return True


@torch.no_grad()
def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    lr: float | Tensor,
    step: int | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | Sequence[float] = 1e-2,
    norm: Tensor | None = None,
    max_norm: float | None = None,
    implementation: str = "auto",
) -> None:
    """One step of AdamW for all tensors of the lists; params, exp_avgs, exp_avg_sqs change.

    Args:
        The four lists run parallel: parameter, gradient and both moments of one shape.
        lr, step: numbers, or tensors () on the GPU; step counts from 1 and includes this one.
        weight_decay: one for all, or one for each tensor.
        norm, max_norm: the gradients' global norm, a tensor () as from `grad_norm`, and what it
            may be at most: more scales all gradients down to it. Both, or neither.
        implementation: "auto" takes the kernels for contiguous float32 tensors on one GPU where
            Triton is installed, else the reference.
    """
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    one = isinstance(weight_decay, float | int)
    decays = [weight_decay] * len(params) if one else list(weight_decay)
    for name, values in (*lists.items(), ("weight_decay", decays)):
        if len(values) != len(params):
            raise ValueError(f"len({name})={len(values)} must be {len(params)}, as params")
    for name, tensors in lists.items():
        for i, (x, p) in enumerate(zip(tensors, params)):
            if x.shape != p.shape:
                wanted = f"{tuple(p.shape)}, as params[{i}]"
                raise ValueError(f"{name}[{i}].shape={tuple(x.shape)} must be {wanted}")
    if (norm is None) != (max_norm is None):
        raise ValueError(f"max_norm={max_norm} must be given exactly with norm")
    if not params:
        return
    max_norm = 0.0 if max_norm is None else max_norm
    if not _use_triton(implementation, lists):
        adamw_reference(*lists.values(), lr, step, betas, eps, decays, norm, max_norm)
        return
    device = params[0].device
    lr, step = (  # a fill passes the number to the GPU without waiting for it
        x if isinstance(x, Tensor) else torch.full((), x, dtype=torch.float64, device=device)
        for x in (lr, step)
    )
    for name, x in (("lr", lr), ("step", step), ("norm", norm)):
        if x is not None and x.device != device:
            raise ValueError(f"{name}.device={x.device} must be {device}, as params")
        if x is not None and x.numel() != 1:
            raise ValueError(f"{name}.shape={tuple(x.shape)} must be ()")
    lists = [list(tensors) for tensors in lists.values()]
    torch.ops.kernels.adamw(*lists, lr, step, *betas, eps, decays, norm, max_norm)


@torch.no_grad()
def grad_norm(grads: Sequence[Tensor], *, implementation: str = "auto") -> Tensor:
    """The Euclidean norm over all the gradients: () float32 on their device, 0 for no gradient.

    implementation: as in `adamw_step`. Nothing waits for the GPU; nan and inf come out as such.
    """
    if not grads:
        return torch.zeros(())
    if _use_triton(implementation, {"grads": grads}):
        return torch.ops.kernels.grad_norm(list(grads))
    return grad_norm_reference(grads)


def benchmark() -> None:
    """Errors against torch in float64; on a GPU also ms and GB/s, from a cold cache."""
    torch.manual_seed(0)
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    # 03_gpt.py's matrices and gains: 27M parameters; without a GPU a few odd sizes
    layer = [(1024, 512), (512, 512), (3072, 512), (512, 1536), (512,), (512,), (128,), (128,)]
    shapes = [(4096, 512), *8 * layer, (512,)] if gpu else [(33, 97), (5000,), (1,), (7, 1)]
    params = [torch.randn(shape, device=device) for shape in shapes]
    grads = [torch.randn_like(p) for p in params]
    theirs = [p.detach().double().requires_grad_() for p in params]
    for p, g in zip(theirs, grads):
        p.grad = g.double()
    exact_norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    optimizer = torch.optim.AdamW(theirs, lr=1e-2)
    state = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    for t in range(1, 6):
        norm = grad_norm(grads, implementation="triton")
        options = {"norm": norm, "max_norm": 1.0, "implementation": "triton"}
        adamw_step(params, grads, *state, lr=1e-2, step=t, **options)
        optimizer.step()
    error = max((a - b).abs().max().item() for a, b in zip(params, theirs))
    place = f"on {torch.cuda.get_device_name()}" if gpu else "in the interpreter (no GPU to time)"
    n = sum(p.numel() for p in params)
    print(f"{n} parameters in {len(params)} tensors, float32, {place}")
    print(f"after 5 clipped steps {error:.1e} from torch.optim.AdamW in float64,", end=" ")
    print(f"norm {abs(norm / exact_norm - 1).item():.1e}")
    assert error < 5e-6 and abs(norm / exact_norm - 1) < 1e-6, "this is not AdamW"
    if not gpu:
        return
    lr, step = torch.tensor(1e-3, device=device), torch.tensor(1.0, device=device)
    for p, g in zip(params, grads):
        p.grad = g
    for name, size, f in (
        ("norm, torch", 4, partial(torch.nn.utils.get_total_norm, grads)),
        ("norm, triton", 4, partial(grad_norm, grads)),
        ("step, torch fused", 28, torch.optim.AdamW(params, lr=1e-3, fused=True).step),
        ("step, triton", 28, partial(adamw_step, params, grads, *state, lr=lr, step=step)),
    ):
        ms = triton.testing.do_bench(f)
        print(f"{name:18}{ms:8.3f} ms {1e-6 * size * n / ms:6.0f} GB/s")


if __name__ == "__main__":
    benchmark()
