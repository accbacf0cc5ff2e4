"""Tests of 05_schedules.py: against transformers and torch, by closed form, and by property.

Run: python -m pytest tests/test_05_schedules.py
"""

import copy
import importlib
import io
import itertools
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

schedules = importlib.import_module("05_schedules")
SCHEDULES = schedules.SCHEDULES

names = st.sampled_from(list(SCHEDULES))
runs = st.integers(1, 400).flatmap(lambda total: st.tuples(st.just(total), st.integers(0, total)))

# after the warm-up, and up to the end
FALLING = [name for name in SCHEDULES if not name.endswith("restarts") and name != "cyclic"]
SMOOTH = [
    name
    for name in FALLING
    if name not in ("step", "multistep", "constant_then_jump", "wsd_sqrt")
] + ["cyclic"]


def optimizer(lr=1.0, **options):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr, **options)


def close(a, b):
    """Within 1e-12 of it; where both are nearly 0, within 1e-15 of the peak, which is 1."""
    return a == pytest.approx(b, rel=1e-12, abs=1e-15)


# against transformers: W < T, since at W = T its own schedules disagree about step T


def test_every_schedule_of_transformers_has_its_name_here():
    utils = pytest.importorskip("transformers.trainer_utils")
    by_metric = {"reduce_lr_on_plateau", "greedy"}
    assert {kind.value for kind in utils.SchedulerType} - by_metric <= set(SCHEDULES)


# our name and options, theirs, and whether theirs goes on after the end as if it had not come
TRANSFORMERS = [
    ("constant", {}, "constant_schedule_with_warmup", {}, True),
    ("linear", {}, "linear_schedule_with_warmup", {}, True),
    ("cosine", {}, "cosine_schedule_with_warmup", {}, False),
    (
        "cosine_with_min_lr",
        {},
        "cosine_with_min_lr_schedule_with_warmup",
        {"min_lr_rate": 0.1},
        False,
    ),
    (
        "cosine_with_restarts",
        {"cycles": 3},
        "cosine_with_hard_restarts_schedule_with_warmup",
        {"num_cycles": 3},
        True,
    ),
    (
        "cosine_with_restarts",
        {"cycles": 1},
        "cosine_with_hard_restarts_schedule_with_warmup",
        {},
        True,
    ),
    (
        "polynomial",
        {"floor": 1e-7},
        "polynomial_decay_schedule_with_warmup",
        {},
        True,
    ),
    (
        "polynomial",
        {"floor": 0.2, "power": 2.5},
        "polynomial_decay_schedule_with_warmup",
        {"lr_end": 0.2, "power": 2.5},
        True,
    ),
]


@pytest.mark.parametrize("total, warmup", [(100, 10), (100, 0), (37, 36), (1, 0), (1000, 310)])
@pytest.mark.parametrize("name, options, theirs, wanted, stays", TRANSFORMERS)
def test_schedules_match_transformers(name, options, theirs, wanted, stays, total, warmup):
    optimization = pytest.importorskip("transformers.optimization")
    wanted = wanted | {"num_warmup_steps": warmup}
    if name != "constant":
        wanted["num_training_steps"] = total
    rule = getattr(optimization, f"get_{theirs}")(optimizer(), **wanted).lr_lambdas[0]
    for step in range(2 * total + 1 if stays else total + 1):
        assert close(SCHEDULES[name](step, total, warmup, **options), rule(step)), step


def test_constant_matches_transformers():
    optimization = pytest.importorskip("transformers.optimization")
    rule = optimization.get_constant_schedule(optimizer()).lr_lambdas[0]
    assert all(schedules.constant(t, 10) == rule(t) for t in range(20))


@pytest.mark.parametrize("rise", ["linear", "cosine", "1-sqrt"])
@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize("total, warmup, cooldown", [(100, 10, 25), (4, 0, 4), (400, 300, 100)])
def test_wsd_matches_transformers(rise, shape, floor, total, warmup, cooldown):
    optimization = pytest.importorskip("transformers.optimization")
    rule = optimization.get_wsd_schedule(
        optimizer(), warmup, cooldown, total, None, rise, shape, min_lr_ratio=floor
    ).lr_lambdas[0]  # theirs starts at the floor
    for step in range(2 * total):
        options = {"shape": shape, "rise": rise, "start": floor, "floor": floor}
        assert close(schedules.wsd(step, total, warmup, cooldown=cooldown, **options), rule(step))


@pytest.mark.parametrize("warmup, timescale", [(10, None), (0, None), (10, 50), (0, 7)])
def test_inverse_sqrt_matches_transformers(warmup, timescale):
    optimization = pytest.importorskip("transformers.optimization")
    rule = optimization.get_inverse_sqrt_schedule(optimizer(), warmup, timescale).lr_lambdas[0]
    for step in range(201):  # theirs has no end
        assert close(schedules.inverse_sqrt(step, 200, warmup, timescale=timescale), rule(step))


def test_cosine_warmup_with_min_lr_of_transformers_is_a_step_ahead():
    optimization = pytest.importorskip("transformers.optimization")
    get = optimization.get_cosine_with_min_lr_schedule_with_warmup_lr_rate
    rule = get(optimizer(), 10, 100, min_lr_rate=0.1).lr_lambdas[0]
    for step in range(100):
        assert close(schedules.cosine_with_min_lr(step + 1, 100, 10), rule(step))
    rule = get(optimizer(), 10, 100, min_lr_rate=0.1, warmup_lr_rate=0.25).lr_lambdas[0]
    for step in range(100):
        assert close(schedules.cosine_with_min_lr(step, 99, 9, start=0.25), rule(step))


