"""Hyperparameter search: spaces, samplers, early stopping, and a store that loses nothing.

    python 07_sweep.py                           # a demonstration: what ASHA saves
    python 07_sweep.py transfer                  # another: a rate tuned on a narrower model
    python 07_sweep.py --tune learning_rate=1e-3:3e-2:log --tune weight_decay=0.0:0.3 \
        --sampler tpe --delay 4 --workers 4 --rule asha --budget 300 --trials 40 -- --model 0.5m
    python 07_sweep.py --command "python mine.py --lr {lr}" --tune lr=1e-4:1e-1:log
    python 07_sweep.py ... --resume        goes on;     ... --report        only shows
    python 07_sweep.py ... --plot DIR      pictures;    ... --track mlflow  or wandb, offline
    python 07_sweep.py ... --workers 8 --executor ray   on the Ray cluster at RAY_ADDRESS

A trial is one choice of values and what came of it. Three questions are asked again and again:

    which point next?       a sampler    grid, random, Sobol, TPE
    how far may it go?      a rule       all the way, median, successive halving, Hyperband, ASHA
    what is known so far?   the store    one JSON line for each fact, appended, never changed

TPE splits the trials into the best tenth and the rest, lays a density over each, l and g, draws
from l and takes the draw with the largest l/g. Successive halving gives n trials a small budget b,
the best n/eta of them eta b, and so on; Hyperband does so for several b; ASHA does not wait until
all n are there. Everything that is decided follows from the store and the study's seed, so that a
study killed at any byte goes on as if nothing had happened, and for grid, random and Sobol any
number of workers tries the same points. For TPE that holds up to --delay workers where every trial
is trained to the end; with early stopping it depends on who comes first.

In Python: Study(folder, {"learning_rate": Range(1e-3, 3e-2, log=True)}, objective, TPE(),
ASHA(300)).run(Limits(trials=40)), where objective(config, budget, folder) returns a value to be
minimised or yields (step, value).

Sources: random before grid: Bergstra & Bengio 2012; TPE: Bergstra et al. 2011, Watanabe 2023 (arXiv
2304.11127), constants of optuna 5.0.0; Sobol scrambling: Owen 1998; Hyperband: Li et al. 2016
(1603.06560); ASHA: Li et al. 2018 (1810.05934), its stopping forms: optuna 5.0.0's pruner and
ray 2.60's scheduler; median rule: Vizier, Golovin et al. 2017.

Run: `python 07_sweep.py` (158 s of CPU time, most of it in 06_train.py, on an AMD EPYC (Zen 3))
prints, from seed 0,

    best of 60 trials on a synthetic objective, median of 10 seeds
      random                         0.0359
      Sobol                          0.0422
      TPE, each parameter by itself  0.0172
      TPE, jointly                   0.0075

    ASHA over 34 runs of 06_train.py, the best six, nats/token

    trial   state  step   value  learning_rate  weight_decay  warmup_steps  tokens     s
       12    done   180  2.0516       0.001313       0.07795             1  44,497  42.7
        6    done   180  2.0862       0.001149      0.004364             4  44,126  45.7
       24    done   180  2.1430      0.0009733       0.00287             2  44,101  43.1
        5    done   180  2.2285      0.0008141       0.04398             2  44,561  48.0
       21    done   180  2.2304       0.001095        0.6844             0  44,209  38.6
       33  paused    60  3.0739       0.001567       0.05331             3  14,821  13.3

    learning_rate    1e-05 |.. . .       ..421  8... ..    .    .   .| 1
    weight_decay     0.001 |    7 3.2. . 9. .  . .46.1     .  ..  5..| 1
    warmup_steps         0 |   5      1      3     6      2      .   | 5

    the best so far, beside random search over 10 whole runs

       tokens     ASHA   random
      110,748   2.0862   3.2330
      221,495   2.0862   3.2330
      332,242   2.0516   2.0862
      442,990   2.0516   2.0862

    ASHA had a model as good as random's best after 21% of its tokens

With seeds 2 and 3 that takes 78% and 21% of the tokens, and ASHA ends at 2.12 and 2.04, where
random search ends at 2.45 and 2.09.

`python 07_sweep.py transfer` (about 140 s of CPU time) prints

    validation nats/token, mean of 3 seeds, by learning rate

                                       0.00098  0.00195  0.00391  0.00781  0.01562  0.03125     best
    width 32                             4.453    4.015    3.683    3.390    3.345    3.543  0.01562
    width 128, one rate for all          3.387    3.065    3.043    3.458    4.085    3.953  0.00391
    width 128, hidden at 0.25 of it      3.661    3.315    3.055    2.921    3.107    3.414  0.00781

    the best of width 32 costs width 128 1.042 nats with one rate for all, 0.186 with the rule
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import difflib
import importlib
import itertools
import json
import logging
import math
import multiprocessing
import numbers
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from multiprocessing import connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data import batches, corpus, stories

try:
    import fcntl
except ImportError:  # not on Windows: there nothing keeps two studies out of one folder
    fcntl = None

losses = importlib.import_module("01_loss")
gpt = importlib.import_module("03_gpt")
adamw = importlib.import_module("04_adamw")
schedules = importlib.import_module("05_schedules")
training = importlib.import_module("06_train")
stability = importlib.import_module("08_stability")


class SweepError(Exception):
    """Something the user can put right; shown as one line."""


def check(good: bool, name: str, value: object, wanted: str) -> None:
    if not good:
        raise SweepError(f"{name}={value!r}: wanted {wanted}")


# 1. A trial: what is known of one try


def worse_if_nan(value: float) -> float:
    return math.inf if math.isnan(value) else value


class Report(NamedTuple):
    """What an objective says of itself at a step."""

    step: int
    value: float  # to be minimised
    tokens: int = 0  # trained on by this trial so far
    error: float = math.nan  # standard error of value, where it is a mean
    seconds: float = 0.0  # since the report before; filled in by whoever runs the trial


@dataclass
class Trial:
    """What the store's lines say of one trial."""

    index: int
    params: dict
    seed: int
    state: str = "queued"  # then running, paused, and at the end done, pruned or failed
    reports: list[Report] = field(default_factory=list)
    seconds: float = 0.0
    message: str = ""  # why it failed

    @property
    def last(self) -> Report | None:
        return self.reports[-1] if self.reports else None

    @property
    def value(self) -> float | None:
        """The newest one; None for a trial that failed or has not reported."""
        return None if self.state in ("failed", "queued") or not self.last else self.last.value

    @property
    def reached(self) -> int:
        return self.last.step if self.last else 0

    @property
    def tokens(self) -> int:
        return self.last.tokens if self.last else 0


def rank(trial: Trial) -> tuple:
    """Sorts the best first: finished ones by value, then the others, farthest first."""
    value = worse_if_nan(trial.value)
    return (0, 0, value) if trial.state == "done" else (1, -trial.last.step, value)


# 2. The space: what may be chosen


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included. Whole numbers when low and high are written so.

    Range(0.0, 0.3) is any number between, Range(4, 64) whole numbers, Range(4, 64, step=4) every
    fourth, Range(1e-4, 1e-1, log=True) as many between 1e-4 and 1e-3 as between 1e-2 and 1e-1.
    z is the coordinate in which all of them are equally likely: the number or its logarithm,
    widened by half a step at both ends, so that the end points get their full share.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None

    def __post_init__(self):
        numeric = all(isinstance(x, (int, float)) for x in (self.low, self.high))
        check(numeric, "low, high", (self.low, self.high), "two numbers")
        check(self.low < self.high, "low", self.low, f"below high={self.high}; or write a constant")
        check(math.isfinite(self.high - self.low), "low", self.low, "two finite ends")
        check(not self.log or self.low > 0, "low", self.low, "above 0, because log is on")
        if self.step is not None:
            check(not self.log, "step", self.step, "none, because log is on")
            check(self.step > 0, "step", self.step, "above 0")
            count = (self.high - self.low) / self.step
            check(abs(count - round(count)) < 1e-9, "high", self.high, "low + a multiple of step")

    @property
    def whole(self) -> bool:
        return all(isinstance(x, int) for x in (self.low, self.high, self.step or 1))

    @property
    def stride(self) -> float:
        """The distance between neighbours; 0 for a continuum."""
        return self.step or (1 if self.whole else 0)

    @property
    def ends(self) -> tuple[float, float]:
        """Both ends of z."""
        low, high = self.low - self.stride / 2, self.high + self.stride / 2
        return (math.log(low), math.log(high)) if self.log else (low, high)

    def z(self, value):
        """value, or an array of them, in the coordinate z."""
        return np.log(value) if self.log else np.asarray(value, dtype=float)

    def from_z(self, z: float) -> float:
        """The nearest value that is allowed."""
        value = math.exp(z) if self.log else z
        if self.stride:
            last = round((self.high - self.low) / self.stride)
            i = min(max(round((value - self.low) / self.stride), 0), last)
            value = float(f"{self.low + i * self.stride:.12g}")  # 0.3, not 0.30000000000000004
        value = min(max(value, self.low), self.high)
        return int(value) if self.whole else float(value)

    def at(self, u: float) -> float:
        """The value at the share u of the way, u in [0, 1)."""
        low, high = self.ends
        return self.from_z(low + u * (high - low))

    def grid(self, points: int) -> list[float]:
        """Every value of a stepped range; else `points` of them, evenly in z, with both ends."""
        if self.step:
            points = round((self.high - self.low) / self.step) + 1
        z = np.linspace(self.z(self.low), self.z(self.high), points)
        return list(dict.fromkeys(self.from_z(x) for x in z))


