"""Hyperparameter search: spaces, samplers, early stopping, and a store that loses nothing.

    python 07_sweep.py                           # a demonstration: what ASHA saves
    python 07_sweep.py --tune learning_rate=1e-3:3e-2:log --tune weight_decay=0.0:0.3 \
        --sampler tpe --delay 4 --workers 4 --rule asha --budget 300 --trials 40 -- --model 0.5m
    python 07_sweep.py --command "python mine.py --lr {lr}" --tune lr=1e-4:1e-1:log
    python 07_sweep.py --out runs/sweep --resume --trials 60   # goes on; --report: only shows
    python 07_sweep.py ... --plot DIR      pictures;    ... --track mlflow  or wandb, offline
    python 07_sweep.py ... --workers 8 --executor ray   on the Ray cluster at RAY_ADDRESS

A trial is one choice of values and what came of it. Three questions are asked again and again:

    which point next?       a sampler    grid, random, Sobol, TPE
    how far may it go?      a rule       all the way, median, successive halving, Hyperband, ASHA
    what is known so far?   the store    one JSON line for each fact, appended, never changed

TPE splits the trials into the best tenth and the rest, lays a density over each, l and g, draws
from l and takes the draw with the largest l/g. (On a synthetic objective of four parameters the
best of 60 trials is 0.068 at random, 0.054 with Sobol and 0.014 with TPE, medians of 150 seeds, by
tests/test_07_sweep.py.) Successive halving gives n trials a small budget b, the best n/eta of them
eta b, and so on; Hyperband does so for several b; ASHA does not wait until all n are there.

Everything that is decided follows from the store and the study's seed, so that a study killed at
any byte goes on as if nothing had happened, and for grid, random and Sobol any number of workers
tries the same points. For TPE that holds up to --delay workers where every trial is trained to the
end; with early stopping it depends on who comes first.

Under any rule but "none" runs of 06_train.py are made longer step by step, so that their schedule
has to be "constant", and that is what they get; the command printed at the end trains the best
values in one run, where another schedule may be had.

In Python: Study(folder, {"learning_rate": Range(1e-3, 3e-2, log=True)}, objective, TPE(),
ASHA(300)).run(Limits(trials=40)), where objective(config, budget, folder) returns a value to be
minimised or yields (step, value).

Sources: random before grid: Bergstra & Bengio 2012; TPE: Bergstra et al. 2011, Watanabe 2023 (arXiv
2304.11127), constants of optuna 5.0.0; Sobol scrambling: Owen 1998; Hyperband: Li et al. 2016
(1603.06560); ASHA: Li et al. 2018 (1810.05934), its stopping forms: optuna 5.0.0's pruner and
ray 2.60's scheduler; median rule: Vizier, Golovin et al. 2017.

Run: `python 07_sweep.py` (60 s, most of it in 06_train.py, on a core of an AMD EPYC (Zen 5))
prints, from seed 0,

    ASHA over 34 runs of 06_train.py, the best four, nats/token

    trial  state  step   value  learning_rate  weight_decay  warmup_steps  tokens    s
       12   done   180  2.0773       0.001313       0.07795             1  44,468  2.7
        6   done   180  2.1097       0.001149      0.004364             4  44,161  3.0
       24   done   180  2.1528      0.0009733       0.00287             2  44,147  2.9
       22   done   180  2.2187      0.0008425      0.001984             1  43,871  2.8

    learning_rate    1e-05 |.. . .       ..421  579. ..    .    .   .| 1
    weight_decay     0.001 |    4 372. . .. .  . .8..1     .  ..  6..| 1
    warmup_steps         0 |   6      1      3     5      2      9   | 5

    the best so far, beside random search over 10 whole runs

       tokens     ASHA   random
      110,769   2.1097   3.2295
      221,538   2.1097   3.2295
      332,306   2.0773   2.1097
      443,075   2.0773   2.1097

    ASHA had a model as good as random's best after 21% of its tokens
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import difflib
import functools
import importlib
import itertools
import json
import logging
import math
import multiprocessing
import numbers
import operator
import os
import pickle
import platform
import re
import shlex
import socket
import statistics
import string
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from multiprocessing import connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data import stories

try:
    import fcntl
except ImportError:  # not on Windows: there nothing keeps two studies out of one folder
    fcntl = None

training = importlib.import_module("06_train")


class SweepError(Exception):
    """Something the user can put right; shown as one line."""


def check(good: bool, name: str, value: object, wanted: str) -> None:
    if not good:
        raise SweepError(f"{name}={value!r}: wanted {wanted}")


class Checked:
    """What samplers and rules have in common: their whole numbers are at least 1, eta 2."""

    def __post_init__(self):
        for name, value in vars(self).items():
            least = {"eta": 2, "warmup": 0}.get(name, 1)
            check(type(value) is not int or value >= least, name, value, f"at least {least}")
        if "min_budget" in vars(self):
            most = f"at most {self.budget}, the whole budget"
            check(self.min_budget <= self.budget, "min_budget", self.min_budget, most)


# 1. A trial: what is known of one try


def worse_if_nan(value: float) -> float:
    return math.inf if math.isnan(value) else value


class Report(NamedTuple):
    """What an objective says of itself at a step."""

    step: int
    value: float  # to be minimised
    tokens: int = 0  # trained on by this trial so far
    error: float = math.nan  # standard error of the value, if it is a mean of runs; else nan
    seconds: float = 0.0  # that the objective took since its last report: `follow` measures them


STATES = ("queued", "running", "paused", "done", "pruned", "failed")


@dataclass
class Trial:
    """What the store's lines say of one trial."""

    index: int
    params: dict
    seed: int
    state: str = "queued"  # one of STATES; the last three are final
    reports: list[Report] = field(default_factory=list)
    seconds: float = 0.0
    since: float = 0.0  # the time of its last line
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
    """Sorts the best first: finished ones by value, then the others, farthest first; NaN last."""
    place = (0, 0) if trial.state == "done" else (1, -trial.last.step)
    return (math.isnan(trial.value), *place, worse_if_nan(trial.value))


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
        given = {"low": self.low, "high": self.high} | ({"step": self.step} if self.step else {})
        for name, value in given.items():
            check(isinstance(value, (int, float)), name, value, "a number")
        check(self.low < self.high, "low", self.low, f"below high={self.high}; or write a constant")
        check(math.isfinite(self.high - self.low), "low", self.low, "two finite ends")
        check(self.log in (True, False), "log", self.log, "true or false")
        check(not self.log or self.low > 0, "low", self.low, "above 0, because log is on")
        if self.step is not None:
            check(not self.log, "step", self.step, "none, because log is on")
            check(0 < self.step < math.inf, "step", self.step, "finite, above 0")
            count = (self.high - self.low) / self.step
            rounding = 4 * sys.float_info.epsilon * max(abs(self.low), abs(self.high)) / self.step
            good = abs(count - round(count)) < 1e-9 + rounding
            check(good, "high", self.high, "low + a multiple of step")

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
            value = self.low + i * self.stride
            if not self.whole:  # 0.3, not 0.30000000000000004
                value = round(value, 9 - math.floor(math.log10(self.stride)))
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


def as_key(option) -> str:
    """An option as a key of a JSON object, which is a text: "adamw", and "3" or "true"."""
    return option if isinstance(option, str) else json.dumps(option)


