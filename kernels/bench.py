"""All kernels of this folder: first whether they are right, then how fast they are, in one command.

Right: outputs and gradients for fresh random inputs against the same formula in plain PyTorch and
float64. The error of a tensor is max |ours - exact| / max |exact|; the worst tensor counts. Bounds:
2e-5 in float32; 2^-6 in bfloat16, which keeps 8 bits, so that a rounding is 2^-9 (2^-8 in Triton's
interpreter, which cuts off), and up to three of them follow each other. A kernel that fails, or
raises, is named and never timed.

Fast: bfloat16 at the shapes of the 27M model (65,536 and 131,072 tokens) and at larger ones, beside

    eager            plain PyTorch (F.cross_entropy, F.rms_norm, AdamW's foreach form, ...)
    torch.compile    the same, compiled for the very shape
    SDPA             flash, cudnn and efficient: scaled_dot_product_attention's fused back ends
    AdamW fused      what torch.optim.AdamW(fused=True) calls
    Liger            Liger-Kernel, where it is installed (its names and arguments are those of 0.8)

The clock is CUDA events. Before each measurement a GB of zeros is written four times: that empties
the L2 cache (cold, as after a model's other layers) and keeps the GPU busy for a millisecond, in
which the host gets ahead, so that launches are not counted. The programs take turns and the median
counts. "backward" has its forward outside the clock; "both" has it inside. Where our forward does
backward's work too, as in the losses, only "both" is comparable.

    rate     the bytes that a fused kernel has to move at least, or the FLOPs of the formula with
             half the scores if causal, over the time: equal for all programs of a row, whatever
             they move or compute; so, attention's backward counts 5 products, though ours does 7
    share    of the rate at which this GPU, in the same run, copies a GB (GB/s) or multiplies
             bfloat16 matrices of 8192 x 8192 (TFLOP/s)
    peak     most memory in use beside the inputs, forward included
    ratio    time of the best rival / ours: above 1 ours is faster

Letters used below: B batch rows, T positions, N = B T tokens, C = d_model, H query heads, G key and
value heads, D head_dim, M width of the MLP, V vocabulary.

Run: `python kernels/bench.py` on a GPU; it stops starting measurements after 7 minutes, and names
what it left out. `--quick` times only the first shapes, and less often; `--json FILE` writes all
figures there. Status 1 if a kernel is wrong; a missed target is a line. Not yet run on a GPU.
Without one (17 s on 2 cores of an AMD EPYC (Zen 3)) it checks the kernels in Triton's interpreter,
and printed once (the inputs are others each time)

    errors against float64, in Triton's interpreter
      attention             float32   B 2, T 33, H 4, G 2, D 32                    3e-07  ok
      attention             bfloat16  B 2, T 33, H 4, G 2, D 32                    5e-03  ok
      cross_entropy         float32   N 13, V 17001, ignored True                  7e-08  ok
      cross_entropy         bfloat16  N 13, V 17001, ignored True                  2e-03  ok
      linear_cross_entropy  float32   N 33, C 40, V 1000                           6e-07  ok
      linear_cross_entropy  bfloat16  N 33, C 40, V 1000                           5e-03  ok
      rmsnorm               float32   N 33, C 96                                   1e-07  ok
      rmsnorm               bfloat16  N 33, C 96                                   5e-03  ok
      swiglu                float32   N 33, M 1100                                 8e-08  ok
      swiglu                bfloat16  N 33, M 1100                                 4e-03  ok
      rope                  float32   B 2, T 33, H 3, G 1, D 10                    2e-07  ok
      rope                  bfloat16  B 2, T 33, H 3, G 1, D 10                    7e-03  ok
      grad_norm             float32   layers 1, C 34, M 50, V 99, H 1, G 1         4e-08  ok
      adamw                 float32   layers 1, C 34, M 50, V 99, H 1, G 1         7e-08  ok
    timings need a GPU, and there is none
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.metadata
import json
import math
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.adamw import adamw

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated
try:
    import triton
except ImportError:
    raise SystemExit("kernels/bench.py needs Triton: pip install triton") from None
try:
    import liger_kernel.ops.swiglu
    import liger_kernel.transformers.functional as liger

    LIGER = importlib.metadata.version("liger_kernel")
except Exception as error:  # it is not there, or does not go with this Triton
    liger = None
    missing = isinstance(error, ModuleNotFoundError)
    LIGER = "not installed" if missing else f"cannot be imported: {error}"


def load(name: str, file: str | None = None) -> Callable:
    """The function `name` of the file (of that name, if no other is given) beside this one."""
    file = file or name
    module = importlib.import_module(f"{__package__}.{file}" if __package__ else file)
    return partial(getattr(module, name), implementation="triton")


rope_qkv = load("rope_qkv", "rope")
adamw_step = load("adamw_step", "adamw")

BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 2**-6}
EPS = 1e-6
LR, BETA1, BETA2, DECAY = 0.1, 0.9, 0.95, 0.1  # so large that a wrong update shows
DEVICE = "cuda"
COMPILE = {"dynamic": False}
BUFFER = 2**30  # bytes that are copied, and that empty the cache
MATRIX = 8192  # the side of the matrices that are multiplied
ROUNDS, REPEATS = 10, 5  # turns of each program, and measurements in a turn
SECONDS = 420  # after which nothing new is measured

# For each kernel: its inputs, the formula in plain PyTorch, and the work of each pass.


def attention_inputs(dtype, device, B, T, H, G, D) -> list:
    kind = {"dtype": dtype, "device": device, "requires_grad": True}
    return [torch.randn(B, T, heads, D, **kind) for heads in (H, G, G)]


def attention_plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H or G, T, D)
    T, share = q.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.mT * q.shape[3] ** -0.5).masked_fill(future, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, backend: SDPBackend) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    gqa = q.shape[1] > k.shape[1]
    with sdpa_kernel(backend):
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    return o.transpose(1, 2)


def cross_entropy_inputs(dtype, device, N, V, ignored=False) -> list:
    # so wide that the gradient has large entries beside the targets'
    logits = (4 * torch.randn(N, V, device=device)).to(dtype).requires_grad_()
    targets = torch.randint(V, (N,), device=device)
    if ignored:
        targets[::7] = -100
    return [logits, targets]


def head_inputs(dtype, device, N, C, V) -> list:
    hidden = torch.randn(N, C, dtype=dtype, device=device, requires_grad=True)
    weight = (torch.randn(V, C, device=device) / C**0.5).to(dtype).requires_grad_()
    return [hidden, weight, torch.randint(V, (N,), device=device)]


def head_plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, targets)


def rmsnorm_inputs(dtype, device, N, C) -> list:
    kind = {"dtype": dtype, "device": device, "requires_grad": True}
    return [torch.randn(N, C, **kind), torch.randn(C, **kind), EPS, torch.randn(N, C, **kind)]


def rmsnorm_plain(x: Tensor, gain: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
    s = x + residual
    return F.rms_norm(s, gain.shape, gain, eps), s


def swiglu_inputs(dtype, device, N, M) -> list:
    return [torch.randn(N, 2 * M, dtype=dtype, device=device, requires_grad=True)]


def swiglu_plain(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu_liger(gate_up: Tensor) -> Tensor:
    return liger_kernel.ops.swiglu.LigerFusedGateUpSiLUMulFunction.apply(gate_up)


def rope_inputs(dtype, device, B, T, H, G, D) -> list:
    frequency = 10_000.0 ** (-torch.arange(0, D, 2, device=device) / D)
    angle = torch.arange(T, device=device)[:, None] * frequency  # (T, D/2) radians
    kind = {"dtype": dtype, "device": device, "requires_grad": True}
    gains = [torch.randn(D, **kind) for _ in range(2)]
    return [torch.randn(B, T, H + 2 * G, D, **kind), angle.cos(), angle.sin(), H, G, *gains]


def rope_triton(qkv, cos, sin, H, G, q_gain, k_gain) -> tuple[Tensor, Tensor, Tensor]:
    return rope_qkv(qkv, cos, sin, H, G, q_gain=q_gain, k_gain=k_gain, eps=EPS)


def rope_plain(qkv, cos, sin, H, G, q_gain, k_gain) -> tuple[Tensor, Tensor, Tensor]:
    def turned(x: Tensor, gain: Tensor) -> Tensor:
        a, b = F.rms_norm(x, gain.shape, gain, EPS).chunk(2, dim=-1)
        c, s = cos.unsqueeze(1), sin.unsqueeze(1)  # (T, 1, D/2)
        return torch.cat((a * c - b * s, b * c + a * s), dim=-1).to(x.dtype)

    q, k, v = qkv.split((H, G, G), dim=2)
    return turned(q, q_gain), turned(k, k_gain), v


def rope_liger(qkv, cos, sin, H, G, q_gain, k_gain) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.split((H, G, G), dim=2)
    q = liger.liger_rms_norm(q, q_gain, EPS, in_place=False).transpose(1, 2)
    k = liger.liger_rms_norm(k, k_gain, EPS, in_place=False).transpose(1, 2)
    q, k = liger.liger_rope(q, k, cos[None], sin[None], rotary_dim=q.shape[3])
    return q.transpose(1, 2), k.transpose(1, 2), v


def parameter_shapes(layers, C, M, V, H, G) -> list[tuple[int, ...]]:
    """Those of 03_gpt.py: matrices, and the gains of four norms in a layer and of the last one."""
    D = C // H
    matrices = [((H + 2 * G) * D, C), (C, H * D), (2 * M, C), (C, M)]
    return [(V, C), *layers * [*matrices, (C,), (C,), (D,), (D,)], (C,)]


def gradient_inputs(dtype, device, **shape) -> list:
    return [[torch.randn(s, dtype=dtype, device=device) for s in parameter_shapes(**shape)]]


def adamw_inputs(dtype, device, **shape) -> list:
    """Parameters, gradients, both moments, torch's steps before and our step after, our lr."""
    p, g, m, v = (gradient_inputs(dtype, device, **shape)[0] for _ in range(4))
    m, v = [0.1 * x for x in m], [0.1 + x.square() for x in v]
    steps = [torch.tensor(6.0, device=device) for _ in p]
    return [p, g, m, v, steps, steps[0] + 1, torch.tensor(LR, device=device)]