@pytest.mark.parametrize(
    "theirs, options, floor",
    [
        ("cosine_schedule_with_warmup", {}, 0.0),
        ("cosine_with_min_lr_schedule_with_warmup", {"min_lr_rate": 0.1}, 0.1),
        ("cosine_with_min_lr_schedule_with_warmup_lr_rate", {"min_lr_rate": 0.1}, 0.1),
    ],
)
def test_cosine_stays_down_where_transformers_climbs_again(theirs, options, floor):
    optimization = pytest.importorskip("transformers.optimization")
    rule = getattr(optimization, f"get_{theirs}")(optimizer(), 10, 100, **options).lr_lambdas[0]
    assert rule(189) > 0.99
    assert schedules.cosine(189, 100, 10, floor=floor) == floor


def test_cosine_stays_down_where_torch_climbs_again():
    rates = torch_rates(lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=50), 101)
    assert rates[50] == pytest.approx(0.0, abs=1e-15) and rates[100] == pytest.approx(1.0)
    assert schedules.cosine(100, 50) == 0.0


# against torch


def torch_rates(make, steps, **options):
    stepped = optimizer(**options)
    scheduler = make(stepped)
    rates = []
    for _ in range(steps):
        rates.append(stepped.param_groups[0]["lr"])
        stepped.step()
        scheduler.step()
    return rates


RISE_20 = partial(schedules.constant, warmup=20, start=0.1)

# torch's scheduler, ours with total 120, and the steps compared
TORCH = {
    "linear up": (
        lambda o: lr_scheduler.LinearLR(o),
        lambda t: schedules.constant(t, 120, 5, start=1 / 3),
        240,
    ),
    "linear down": (
        lambda o: lr_scheduler.LinearLR(o, 1.0, 0.2, total_iters=120),
        lambda t: schedules.linear(t, 120, floor=0.2),
        240,
    ),
    "constant then jump": (
        lambda o: lr_scheduler.ConstantLR(o),
        lambda t: schedules.constant_then_jump(t, 120, 5),
        240,
    ),
    "polynomial": (
        lambda o: lr_scheduler.PolynomialLR(o, total_iters=120, power=3),
        lambda t: schedules.polynomial(t, 120, power=3),
        240,
    ),
    "cosine annealing": (
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=120, eta_min=0.05),
        lambda t: schedules.cosine(t, 120, floor=0.05),
        121,
    ),
    "exponential": (
        lambda o: lr_scheduler.ExponentialLR(o, gamma=0.01 ** (1 / 120)),
        lambda t: schedules.exponential(t, 120),
        121,
    ),
    "step": (
        lambda o: lr_scheduler.StepLR(o, step_size=40, gamma=0.3),
        lambda t: schedules.step_decay(t, 120, every=1 / 3, gamma=0.3),
        120,
    ),
    "step 7": (
        lambda o: lr_scheduler.StepLR(o, step_size=7),
        lambda t: schedules.step_decay(t, 120, every=7),
        120,
    ),
    "multistep": (
        lambda o: lr_scheduler.MultiStepLR(o, milestones=[60, 90, 100, 120]),
        lambda t: schedules.multistep(t, 120, milestones=(0.5, 90, 100, 1.0)),
        240,
    ),
    "warm restarts": (
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=8, T_mult=2, eta_min=0.1),
        lambda t: schedules.warm_restarts(t, 120, cycles=4, floor=0.1),
        120,
    ),
    "restarts of one length": (
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=24),
        lambda t: schedules.cosine_with_restarts(t, 120, cycles=5),
        120,
    ),
    "triangular": (
        lambda o: lr_scheduler.CyclicLR(o, 0.1, 1.0, 8, 12, cycle_momentum=False),
        lambda t: schedules.cyclic(t, 120, cycles=6, up=0.4),
        121,
    ),
    "triangular2": (
        lambda o: lr_scheduler.CyclicLR(o, 0.1, 1.0, 15, mode="triangular2", cycle_momentum=False),
        lambda t: schedules.cyclic(t, 120, shrink=0.5),
        121,
    ),
    "exp_range": (
        lambda o: lr_scheduler.CyclicLR(
            o, 0.1, 1.0, 15, mode="exp_range", gamma=0.97, cycle_momentum=False
        ),
        lambda t: schedules.cyclic(t, 120, gamma=0.97),
        121,
    ),
    "one-cycle": (
        lambda o: lr_scheduler.OneCycleLR(o, 1.0, total_steps=121, cycle_momentum=False),
        lambda t: schedules.one_cycle(t, 120, (0.3 * 121 - 1) / 120),
        121,
    ),
    "sequence": (
        lambda o: lr_scheduler.SequentialLR(
            o,
            [
                lr_scheduler.LinearLR(o, 0.1, 1.0, total_iters=20),
                lr_scheduler.ConstantLR(o, factor=1.0),
                lr_scheduler.CosineAnnealingLR(o, T_max=60),
            ],
            milestones=[20, 60],
        ),
        lambda t: schedules.sequence(
            t,
            120,
            [RISE_20, schedules.constant, schedules.cosine],
            milestones=[20, 0.5],
        ),
        120,
    ),
}


@pytest.mark.parametrize("case", TORCH)
@pytest.mark.filterwarnings("ignore:The epoch parameter")  # torch's SequentialLR uses it itself
def test_schedules_match_torch(case):
    make, ours, steps = TORCH[case]
    rates = torch_rates(make, steps, lr=1.0)
    # torch multiplies rates one by one: after 120 products 1e-14 of the peak may be lost
    for step, wanted in enumerate(rates):
        assert ours(step) == pytest.approx(wanted, rel=1e-12, abs=1e-14), step


def test_schedules_drive_lambda_lr():
    rates = torch_rates(
        lambda o: lr_scheduler.LambdaLR(o, lambda t: schedules.wsd(t, 10, 2)), 12, lr=2.0
    )
    wanted = [0, 1, 2, 2, 2, 5 / 3, 4 / 3, 1, 2 / 3, 1 / 3, 0, 0]
    assert rates == pytest.approx(wanted, abs=1e-12)


