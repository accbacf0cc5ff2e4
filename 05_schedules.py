"""Learning-rate schedules as pure functions: step in, multiplier of the peak rate out.

A schedule here has no state. `cosine(step, total, warmup)` depends on its arguments only, so a
run resumed at step 1000 continues as if never stopped, without anything to save or restore.
Most schedules are one trapezoid, up in W steps and down in K, with its two flanks bent:

    rate(t) = peak rate * m(t)
    m(t)    = (s + (1 - s) rise(up)) * (f + (1 - f) shape(left))
    up      = min(1, t / W)                            0 to 1 in the warm-up
    left    = 1 - (t - S) / (T - S), clamped to [0, 1]   1 to 0 in the decay, S = max(W, T - K)

    rise and shape, of x = up or left, from 0 at x = 0 to 1 at x = 1
    linear       x                           1-sqrt     1 - sqrt(1 - x)     steep, then long and low
    cosine       (1 - cos(pi x)) / 2         1-square   1 - (1 - x)^2       slow, then steep
    exponential  (100^x - 1) / 99            rex        2 x / (1 + x)       above the line
    constant     1                           jump       0, and 1 at x = 1

So cosine is shape cosine with K = T, wsd (warm-up, stable, decay) is K < T, one-cycle is cosine on
both flanks with s = 1/25. Steps, restarts, cycles and 1/sqrt(t) have functions of their own.

Letters used below: t step, T total, W warmup, K cooldown, s start and f floor (first and final
multiplier), S where the decay begins.

Conventions. t counts the updates already done: 0 at the first, T - 1 at the last. Warm-up is
t / W, as in transformers, so with W > 0 the first update has rate 0: AdamW's moments take in a
gradient but no weight moves. `skip_zero=True` takes (t + 1) / W instead, as Llama and nanochat do.
From step T on the multiplier stays where it ended; it never climbs again. A length (warmup,
cooldown, a milestone) is a count in the unit of t if it is whole, be it steps or tokens, and a
share of T if it is a float from 0.0 to 1.0: warmup=100, warmup=0.02.

Sources: cosine and restarts: Loshchilov & Hutter 2016 (arXiv 1608.03983), equation 5; warm-up:
Goyal et al. 2017 (1706.02677), section 2.2; inverse square root: Vaswani et al. 2017 (1706.03762),
section 5.3; wsd: Hu et al. 2024 (MiniCPM, 2404.06395), section 4; 1-sqrt: Haegele et al. 2024
(2405.18392), section 3, where a decay over 20% matches cosine; 60% for wsd: record runs of
modded-nanogpt and nanochat decay over the last 45 to 70%; rex: Chen et al. 2021 (2107.04197);
cycles and range test: Smith 2015 (1506.01186); one-cycle: Smith & Topin 2017 (1708.07120) with
torch's constants; multistep at 1/2 and 3/4: He et al. 2015 (1512.03385), section 4.2.

Run: `python 05_schedules.py` (CPU, 3 s on 2 cores of an AMD EPYC (Zen 5)) prints

    total 1000, warmup 50; one character per 25 steps, the end is at |
    derived: area by integral; trunk: up to this step a run of twice the length is the same
                                                                             area derived  trunk
    constant              =@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@|@@@@@@@@  974.5   974.5   1000
    constant_then_jump   --@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@|@@@@@@@@  966.7           1000
    linear                =@@@%%%%####****++++=====----::::....  |          500.0   500.0     50
    cosine                =@@@@@@%%%%%###***++===---:::.....     |          500.0   500.0     50
    cosine_with_min_lr    =@@@@@@@%%%%####***+++===---:::::......|........  547.4   547.5     50
    cosine_with_restarts  =@@%#*=-.. @%%*+-:. @@%#*=-.. @%%*+-:. |          500.5             50
    warm_restarts         =@%*=. @@%#*=-:.  @@@%%%#**++=--::..   |          499.9             50
    one_cycle             ..:-=+*#%%@@@@@@%%%##***++=---::...    |          506.0              0
    cyclic                 .-=*%@#+-::-+#@%*=-.-=*%@#+-::-+#@%*=-|........  524.9             50
    step                  =@@@@@@@@@@............                |          307.6            299
    multistep             =@@@@@@@@@@@@@@@@@@..........          |          502.0            499
    exponential           =@%#**+==---::::.........              |          229.2   229.2     50
    inverse_sqrt          =@#**++======------------::::::::::::::|::::::::  372.1           1000
    rex                   =@@@@%%%%%%%######*****++++===---:::.. |          608.0   608.0     50
    wsd                   =@@@@@@@@@@@@@@@@%%%##***++===---::... |          675.0   675.0    400
    wsd_cosine            =@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@%*=-. |          875.0   875.0    800
    wsd_sqrt              =@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@*=--:..|          841.7   841.7    800
    wsd_square            =@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@%%#+=:|          908.3   908.3    800
    wsd_exponential       =@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@-. |          895.7   895.7    900
    the same: constant_with_warmup = constant, polynomial = linear, cosine_annealing = cosine,
    cosine_warmup_with_min_lr = cosine_with_min_lr, noam = inverse_sqrt, trapezoid = wsd,
    warmup_stable_decay = wsd_cosine

    LR range test with SGD on h/2 x^2: the loss grows when the rate exceeds 2/h
    h   0.5   2/h 4.0000, between 3.9811 and 4.3652
    h   4.0   2/h 0.5000, between 0.4786 and 0.5248
    h 100.0   2/h 0.0200, between 0.0191 and 0.0209
    ok: areas as derived, nothing moves after the end, the range test brackets 2/h
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import difflib
import itertools
import math
import numbers
import textwrap
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

# Shapes: how high a flank is where a share x of it is below; the same for the way up and down

SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda x: 1.0,
    "linear": lambda x: x,
    "cosine": lambda x: (1 - math.cos(math.pi * x)) / 2,
    "1-sqrt": lambda x: 1 - math.sqrt(1 - x),
    "1-square": lambda x: 1 - (1 - x) ** 2,
    "exponential": lambda x: (100**x - 1) / 99,  # the same factor each step, down to about 1%
    "rex": lambda x: 2 * x / (1 + x),
    "jump": lambda x: float(x >= 1),
}


# Checks and units


def require(good: bool, name: str, value: object, wanted: str) -> None:
    if not good:
        raise ValueError(f"{name}={value!r} must be {wanted}")


def lookup(table: dict[str, Callable[..., float]], name: str, what: str) -> Callable[..., float]:
    """The entry called `name`. Raises: ValueError that suggests the nearest name."""
    if name not in table:
        near = difflib.get_close_matches(str(name), table, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{what}={name!r} must be one of {', '.join(table)}{hint}")
    return table[name]


def length(name: str, value: float, total: float) -> float:
    """`value` in the unit of `total`: a float from 0.0 to 1.0 is a share of it, the rest a count.

    Raises: ValueError unless the length is from 0 to `total`, and whole if it is a count.
    """
    if not isinstance(value, numbers.Integral) and 0 <= value <= 1:
        count = value * total
        whole = round(count)  # 0.56 * 100 is 56.00000000000001
        return whole if math.isclose(count, whole, rel_tol=1e-12) else count
    wanted = f"a whole number from 0 to total={total}, or a share of it as a float up to 1.0"
    require(0 <= value <= total and value == int(value), name, value, wanted)
    return value


def check(step: float, total: float, warmup: float, floor: float = 0.0) -> float:
    """The warm-up's length in the unit of `total`. Raises: ValueError for what is out of range."""
    require(step >= 0, "step", step, "at least 0")
    require(0 < total < math.inf, "total", total, "above 0, and finite")
    require(0 <= floor <= 1, "floor", floor, "in [0, 1]")
    return length("warmup", warmup, total)


