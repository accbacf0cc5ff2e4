"""Why training runs fail, and what to do: clipping, spikes, remedies, and a doctor for silent bugs.

A run fails loudly (the loss jumps, or is NaN) or silently (a bug, and it merely learns less). For
the loud failures, with gradient g of norm |g|, weights w, Adam's moments m and v:

    clip              g <- g min(1, c / (|g| + 1e-6))     the direction stays, the length is bounded
    spike             loss or ln |g| above its median by more than 6 spreads, and by a margin;
                      spread = 1.4826 MAD(differences of neighbours) / sqrt 2
    skip, rewind      leave the update out; go back to a checkpoint and leave the data out too
    z-loss            + z mean(lse^2)                     lse = ln sum exp(logits), pulled to 0
    softcap           x <- cap tanh(x / cap)              logits beyond cap are not to be had
    QK-norm           q, k <- q / rms(q), k / rms(k)      attention logits within sqrt(D)
    shrink            e <- a e + (1 - a) stopgrad(e)      same value, gradient times a
    StableAdamW       lr <- lr / max(1, rms(g / sqrt v))  v lags behind a sudden gradient
    SPAM              g^2 > 5000 v is cut to it; m and v forgotten every 500 steps
    loss scaling      backward from s loss, g / s: small float16 gradients are not rounded to 0;
                      s halves at an overflow and doubles after 2000 good steps

For the silent ones `diagnose` looks at a run the way a person would: loss at init, one batch
learnt by heart, does a gradient reach each weight, does the future leak, and so on; see `Run`
for how to hand it yours. `results/doctor.py` tries it on 24 bugs put in on purpose, five seeds
each, and on 20 sound runs: all named, no false alarm (results/doctor.json).

The demo raises the rate until a tiny GPT no longer learns and shows what each remedy does about
it. LR sensitivity is the mean over rates of min(loss, loss at init), minus the best: 0 means that
the rate is no matter.

Letters used below: B rows, T positions, V classes, H heads of D = C / H, C the width.

Sources: clipping: Pascanu et al. 2013 (arXiv 1211.5063); AGC: Brock et al. 2021 (2102.06171);
AutoClip: Seetharaman et al. 2020 (2007.14469); ZClip: Kumar et al. 2025 (2504.02507); rewind and
z-loss: PaLM, Chowdhery et al. 2022 (2204.02311, section 5); skipping steps: OLMo-core's
SkipStepOptimizer (128 steps, 6 sd); shrink: GLM-130B, Zeng et al. 2022 (2210.02414); softcap:
Gemma 2 (2408.00118); QK-norm: Dehghani et al. 2023 (2302.05442); StableAdamW: Wortsman et al.
2023 (2304.13013); SPAM: Huang et al. 2025 (2501.06842); LR sensitivity: Wortsman et al. 2023
(2309.14322); loss scaling: Micikevicius et al. 2018 (1710.03740) with the constants of
torch.amp.GradScaler; the doctor: J. Tobin, Troubleshooting Deep Neural Networks (2019).

Run: `python 08_stability.py` (CPU, 15 s on 2 cores of an AMD EPYC (Zen 5)) prints

    clip 4 float16 gradients of 60,000 to 1: torch norm       inf, then 0.00 each
    clip 4 float16 gradients of 60,000 to 1: here  norm    120000, then 0.50 each

    final loss of a tiny GPT, mean of 3 seeds; floor 0.83, ln V 3.47 nats
    remedy                      lr 0.01   lr 0.03   lr 0.1    lr 0.3    sensitivity
    none                            1.05      1.31      3.50      4.21   1.28 +- 0.07
    clip at 1.0                     1.04      1.28      3.54      4.21   1.29 +- 0.04
    warmup, 30 steps                1.07      1.20      2.16      3.87   0.91 +- 0.04
    QK-norm                         1.13      1.29      1.94      3.08   0.73 +- 0.29
    z-loss 1e-4                     1.05      1.33      3.48      4.17   1.27 +- 0.19
    softcap 50 in attention         1.05      1.26      3.17      3.94   1.19 +- 0.38
    embedding gradient / 10         1.05      1.31      3.29      4.26   1.22 +- 0.32
    StableAdamW                     1.06      1.31      3.42      4.26   1.24 +- 0.21
    SPAM                            1.05      1.29      3.51      4.21   1.27 +- 0.12
    QK-norm, warmup, clip           1.11      1.17      1.42      1.97   0.31 +- 0.04

    6 poisoned batches: loss 2.127 without a guard, 1.011 with, 1.006 had they never been there
      step 90, batch 90: skip: loss 5.699 after a recent 1.143, which strays by 0.123
      step 90, batch 94: rewind: 5 steps in a row skipped, the last: loss 5.804 after a recent
        1.143, which strays by 0.123
      batches left out: [90, 91, 92, 93, 94, 95]

    after 60 steps at lr 0.1: largest attention logit, mean entropy of attention
      plain       899.3     0.02 nats
      QK-norm       3.9     1.55 nats
    looking costs 47% of a step, one in 100: 0.5%
    ok: QK-norm with warmup leaves a quarter of the sensitivity, clipping alone all of it
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import random
import statistics
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Clipping: how long the gradient may be


def named_gradients(parameters) -> list[tuple[str, Tensor]]:
    """The gradients that are there, each with a name to report it by.

    Args: parameters: a tensor, tensors, or pairs (name, tensor) as from model.named_parameters().
    """
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    named = []
    for i, p in enumerate(parameters):
        name, p = p if isinstance(p, tuple) else (f"parameter {i} of shape {tuple(p.shape)}", p)
        if p.grad is not None and p.grad.numel():
            named.append((name, p.grad))
    return named


def nonfinite_gradients(parameters) -> list[str]:
    """Names of the parameters whose gradient holds an infinity or a NaN."""
    return [name for name, g in named_gradients(parameters) if not g.isfinite().all()]


def total_norm(gradients: list[Tensor], norm_type: float = 2.0) -> Tensor:
    """Norm of all gradients taken as one vector: () float64.

    In float64 the squares of float16 and float32 numbers cannot overflow. In their own type
    4 numbers of 60,000 (float16) or 128 of 1e19 (float32) have the norm infinity, and torch's
    max_norm / infinity sets every gradient to 0 without a word.
    """
    if not gradients:
        return torch.zeros((), dtype=torch.float64)
    wide = {"dtype": torch.float64}
    norms = [torch.linalg.vector_norm(g, norm_type, **wide) for g in gradients]
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]), norm_type)


@torch.no_grad()
def clip_grad_norm_(
    parameters,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    nonfinite: str = "skip",
) -> Tensor:
    """Scales all gradients by min(1, max_norm / (norm + 1e-6)); returns the norm before: float64.

    As torch.nn.utils.clip_grad_norm_, but for numbers that are not finite. There torch turns one
    infinite entry into a NaN and all the others into 0, and one NaN into NaN everywhere. Here

        error_if_nonfinite=True    RuntimeError with the names of the parameters
        nonfinite="skip"           gradients stay as they are and the norm comes out infinite or
                                   NaN: leave the step out, as SpikeGuard would
        nonfinite="zero"           the entries that are not finite become 0, a warning names the
                                   parameters, and the norm is that of the rest

    Args:
        parameters: a tensor, tensors, or pairs (name, tensor), which give the names.
        max_norm: longest gradient; math.inf clips nothing.
    With "skip" nothing is read back from the device.
    """
    if not max_norm >= 0:
        raise ValueError(f"max_norm={max_norm} must be at least 0; math.inf clips nothing")
    if nonfinite not in ("skip", "zero"):
        raise ValueError(f"nonfinite={nonfinite!r} must be 'skip' or 'zero'")
    named = named_gradients(parameters)
    gradients = [g for _, g in named]
    norm = total_norm(gradients, norm_type)
    if (error_if_nonfinite or nonfinite == "zero") and not norm.isfinite():
        names = ", ".join(name for name, g in named if not g.isfinite().all())
        if error_if_nonfinite:
            raise RuntimeError(f"gradient not finite in {names}; leave the step out")
        warnings.warn(f"gradient not finite in {names}: those entries set to 0", stacklevel=2)
        for g in gradients:
            g.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        norm = total_norm(gradients, norm_type)
    coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    coefficient = torch.where(norm.isfinite(), coefficient, 1.0)
    for g in gradients:
        g.mul_(coefficient.to(g.device))
    return norm


@torch.no_grad()
def clip_grad_value_(parameters, clip_value: float) -> None:
    """Cuts every entry of every gradient to [-clip_value, clip_value]; the direction changes."""
    for _, g in named_gradients(parameters):
        g.clamp_(-clip_value, clip_value)


def unit_norms(x: Tensor) -> Tensor:
    """Norm of each output row of a weight, broadcastable to it; of all of a gain or a bias."""
    if x.ndim <= 1:
        return torch.linalg.vector_norm(x)
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)


@torch.no_grad()
def adaptive_clip_(parameters: Iterable[Tensor], clipping: float = 0.01, eps: float = 1e-3) -> None:
    """AGC: cuts each row's gradient to `clipping` times the row's own norm (at least eps).

    Hand over all parameters but the last layer's, as the paper does.
    """
    for p in [parameters] if isinstance(parameters, Tensor) else parameters:
        if p.grad is not None:
            limit = clipping * unit_norms(p).clamp(min=eps)
            norm = unit_norms(p.grad).clamp(min=1e-6)
            p.grad.mul_((limit / norm).clamp(max=1.0))


class AutoClip:
    """max_norm for the next clipping: a percentile of all norms so far, this one included."""

    def __init__(self, percentile: float = 10.0):  # 10: the paper's
        self.percentile = percentile
        self.norms: list[float] = []

    def max_norm(self, norm: float) -> float:
        if math.isfinite(norm):  # one NaN would stay in every percentile
            self.norms.append(norm)
        return float(np.percentile(self.norms, self.percentile)) if self.norms else math.inf


class ZClip:
    """max_norm for the next clipping: a norm that stands out is cut, the more the farther.

    mean, var   moving averages of the norm, learnt from the norms after clipping
    z           (norm - mean) / sd; above z_limit the norm becomes mean + z_limit sd / (z / z_limit)

    The first `warmup` norms are only collected. The authors add a fixed limit of 1.0: take the
    minimum of the two.
    """

    def __init__(self, decay: float = 0.97, z_limit: float = 2.5, warmup: int = 25):
        self.decay, self.z_limit, self.warmup = decay, z_limit, warmup
        self.first: list[float] = []
        self.mean = self.var = 0.0

    def max_norm(self, norm: float) -> float:
        if not math.isfinite(norm):  # nothing to learn from
            return self.mean or math.inf
        if len(self.first) < self.warmup:
            self.first.append(norm)
            self.mean = statistics.fmean(self.first)
            self.var = statistics.pvariance(self.first)
            return norm
        sd = math.sqrt(self.var)
        z = (norm - self.mean) / (sd + 1e-6)
        if z > self.z_limit:
            norm = self.mean + self.z_limit * sd / (z / self.z_limit)
        self.mean = self.decay * self.mean + (1 - self.decay) * norm
        self.var = self.decay * self.var + (1 - self.decay) * (norm - self.mean) ** 2
        return norm


# Spikes: notice one before the update, and skip it or go back

RECENT = 16  # accepted steps that say what the next one should be like
TINY = 1e-30  # stands for a norm of 0 where it is divided by, or its logarithm is wanted
GUARD_STATE = ("losses", "log_norms", "targets", "skips", "best")


class Verdict(NamedTuple):
    """What to do with a step, and why in words."""

    action: str  # "go", "skip" or "rewind"
    reason: str


def center_and_spread(values: list[float]) -> tuple[float, float]:
    """Where the next of a series of numbers is to be expected, and how far it usually strays.

    The center is the median of the newest RECENT values, the spread comes from the differences of
    neighbours by their median absolute deviation: so neither minds a trend or single outliers,
    and a falling loss does not look noisy. For independent normal noise it is the sd.
    """
    steps = [b - a for a, b in zip(values, values[1:])]
    middle = statistics.median(steps)
    mad = statistics.median(abs(x - middle) for x in steps)
    # 1.4826: sd over MAD of a normal; sqrt 2: a difference has twice the variance of its parts
    return statistics.median(values[-RECENT:]), 1.4826 * mad / math.sqrt(2)


class SpikeGuard:
    """Judges each step by its loss and gradient norm, before the update that would do the harm.

    A step is a spike where its loss, or the logarithm of its gradient norm, lies above the recent
    ones by more than `threshold` spreads and by more than a margin; a fall is never one. Steps
    that are let through make up the window, so a spike does not widen what is usual.

        "go"      take the step
        "skip"    leave it out: a spike, or a number that is not finite
        "rewind"  go back to a checkpoint and leave out the data since: `patience` skips in a row,
                  or the median of the recent losses has settled above the best that it was, by
                  more than `loss_margin` and half of `threshold` spreads

    Args:
        window: steps looked back on, as in OLMo-core's SkipStepOptimizer.
        warmup: steps accepted before the first judgement (a number that is not finite is judged
            always).
        threshold, loss_margin (nats), norm_ratio: measured on three healthy runs of 06_train.py,
            with 8 rows a step, with 1, and with 1 row of 32 tokens, 3600 steps in all, `targets`
            handed over: no alarm. The loss never strayed by more than 5.5 spreads, and 6 is
            OLMo-core's number too. The gradient norm, whose tail is heavy, did by 19, up to 10.2
            times the recent. A loss put in at ln V + 1 to 2 nats, as shuffled labels give, was
            noticed 301 times of 301 in the first two runs; in the third, where good batches stray
            by 2.4 nats, 342 of 395.
        patience: skips in a row that ask for a rewind.
    The constants suppose that a loss is a mean over a number of targets that varies little. Where
    it does not, hand the number to `judge`. And they suppose shuffled data: of batches that are now
    of one kind and now of another, a kind that is rare and harder is taken for a spike and left
    out, and a lasting rise of the level for a run that went wrong. Whoever goes back to a
    checkpoint puts the guard's state back as well.
    """

    def __init__(
        self,
        window: int = 128,
        warmup: int = 20,
        threshold: float = 6.0,
        loss_margin: float = 0.5,
        norm_ratio: float = 20.0,
        patience: int = 5,
    ):
        if not RECENT <= warmup <= window:
            raise ValueError(f"warmup={warmup} must be at least {RECENT}, at most window={window}")
        if not (threshold > 0 and loss_margin >= 0 and norm_ratio >= 1 and patience >= 1):
            raise ValueError(
                f"threshold={threshold}, loss_margin={loss_margin}, norm_ratio={norm_ratio}, "
                f"patience={patience} must be more than 0, at least 0, at least 1, at least 1"
            )
        self.window, self.warmup, self.threshold = window, warmup, threshold
        self.loss_margin, self.norm_ratio, self.patience = loss_margin, norm_ratio, patience
        self.losses: list[float] = []  # of the newest accepted steps, at most `window`
        self.log_norms: list[float] = []
        self.targets: list[int] = []
        self.skips = 0  # in a row
        self.best = math.inf  # the lowest that the median of RECENT accepted losses has been

    def judge(self, loss: float, grad_norm: float, targets: int = 1) -> Verdict:
        """The verdict on a step whose gradient is there and whose update is not.

        Args:
            loss: nats/token, of this step's batch.
            grad_norm: before clipping.
            targets: tokens that the loss is a mean of. A mean of n strays by 1/sqrt(n): a batch
                that is shorter than usual is given that much more room.
        """
        why = self._spike(loss, grad_norm, targets)
        if why:
            self.skips += 1
            if self.skips < self.patience:
                return Verdict("skip", why)
            self.skips = 0
            return Verdict("rewind", f"{self.patience} steps in a row skipped, the last: {why}")
        self.skips = 0
        self.losses = [*self.losses, loss][-self.window :]
        self.log_norms = [*self.log_norms, math.log(max(grad_norm, TINY))][-self.window :]
        self.targets = [*self.targets, targets][-self.window :]
        if len(self.losses) >= self.warmup:
            level = statistics.median(self.losses[-RECENT:])
            self.best = min(self.best, level)
            _, spread = center_and_spread(self.losses)
            limit = max(self.loss_margin, self.threshold / 2 * spread)
            if level > self.best + limit:
                why = f"the loss has settled at {level:.3f} after a best of {self.best:.3f} nats"
                self.best = level  # or it would be said again at each step
                return Verdict("rewind", why)
        return Verdict("go", "as usual")

    def _spike(self, loss: float, grad_norm: float, targets: int) -> str | None:
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                return f"{name} {value}"
        if len(self.losses) < self.warmup:
            return None
        room = math.sqrt(max(1.0, statistics.median(self.targets) / max(targets, 1)))
        center, spread = center_and_spread(self.losses)
        if loss - center > room * max(self.loss_margin, self.threshold * spread):
            return f"loss {loss:.3f} after a recent {center:.3f}, which strays by {spread:.3f}"
        center, spread = center_and_spread(self.log_norms)
        excess = math.log(max(grad_norm, TINY)) - center
        if excess > room * max(math.log(self.norm_ratio), self.threshold * spread):
            return (
                f"gradient norm {grad_norm:.3g} is {math.exp(excess):.1f} times the recent "
                f"{math.exp(center):.3g}, which strays by a factor of {math.exp(spread):.2f}"
            )
        return None

    def state_dict(self) -> dict:
        """Plain numbers and lists, for a checkpoint: what has been seen, not the settings."""
        return {name: copy.copy(getattr(self, name)) for name in GUARD_STATE}

    def load_state_dict(self, state: dict) -> None:
        for name in GUARD_STATE:
            setattr(self, name, copy.copy(state[name]))


def random_states() -> dict:
    """Where all random number generators stand: torch's on the CPU and on GPUs, numpy's, Python's.

    Tensors and tuples in memory; for a checkpoint read with weights_only=True keep torch's alone.
    """
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }


def restore_random_states(states: dict) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])


def train_with_rewind(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Callable[[int], tuple[Tensor, Tensor]],
    loss_of: Callable[[nn.Module, Tensor, Tensor], Tensor],
    steps: int,
    guard: SpikeGuard,
    *,
    max_norm: float = 1.0,
    keep_every: int = 10,
    keep: int = 4,
    skip_ahead: int = 0,
    max_rewinds: int = 10,
) -> tuple[list[int], list[str]]:
    """A training loop that survives bad batches; returns the batches it learnt from, and its log.

    `step` counts updates and `cursor` batches, and they part for good at the first batch left out.
    Model, optimiser, generators and guard after it are, bit for bit, those of a run whose data
    never held that batch. (Not so the running statistics of a batch norm, which a forward pass
    changes: a model that has them needs a rewind where this loop only skips.)

    Args:
        batch: number of a batch -> x, y; a pure function.
        keep_every, keep: a copy of everything each so many steps; so many of them. PaLM went back
            about 100 steps. A rewind takes the newest, and uses it up: if that was already bad, the
            next goes further back.
        skip_ahead: batches left out beyond those since the copy; PaLM left out 200 to 500 in all.
    Raises: RuntimeError after `max_rewinds`: then it is not the data.
    """
    kept: deque[dict] = deque(maxlen=keep)
    used: list[int] = []
    log: list[str] = []
    cursor, rewinds, resumed_at = 0, 0, -1
    while len(used) < steps:
        step = len(used)
        states = random_states()
        if step % keep_every == 0 and step != resumed_at:
            whole = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            whole |= {"guard": guard.state_dict(), "random": states, "used": used}
            kept.append(copy.deepcopy(whole))
        x, y = batch(cursor)
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        norm = clip_grad_norm_(model.parameters(), max_norm)
        verdict = guard.judge(loss.item(), norm.item())
        cursor += 1
        if verdict.action == "go":
            optimizer.step()
            used.append(cursor - 1)
            continue
        log.append(f"step {step}, batch {cursor - 1}: {verdict.action}: {verdict.reason}")
        restore_random_states(states)  # dropout drew numbers for this batch
        if verdict.action == "rewind":
            rewinds += 1
            if rewinds > max_rewinds:
                raise RuntimeError(f"{rewinds} rewinds; the last: {log[-1]}; lower the rate")
            back = kept.pop() if len(kept) > 1 else copy.deepcopy(kept[0])
            model.load_state_dict(back["model"])
            optimizer.load_state_dict(back["optimizer"])
            guard.load_state_dict(back["guard"])
            restore_random_states(back["random"])
            used = back["used"]
            resumed_at = len(used)  # not copied again: the next rewind is to go further back
            cursor += skip_ahead
    return used, log


# Remedies: each a small piece, to be put where its name says


def z_loss(logits: Tensor, coefficient: float = 1e-4) -> Tensor:
    """coefficient * mean(logsumexp(logits)^2), to be added to the loss; 1e-4: PaLM.

    Keeps the normaliser near 1. Its gradient in the logits is 2 coefficient lse softmax / N.
    """
    return coefficient * logits.logsumexp(-1).square().mean()


def softcap(x: Tensor, cap: float) -> Tensor:
    """cap tanh(x / cap): x where small, never beyond cap. Gemma 2: attention 50, logits 30."""
    return cap * torch.tanh(x / cap)


def shrink_gradient(x: Tensor, share: float = 0.1) -> Tensor:
    """x, but only `share` of the gradient goes back through it; 0.1: GLM-130B, on embeddings."""
    return x * share + x.detach() * (1 - share)


def rms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x over its root mean square. On queries and keys (QK-norm): logits stay below sqrt(D)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def warmup(step: int, steps: int) -> float:
    """Multiplier of the rate: 1/steps at step 0, then up to 1. Adam's first v is a poor guess."""
    return min(1.0, (step + 1) / max(steps, 1))