# closed forms


@pytest.mark.parametrize(
    "name, options, step, wanted",
    [
        ("constant", {}, 10, 0.5),
        ("constant", {}, 20, 1.0),
        ("constant", {"skip_zero": True}, 0, 0.05),
        ("constant", {"skip_zero": True}, 19, 1.0),
        ("constant_then_jump", {}, 19, 1 / 3),
        ("constant_then_jump", {}, 20, 1.0),
        ("linear", {}, 60, 0.5),
        ("linear", {"floor": 0.2}, 60, 0.6),
        ("cosine", {}, 60, 0.5),
        ("cosine", {}, 40, (1 + math.sqrt(0.5)) / 2),
        ("cosine", {"floor": 0.2}, 60, 0.6),
        ("cosine", {"rise": "cosine", "start": 0.5}, 10, 0.75),
        ("polynomial", {"power": 2}, 60, 0.25),
        ("exponential", {}, 60, 0.1),
        ("rex", {}, 60, 2 / 3),
        ("inverse_sqrt", {}, 80, 0.5),  # 4 W
        ("inverse_sqrt", {"timescale": 20 / 3}, 40, 0.5),
        ("one_cycle", {}, 0, 1 / 25),
        ("one_cycle", {}, 100, 4e-6),
        ("one_cycle", {}, 60, (1 + 4e-6) / 2),
        ("step", {}, 59, 0.1),
        ("step", {}, 60, 0.01),
        ("multistep", {}, 49, 1.0),
        ("multistep", {}, 75, 0.01),
        ("cosine_with_restarts", {}, 40, 1.0),
        ("cosine_with_restarts", {}, 50, 0.5),
        ("cyclic", {"floor": 0.0}, 25, 0.5),
        ("wsd", {}, 40, 1.0),
        ("wsd", {}, 70, 0.5),
        ("wsd", {"cooldown": 0.2, "floor": 0.1}, 95, 0.325),
        ("wsd", {"cooldown": 20, "floor": 0.1}, 95, 0.325),
        ("wsd_cosine", {}, 90, 0.5),
        ("wsd_sqrt", {}, 80, 1.0),
        ("wsd_sqrt", {}, 85, 0.5),  # p = 0.25
        ("wsd_sqrt", {"cooldown": 0.8, "floor": 0.5}, 40, 0.75),
        ("wsd_square", {}, 90, 0.75),
        ("wsd_exponential", {}, 95, 1 / 11),  # (10 - 1) / 99
    ],
)
def test_schedules_have_known_values(name, options, step, wanted):
    """Total 100, warm-up 20."""
    assert SCHEDULES[name](step, 100, 20, **options) == pytest.approx(wanted, abs=1e-12)


def test_noam_is_the_formula_of_the_paper():
    width, warmup = 512, 40
    peak = (width * warmup) ** -0.5
    for t in range(1, 400):
        wanted = width**-0.5 * min(t**-0.5, t * warmup**-1.5)
        assert close(peak * SCHEDULES["noam"](t, 400, warmup), wanted)


def test_shapes_have_the_mean_heights_of_their_integrals():
    n = 20_000
    for name, mean in schedules.MEANS.items():
        middle = math.fsum(schedules.SHAPES[name]((i + 0.5) / n) for i in range(n)) / n
        assert middle == pytest.approx(mean, abs=1e-6)  # the error of 1 - sqrt is n^-1.5


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(0, 8))
@example(1, 0)
def test_area_is_the_sum_of_the_multipliers(tenths, part):
    total, warmup = 10 * tenths, part * tenths  # all default cooldowns are whole steps
    for name, schedule in SCHEDULES.items():
        summed = math.fsum(schedule(t, total, warmup) for t in range(total))
        area = schedules.area(schedule, total, warmup)
        # the trapezoidal rule is exact on lines and on whole half waves; of the others it misses
        # most, 0.29 steps, where the decay of wsd_exponential is a single step
        exact = name in ("constant", "linear", "cosine", "wsd", "wsd_cosine")
        assert area is None or summed == pytest.approx(area, abs=1e-9 if exact else 0.3), name


def test_restarts_are_at_whole_steps_where_the_cycles_are():
    """Rounding must not delay them: in floats (1 / 49) * 49 is below 1."""
    for cycles in range(1, 60):
        for each in (1, 3):
            for k in range(cycles):
                value = schedules.cosine_with_restarts(k * each, cycles * each, cycles=cycles)
                assert value == 1.0


def test_momentum_of_one_cycle_matches_torch():
    stepped = optimizer(momentum=0.9)
    scheduler = lr_scheduler.OneCycleLR(stepped, 1.0, total_steps=101)
    for t in range(101):
        ours = 0.95 * schedules.one_cycle_momentum(t, 100, (0.3 * 101 - 1) / 100)
        assert close(ours, stepped.param_groups[0]["momentum"])
        stepped.step()
        if t < 100:
            scheduler.step()


# properties


@settings(max_examples=150, deadline=None)
@given(names, runs, st.booleans())
@example("wsd", (7, 7), False)
@example("cosine", (1, 1), True)
@example("cosine_with_restarts", (3, 3), False)
def test_schedules_stay_in_range_and_never_move_after_the_end(name, run, skip_zero):
    total, warmup = run
    values = [SCHEDULES[name](t, total, warmup, skip_zero=skip_zero) for t in range(2 * total + 2)]
    assert all(type(value) is float and 0 <= value <= 1 for value in values)
    assert len(set(values[total:])) == 1
    if name in FALLING:
        rising, falling = values[: min(warmup + 1, total)], values[warmup:]
        # the milestones of these two may lie in the warm-up
        assert name in ("step", "multistep") or all(a <= b for a, b in itertools.pairwise(rising))
        assert all(a >= b for a, b in itertools.pairwise(falling))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["linear", "cosine", "wsd", "wsd_sqrt", "rex", "inverse_sqrt"]), runs)