def rising(step: float, warmup: float, skip_zero: bool) -> float:
    """min(1, step / warmup), the linear rise; 1 without warm-up. In [0, 1]."""
    return min(1.0, (step + skip_zero) / warmup) if warmup else 1.0


def progress(step: float, start: float, total: float, parts: float = 1) -> float:
    """How many of `parts` equal parts of the way from `start` to `total` are behind us.

    In [0, parts]; `parts` ever after. Exact at the joints if these are whole steps.
    """
    if step >= total:
        return float(parts)
    return max(0.0, (step - start) * parts / (total - start)) if start < total else 0.0


# Schedules. Each takes (step, total, warmup), has defaults for the rest, and gives the multiplier


def ramp(
    step: float,
    total: float,
    warmup: float = 0,
    *,
    shape: str | Callable[[float], float] = "linear",
    cooldown: float = 1.0,
    floor: float = 0.0,
    rise: str = "linear",
    start: float = 0.0,
    skip_zero: bool = False,
) -> float:
    """Multiplier in [0, 1] at `step`: up from `start` to 1, 1 for a while, down to `floor`.

    Args: shape and rise, of the two flanks, by their names in SHAPES; shape may be a function of
        one's own. cooldown, the decay's length K; if warm-up reaches into it, the decay begins
        where warm-up ends and is the shorter and steeper.
    Between 1 and the floor the shape is squeezed, not cut off, so that it stays smooth. Until its
    decay begins a run does not depend on `total`: one trunk serves runs of any length.
    """
    warmup = check(step, total, warmup, floor)
    require(0 <= start <= 1, "start", start, "in [0, 1]")
    require(cooldown > 0, "cooldown", cooldown, "above 0; shape='constant' has no decay")
    begin = max(warmup, total - length("cooldown", cooldown, total))
    up = lookup(SHAPES, rise, "rise")(rising(step, warmup, skip_zero))
    bend = shape if callable(shape) else lookup(SHAPES, shape, "shape")
    left = bend(1 - progress(step, begin, total))
    return (start + (1 - start) * up) * (floor + (1 - floor) * left)