@dataclass(frozen=True)
class Choice:
    """One of some values, all equally likely.

    then: what else there is to choose where this one has been taken, as {option: {name: ...}}.
    """

    options: tuple
    then: dict = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "options", tuple(self.options))
        check(len(self.options) > 0, "options", self.options, "at least one")
        check(len(set(map(repr, self.options))) == len(self.options), "options", self.options,
              "each of them once")  # fmt: skip
        for option in self.options:
            plain = isinstance(option, (str, int, float, bool, type(None)))
            check(plain, "option", option, "a text, a number, true, false or null")
        for option in self.then:
            check(option in self.options, "then", option, f"one of the options {self.options}")

    def at(self, u: float):
        return self.options[int(u * len(self.options))]

    def grid(self, points: int) -> list:
        return list(self.options)


@dataclass(frozen=True)
class Param:
    """A leaf of the space. It exists where all (name, option) pairs in `when` have been chosen."""

    name: str
    kind: Range | Choice
    when: tuple[tuple[str, object], ...] = ()

    def active(self, chosen: dict) -> bool:
        return all(name in chosen and chosen[name] == option for name, option in self.when)


class Space:
    """A tree {name: Range, Choice, constant or another such tree}, as a list of its leaves.

    The leaf `width` in `model` is called "model.width", and an objective finds it as
    config["model"]["width"]. What stands under `then` of a choice lies beside that choice.
    """

    def __init__(self, tree: dict):
        self.params: list[Param] = []
        self.constants: dict = {}
        self._add(tree, "", ())
        if not self.params:
            raise SweepError("the space is empty: wanted at least one Range or Choice")

    def _add(self, tree: dict, prefix: str, when: tuple) -> None:
        for name, kind in tree.items():
            full = prefix + name
            if any(full == p.name for p in self.params) or full in self.constants:
                raise SweepError(f"the space has {full!r} twice")
            if isinstance(kind, dict):
                self._add(kind, full + ".", when)
            elif isinstance(kind, (Range, Choice)):
                self.params.append(Param(full, kind, when))
                for option, more in getattr(kind, "then", {}).items():
                    self._add(more, prefix, (*when, (full, option)))
            else:
                check(not when, full, kind, "a Range or Choice under `then`, no constant")
                self.constants[full] = kind

    def pick(self, values: Callable[[Param], object]) -> dict:
        """{name: value} of the leaves that exist, parents first."""
        chosen: dict = {}
        for param in self.params:
            if param.active(chosen):
                chosen[param.name] = values(param)
        return chosen

    def from_unit(self, u: np.ndarray) -> dict:
        """The point at u (leaves,) in [0, 1): each leaf has its own coordinate, used or not."""
        share = dict(zip((p.name for p in self.params), u.tolist()))
        return self.pick(lambda param: param.kind.at(share[param.name]))

    def config(self, chosen: dict) -> dict:
        """Constants and chosen values, as the nested dictionary that an objective gets."""
        tree: dict = {}
        for name, value in {**self.constants, **chosen}.items():
            *above, last = name.split(".")
            node = tree
            for part in above:
                node = node.setdefault(part, {})
            node[last] = value
        return tree


def space_from_json(tree: dict) -> dict:
    """{"low": 1, "high": 9} becomes a Range, {"choice": [...]} a Choice, the rest stays."""
    out = {}
    for name, node in tree.items():
        try:
            if isinstance(node, dict) and "choice" in node:
                options = {str(option): option for option in node["choice"]}
                then = node.get("then", {}).items()
                then = {options.get(k, k): space_from_json(more) for k, more in then}
                out[name] = Choice(tuple(node["choice"]), then)
            elif isinstance(node, dict) and {"low", "high"} & set(node):
                out[name] = Range(**node)
            elif isinstance(node, dict):
                out[name] = space_from_json(node)
            else:
                out[name] = node
        except TypeError as error:
            raise SweepError(f"{name}: {error}; wanted low, high, log, step") from error
        except SweepError as error:
            raise SweepError(f"{name}: {error}") from error
    return out


def number_or_text(text: str):
    """3 -> 3, 3.0 -> 3.0, true -> True, adamw -> "adamw"."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, (int, float)) else text


def space_from_flag(flag: str) -> dict:
    """learning_rate=1e-4:1e-1:log, warmup_steps=0:100:step=10, optimizer=adamw,muon, seed=3."""
    name, equals, text = flag.partition("=")
    check(bool(name and equals and text), "--tune", flag, "NAME=LOW:HIGH, NAME=A,B,C or NAME=VALUE")
    name = name.replace("-", "_")
    parts = text.split(":")
    try:
        if len(parts) >= 2:
            ends = [number_or_text(x) for x in parts[:2]]
            options: dict = {}
            for part in parts[2:]:
                key, _, value = part.partition("=")
                check(key in ("log", "step"), "--tune", flag, "log or step=S after NAME=LOW:HIGH:")
                options[key] = number_or_text(value) if key == "step" else True
            return {name: Range(*ends, **options)}
        if "," in text:
            return {name: Choice(tuple(number_or_text(x) for x in text.split(",")))}
    except SweepError as error:
        raise SweepError(f"--tune {name}: {error}") from error
    return {name: number_or_text(text)}


# 3. Samplers: which point of the space comes next
#
# Each has suggest(space, seed, index, trials): the point of trial number `index`. It depends on
# the study's seed and the index alone, never on which worker asks or when; TPE's also on the
# earlier trials that it is allowed to see.


@dataclass(frozen=True)
class Random:
    def suggest(self, space: Space, seed: int, index: int, trials: list[Trial]) -> dict:
        return space.from_unit(np.random.default_rng((seed, index)).random(len(space.params)))


@dataclass(frozen=True)
class Sobol:
    """Points that fill the cube more evenly than chance; `seed` scrambles them (Owen)."""

    def suggest(self, space: Space, seed: int, index: int, trials: list[Trial]) -> dict:
        engine = torch.quasirandom.SobolEngine(len(space.params), scramble=True, seed=seed)
        u = engine.fast_forward(index).draw(1, dtype=torch.float64)[0]
        return space.from_unit(u.clamp(max=1 - 2**-53).numpy())


@dataclass(frozen=True)
class Grid:
    """Every combination once; a range without a step counts with `points` values."""

    points: int = 5

    def all(self, space: Space) -> list[dict]:
        """The combinations in order, the last name fastest."""
        found = [{}]
        for param in space.params:
            values = param.kind.grid(self.points)
            found = [
                {**point, param.name: value} if param.active(point) else point
                for point in found
                for value in (values if param.active(point) else [None])
            ]
        return found

    def suggest(self, space: Space, seed: int, index: int, trials: list[Trial]) -> dict:
        return self.all(space)[index]


def log_mass(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """ln of the standard normal's mass between a and b, a < b."""
    # mirrored to the left where both are positive: near 1 the distribution has no digits left
    flip = a > 0
    a, b = np.where(flip, -b, a), np.where(flip, -a, b)
    with np.errstate(divide="ignore"):
        return np.log(normal(b) - normal(a))


def normal(x: np.ndarray) -> np.ndarray:
    return torch.special.ndtr(torch.as_tensor(x, dtype=torch.float64)).numpy()


def normal_inverse(p: np.ndarray) -> np.ndarray:
    return torch.special.ndtri(torch.as_tensor(p, dtype=torch.float64)).numpy()


class Parzen:
    """A density over some leaves from points seen: a mixture of one kernel for each and a prior.

    A kernel is a product over the leaves: on a Range a normal distribution in z, cut off at the
    ends, as wide as the larger gap to a neighbour; on a Choice its option with one count more.
    Letters: K kernels, the prior last; n points asked for. Constants: optuna 5.0.0's.
    """

    def __init__(self, params: list[Param], seen: list[dict]):
        self.params = params
        K = len(seen) + 1
        weights = np.ones(K)
        if K > 26:  # beyond 25 points the old ones fade, linearly from 1/(K-1)
            weights[: K - 26] = np.linspace(1 / (K - 1), 1, K - 26)
        self.log_weights = np.log(weights / weights.sum())  # (K,)
        self.kernels = [self._kernels(p.kind, [point[p.name] for point in seen]) for p in params]

    @staticmethod
    def _kernels(kind: Range | Choice, values: list) -> tuple:
        K = len(values) + 1
        if isinstance(kind, Choice):
            table = np.full((K, len(kind.options)), 1 / K)  # (K, options)
            table[np.arange(K - 1), [kind.options.index(v) for v in values]] += 1
            return (table / table.sum(1, keepdims=True),)
        low, high = kind.ends
        mu = kind.z(np.array(values, dtype=float))  # (K-1,)
        order = np.argsort(mu)
        gaps = np.diff(np.concatenate([[low], mu[order], [high]]))  # (K,)
        width = np.maximum(gaps[:-1], gaps[1:])  # (K-1,)
        if K > 2:  # the outermost do not count the gap to the end of the range
            width[0], width[-1] = gaps[1], gaps[-2]
        sigma = np.empty(K - 1)
        sigma[order] = np.clip(width, (high - low) / min(100, 1 + K), high - low)
        return np.append(mu, (low + high) / 2), np.append(sigma, high - low)  # (K,), (K,)

    def sample(self, rng: np.random.Generator, n: int) -> list[dict]:
        """n points: a kernel is drawn for each, and from it all leaves."""
        k = rng.choice(len(self.log_weights), size=n, p=np.exp(self.log_weights))  # (n,)
        points: list[dict] = [{} for _ in range(n)]
        for param, kernels in zip(self.params, self.kernels):
            u = rng.random(n)
            if isinstance(param.kind, Choice):
                which = (kernels[0][k].cumsum(1) < u[:, None]).sum(1)
                values = [param.kind.options[min(i, len(param.kind.options) - 1)] for i in which]
            else:
                mu, sigma = kernels[0][k], kernels[1][k]  # (n,)
                below, above = (normal((end - mu) / sigma) for end in param.kind.ends)
                z = mu + sigma * normal_inverse(below + u * (above - below))
                values = [param.kind.from_z(x) for x in z.clip(*param.kind.ends)]
            for point, value in zip(points, values):
                point[param.name] = value
        return points

    def log_density(self, points: list[dict]) -> np.ndarray:
        """(n,) in z for a continuum, of probabilities where values are steps or options."""
        total = np.tile(self.log_weights, (len(points), 1))  # (n, K)
        for param, kernels in zip(self.params, self.kernels):
            kind, values = param.kind, [point[param.name] for point in points]
            if isinstance(kind, Choice):
                total += np.log(kernels[0])[:, [kind.options.index(v) for v in values]].T
                continue
            mu, sigma = kernels
            x, (low, high) = np.array(values, dtype=float)[:, None], kind.ends
            total -= log_mass((low - mu) / sigma, (high - mu) / sigma)  # what the cut leaves
            if kind.stride:
                left, right = kind.z(x - kind.stride / 2), kind.z(x + kind.stride / 2)
                total += log_mass((left - mu) / sigma, (right - mu) / sigma)
            else:
                t = (kind.z(x) - mu) / sigma
                total += -0.5 * t * t - np.log(sigma * math.sqrt(2 * math.pi))
        return np.logaddexp.reduce(total, axis=1)