def test_warmup_is_the_line_it_promises(name, run):
    total, warmup = run
    for step in range(warmup):
        assert SCHEDULES[name](step, total, warmup) == step / warmup
        assert SCHEDULES[name](step, total, warmup, skip_zero=True) == (step + 1) / warmup
    if warmup < total:
        assert SCHEDULES[name](warmup, total, warmup) == 1.0  # the rise ends at the peak


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["linear", "cosine", "wsd", "wsd_sqrt", "rex"]), runs, st.floats(0, 1))
def test_floor_is_where_the_decay_ends_and_never_undercut(name, run, floor):
    total, warmup = run
    values = [SCHEDULES[name](t, total, warmup, floor=floor) for t in range(warmup, total + 9)]
    assert set(values[total - warmup :]) == {floor}
    assert all(value >= floor - 1e-15 for value in values)


@pytest.mark.parametrize("name", SMOOTH + ["wsd_sqrt"])
def test_schedules_do_not_jump(name):
    """Over 10^6 steps no two neighbours differ by more than the steepest slope allows."""
    total, warmup = 10**6, 10**5
    joints = (0, warmup, *range(2 * 10**5, total, 10**5), total, *range(warmup, total, 225_000))
    steps = {t for joint in joints for t in range(max(0, joint - 30), joint + 30)}
    # the steepest are 1/W and, in a decay over 1/10, exponential: ln(100) 100/99 / 10^5
    # 1 - sqrt(p) starts with sqrt(1 / K), K = 200,000
    bound = 4.66e-5 if name != "wsd_sqrt" else 1 / math.sqrt(2e5)
    for t in steps:
        a, b = (SCHEDULES[name](x, total, warmup) for x in (t, t + 1))
        assert abs(a - b) <= bound * (1 + 1e-6)


@settings(max_examples=50, deadline=None)
@given(names, runs, st.randoms(use_true_random=False))
def test_schedules_have_no_memory(name, run, order):
    total, warmup = run
    steps = list(range(total + 3))
    forwards = [SCHEDULES[name](t, total, warmup) for t in steps]
    order.shuffle(steps)
    assert all(SCHEDULES[name](t, total, warmup) == forwards[t] for t in steps)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["wsd", "wsd_sqrt"]), st.integers(1, 300), st.integers(1, 300))
def test_wsd_shares_its_trunk_with_longer_runs(name, total, more):
    for step in range(int(0.4 * total)):
        assert SCHEDULES[name](step, total) == SCHEDULES[name](step, total + more)


def test_wsd_is_the_line_that_training_runs_have_used():
    """Bit for bit, so that a checkpoint goes on with the rates it began with."""
    total, warmup = 1200, 30
    begin = max(warmup, total - 0.6 * total)
    for step in range(total):
        decay = 1 - max(0.0, (step - begin) / (total - begin))
        wanted = min(1.0, (step + 1) / warmup) * decay
        assert SCHEDULES["wsd"](step, total, warmup, skip_zero=True) == wanted


def test_wsd_gives_way_to_a_long_warmup():
    """Warm-up 8 of 10 leaves 2 of the 6 steps of decay."""
    values = [schedules.wsd(t, 10, 8) for t in (7, 8, 9, 10)]
    assert values == pytest.approx([7 / 8, 1.0, 0.5, 0.0])


@settings(max_examples=60, deadline=None)
@given(names, runs, st.integers(0, 900), st.sampled_from([2, 8, 131_072]))
def test_schedules_may_be_counted_in_tokens(name, run, step, tokens):
    total, warmup = run
    options = {}
    if name in ("inverse_sqrt", "noam"):
        options = {"timescale": 50}
    if name in ("step", "multistep"):  # whose shares are rounded: counts are not
        options = {"every": 7} if name == "step" else {"milestones": (0, total // 3)}
        options = options if name == "multistep" or total >= 7 else {"every": total}
        step = min(step, total - 1)
    larger = {
        k: [x * tokens for x in v] if k == "milestones" else v * tokens for k, v in options.items()
    }
    a = SCHEDULES[name](step, total, warmup, **options)
    b = SCHEDULES[name](step * tokens, total * tokens, warmup * tokens, **larger)
    assert a == pytest.approx(b, abs=1e-7)  # sqrt near p = 0 magnifies rounding


@settings(max_examples=60, deadline=None)
@given(names, st.integers(1, 50), st.integers(0, 4))
def test_a_float_is_a_share_and_an_integer_a_count(name, quarters, part):
    total = 4 * quarters
    for t in range(total + 2):
        share = SCHEDULES[name](t, total, part / 4)
        assert share == SCHEDULES[name](t, total, part * quarters)
    assert schedules.length("warmup", 1, total) == 1  # one step
    assert schedules.length("warmup", 1.0, total) == total  # the whole run
    assert schedules.length("warmup", 2e9, 5e12) == 2e9  # tokens


# composition, batch size, branches


def test_sequence_starts_each_part_anew_and_stays_at_its_end():
    parts = [schedules.linear, schedules.cosine]
    values = [schedules.sequence(t, 30, parts, [0.4]) for t in range(60)]
    assert values[:12] == [schedules.linear(t, 12) for t in range(12)]
    assert values[12:30] == [schedules.cosine(t, 18) for t in range(18)]
    assert set(values[30:]) == {0.0}
    climbing = [lambda step, total: step / total]  # one without an end of its own
    assert schedules.sequence(50, 30, climbing, []) == 1.0


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 50), st.integers(0, 20), st.integers(1, 16), st.integers(1, 200))
def test_batch_size_climbs_in_equal_stairs(small, stairs, multiple, over):
    large = small + stairs * multiple
    sizes = [
        schedules.batch_size(t, 200, small, large, over=over, multiple=multiple)
        for t in range(400)
    ]
    assert sizes[0] == (small if stairs else large) and set(sizes[over:]) == {large}
    for t, size in enumerate(sizes[:over]):  # the stair whose equal share of `over` holds t
        stair = max(k for k in range(stairs + 1) if k * over <= t * stairs)
        assert size == small + stair * multiple