def update_rms(g: Tensor, v_hat: Tensor, eps: float) -> Tensor:
    """Root mean square of g / sqrt(v_hat), at least 1: how far v lags behind a sudden gradient."""
    return (g.square() / v_hat.clamp(min=eps**2)).mean().sqrt().clamp(min=1.0)


def cut_spikes(g: Tensor, v: Tensor, threshold: float) -> Tensor:
    """g with each entry cut to sqrt(threshold * v): SPAM's test g^2 > threshold v."""
    limit = (threshold * v).sqrt()
    return torch.where(g.square() > threshold * v, g.sign() * limit, g)


class StableAdamW(torch.optim.Optimizer):
    """AdamW whose rate is divided, tensor by tensor, by update_rms: it never outruns its own v."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=1e-2):
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {"step": 0, "exp_avg": torch.zeros_like(p)}
                    state["exp_avg_sq"] = torch.zeros_like(p)
                state["step"] += 1
                m = state["exp_avg"].lerp_(p.grad, 1 - beta1)
                v = state["exp_avg_sq"].lerp_(p.grad.square(), 1 - beta2)
                m_hat = m / (1 - beta1 ** state["step"])
                v_hat = v / (1 - beta2 ** state["step"])
                lr = group["lr"] / update_rms(p.grad, v_hat, group["eps"])
                p.mul_(1 - lr * group["weight_decay"])
                p.sub_(lr * m_hat / (v_hat.sqrt() + group["eps"]))


class SPAM(torch.optim.Optimizer):
    """Adam that cuts spikes out of the gradient and, every so often, forgets its moments.

    A spike leaves its trace in m and v for hundreds of steps. Every `reset_every` steps both are
    set to 0 and the rate warms up again along a cosine, from about 1/100 over `warmup` steps.
    Spikes are cut from `settle` steps after a reset on, when v means something again. No weight
    decay; constants as in the reference, whose bias correction is not restarted by a reset.
    """

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6,
        threshold=5000.0, reset_every=500, warmup=50, settle=20,
    ):  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "steps": 0})
        self.threshold, self.reset_every = threshold, reset_every
        self.warmup, self.settle = warmup, settle

    @torch.no_grad()
    def step(self) -> None:
        steps = self.param_groups[0]["steps"] + 1  # in a group, so that state_dict holds it
        since = steps % self.reset_every  # steps since the last reset
        scale = 1.0
        if steps >= self.reset_every and since < self.warmup:
            angle = math.pi * (since + 1) / (self.warmup + 1)
            scale = 1 - 0.99 * 0.5 * (1 + math.cos(angle))
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            group["steps"] = steps
            correction = math.sqrt(1 - beta2**steps) / (1 - beta1**steps)
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state or since == 0:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                g = p.grad
                if since >= self.settle:
                    g = cut_spikes(g, state["exp_avg_sq"], self.threshold)
                m = state["exp_avg"].lerp_(g, 1 - beta1)
                v = state["exp_avg_sq"].lerp_(g.square(), 1 - beta2)
                p.sub_(group["lr"] * scale * correction * m / (v.sqrt() + group["eps"]))


class LossScaler:
    """Keeps float16 gradients from vanishing; the rule and the constants of torch.amp.GradScaler.

    float16 has nothing between 0 and 6e-8. The loss is multiplied by `scale_now` before the
    backward pass and the gradients, in float32, are divided by it after. If they are not finite
    the step is left out and the scale is halved; `interval` good steps in a row double it. For one
    optimiser: a second one wants a scaler of its own.

        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)      # only where something stands between: clipping, a log
        clip_grad_norm_(...)
        stepped = scaler.step(optimizer)
    """

    def __init__(
        self,
        scale: float = 2.0**16,
        growth: float = 2.0,
        backoff: float = 0.5,
        interval: int = 2000,
    ):
        self.scale_now, self.growth, self.backoff, self.interval = scale, growth, backoff, interval
        self.good = 0  # steps in a row since the scale last changed
        self.finite: bool | None = None  # of the gradients, once they are unscaled

    def scale(self, loss: Tensor) -> Tensor:
        return loss * self.scale_now

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides the gradients by the scale. Raises: ValueError for float16 gradients."""
        if self.finite is not None:
            raise RuntimeError("the gradients are unscaled already; call step before the next time")
        self.finite = True
        for p in itertools.chain.from_iterable(g["params"] for g in optimizer.param_groups):
            if p.grad is None:
                continue
            if p.grad.dtype == torch.float16:
                raise ValueError("a gradient is float16 and must be float32; use autocast")
            p.grad.div_(self.scale_now)
            self.finite &= bool(p.grad.isfinite().all())

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Takes the step if the gradients are finite, adapts the scale; returns whether it did."""
        if self.finite is None:
            self.unscale_(optimizer)
        finite, self.finite = self.finite, None
        if not finite:
            self.scale_now *= self.backoff
            self.good = 0
            return False
        optimizer.step()
        self.good += 1
        if self.good == self.interval:
            if math.isfinite(self.scale_now * self.growth):
                self.scale_now *= self.growth
            self.good = 0
        return True


# Monitors: one step in N is looked at from the inside


class AttentionScores(nn.Identity):
    """Stands where the logits of attention pass, masked with -inf, so that a hook can see them."""


def module_report(report: dict, name: str, module: nn.Module, out: Tensor) -> None:
    """Adds to the report what the output of one module tells."""
    out = out.detach().float()
    if isinstance(module, AttentionScores):  # (B, H, T, T)
        p = out.softmax(-1)
        report["attention_max_logit"][name] = out.max().item()
        report["attention_entropy"][name] = torch.special.entr(p).sum(-1).mean().item()
        return
    report["activation_rms"][name] = out.square().mean().sqrt().item()
    if isinstance(module, nn.ReLU):  # a unit that is 0 for every token of the batch
        report["dead_units"][name] = (out <= 0).flatten(0, -2).all(0).float().mean().item()


@contextlib.contextmanager
def watch(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[dict]:
    """Fills a report on the training step that is done inside; leaves no hook behind.

        with watch(model, optimizer) if step % 100 == 0 else contextlib.nullcontext() as report:
            ...  # forward, backward, optimizer.step()

    By module: activation_rms; attention_max_logit and attention_entropy (nats) of AttentionScores;
    dead_units, a share, of nn.ReLU. By parameter: gradient_norm as the optimiser gets it (after
    clipping), weight_norm, update_ratio = |change| / |weight|, about 1e-3 in a healthy run, and
    adam_floor, the share of entries whose sqrt(v) is below eps, so that eps sets their step.
    """
    names = ("activation_rms", "attention_max_logit", "attention_entropy", "dead_units")
    names += ("gradient_norm", "weight_norm", "update_ratio", "adam_floor")
    report: dict[str, dict[str, float]] = {name: {} for name in names}
    before: dict[str, Tensor] = {}

    def forward(name):
        def hook(module, _, out):
            if isinstance(out, Tensor) and out.is_floating_point():
                module_report(report, name, module, out)

        return hook

    def before_step(*_):
        for name, p in model.named_parameters():
            if p.grad is not None:
                before[name] = p.detach().clone()
                report["gradient_norm"][name] = p.grad.norm().item()

    def after_step(*_):
        eps = optimizer.param_groups[0].get("eps", 0.0)
        for name, p in model.named_parameters():
            if name in before:
                norm = before[name].norm().item()
                report["weight_norm"][name] = norm
                change = (p.detach() - before[name]).norm().item()
                report["update_ratio"][name] = change / max(norm, TINY)
                v = optimizer.state.get(p, {}).get("exp_avg_sq")
                if v is not None:
                    low = v.sqrt() < eps
                    report["adam_floor"][name] = low.float().mean().item()

    hooks = [m.register_forward_hook(forward(name)) for name, m in model.named_modules() if name]
    hooks.append(optimizer.register_step_pre_hook(before_step))
    hooks.append(optimizer.register_step_post_hook(after_step))
    try:
        yield report
    finally:
        for hook in hooks:
            hook.remove()


# A tiny GPT and a language of known entropy, for the doctor's examples and the demo


class Block(nn.Module):
    def __init__(
        self, width: int, heads: int, dropout: float, qk_norm: bool, score_cap: float | None
    ):
        super().__init__()
        self.heads, self.qk_norm, self.score_cap = heads, qk_norm, score_cap
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.scores = AttentionScores()
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.act = nn.ReLU()
        self.down = nn.Linear(4 * width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        B, T, C = x.shape
        qkv = self.qkv(rms_norm(x)).view(B, T, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if self.qk_norm:
            q, k = rms_norm(q), rms_norm(k)
        scores = q @ k.transpose(-1, -2) / math.sqrt(C // self.heads)  # (B, H, T, T)
        if self.score_cap:
            scores = softcap(scores, self.score_cap)
        scores = self.scores(scores.masked_fill(mask[:T, :T], -math.inf))
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C)
        x = x + self.dropout(self.out(mixed))
        return x + self.dropout(self.down(self.act(self.up(rms_norm(x)))))


class TinyGPT(nn.Module):
    """Pre-norm transformer: ids (B, T) -> logits (B, T, V). `embed_share`: see shrink_gradient."""

    def __init__(
        self,
        vocab_size: int = 32,
        seq_len: int = 32,
        width: int = 32,
        heads: int = 2,
        layers: int = 1,
        dropout: float = 0.0,
        qk_norm: bool = False,
        score_cap: float | None = None,
        embed_share: float = 1.0,
    ):
        super().__init__()
        self.embed_share = embed_share
        self.embedding = nn.Embedding(vocab_size, width)
        self.position = nn.Embedding(seq_len, width)
        self.blocks = nn.ModuleList(
            Block(width, heads, dropout, qk_norm, score_cap) for _ in range(layers)
        )
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.register_buffer("mask", torch.ones(seq_len, seq_len, dtype=torch.bool).triu(1))
        for p in self.parameters():
            # half of what keeps the variance: a loss near ln V at first
            nn.init.normal_(p, std=0.5 / math.sqrt(p.shape[1]))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids) + self.position.weight[: ids.shape[1]]  # (B, T, C)
        h = shrink_gradient(h, self.embed_share)
        for block in self.blocks:
            h = block(h, self.mask)
        return self.head(rms_norm(h))  # (B, T, V)


LAG, NOISE, V, T = 3, 0.1, 32, 32  # of the language below


def echo_batches(count: int, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` batches of a language: each token repeats the one LAG before, or is drawn anew.

    Returns: x, y, both (count, rows, T) int64.
    """
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(V, (count, rows, T + 1), generator=g)
    echo = torch.rand(count, rows, T + 1, generator=g) >= NOISE
    for t in range(LAG, T + 1):
        ids[..., t] = torch.where(echo[..., t], ids[..., t - LAG], ids[..., t])
    return ids[..., :-1].clone(), ids[..., 1:].clone()  # apart: neither is changed with the other


