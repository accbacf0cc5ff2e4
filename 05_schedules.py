"""Learning-rate schedules as pure functions: step in, multiplier of the peak rate out.

A schedule here has no state. `cosine(step, total, warmup)` depends on its arguments only, so a
run resumed at step 1000 continues as if never stopped, without anything to save or restore.

    rate(t) = peak rate * min(1, t / W) * (f + (1 - f) fall(p))
    p       = (t - S) / (T - S), clamped to [0, 1]         how much of the decay is behind us

    constant    fall = 1                                   no decay
    linear      fall = 1 - p                   S = W
    cosine      fall = (1 + cos(pi p)) / 2     S = W
    wsd         fall = 1 - p                   S = T - K   warm-up, stable, decay
    wsd_sqrt    fall = 1 - sqrt(p)             S = T - K   early and steep, then long and low

The area under the curve, the sum of multipliers, is the run's length in steps at full rate: with
AdamW, exp(-weight_decay * peak rate * area) is what decoupled decay leaves of the first weights.
The demo compares the areas with their closed forms.

Letters used below: t step, T total, W warmup, K cooldown in steps, f floor (final multiplier).

Conventions. t counts the updates already done: 0 at the first, T - 1 at the last. Warm-up is
t / W, as in transformers, so with W > 0 the first update has rate 0: AdamW's moments take in a
gradient but no weight moves. `skip_zero=True` takes (t + 1) / W instead, as Llama and nanochat do.
From step T on the multiplier stays where it ended; it never climbs again. t, T and W may as well
be counted in tokens: only ratios matter (except that skip_zero adds 1 of the unit).

Sources: cosine: Loshchilov & Hutter 2016 (arXiv 1608.03983), equation 5 without restarts;
warm-up: Goyal et al. 2017 (1706.02677), section 2.2; wsd: Hu et al. 2024 (MiniCPM, 2404.06395),
section 4; wsd_sqrt: Haegele et al. 2024 (2405.18392), section 3, where a decay over 20% matches
cosine. 60% for wsd: record runs of modded-nanogpt and nanochat decay over the last 45 to 70%.

Run: `python 05_schedules.py` (CPU, under 1 s on 2 cores of an AMD EPYC (Zen 3)) prints

    multiplier at step (total 1000, warmup 50)
                     0   100   200   300   400   500   600   700   800   900  1000     area   closed
    constant      0.00  1.00  1.00  1.00  1.00  1.00  1.00  1.00  1.00  1.00  1.00   974.50   974.50
    linear        0.00  0.95  0.84  0.74  0.63  0.53  0.42  0.32  0.21  0.11  0.00   500.00   500.00
    cosine        0.00  0.99  0.94  0.84  0.70  0.54  0.38  0.23  0.11  0.03  0.00   500.00   500.00
    wsd           0.00  1.00  1.00  1.00  1.00  0.83  0.67  0.50  0.33  0.17  0.00   675.00   675.00
    wsd_sqrt      0.00  1.00  1.00  1.00  1.00  1.00  1.00  1.00  1.00  0.29  0.00   841.68   841.68

    from step 0 to 1200, one character per 20 steps; the end is at |
    constant     =#@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@|@@@@@@@@@@@
    linear       =#@@@%%%%%#####*****++++++=====-----::::::.....  |
    cosine       =#@@@@@@@%%%%%%####***++++===----::::.....       |
    wsd          =#@@@@@@@@@@@@@@@@@@@%%%%###***+++====---:::.... |
    wsd_sqrt     =#@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@*+=--:.. |

    may a longer run start from this one? multipliers at step 350 for total 1000 and 2000
    constant     1.0000  1.0000  yes
    linear       0.6842  0.8462  no
    cosine       0.7735  0.9427  no
    wsd          1.0000  1.0000  yes
    wsd_sqrt     1.0000  1.0000  yes
    ok: areas as derived, no schedule climbs after its end, stable stages can be shared
"""

from __future__ import annotations

import math
from collections.abc import Callable


def warm_up(step: int, warmup: int, skip_zero: bool = False) -> float:
    """min(1, step / warmup), the linear rise; 1 without warm-up. In [0, 1]."""
    return min(1.0, (step + skip_zero) / warmup) if warmup else 1.0


def progress(step: int, start: float, total: int) -> float:
    """The part of the decay from `start` to `total` that is behind us: in [0, 1]; 1 ever after."""
    if step >= total:
        return 1.0
    return max(0.0, (step - start) / (total - start)) if start < total else 0.0


def check(step: int, total: int, warmup: int, floor: float = 0.0, cooldown: float = 1.0) -> None:
    """Raises ValueError for an argument outside its range, naming it."""
    for name, value, good, wanted in (
        ("step", step, step >= 0, "at least 0"),
        ("total", total, total > 0, "above 0"),
        ("warmup", warmup, 0 <= warmup <= total, f"from 0 to total={total}"),
        ("floor", floor, 0 <= floor <= 1, "in [0, 1]"),
        ("cooldown", cooldown, 0 < cooldown <= 1, "in (0, 1], a fraction of total"),
    ):
        if not good:
            raise ValueError(f"{name}={value} must be {wanted}")


def constant(step: int, total: int, warmup: int = 0, *, skip_zero: bool = False) -> float:
    """Multiplier in [0, 1] at `step`: the rise, then 1 for good."""
    check(step, total, warmup)
    return warm_up(step, warmup, skip_zero)