def test_multistep_doubles_the_batch_as_llama_3_did():
    milestones = (252 * 10**6, 2870 * 10**9)
    for tokens, wanted in ((0, 4), (252 * 10**6 - 1, 4), (252 * 10**6, 8), (3 * 10**12, 16)):
        double = schedules.multistep(tokens, 156 * 10**11, milestones=milestones, gamma=2)
        assert 4 * double == wanted


@pytest.mark.parametrize(
    "at, cooldown, wanted",
    [(800, 0.2, (1000, 200)), (800, 50, (850, 50)), (1, 0.5, (2, 1)), (7, 0.01, (8, 1))],
)
def test_branch_gives_the_run_that_leaves_at_a_step(at, cooldown, wanted):
    options = schedules.branch(at, cooldown)
    assert (options["total"], options["cooldown"]) == wanted
    assert schedules.wsd(at, **options) == 1.0 and schedules.wsd(at + 1, **options) < 1.0


def state_after(steps, schedule, state=None):
    """(weights, optimiser state) of a tiny model after the step numbers; from `state` if given."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    stepped = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if state:
        model.load_state_dict(state[0])
        stepped.load_state_dict(copy.deepcopy(state[1]))
    scheduler = schedules.Scheduler(stepped, schedule, step=steps[0])
    for t in steps:
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(t))
        stepped.zero_grad()
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        stepped.step()
        scheduler.step()
    return copy.deepcopy(model.state_dict()), copy.deepcopy(stepped.state_dict())


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a[0].values(), b[0].values(), strict=True))


def test_two_branches_of_a_trunk_equal_two_whole_runs_bit_for_bit():
    trunk = partial(schedules.constant, total=1000, warmup=5)
    shape = partial(schedules.wsd_sqrt, warmup=5)
    at_20 = state_after(range(20), trunk)
    at_35 = state_after(range(20, 35), trunk, at_20)
    ends = []
    for at, state, cooldown in ((20, at_20, 10), (35, at_35, 0.3)):
        branch = partial(shape, **schedules.branch(at, cooldown, warmup=5))
        total = branch.keywords["total"]
        cooled = state_after(range(at, total), branch, state)
        assert same_weights(cooled, state_after(range(total), branch))
        ends.append(cooled)
    assert not same_weights(*ends)
    # and the trunk, from which both were taken, goes on as if nothing had been
    assert same_weights(state_after(range(35, 60), trunk, at_35), state_after(range(60), trunk))


# the torch wrapper


def two_groups(cls=torch.optim.SGD, **options):
    a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    return cls([{"params": [a]}, {"params": [b], "lr": 0.1}], lr=0.3, **options)


def settings_of(stepped, keys=("lr", "weight_decay", "betas")):
    return [{key: group[key] for key in keys} for group in stepped.param_groups]


FOLLOWING = {
    "multiplier": partial(schedules.cosine, total=40, warmup=5),
    "weight_decay": partial(schedules.linear, total=40),
    "momentum": partial(schedules.one_cycle_momentum, total=40),
}


def test_scheduler_scales_each_group_from_its_own_base():
    stepped = two_groups(torch.optim.AdamW, weight_decay=0.2, betas=(0.95, 0.99))
    scheduler = schedules.Scheduler(stepped, **FOLLOWING)
    assert isinstance(scheduler, lr_scheduler.LRScheduler)
    for t in range(60):
        m, decay, beta = (rule(t) for rule in FOLLOWING.values())
        assert scheduler.get_last_lr() == [0.3 * m, 0.1 * m]
        for group, lr in zip(stepped.param_groups, (0.3, 0.1)):
            assert group["lr"] == lr * m and group["weight_decay"] == 0.2 * decay
            assert group["betas"] == (0.95 * beta, 0.99)
        stepped.step()
        scheduler.step()


def test_scheduler_scales_momentum_and_a_rate_that_is_a_tensor():
    rate = torch.tensor(0.5)
    stepped = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate, momentum=0.8)
    half = partial(schedules.linear, total=2)
    scheduler = schedules.Scheduler(stepped, half, momentum=half)
    scheduler.step()
    assert stepped.param_groups[0]["lr"] is rate and rate.item() == 0.25
    assert stepped.param_groups[0]["momentum"] == 0.4


@pytest.mark.parametrize("order", ["number", "build first", "load first", "no optimiser"])
def test_scheduler_resumes_bit_for_bit_from_any_step(order):
    options = {"weight_decay": 0.2, "betas": (0.95, 0.99)}
    stepped = two_groups(torch.optim.AdamW, **options)
    scheduler = schedules.Scheduler(stepped, **FOLLOWING)
    seen, saved = [], []
    for _ in range(50):
        seen.append(settings_of(stepped))
        saved.append(copy.deepcopy((stepped.state_dict(), scheduler.state_dict())))
        scheduler.step()
    for t, (optimizer_state, scheduler_state) in enumerate(saved):
        again = two_groups(torch.optim.AdamW, **options)
        if order in ("number", "load first"):
            again.load_state_dict(copy.deepcopy(optimizer_state))
        resumed = schedules.Scheduler(again, **FOLLOWING, step=t if order == "number" else 0)
        if order == "build first":
            again.load_state_dict(copy.deepcopy(optimizer_state))
        if order != "number":
            resumed.load_state_dict(scheduler_state)
        for wanted in seen[t : t + 3]:
            assert settings_of(again) == wanted
            resumed.step()


def test_scheduler_built_first_takes_an_optimiser_saved_without_one():
    saved = two_groups()
    for group in saved.param_groups:
        group["lr"] /= 7  # by a loop of one's own
    stepped = two_groups()
    scheduler = schedules.Scheduler(stepped, FOLLOWING["multiplier"], step=11)
    stepped.load_state_dict(saved.state_dict())
    scheduler.step()
    m = FOLLOWING["multiplier"](12)
    assert [group["lr"] for group in stepped.param_groups] == [0.3 * m, 0.1 * m]


def test_scheduler_resumes_by_number_where_sequential_lr_does_not():
    def theirs(stepped, last_epoch):
        up = lr_scheduler.LinearLR(stepped, 0.1, 1.0, total_iters=5, last_epoch=last_epoch)
        down = lr_scheduler.CosineAnnealingLR(stepped, T_max=10, last_epoch=last_epoch)
        return lr_scheduler.SequentialLR(stepped, [up, down], [5], last_epoch=last_epoch)

    whole = torch_rates(partial(theirs, last_epoch=-1), 12)
    stepped = optimizer()
    stepped.param_groups[0]["initial_lr"] = 1.0
    theirs(stepped, last_epoch=9)
    assert stepped.param_groups[0]["lr"] != pytest.approx(whole[10])  # their defect

    def rule(step):
        rise = partial(schedules.constant, warmup=5, start=0.1)
        return schedules.sequence(step, 15, [rise, schedules.cosine], [5])

    ours = schedules.Scheduler(optimizer(), rule, step=10)
    assert ours.get_last_lr()[0] == pytest.approx(whole[10], rel=1e-12)


def test_scheduler_state_is_one_number_that_torch_can_save():
    scheduler = schedules.Scheduler(optimizer(), partial(schedules.cosine, total=9), step=4)
    buffer = io.BytesIO()
    torch.save(scheduler.state_dict(), buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True) == {"last_epoch": 4}


# plateau


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.one_of(st.sampled_from([1.0, 0.9, 0.5, -0.5, math.nan]), st.floats(-2, 2))),
    st.sampled_from(["min", "max"]),
    st.sampled_from(["rel", "abs"]),
    st.integers(0, 3),
    st.integers(0, 3),
    st.sampled_from([0.0, 0.2]),
    st.integers(0, 40),
)
def test_plateau_matches_torch_and_resumes(
    metrics, mode, threshold_mode, patience, cooldown, floor, cut
):
    options = {"mode": mode, "threshold_mode": threshold_mode, "threshold": 0.05, "factor": 0.5}
    options |= {"patience": patience, "cooldown": cooldown}
    stepped = optimizer()
    theirs = lr_scheduler.ReduceLROnPlateau(stepped, **options, min_lr=floor, eps=0)
    ours = schedules.Plateau(**options, floor=floor)
    for t, metric in enumerate(metrics):
        if t == cut:
            state, ours = ours.state_dict(), schedules.Plateau(**options, floor=floor)
            ours.load_state_dict(state)
        theirs.step(metric)
        assert ours.update(metric) == stepped.param_groups[0]["lr"]


# the range test


def quadratic(curvatures, **options):
    """A model with loss 1/2 sum h x^2 from x = 1, its SGD, and the closure."""
    model = torch.nn.Linear(len(curvatures), 1, bias=False, dtype=torch.float64)
    torch.nn.init.ones_(model.weight)
    h = torch.tensor(curvatures, dtype=torch.float64)
    stepped = torch.optim.SGD(model.parameters(), lr=1.0, **options)
    return lambda: (h / 2 * model.weight.square()).sum(), model, stepped


@settings(max_examples=30, deadline=None)
@given(st.floats(0.3, 1e4))
def test_range_test_brackets_two_over_the_curvature(curvature):
    result = schedules.lr_range_test(*quadratic([curvature]), low=1e-6)
    first = result.rates.index(result.diverging)
    assert result.rates[first - 1] <= 2 / curvature < result.rates[first]


def test_range_test_stops_on_divergence():
    result = schedules.lr_range_test(*quadratic([100.0]), low=1e-6, high=1e3, steps=200)
    assert len(result.rates) < 200
    assert result.smoothed[-1] > 4 * min(result.smoothed)
    assert all(s <= 4 * min(result.smoothed[: k + 1]) for k, s in enumerate(result.smoothed[:-1]))


def test_range_test_stops_where_the_loss_is_not_finite():
    losses = iter([1.0, 0.9, 0.8, math.nan, 0.7])
    _, model, stepped = quadratic([1.0])
    result = schedules.lr_range_test(
        lambda: model.weight.sum() * 0 + next(losses), model, stepped
    )
    assert result.losses[:3] == [1.0, 0.9, 0.8] and len(result.losses) == 4
    assert result.diverging == result.rates[2]
    with pytest.raises(ValueError, match="loss=inf must be above 0 and finite on the first batch"):
        schedules.lr_range_test(lambda: model.weight.sum() + math.inf, model, stepped)
    falling = schedules.lr_range_test(*quadratic([1.0]), high=1.0)
    assert falling.diverging is None and len(falling.rates) == 100


def test_range_test_rates_and_averages_are_those_of_fastai():
    losses = [1 / (k + 1) for k in range(50)]
    feed = iter(losses)
    _, model, stepped = quadratic([1.0])
    result = schedules.lr_range_test(
        lambda: model.weight.sum() * 0 + next(feed), model, stepped, low=1e-3, high=1e2, steps=50
    )
    assert result.losses == losses
    for k in range(50):
        assert close(result.rates[k], 1e-3 * 1e5 ** (k / 50))
        weights = [0.98**j for j in range(k + 1)]  # newest first
        mean = sum(w * x for w, x in zip(weights, losses[k::-1])) / sum(weights)
        assert result.smoothed[k] == pytest.approx(mean, rel=1e-12)


def test_range_test_keeps_the_proportion_of_the_groups():
    closure, model, _ = quadratic([1.0, 1.0])
    other = torch.nn.Parameter(torch.ones(1))
    model.register_parameter("other", other)
    own = [p for p in model.parameters() if p is not other]
    stepped = torch.optim.SGD([{"params": own, "lr": 0.1}, {"params": [other]}], 0.4)
    seen = []

    def watched():
        seen.append([group["lr"] for group in stepped.param_groups])
        return closure()

    result = schedules.lr_range_test(watched, model, stepped, low=1e-3, high=1e-1, steps=10)
    # a loss is computed before its rate is set
    assert [b for _, b in seen[1:]] == pytest.approx(result.rates[:-1])
    assert all(b == pytest.approx(4 * a) for a, b in seen)


def everything(model, stepped):
    """All that the range test must leave alone, as bytes."""
    buffer = io.BytesIO()
    gradients = [p.grad for p in model.parameters()]
    buffers = [x.tolist() for x in model.buffers()]
    torch.save((model.state_dict(), buffers, stepped.state_dict(), gradients), buffer)
    return buffer.getvalue(), torch.get_rng_state().tolist()


class FineMomentum(torch.optim.Optimizer):
    """SGD whose momentum is finer than the weights; Optimizer.load_state_dict would round it."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p, dtype=torch.float64))
                m.mul_(0.9).add_(p.grad)
                p.sub_((group["lr"] * m).to(p.dtype))