constant = partial(ramp, shape="constant")
constant_then_jump = partial(ramp, shape="constant", rise="jump", start=1 / 3)  # torch ConstantLR
linear = partial(ramp, shape="linear")
cosine = partial(ramp, shape="cosine")
cosine_with_min_lr = partial(ramp, shape="cosine", floor=0.1)
rex = partial(ramp, shape="rex")
exponential = partial(ramp, shape="exponential", floor=0.01)  # with this floor exactly 0.01^p
wsd = partial(ramp, shape="linear", cooldown=0.6)
wsd_cosine = partial(ramp, shape="cosine", cooldown=0.2)
wsd_sqrt = partial(ramp, shape="1-sqrt", cooldown=0.2)
wsd_square = partial(ramp, shape="1-square", cooldown=0.2)
wsd_exponential = partial(ramp, shape="exponential", cooldown=0.1)  # 0.1: MiniCPM


def polynomial(
    step: float, total: float, warmup: float = 0, *, power: float = 1.0, **options
) -> float:
    """Multiplier in [0, 1] at `step`: the rise, then left^power; options as `ramp` takes them."""
    require(power > 0, "power", power, "above 0")
    return ramp(step, total, warmup, shape=lambda x: x**power, **options)


def one_cycle(
    step: float,
    total: float,
    warmup: float = 0.3,
    *,
    start: float = 1 / 25,
    floor: float = 1 / 250_000,
    skip_zero: bool = False,
) -> float:
    """Multiplier in [0, 1] at `step`: half a cosine wave up from `start`, another down to `floor`.

    torch's OneCycleLR reaches its peak and its end one update early: with total_steps=T and
    pct_start=P it is one_cycle(step, T - 1, (P T - 1) / (T - 1)).
    """
    options = {"shape": "cosine", "rise": "cosine", "start": start, "floor": floor}
    return ramp(step, total, warmup, **options, skip_zero=skip_zero)


def one_cycle_momentum(
    step: float, total: float, warmup: float = 0.3, *, low: float = 0.85 / 0.95
) -> float:
    """Multiplier of momentum or beta1 in [low, 1] at `step`: lowest where one_cycle is highest."""
    return 1 - (1 - low) * one_cycle(step, total, warmup, start=0.0, floor=0.0)


def inverse_sqrt(
    step: float,
    total: float,
    warmup: float = 0,
    *,
    timescale: float | None = None,
    skip_zero: bool = False,
) -> float:
    """Multiplier in [0, 1] at `step`: the rise, then sqrt(timescale / (timescale + t - W)).

    Args: timescale, in the unit of `step`; None for W, or 10,000 where W = 0.
    With timescale = W this is the Noam schedule, whose peak rate is (d_model W)^-0.5.
    """
    warmup = check(step, total, warmup)
    timescale = (warmup or 10_000) if timescale is None else timescale
    require(timescale > 0, "timescale", timescale, "above 0")
    since = max(0, min(step, total) - warmup)
    return rising(step, warmup, skip_zero) * math.sqrt(timescale / (timescale + since))


def cosine_with_restarts(
    step: float,
    total: float,
    warmup: float = 0,
    *,
    cycles: int = 4,
    factor: float = 1.0,
    floor: float = 0.0,
    skip_zero: bool = False,
) -> float:
    """Multiplier in [0, 1] at `step`: the rise, then `cycles` times from 1 down to `floor`.

    Each cycle is `factor` times as long as the one before, and the last ends with the run.
    """
    warmup = check(step, total, warmup, floor)
    require(isinstance(cycles, int) and cycles >= 1, "cycles", cycles, "a whole number from 1")
    require(factor > 0, "factor", factor, "above 0")
    sizes = [factor**i for i in range(cycles)]
    behind, left = progress(step, warmup, total, sum(sizes)), 0.0  # in lengths of the first cycle
    for size in sizes:
        if behind < size:
            left = 1 - behind / size
            break
        behind -= size
    up = rising(step, warmup, skip_zero)
    return up * (floor + (1 - floor) * SHAPES["cosine"](left))


