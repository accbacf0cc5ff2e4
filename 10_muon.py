"""Muon by hand: what came after AdamW for matrices, an update with all directions equally long.

The gradient of a layer's matrix is nearly of low rank: a few directions carry most of its length,
because the inputs of the layer are alike. A step along it learns those few, and the rest slowly.
Muon replaces the averaged gradient by the nearest matrix whose directions are all equally long:

    B = mu B + (1 - mu) G                        momentum: running mean of the gradient G
    U = mu B + (1 - mu) G                        Nesterov: the mean that one more G would give
    Q = orthogonalise(U)                         U = W S V^T (its SVD) -> W V^T: lengths S to 1
    w = (1 - lr weight_decay) w - lr scale Q     decay beside the step, as in AdamW

No SVD is taken. A polynomial p(x) = a x + b x^3 + c x^5 of odd powers acts on a matrix as on each
of its singular values, and needs only products:

    X = U / |U|                                  Frobenius norm: singular values now in [0, 1]
    X = a X + (b A + c A^2) X,  A = X X^T        five times (Newton-Schulz)

With a, b, c = 15/8, -10/8, 3/8 every singular value would go to 1, but at first a small one grows
only by 15/8 each time. Muon's constants grow it by 3.4445 and pay with precision: values do not
settle at 1, but wander in the band [0.6818, 1.2024], which are the local minimum and maximum of p.
After 5 steps all that began above 0.0016 are in it. For training that is as good.

scale. An M x N matrix with singular values 1 has entries of root mean square (RMS)
1 / sqrt(max(M, N)). Two conventions, by torch's names:

    "original"           sqrt(max(1, M / N))     the step changes outputs alike for every shape
    "match_rms_adamw"    0.2 sqrt(max(M, N))     entries of RMS 0.2, about AdamW's: its learning
                                                 rate and weight decay carry over

Why matrices only: a singular value tells how a layer stretches its input, and input and output of
hidden layers are dense vectors. An embedding's input is one row's number, so rows have nothing to
share; a head is the same turned over; a gain or a bias has no directions. They stay with AdamW.

Cost: 5 (4 n^2 m + 2 n^3) FLOPs for sides n <= m, on top of the 6 n m T that T tokens' forward and
backward pass take: at most a fraction 5 n / T. That is 2% for n = 512 and a step of T = 131,072
tokens, and 40% for n = 128 and T = 1600. State: one buffer where AdamW keeps two.

Muon is no certain gain. Where the inputs have no favoured direction (the demo's round ones) AdamW
does as well; noise, too, is given full length in every direction; and its rate has to be found.
03's 0.5M model on the built-in stories, nats above the floor after 250 steps of 8 rows of 200
tokens, one seed ("match_rms_adamw"; AdamW at 6e-3 for the rest):

    Muon at  2.5e-3 0.382   5e-3 0.353   1e-2 0.370   2e-2 0.419   4e-2 0.425
    AdamW at   3e-3 0.464   6e-3 0.405   1e-2 0.422

(python results/ladder.py --tune --steps 250.) So at 2e-2 no gain is left; at 5e-3 it is beyond the
noise, after 1100 steps 0.076 beside AdamW's 0.180, means of three seeds, and on real text as well
(python results/ladder.py). Packed projections (q|k|v, gate|up) split before orthogonalising gave
0.249 where whole ones gave 0.228 (600 steps at 2e-2, one seed, an earlier state of 03): no gain, so
they are taken whole.

Letters used below: M rows and N columns of a matrix; G, B, U, Q as above.

Sources: Muon, its constants and "original": Jordan et al. 2024 (kellerjordan.github.io/posts/muon);
"match_rms_adamw" and weight decay: Moonshot, Liu et al. 2025 (arXiv 2502.16982, section 2.2);
Newton-Schulz in optimisers: Bernstein & Newhouse 2024 (2409.20325); names: torch.optim.Muon.
15/8, -10/8, 3/8 are what p(1) = 1 and p'(1) = p''(1) = 0 leave.

Run: `python 10_muon.py` (CPU, about 7 s on 2 cores of an AMD EPYC (Zen 5)) prints, from seed 0,

    a singular value      Muon's a, b, c, steps      15/8, -10/8, 3/8, steps
    of X at the start       3       5      10           5      10      20
                  1.0   0.7207  0.6964  1.1253      1.0000  1.0000  1.0000
                  0.1   0.7071  0.7121  1.0983      0.9958  1.0000  1.0000
                 0.01   0.4001  0.6989  1.1219      0.2285  1.0000  1.0000
               0.0016   0.0654  0.7184  1.0856      0.0371  0.7174  1.0000
               0.0001   0.0041  0.0485  0.7547      0.0023  0.0537  1.0000

    gradient of a layer, singular values 1, 9, 17, 33, 64: 1204.53 47.38 16.55 6.05 1.07
    orthogonalised: 0.74 1.11 0.86 1.20 0.37; rebuilt from the old singular vectors to 6e-06

    RMS of an update from noise, in units of lr; derived: 0.229, and 0.2 * band
      128 x 128     AdamW 0.228     Muon 0.177
      512 x 128     AdamW 0.227     Muon 0.173
      128 x 512     AdamW 0.227     Muon 0.174

    loss after 100 steps on 256 facts, nats: median of 3 seeds at three learning rates
    inputs  optimiser   lr     0.032    0.064    0.128     3 seeds at the best
    round   adamw             0.0000   0.0000   0.0001     0.0000 to 0.0001
    round   muon              0.0001   0.0000   0.0000     0.0000 to 0.0000
    steep   adamw             0.8051   0.5152   2.7256     0.3434 to 0.5633
    steep   muon              0.7753   0.0024   0.0018     0.0011 to 0.0019
    ok: vectors kept, values in the band; on steep inputs Muon's worst seed beats AdamW's
    best by more than 10 times, on round ones both learn all
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a, b, c: Jordan et al.
EXACT = (15 / 8, -10 / 8, 3 / 8)  # each singular value goes to 1
BAND = (0.6818, 1.2024)  # where COEFFICIENTS leave singular values
EPS = 1e-7  # what a matrix is divided by if its norm is smaller; five steps multiply by 485

# Elements of equal matrices that are orthogonalised as one batch: few launches on a GPU, and the
# limit bounds the temporaries. On a CPU a step of the 0.5M model takes 33 ms, and 35 one by one.
STACKED = 2**24

SCALES = {  # factor of the learning rate for a matrix (M, N), by torch's name
    "original": lambda M, N: math.sqrt(max(1, M / N)),
    "match_rms_adamw": lambda M, N: 0.2 * math.sqrt(max(M, N)),
}


def orthogonalise(
    matrix: Tensor,
    steps: int = 5,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    eps: float = EPS,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The matrix with its singular vectors kept and its singular values moved into `BAND`.

    Args:
        matrix (..., M, N) float, each one by itself; it is not changed.
        dtype: of the products; None is bfloat16 on GPUs, elsewhere float32 (float64 for float64).
    Returns: matrix's shape and dtype. A zero matrix stays zero, one with a norm far below eps / 485
    small.
    Raises: ValueError for fewer than two axes, and for integers and complex numbers.
    """
    if matrix.ndim < 2 or not matrix.is_floating_point():
        shape = tuple(matrix.shape)
        wanted = "must have two or more axes and be real"
        raise ValueError(f"matrix of {matrix.dtype} and shape {shape} {wanted}")
    a, b, c = coefficients
    wide = matrix.size(-2) <= matrix.size(-1)
    X = matrix if wide else matrix.mT  # A = X X^T is then the smaller of the two
    X = X.to(torch.promote_types(X.dtype, torch.float32))
    X = X / torch.linalg.matrix_norm(X, keepdim=True).clamp(min=eps)
    X = X.to(dtype or (torch.bfloat16 if X.is_cuda else X.dtype))
    for _ in range(steps):
        A = X @ X.mT  # (..., n, n)
        X = a * X + (b * A + c * A @ A) @ X
    return (X if wide else X.mT).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` with the same arguments, the same state and, up to rounding, results.

    Args:
        params: matrices, also as (name, matrix) pairs, or groups as dicts that may override any
            value below. `split_parameters` picks them out of a model.
        adjust_lr_fn: one of `SCALES`; None is "original".
        dtype: see `orthogonalise`; torch's is bfloat16 everywhere. It is not part of the state.
    A state_dict can be loaded by torch's Muon and the other way round.
    Raises: ValueError for a value outside its range, and for a parameter that is no matrix.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        eps: float = EPS,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.dtype = dtype
        super().__init__(
            params,
            {
                "lr": lr,
                "weight_decay": weight_decay,
                "momentum": momentum,
                "nesterov": nesterov,
                "ns_coefficients": ns_coefficients,
                "eps": eps,
                "ns_steps": ns_steps,
                "adjust_lr_fn": adjust_lr_fn,
            },
        )

    def add_param_group(self, param_group: dict) -> None:
        values = self.defaults | param_group
        for name in ("lr", "weight_decay"):
            if not 0 <= values[name] < math.inf:
                raise ValueError(f"{name}={values[name]} must be finite and at least 0")
        if not 0 <= values["momentum"] < 1:
            raise ValueError(f"momentum={values['momentum']} must be in [0, 1)")
        if not 0 < values["eps"] < math.inf:
            raise ValueError(f"eps={values['eps']} must be finite and above 0")
        if values["ns_steps"] not in range(1, 100):
            raise ValueError(f"ns_steps={values['ns_steps']} must be a whole number from 1 to 99")
        if len(values["ns_coefficients"]) != 3:
            raise ValueError(f"ns_coefficients={values['ns_coefficients']} must be three numbers")
        if values["adjust_lr_fn"] not in (None, *SCALES):
            wanted = ", ".join(map(repr, SCALES))
            raise ValueError(f"adjust_lr_fn={values['adjust_lr_fn']!r} must be one of {wanted}")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for i, p in enumerate(group["params"]):
            if p.ndim != 2 or not p.is_floating_point():
                name = group.get("param_names", {i: f"number {i}"})[i]
                self.param_groups.pop()  # a caller who catches this goes on without the group
                raise ValueError(
                    f"parameter {name} is {p.dtype} of shape {tuple(p.shape)} and must be a real "
                    "matrix; give it to AdamW (split_parameters does)"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Updates every matrix that has a gradient; returns the closure's loss, if given one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.shape, p.dtype, p.device].append(p)
            for (shape, *_), params in alike.items():
                at_once = max(1, STACKED // max(1, shape.numel()))
                for first in range(0, len(params), at_once):
                    self._update(params[first : first + at_once], group)
        return loss

    def _update(self, params: list[Tensor], group: dict) -> None:
        """One step for matrices of one shape."""
        lr, mu = float(group["lr"]), group["momentum"]
        scale = SCALES[group["adjust_lr_fn"] or "original"](*params[0].shape)
        G = [p.grad for p in params]
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        B = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(B, G, 1 - mu)
        U = torch._foreach_lerp(G, B, mu) if group["nesterov"] else B
        values = (group[name] for name in ("ns_steps", "ns_coefficients", "eps"))
        Q = orthogonalise(torch.stack(U), *values, self.dtype)
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(params, Q.unbind(), alpha=-lr * scale)


Named = list[tuple[str, nn.Parameter]]


def split_parameters(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    outer: tuple[str, ...] = ("embed", "head", "wte", "wpe"),
) -> tuple[Named, Named]:
    """The hidden matrices, for Muon, and everything else, for AdamW: two lists of (name, p).

    A hidden matrix has two axes, both above 1, and no part of its dotted name begins or ends with a
    word of `outer`: what embeddings and heads are called here and in transformers' GPT-2 and Llama
    ("lm_head", not "multihead_attn"). A model with other names, T5's "shared", BERT's "classifier"
    or the "output" of Meta's own Llama, needs others: look at what comes out. Parameters with
    requires_grad=False are left out. GPT-2's Conv1D in transformers stores its matrices as
    (in, out), where "original" means (out, in).
    """
    outer = (outer,) if isinstance(outer, str) else tuple(outer)
    hidden, rest = [], []
    for name, p in named_parameters:
        if p.requires_grad:
            parts = name.split(".")
            is_outer = any(part.startswith(outer) or part.endswith(outer) for part in parts)
            is_hidden = p.ndim == 2 and min(p.shape) > 1 and not is_outer
            (hidden if is_hidden else rest).append((name, p))
    return hidden, rest


def facts(seed: int, decay: float) -> tuple[Tensor, Tensor]:
    """Facts to learn by heart: inputs (256, 64), the name of each is its number; names (256, 64).

    Direction i of the inputs has length i^-decay, in a basis turned at random, so that no single
    coordinate shows it: 0 is round noise, and 1.5 is steep, as the inputs of hidden layers are.
    """
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(256, 64, generator=g) * torch.arange(1, 65) ** -decay
    x = x @ torch.linalg.qr(torch.randn(64, 64, generator=g))[0]
    return x / x.square().mean().sqrt(), torch.randn(256, 64, generator=g) / 8


def learn(make: Callable, lr: float, seed: int, decay: float, steps: int = 100) -> float:
    """Mean loss in nats over all facts, after `steps` batches of 256 drawn from them."""
    x, names = facts(seed, decay)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128, bias=False), nn.ReLU(), nn.Linear(128, 64, bias=False))
    optimizer = make(model.parameters(), lr)

    def loss(rows: Tensor) -> Tensor:
        return F.cross_entropy(model(x[rows]) @ names.T, rows)

    for step in range(steps):
        optimizer.zero_grad()
        loss(torch.randint(256, (256,))).backward()
        for group in optimizer.param_groups:  # 20 steps up, and down to 0 in the second half
            group["lr"] = lr * min(1, (step + 1) / 20, 2 * (steps - step) / steps)
        optimizer.step()
    with torch.no_grad():
        return loss(torch.arange(256)).item()


def adamw(params, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr, betas=(0.9, 0.95), weight_decay=0.0)


def muon(params, lr: float) -> torch.optim.Optimizer:
    return Muon(params, lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")


def step_rms(make: Callable, shape: tuple[int, int], steps: int = 50) -> float:
    """RMS of the last of `steps` updates, in units of lr, when gradients are nothing but noise."""
    w = nn.Parameter(torch.zeros(shape))
    optimizer = make([w], 1.0)
    for _ in range(steps):
        before = w.detach().clone()
        w.grad = torch.randn(shape)
        optimizer.step()
    return (w - before).square().mean().sqrt().item()


def polynomial(x: float, steps: int, coefficients: tuple[float, float, float]) -> float:
    a, b, c = coefficients
    for _ in range(steps):
        x = a * x + b * x**3 + c * x**5
    return x


def demo() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # small matrices
    print("a singular value      Muon's a, b, c, steps      15/8, -10/8, 3/8, steps")
    print("of X at the start       3       5      10           5      10      20")
    for x in (1.0, 0.1, 0.01, 0.0016, 0.0001):
        row = [polynomial(x, steps, COEFFICIENTS) for steps in (3, 5, 10)]
        row += [polynomial(x, steps, EXACT) for steps in (5, 10, 20)]
        print("{:17}{:9.4f}{:8.4f}{:8.4f}{:12.4f}{:8.4f}{:8.4f}".format(x, *row))

    x, _ = facts(0, decay=1.5)
    G = torch.randn(128, 256) @ x  # (M, N), as a layer's gradient: errors of its outputs, inputs
    W, S, Vt = torch.linalg.svd(G, full_matrices=False)
    Q = orthogonalise(G)
    s = (W.mT @ Q @ Vt.mT).diagonal()  # the new singular values, if the vectors are the old ones
    apart = (W * s @ Vt - Q).abs().max()
    sizes = " ".join(f"{S[i]:.2f}" for i in (0, 8, 16, 32, 63))
    new = " ".join(f"{s[i]:.2f}" for i in (0, 8, 16, 32, 63))
    print(f"\ngradient of a layer, singular values 1, 9, 17, 33, 64: {sizes}")
    print(f"orthogonalised: {new}; rebuilt from the old singular vectors to {apart:.0e}")
    reached = S / S.norm() > 0.0016
    assert apart < 1e-4, "orthogonalise turned the singular vectors"
    assert BAND[0] < s[reached].min() and s[reached].max() < BAND[1] + 1e-4, "outside the band"

    noise = math.sqrt((1 - 0.9) / (1 + 0.9))  # std of a running mean of noise of std 1
    print(f"\nRMS of an update from noise, in units of lr; derived: {noise:.3f}, and 0.2 * band")
    for shape in ((128, 128), (512, 128), (128, 512)):
        a, b = step_rms(adamw, shape), step_rms(muon, shape)
        print(f"{shape[0]:5} x {shape[1]:3}     AdamW {a:.3f}     Muon {b:.3f}")
        assert abs(a - noise) < 0.1 * noise, "AdamW's update is not as derived"
        assert 0.2 * BAND[0] < b < 0.2 * BAND[1], "Muon's update is not as derived"

    rates, best = (0.032, 0.064, 0.128), {}
    print("\nloss after 100 steps on 256 facts, nats: median of 3 seeds at three learning rates")
    listed = "".join(f"{lr:9}" for lr in rates)
    print(f"inputs  optimiser   lr {listed}     3 seeds at the best")
    for inputs, decay in (("round", 0.0), ("steep", 1.5)):
        for make in (adamw, muon):
            runs = [sorted(learn(make, lr, seed, decay) for seed in range(3)) for lr in rates]
            low, _, high = best[inputs, make] = min(runs, key=statistics.median)
            medians = "".join(f"{statistics.median(run):9.4f}" for run in runs)
            print(f"{inputs:8}{make.__name__:15}{medians}     {low:.4f} to {high:.4f}")
    assert max(best["round", adamw] + best["round", muon]) < 1e-3, "round inputs are easy for both"
    assert max(best["steep", muon]) < 0.1 * min(best["steep", adamw]), "Muon did not win by 10"
    print("ok: vectors kept, values in the band; on steep inputs Muon's worst seed beats AdamW's")
    print("best by more than 10 times, on round ones both learn all")


if __name__ == "__main__":
    demo()