@pytest.mark.parametrize("crash", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_range_test_leaves_everything_as_it_was(trained, crash):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5)]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(8, 1)).to(torch.bfloat16)
    model.register_buffer("scratch", torch.zeros(2), persistent=False)
    stepped = FineMomentum(model.parameters(), {"lr": 1e-2})
    x = torch.randn(16, 4, dtype=torch.bfloat16)
    calls = itertools.count()

    def closure():
        model.scratch += 1
        if crash and next(calls) == 20:
            raise KeyError("out of data")
        return model(x).square().mean()

    if trained:
        for _ in range(3):
            stepped.zero_grad()
            closure().backward()
            stepped.step()
    before = everything(model, stepped)
    if crash:
        calls = itertools.count()
        with pytest.raises(KeyError):
            schedules.lr_range_test(closure, model, stepped)
    else:
        result = schedules.lr_range_test(closure, model, stepped)
        assert len(result.rates) > 20 and result.losses[0] != result.losses[20]
    assert everything(model, stepped) == before


def suggestions(smoothed, steps=None):
    n = len(smoothed)
    rates = [10 ** (k / 10 - 5) for k in range(n)]
    return schedules.RangeTest(rates, smoothed, smoothed, (steps or n) // 10), rates


def test_suggestions_of_a_valley_by_hand():
    flat, fall = [5.0] * 20, [5 - 0.1 * k for k in range(1, 41)]
    rise = [1.0 + k for k in range(1, 16)]
    fall[30] -= 0.05  # the steepest place
    result, rates = suggestions(flat + fall + rise)  # 75 points: 7 and 5 are cut
    lowest = 20 + 39
    assert result.minimum == rates[lowest] / 10
    assert result.steep == rates[20 + 29]  # the slope from 29 to 30
    # the longest fall is one of the 5.0 and the 40: 41 long, from 13 + 6 to 59, its middle
    assert result.valley == rates[lowest - 41 + 13 + 6]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=8, max_size=14))