def echo_floor() -> float:
    """Least possible loss, nats/token: targets 1 .. LAG-1 cannot be known, the rest are echoes."""
    right = 1 - NOISE + NOISE / V
    wrong = NOISE / V
    entropy = -right * math.log(right) - (V - 1) * wrong * math.log(wrong)
    return ((LAG - 1) * math.log(V) + (T - LAG + 1) * entropy) / T


# The doctor: what is wrong with this training run?


class Run(Protocol):
    """What `diagnose` needs to know of a training run: five methods, no base class.

        class MyRun:
            def make_model(self, seed):          # module: ids (B, T) -> logits (B, T, V)
                torch.manual_seed(seed)
                return GPT(config)
            def make_optimizer(self, model):
                return torch.optim.AdamW(model.parameters(), lr=3e-4)
            def batch(self, number):             # x, y (B, T) int64, y one token ahead; < 0: none
                return source.batch(number)
            def train_step(self, model, optimizer, x, y):
                loss = cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                return loss
            def evaluate(self, model, x, y):     # as in validation; returns the loss
                ...

        for finding in diagnose(MyRun()):
            print(finding.name, "-", finding.message)

    train_step is a whole step, accumulation included, and depends on nothing but its arguments; a
    schedule belongs outside. Write the five with the lines of your own script, not anew: what is
    written anew for the doctor is what the doctor examines.
    """

    def make_model(self, seed: int) -> nn.Module: ...
    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer: ...
    def batch(self, number: int) -> tuple[Tensor, Tensor]: ...
    def train_step(self, model, optimizer, x: Tensor, y: Tensor) -> Tensor | float: ...
    def evaluate(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor | float: ...


class Finding(NamedTuple):
    name: str
    message: str


def nats(logits: Tensor, y: Tensor, reduction: str = "mean") -> float:
    """Cross-entropy as it should be: logits (B, T, V), y (B, T), places with y < 0 left out."""
    logits, y = logits.detach().float().flatten(0, -2), y.flatten()
    return F.cross_entropy(logits[y >= 0], y[y >= 0], reduction=reduction).item()


def agreement(a: Tensor, b: Tensor) -> float:
    """Share of places where two id tensors agree; places that are negative in a do not count."""
    counted = a >= 0
    return ((a == b) & counted).sum().item() / max(counted.sum().item(), 1)


@torch.no_grad()
def logits_of(model: nn.Module, x: Tensor, training: bool = False) -> Tensor:
    """The model's logits in the mode asked for; its mode afterwards is that of before."""
    before = model.training
    model.train(training)
    out = model(x)
    model.train(before)
    return out


def check_batches(run: Run) -> Iterator[Finding]:
    (x, y), (other, _) = run.batch(0), run.batch(1)
    if x.shape == other.shape and torch.equal(x, other):
        yield Finding("same batch", "batches 0 and 1 are equal: the data does not move on")
    if agreement(y[:, :-1], x[:, 1:]) > 0.9:  # rows put together from parts may have a few seams
        return
    if agreement(y, x) > 0.9:
        what = "they are the inputs themselves: the model need only copy"
    elif agreement(y[:, :-2], x[:, 2:]) > 0.9:
        what = "they are two tokens ahead: shifted once too often"
    else:
        what = f"{agreement(y[:, :-1], x[:, 1:]):.0%} of them are: rows or places got mixed up"
    yield Finding("targets", f"y[:, t] should be x[:, t + 1], but {what}")


def check_seeds(run: Run) -> Iterator[Finding]:
    first, again, other = (list(run.make_model(seed).parameters()) for seed in (0, 0, 1))
    if not all(torch.equal(a, b) for a, b in zip(first, again)):
        yield Finding("seeds", "seed 0 twice gives two models: something is drawn before the seed")
    if all(torch.equal(a, b) for a, b in zip(first, other)):
        yield Finding("seeds", "seeds 0 and 1 give the same model: the seed is not used")


def check_init(run: Run) -> Iterator[Finding]:
    x, y = run.batch(0)
    logits = logits_of(run.make_model(0), x)
    loss, expected = nats(logits, y), math.log(logits.shape[-1])
    # a sound start is within 0.1 or so; a model that is sure of wrong answers is far above
    if abs(loss - expected) > 0.5:
        yield Finding(
            "loss at init",
            f"{loss:.2f} nats, and ln V = {expected:.2f} were to be expected: logits are as large "
            f"as {logits.abs().max().item():.1f}; scale the initial weights down",
        )


def check_modes(run: Run) -> Iterator[Finding]:
    """Dropout on in training, off in evaluation, and on again afterwards."""
    x, y = run.batch(0)
    model = run.make_model(0)
    optimizer = run.make_optimizer(model)
    torch.manual_seed(0)
    one = logits_of(model, x, training=True)
    if torch.equal(one, logits_of(model, x)):
        return  # no part of this model knows the difference
    seen: list[bool] = []
    hook = model.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    run.train_step(model, optimizer, x, y)
    first = list(seen)
    seen.clear()
    run.evaluate(model, x, y)
    evaluating = list(seen)
    seen.clear()
    run.train_step(model, optimizer, x, y)
    hook.remove()
    if not all(first):
        yield Finding("train/eval mode", "train_step runs in eval mode: call model.train()")
    elif not all(seen):
        yield Finding("train/eval mode", "evaluate leaves eval mode on: call model.train() after")
    if any(evaluating):
        yield Finding("train/eval mode", "evaluate runs in train mode: call model.eval()")


def check_numbers(run: Run) -> Iterator[Finding]:
    """No module puts out NaN or +inf; -inf may be a mask."""
    x, y = run.batch(0)
    model = run.make_model(0)
    bad: list[str] = []

    def hook(name):
        def look(module, _, out):
            if isinstance(out, Tensor) and out.is_floating_point():
                if not bad and (out.isnan() | (out == math.inf)).any():
                    bad.append(f"{name} ({type(module).__name__}, {out.dtype})")

        return look

    hooks = [m.register_forward_hook(hook(name)) for name, m in model.named_modules()]
    run.train_step(model, run.make_optimizer(model), x, y)
    for h in hooks:
        h.remove()
    if bad:
        yield Finding("overflow", f"the first output that is not finite is that of {bad[0]}")


def check_gradients(run: Run) -> Iterator[Finding]:
    """In three steps a gradient reaches each parameter, and the optimiser moves it."""
    model = run.make_model(0)
    optimizer = run.make_optimizer(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    reached: set[str] = set()

    def hook(name):
        def note(g):
            if g.count_nonzero():
                reached.add(name)

        return note

    hooks = [p.register_hook(hook(name)) for name, p in trained.items()]
    for number in range(3):  # behind a matrix that starts at 0 the first gradient is 0
        run.train_step(model, optimizer, *run.batch(number))
    for h in hooks:
        h.remove()
    cut_off = [name for name in trained if name not in reached]
    if cut_off:
        yield Finding(
            "no gradient",
            f"none reaches {listed(cut_off)}: look for detach(), no_grad() or .data after it",
        )
    still = [name for name in reached if torch.equal(before[name], trained[name])]
    if still:
        yield Finding(
            "not updated",
            f"a gradient reaches {listed(still)} but no step moves it: it is not in the optimiser",
        )


def listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + more


def check_zero_grad(run: Run) -> Iterator[Finding]:
    """A second step must not depend on whether someone cleared the gradients before it."""
    start, ends = run.make_model(0), []
    for clear in (False, True):
        model = copy.deepcopy(start)
        optimizer = run.make_optimizer(model)
        for number in range(2):
            torch.manual_seed(number)  # the same dropout both times
            run.train_step(model, optimizer, *run.batch(number))
            if clear:
                model.zero_grad()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    if not torch.allclose(*ends, rtol=1e-5, atol=1e-8, equal_nan=True):
        what = "gradients of earlier steps are still in p.grad: call optimizer.zero_grad()"
        yield Finding("zero_grad", what)


def overfit(run: Run, steps: int, rate_times: float = 1.0) -> tuple[nn.Module, float]:
    """A model trained on two rows alone, the rate multiplied, and its loss on them afterwards."""
    x, y = (t[:2] for t in run.batch(0))
    model = run.make_model(0)
    optimizer = run.make_optimizer(model)
    for group in optimizer.param_groups:
        group["lr"] *= rate_times
    torch.manual_seed(0)
    for _ in range(steps):
        run.train_step(model, optimizer, x, y)
    loss = nats(logits_of(model, x), y)
    return model, loss if math.isfinite(loss) else math.inf


def check_overfit(run: Run, steps: int, start: float, end: float) -> Iterator[Finding]:
    """Two rows can be learnt by heart. If they are not: does another rate do it? Then it is that.

    Args: start, end: loss on them before and after `steps` steps at the rate as it is.
    """
    if not math.isfinite(start):
        return
    seen = f"after {steps} steps on two rows the loss is {end:.3f}, from {start:.3f}"
    # a small enough step against the gradient always lowers the loss: how small may it have to be?
    for divisor in (10, 100, 1000):
        _, lower = overfit(run, steps, 1 / divisor)
        if lower < start + 1e-3:
            break
    else:
        what = f"{seen}; at a thousandth of the rate it rises too: {lower:.3f}"
        yield Finding("wrong sign", what)
        return
    if lower < end - 0.5:  # the slower learner is ahead
        yield Finding("rate too high", f"{seen}; at 1/{divisor} of the rate it is {lower:.3f}")
    elif end > start / 2:
        _, higher = overfit(run, steps, 100)
        if higher < end - 0.1:
            yield Finding("rate too low", f"{seen}; at 100 times the rate it is {higher:.3f}")
        else:
            what = f"{seen}; at 1/{divisor} of the rate {lower:.3f}, at 100 times {higher:.3f}"
            yield Finding("does not overfit", what)


def check_loss(run: Run, model: nn.Module) -> Iterator[Finding]:
    """What train_step and evaluate call the loss is the cross-entropy of the model's logits.

    Where it is not, known mistakes are tried; a loss that fits none of them (label smoothing, a
    term added) passes. `model` should be a trained one: at init all mistakes look alike.
    """
    x, y = run.batch(0)
    logits = logits_of(model, x)
    rows = logits.detach().float()
    if (rows >= 0).all() and torch.allclose(rows.sum(-1), torch.ones(()), atol=1e-3):
        yield Finding("softmax twice", "the model puts out probabilities; the loss wants logits")
        return
    if not rows.isfinite().all():
        return
    for where in ("evaluate", "train_step"):
        twin = copy.deepcopy(model)
        if where == "evaluate":
            reported = float(run.evaluate(twin, x, y))
        else:
            torch.manual_seed(0)
            rows = logits_of(twin, x, training=True)  # the same dropout as in the step
            torch.manual_seed(0)
            reported = float(run.train_step(twin, run.make_optimizer(twin), x, y))
        known = {
            None: nats(rows, y),
            "softmax twice": nats(rows.softmax(-1), y),
            "wrong sign": -nats(rows, y),
            "summed loss": nats(rows, y, "sum"),
            "shifted twice": nats(rows[:, :-1], y[:, 1:]),
        }
        apart = {name: abs(value - reported) for name, value in known.items()}
        name = min(apart, key=apart.get)
        if name and apart[name] < 0.01 * abs(reported) < apart[None]:
            yield Finding(
                name,
                f"{where} reports {reported:.3f}, as this mistake would; it should be "
                f"{known[None]:.3f}, the mean of -ln softmax(logits)[y]",
            )
            return


def check_leaks(run: Run, model: nn.Module) -> Iterator[Finding]:
    """Other tokens at t .. T-1 leave the logits before t alone, and another row all other rows."""
    x, _ = run.batch(0)
    t = x.shape[1] // 2
    ids = logits_of(model, x).shape[-1]
    logits = logits_of(model, x)

    def moved(changed, place):
        apart = (logits_of(model, changed) - logits)[place].abs().max().item()
        return apart > 1e-3 * logits.abs().max().item()

    future, first = x.clone(), x.clone()
    future[:, t:] = (future[:, t:] + 1) % ids
    first[0] = (first[0] + 1) % ids
    if moved(future, (slice(None), slice(0, t))):
        yield Finding("future leaks", f"logits before {t} depend on tokens from {t} on: mask them")
    if len(x) > 1 and moved(first, slice(1, None)):
        yield Finding("rows mix", "logits of one row depend on another: look at views and norms")


def diagnose(run: Run, overfit_steps: int = 100) -> list[Finding]:
    """What is wrong with a training run; empty when nothing is found. See `Run` for an example.

    It trains small throw-away models on single batches: some 400 calls of train_step. In the order
    of Josh Tobin's guide: data, model, one step, and a batch learnt by heart. Findings further up
    may be the cause of those below. The random states are left as they were.
    """
    states = random_states()
    findings = []
    for check in (check_batches, check_seeds, check_numbers, check_init):
        findings += check(run)
    for check in (check_modes, check_gradients, check_zero_grad):
        findings += check(run)
    x, y = (t[:2] for t in run.batch(0))
    start = nats(logits_of(run.make_model(0), x), y)
    model, end = overfit(run, overfit_steps)
    findings += check_leaks(run, model)
    about_loss = list(check_loss(run, model))
    # a wrong loss explains that it does not fall
    findings += about_loss or check_overfit(run, overfit_steps, start, end)
    restore_random_states(states)
    return findings


# Demo: one instability, and what each remedy does about it

RATES = (1e-2, 3e-2, 1e-1, 3e-1)
STEPS, ROWS, SEEDS = 80, 8, 3
T_975 = 4.303  # Student's t, two-sided 95%, SEEDS - 1 degrees of freedom

ADAM = {"betas": (0.9, 0.95), "weight_decay": 0.0}
# remedy -> what of the plain run it changes, see train_tiny
REMEDIES: dict[str, dict] = {
    "none": {},
    "clip at 1.0": {"max_norm": 1.0},
    "warmup, 30 steps": {"warmup_steps": 30},
    "QK-norm": {"qk_norm": True},
    "z-loss 1e-4": {"z": 1e-4},
    "softcap 50 in attention": {"score_cap": 50.0},
    "embedding gradient / 10": {"embed_share": 0.1},
    "StableAdamW": {"make": lambda params, lr: StableAdamW(params, lr, **ADAM)},
    "SPAM": {"make": lambda params, lr: SPAM(params, lr, (0.9, 0.95))},
    "QK-norm, warmup, clip": {"qk_norm": True, "warmup_steps": 30, "max_norm": 1.0},
}


def adamw(params, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr, **ADAM, fused=True)


def train_tiny(
    rate: float,
    seed: int,
    make: Callable = adamw,
    max_norm: float = math.inf,
    warmup_steps: int = 1,
    z: float = 0.0,
    **shape,
) -> list[float]:
    """Losses of the tiny GPT's steps on the echo language, nats/token; inf once one is not finite.

    Args: make, max_norm, warmup_steps, z: remedies; shape: those that are part of TinyGPT.
    """
    torch.manual_seed(seed)
    model = TinyGPT(**shape)
    optimizer = make(model.parameters(), lr=rate)
    losses = []
    for step, (x, y) in enumerate(zip(*echo_batches(STEPS, ROWS, seed))):
        logits = model(x)  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            return losses[:-1] + [math.inf] * (STEPS - step)
        optimizer.zero_grad()
        (loss + z_loss(logits, z) if z else loss).backward()
        if max_norm < math.inf:
            clip_grad_norm_(model.parameters(), max_norm)
        for group in optimizer.param_groups:
            group["lr"] = rate * warmup(step, warmup_steps)
        optimizer.step()
    return losses


def lr_sensitivity(final: list[float], at_init: float) -> float:
    """Mean over rates of min(loss, loss at init), minus the best: 0 where the rate is no matter.

    Source: Wortsman et al. 2023 (2309.14322), there over rates from 3e-4 to 3e-1.
    """
    capped = [min(loss, at_init) for loss in final]
    return statistics.fmean(capped) - min(capped)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean of SEEDS values and half the width of its 95% interval."""
    half = T_975 * statistics.stdev(values) / math.sqrt(SEEDS)
    return statistics.fmean(values), half


def show_remedies() -> dict[str, tuple[float, float]]:
    print(f"final loss of a tiny GPT, mean of {SEEDS} seeds; floor {echo_floor():.2f}, ", end="")
    print(f"ln V {math.log(V):.2f} nats")
    print("remedy                    " + "".join(f"  lr {r:<5g}" for r in RATES) + "  sensitivity")
    scores = {}
    for name, changes in REMEDIES.items():
        finals, per_seed = [], []
        for seed in range(SEEDS):
            runs = [train_tiny(rate, seed, **changes) for rate in RATES]
            finals.append([statistics.fmean(losses[-10:]) for losses in runs])
            per_seed.append(lr_sensitivity(finals[-1], at_init=runs[0][0]))
        means = [statistics.fmean(column) for column in zip(*finals)]
        scores[name] = interval(per_seed)
        row = "".join(f"{mean:10.2f}" for mean in means)
        print(f"{name:26s}{row}  {scores[name][0]:5.2f} +- {scores[name][1]:.2f}", flush=True)
    return scores


def show_clipping() -> None:
    p = nn.Parameter(torch.zeros(4, dtype=torch.float16))
    for name, clip in (("torch", torch.nn.utils.clip_grad_norm_), ("here", clip_grad_norm_)):
        p.grad = torch.full_like(p, 60_000)
        norm = clip([p], 1.0)
        print(f"clip 4 float16 gradients of 60,000 to 1: {name:5s} norm {norm:9.0f}, ", end="")
        print(f"then {p.grad.tolist()[0]:.2f} each")
    assert p.grad.tolist()[0] == 0.5, "clipping lost the gradient"


def echo_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def poisoned_run(poison: bool, guard: SpikeGuard) -> tuple[float, list[int], list[str]]:
    """Loss on fresh text after 100 steps, of which 6 may meet targets drawn at random."""
    torch.manual_seed(0)
    model = TinyGPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    xs, ys = echo_batches(160, ROWS, seed=0)
    if poison:
        ys[90:96] = torch.randint(V, ys[90:96].shape)
    used, log = train_with_rewind(
        model, optimizer, lambda i: (xs[i], ys[i]), echo_loss, 100, guard
    )
    (x,), (y,) = echo_batches(1, 64, seed=1)
    with torch.no_grad():
        return echo_loss(model, x, y).item(), used, log


def show_rewind() -> None:
    clean, _, log = poisoned_run(poison=False, guard=SpikeGuard())
    assert not log, "a false alarm"
    asleep = SpikeGuard(warmup=128)  # longer than the run: it never judges
    hurt, _, _ = poisoned_run(poison=True, guard=asleep)
    saved, used, log = poisoned_run(poison=True, guard=SpikeGuard())
    print(f"\n6 poisoned batches: loss {hurt:.3f} without a guard, {saved:.3f} with, ", end="")
    print(f"{clean:.3f} had they never been there")
    print(f"  {log[0]}\n  {log[4]}")
    print(f"  batches left out: {sorted(set(range(max(used))) - set(used))}")
    assert saved < 1.01 * clean and hurt > 1.05 * clean, "the guard was of no use"


def show_monitor() -> None:
    """What one look costs, and the cause of the instability above."""
    seen = {}
    times: dict[bool, list[float]] = {True: [], False: []}
    for qk_norm in (False, True):
        torch.manual_seed(0)
        model = TinyGPT(qk_norm=qk_norm)
        optimizer = adamw(model.parameters(), lr=0.1)
        for step, (x, y) in enumerate(zip(*echo_batches(60, ROWS, seed=0))):
            looking = step % 2 == 1
            began = time.process_time()
            with watch(model, optimizer) if looking else contextlib.nullcontext() as report:
                echo_loss(model, x, y).backward()
                optimizer.step()
                optimizer.zero_grad()
            times[looking].append(time.process_time() - began)
            if looking:
                seen[qk_norm] = [
                    report[name]["blocks.0.scores"]
                    for name in ("attention_max_logit", "attention_entropy")
                ]
    print("\nafter 60 steps at lr 0.1: largest attention logit, mean entropy of attention")
    for qk_norm, (logit, entropy) in seen.items():
        print(f"  {'QK-norm' if qk_norm else 'plain':8s} {logit:8.1f} {entropy:8.2f} nats")
    looked, plain = (statistics.median(times[k]) for k in (True, False))
    share = (looked - plain) / plain / 100
    print(f"looking costs {looked / plain - 1:.0%} of a step, one in 100: {share:.1%}")
    assert share < 0.02, "too dear to leave on"


def demo() -> None:
    torch.set_num_threads(1)  # every tensor here is small
    show_clipping()
    print()
    scores = show_remedies()
    show_rewind()
    show_monitor()
    (none, _), (clipped, _) = scores["none"], scores["clip at 1.0"]
    cured, half = scores["QK-norm, warmup, clip"]
    assert cured + half < none / 3, "the remedies do not cure this instability"
    assert clipped > 0.9 * none, "clipping alone does help, against what is said below"
    print("ok: QK-norm with warmup leaves a quarter of the sensitivity, clipping alone all of it")


if __name__ == "__main__":
    demo()