def adamw_triton(p, g, m, v, _, step, lr) -> list[Tensor]:
    adamw_step(p, g, m, v, lr=lr, step=step, betas=(BETA1, BETA2), eps=EPS, weight_decay=DECAY)
    return [*p, *m, *v]


def adamw_torch(p, g, m, v, steps, *_, **form) -> list[Tensor]:
    options = {"amsgrad": False, "maximize": False, "beta1": BETA1, "beta2": BETA2, "lr": LR}
    adamw(p, g, m, v, [], steps, **options, weight_decay=DECAY, eps=EPS, **form)
    return [*p, *m, *v]


def adamw_plain(p, *others) -> list[Tensor]:
    on_device = p[0].is_cuda or torch.compiler.is_compiling()  # steps in the compiled graph too
    return adamw_torch(p, *others, foreach=True, capturable=on_device)


def parameter_count(**shape) -> int:
    return sum(map(math.prod, parameter_shapes(**shape)))


@dataclass(frozen=True)
class Kernel:
    """A part of the table below. inputs(dtype, device, **shape) are what every program takes."""

    name: str
    inputs: Callable
    ours: Callable
    plain: Callable  # the formula
    rivals: dict[str, Callable]  # beside plain, and plain compiled
    unit: str
    work: Callable  # **shape -> {pass: bytes or FLOPs}
    small: dict  # the shape for the interpreter
    few: dict  # what makes a timed shape small enough to check in float64
    timed: tuple[dict, ...]
    quick: int = 1  # so many of them with --quick
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)  # checked; timed is the last