def test_valley_is_in_the_longest_falling_subsequence(heights):
    losses = [float(x) for x in heights]
    result, rates = suggestions(losses + [99.0] * 5, steps=9)  # nothing cut but the last five
    n, end = 0, 0  # brute force: the longest one, and the earliest place where one ends
    for size in range(len(losses), 0, -1):
        ends = [
            c[-1]
            for c in itertools.combinations(range(len(losses)), size)
            if all(losses[a] > losses[b] for a, b in itertools.pairwise(c))
        ]
        if ends:
            n, end = size, min(ends)
            break
    assert result.valley == rates[max(0, end - n + n // 3 + n // 6)]


def test_suggestions_on_a_quadratic_are_rates_that_converge():
    result = schedules.lr_range_test(*quadratic([100.0, 10.0, 1.0]), low=1e-6)
    for rate in (result.valley, result.steep, result.minimum):
        assert 1e-4 < rate < 2 / 100


def test_suggestions_need_enough_points():
    result, _ = suggestions([3.0, 2.0, 1.0, 2.0, 9.0, 9.0, 9.0, 9.0], steps=100)
    with pytest.raises(ValueError, match="8 updates .* must be at least 17"):
        _ = result.valley


# errors


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    "arguments, word",
    [
        ((-1, 10, 2), "step=-1 must be at least 0"),
        ((0, 0, 0), "total=0 must be above 0"),
        ((0, math.inf, 0), "total=inf must be above 0, and finite"),
        ((0, 10, 11), "warmup=11 must be a whole number from 0 to total=10"),
        ((0, 10, 1.5), "warmup=1.5 must be a whole number from 0 to total=10, or a share"),
        ((0, 10, -0.1), "warmup=-0.1"),
        ((0, 10, -1), "warmup=-1"),
        ((0, 10, math.nan), "warmup=nan"),
    ],
)
def test_schedules_name_wrong_values(name, arguments, word):
    with pytest.raises(ValueError, match=word):
        SCHEDULES[name](*arguments)


@pytest.mark.parametrize(
    "name, options",
    [
        ("linear", {"floor": -0.1}),
        ("linear", {"start": 1.1}),
        ("cosine", {"floor": 1.1}),
        ("wsd", {"floor": math.nan}),
        ("wsd", {"cooldown": 0.0}),
        ("wsd_sqrt", {"floor": 2.0}),
        ("wsd_sqrt", {"cooldown": 1.5}),
        ("wsd_sqrt", {"cooldown": 11}),
        ("polynomial", {"power": 0}),
        ("inverse_sqrt", {"timescale": -1}),
        ("inverse_sqrt", {"timescale": 0}),
        ("cosine_with_restarts", {"cycles": 0}),
        ("cosine_with_restarts", {"factor": 0}),
        ("cyclic", {"cycles": 1.5}),
        ("cyclic", {"up": 1.0}),
        ("cyclic", {"shrink": 1.5}),
        ("cyclic", {"gamma": 0.0}),
        ("step", {"every": 11}),
        ("step", {"gamma": 0.0}),
        ("multistep", {"gamma": -1}),
    ],
)
def test_schedules_name_wrong_options(name, options):
    ((option, value),) = options.items()
    with pytest.raises(ValueError, match=f"{option}={value}"):
        SCHEDULES[name](0, 10, **options)


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda: schedules.get("consine"), "'consine' must be one of .* did you mean 'cosine'"),
        (lambda: schedules.get("zzz"), "schedule='zzz' must be one of constant"),
        (lambda: schedules.linear(0, 9, shape="1-sqr"), "shape='1-sqr' .* did you mean '1-sqrt'"),
        (lambda: schedules.linear(0, 9, rise="liner"), "rise='liner' .* did you mean 'linear'"),
        (lambda: schedules.multistep(0, 9, milestones=[10]), "milestone=10"),
        (lambda: schedules.sequence(-1, 9, [schedules.linear], []), "step=-1"),
        (lambda: schedules.sequence(0, 9, [schedules.linear], [3]), "one fewer than the 1"),
        (lambda: schedules.sequence(0, 9, 3 * [schedules.linear], [5, 3]), "increasing"),
        (lambda: schedules.sequence(0, 9, 2 * [schedules.linear], [9]), "below total=9"),
        (lambda: schedules.batch_size(0, 9, 4, 2), "small=4"),
        (lambda: schedules.batch_size(0, 9, 4, 9, multiple=2), "a divisor of large - small = 5"),
        (lambda: schedules.branch(5, 10, warmup=6), "at=5 must be at least warmup=6"),
        (lambda: schedules.branch(5, 1.0), "cooldown=1.0"),
        (lambda: schedules.branch(5, 0), "cooldown=0"),
        (lambda: schedules.Scheduler(optimizer(), schedules.linear, step=-1), "step=-1"),
        (lambda: schedules.Plateau(factor=1.0), "factor=1.0"),
        (lambda: schedules.Plateau(floor=2.0), "floor=2.0"),
        (lambda: schedules.Plateau(patience=-1), "patience=-1"),
        (lambda: schedules.Plateau(mode="lower"), "mode='lower'"),
        (lambda: schedules.Plateau(threshold_mode="a"), "threshold_mode='a'"),
        (lambda: schedules.lr_range_test(*quadratic([1.0]), low=0), "low=0"),
        (lambda: schedules.lr_range_test(*quadratic([1.0]), low=2, high=1), "below high=1"),
        (lambda: schedules.lr_range_test(*quadratic([1.0]), steps=5), "steps=5"),
    ],
)
def test_wrong_values_are_named(call, word):
    with pytest.raises(ValueError, match=word):
        call()


