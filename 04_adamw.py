"""AdamW by hand: the equation line by line, and a form that is fast enough to train with.

AdamW divides each weight's averaged gradient by that weight's own typical gradient size, and
shrinks the weights beside that, not through it. With gradient g at step t = 1, 2, ...:

    m = beta1 m + (1 - beta1) g                  running mean of the gradient
    v = beta2 v + (1 - beta2) g^2                running mean of its square
    m_hat = m / (1 - beta1^t)                    m and v start at 0, so the first averages are
    v_hat = v / (1 - beta2^t)                    too small by exactly these factors
    w = (1 - lr weight_decay) w - lr m_hat / (sqrt(v_hat) + eps)

The first factor is the W in AdamW. Adam with L2 adds weight_decay * w to g instead, where it is
divided by sqrt(v_hat) like everything else: a weight whose gradients are of size a decays at the
rate weight_decay / a, hence hardly at all if a is large. The demo measures both.

The fast form needs neither m_hat nor v_hat, since the scalars c1 = 1 - beta1^t and
c2 = sqrt(1 - beta2^t) can be moved out of the tensors:

    w = (1 - lr weight_decay) w - (lr c2 / c1) m / (sqrt(v) + eps c2)

Letters used below: p parameter (w above), g gradient, m and v its moments, t steps done.

Sources: Adam: Kingma & Ba 2014 (arXiv 1412.6980), algorithm 1 and section 3 on the correction;
decoupled decay: Loshchilov & Hutter 2017 (1711.05101), algorithm 2, in the form of PyTorch, where
lr multiplies the decay too; decay on matrices only: nanoGPT (Karpathy 2022).

Run: `python 04_adamw.py` (CPU, about 5 s on 2 cores of an AMD EPYC (Zen 5)) prints, from seed 0,

    reference against torch.optim.AdamW: 4.8e-07 apart after 100 steps
    foreach   against torch.optim.AdamW: 2.4e-07 apart after 100 steps

    weight left of 1 after 5000 steps of noise, lr 0.002, decay 0.1
    gradient size   decoupled  (1-lr*decay)^n   L2 in g   exp(-lr*decay*n/size)
                1       0.366           0.368     0.368                   0.368
                3       0.368           0.368     0.714                   0.717
               10       0.368           0.368     0.897                   0.905
              100       0.369           0.368     0.991                   0.990

    first step, in units of lr: bias correction makes it 1 whatever the gradient's size
    gradient size      step   |g|/(|g|+eps)   without correction
            1e-06    0.9901          0.9901               2.4025
            1e+00    1.0000          1.0000               3.1623
            1e+06    1.0000          1.0000               3.1623

    CPU ms per step, 8M parameters, one thread: reference 132, foreach 11, torch 20, torch fused 5
    ok: torch's numbers; decoupled decay ignores the gradient's size, L2 is divided by it
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

kernel = None  # the Triton form, for a GPU or Triton's interpreter, where kernels/ stands beside
if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET"):
    try:
        from kernels import adamw as kernel
    except ImportError:
        pass

IMPLEMENTATIONS = ("auto", "reference", "foreach", "triton")

# Elements that the foreach form handles at a time. It makes a temporary of that many, and passes
# over p, g, m, v and the temporary seven times: on a CPU they should stay in the cache in between
# (2^17 ... 2^19 take a quarter less than torch's default, 2^15 and all at once take longer: 27M
# parameters, 2 cores of an EPYC with 8 MiB of L3; the largest of the good has the fewest calls).
# On a GPU a few large launches are best, and the limit only bounds memory (64 MiB in float32).
CPU_BATCH = 2**19
GPU_BATCH = 2**24


def adamw_reference(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    t: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step for one parameter, as the equations stand; p, m and v are changed in place.

    Args: p, g, m, v of one shape and dtype; t counts steps from 1 and includes this one.
    """
    beta1, beta2 = betas
    m.copy_(beta1 * m + (1 - beta1) * g)
    v.copy_(beta2 * v + (1 - beta2) * g * g)
    m_hat = m / (1 - beta1**t)
    v_hat = v / (1 - beta2**t)
    p.copy_((1 - lr * weight_decay) * p - lr * m_hat / (v_hat.sqrt() + eps))