def heads(B, T, H, G, D) -> dict:
    return {"B": B, "T": T, "H": H, "G": G, "D": D}


MODEL = {"layers": 8, "C": 512, "M": 1536, "V": 4096, "H": 4, "G": 2}  # 27M parameters
LARGE = {"layers": 4, "C": 2048, "M": 6144, "V": 50304, "H": 16, "G": 8}  # 304M
TINY = {"layers": 1, "C": 34, "M": 50, "V": 99, "H": 1, "G": 1}
KERNELS = (
    Kernel(
        "attention", attention_inputs, load("attention"), attention_plain,
        rivals={
            "SDPA flash": partial(sdpa, backend=SDPBackend.FLASH_ATTENTION),
            "SDPA cudnn": partial(sdpa, backend=SDPBackend.CUDNN_ATTENTION),
            "SDPA efficient": partial(sdpa, backend=SDPBackend.EFFICIENT_ATTENTION),
        },
        # row t sees t + 1 columns; 2 products forward, 5 backward
        unit="TFLOP/s", work=lambda B, T, H, G, D: {
            name: products * B * H * D * T * (T + 1)
            for name, products in (("forward", 2), ("backward", 5), ("both", 7))
        },
        small=heads(2, 33, 4, 2, 32), few={"B": 2}, quick=3,
        timed=(
            heads(128, 512, 8, 8, 64), heads(16, 4096, 8, 8, 64), heads(128, 512, 4, 2, 128),
            heads(256, 512, 4, 2, 128), heads(4, 4096, 16, 8, 128),
        ),
    ),
    Kernel(
        "cross_entropy", cross_entropy_inputs, load("cross_entropy"), F.cross_entropy,
        rivals={"Liger": lambda x, y: liger.liger_cross_entropy(x, y)},
        # logits and their gradient; targets and losses
        unit="GB/s", work=lambda N, V: {"both": 4 * N * V + 12 * N},
        small={"N": 13, "V": 17_001, "ignored": True}, few={"N": 1024},
        timed=({"N": 65_536, "V": 4096}, {"N": 131_072, "V": 4096}, {"N": 16_384, "V": 50_304}),
    ),
    Kernel(
        "linear_cross_entropy", head_inputs, load("linear_cross_entropy"), head_plain,
        rivals={
            "Liger": lambda h, w, y: liger.liger_fused_linear_cross_entropy(
                h, w, y, accum_dtype=torch.float32
            )
        },
        unit="TFLOP/s", work=lambda N, C, V: {"both": 6 * N * C * V},
        small={"N": 33, "C": 40, "V": 1000}, few={"N": 1024},
        timed=(
            {"N": 65_536, "C": 512, "V": 4096}, {"N": 131_072, "C": 512, "V": 4096},
            {"N": 16_384, "C": 2048, "V": 50_304},
        ),
    ),
    Kernel(
        "rmsnorm", rmsnorm_inputs, load("rmsnorm"), rmsnorm_plain,
        rivals={
            "Liger": lambda x, g, eps, r: liger.liger_fused_add_rms_norm(
                x, r, g, eps, in_place=False
            )
        },
        # x, residual -> sum, y; dy, dsum, sum -> dx
        unit="GB/s", work=lambda N, C: {"forward": 8 * N * C, "backward": 8 * N * C},
        small={"N": 33, "C": 96}, few={"N": 1024},
        timed=({"N": 65_536, "C": 512}, {"N": 131_072, "C": 512}, {"N": 16_384, "C": 2048}),
    ),
    Kernel(
        "swiglu", swiglu_inputs, load("swiglu"), swiglu_plain,
        rivals={"Liger": swiglu_liger},
        # gate, up -> y; dy, gate, up -> dgate, dup
        unit="GB/s", work=lambda N, M: {"forward": 6 * N * M, "backward": 10 * N * M},
        small={"N": 33, "M": 1100}, few={"N": 1024},
        timed=({"N": 65_536, "M": 1536}, {"N": 131_072, "M": 1536}, {"N": 16_384, "M": 6144}),
    ),
    Kernel(
        "rope", rope_inputs, rope_triton, rope_plain, rivals={"Liger": rope_liger},
        # qkv -> q, k, v; dq, dk, dv, and for the norm q, k -> dqkv
        unit="GB/s", work=lambda B, T, H, G, D: {
            "forward": 4 * B * T * D * (H + 2 * G), "backward": 2 * B * T * D * (3 * H + 5 * G)
        },
        small=heads(2, 33, 3, 1, 10), few={"B": 2},
        timed=(
            heads(128, 512, 4, 2, 128), heads(256, 512, 4, 2, 128), heads(4, 4096, 16, 8, 128),
        ),
    ),
    Kernel(
        "grad_norm", gradient_inputs, load("grad_norm", "adamw"), torch.nn.utils.get_total_norm,
        rivals={}, unit="GB/s", work=lambda **shape: {"forward": 4 * parameter_count(**shape)},
        small=TINY, few={}, timed=(MODEL, LARGE), dtypes=(torch.float32,),
    ),
    Kernel(
        "adamw", adamw_inputs, adamw_triton, adamw_plain,
        rivals={"AdamW fused": partial(adamw_torch, fused=True)},
        # p, m, v read and written, g read
        unit="GB/s", work=lambda **shape: {"step": 28 * parameter_count(**shape)},
        small=TINY, few={}, timed=(MODEL, LARGE), dtypes=(torch.float32,),
    ),
)  # fmt: skip