warm_restarts = partial(cosine_with_restarts, cycles=3, factor=2)


def cyclic(
    step: float,
    total: float,
    warmup: float = 0,
    *,
    cycles: int = 4,
    up: float = 0.5,
    shrink: float = 1.0,
    gamma: float = 1.0,
    floor: float = 0.1,
    skip_zero: bool = False,
) -> float:
    """Multiplier in [0, 1] at `step`: `cycles` times from `floor` up to 1 and down again.

    Args: up, the part of a cycle that climbs. The height above the floor is multiplied by
        `shrink` after each cycle (torch's triangular2: 0.5) and by `gamma` at each step (its
        exp_range).
    """
    warmup = check(step, total, warmup, floor)
    require(isinstance(cycles, int) and cycles >= 1, "cycles", cycles, "a whole number from 1")
    require(0 < up < 1, "up", up, "in (0, 1)")
    for name, value in (("shrink", shrink), ("gamma", gamma)):
        require(0 < value <= 1, name, value, "in (0, 1]")
    cycle, x = divmod(progress(step, warmup, total, cycles), 1)
    height = min(x / up, (1 - x) / (1 - up))
    height *= shrink**cycle * gamma ** max(0, step - warmup)
    return rising(step, warmup, skip_zero) * (floor + (1 - floor) * height)


def multistep(
    step: float,
    total: float,
    warmup: float = 0,
    *,
    milestones: Sequence[float] = (0.5, 0.75),
    gamma: float = 0.1,
    skip_zero: bool = False,
) -> float:
    """Multiplier at `step`: the rise, times `gamma` once for each milestone reached.

    Milestones are lengths from step 0, warm-up included; shares are rounded to whole steps.
    """
    warmup = check(step, total, warmup)
    require(gamma > 0, "gamma", gamma, "above 0")
    reached = sum(step >= round(length("milestone", x, total)) for x in milestones)
    return rising(step, warmup, skip_zero) * gamma**reached