@dataclass(frozen=True)
class TPE:
    """Draws from where good trials lie and takes the draw that is least like the other trials.

    Good are the best tenth, l their density and g that of the rest; of `candidates` draws from l
    the one with the largest l/g is taken. joint: kernels span all leaves, so that a ridge between
    two of them is seen; otherwise each leaf goes by itself. Leaves that do not always exist do so
    anyway.

    delay: trial i learns from the trials up to i - delay; those behind it count as bad, which
    keeps workers apart. Up to `delay` workers are busy, and all numbers of workers up to it give
    the same points.
    """

    joint: bool = True
    startup: int = 10
    candidates: int = 24
    delay: int = 1

    def suggest(self, space: Space, seed: int, index: int, trials: list[Trial]) -> dict:
        known = trials[: max(0, index - self.delay + 1)]
        ranked = sorted((t for t in known if t.value is not None), key=rank)
        if len(ranked) < self.startup:
            return Random().suggest(space, seed, index, trials)
        good = {t.index for t in ranked[: min(math.ceil(0.1 * len(ranked)), 25)]}
        below = [t.params for t in trials[:index] if t.index in good]
        above = [t.params for t in trials[:index] if t.index not in good]
        rng = np.random.default_rng((seed, index))
        together = [p for p in space.params if self.joint and not p.when]
        chosen = self._best(together, below, above, rng) if together else {}
        return space.pick(
            lambda p: chosen[p.name]
            if p.name in chosen
            else self._best([p], below, above, rng)[p.name]
        )

    def _best(self, params: list[Param], below: list, above: list, rng) -> dict:
        names = {p.name for p in params}
        good, rest = (
            Parzen(params, [point for point in points if names <= point.keys()])
            for points in (below, above)
        )
        draws = good.sample(rng, self.candidates)
        return draws[int(np.argmax(good.log_density(draws) - rest.log_density(draws)))]


# 4. Early stopping: how far a trial may go
#
# A rule is a pure function of the table `rungs` {step: {trial: value}}, in order of arrival, and of
# the trials' states. It keeps nothing itself: a study that was killed goes on as it would have.
# budgets(i) are the rungs of trial i, judge(...) the state in which a report leaves its trial,
# promote(...) a paused trial that may go on now, where there are to be `total` trials. Lower values
# are better, NaN is worse than all.


@dataclass(frozen=True)
class Full:
    """Every trial gets the whole budget."""

    budget: int

    def budgets(self, index: int) -> list[int]:
        return [self.budget]

    def judge(self, rungs: dict, states: dict, index: int, step: int) -> str:
        return "done" if step >= self.budget else "running"

    def promote(self, rungs: dict, states: dict, total: float) -> int | None:
        return None


@dataclass(frozen=True)
class Median(Full):
    """Prunes a trial whose best report so far is worse than the median of the finished ones.

    Compared at the same step, once `startup` trials are done and from step `warmup` on. every: the
    runs are made in pieces so long, for objectives that do not report on their way.
    """

    startup: int = 5
    warmup: int = 0
    every: int | None = None

    def budgets(self, index: int) -> list[int]:
        return [*range(self.every or self.budget, self.budget, self.every or 1), self.budget]

    def judge(self, rungs: dict, states: dict, index: int, step: int) -> str:
        if step >= self.budget:
            return "done"
        done = [i for i, state in states.items() if state == "done"]
        there = [rungs[step][i] for i in done if i in rungs[step]]
        there = [v for v in there if not math.isnan(v)]
        if len(done) < self.startup or step < self.warmup or not there:
            return "running"
        best = min(worse_if_nan(rungs[s][index]) for s in rungs if s <= step and index in rungs[s])
        return "pruned" if best > statistics.median(there) else "running"


def geometric(first: int, last: int, eta: int) -> list[int]:
    """first, first*eta, first*eta^2 ..., and last at the end."""
    check(1 <= first <= last, "min_budget", first, f"1 to {last}, the whole budget")
    check(eta >= 2, "eta", eta, "at least 2")
    rungs = []
    while first < last:
        rungs.append(first)
        first *= eta
    return [*rungs, last]