# Kernel, which of its rows, against what, and the value wanted: a share of the copy rate, or how
# many times as fast as the best rival of that name.
TARGETS = (
    ("attention", {"T": 512, "D": 64, "pass": "both"}, "SDPA", 1.0),
    ("attention", {"T": 4096, "D": 64, "pass": "both"}, "SDPA", 0.85),
    ("cross_entropy", {}, "share", 0.85),
    ("cross_entropy", {}, "torch.compile", 1.5),
    ("rmsnorm", {}, "share", 0.8),
    ("swiglu", {}, "share", 0.8),
    ("rope", {}, "share", 0.8),
    ("adamw", {}, "share", 0.85),
    ("adamw", {}, "AdamW fused", 1.0),
)


def label(shape: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in shape.items())


def flat(outputs) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def leaves_of(inputs: list) -> list[Tensor]:
    return [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]


def upstream_of(outputs: list[Tensor]) -> list[Tensor]:
    """Gradients to start backward from: 1 for a loss, as in training, and random otherwise."""
    kinds = [{"dtype": y.dtype, "device": y.device} for y in outputs]
    return [(torch.randn if y.ndim else torch.ones)(y.shape, **k) for y, k in zip(outputs, kinds)]


def reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:90]


# Right


def widen(x):
    """A copy in float64, lists included."""
    if isinstance(x, list):
        return [widen(y) for y in x]
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.detach().double().requires_grad_(x.requires_grad)
    return x