# the demo


def test_demo_prints_what_the_docstring_says(tmp_path):
    path = Path(schedules.__file__)
    out = subprocess.run([sys.executable, path], cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    shown = schedules.__doc__.split("prints\n\n")[1]
    assert [line.strip() for line in out.stdout.splitlines()] == [
        line.strip() for line in shown.rstrip().splitlines()
    ]


def test_plot_without_matplotlib_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        schedules.save_picture(str(tmp_path / "x.png"))


def test_plot_saves_a_picture(tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    schedules.save_picture(str(tmp_path / "x.png"), total=60, warmup=3)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("total", [100, 1000, 10_000])
def test_a_share_that_is_a_whole_number_of_steps_is_that_number(total):
    for percent in range(1, 100):
        share, count = percent / 100, percent * total // 100
        at = count + (total - count) // 2
        for step in (count, at, total - 1):
            for name in ("cosine_with_restarts", "wsd", "inverse_sqrt"):
                schedule = schedules.SCHEDULES[name]
                assert schedule(step, total, share) == schedule(step, total, count)
        assert [
            schedules.batch_size(step, total, 8, 64, over=share, multiple=8)
            for step in (count - 1, count)
        ] == [schedules.batch_size(step, total, 8, 64, over=count, multiple=8)
              for step in (count - 1, count)]  # fmt: skip


def test_scheduler_works_inside_torchs_sequential():
    def rates(make):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        parts = [make(optimizer, partial(schedules.cosine, total=10)),
                 make(optimizer, partial(schedules.linear, total=10))]  # fmt: skip
        whole = torch.optim.lr_scheduler.SequentialLR(optimizer, parts, [3])
        seen = []
        for _ in range(8):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            whole.step()
        return seen

    assert rates(schedules.Scheduler) == pytest.approx(rates(torch.optim.lr_scheduler.LambdaLR))


def test_lr_range_test_refuses_an_optimizer_of_more_than_the_model():
    one, two = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD([*one.parameters(), *two.parameters()], lr=0.1)
    with pytest.raises(ValueError, match="2 parameters"):
        schedules.lr_range_test(lambda: one(torch.ones(2)).square().sum(), one, optimizer)