def step_decay(
    step: float,
    total: float,
    warmup: float = 0,
    *,
    every: float = 0.3,
    gamma: float = 0.1,
    skip_zero: bool = False,
) -> float:
    """Multiplier at `step`: the rise, times `gamma` after each `every` before `total`.

    A share is rounded to whole steps.
    """
    warmup = check(step, total, warmup)
    require(gamma > 0, "gamma", gamma, "above 0")
    every = max(1, round(length("every", every, total)))
    return rising(step, warmup, skip_zero) * gamma ** (min(step, total - 1) // every)


# every schedule by the names that torch, transformers and the papers use
SCHEDULES: dict[str, Callable[..., float]] = {
    "constant": constant,
    "constant_with_warmup": constant,
    "constant_then_jump": constant_then_jump,
    "linear": linear,
    "polynomial": polynomial,
    "cosine": cosine,
    "cosine_annealing": cosine,
    "cosine_with_min_lr": cosine_with_min_lr,
    "cosine_warmup_with_min_lr": cosine_with_min_lr,
    "cosine_with_restarts": cosine_with_restarts,
    "warm_restarts": warm_restarts,
    "one_cycle": one_cycle,
    "cyclic": cyclic,
    "step": step_decay,
    "multistep": multistep,
    "exponential": exponential,
    "inverse_sqrt": inverse_sqrt,
    "noam": inverse_sqrt,
    "rex": rex,
    "wsd": wsd,
    "trapezoid": wsd,
    "wsd_cosine": wsd_cosine,
    "warmup_stable_decay": wsd_cosine,
    "wsd_sqrt": wsd_sqrt,
    "wsd_square": wsd_square,
    "wsd_exponential": wsd_exponential,
}


def get(name: str) -> Callable[..., float]:
    """The schedule called `name`. Raises: ValueError that suggests the nearest name."""
    return lookup(SCHEDULES, name, "schedule")


# What is built from schedules


def sequence(
    step: float,
    total: float,
    schedules: Sequence[Callable[[float, float], float]],
    milestones: Sequence[float],
) -> float:
    """What the schedule in charge gives at `step`: each starts anew at its milestone.

    Args: schedules, one more than milestones, each a function of (step, total) that is told the
        steps since its own beginning and its own length. Milestones are lengths from step 0;
        shares are rounded to whole steps. That the ends meet is the caller's affair.
    """
    check(step, total, 0)
    wanted = f"one fewer than the {len(schedules)} schedules"
    require(len(milestones) == len(schedules) - 1, "milestones", milestones, wanted)
    edges = [0, *(round(length("milestone", x, total)) for x in milestones), total]
    rise = all(a < b for a, b in itertools.pairwise(edges))
    require(rise, "milestones", milestones, f"increasing, above 0 and below total={total}")
    i = bisect_right(edges, step, hi=len(schedules)) - 1
    return schedules[i](min(step, total) - edges[i], edges[i + 1] - edges[i])


def branch(at: int, cooldown: float, warmup: int = 0) -> dict[str, int]:
    """The `total` and `cooldown` of a wsd run that leaves a stable run at step `at` to cool down.

    Args: cooldown, in steps or, as a float below 1.0, as a share of the branch's whole length.
    Up to `at` the branch has the multipliers of the trunk, exactly 1 after the warm-up, so any
    checkpoint of the trunk's stable stage can start one, and the trunk can go on from it as well:
        rate = peak * wsd(step, warmup=100, **branch(at=800, cooldown=0.2))     # ends at step 1000
    """
    require(at >= warmup, "at", at, f"at least warmup={warmup}: before it nothing is stable")
    share = not isinstance(cooldown, numbers.Integral)
    wanted = "a count of steps from 1, or a share of the run as a float in (0.0, 1.0)"
    require(0 < cooldown < 1 if share else cooldown >= 1, "cooldown", cooldown, wanted)
    steps = max(1, round(at * cooldown / (1 - cooldown))) if share else int(cooldown)
    return {"total": at + steps, "cooldown": steps}


def batch_size(
    step: float, total: float, small: int, large: int, *, over: float = 0.1, multiple: int = 1
) -> int:
    """Rows per step at `step`: from `small` to `large` in equal stairs over a length of `over`.

    Args: multiple, the height of a stair. Count in tokens or rows to have stairs of equal data.
    For doublings at milestones use `multistep` with gamma=2.
    """
    check(step, total, 0)
    require(1 <= small <= large, "small", small, f"from 1 to large={large}")
    whole = multiple >= 1 and (large - small) % multiple == 0
    require(whole, "multiple", multiple, f"a divisor of large - small = {large - small}")
    stairs = (large - small) // multiple
    return small + multiple * math.floor(progress(step, 0, length("over", over, total), stairs))


class Scheduler(torch.optim.lr_scheduler.LRScheduler):
    """A multiplier as a torch scheduler: each group's rate is its own base rate times m(step).

    Args:
        multiplier: function of the step, as partial(cosine, total=1000, warmup=100).
        step: updates already done. This number is all there is to resume: no state is needed.
        weight_decay, momentum: functions like multiplier that scale these values too; momentum is
            beta1 where the optimiser has betas.
    Base values are those of the groups at construction, kept there too, as initial_lr and so on:
    an optimiser's state may be loaded before, if it was saved under a Scheduler, and always after.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        multiplier: Callable[[int], float],
        step: int = 0,
        *,
        weight_decay: Callable[[int], float] | None = None,
        momentum: Callable[[int], float] | None = None,
    ):
        require(step >= 0, "step", step, "at least 0")
        given = {"lr": multiplier, "weight_decay": weight_decay, "momentum": momentum}
        self.multipliers = {name: m for name, m in given.items() if m is not None}
        self.bases = []
        for group in optimizer.param_groups:
            base = {}
            for name in self.multipliers:
                betas = name == "momentum" and "betas" in group
                value = group["betas"][0] if betas else group[name]
                base[name] = group.setdefault(f"initial_{name}", float(value))
            self.bases.append(base)
        super().__init__(optimizer, last_epoch=step - 1)  # which calls self.step() once

    def step(self, epoch: int | None = None) -> None:
        """Sets the values of the next update, or of number `epoch`; call after optimizer.step()."""
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        for group, base in zip(self.optimizer.param_groups, self.bases, strict=True):
            for name, multiplier in self.multipliers.items():
                value = base[name] * multiplier(self.last_epoch)
                if name == "momentum" and "betas" in group:
                    group["betas"] = (value, *group["betas"][1:])
                elif isinstance(group[name], Tensor):  # a compiled optimiser holds on to it
                    group[name].fill_(value)
                else:
                    group[name] = value
        self._last_lr = [float(group["lr"]) for group in self.optimizer.param_groups]

    def get_lr(self) -> list[float]:
        """Rates of the next update: torch's SequentialLR asks where one schedule ends."""
        return [base["lr"] * self.multipliers["lr"](self.last_epoch) for base in self.bases]

    def state_dict(self) -> dict:
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict) -> None:
        """Sets the values at once. The optimiser's own state may be loaded before or after."""
        self.step(state_dict["last_epoch"])