def largest_error(kernel: Kernel, shape: dict, dtype: torch.dtype, device: str) -> float:
    """Of outputs and gradients, as defined above; nan if any of them is."""
    inputs = kernel.inputs(dtype, device, **shape)
    wide = widen(inputs)
    found, exact = flat(kernel.ours(*inputs)), flat(kernel.plain(*wide))
    if leaves_of(inputs):
        upstream = upstream_of(found)
        found += torch.autograd.grad(found, leaves_of(inputs), upstream)
        exact += torch.autograd.grad(exact, leaves_of(wide), widen(upstream))
    assert [x.shape for x in found] == [x.shape for x in exact], "shapes differ"
    errors = [(a - b).abs().max() / b.abs().max() for a, b in zip(found, exact)]
    return torch.stack(errors).max().item()


def check(gpu: bool) -> list[dict]:
    """A row for each kernel, type and shape: on a GPU also bfloat16 at each width to be timed."""
    rows, device = [], DEVICE if gpu else "cpu"
    print("errors against float64" + ("" if gpu else ", in Triton's interpreter"))
    for kernel in KERNELS:
        cases = [(dtype, kernel.small) for dtype in kernel.dtypes]
        if gpu:
            shapes = {label(s | kernel.few): s | kernel.few for s in kernel.timed}
            cases += [(kernel.dtypes[-1], shape) for shape in shapes.values()]
        for dtype, shape in cases:
            row = {"kernel": kernel.name, "shape": shape, "dtype": str(dtype).split(".")[1]}
            try:
                row["error"] = largest_error(kernel, shape, dtype, device)
                row["right"] = row["error"] <= BOUNDS[dtype]  # no for nan
                text = f"{row['error']:8.0e}  {'ok' if row['right'] else 'WRONG'}"
            except Exception as error:
                row |= {"raised": reason(error), "right": False}
                text = f"   WRONG: raised {row['raised']}"
            rows.append(row)
            print(f"  {kernel.name:22}{row['dtype']:10}{label(shape):42}{text}", flush=True)
    return rows


# Fast


def milliseconds(prepare: Callable, timed: Callable, zeros: Tensor, repeats: int) -> list[float]:
    """What timed(prepare()) takes on the GPU after prepare(), from a cold cache."""
    events = []
    for _ in range(repeats):
        prepared = prepare()
        for _ in range(4):
            zeros.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        timed(prepared)
        end.record()
        del prepared  # or its memory would be there besides the next one's
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def machine_rates() -> dict[str, float]:
    """Unit -> what this GPU reaches in a copy and in a matrix product."""
    a, b = torch.empty((2, BUFFER), dtype=torch.uint8, device=DEVICE)
    x, y = torch.randn((2, MATRIX, MATRIX), dtype=torch.bfloat16, device=DEVICE)
    rates = {}
    for unit, work, run in (
        ("GB/s", 2 * BUFFER / 1e6, lambda _: b.copy_(a)),
        ("TFLOP/s", 2 * MATRIX**3 / 1e9, lambda _: x @ y),
    ):
        milliseconds(lambda: None, run, a, repeats=3)  # cuBLAS loads at first use
        rates[unit] = work / statistics.median(milliseconds(lambda: None, run, a, repeats=20))
    return rates