def adamw_foreach(
    p: list[Tensor],
    g: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    t: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step for a list of parameters that have all done t - 1 steps; p, m, v in place.

    Each `torch._foreach_` call takes the whole list: on a GPU that is one launch for many tensors.
    """
    beta1, beta2 = betas
    c1, c2 = 1 - beta1**t, math.sqrt(1 - beta2**t)
    torch._foreach_lerp_(m, g, 1 - beta1)
    torch._foreach_mul_(v, beta2)
    torch._foreach_addcmul_(v, g, g, 1 - beta2)
    size = torch._foreach_sqrt(v)  # the one temporary
    torch._foreach_add_(size, eps * c2)
    torch._foreach_mul_(p, 1 - lr * weight_decay)
    torch._foreach_addcdiv_(p, m, size, -lr * c2 / c1)


def in_batches(rows: Iterable[tuple[Tensor, ...]], limit: int) -> Iterator[list[list[Tensor]]]:
    """The rows (p, g, m, v), turned into lists of p's, g's, ... of at most `limit` elements each.

    Short tensors share a batch and long ones are cut into pieces, which are views. Only a tensor
    that is not contiguous is never cut: its batch may exceed the limit.
    """
    batch, size = [], 0
    for row in rows:
        pieces = [row]
        if row[0].numel() > limit and all(x.is_contiguous() for x in row):
            pieces = zip(*(x.view(-1).split(limit) for x in row))
        for piece in pieces:
            if batch and size + piece[0].numel() > limit:
                yield [list(column) for column in zip(*batch)]
                batch, size = [], 0
            batch.append(piece)
            size += piece[0].numel()
    if batch:
        yield [list(column) for column in zip(*batch)]


class AdamW(torch.optim.Optimizer):
    """`torch.optim.AdamW` with the same defaults, the same state and, up to rounding, results.

    Args:
        params: parameters, or groups as dicts that may override any value below.
        implementation: "reference" is the equation, one parameter at a time; "foreach" the fast
            form; "triton" one launch of kernels/adamw.py for all parameters; "auto" is "triton"
            for contiguous float32 on a GPU where it is there, else "foreach".
    The moments have the parameter's dtype, as in torch. Keep the parameters in float32 (autocast
    casts their copies): a bfloat16 weight keeps 8 bits and does not move when the step is less
    than 1/256 of it, and in float16 eps = 1e-8 rounds to 0.
    The state_dict can be loaded by torch's AdamW and the other way round. As in torch, loading
    does not copy tensors: hand over a deep copy if both optimisers go on.
    Raises: ValueError for a value outside its range, complex parameters and sparse gradients.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        implementation: str = "auto",
    ):
        if implementation not in IMPLEMENTATIONS:
            wanted = ", ".join(map(repr, IMPLEMENTATIONS))
            raise ValueError(f"implementation={implementation!r} must be one of {wanted}")
        if implementation == "triton" and (kernel is None or kernel.triton is None):
            raise ImportError(
                "implementation='triton' needs a GPU (or TRITON_INTERPRET=1), kernels/adamw.py "
                "beside this file, and Triton: pip install triton"
            )
        self.implementation = implementation  # not in the groups: a checkpoint must not change it
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    def add_param_group(self, param_group: dict) -> None:
        values = self.defaults | param_group
        for name in ("lr", "eps", "weight_decay"):
            if not 0 <= values[name] < math.inf:
                raise ValueError(f"{name}={values[name]} must be finite and at least 0")
        if len(values["betas"]) != 2 or not all(0 <= beta < 1 for beta in values["betas"]):
            raise ValueError(f"betas={values['betas']} must be two numbers in [0, 1)")
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.is_complex():
                self.param_groups.pop()  # a caller who catches this goes on without the group
                raise ValueError(
                    f"a parameter of {tuple(p.shape)} is {p.dtype} and must be real; "
                    "hand over torch.view_as_real of it"
                )

    def load_state_dict(self, state_dict: dict) -> None:
        for group in state_dict["param_groups"]:
            for name in ("amsgrad", "maximize"):
                if group.get(name):
                    raise ValueError(f"{name}=True in the state_dict must be False: not done here")
            if not group.get("decoupled_weight_decay", True):
                raise ValueError("the state_dict is of Adam, whose decay is part of the gradient")
        super().load_state_dict(state_dict)
        for state in self.state.values():  # torch's fused form keeps it on the GPU
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device="cpu")

    def __getstate__(self) -> dict:  # for pickle and deepcopy; torch's names what it keeps
        return super().__getstate__() | {"implementation": self.implementation}

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Updates every parameter that has a gradient; returns the closure's loss, if given one.

        A parameter without gradient is left alone, decay included, and its t does not advance.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.grad.layout != torch.strided:
                    raise ValueError(
                        f"the gradient of a parameter of {tuple(p.shape)} is {p.grad.layout} and "
                        "must be dense; build the embedding with sparse=False"
                    )
        for group in self.param_groups:
            # whoever shares t shares the scalars; a foreach call is fast on one device and dtype
            alike = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    state = self._state(p)
                    state["step"] += 1
                    row = (p, p.grad, state["exp_avg"], state["exp_avg_sq"])
                    alike[p.device, p.dtype, int(state["step"])].append(row)
            values = (float(group["lr"]), group["betas"], group["eps"], group["weight_decay"])
            for (device, _, t), rows in alike.items():
                if self.implementation == "reference":
                    for row in rows:
                        adamw_reference(*row, t, *values)
                elif self._takes_triton(device, rows):
                    options = dict(zip(("lr", "betas", "eps", "weight_decay"), values))
                    kernel.adamw_step(*zip(*rows), step=t, **options, implementation="triton")
                else:
                    limit = CPU_BATCH if device.type == "cpu" else GPU_BATCH
                    for lists in in_batches(rows, limit):
                        adamw_foreach(*lists, t, *values)
        return loss

    def _takes_triton(self, device: torch.device, rows: list[tuple[Tensor, ...]]) -> bool:
        if self.implementation != "auto":
            return self.implementation == "triton"
        there = device.type == "cuda" and kernel is not None and kernel.triton is not None
        plain = Tensor, nn.Parameter  # a DTensor is a part of one: the kernel cannot reach into it
        return there and all(
            type(x) in plain and x.dtype == torch.float32 and x.is_contiguous()
            for row in rows
            for x in row
        )

    def _state(self, p: Tensor) -> dict:
        state = self.state[p]
        if not state:  # first gradient of this parameter
            state["step"] = torch.zeros((), dtype=torch.float32)  # on the CPU: reading it is free
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)  # m
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)  # v
        return state