class Plateau:
    """The one schedule with a state: a multiplier that falls when a metric stops improving.

    Args:
        factor: what the multiplier is multiplied by after more than `patience` metrics in a row
            that are not better than the best so far.
        threshold: by how much a metric has to be better; threshold_mode "rel": as a part of the
            best, "abs": in the metric's unit. mode "min": lower is better, "max": higher.
        cooldown: how many metrics after a fall are not counted as bad.
        floor: the lowest multiplier.
    torch's ReduceLROnPlateau with eps=0: multiply a rate, or another schedule, by `update`.
    """

    def __init__(
        self,
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        cooldown: int = 0,
        floor: float = 0.0,
        mode: str = "min",
        threshold_mode: str = "rel",
    ):
        require(0 < factor < 1, "factor", factor, "in (0, 1)")
        require(0 <= floor <= 1, "floor", floor, "in [0, 1]")
        for name, value in (("patience", patience), ("cooldown", cooldown)):
            require(value >= 0, name, value, "at least 0")
        require(mode in ("min", "max"), "mode", mode, "'min' or 'max'")
        wanted = "'rel' or 'abs'"
        require(threshold_mode in ("rel", "abs"), "threshold_mode", threshold_mode, wanted)
        self.factor, self.patience, self.cooldown, self.floor = factor, patience, cooldown, floor
        self.sign = 1 if mode == "min" else -1
        self.threshold, self.relative = threshold, threshold_mode == "rel"
        self.multiplier, self.best = 1.0, self.sign * math.inf
        self.bad, self.cooling = 0, 0

    def update(self, metric: float) -> float:
        """The multiplier after this metric; nan counts as bad."""
        if self.relative:
            bar = self.best * (1 - self.sign * self.threshold)
        else:
            bar = self.best - self.sign * self.threshold
        if self.sign * metric < self.sign * bar:
            self.best, self.bad = float(metric), 0
        else:
            self.bad += 1
        if self.cooling:
            self.cooling, self.bad = self.cooling - 1, 0
        if self.bad > self.patience:
            self.multiplier = max(self.multiplier * self.factor, self.floor)
            self.cooling, self.bad = self.cooldown, 0
        return self.multiplier

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in ("multiplier", "best", "bad", "cooling")}

    def load_state_dict(self, state_dict: dict) -> None:
        for name in ("multiplier", "best", "bad", "cooling"):
            setattr(self, name, state_dict[name])


# The range test: which peak rate to multiply