def passes(form: str, value: float, earlier: list[float], eta: int) -> bool:
    """Whether a newcomer to a rung is good enough to go on at once.

    "stop": it is among the best 1/eta of all with itself, or the best of fewer than eta (optuna).
    "percentile": it is not worse than the best 1/eta quantile of those before it, and the first
    always passes (ray).
    """
    if math.isnan(value):
        return False
    earlier = [v for v in earlier if not math.isnan(v)]  # they do not count in either
    if form == "percentile":
        return not earlier or value <= np.percentile(earlier, 100 / eta)
    everybody = sorted([*earlier, value])
    return value <= everybody[max(len(everybody) // eta, 1) - 1]


@dataclass(frozen=True)
class ASHA:
    """Asynchronous successive halving: at each rung the best 1/eta go on, without waiting.

    "promote" (the paper's form): a trial pauses at its rung, and whenever a worker is free the
    best paused trial within the top 1/eta of its rung goes on. "stop" and "percentile": it goes
    on at once or never, judged by those that came before it. They are not the same; see `passes`.
    """

    budget: int
    first: int = 1
    eta: int = 4
    form: str = "promote"

    def __post_init__(self):
        forms = ("promote", "stop", "percentile")
        check(self.form in forms, "form", self.form, f"one of {forms}")
        geometric(self.first, self.budget, self.eta)

    def budgets(self, index: int) -> list[int]:
        return geometric(self.first, self.budget, self.eta)

    def judge(self, rungs: dict, states: dict, index: int, step: int) -> str:
        if step >= self.budget:
            return "done"
        if step not in self.budgets(index):
            return "running"
        value = rungs[step][index]
        if self.form == "promote":
            return "pruned" if math.isnan(value) else "paused"
        before = itertools.takewhile(lambda item: item[0] != index, rungs[step].items())
        on = passes(self.form, value, [v for _, v in before], self.eta)
        return "running" if on else "pruned"

    def promote(self, rungs: dict, states: dict, total: float) -> int | None:
        if self.form == "promote":
            for low in reversed(self.budgets(0)[:-1]):
                there = rungs.get(low, {})
                best = sorted(there, key=lambda i: worse_if_nan(there[i]))
                for index in best[: len(there) // self.eta]:
                    # paused at this rung, not at a higher one
                    if states[index] == "paused" and index not in rungs.get(
                        self.after(low), {}
                    ):
                        return index
        return None

    def after(self, rung: int) -> int:
        return next(b for b in self.budgets(0) if b > rung)


@dataclass(frozen=True)
class Hyperband:
    """Successive halving, where all of a rung are compared at once, in brackets that hedge.

    Bracket s starts ceil((S + 1)/(s + 1) eta^s) trials at budget/eta^s and keeps the best
    1/eta of a complete rung for the next. S brackets: from many trials cut early to few never cut.
    brackets: only so many of them; 1 is plain successive halving. Trials are assigned by index,
    again from the first bracket when all are full.
    """

    budget: int
    eta: int = 3
    brackets: int | None = None

    def __post_init__(self):
        check(self.budget >= 1, "budget", self.budget, "at least 1")
        check(self.eta >= 2, "eta", self.eta, "at least 2")

    def plan(self) -> list[tuple[int, list[int]]]:
        """(trials, rungs) of each bracket."""
        S = 0
        while self.eta ** (S + 1) <= self.budget:
            S += 1
        kept = range(S, -1, -1)[: self.brackets]
        return [
            (
                math.ceil((S + 1) * self.eta**s / (s + 1)),
                [self.budget // self.eta**k for k in range(s, -1, -1)],
            )
            for s in kept
        ]

    def bracket(self, index: int) -> tuple[range, list[int]]:
        """The trials that the one with this index competes with, and their rungs."""
        start = 0
        for size, rungs in itertools.cycle(self.plan()):
            if index < start + size:
                return range(start, start + size), rungs
            start += size

    def budgets(self, index: int) -> list[int]:
        return self.bracket(index)[1]

    def judge(self, rungs: dict, states: dict, index: int, step: int) -> str:
        if step >= self.budget:
            return "done"
        return "paused" if step in self.budgets(index) else "running"

    def promote(self, rungs: dict, states: dict, total: float) -> int | None:
        start = 0
        while start < len(states):
            trials, budgets = self.bracket(start)
            start = trials.stop
            members = [i for i in trials if i < total]
            for low, high in itertools.pairwise(budgets):
                there = rungs.get(low, {})
                if any(i not in there and states.get(i) != "failed" for i in members):
                    break  # this rung is not complete
                ranked = sorted((worse_if_nan(there[i]), i) for i in members if i in there)
                members = [i for _, i in ranked[: len(members) // self.eta]]
                for i in members:
                    if states[i] == "paused" and i not in rungs.get(high, {}):
                        return i
        return None


# 5. The store: every fact of a study, one line each, appended and never changed


class Store:
    """The file study.jsonl in a folder.

    Lines: {"study": what may not change}, {"session": where and when a process took it up},
    {"trial": i, "params": ..., "seed": ...}, {"trial": i, "state": ...} and {"trial": i, "step":
    ..., "value": ..., "state": ...}. A report and the decision on it are one line, and a line
    counts once its newline is written: at every byte the file is a study from which to go on.
    NaN and infinity are written as NaN and Infinity, which Python's json reads back.
    """

    def __init__(self, folder: Path):
        self.folder, self.file = folder, folder / "study.jsonl"

    def read(self) -> list[dict]:
        """All complete lines."""
        lines = self.file.read_bytes().split(b"\n")[:-1] if self.file.exists() else []
        entries = []
        for number, line in enumerate(lines, 1):
            try:
                entries.append(json.loads(line))
                if not isinstance(entries[-1], dict):
                    raise ValueError("not an object")
            except ValueError as error:
                raise SweepError(
                    f"{self.file}, line {number} of {len(lines)} is damaged ({error}); restore the "
                    "file from a copy, or choose another folder"
                ) from error
        return entries

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder, and cuts off what a kill left of the last line."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "w") as lock:
            try:
                if fcntl is not None:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise SweepError(f"{self.folder}: another process is running this study") from error
            if self.file.exists():
                whole = self.file.read_bytes().rfind(b"\n") + 1
                os.truncate(self.file, whole)
            yield

    def append(self, **entry) -> None:
        with open(self.file, "a") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())


def replay(entries: list[dict]) -> list[Trial]:
    """The trials that the lines of a store describe.

    Raises: SweepError where a line contradicts an earlier one: parameters are written once.
    """
    trials: list[Trial] = []
    for entry in entries:
        if "trial" not in entry:
            continue
        index = entry["trial"]
        if "params" in entry:
            if index != len(trials):
                raise SweepError(f"the store has trial {index} where {len(trials)} was to come: "
                                 "parameters are written once, in order")  # fmt: skip
            trials.append(Trial(index, entry["params"], entry["seed"]))
            continue
        check(index < len(trials), "trial", index, f"one of the {len(trials)} that have parameters")
        trial = trials[index]
        trial.state = entry["state"]
        trial.message = entry.get("message", "")
        trial.seconds += entry.get("seconds", 0.0)
        if "step" in entry:
            known = (entry["tokens"], entry["error"], entry["seconds"])
            trial.reports.append(Report(entry["step"], entry["value"], *known))
    return trials


def surroundings() -> dict:
    """Where and with what a study runs: what one would want to know a year later."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain", "--untracked-files=no")
    return {
        "time": time.time(),
        "command": shlex.join(sys.argv),
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "host": platform.node(),
    }


# 6. Execution: objectives, in this process, in others, or on other machines
#
# An objective is called with (config, budget, folder): the chosen values and "seed", how far to go,
# and a folder of its own, in which it may find what it left there when it was here last. It
# returns the value at that budget, or yields (step, value) or Reports up to it.

Objective = Callable[[dict, int, Path], float | Iterator]


def follow(objective: Objective, config: dict, budget: int, folder: Path) -> Iterator[Report]:
    """The reports of one call; what the objective prints goes to folder/log.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    items = None
    while True:
        started = time.perf_counter()
        with open(folder / "log.txt", "a") as log, contextlib.redirect_stdout(log):
            if items is None:
                result = objective(config, budget, folder)
                alone = isinstance(result, numbers.Real)
                items = iter([(budget, result)] if alone else result)
            item = next(items, None)
        if item is None:
            return
        report = Report(*item)
        yield report._replace(value=float(report.value), seconds=time.perf_counter() - started)


def needed(module: str, package: str, flag: str):
    """An optional package, or one line that says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SweepError(f"{flag} needs {package}: pip install {package}") from error


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")


class WorkerDied(Exception):
    """A worker ended in the midst of a trial."""


class Here:
    """A worker: it has one trial at a time, and stops after each report to hear what to do.

    send: a job (config, budget, folder) to begin, True to go on, False to leave the trial. After
    the first two, receive() waits for what comes: a report, None at the end, or the message of a
    crash. This one works when it is asked; the others are such a one elsewhere.
    """

    def __init__(self, objective: Objective):
        self.objective, self.reports = objective, None

    def send(self, message: tuple | bool) -> None:
        if message is False:
            self.reports.close()
        elif message is not True:
            self.reports, self.folder = follow(self.objective, *message), message[-1]

    def receive(self) -> tuple | str | None:
        try:
            report = next(self.reports, None)
            return report and tuple(report)
        except training.Stopped as stopped:  # a signal, which 06 catches: no fault of the trial
            raise KeyboardInterrupt from stopped
        except Exception as error:
            (self.folder / "error.txt").write_text(traceback.format_exc())
            return one_line(error)

    @staticmethod
    def ready(workers: list) -> list:
        """Those whose news are there; waits for the first."""
        return workers

    def close(self) -> None:
        if self.reports:
            self.reports.close()


def serve(objective: Objective, pipe: connection.Connection, threads: int) -> None:
    """What the process of an `InProcess` does."""

    def die_with_parent():
        connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)  # or a killed study would train on, in folders that the next one needs

    threading.Thread(target=die_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    worker = Here(objective)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            message = pipe.recv()
            worker.send(message)
            if message is not False:
                pipe.send(worker.receive())


class InProcess:
    """A worker in a process of its own on this machine."""

    def __init__(self, objective: Objective, threads: int):
        methods = multiprocessing.get_all_start_methods()
        method = "forkserver" if "forkserver" in methods else "spawn"
        context = multiprocessing.get_context(method)
        if method == "forkserver":  # imports torch once, not in every worker
            context.set_forkserver_preload(["__main__", "06_train"])
        self.pipe, theirs = context.Pipe()
        arguments = (objective, theirs, threads)
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def send(self, message: tuple | bool) -> None:
        self.pipe.send(message)

    def receive(self) -> tuple | str | None:
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            self.process.join()
            raise WorkerDied(f"exit code {self.process.exitcode}") from error

    @staticmethod
    def ready(workers: list) -> list:
        pipes = connection.wait([w.pipe for w in workers])
        return [w for w in workers if w.pipe in pipes]

    def close(self) -> None:
        self.pipe.close()
        self.process.terminate()
        self.process.join()


class OnRay:
    """A worker on a Ray cluster, with a CPU of it and a share of its GPUs.

    The study's folder and these files have to lie at the same place on all of its machines.
    """

    def __init__(self, objective: Objective, gpus: float):
        self.ray = importlib.import_module("ray")
        actor = self.ray.remote(num_cpus=1, num_gpus=gpus)(Here)
        self.actor = actor.remote(objective)

    @staticmethod
    def connect(workers: int):
        """Finds the cluster at RAY_ADDRESS, as Ray's commands do, or makes one of this machine."""
        ray = needed("ray", "ray", "--executor ray")
        address = os.environ.get("RAY_ADDRESS", "local")
        paths = {"PYTHONPATH": os.pathsep.join(filter(None, map(os.path.abspath, sys.path)))}
        settings: dict = {"runtime_env": {"env_vars": paths}, "log_to_driver": False}
        settings["logging_level"] = logging.ERROR
        if address == "local":
            settings |= {"num_cpus": workers, "include_dashboard": False}
            settings |= {"object_store_memory": 10**8}  # bytes: only reports go through it
        try:
            ray.init(address, **settings)
        except Exception as error:  # Ray raises several kinds where no cluster answers
            raise SweepError(f"RAY_ADDRESS={address}: {one_line(error)}") from error
        return ray

    def send(self, message: tuple | bool) -> None:
        self.actor.send.remote(message)
        if message is not False:
            self.news = self.actor.receive.remote()

    def receive(self) -> tuple | str | None:
        try:
            return self.ray.get(self.news)
        except self.ray.exceptions.RayError as error:
            raise WorkerDied(str(error).splitlines()[0]) from error

    @staticmethod
    def ready(workers: list) -> list:
        found, _ = workers[0].ray.wait([w.news for w in workers])
        return [w for w in workers if w.news in found]

    def close(self) -> None:
        self.ray.kill(self.actor)


class Workers:
    """Runs as many trials at a time as there are workers; another takes the place of a dead one."""

    def __init__(self, hire: Callable[[], Here | InProcess | OnRay], count: int):
        self.hire, self.running = hire, {}
        self.idle = [hire() for _ in range(count)]

    def start(self, index: int, *job) -> None:
        self.running[index] = self.idle.pop()
        self.running[index].send(job)

    def wait(self) -> tuple[int, Report | str | None]:
        """(trial, its next report), (trial, None) at its end, (trial, message) when it crashed."""
        busy = list(self.running.values())
        ready = busy[0].ready(busy)
        index = min(i for i, worker in self.running.items() if worker in ready)
        try:
            news = self.running[index].receive()
        except WorkerDied as error:
            self.running[index], news = self.hire(), f"WorkerDied: {error}"
        if isinstance(news, tuple):
            return index, Report(*news)
        self.idle.append(self.running.pop(index))
        return index, news

    def answer(self, index: int, go_on: bool) -> None:
        """To be called after each report."""
        self.running[index].send(go_on)
        if not go_on:
            self.idle.append(self.running.pop(index))

    def close(self) -> None:
        for worker in [*self.idle, *self.running.values()]:
            worker.close()


@contextlib.contextmanager
def employed(objective: Objective, count: int, executor: str) -> Iterator[Workers]:
    """So many workers: for "local" here or, from two on, in processes; for "ray" on a cluster."""
    ray = OnRay.connect(count) if executor == "ray" else None
    if ray:
        gpus = min(1.0, ray.cluster_resources().get("GPU", 0.0) / count)
        pool = Workers(lambda: OnRay(objective, gpus), count)
    elif count == 1:
        pool = Workers(lambda: Here(objective), count)
    else:
        threads = max(1, torch.get_num_threads() // count)
        pool = Workers(lambda: InProcess(objective, threads), count)
    try:
        yield pool
    finally:
        pool.close()
        if ray:
            ray.shutdown()


# 7. The study: space, sampler, rule, store and workers together


@dataclass(frozen=True)
class Limits:
    """Where a study ends. None: no such limit. What is spent before a resume counts."""

    trials: int | None = None
    tokens: float | None = None
    seconds: float | None = None  # by the clock
    dollars: float | None = None  # at `price` for an hour of one worker
    price: float = 0.0

    @property
    def endless(self) -> bool:
        return (self.trials, self.tokens, self.seconds, self.dollars) == (None,) * 4


def describe(thing) -> object:
    """Any part of a study in terms of JSON; a function by its name."""
    if is_dataclass(thing):
        named = {f.name: describe(getattr(thing, f.name)) for f in fields(thing)}
        return {type(thing).__name__: named}
    if isinstance(thing, dict):
        return {str(key): describe(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple, range)):
        return [describe(item) for item in thing]
    return getattr(thing, "__name__", type(thing).__name__) if callable(thing) else thing


class Study:
    def __init__(
        self,
        folder: Path | str,
        space: dict | Space,
        objective: Objective,
        sampler: Random | Sobol | Grid | TPE,
        rule: Full | Median | ASHA | Hyperband,
        seed: int = 0,
    ):
        """A study that lives in a folder; one that is there already is taken up.

        Raises: SweepError when the folder holds another study.
        """
        self.folder, self.objective = Path(folder), objective
        self.space = space if isinstance(space, Space) else Space(space)
        self.sampler, self.rule, self.seed = sampler, rule, seed
        self.store = Store(self.folder)
        self.load()

    def identity(self) -> dict:
        """All that may not change while the study lasts."""
        parts = ("sampler", "rule", "objective", "seed")
        identity = {name: describe(getattr(self, name)) for name in parts}
        identity["space"] = describe([self.space.params, self.space.constants])
        return json.loads(json.dumps(identity))

    def load(self) -> None:
        entries = self.store.read()
        stored = entries[0].get("study", {}) if entries else None
        if stored is not None:
            for name, value in self.identity().items():
                if stored.get(name) != value:
                    raise SweepError(
                        f"{self.folder} holds another study: its {name} is {stored.get(name)}, not "
                        f"{value}; choose another folder, or the same {name}"
                    )
        self.trials = replay(entries)
        self.rungs: dict[int, dict[int, float]] = {}
        for entry in entries:
            if "step" in entry:
                self.rungs.setdefault(entry["step"], {})[entry["trial"]] = entry["value"]
        self.clock = self._clock(entries)

    @staticmethod
    def _clock(entries: list[dict]) -> float:
        """Seconds that earlier sessions took, to their last line."""
        total, began, last = 0.0, None, None
        for entry in entries:
            if "session" in entry:
                total += last - began if began is not None else 0.0
                began = entry["session"]["time"]
            last = entry.get("time", began)
        return total + (last - began if began is not None else 0.0)

    @property
    def states(self) -> dict[int, str]:
        return {t.index: t.state for t in self.trials}

    @property
    def best(self) -> Trial | None:
        """The best of those that went farthest."""
        valued = [t for t in self.trials if t.value is not None]
        return min(valued, key=rank, default=None)

    def record(self, trial: Trial, state: str, report: Report | None = None, **more) -> None:
        if report is not None:
            more |= report._asdict()
            trial.reports.append(report)
            trial.seconds += report.seconds
            self.rungs.setdefault(report.step, {})[trial.index] = report.value
        trial.state, trial.message = state, more.get("message", "")
        self.store.append(trial=trial.index, state=state, time=time.time(), **more)

    def ask(self) -> Trial | None:
        """A new trial, written down before it starts; None while the sampler has to wait."""
        index = len(self.trials)
        if isinstance(self.sampler, TPE):
            seen = self.trials[: max(0, index - self.sampler.delay + 1)]
            if any(t.state in ("queued", "running") for t in seen):
                return None
        params = self.sampler.suggest(self.space, self.seed, index, self.trials)
        seed = int(np.random.default_rng((self.seed, index, 1)).integers(2**31))
        self.store.append(trial=index, params=params, seed=seed)
        self.trials.append(Trial(index, params, seed))
        return self.trials[-1]

    def next_budget(self, trial: Trial) -> int:
        return next(b for b in self.rule.budgets(trial.index) if b > trial.reached)

    def spent(self) -> dict[str, float]:
        seconds = sum(t.seconds for t in self.trials)
        return {
            "tokens": sum(t.tokens for t in self.trials),
            "seconds": self.clock + time.time() - self.began,
            "dollars": seconds / 3600 * self.limits.price,
        }

    def affordable(self, busy: list[Trial]) -> bool:
        """Whether one more rung may start: not if what runs now will probably reach a limit."""
        spent = self.spent()
        done = sum(t.reached for t in self.trials)
        coming = sum(self.next_budget(t) - t.reached for t in busy)
        for name, amount in spent.items():
            limit = getattr(self.limits, name)
            if limit is None:
                continue
            if name != "seconds":  # the clock runs once for all workers
                amount += coming * amount / done if done else (math.inf if busy else 0)
            if amount >= limit:
                return False
        return True

    def next_job(self, busy: list[Trial]) -> Trial | None:
        """The trial that a free worker takes up: interrupted, promoted or new, in this order."""
        if not self.affordable(busy):
            return None
        for trial in self.trials:
            if trial.state in ("queued", "running") and trial not in busy:
                return trial
        total = math.inf if self.limits.trials is None else self.limits.trials
        if isinstance(self.sampler, Grid):
            total = min(total, len(self.sampler.all(self.space)))
        promoted = self.rule.promote(self.rungs, self.states, total)
        if promoted is not None:
            return self.trials[promoted]
        return self.ask() if len(self.trials) < total else None

    def run(
        self, limits: Limits, workers: int = 1, show: bool = True, executor: str = "local"
    ) -> Study:
        """Goes on until a limit is reached or nothing is left to do. Ctrl-C loses nothing."""
        check(workers >= 1, "workers", workers, "at least 1")
        ends = not limits.endless or isinstance(self.sampler, Grid)
        check(ends, "limits", limits, "at least one")
        delay = getattr(self.sampler, "delay", workers)
        check(workers <= delay, "workers", workers, f"at most TPE's delay={delay}")
        self.limits, self.began = limits, time.time()
        with self.store.locked():
            self.load()
            if not self.store.read():
                self.store.append(study=self.identity())
            self.store.append(session=surroundings())
            with employed(self.objective, workers, executor) as pool:
                self._loop(pool, show)
        return self

    def _loop(self, pool: Workers, show: bool) -> None:
        while True:
            busy = [self.trials[i] for i in pool.running]
            while pool.idle and (trial := self.next_job(busy)):
                self.record(trial, "running")
                config = {"seed": trial.seed} | self.space.config(trial.params)
                folder = self.folder / f"trial-{trial.index:05d}"
                pool.start(trial.index, config, self.next_budget(trial), folder)
                busy.append(trial)
            if not busy:
                return
            index, news = pool.wait()
            trial = self.trials[index]
            if isinstance(news, Report):
                pool.answer(index, self.take(trial, news))
            elif isinstance(news, str):
                self.record(trial, "failed", message=news)
            elif trial.reached not in self.rule.budgets(index):
                message = f"no report at its budget, the last at {trial.reached}"
                self.record(trial, "failed", message=message)
            if show:
                print(self.progress(), flush=True)

    def take(self, trial: Trial, report: Report) -> bool:
        """Notes a report and judges its trial; whether this call of the objective is to go on."""
        if report.step <= trial.reached:
            return True  # a trial that was interrupted says again what is known already
        budget = self.next_budget(trial)
        self.rungs.setdefault(report.step, {})[trial.index] = report.value
        state = self.rule.judge(self.rungs, self.states, trial.index, report.step)
        self.record(trial, state, report)
        return state == "running" and report.step < budget

    def progress(self) -> str:
        """One line: how many trials are over, the best so far, what is spent and what is left."""
        count = collections.Counter(self.states.values())
        over = sum(count.get(state, 0) for state in ("done", "pruned", "paused", "failed"))
        spent = self.spent()
        shares = [amount / getattr(self.limits, name)
                  for name, amount in spent.items() if getattr(self.limits, name)]  # fmt: skip
        shares.append(over / self.limits.trials if self.limits.trials else 0)
        known = over > 0 and max(shares) > 0  # before a trial is over it would be a wild guess
        left = spent["seconds"] * (1 / max(shares) - 1) if known else math.nan
        best = self.best
        return (
            f"{over}/{self.limits.trials or '?'} trials | "
            + (f"best {best.value:.4f} (trial {best.index}) | " if best else "")
            + " ".join(f"{state} {n}" for state, n in sorted(count.items()))
            + f" | {spent['tokens']:,} tokens | {spent['seconds']:.0f} s"
            + (f", about {max(left, 0):.0f} s left" if left == left else "")
        )


# 8. Objectives: a run of 06_train.py, any command line, and the mean of several runs


@dataclass(frozen=True)
class Train:
    """Validation loss, nats/token, of 06_train.py after `budget` steps. flags: its other fields.

    A longer budget goes on from the checkpoint of the shorter one, which it replaces. That is the
    same run only where the schedule does not look at the end: "constant", with its warmup.
    """

    flags: dict

    def __call__(self, chosen: dict, budget: int, folder: Path) -> Iterator[Report]:
        out = folder / f"step-{budget:08d}"
        shorter = sorted(f for f in folder.glob("step-*") if f.is_dir() and f.name < out.name)
        place = {"out": str(out), "max_steps": budget, "resume": True}
        if shorter:
            place["branch"] = str(shorter[-1])
        results = training.train(training.Config(**{**self.flags, **chosen, **place}))
        used = training.stored_config(out)
        for name, value in chosen.items():  # did the run use what was chosen for it?
            check(used[name] == value, name, used[name], f"{value}, which was chosen")
        for checkpoint in (f for s in shorter for f in s.glob("step-*.pt")):
            checkpoint.unlink()
        for line in (out / "metrics.jsonl").read_text().splitlines():
            entry = json.loads(line)
            if "val_nats" in entry and entry["step"] < budget:
                yield Report(entry["step"], entry["val_nats"], results["tokens"])  # all are spent
        yield Report(budget, results["val_nats"], results["tokens"])


@dataclass(frozen=True)
class Command:
    """What a program prints as `key: NUMBER`, the last time.

    template: its command line, with {name} for a chosen value, {seed}, {budget} and {folder}.
    """

    template: str
    key: str = "val_nats"

    def __call__(self, chosen: dict, budget: int, folder: Path) -> float:
        try:
            words = [word.format(**chosen, budget=budget, folder=folder)
                     for word in shlex.split(self.template)]  # fmt: skip
        except KeyError as error:
            raise SweepError(f"--command: {error} is not in the space") from error
        done = subprocess.run(words, capture_output=True, text=True)
        (folder / "output.txt").write_text(done.stdout + done.stderr)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise SweepError(f"exit status {done.returncode}: {last}")
        found = re.findall(rf"^{re.escape(self.key)}: *(\S+)", done.stdout, flags=re.MULTILINE)
        check(bool(found), "output", done.stdout[-80:], f"a line '{self.key}: NUMBER'")
        return float(found[-1])


@dataclass(frozen=True)
class Repeated:
    """The mean over several runs and its standard error: name="seed", or "fold" for k folds."""

    objective: Objective
    name: str
    values: tuple

    def __call__(self, chosen: dict, budget: int, folder: Path) -> Iterator[Report]:
        by_step: dict[int, list[Report]] = {}
        for value in self.values:
            config, sub = {**chosen, self.name: value}, folder / f"{self.name}-{value}"
            for report in follow(self.objective, config, budget, sub):
                by_step.setdefault(report.step, []).append(report)
        n = len(self.values)
        for step, reports in sorted(by_step.items()):
            if len(reports) == n:
                found = np.array([r.value for r in reports])
                error = float(found.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
                yield Report(step, float(found.mean()), sum(r.tokens for r in reports), error)


def folds(n: int, k: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """(indices to train on, indices held out) of k folds of n things; each is held out once."""
    check(2 <= k <= n, "k", k, f"2 to n={n}")
    parts = np.array_split(np.random.default_rng(seed).permutation(n), k)
    return [(np.concatenate(parts[:i] + parts[i + 1 :]), parts[i]) for i in range(k)]


# 9. Reports


def compared(study: Study) -> dict[int, float]:
    """{trial: value} at the step that most trials have reached: values that may be compared."""
    rungs = study.rungs.values()
    return max(rungs, key=len, default={})


def importance(study: Study) -> dict[str, float]:
    """The share of each parameter in the variance of the ranks of the values; they sum to 1.

    Trials are put into groups of equal size along one parameter (options into one each); what the
    group means explain of the variance, less what chance would explain (epsilon squared), is its
    main effect. What two parameters do only together is not seen. All 0: nothing beyond chance.
    """
    values = compared(study)
    n = len(values)
    ranks = np.argsort(np.argsort([worse_if_nan(v) for v in values.values()])).astype(float)
    effects = {}
    for param in study.space.params:
        seen = [study.trials[i].params.get(param.name) for i in values]
        if isinstance(param.kind, Choice):
            group = np.array([repr(v) for v in seen])
        else:
            x = np.array([math.nan if v is None else v for v in seen])
            group = np.argsort(np.argsort(x)) * min(8, max(2, n // 8)) // max(n, 1)
            group[np.isnan(x)] = -1
        labels = np.unique(group)
        within = sum(((ranks[group == g] - ranks[group == g].mean()) ** 2).sum() for g in labels)
        total = ((ranks - ranks.mean()) ** 2).sum() if n else 0
        free = n - len(labels)
        effects[param.name] = max(0.0, 1 - within / total * (n - 1) / free) if free > 0 else 0.0
    whole = sum(effects.values())
    return {name: e / whole if whole else 0.0 for name, e in effects.items()}


def show(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def ranked(study: Study) -> list[Trial]:
    """Trials with a value, the best first."""
    return sorted((t for t in study.trials if t.value is not None), key=rank)


def table(study: Study, top: int = 10) -> str:
    """The best trials, then those that failed, in columns."""
    names = [p.name for p in study.space.params]
    rows = [["trial", "state", "step", "value", "+-", *names, "tokens", "s"]]
    failed = [t for t in study.trials if t.state == "failed"]
    for t in ranked(study)[:top]:
        error = "" if math.isnan(t.last.error) else f"{t.last.error:.4f}"
        rows.append(
            [str(t.index), t.state, str(t.last.step), f"{t.value:.4f}", error]
            + [show(t.params.get(name, "")) for name in names]
            + [f"{t.tokens:,}", f"{t.seconds:.1f}"]
        )
    if not any(row[4] for row in rows[1:]):
        rows = [row[:4] + row[5:] for row in rows]  # no standard errors
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths)) for row in rows]
    return "\n".join(lines + [f"trial {t.index} failed: {t.message}" for t in failed[:top]])


def best_so_far(study: Study) -> list[tuple[int, float]]:
    """(tokens of all trials, best value of all) after each report."""
    spent, best, curve = {}, math.inf, []
    for entry in study.store.read():
        if "step" in entry:
            spent[entry["trial"]] = entry["tokens"]
            best = min(best, worse_if_nan(entry["value"]))
            curve.append((sum(spent.values()), best))
    return curve


def share_of(param: Param, trial: Trial) -> float:
    """Where a trial's value lies between the ends of its parameter, 0 to 1; nan: it has none."""
    kind, value = param.kind, trial.params.get(param.name)
    if value is None:
        return math.nan
    if isinstance(kind, Choice):
        return (kind.options.index(value) + 0.5) / len(kind.options)
    low, high = kind.ends
    return float((kind.z(value) - low) / (high - low))


def ends(param: Param) -> tuple[str, str]:
    kind = param.kind
    both = kind.options if isinstance(kind, Choice) else (kind.low, kind.high)
    return show(both[0]), show(both[-1])


def parallel(study: Study, width: int = 41) -> str:
    """A text parallel-coordinates view: a line for each parameter, from its low to its high end.

    1 to 9 are the best trials in order, dots all others: follow a digit down to see its point.
    """
    lines = []
    names = max(len(p.name) for p in study.space.params)
    for param in study.space.params:
        strip = [" "] * width
        order = ranked(study)
        for place in reversed(range(len(order))):
            share = share_of(param, order[place])
            if not math.isnan(share):
                strip[min(int(share * width), width - 1)] = str(place + 1) if place < 9 else "."
        low, high = ends(param)
        lines.append(f"{param.name:{names}} {low:>8} |{''.join(strip)}| {high}")
    return "\n".join(lines)


def plot(study: Study, folder: Path) -> list[Path]:
    """Saves curves.png, parallel.png, importance.png and best.png; needs matplotlib."""
    needed("matplotlib", "matplotlib", "--plot").use("Agg")
    plt = importlib.import_module("matplotlib.pyplot")
    folder.mkdir(parents=True, exist_ok=True)
    trials = [t for t in reversed(ranked(study)) if math.isfinite(t.value)]  # the best on top
    colours = plt.get_cmap("viridis")(np.linspace(1, 0, max(len(trials), 1)))  # dark is good
    params = study.space.params
    pictures = {}

    pictures["curves"], axes = plt.subplots()
    for trial, colour in zip(trials, colours):
        steps, values = [r.step for r in trial.reports], [r.value for r in trial.reports]
        axes.plot(steps, values, ".-", color=colour)
    axes.set(xlabel="step", ylabel="value", title="every trial, the best dark")

    pictures["parallel"], axes = plt.subplots(figsize=(1.5 + 1.5 * len(params), 4))
    for trial, colour in zip(trials, colours):
        axes.plot([share_of(p, trial) for p in params], ".-", color=colour)
    axes.set_xticks(range(len(params)), [f"{p.name}\n{' .. '.join(ends(p))}" for p in params])
    axes.set(ylim=(0, 1), title="chosen values, low to high, the best dark")

    pictures["importance"], axes = plt.subplots()
    axes.barh(*zip(*importance(study).items()))
    axes.set(xlabel="share of the variance of ranks")

    pictures["best"], axes = plt.subplots()
    axes.step(*zip(*best_so_far(study)), ".-", where="post")
    axes.set(xlabel="tokens of all trials", ylabel="best value so far")
    for name, figure in pictures.items():
        figure.savefig(folder / f"{name}.png", bbox_inches="tight")
        plt.close(figure)
    return [folder / f"{name}.png" for name in pictures]


def ended(study: Study) -> list[Trial]:
    return [t for t in study.trials if t.state in ("done", "pruned", "failed")]


def to_mlflow(study: Study) -> None:
    """Copies every trial that has ended into mlflow.db in the study's folder, each one once.

    MLflow keeps infinity as the largest float64.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it would call home at import
    mlflow = needed("mlflow", "mlflow", "--track mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{study.folder.resolve()}/mlflow.db")
    found = client.get_experiment_by_name(study.folder.name)
    experiment = found.experiment_id if found else client.create_experiment(study.folder.name)
    there = {run.data.tags["trial"] for run in client.search_runs([experiment], max_results=10_000)}
    status = {"done": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}
    for trial in ended(study):
        if str(trial.index) in there:
            continue
        tags = {"trial": str(trial.index), "state": trial.state, "message": trial.message}
        run = client.create_run(experiment, tags=tags, run_name=f"trial-{trial.index}").info.run_id
        for name, value in {"seed": trial.seed, **trial.params}.items():
            client.log_param(run, name, value)
        for r in trial.reports:
            client.log_metric(run, "value", r.value, step=r.step)
            client.log_metric(run, "tokens", r.tokens, step=r.step)
        client.set_terminated(run, status[trial.state])


def to_wandb(study: Study) -> None:
    """Writes every trial that has ended as an offline run; `wandb sync` uploads them later."""
    wandb = needed("wandb", "wandb", "--track wandb")
    for trial in ended(study):
        run = wandb.init(
            mode="offline", dir=study.folder, project="sweep", group=study.folder.name,
            name=f"trial-{trial.index}", id=f"{study.folder.name}-{trial.index}",
            tags=[trial.state], config={"seed": trial.seed, **trial.params},
        )  # fmt: skip
        for r in trial.reports:
            run.log({"value": r.value, "tokens": r.tokens}, step=r.step)
        run.finish()
    wandb.teardown()  # waits for its second process: finish() comes back before the file is whole


TRACKERS = {"mlflow": to_mlflow, "wandb": to_wandb}


# 10. The command line

SAMPLERS = {
    "random": lambda s: Random(),
    "sobol": lambda s: Sobol(),
    "grid": lambda s: Grid(s.points),
    "tpe": lambda s: TPE(joint=True, delay=s.delay),
    "tpe-independent": lambda s: TPE(joint=False, delay=s.delay),
}
RULES = {
    "none": lambda s: Full(s.budget),
    "median": lambda s: Median(s.budget, every=s.min_budget),
    "halving": lambda s: Hyperband(s.budget, s.eta, brackets=1),
    "hyperband": lambda s: Hyperband(s.budget, s.eta),
    "asha": lambda s: ASHA(s.budget, s.min_budget, s.eta, "promote"),
    "asha-stop": lambda s: ASHA(s.budget, s.min_budget, s.eta, "stop"),
    "asha-percentile": lambda s: ASHA(s.budget, s.min_budget, s.eta, "percentile"),
}


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise SweepError(f"{message}; --help lists the flags")


def read_flags(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        description=__doc__.splitlines()[0],
        epilog="What follows -- goes to every run of 06_train.py. No flag at all: a demonstration.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--tune", action="append", default=[], metavar="NAME=SPEC", help="what may be chosen: "
        "learning_rate=1e-3:1e-1:log, batch_size=4:16:step=4, schedule=constant,wsd")  # fmt: skip
    add("--space", type=Path, help="the same from a JSON file, with conditions")
    add("--command", help="a command line to run instead of 06_train.py, with {name}s to fill in")
    add("--key", default="val_nats", help="the name before the number that a command prints")
    add("--out", type=Path, default=Path("runs/sweep"), help="folder of the study")
    add("--report", action="store_true", help="only show what is in --out")
    add("--resume", action="store_true", help="go on with the study in --out")
    add("--sampler", choices=SAMPLERS, default="tpe")
    add("--points", type=int, default=5, help="grid: values of a range that has no step")
    add("--delay", type=int, default=1, help="tpe: workers that may be busy at once")
    add("--rule", choices=RULES, default="none", help="early stopping")
    add("--budget", type=int, default=300, help="steps of a whole run")
    add("--min-budget", type=int, default=30, help="asha: steps to the first rung; median: of "
        "each piece of a run")  # fmt: skip
    add("--eta", type=int, default=3, help="one trial in eta goes on to the next rung")
    add("--seeds", type=int, default=1, help="runs of each trial, to take the mean of")
    add("--seed", type=int, default=0, help="of the study")
    add("--workers", type=int, default=1, help="trials at once; 1: in this process")
    add("--executor", choices=("local", "ray"), default="local", help="where they run: on this "
        "machine, or on the Ray cluster at RAY_ADDRESS (without: one made here)")  # fmt: skip
    add("--trials", type=int, help="end after so many, 20 where no other end is given")
    add("--tokens", type=float, help="end when so many are trained on")
    add("--seconds", type=float, help="end after this time")
    add("--dollars", type=float, help="end when so much is spent at --price")
    add("--price", type=float, default=0.0, help="dollars for an hour of one worker")
    add("--track", choices=TRACKERS, help="at the end, copy the trials to this tracker")
    add("--plot", type=Path, metavar="DIR", help="save pictures there (needs matplotlib)")
    settings = parser.parse_args(argv)
    check(settings.dollars is None or settings.price > 0, "--price", settings.price,
          "above 0 where --dollars is given")  # fmt: skip
    return settings


def read_space(settings: argparse.Namespace) -> Space:
    tree: dict = {}
    if settings.space:
        try:
            tree = json.loads(settings.space.read_text())
        except (OSError, ValueError) as error:
            raise SweepError(f"--space {settings.space}: {error}") from error
        check(isinstance(tree, dict), "--space", settings.space, "a JSON object {name: ...}")
        tree = space_from_json(tree)
    for flag in settings.tune:
        tree |= space_from_flag(flag)
    return Space(tree)


def training_objective(settings: argparse.Namespace, space: Space, flags: list[str]) -> Train:
    """06_train.py as an objective, if it knows every name and the schedule allows the rule."""
    known = {f.name for f in fields(training.Config)} - {"out", "resume", "branch", "max_steps"}
    for name in [*(p.name for p in space.params), *space.constants]:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        if name not in known:
            raise SweepError(f"--tune {name}: 06_train.py has no such field to choose{hint}")
    given = training.read_flags(flags)
    if RULES[settings.rule](settings).budgets(0) != [settings.budget]:
        given = {"schedule": "constant"} | given
        check(given["schedule"] == "constant", "--schedule", given["schedule"],
              f"constant, because --rule {settings.rule} makes runs longer")  # fmt: skip
    config = vars(training.resolve(given))
    warmup = {p.name: p.kind.high for p in space.params if isinstance(p.kind, Range)}
    warmup = warmup.get("warmup_steps", config["warmup_steps"])
    first = RULES[settings.rule](settings).budgets(0)[0]
    check(warmup <= first, "warmup_steps", warmup, f"at most the first rung, {first} steps")
    fixed = {name: value for name, value in config.items() if name in known and name != "seed"}
    return Train(fixed)


def make_study(settings: argparse.Namespace, flags: list[str]) -> Study:
    space = read_space(settings)
    if settings.command:
        objective = Command(settings.command, settings.key)
    else:
        objective = training_objective(settings, space, flags)
    if settings.seeds > 1:
        objective = Repeated(objective, "seed", tuple(range(settings.seeds)))
    sampler, rule = SAMPLERS[settings.sampler](settings), RULES[settings.rule](settings)
    return Study(settings.out, space, objective, sampler, rule, settings.seed)


def report(study: Study) -> None:
    print("\n" + table(study) + "\n\n" + parallel(study))
    print("\nimportance  " + ", ".join(f"{k} {v:.2f}" for k, v in importance(study).items()))


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    if argv in ([], ["transfer"]):
        (transfer if argv else demo)()
        return 0
    cut = argv.index("--") if "--" in argv else len(argv)
    try:
        settings = read_flags(argv[:cut])
        study = make_study(settings, argv[cut + 1 :])
        if study.trials and not (settings.resume or settings.report):
            raise SweepError(f"--out {study.folder} holds this study: add --resume to go on")
        if not settings.report:
            limits = Limits(**{f.name: getattr(settings, f.name) for f in fields(Limits)})
            if limits.endless and settings.sampler != "grid":
                limits = Limits(trials=20)
            study.run(limits, settings.workers, executor=settings.executor)
        report(study)
        if settings.track:
            TRACKERS[settings.track](study)
        if settings.plot:
            print("saved " + ", ".join(map(str, plot(study, settings.plot))))
        return 0
    except (SweepError, training.RunError) as error:
        print(f"07_sweep.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: nothing is lost; --resume goes on")
        return 130


def synthetic(chosen: dict, budget: int, folder: Path) -> float:
    """Like the loss of a small model: a narrow valley in rate and warmup, little else matters.

    The best rate grows with the warmup; decay acts by rate * decay; beta2 hardly at all. At the
    best point 1/budget.
    """
    rate = math.log10(chosen["learning_rate"] / 3e-3) - 0.25 * (chosen["warmup"] / 100 - 1)
    decay = math.log10(chosen["weight_decay"] / 0.1) + 0.5 * rate
    beta2 = math.log10((1 - chosen["beta2"]) / 0.03)
    blow_up = max(0.0, rate - 0.3) ** 2  # too high a rate hurts more than too low a one
    return 2 * rate**2 + 8 * blow_up + 0.4 * decay**2 + 0.2 * beta2**2 + 1 / budget


SYNTHETIC = {
    "learning_rate": Range(1e-5, 1e-1, log=True),
    "weight_decay": Range(1e-3, 1.0, log=True),
    "beta2": Range(0.9, 0.999),
    "warmup": Range(0, 200, step=10),
}


def search(sampler: Random | Sobol | TPE, seed: int, trials: int = 60) -> float:
    """The best value of the synthetic objective that a sampler finds, without any store."""
    space, seen = Space(SYNTHETIC), []
    for index in range(trials):
        params = sampler.suggest(space, seed, index, seen)
        report = Report(1, synthetic(params, 10**9, Path()))
        seen.append(Trial(index, params, seed, "done", [report]))
    return min(t.value for t in seen)


def demo_search(seeds: int = 10, trials: int = 60) -> None:
    print(f"best of {trials} trials on a synthetic objective, median of {seeds} seeds")
    samplers = {
        "random": Random(),
        "Sobol": Sobol(),
        "TPE, each parameter by itself": TPE(joint=False),
        "TPE, jointly": TPE(),
    }
    found = {}
    for name, sampler in samplers.items():
        found[name] = statistics.median(search(sampler, seed, trials) for seed in range(seeds))
        print(f"  {name:30} {found[name]:.4f}")
    assert found["TPE, jointly"] < 0.5 * found["random"], "TPE should halve random's best"


# The main run: ASHA and random search train 06's models for the same number of tokens

TINY = """--preset stories --vocab-size 300 --seq-len 32 --batch-size 8 --schedule constant
--optimizer adamw --device cpu""".split()  # a step has 256 positions, about 240 of them targets
RACE = ["--tune", "learning_rate=1e-5:1.0:log", "--tune", "weight_decay=1e-3:1.0:log",
        "--tune", "warmup_steps=0:5", "--sampler", "random", "--budget", "180",
        "--min-budget", "20", "--eta", "3"]  # fmt: skip


def race(folder: Path, seed: int, runs: int = 10) -> dict[str, Study]:
    """Random search over so many whole runs, and ASHA until it has used as many tokens."""
    text = folder / "stories.txt"
    text.write_text("<|endoftext|>".join(story for story, _ in stories.corpus(1000, seed=0)))
    flags = [*TINY, "--data", str(text), "--cache", str(folder / "cache")]
    studies, limits = {}, Limits(trials=runs)
    for name, rule in (("random", "none"), ("ASHA", "asha")):
        given = [*RACE, "--rule", rule, "--seed", str(seed), "--out", str(folder / name)]
        studies[name] = make_study(read_flags(given), flags).run(limits, show=False)
        limits = Limits(tokens=sum(t.tokens for t in studies[name].trials))
    return studies


def best_at(study: Study, tokens: float) -> float:
    """The best value that a study had after so many tokens."""
    return min((value for spent, value in best_so_far(study) if spent <= tokens), default=math.inf)


def tokens_to_reach(study: Study, value: float) -> float:
    """Tokens of all trials until the study had a value as good; infinity if it never had."""
    return next((spent for spent, best in best_so_far(study) if best <= value), math.inf)


def demo_race(folder: Path, seed: int = 0) -> None:
    studies = race(folder, seed)
    asha, whole = studies["ASHA"], studies["random"]
    tokens = sum(t.tokens for t in whole.trials)
    print(f"\nASHA over {len(asha.trials)} runs of 06_train.py, the best six, nats/token\n")
    print(table(asha, top=6) + "\n\n" + parallel(asha))
    print(f"\nthe best so far, beside random search over {len(whole.trials)} whole runs\n")
    print("   tokens     ASHA   random")
    for share in (0.25, 0.5, 0.75, 1.0):
        found = (best_at(s, share * tokens) for s in (asha, whole))
        print(f"{share * tokens:9,.0f}" + "".join(f"{value:9.4f}" for value in found))
    needs = tokens_to_reach(asha, whole.best.value) / tokens
    print(f"\nASHA had a model as good as random's best after {needs:.0%} of its tokens"
          if needs <= 1 else "\nASHA did not find a model as good as random's best")  # fmt: skip


# 11. Width transfer: a rate tuned on a narrow model, used on a wide one
#
# AdamW moves every weight by about its rate, whatever the gradient's size. What a matrix product
# sums over `width` inputs therefore moves by rate * width in one step, and the best rate falls as
# 1/width. If the hidden matrices (not embedding and gains) get rate * narrow/width instead, and
# start with a spread of 1/sqrt(width) as 03_gpt.py's do, the best rate should stay where it was:
# Yang et al. 2022 (arXiv 2203.03466). Of their rules these are two; so few steps show that it moves
# less, and not that it stays.

WIDTHS = (32, 128)
RATES = [2.0**-k for k in range(10, 4, -1)]


def train_width(
    data: corpus.Data, width: int, rate: float, hidden: float, seed: int, steps: int = 80
) -> float:
    """Validation nats/token of a two-layer GPT, its hidden matrices trained at rate * hidden."""
    T, B = 32, 8
    heads = width // 16
    shape = {"n_layer": 2, "n_head": heads, "n_kv_head": heads, "d_model": width}
    torch.manual_seed(seed)
    model = gpt.GPT(gpt.GPTConfig(data.vocabulary.size, T, **shape, d_mlp=2 * width))
    matrices = [p for block in model.blocks for p in block.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    groups = [{"params": matrices, "share": hidden}, {"params": others, "share": 1.0}]
    optimizer = adamw.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)

    def loss(x: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        h = model.hidden(x)  # (B, T, C)
        return losses.linear_cross_entropy(h, model.embedding.weight, y, reduction=reduction)

    end = data.vocabulary.end
    train, val = (
        batches.Batches(ids, batches.story_rows(ids, end, T), B, T, seed, torch.device("cpu"))
        for ids in (data.train, data.val)
    )
    for step in range(steps):
        x, y, _ = train.batch(step)  # (B, T), (B, T)
        optimizer.zero_grad()
        loss(x, y).backward()
        stability.clip_grad_norm_(list(model.named_parameters()), 1.0)
        for group in optimizer.param_groups:
            schedule = schedules.linear(step, steps, steps // 10, skip_zero=True)
            group["lr"] = rate * group["share"] * schedule
        optimizer.step()
    with torch.no_grad():
        parts = [val.take(np.arange(first, first + B)) for first in range(0, 128, B)]
        nats = sum(loss(x, y, "sum").item() for x, y, _ in parts)
    return nats / sum(count for _, _, count in parts)


def transfer(seeds: int = 3) -> None:
    """Prints the loss over the rate, narrow and wide, with one rate for all and with the rule."""
    torch.set_num_threads(1)
    narrow, wide = WIDTHS
    rows = {
        f"width {narrow}": (narrow, 1.0),
        f"width {wide}, one rate for all": (wide, 1.0),
        f"width {wide}, hidden at {narrow / wide:g} of it": (wide, narrow / wide),
    }
    found = []
    with tempfile.TemporaryDirectory() as folder:
        data = corpus.prepare("stories", Path(folder), vocab_size=300, story_count=1000)
        print(f"validation nats/token, mean of {seeds} seeds, by learning rate\n")
        print(" " * 33 + "".join(f"{rate:9.5f}" for rate in RATES) + "     best", flush=True)
        for name, (width, hidden) in rows.items():
            runs = [[train_width(data, width, rate, hidden, seed) for rate in RATES]
                    for seed in range(seeds)]  # fmt: skip
            means = np.mean(runs, axis=0)  # (rates,)
            found.append(means)
            line = "".join(f"{x:9.3f}" for x in means) + f"{RATES[means.argmin()]:9.5f}"
            print(f"{name:33}" + line, flush=True)
    tuned = found[0].argmin()
    plain, ruled = (row[tuned] - row.min() for row in found[1:])
    print(f"\nthe best of width {narrow} costs width {wide} {plain:.3f} nats with one rate for "
          f"all, {ruled:.3f} with the rule")  # fmt: skip
    assert ruled < plain, "the rule should carry the rate over"


def demo() -> None:
    torch.set_num_threads(1)  # the model is tiny: a second one would be waited for
    demo_search()
    with tempfile.TemporaryDirectory() as folder:
        demo_race(Path(folder))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