def stages(program: Callable, inputs: list, which: str) -> tuple[Callable, Callable]:
    """What is done before the clock starts, and what it sees."""
    if which in ("forward", "step"):
        return (lambda: None), (lambda _: program(*inputs))
    leaves, upstream = leaves_of(inputs), upstream_of(flat(program(*inputs)))

    def backward(outputs):
        return torch.autograd.grad(flat(outputs), leaves, upstream)

    if which == "backward":
        return (lambda: program(*inputs)), backward
    return (lambda: None), (lambda _: backward(program(*inputs)))


def peak_mib(prepare: Callable, timed: Callable) -> float:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    timed(prepare())
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(programs: dict, make: Callable, which: str, zeros: Tensor, rounds: int) -> dict:
    """Program -> {"ms", "quartiles", "peak_mib"}, or {"failed"} with the reason."""
    found = {name: {} for name in programs}
    runs, times = {}, {name: [] for name in programs}
    for turn in range(rounds + 1):  # the first compiles, warms up and finds the peak
        for name, program in programs.items():
            if "failed" in found[name]:
                continue
            try:
                if turn == 0:
                    runs[name] = stages(program, make(), which)  # inputs of its own:
                    milliseconds(*runs[name], zeros, repeats=1)  # Liger writes into them
                    found[name]["peak_mib"] = peak_mib(*runs[name])
                else:
                    times[name] += milliseconds(*runs[name], zeros, REPEATS)
            except Exception as error:  # out of memory, a back end that takes no such input, ...
                found[name] = {"failed": reason(error)}
                runs.pop(name, None)
                torch.cuda.empty_cache()
    for name, row in found.items():
        if "failed" not in row:
            low, row["ms"], high = statistics.quantiles(times[name], n=4)
            row["quartiles"] = [low, high]
    return found


def time_shape(kernel: Kernel, shape: dict, rates: dict, zeros: Tensor, rounds: int) -> list[dict]:
    """A row for each pass and program, ours first."""
    torch.compiler.reset()  # else the second shape would be compiled for any
    programs = {"triton": kernel.ours, "eager": kernel.plain}
    programs["torch.compile"] = torch.compile(kernel.plain, **COMPILE)
    programs |= {name: f for name, f in kernel.rivals.items() if liger or name != "Liger"}
    rows = []
    for which, work in kernel.work(**shape).items():

        def make():
            torch.manual_seed(0)
            return kernel.inputs(kernel.dtypes[-1], DEVICE, **shape)

        found = measure(programs, make, which, zeros, rounds)
        head = {"kernel": kernel.name, "shape": shape, "pass": which}
        for name, row in found.items():
            if "ms" in row:
                row["rate"] = work / row["ms"] / (1e6 if kernel.unit == "GB/s" else 1e9)
                row |= {"unit": kernel.unit, "share": row["rate"] / rates[kernel.unit]}
            rows.append(head | {"program": name} | row)
        add_ratio([row for row in rows if row["pass"] == which])
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def add_ratio(rows: list[dict]) -> None:
    mine, *rivals = rows
    rivals = [row for row in rivals if "ms" in row]
    if "ms" in mine and rivals:
        best = min(rivals, key=lambda row: row["ms"])
        mine |= {"best_rival": best["program"], "ratio": best["ms"] / mine["ms"]}


# Report


def title(row: dict) -> str:
    return f"{row['kernel']}, {row['pass']}: {label(row['shape'])}"


def lines(rows: list[dict]) -> list[str]:
    """The table of one kernel at one shape."""
    text = []
    for row in rows:
        if title(row) not in text:
            text.append(title(row))
        if "failed" in row:
            text.append(f"    {row['program']:16}did not run: {row['failed']}")
            continue
        line = f"    {row['program']:16}{row['ms']:9.3f} ms {row['rate']:6.0f} {row['unit']:7}"
        line += f"{row['share']:6.0%}{row['peak_mib']:9.0f} MiB"
        if "ratio" in row:
            line += f"   {row['ratio']:5.2f} x {row['best_rival']}"
        text.append(line)
    return text