def linear(
    step: int, total: int, warmup: int = 0, *, floor: float = 0.0, skip_zero: bool = False
) -> float:
    """Multiplier in [0, 1] at `step`: the rise, then a straight line down to `floor`."""
    check(step, total, warmup, floor)
    fall = 1 - progress(step, warmup, total)
    return warm_up(step, warmup, skip_zero) * (floor + (1 - floor) * fall)


def cosine(
    step: int, total: int, warmup: int = 0, *, floor: float = 0.0, skip_zero: bool = False
) -> float:
    """Multiplier in [0, 1] at `step`: the rise, then half a cosine wave down to `floor`.

    The wave is squeezed between 1 and the floor, not cut off at it, so that it stays smooth.
    """
    check(step, total, warmup, floor)
    fall = (1 + math.cos(math.pi * progress(step, warmup, total))) / 2
    return warm_up(step, warmup, skip_zero) * (floor + (1 - floor) * fall)


def wsd(
    step: int,
    total: int,
    warmup: int = 0,
    *,
    cooldown: float = 0.6,
    floor: float = 0.0,
    skip_zero: bool = False,
) -> float:
    """Multiplier in [0, 1] at `step`: the rise, 1 for a while, then a straight line to `floor`.

    Args: cooldown, the decay's part of the run (K = cooldown * total); if warm-up reaches into
        it, the decay begins where warm-up ends and is the shorter and steeper.
    Until its decay begins a run does not depend on `total`: one trunk serves runs of any length.
    """
    check(step, total, warmup, floor, cooldown)
    fall = 1 - progress(step, max(warmup, total - cooldown * total), total)
    return warm_up(step, warmup, skip_zero) * (floor + (1 - floor) * fall)


def wsd_sqrt(
    step: int,
    total: int,
    warmup: int = 0,
    *,
    cooldown: float = 0.2,
    floor: float = 0.0,
    skip_zero: bool = False,
) -> float:
    """Multiplier in [0, 1] at `step`: `wsd` with the decay 1 - sqrt(p) in place of 1 - p."""
    check(step, total, warmup, floor, cooldown)
    fall = 1 - math.sqrt(progress(step, max(warmup, total - cooldown * total), total))
    return warm_up(step, warmup, skip_zero) * (floor + (1 - floor) * fall)


# every schedule by name; each takes (step, total, warmup) and has defaults for the rest
SCHEDULES: dict[str, Callable[..., float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "wsd": wsd,
    "wsd_sqrt": wsd_sqrt,
}


def area(name: str, total: int, warmup: int) -> float:
    """The sum of the multipliers of steps 0 ... total - 1, in closed form, at the defaults.

    A sum over steps, not an integral: of a straight decay's n steps from 1 towards 0 the first
    counts in full and the mean is (n + 1) / 2n. Decays must be whole steps.
    """
    rise, rest = max(0, warmup - 1) / 2, total - warmup
    decay = {"constant": 0, "linear": total, "cosine": total, "wsd": 0.6 * total}
    n = min(rest, decay.get(name, 0.2 * total))
    lost = max(0, n - 1) / 2  # cosine too: it is odd about its middle
    if name == "wsd_sqrt" and n:  # sum of sqrt(j / n), j < n, by Euler-Maclaurin; zeta(-1/2)
        lost = 2 * n / 3 - 1 / 2 - 0.2078862249773546 / math.sqrt(n) + 1 / (24 * n)
    return rise + rest - lost


def sketch(values: list[float]) -> str:
    """One character per value in [0, 1], the higher the fuller."""
    return "".join(" .:-=+*#%@"[round(9 * value)] for value in values)


def demo() -> None:
    total, warmup = 1000, 50
    tenths = range(0, total + 1, total // 10)
    print(f"multiplier at step (total {total}, warmup {warmup})")
    print("            " + "".join(f"{t:6d}" for t in tenths) + "     area   closed")
    for name, schedule in SCHEDULES.items():
        summed = math.fsum(schedule(t, total, warmup) for t in range(total))
        values = "".join(f"{schedule(t, total, warmup):6.2f}" for t in tenths)
        print(f"{name:12s}{values} {summed:8.2f} {area(name, total, warmup):8.2f}")
        assert abs(summed - area(name, total, warmup)) < 1e-6, "the shape is not what it says"

    print("\nfrom step 0 to 1200, one character per 20 steps; the end is at |")
    for name, schedule in SCHEDULES.items():
        line = sketch([schedule(t, total, warmup) for t in range(0, 1201, 20)])
        print(f"{name:12s}{line[:50]}|{line[50:]}")
        last = schedule(total, total, warmup)
        assert all(schedule(t, total, warmup) == last for t in range(total, 3 * total))

    print("\nmay a longer run start from this one? multipliers at step 350 for total 1000 and 2000")
    for name, schedule in SCHEDULES.items():
        short, long = schedule(350, total, warmup), schedule(350, 2 * total, warmup)
        print(f"{name:12s}{short:7.4f} {long:7.4f}  {'yes' if short == long else 'no'}")
        assert (short == long) == (name in ("constant", "wsd", "wsd_sqrt"))
    print("ok: areas as derived, no schedule climbs after its end, stable stages can be shared")


if __name__ == "__main__":
    demo()