@dataclass(frozen=True)
class Choice:
    """One of some values, all equally likely.

    then: what else there is where an option has been taken, as {option: {name: ...}}; the same
    name may stand under several options.
    """

    options: tuple
    then: dict = field(default_factory=dict)

    def __post_init__(self):
        check(isinstance(self.then, dict), "then", self.then, "{option: {name: ...}}")
        object.__setattr__(self, "options", tuple(self.options))
        texts = {as_key(option): option for option in self.options}
        then = {texts.get(key, key): more for key, more in self.then.items()}
        object.__setattr__(self, "then", then)
        check(len(self.options) > 0, "options", self.options, "at least one")
        for option in self.options:
            plain = isinstance(option, (str, int, float, bool, type(None))) and option == option
            check(plain, "option", option, "a text, a number, true, false or null")
        once = len(set(self.options)) == len(self.options)  # 1, 1.0 and True are the same
        check(once, "options", self.options, "each of them once")
        for option, more in self.then.items():
            check(option in self.options, "then", option, f"one of the options {self.options}")
            check(isinstance(more, dict), "then", more, "{name: ...} under each option")

    def at(self, u: float):
        return self.options[int(u * len(self.options))]

    def grid(self, points: int) -> list:
        return list(self.options)


def outermost(kind) -> tuple:
    """Both ends of a Range, all options of a Choice, or a constant."""
    return (kind.low, kind.high) if isinstance(kind, Range) else getattr(kind, "options", (kind,))


@dataclass(frozen=True)
class Param:
    """A leaf of the space. It exists where all (name, option) pairs in `when` have been chosen."""

    name: str
    kind: object  # Range, Choice, or a constant
    when: tuple[tuple[str, object], ...] = ()

    def active(self, chosen: dict) -> bool:
        return all(name in chosen and chosen[name] == option for name, option in self.when)

    def excludes(self, other: Param) -> bool:
        """Whether there is a choice that they need to have come out differently."""
        mine = dict(self.when)
        return any(name in mine and mine[name] != option for name, option in other.when)

    @property
    def label(self) -> str:
        return self.name + "".join(f"[{show(option)}]" for _, option in self.when)


class Space:
    """A tree {name: Range, Choice, constant or another such tree}, as a list of its leaves.

    The leaf `width` in `model` is called "model.width", and an objective finds it as
    config["model"]["width"]. What stands under `then` of a choice lies beside that choice.
    """

    def __init__(self, tree: dict):
        self.tree = tree
        self.params: list[Param] = []
        self.constants: list[Param] = []
        self.always = self._add(tree, "", ())
        if not self.params:
            raise SweepError("the space is empty: wanted at least one Range or Choice")

    def _add(self, tree: dict, prefix: str, when: tuple) -> set[str]:
        """Notes the leaves of a tree; returns the names that exist whatever is chosen."""
        always = set()
        for name, kind in tree.items():
            check(isinstance(name, str) and name, "name", name, "a text")
            check(name != "class" or not isinstance(kind, str), "class", kind, "another name")
            full = prefix + name
            if isinstance(kind, dict):
                always |= self._add(kind, full + ".", when)
                continue
            leaf = Param(full, kind, when)
            for other in (*self.params, *self.constants):
                if full == other.name and not leaf.excludes(other):
                    raise SweepError(f"the space has {full!r} twice")
                pairs = ((full, other.name), (other.name, full))
                if any(long.startswith(f"{short}.") for long, short in pairs):
                    raise SweepError(f"{full!r} and {other.name!r}: one is a value, not a group")
            (self.params if isinstance(kind, (Range, Choice)) else self.constants).append(leaf)
            always.add(full)
            then = getattr(kind, "then", {})
            more = [self._add(then[option], prefix, (*when, (full, option))) for option in then]
            if more and len(more) == len(kind.options):
                always |= set.intersection(*more)
        return always

    def pick(self, values: Callable[[int, Param], object]) -> dict:
        """{name: value} of the leaves that exist, parents first."""
        chosen: dict = {}
        for i, param in enumerate(self.params):
            if param.active(chosen):
                chosen[param.name] = values(i, param)
        return chosen

    def from_unit(self, u: np.ndarray) -> dict:
        """The point at u (leaves,) in [0, 1): each leaf has its own coordinate, used or not."""
        return self.pick(lambda i, param: param.kind.at(float(u[i])))

    def config(self, chosen: dict) -> dict:
        """Constants and chosen values, as the nested dictionary that an objective gets."""
        tree: dict = {}
        constants = {p.name: p.kind for p in self.constants if p.active(chosen)}
        for name, value in {**constants, **chosen}.items():
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
                unknown = sorted(node.keys() - {"choice", "then"})
                check(not unknown, "choice", unknown, 'nothing beside it but "then"')
                options, then = node["choice"], node.get("then", {})
                check(isinstance(options, list), "choice", options, "a list")
                out[name] = Choice(options, space_from_json(then) if type(then) is dict else then)
            elif isinstance(node, dict) and {"low", "high"} & set(node):
                out[name] = Range(**node)
            else:
                out[name] = space_from_json(node) if isinstance(node, dict) else node
        except TypeError as error:
            raise SweepError(f"{name}: {error}; wanted low, high, log, step") from error
        except SweepError as error:
            raise SweepError(f"{name}: {error}") from error
    return out


