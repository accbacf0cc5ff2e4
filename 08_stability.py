"""Spikes and how to live through them.

A spike is noticed before the update and skipped, or the run goes back and leaves out the data.
"""

from __future__ import annotations

import copy
import math
import statistics
from typing import NamedTuple

RECENT = 16  # accepted steps that say what the next one should be like
TINY = 1e-30  # stands for a gradient norm of 0, whose logarithm is wanted
GUARD_STATE = ("losses", "log_norms", "targets", "skips", "best")

# Spikes: notice one before the update, and skip it or go back


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
                  or the loss has settled more than `loss_margin` above its best level

    Args:
        window: steps looked back on, as in OLMo-core's SkipStepOptimizer.
        warmup: steps accepted before the first judgement (a number that is not finite is judged
            always).
        threshold, loss_margin (nats), norm_ratio: measured on three healthy runs of 06_train.py,
            with 8 rows a step, with 1, and with 1 row of 32 tokens (3600 steps in all). The
            loss never strayed by more than 5.5 spreads, and 6 is OLMo-core's number too; the
            gradient norm, whose tail is heavy, did by 19, up to 10.2 times the recent. A loss
            drawn like that of shuffled labels was caught 301 times of 301 in the first two runs,
            342 of 395 in the third, where a good batch already strays by 2.4 nats.
        patience: skips in a row that ask for a rewind.
    The constants suppose that a loss is a mean over a number of targets that varies little. Where
    it does not, hand the number to `judge`.
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
            return f"loss {loss:.3f} is far above the recent {center:.3f}, spread {spread:.3f}"
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