def param_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float
) -> list[dict]:
    """Two groups for an optimiser: matrices, which decay, then gains and biases, which do not.

    A matrix has two or more axes; embedding tables are among them and decay, as in nanoGPT. Decay
    would pull a gain to 0, which for a scale is no neutral value. Parameters with
    requires_grad=False are left out. A group may be empty.
    """
    trained = [p for _, p in named_parameters if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def against_torch(implementation: str, steps: int = 100) -> float:
    """The largest difference to torch's weights after `steps` steps from the same gradients."""
    shapes = [(64, 33), (33,), (7, 5, 3), ()]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    settings = {"lr": 1e-2, "weight_decay": 0.1}
    optimizers = (
        AdamW(ours, **settings, implementation=implementation),
        torch.optim.AdamW(theirs, **settings),
    )
    for _ in range(steps):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs))


def weight_left(scales: Tensor, decay: float, decoupled: bool, lr: float, steps: int) -> Tensor:
    """Mean final weight, from 1, under gradients of pure noise: +scale or -scale, nothing else.

    Noise moves a weight to and fro, so the mean over 2048 copies shows the decay alone.
    """
    w = nn.Parameter(torch.ones(len(scales), 2048))
    optimizer = AdamW([w], lr=lr, weight_decay=decay if decoupled else 0.0)
    for _ in range(steps):
        sign = torch.randint(2, w.shape) * 2 - 1
        w.grad = scales[:, None] * sign + (0 if decoupled else decay * w.detach())
        optimizer.step()
    return w.detach().mean(1)