def number_or_text(text: str):
    """3 -> 3, 3.0 -> 3.0, true -> True, and adamw stays a text."""
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
                known = part == "log" or (key == "step" and value)
                check(bool(known), "--tune", flag, "log or step=S after NAME=LOW:HIGH:")
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
class Grid(Checked):
    """Every combination once; a range without a step counts with `points` values."""

    points: int = 5

    def all(self, space: Space) -> list[dict]:
        """The combinations in order, the last name fastest."""
        found = [{}]
        for param in space.params:
            more = [{param.name: value} for value in param.kind.grid(self.points)]
            found = [p | one for p in found for one in (more if param.active(p) else [{}])]
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
class TPE(Checked):
    """Draws from where good trials lie and takes the draw that is least like the other trials.

    Good are the best tenth, l their density and g that of the rest; of `candidates` draws from l
    the one with the largest l/g is taken. joint: kernels span all leaves, so that a ridge between
    two of them is seen; otherwise each leaf has a density of its own. A leaf under `then` always
    has its own, over the trials in which it existed.

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

        def value(i: int, param: Param):
            alone = param not in together
            return (self._best([param], below, above, rng) if alone else chosen)[param.name]

        return space.pick(value)

    def _best(self, params: list[Param], below: list, above: list, rng) -> dict:
        good, rest = (
            Parzen(params, [point for point in points if all(p.active(point) for p in params)])
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
# are better, NaN is worse than all. A rung is judged by the first report at or past it, for
# objectives that report at steps of their own; one that passes several is judged at the last.


@dataclass(frozen=True)
class Full(Checked):
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
class ASHA(Full):
    """Asynchronous successive halving: at each rung the best 1/eta go on, without waiting.

    "promote" (the paper's form): a trial pauses at its rung, and whenever a worker is free the
    best paused trial within the top 1/eta of its rung goes on. "stop" and "percentile": it goes
    on at once or never, judged by those that came before it. They are not the same; see `passes`.
    """

    min_budget: int = 1
    eta: int = 4
    form: str = "promote"

    def __post_init__(self):
        super().__post_init__()
        forms = ("promote", "stop", "percentile")
        check(self.form in forms, "form", self.form, f"one of {forms}")

    def budgets(self, index: int) -> list[int]:
        rungs = [self.min_budget]
        while rungs[-1] * self.eta < self.budget:
            rungs.append(rungs[-1] * self.eta)
        return [*rungs, self.budget] if rungs[-1] < self.budget else rungs

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
        if self.form != "promote":
            return None
        for low, high in reversed(list(itertools.pairwise(self.budgets(0)))):
            there = rungs.get(low, {})
            best = sorted(there, key=lambda i: worse_if_nan(there[i]))
            for index in best[: len(there) // self.eta]:
                if states[index] == "paused" and index not in rungs.get(high, {}):
                    return index
        return None


@dataclass(frozen=True)
class Hyperband(Full):
    """Successive halving, where all of a rung are compared at once, in brackets that hedge.

    Bracket s, from S down to 0, starts ceil((S + 1)/(s + 1) eta^s) trials at budget/eta^s and keeps
    the best 1/eta of a complete rung for the next: from many trials cut early to few never cut. S
    is the largest with budget/eta^S >= min_budget. brackets: only the first so many; 1 is plain
    successive halving. Trials are assigned by index, again from the first when all are full.
    """

    eta: int = 3
    brackets: int | None = None
    min_budget: int = 1

    def plan(self) -> list[tuple[int, list[int]]]:
        """(trials, rungs) of each bracket."""
        rungs, S = [self.budget], 0
        while self.min_budget * self.eta ** (S + 1) <= self.budget:
            S += 1
            rungs.insert(0, self.budget // self.eta**S)
        sizes = [math.ceil((S + 1) * self.eta**s / (s + 1)) for s in range(S, -1, -1)]
        return [(size, rungs[i:]) for i, size in enumerate(sizes)][: self.brackets]

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

    Lines: {"study": what may not change}, {"session": where and when a process took it up, and to
    what limits}, {"trial": i, "params": ..., "seed": ...}, {"trial": i, "state": ...} and {"trial":
    i, "step": ..., "value": ..., "state": ...}. A report and the decision on it are one line, and a
    line counts once its newline is written: at every byte the file is a study from which to go on.
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
                raise self.damaged(number, error) from error
        return entries

    def damaged(self, number: int, reason: object) -> SweepError:
        return SweepError(f"{self.file}, line {number} is damaged ({reason}); restore it from a "
                          "copy, or choose another folder")  # fmt: skip

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

    def append(self, entry: dict) -> None:
        with open(self.file, "a") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())


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
                alone = isinstance(result, numbers.Real) or getattr(result, "ndim", None) == 0
                items = iter([(budget, result)] if alone else result)
            item = next(items, None)
        if item is None:
            return
        step, value, tokens, error, _ = Report(*item)
        seconds = time.perf_counter() - started
        yield Report(int(step), float(value), int(tokens), float(error), seconds)


def needed(module: str, flag: str):
    """An optional package, or one line that says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SweepError(f"{flag} needs {module}: pip install {module}") from error


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")


class WorkerDied(ConnectionError):
    """A worker ended, in the midst of a trial or before it."""


class Here:
    """A worker: it has one trial at a time, and stops after each report to hear what to do.

    It is told "begin", config, budget, folder and after each report "go on" or "leave". After the
    first two, receive() waits for what comes: a report, None at the end, or the message of a crash.
    This one works within receive(); the others are such a one elsewhere.
    """

    def __init__(self, objective: Objective):
        self.objective, self.reports = objective, None

    def tell(self, what: str, *job) -> None:
        if what == "begin":
            self.reports, self.folder = follow(self.objective, *job), job[-1]
        elif what == "leave":
            self.reports.close()

    def receive(self) -> tuple | str | None:
        try:
            report = next(self.reports, None)
            return report and tuple(report)
        except training.Stopped as stopped:  # a signal, which 06 catches: no fault of the trial
            raise KeyboardInterrupt from stopped
        except (Exception, SystemExit) as error:
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
            what, *job = pipe.recv()
            worker.tell(what, *job)
            if what != "leave":
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

    def tell(self, what: str, *job) -> None:
        self.pipe.send((what, *job))

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
        self.actor, self.news = actor.remote(objective), None

    @staticmethod
    def connect(workers: int):
        """Finds the cluster at RAY_ADDRESS, as Ray's commands do, or makes one of this machine."""
        ray = needed("ray", "--executor ray")
        address = os.environ.get("RAY_ADDRESS", "local")
        paths = {"PYTHONPATH": os.pathsep.join(filter(None, map(os.path.abspath, sys.path)))}
        settings = {"runtime_env": {"env_vars": paths}, "logging_level": logging.ERROR}
        if address == "local":  # object_store_memory, bytes: only reports go through it
            settings |= {"num_cpus": workers, "include_dashboard": False}
            settings |= {"object_store_memory": 10**8}
        host, _, port = address.split("://")[-1].rpartition(":")
        try:
            if host:  # where nobody answers Ray would wait for ever
                socket.create_connection((host, int(port)), timeout=5).close()
            ray.init(address, log_to_driver=False, **settings)
        except Exception as error:  # Ray raises several kinds where no cluster answers
            raise SweepError(f"RAY_ADDRESS={address}: {one_line(error)}") from error
        cpus = int(ray.cluster_resources().get("CPU", 0))
        if workers > cpus:  # some would wait for ever
            ray.shutdown()
            raise SweepError(f"workers={workers}: wanted at most the {cpus} CPUs of the cluster")
        return ray

    def get(self, answer):
        try:
            return self.ray.get(answer)
        except self.ray.exceptions.RayError as error:
            raise WorkerDied(str(error).splitlines()[0]) from error

    def tell(self, what: str, *job) -> None:
        heard = self.actor.tell.remote(what, *job)
        if what == "begin" and self.news:  # not its first trial, for which it may wait for a CPU
            self.get(heard)
        if what != "leave":
            self.news = self.actor.receive.remote()

    def receive(self) -> tuple | str | None:
        return self.get(self.news)

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
        worker = self.idle.pop()
        try:
            worker.tell("begin", *job)
        except ConnectionError:  # it died while it was idle
            worker = self.hire()
            worker.tell("begin", *job)
        self.running[index] = worker

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
        with contextlib.suppress(ConnectionError):  # one that died is noticed in `wait` or `start`
            self.running[index].tell("go on" if go_on else "leave")
        if not go_on:
            self.idle.append(self.running.pop(index))

    def close(self) -> None:
        for worker in [*self.idle, *self.running.values()]:
            worker.close()


@contextlib.contextmanager
def employed(objective: Objective, count: int, executor: str) -> Iterator[Workers]:
    """So many workers: for "local" here or, from two on, in processes; for "ray" on a cluster."""
    check(executor in ("local", "ray"), "executor", executor, "local or ray")
    ray = OnRay.connect(count) if executor == "ray" else None
    if ray:
        gpus = min(1.0, ray.cluster_resources().get("GPU", 0.0) / count)
        pool = Workers(lambda: OnRay(objective, gpus), count)
    elif count == 1:
        pool = Workers(lambda: Here(objective), count)
    else:
        try:
            pickle.dumps(objective)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise SweepError(f"objective: {one_line(error)}; for workers in processes it has to "
                             "stand at the top level of a file") from error  # fmt: skip
        threads = max(1, torch.get_num_threads() // count)
        pool = Workers(lambda: InProcess(objective, threads), count)
    try:
        yield pool
    finally:
        pool.close()
        if ray:
            ray.shutdown()


# 7. The study: space, sampler, rule, store and workers together

HOPELESS = 20  # failed trials in a row that end a study which no number of trials ends


@dataclass(frozen=True)
class Limits:
    """Where a study ends. None: no such limit.

    What was spent before a resume counts, but for the time between the last line and a kill.
    """

    trials: int | None = None
    tokens: float | None = None
    seconds: float | None = None  # by the clock
    dollars: float | None = None  # at `price` for an hour of one worker
    price: float = 0.0

    def __post_init__(self):
        for limit in fields(self)[:4]:
            value = getattr(self, limit.name)
            check(value is None or value > 0, limit.name, value, "above 0")
        check(self.price > 0 or (self.dollars is None and self.price == 0), "price", self.price,
              "above 0 where dollars are limited")  # fmt: skip

    @property
    def endless(self) -> bool:
        return (self.trials, self.tokens, self.seconds, self.dollars) == (None,) * 4


def describe(thing) -> object:
    """Any part of a study in terms of JSON."""
    if is_dataclass(thing):
        named = {f.name: describe(getattr(thing, f.name)) for f in fields(thing)}
        return {"class": type(thing).__name__, **named}
    if isinstance(thing, Space):
        return describe(thing.tree)
    if isinstance(thing, dict):
        return {as_key(key): describe(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple, range)):
        return [describe(item) for item in thing]
    return getattr(thing, "__name__", type(thing).__name__) if callable(thing) else thing


def differences(old, new, name: str = "") -> list[str]:
    """Where two descriptions differ, a line for each field."""
    if isinstance(old, dict) and isinstance(new, dict):
        if name.startswith(".space") and old.keys() == new.keys() and list(old) != list(new):
            order = ", ".join(old)  # points of a grid and random ones are numbered by it
            return [f"the order in {name[1:]} is {order}, not {', '.join(new)}"]
        both = ((old.get(key), new.get(key), f"{name}.{key}") for key in {**old, **new})
        return [line for three in both for line in differences(*three)]
    same = old == new and json.dumps(old) == json.dumps(new)  # 0, 0.0 and False are three things
    return [] if same else [f"{name[1:]} is {old!r}, not {new!r}"]


class Study:
    """A space, a sampler, a rule and an objective, and all that came of them, in a folder.

    What a line of the store says is entered by `apply`, when it is written as when it is read: a
    study that was taken up again is the same as one that went on.
    """

    def __init__(
        self,
        folder: Path | str,
        space: dict | Space,
        objective: Objective,
        sampler: Random | Sobol | Grid | TPE,
        rule: Full | Median | ASHA | Hyperband,
        seed: int = 0,
    ):
        """Takes up the study that is in the folder, if there is one.

        Raises: SweepError when the folder holds another study.
        """
        check(seed >= 0, "seed", seed, "at least 0")
        self.folder, self.objective = Path(folder), objective
        self.space = space if isinstance(space, Space) else Space(space)
        self.sampler, self.rule, self.seed = sampler, rule, seed
        self.store, self.limits = Store(self.folder), Limits()
        self.load()

    def identity(self) -> dict:
        """All that may not change while the study lasts.

        Of a function only the name is known: one that was rewritten under its name is taken for
        the same, and its new values stand beside the old ones.
        """
        parts = ("space", "sampler", "rule", "objective", "seed")
        try:
            return json.loads(json.dumps({name: describe(getattr(self, name)) for name in parts}))
        except TypeError as error:
            raise SweepError(f"the study cannot be written down: {error}") from error

    def load(self) -> None:
        self.trials: list[Trial] = []
        self.rungs: dict[int, dict[int, float]] = {}  # {step: {trial: value}}, as they arrived
        self.curve: list[tuple[int, float]] = []  # (tokens of all, best of all) after each report
        self.clock, self.last = 0.0, 0.0  # seconds of all sessions; the time of the last line
        entries = self.store.read()
        if entries and (wrong := differences(entries[0].get("study", {}), self.identity())):
            more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
            raise SweepError(f"{self.folder} holds another study: its {'; '.join(wrong[:4])}{more}"
                             "; choose another --out, or the same values")  # fmt: skip
        for number, entry in enumerate(entries, 1):
            try:
                self.apply(entry)
            except (SweepError, KeyError, TypeError) as error:
                raise self.store.damaged(number, one_line(error)) from error

    def write(self, **entry) -> None:
        self.store.append(entry)
        self.apply(entry)

    def apply(self, entry: dict) -> None:
        """Enters what a line of the store says.

        Raises: SweepError, KeyError or TypeError where it cannot follow the lines before it.
        """
        if "session" in entry:
            self.last = entry["session"]["time"]
            self.limits = Limits(**entry["session"].get("limits", {}))
        if "trial" not in entry:
            return
        index, known = entry["trial"], len(self.trials)
        if "params" in entry:
            check(index == known, "trial", index, f"{known}: parameters are written once, in order")
            check(isinstance(entry["params"], dict), "params", entry["params"], "{name: value}")
            self.trials.append(Trial(index, entry["params"], entry["seed"]))
            return
        check(index in range(known), "trial", index, f"one of the {known} that have parameters")
        check(entry["state"] in STATES, "state", entry["state"], f"one of {STATES}")
        trial = self.trials[index]
        if "step" in entry:
            report = Report(*(entry[name] for name in Report._fields))
            self.mark(trial, report)
            trial.reports.append(report)
            trial.seconds += report.seconds
            trial.since = entry["time"]
            best = min(worse_if_nan(report.value), self.curve[-1][1] if self.curve else math.inf)
            self.curve.append((sum(t.tokens for t in self.trials), best))
        elif entry["state"] == "failed":  # what it took since then costs too
            trial.seconds += entry["time"] - trial.since
        else:
            trial.since = entry["time"]
        trial.state, trial.message = entry["state"], entry.get("message", "")
        self.clock += entry["time"] - self.last
        self.last = entry["time"]

    def mark(self, trial: Trial, report: Report) -> int:
        """Enters a report in `rungs`: at the rungs that it is the first to reach, or at its step.

        Returns: the highest of these, at which it is judged.
        """
        budgets = self.rule.budgets(trial.index)
        steps = [b for b in budgets if trial.reached < b <= report.step] or [report.step]
        for step in steps:
            self.rungs.setdefault(step, {})[trial.index] = report.value
        return steps[-1]

    @property
    def states(self) -> dict[int, str]:
        return {t.index: t.state for t in self.trials}

    @property
    def ranked(self) -> list[Trial]:
        """Trials with a value, the best of those that went farthest first."""
        return sorted((t for t in self.trials if t.value is not None), key=rank)

    @property
    def best(self) -> Trial | None:
        return next(iter(self.ranked), None)

    def ask(self) -> Trial | None:
        """A new trial, written down before it starts; None while the sampler has to wait."""
        index = len(self.trials)
        if isinstance(self.sampler, TPE):
            seen = self.trials[: max(0, index - self.sampler.delay + 1)]
            if any(t.state in ("queued", "running") for t in seen):
                return None
        params = self.sampler.suggest(self.space, self.seed, index, self.trials)
        seed = int(np.random.default_rng((self.seed, index, 1)).integers(2**31))
        self.write(trial=index, params=params, seed=seed)
        return self.trials[-1]

    def next_budget(self, trial: Trial) -> int:
        return next(b for b in self.rule.budgets(trial.index) if b > trial.reached)

    def spent(self) -> dict[str, float]:
        return {
            "tokens": sum(t.tokens for t in self.trials),
            "seconds": self.clock,
            "dollars": sum(t.seconds for t in self.trials) / 3600 * self.limits.price,
        }

    @property
    def total(self) -> float:
        """The most trials that there will be."""
        points = len(self.sampler.all(self.space)) if isinstance(self.sampler, Grid) else math.inf
        return min(points, self.limits.trials or math.inf)

    def affordable(self, busy: list[Trial]) -> bool:
        """Whether one more rung may start: not if what runs now will probably reach a limit."""
        done = sum(t.reached for t in self.trials)
        coming = sum(self.next_budget(t) - t.reached for t in busy)
        for name, amount in self.spent().items():
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
        total = self.total
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
        with self.store.locked(), employed(self.objective, workers, executor) as pool:
            self.load()
            if not self.store.read():
                self.write(study=self.identity())
            self.write(session=surroundings() | {"limits": vars(limits)})
            self._loop(pool, show)
        return self

    def _loop(self, pool: Workers, show: bool) -> None:
        first, failures = True, 0
        while True:
            busy = [self.trials[i] for i in pool.running]
            while pool.idle and (trial := self.next_job(busy)):
                self.write(trial=trial.index, state="running", time=time.time())
                config = {"seed": trial.seed} | self.space.config(trial.params)
                folder = self.folder / f"trial-{trial.index:05d}"
                if show and first:
                    print(f"trial {trial.index} begins; its log is in {folder}", flush=True)
                first = False
                pool.start(trial.index, config, self.next_budget(trial), folder)
                busy.append(trial)
            if not busy:
                return
            index, news = pool.wait()
            trial = self.trials[index]
            if isinstance(news, Report):
                pool.answer(index, self.take(trial, news))
            else:
                late = f"no report at its budget or past it, the last at {trial.reached}"
                self.write(trial=index, state="failed", message=news or late, time=time.time())
            if show:
                print(self.progress(), flush=True)
            if trial.state != "running":
                failures = failures + 1 if trial.state == "failed" else 0
            if failures == HOPELESS and self.total == math.inf:
                raise SweepError(f"{failures} trials in a row failed, the last: {trial.message}; "
                                 "to go on all the same, limit the trials")  # fmt: skip

    def take(self, trial: Trial, report: Report) -> bool:
        """Notes a report and judges its trial; whether this call of the objective is to go on."""
        if report.step <= trial.reached:
            return True  # a trial that was interrupted says again what is known already
        budget = self.next_budget(trial)
        step = self.mark(trial, report)
        state = self.rule.judge(self.rungs, self.states, trial.index, step)
        self.write(trial=trial.index, state=state, time=time.time(), **report._asdict())
        if report.step >= budget and not report.tokens and self.limits.tokens:
            raise SweepError("the limit in tokens: the objective reports none; give one in trials "
                             "or seconds, or yield Report(step, value, tokens)")  # fmt: skip
        return state == "running" and report.step < budget

    def progress(self) -> str:
        """One line: how many trials are over, the best so far, what is spent and what is left."""
        count = collections.Counter(self.states.values())
        over = count["done"] + count["pruned"] + count["failed"]
        spent, limits = self.spent(), self.limits
        shares = [spent[name] / getattr(limits, name) for name in spent if getattr(limits, name)]
        halted = over + count["paused"]  # most of those that pause will not be taken up again
        total, best = self.total, self.best
        shares.append(halted / total)
        share = max(shares) if halted else 0.0  # earlier it would be a wild guess
        return (
            f"{over}/{'?' if total == math.inf else total} trials | "
            + (f"best {best.value:.4f} (trial {best.index}) | " if best else "")
            + " ".join(f"{state} {n}" for state, n in sorted(count.items()))
            + f" | {spent['tokens']:,} tokens | {spent['seconds']:.0f} s"
            + (f", about {max(self.clock * (1 / share - 1), 0):.0f} s left" if share else "")
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
        results = training.train(training.Config(**{"samples": 0, **self.flags, **chosen, **place}))
        used = training.stored_config(out)
        for name, value in chosen.items():  # did the run use what was chosen for it?
            check(used[name] == value, name, used[name], f"{value}, which was chosen")
        for checkpoint in (f for s in shorter for f in s.glob("step-*.pt")):
            checkpoint.unlink()
        # from the file, which has those too that came before an interruption
        for line in (out / "metrics.jsonl").read_text().splitlines():
            entry = json.loads(line)
            if "val_nats" in entry and entry["step"] < budget:
                yield Report(entry["step"], entry["val_nats"], results["tokens"])  # all are spent
        yield Report(budget, results["val_nats"], results["tokens"])

    def command(self, chosen: dict, budget: int) -> str:
        """The command line that trains with these values in one run."""
        config = {**self.flags, **chosen, "max_steps": budget, "out": "runs/best"}
        preset = config.get("preset", "stories")
        defaults = vars(training.resolve({"preset": preset}))
        words = ["python", "06_train.py", "--preset", preset]
        for name, value in config.items():
            flag = name.replace("_", "-")
            if name in ("samples", "resume", "branch") or value == defaults[name]:
                continue
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words += [f"--{flag}", str(value)]
        return shlex.join(words)


# Runs the words behind it and kills them, with all that they started, when its standard input ends:
# when the study closes it, or dies, be it by kill -9. $$ is sh's number, which the words take over.
MORTAL = """exec 3<&0 </dev/null
(read never <&3; kill -s KILL -- -$$) >/dev/null 2>&1 &
exec "$@" 3<&-"""


def words_of(config: dict, above: str = "--") -> list[str]:
    """A configuration as words of a command line: --lr 0.1 --model.width 64."""
    words = []
    for name, value in config.items():
        nested = isinstance(value, dict)
        words += words_of(value, f"{above}{name}.") if nested else [above + name, str(value)]
    return words


@dataclass(frozen=True)
class Command:
    """What a program prints as `key: NUMBER`, the last time.

    template: its command line, with {name} for a chosen value, {seed}, {budget} and {folder}. The
    word {args} becomes words --NAME VALUE for all that there is but the seed; within a longer word
    they are quoted for a shell. It is no shell's, but starts by way of sh, so there has to be one.
    """

    template: str
    key: str = "val_nats"

    def __post_init__(self):
        self.names()

    def parsed(self) -> list[list[tuple]]:
        """The words of the template, each in pieces (text, name behind it, its format, _)."""
        try:
            return [list(string.Formatter().parse(word)) for word in shlex.split(self.template)]
        except ValueError as error:
            raise SweepError(f"--command: {error}; a brace of its own is written twice") from error

    def names(self) -> set[str]:
        return {name for word in self.parsed() for _, name, _, _ in word if name is not None}

    def __call__(self, chosen: dict, budget: int, folder: Path) -> float:
        args = words_of({name: value for name, value in chosen.items() if name != "seed"})
        values = {**chosen, "budget": budget, "folder": folder, "args": shlex.join(args)}

        def filled(text: str, name: str | None, form: str | None, _) -> str:
            if name is None:
                return text
            value = functools.reduce(operator.getitem, name.split("."), values)
            return text + format(value, form or "")

        words: list[str] = []
        try:
            for word in self.parsed():
                alone = word == [("", "args", "", None)]
                words += args if alone else ["".join(filled(*piece) for piece in word)]
        except KeyError as error:
            raise SweepError(f"--command: {error} has no value in this trial") from error
        printed, complained = folder / "output.txt", folder / "errors.txt"
        with (
            open(printed, "w") as out,
            open(complained, "w") as err,
            subprocess.Popen(["sh", "-c", MORTAL, "sh", *words], stdin=subprocess.PIPE, stdout=out,
                             stderr=err, start_new_session=True) as process,
        ):  # fmt: skip
            status = process.wait()
        if status != 0:
            last = (complained.read_text().strip().splitlines() or ["no message"])[-1]
            raise SweepError(f"exit status {status}: {last}")
        text = printed.read_text()
        found = re.findall(rf"^{re.escape(self.key)}: *(\S+)", text, flags=re.MULTILINE)
        check(bool(found), "output", text[-80:], f"a line '{self.key}: NUMBER'")
        return float(found[-1])


@dataclass(frozen=True)
class Repeated:
    """The mean over several runs and its standard error: name="seed", or "fold" for k folds."""

    objective: Objective
    name: str
    values: Sequence

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


# 9. Reports

ENOUGH = 16  # trials to judge importance by: four groups of 4


def mean_ranks(values: np.ndarray) -> np.ndarray:
    """The place of each value in their order, from 0 on; equal values share the mean of theirs."""
    _, which, count = np.unique(values, return_inverse=True, return_counts=True)
    return (count.cumsum() - (count + 1) / 2)[which]


def importance(study: Study) -> dict[str, float]:
    """The share of each parameter in the variance of the ranks of the values; they sum to 1.

    Compared are the trials at the step that most of them have reached. They are put into groups of
    equal size along one parameter (options into one each); what the group means explain of the
    variance, less what chance would explain (epsilon squared), is its main effect. What two
    parameters do only together is not seen. All 0: nothing beyond chance. Empty: fewer than ENOUGH.
    """
    values = max(study.rungs.values(), key=len, default={})
    n = len(values)
    if n < ENOUGH:
        return {}
    ranks = mean_ranks(np.array([worse_if_nan(v) for v in values.values()]))
    total = ((ranks - ranks.mean()) ** 2).sum()
    if total == 0:  # all the same
        return {param.label: 0.0 for param in study.space.params}
    effects = {}
    for param in study.space.params:
        shares = np.array([share_of(param, study.trials[i]) for i in values])
        if isinstance(param.kind, Choice):
            group = shares
        else:
            group = mean_ranks(shares) * min(8, n // 4) // n
        group = np.where(np.isnan(shares), -1, group)  # those without it are a group of their own
        labels = np.unique(group)
        within = sum(((ranks[group == g] - ranks[group == g].mean()) ** 2).sum() for g in labels)
        free = n - len(labels)  # 0 where each trial has an option to itself
        effects[param.label] = max(0.0, 1 - within / total * (n - 1) / free) if free else 0.0
    whole = sum(effects.values())
    return {name: e / whole if whole else 0.0 for name, e in effects.items()}


def show(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(study: Study, top: int = 10) -> str:
    """The best trials, then those that failed, in columns."""
    names = list(dict.fromkeys(p.name for p in study.space.params))
    rows = [["trial", "state", "step", "value", "+-", *names, "tokens", "s"]]
    failed = [t for t in study.trials if t.state == "failed"]
    for t in study.ranked[:top]:
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


def share_of(param: Param, trial: Trial) -> float:
    """Where a trial's value lies between the ends of its parameter, 0 to 1; nan: it has none."""
    if not param.active(trial.params):
        return math.nan
    kind, value = param.kind, trial.params[param.name]
    if isinstance(kind, Choice):
        return (kind.options.index(value) + 0.5) / len(kind.options)
    low, high = kind.ends
    return float((kind.z(value) - low) / (high - low))


def ends(param: Param) -> tuple[str, str]:
    values = outermost(param.kind)
    return show(values[0]), show(values[-1])


def parallel(study: Study, width: int = 41) -> str:
    """A text parallel-coordinates view: a line for each parameter, from its low to its high end.

    1 to 9 are the best trials in order, dots all others: follow a digit down to see its point.
    """
    lines = []
    names = max(len(p.label) for p in study.space.params)
    for param in study.space.params:
        strip = [" "] * width
        for place, trial in reversed(list(enumerate(study.ranked, 1))):
            share = share_of(param, trial)
            if not math.isnan(share):
                strip[min(int(share * width), width - 1)] = str(place) if place < 10 else "."
        low, high = ends(param)
        lines.append(f"{param.label:{names}} {low:>8} |{''.join(strip)}| {high}")
    return "\n".join(lines)


def plot(study: Study, folder: Path) -> list[Path]:
    """Saves curves.png, parallel.png, importance.png and best.png; needs matplotlib."""
    check(bool(study.curve), "--plot", str(folder), "a study in which a trial has reported")
    needed("matplotlib", "--plot").use("Agg")
    plt = importlib.import_module("matplotlib.pyplot")
    folder.mkdir(parents=True, exist_ok=True)
    trials = [t for t in reversed(study.ranked) if math.isfinite(t.value)]  # the best on top
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
    axes.set_xticks(range(len(params)), [f"{p.label}\n{' .. '.join(ends(p))}" for p in params])
    axes.set(ylim=(0, 1), title="chosen values, low to high, the best dark")

    pictures["importance"], axes = plt.subplots()
    shares = importance(study)
    axes.barh(list(shares), list(shares.values()))
    axes.set(xlabel="share of the variance of ranks", title="" if shares else "too few trials")

    pictures["best"], axes = plt.subplots()
    axes.step(*zip(*study.curve), ".-", where="post")
    axes.set(xlabel="tokens of all trials", ylabel="best value so far")
    for name, figure in pictures.items():
        figure.savefig(folder / f"{name}.png", bbox_inches="tight")
        plt.close(figure)
    return [folder / f"{name}.png" for name in pictures]


def told(study: Study) -> list[Trial]:
    """The trials that trackers hear of: those that have reported or failed."""
    return [t for t in study.trials if t.reports or t.state == "failed"]


def to_mlflow(study: Study) -> None:
    """Copies the trials into mlflow.db in the study's folder; a second time, only what is new.

    MLflow keeps infinity as the largest float64.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it would call home at import
    mlflow = needed("mlflow", "--track mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{study.folder.resolve()}/mlflow.db")
    name = study.folder.resolve().name  # of "." too
    found = client.get_experiment_by_name(name)
    experiment = found.experiment_id if found else client.create_experiment(name)
    there = client.search_runs([experiment], max_results=10_000)
    there = {run.data.tags["trial"]: run for run in there}
    for trial in told(study):
        run = there.get(str(trial.index))
        if run is None:
            tags = {"trial": str(trial.index), "reached": "0"}
            run = client.create_run(experiment, tags=tags, run_name=f"trial-{trial.index}")
            for name, value in {"seed": trial.seed, **trial.params}.items():
                client.log_param(run.info.run_id, name, value)
        for r in trial.reports:
            if r.step > int(run.data.tags["reached"]):
                client.log_metric(run.info.run_id, "value", r.value, step=r.step)
                client.log_metric(run.info.run_id, "tokens", r.tokens, step=r.step)
        tags = {"state": trial.state, "message": trial.message, "reached": trial.reached}
        for name, value in tags.items():
            client.set_tag(run.info.run_id, name, value)
        status = {"done": "FINISHED", "failed": "FAILED"}.get(trial.state, "KILLED")
        client.set_terminated(run.info.run_id, status)


def to_wandb(study: Study) -> None:
    """Writes the trials as offline runs; `wandb sync` uploads them later.

    One that has gone on since the last time is written once more, under another id.
    """
    wandb = needed("wandb", "--track wandb")
    group = study.folder.resolve().name
    for trial in told(study):
        name = f"{group}-{trial.index}-{trial.state}-{trial.reached}"
        if list(study.folder.glob(f"wandb/offline-run-*-{name}")):
            continue
        run = wandb.init(
            mode="offline", dir=study.folder, project="sweep", group=group,
            name=f"trial-{trial.index}", id=name, tags=[trial.state],
            config={"seed": trial.seed, **trial.params},
        )  # fmt: skip
        for r in trial.reports:
            run.log({"value": r.value, "tokens": r.tokens}, step=r.step)
        run.finish()
    wandb.teardown()  # waits for its second process: finish() comes back before the file is whole


TRACKERS = {"mlflow": to_mlflow, "wandb": to_wandb}


# 10. The command line

STORED = (Range, Choice, Random, Sobol, Grid, TPE, Full, Median, ASHA, Hyperband)
STORED = {made.__name__: made for made in (*STORED, Train, Command, Repeated)}
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
    "halving": lambda s: Hyperband(s.budget, s.eta, 1, s.min_budget),
    "hyperband": lambda s: Hyperband(s.budget, s.eta, None, s.min_budget),
    "asha": lambda s: ASHA(s.budget, s.min_budget, s.eta, "promote"),
    "asha-stop": lambda s: ASHA(s.budget, s.min_budget, s.eta, "stop"),
    "asha-percentile": lambda s: ASHA(s.budget, s.min_budget, s.eta, "percentile"),
}


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise SweepError(f"{message}; --help lists the flags")


def read_flags(argv: list[str]) -> argparse.Namespace:
    """The flags; `given` are the names of those that stand there, `flags` are 06's, behind --."""
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
    add("--command", help="a command line to run instead of 06_train.py, with {name}s to "
        "fill in; {args}: --NAME VALUE of all names that the trial has, but {seed}")  # fmt: skip
    add("--key", default="val_nats", help="the name before the number that a command prints")
    add("--out", type=Path, default=Path("runs/sweep"), help="folder of the study")
    add("--report", action="store_true", help="only show what is in --out")
    add("--resume", action="store_true", help="go on with the study in --out, whose flags need not "
        "be given again; ends, --workers and --executor may change")  # fmt: skip
    add("--sampler", choices=SAMPLERS, default="tpe")
    add("--points", type=int, default=5, help="grid: values of a range that has no step")
    add("--delay", type=int, default=1, help="tpe: workers that may be busy at once")
    add("--rule", choices=RULES, default="none", help="early stopping")
    add("--budget", type=int, default=300, help="steps of a whole run")
    add("--min-budget", type=int, default=30, help="asha, halving, hyperband: steps before "
        "any trial is cut; median: of each piece of a run")  # fmt: skip
    add("--eta", type=int, default=3, help="one trial in eta goes on to the next rung")
    add("--seeds", type=int, default=1, help="runs of each trial, to take the mean of")
    add("--folds", type=int, default=1, help="the same, where a command leaves out {fold}")
    add("--seed", type=int, default=0, help="of the study")
    add("--workers", type=int, default=1, help="trials at once; 1: in this process")
    add("--executor", choices=("local", "ray"), default="local", help="where they run: on this "
        "machine, or on the Ray cluster at RAY_ADDRESS (without: one made here)")  # fmt: skip
    add("--trials", type=int, help="end after so many; a resumed study keeps the "
        "ends that are not given anew; 20 where there is none")  # fmt: skip
    add("--tokens", type=float, help="end when so many are trained on")
    add("--seconds", type=float, help="end after this time")
    add("--dollars", type=float, help="end when so much is spent at --price")
    add("--price", type=float, help="dollars for an hour of one worker")
    add("--track", choices=TRACKERS, help="at the end, copy the trials to this tracker")
    add("--plot", type=Path, metavar="DIR", help="save pictures there (needs matplotlib)")
    cut = argv.index("--") if "--" in argv else len(argv)
    settings = parser.parse_args(argv[:cut])
    words = {word.split("=")[0] for word in argv[:cut]}
    settings.given = {a.dest for a in parser._actions if words & set(a.option_strings)}
    settings.flags = argv[cut + 1 :]
    settings.given |= {"flags"} if settings.flags else set()
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
    tuned = [space_from_flag(flag) for flag in settings.tune]
    names = [name for one in tuned for name in one]
    twice = sorted({name for name in names if names.count(name) > 1})
    check(not twice, "--tune", ", ".join(twice), "each name once")
    for one in tuned:
        tree |= one
    return Space(tree)


# 06's fields but those that change no value, or make of it that of another text or in another unit
TUNABLE = {f.name for f in fields(training.Config)} - training.BRANCH_MAY_CHANGE
TUNABLE = TUNABLE - {"data", "vocab_size"} | {"schedule", "cooldown"}
OWN = {"max_steps", "seed", "out", "resume", "branch"}  # each trial has its own


def training_objective(flags: list[str], space: Space, rule: Full | ASHA | Hyperband) -> Train:
    """06_train.py as an objective, if it knows every name and the schedule allows the rule."""
    tried: dict[str, list] = {}
    for param in (*space.params, *space.constants):
        name, near = param.name, difflib.get_close_matches(param.name, TUNABLE, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        if name not in TUNABLE:
            raise SweepError(f"--tune {name}: 06_train.py has no such field to choose{hint}")
        tried.setdefault(name, []).extend(outermost(param.kind))
    given = training.read_flags(flags)
    for name in sorted(given.keys() & OWN):
        raise SweepError(f"--{name.replace('_', '-')} behind --: each trial is given its own; "
                         "before -- stand --budget, --seed and --out of the study")  # fmt: skip
    given = {"samples": 0} | given
    if type(rule) is not Full:
        given = {"schedule": "constant"} | given
        for name in (given["schedule"], *tried.get("schedule", [])):
            check(name == "constant", "schedule", name,
                  "constant, because early stopping makes runs longer step by step")  # fmt: skip
    config, first = vars(training.resolve(given)), rule.budgets(0)[0]
    for warmup in tried.get("warmup_steps", [config["warmup_steps"]]):
        good = isinstance(warmup, int) and warmup <= first
        check(good, "warmup_steps", warmup, f"at most the first rung, {first} steps")
    return Train({name: value for name, value in config.items() if name not in OWN})


FILLED = ("budget", "folder", "args")  # what a command is given besides what was chosen


def command_objective(
    settings: argparse.Namespace, space: Space, repeated: set[str], early: bool
) -> Command:
    """A command line as an objective, if it takes all that it has to and nothing else."""
    command = Command(settings.command, settings.key)
    must = {p.name for p in space.params} | repeated | ({"budget"} if early else set())
    known = {*must, "seed", *FILLED, *(p.name for p in space.constants)}
    for name in sorted(command.names() - known):
        raise SweepError(f"--command: {{{name}}} is not in the space, which has {sorted(known)}")
    if "args" in command.names():
        must = {"seed", "budget"} & (must | space.always)
    at_times = {p.name for p in (*space.params, *space.constants)} - space.always
    for name in sorted(at_times & (must | command.names())):
        raise SweepError(f"--command: {{{name}}} is not there in every trial; write {{args}}, "
                         "for --NAME VALUE of all that are")  # fmt: skip
    for name in sorted(must - command.names()):
        raise SweepError(f"--command: {{{name}}} is not in it, and differs from run to run")
    return command


def make_objective(settings: argparse.Namespace, space: Space, rule: Full | ASHA | Hyperband):
    repeated = {}
    for name, count in (("seed", settings.seeds), ("fold", settings.folds)):
        check(count >= 1, f"--{name}s", count, "at least 1")
        repeated |= {name: tuple(range(count))} if count > 1 else {}
    check(len(repeated) < 2, "--folds", settings.folds, "either --seeds or --folds")
    taken = {*repeated, *(FILLED if settings.command else ())}
    for param in (*space.params, *space.constants):
        good = param.name.split(".")[0] not in taken
        check(good, "--tune", param.name, "another name, because each run is given its own")
    if settings.command:
        objective = command_objective(settings, space, {*repeated}, type(rule) is not Full)
    else:
        check("fold" not in repeated, "--folds", settings.folds, "a --command that has {fold}")
        objective = training_objective(settings.flags, space, rule)
    for name, values in repeated.items():
        objective = Repeated(objective, name, values)
    return objective


def rebuilt(stored):
    """What `describe` was given; a function stays its name, and a tuple is a list."""
    if not isinstance(stored, dict):
        return stored
    values = {name: rebuilt(value) for name, value in stored.items()}
    made = isinstance(stored.get("class"), str)  # else it is a parameter's name, or an option's
    return STORED[values.pop("class")](**values) if made else values


def make_study(settings: argparse.Namespace) -> Study:
    """The study that the flags describe; what none of them describes is as the store has it."""
    store = Store(settings.out)
    entries = store.read()
    if settings.report and not entries:
        raise SweepError(f"--report: there is no study in {settings.out}")
    if entries and not settings.report and not settings.resume:
        raise SweepError(f"--out {settings.out} holds a study: add --resume to go on with it")
    stored = entries[0].get("study") if entries else None

    def part(name: str, flags: set[str], make: Callable):
        if stored is None or settings.given & flags:
            return make()
        try:
            again = rebuilt(stored[name])
            return Space(again) if name == "space" else again
        except (KeyError, TypeError, AttributeError) as error:
            raise store.damaged(1, one_line(error)) from error

    space = part("space", {"tune", "space"}, lambda: read_space(settings))
    sampler = part("sampler", {"sampler", "points", "delay"},
                   lambda: SAMPLERS[settings.sampler](settings))  # fmt: skip
    rule = part("rule", {"rule", "budget", "min_budget", "eta"},
                lambda: RULES[settings.rule](settings))  # fmt: skip
    objective = part("objective", {"command", "key", "seeds", "folds", "flags"},
                     lambda: make_objective(settings, space, rule))  # fmt: skip
    seed = part("seed", {"seed"}, lambda: settings.seed)
    if not callable(objective) and not settings.report:
        raise SweepError(f"--resume: {objective} is a function; go on with its study from Python")
    return Study(settings.out, space, objective, sampler, rule, seed)


def report(study: Study) -> None:
    print("\n" + table(study) + "\n\n" + parallel(study))
    shares = ", ".join(f"{name} {share:.2f}" for name, share in importance(study).items())
    print(f"\nimportance  {shares or f'too few trials, fewer than {ENOUGH}'}")
    objective, best = study.objective, study.best
    config = {"seed": best.seed} | study.space.config(best.params) if best else {}
    if isinstance(objective, Repeated) and objective.name == "seed":
        objective, config = objective.objective, config | {"seed": 0}
    if best and isinstance(objective, Train):
        print("\nthe best in one run, with stories at the end:")
        print(objective.command(config, study.rule.budget))


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    try:
        if not argv:
            demo()
            return 0
        settings = read_flags(argv)
        study = make_study(settings)
        if not settings.report:
            given = {f.name: getattr(settings, f.name) for f in fields(Limits)}
            given = {name: value for name, value in given.items() if value is not None}
            limits = replace(study.limits, **given)  # those of the last session hold, till raised
            if limits.endless and not isinstance(study.sampler, Grid):
                limits = replace(limits, trials=20)
            study.run(limits, settings.workers, executor=settings.executor)
        report(study)
        if settings.track:
            TRACKERS[settings.track](study)
        if study.best is None:
            print(f"07_sweep.py: no trial in {study.folder} has a value", file=sys.stderr)
            return 1
        if settings.plot:
            print("saved " + ", ".join(map(str, plot(study, settings.plot))))
        return 0
    except (SweepError, training.RunError, OSError) as error:
        print(f"07_sweep.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: nothing is lost; --resume goes on" if argv else "stopped")
        return 130


# The main run: ASHA and random search train 06's models for the same number of tokens

TINY = """--preset stories --vocab-size 300 --seq-len 32 --batch-size 8 --schedule constant
--optimizer adamw --device cpu --dtype float32""".split()  # 256 positions a step, about 240 targets
RACE = ["--tune", "learning_rate=1e-5:1.0:log", "--tune", "weight_decay=1e-3:1.0:log",
        "--tune", "warmup_steps=0:5", "--sampler", "random", "--budget", "180",
        "--min-budget", "20", "--eta", "3"]  # fmt: skip


def demo_race(folder: Path, seed: int = 0, runs: int = 10) -> dict:
    """Random search over so many whole runs, ASHA for as many tokens; the figures of both."""
    text = folder / "stories.txt"
    text.write_text("<|endoftext|>".join(story for story, _ in stories.corpus(1000, seed=0)))
    flags = [*TINY, "--data", str(text), "--cache", str(folder / "cache")]
    studies, limits = {}, Limits(trials=runs)
    for name, rule in (("random", "none"), ("ASHA", "asha")):
        given = [*RACE, "--rule", rule, "--seed", str(seed), "--out", str(folder / name)]
        studies[name] = make_study(read_flags([*given, "--", *flags])).run(limits, show=False)
        limits = Limits(tokens=sum(t.tokens for t in studies[name].trials))
    asha, whole, tokens = studies["ASHA"], studies["random"], limits.tokens
    print(f"\nASHA over {len(asha.trials)} runs of 06_train.py, the best four, nats/token\n")
    print(table(asha, top=4) + "\n\n" + parallel(asha))
    print(f"\nthe best so far, beside random search over {runs} whole runs\n")
    print("   tokens     ASHA   random")
    found = {}
    for share in (0.25, 0.5, 0.75, 1.0):
        found[share] = [min((value for spent, value in study.curve if spent <= share * tokens),
                            default=math.inf) for study in (asha, whole)]  # fmt: skip
        print(f"{share * tokens:9,.0f}" + "".join(f"{value:9.4f}" for value in found[share]))
    reached = (spent for spent, value in asha.curve if value <= whole.best.value)
    needs = next(reached, math.inf) / tokens
    print(f"\nASHA had a model as good as random's best after {needs:.0%} of its tokens"
          if needs <= 1 else "\nASHA did not find a model as good as random's best")  # fmt: skip
    return {"seed": seed, "tokens": tokens, "random": found[1.0][1], "asha": found[1.0][0],
            "asha_with_half": found[0.5][0], "as_good_after_share": needs}  # fmt: skip


def demo() -> None:
    torch.set_num_threads(1)  # the model is tiny: a second one would be waited for
    with tempfile.TemporaryDirectory() as folder:
        demo_race(Path(folder))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