def judge(rows: list[dict]) -> list[dict]:
    """A row for each target and each measurement that it is about; "value" is None without one."""
    verdicts = []
    for kernel, where, against, wanted in TARGETS:
        tables = {}  # title -> the rows under it, ours first
        for row in rows:
            place = row["shape"] | {"pass": row["pass"]}
            if row["kernel"] == kernel and where.items() <= place.items():
                tables.setdefault(title(row), []).append(row)
        for name, (mine, *others) in (tables or {f"{kernel} {label(where)}".strip(): [{}]}).items():
            value = mine.get("share")
            if against != "share":
                ms = [r["ms"] for r in others if r["program"].startswith(against) and "ms" in r]
                value = min(ms) / mine["ms"] if ms and "ms" in mine else None
            word = "not measured" if value is None else "met" if value >= wanted else "missed"
            verdict = {"target": name, "against": against, "wanted": wanted, "value": value}
            verdicts.append(verdict | {"verdict": word})
    return verdicts


def verdict_line(verdict: dict) -> str:
    share = verdict["against"] == "share"
    form, unit = ("{:.1%}", "of the copy rate") if share else ("{:.3f}", f"x {verdict['against']}")
    value = "" if verdict["value"] is None else form.format(verdict["value"]) + ", "
    wanted = form.format(verdict["wanted"])
    return f"  {verdict['verdict']:14}{verdict['target']}: {value}wanted {wanted} {unit}"


def environment(gpu: bool) -> dict:
    found = {"device": "no GPU", "torch": torch.__version__, "triton": triton.__version__}
    found["liger"] = LIGER
    if gpu:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            driver = "unknown"
        found |= {"device": torch.cuda.get_device_name(), "driver": driver.strip().split("\n")[0]}
    return found


def time_all(wrong: list[str], quick: bool, stop: float) -> dict:
    """Rates of the machine, rows and targets; prints each as it comes."""
    rounds = ROUNDS // 3 if quick else ROUNDS
    rates = machine_rates()
    print(f"a copy {rates['GB/s']:.0f} GB/s, a matrix product {rates['TFLOP/s']:.0f} TFLOP/s;")
    print(f"below, medians of {rounds * REPEATS} measurements from a cold cache")
    zeros = torch.empty(BUFFER, dtype=torch.uint8, device=DEVICE)
    kernels = [kernel for kernel in KERNELS if kernel.name not in wrong]
    jobs = [(i, k) for k in kernels for i in range(k.quick if quick else len(k.timed))]
    rows = []
    for i, kernel in sorted(jobs, key=lambda job: job[0]):  # the first shapes of all come first
        try:
            if time.monotonic() > stop:
                raise TimeoutError(f"{SECONDS} s are over")
            new = time_shape(kernel, kernel.timed[i], rates, zeros, rounds)
        except Exception as error:  # or a kernel broke the GPU's state, for all that follow too
            new = {"kernel": kernel.name, "shape": kernel.timed[i], "pass": "all passes"}
            new = [new | {"program": "all programs", "failed": reason(error)}]
        rows += new
        print("\n".join(lines(new)), flush=True)
    targets = judge(rows)
    print("\n".join(["targets", *map(verdict_line, targets)]))
    failed = [row for row in rows if "failed" in row]
    print(f"could not run: {len(failed)}")
    for row in failed:
        print(f"  {title(row)}, {row['program']}: {row['failed']}")
    return {"cache": "cold", "rounds": rounds, "rates": rates, "rows": rows, "targets": targets}


def run(quick: bool, gpu: bool) -> dict:
    """All figures; `wrong` lists the kernels that are, or that could not be checked."""
    stop = time.monotonic() + SECONDS
    result = environment(gpu) | {"seed": torch.seed()}
    print(label(result), flush=True)
    result["checks"] = check(gpu)
    wrong = sorted({row["kernel"] for row in result["checks"] if not row["right"]})
    if gpu:
        result |= time_all(wrong, quick, stop)
    else:
        print("timings need a GPU, and there is none")
    for name in wrong:
        print(f"WRONG, and not timed: {name}")
    return result | {"wrong": wrong}


def main(argv: list[str] | None = None) -> int:
    """0, or 1 if a kernel is wrong."""
    parser = argparse.ArgumentParser(description="checks and times all kernels", allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="first shapes only, less often")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there as well")
    arguments = parser.parse_args(argv)
    if arguments.json is not None and not arguments.json.parent.is_dir():
        parser.error(f"--json {arguments.json}: no folder {arguments.json.parent}; make it first")
    result = run(arguments.quick, torch.cuda.is_available())
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