@dataclass(frozen=True)
class RangeTest:
    """What `lr_range_test` saw, and the rates it suggests."""

    rates: list[float]  # one per update, rising by the same factor each time
    losses: list[float]  # nats, or whatever the closure returns; before the update of that rate
    smoothed: list[float]
    skip: int  # how many values of `smoothed` come before those that the suggestions look at

    @property
    def diverging(self) -> float | None:
        """The rate whose update led away from the lowest loss; None if the last loss is lowest."""
        lowest = self.losses.index(min(self.losses))
        return self.rates[lowest] if lowest < len(self.losses) - 1 else None

    def _kept(self) -> tuple[list[float], list[float]]:
        rates, losses = self.rates[self.skip : -5], self.smoothed[self.skip : -5]
        if len(rates) < 2:
            raise ValueError(
                f"{len(self.rates)} updates before the loss diverged must be at least "
                f"{self.skip + 7} for a suggestion; take a lower `low` or more `steps`"
            )
        return rates, losses

    @property
    def minimum(self) -> float:
        """A tenth of the rate where the smoothed loss is lowest."""
        rates, losses = self._kept()
        return rates[losses.index(min(losses))] / 10

    @property
    def steep(self) -> float:
        """The rate where the smoothed loss falls fastest per factor of the rate."""
        rates, losses = self._kept()  # the rates are evenly spaced in log(rate)
        falls = [a - b for a, b in itertools.pairwise(losses)]
        return rates[falls.index(max(falls))]

    @property
    def valley(self) -> float:
        """The rate in the middle of the longest fall: the longest falling subsequence of losses."""
        rates, losses = self._kept()
        longest = []  # of the falling subsequences that end at each loss
        for i, loss in enumerate(losses):
            before = [longest[j] for j in range(i) if losses[j] > loss]
            longest.append(1 + max(before, default=0))
        n = max(longest)
        return rates[max(0, longest.index(n) - n + n // 3 + n // 6)]


@contextlib.contextmanager
def restored(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """On leaving, also by an exception, everything is to the byte what it was on entering.

    Parameters, buffers, gradients, the optimiser, and torch's random states. Not by way of
    load_state_dict, which skips some buffers and rounds the state to the parameter's type.
    """
    tensors = [*model.parameters(), *model.buffers()]
    tensors = [(x, x.detach().clone(), x.grad) for x in tensors]
    states = {p: copy.deepcopy(state) for p, state in optimizer.state.items()}
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    groups = copy.deepcopy(groups)
    model.zero_grad(set_to_none=True)  # so that nobody writes into the gradients kept above
    try:
        with torch.random.fork_rng():
            yield
    finally:
        with torch.no_grad():
            for x, value, gradient in tensors:
                x.copy_(value)
                x.grad = gradient
        optimizer.state.clear()
        optimizer.state.update(states)
        for group, old in zip(optimizer.param_groups, groups):
            params = group["params"]
            group.clear()
            group.update({"params": params, **old})


def lr_range_test(
    closure: Callable[[], Tensor],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    low: float = 1e-7,
    high: float = 10.0,
    steps: int = 100,
) -> RangeTest:
    """Losses of up to `steps` updates at rates from `low` to `high`; leaves no trace in the model.

    Args:
        closure: returns the loss () of the next batch, above 0; gradients are taken here. Which
            batches it has used up is its own affair.
        low, high: rates of the group with the highest rate; the others keep their proportion.
    Stops when the smoothed loss is above four times its best, or not a number.
    Source: fastai's LRFinder: rates, smoothing 0.98, four times, the first tenth and last five cut.
    """
    require(0 < low < high, "low", low, f"above 0 and below high={high}")
    require(steps >= 8, "steps", steps, "at least 8: five are cut off for the suggestions")
    bases = [float(group["lr"]) for group in optimizer.param_groups]
    require(max(bases) > 0, "lr", max(bases), "above 0 in a group of the optimiser")
    rates, losses, smoothed, average = [], [], [], 0.0
    inside = {id(p) for p in model.parameters()}
    outside = sum(id(p) not in inside for g in optimizer.param_groups for p in g["params"])
    require(outside == 0, "optimizer", f"{outside} parameters", "all of model, which is restored")
    with restored(model, optimizer):
        for k in range(steps):
            loss = closure()
            rates.append(low * (high / low) ** (k / steps))
            losses.append(loss.item())
            good = 0 < losses[0] < math.inf
            require(good, "loss", losses[0], "above 0 and finite on the first batch")
            average = 0.98 * average + 0.02 * losses[-1]
            smoothed.append(average / (1 - 0.98 ** (k + 1)))
            if not smoothed[-1] <= 4 * min(smoothed):  # true of nan as well
                break
            for group, base in zip(optimizer.param_groups, bases):
                group["lr"] = rates[-1] * base / max(bases)
            loss.backward()
            optimizer.step()
            model.zero_grad(set_to_none=True)
    return RangeTest(rates, losses, smoothed, steps // 10)


# The demo

# mean height of the shapes: the integral of shape(x) from 0 to 1
MEANS = {
    "constant": 1.0,
    "linear": 1 / 2,
    "cosine": 1 / 2,
    "1-sqrt": 1 / 3,
    "1-square": 2 / 3,
    "exponential": 1 / math.log(100) - 1 / 99,
    "rex": 2 - 2 * math.log(2),
}


def area(schedule: Callable[..., float], total: int, warmup: int) -> float | None:
    """The sum of the multipliers of steps 0 ... total - 1 as derived; None where we have not.

    The run's length in steps at full rate. An integral, and for the step from integral to sum half
    the difference of first and last value, as in the trapezoidal rule.
    """
    options = schedule.keywords if isinstance(schedule, partial) else {}
    if "shape" not in options or "rise" in options:
        return None
    floor = options.get("floor", 0.0)
    decay = min(total - warmup, options.get("cooldown", 1.0) * total)
    mean = floor + (1 - floor) * MEANS[options["shape"]]
    first, last = schedule(0, total, warmup), schedule(total, total, warmup)
    return warmup / 2 + (total - warmup - decay) + decay * mean + (first - last) / 2


def usual_warmup(name: str, warmup: int) -> float:
    """`warmup`, but for one-cycle, where the long rise is the point, its own default."""
    return 0.3 if name == "one_cycle" else warmup


def trunk(schedule: Callable[..., float], total: int, warmup: float) -> int:
    """The last step until which a run twice as long has the same multipliers."""
    same = (schedule(t, total, warmup) == schedule(t, 2 * total, warmup) for t in range(total + 1))
    return sum(itertools.takewhile(bool, same)) - 1


def sketch(values: list[float]) -> str:
    """One character per value in [0, 1], the higher the fuller."""
    return "".join(" .:-=+*#%@"[round(9 * value)] for value in values)


def curves(total: int, warmup: int) -> dict[str, list[float]]:
    """The multipliers of steps 0 ... 3 total of every schedule; equal ones share a key, "a = b"."""
    names = defaultdict(list)
    for name, schedule in SCHEDULES.items():
        own = usual_warmup(name, warmup)
        names[tuple(schedule(t, total, own) for t in range(3 * total))].append(name)
    return {" = ".join(same): list(values) for values, same in names.items()}


def quadratic_range_test(curvature: float) -> tuple[float, float]:
    """The last rate that SGD bears on curvature / 2 * x^2, and the first that makes it diverge."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    test = lr_range_test(
        lambda: curvature / 2 * model.weight.square().sum(), model, optimizer, low=1e-3
    )
    first = test.rates.index(test.diverging)
    return test.rates[first - 1], test.rates[first]


def save_picture(path: Path, total: int = 1000, warmup: int = 50) -> None:
    """Every schedule as a small curve over steps 0 to 1.2 total, written to `path`."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib") from None
    drawn, steps = curves(total, warmup), range(total * 6 // 5 + 1)
    rows = math.ceil(len(drawn) / 4)
    figure, axes = plt.subplots(rows, 4, figsize=(9, 1.5 * rows), sharex=True, sharey=True)
    for axis in axes.flat[len(drawn) :]:
        axis.axis("off")
    for axis, (names, values) in zip(axes.flat, drawn.items()):
        name, values = names.split(" = ")[0], values[: len(steps)]
        axis.axvline(total, color="0.8", linewidth=1)
        axis.fill_between(steps, values, color="tab:blue", alpha=0.15, linewidth=0)
        axis.plot(steps, values, color="tab:blue", linewidth=1.5)
        axis.set_title(name, fontsize=9)
        axis.set(xticks=(0, total), yticks=(0, 1), ylim=(-0.03, 1.08), xlim=(0, steps[-1]))
        axis.tick_params(labelsize=8, color="0.6")
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def demo(plot: Path | None = None) -> None:
    total, warmup = 1000, 50
    print(f"total {total}, warmup {warmup}; one character per 25 steps, the end is at |")
    print("derived: area by integral; trunk: up to this step a run of twice the length is the same")
    print(f"{'':70s}   area derived  trunk")
    shared = []
    for names, values in curves(total, warmup).items():
        name, *others = names.split(" = ")
        shared += [f"{other} = {name}" for other in others]
        line = sketch(values[: total + 200 : 25])
        summed, derived = math.fsum(values[:total]), area(SCHEDULES[name], total, warmup)
        print(
            f"{name:20s} {line[:40]}|{line[40:]} {summed:6.1f}"
            f"{'' if derived is None else format(derived, '.1f'):>8s}"
            f"{trunk(SCHEDULES[name], total, usual_warmup(name, warmup)):7d}"
        )
        assert derived is None or abs(summed - derived) < 0.1, "the shape is not what it says"
        assert len(set(values[total:])) == 1, "the multiplier moves after the end"
    print(textwrap.fill("the same: " + ", ".join(shared), 92))

    print("\nLR range test with SGD on h/2 x^2: the loss grows when the rate exceeds 2/h")
    torch.manual_seed(0)
    for curvature in (0.5, 4.0, 100.0):
        last, first = quadratic_range_test(curvature)
        print(f"h {curvature:5.1f}   2/h {2 / curvature:.4f}, between {last:.4f} and {first:.4f}")
        assert last <= 2 / curvature < first, "the range test missed the edge"
    if plot:
        save_picture(plot)
        print(f"\nsaved {plot}")
    print("ok: areas as derived, nothing moves after the end, the range test brackets 2/h")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", type=Path, metavar="FILE", help="save a picture (matplotlib)")
    plot = parser.parse_args().plot
    if plot is not None and not plot.parent.is_dir():
        parser.error(f"--plot {plot}: no folder {plot.parent}; make it first")
    demo(plot)