def milliseconds_per_step(make: Callable[[list], torch.optim.Optimizer], repeats: int = 7) -> float:
    """Median CPU time of a step over 8M parameters: 31% of what the 27M model has."""
    shapes = [(4096, 512)] + 2 * [(3072, 512), (512, 1536), (1024, 512), (512, 512), (512,), (512,)]
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer, times = make(params), []
    for _ in range(2 + repeats):
        start = time.process_time()  # not counting what other programs take
        optimizer.step()
        times.append(time.process_time() - start)
    return 1e3 * statistics.median(times[2:])  # the first two allocate


def demo() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # most tensors here are small, and times compare better
    for implementation in ("reference", "foreach"):
        apart = against_torch(implementation)
        print(f"{implementation:9s} against torch.optim.AdamW: {apart:.1e} apart after 100 steps")
        assert apart < 1e-6, "this is not AdamW"

    lr, decay, steps = 2e-3, 0.1, 5000
    scales = torch.tensor([1.0, 3.0, 10.0, 100.0])
    print(f"\nweight left of 1 after {steps} steps of noise, lr {lr}, decay {decay}")
    print("gradient size   decoupled  (1-lr*decay)^n   L2 in g   exp(-lr*decay*n/size)")
    decoupled = weight_left(scales, decay, True, lr, steps)
    l2 = weight_left(scales, decay, False, lr, steps)
    same = (1 - lr * decay) ** steps
    for size, a, b in zip(scales.tolist(), decoupled.tolist(), l2.tolist()):
        expected = math.exp(-lr * decay * steps / size)
        print(f"{size:13.0f} {a:11.3f} {same:15.3f} {b:9.3f} {expected:23.3f}")
        assert abs(a - same) < 0.015 and abs(b - expected) < 0.015, "decay is not as derived"

    print("\nfirst step, in units of lr: bias correction makes it 1 whatever the gradient's size")
    print("gradient size      step   |g|/(|g|+eps)   without correction")
    for size in (1e-6, 1.0, 1e6):
        w = nn.Parameter(torch.zeros((), dtype=torch.float64))
        w.grad = torch.full_like(w, size)
        AdamW([w], lr=1.0).step()
        expected, uncorrected = size / (size + 1e-8), 0.1 * size / (math.sqrt(1e-3) * size + 1e-8)
        print(f"{size:13.0e} {-w.item():9.4f} {expected:15.4f} {uncorrected:20.4f}")
        assert abs(-w.item() - expected) < 1e-9, "the first step is not lr"

    ms = {
        "reference": milliseconds_per_step(lambda p: AdamW(p, implementation="reference"), 3),
        "foreach": milliseconds_per_step(AdamW),
        "torch": milliseconds_per_step(torch.optim.AdamW),
        "torch fused": milliseconds_per_step(lambda p: torch.optim.AdamW(p, fused=True)),
    }
    listed = ", ".join(f"{name} {x:.0f}" for name, x in ms.items())
    print(f"\nCPU ms per step, 8M parameters, one thread: {listed}")
    print("ok: torch's numbers; decoupled decay ignores the gradient's size, L2 is divided by it")


if __name__ == "__main__":
    demo()
