"""Tests of 05_schedules.py: against transformers and torch, by closed form, and by property.

Run: python -m pytest tests/test_05_schedules.py
"""

import importlib
import itertools
import math

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

schedules = importlib.import_module("05_schedules")
SCHEDULES = schedules.SCHEDULES

names = st.sampled_from(list(SCHEDULES))
runs = st.integers(1, 400).flatmap(lambda total: st.tuples(st.just(total), st.integers(0, total)))


def optimizer(lr=1.0):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


# against transformers: W < T, since at W = T its own schedules disagree about step T


@pytest.mark.parametrize("total, warmup", [(100, 10), (100, 0), (37, 36), (1, 0), (1000, 333)])
@pytest.mark.parametrize(
    "name, options, theirs, wanted",
    [
        ("constant", {}, "constant_schedule_with_warmup", {}),
        ("linear", {}, "linear_schedule_with_warmup", {}),
        ("cosine", {}, "cosine_schedule_with_warmup", {}),
        (
            "cosine",
            {"floor": 0.1},
            "cosine_with_min_lr_schedule_with_warmup",
            {"min_lr_rate": 0.1},
        ),
    ],
)
def test_schedules_match_transformers(name, options, theirs, wanted, total, warmup):
    optimization = pytest.importorskip("transformers.optimization")
    wanted = wanted | {"num_warmup_steps": warmup}
    if name != "constant":
        wanted["num_training_steps"] = total
    rule = getattr(optimization, f"get_{theirs}")(optimizer(), **wanted).lr_lambdas[0]
    # after the end the cosines of transformers climb again
    for step in range(total + 1 if name == "cosine" else 2 * total):
        ours = SCHEDULES[name](step, total, warmup, **options)
        assert ours == pytest.approx(rule(step), rel=1e-12, abs=1e-15), step


@pytest.mark.parametrize("name, shape", [("wsd", "linear"), ("wsd_sqrt", "1-sqrt")])
@pytest.mark.parametrize(
    "total, warmup, cooldown", [(100, 10, 0.25), (4, 0, 1.0), (400, 300, 0.25)]
)
def test_wsd_matches_transformers(name, shape, total, warmup, cooldown):
    optimization = pytest.importorskip("transformers.optimization")
    rule = optimization.get_wsd_schedule(
        optimizer(), warmup, round(cooldown * total), total, decay_type=shape
    ).lr_lambdas[0]
    for step in range(2 * total):
        ours = SCHEDULES[name](step, total, warmup, cooldown=cooldown)
        assert ours == pytest.approx(rule(step), rel=1e-12, abs=1e-15), step


def test_cosine_stays_down_where_transformers_climbs_again():
    optimization = pytest.importorskip("transformers.optimization")
    rule = optimization.get_cosine_schedule_with_warmup(optimizer(), 10, 100).lr_lambdas[0]
    assert rule(190) == pytest.approx(1.0)
    assert schedules.cosine(190, 100, 10) == 0.0


@pytest.mark.parametrize(
    "name, theirs",
    [
        ("linear", lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=50)),
        ("cosine", lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=50)),
    ],
)
def test_schedules_match_torch(name, theirs):
    stepped = optimizer(lr=0.3)
    scheduler = theirs(stepped)
    for step in range(51):
        wanted = scheduler.get_last_lr()[0]
        assert 0.3 * SCHEDULES[name](step, 50) == pytest.approx(wanted, rel=1e-9, abs=1e-12)
        stepped.step()
        scheduler.step()


def test_schedules_drive_lambda_lr():
    stepped = optimizer(lr=2.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(stepped, lambda t: schedules.wsd(t, 10, 2))
    rates = []
    for _ in range(12):
        rates.append(scheduler.get_last_lr()[0])
        stepped.step()
        scheduler.step()
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
        ("linear", {}, 60, 0.5),
        ("linear", {"floor": 0.2}, 60, 0.6),
        ("cosine", {}, 60, 0.5),
        ("cosine", {}, 40, (1 + math.sqrt(0.5)) / 2),
        ("cosine", {"floor": 0.2}, 60, 0.6),
        ("wsd", {}, 40, 1.0),
        ("wsd", {}, 70, 0.5),
        ("wsd", {"cooldown": 0.2, "floor": 0.1}, 95, 0.325),
        ("wsd_sqrt", {}, 80, 1.0),
        ("wsd_sqrt", {}, 85, 0.5),
        ("wsd_sqrt", {"cooldown": 0.8, "floor": 0.5}, 40, 0.75),
    ],
)
def test_schedules_have_known_values(name, options, step, wanted):
    """Total 100, warm-up 20."""
    assert SCHEDULES[name](step, 100, 20, **options) == pytest.approx(wanted, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(names, st.integers(1, 60), st.integers(0, 300))
@example("wsd_sqrt", 4, 20)
@example("linear", 4, 20)
def test_area_is_the_sum_of_the_multipliers(name, fifths, warmup):
    total = 5 * fifths  # both default cooldowns are whole steps
    assume(warmup <= total)
    summed = math.fsum(SCHEDULES[name](t, total, warmup) for t in range(total))
    # the Euler-Maclaurin series ends before the term in n^-3 / 1920
    assert summed == pytest.approx(schedules.area(name, total, warmup), abs=6e-4)


# properties


@settings(max_examples=100, deadline=None)
@given(names, runs, st.booleans())
@example("wsd", (7, 7), False)
@example("cosine", (1, 1), True)
def test_schedules_rise_once_then_never_climb(name, run, skip_zero):
    total, warmup = run
    values = [SCHEDULES[name](t, total, warmup, skip_zero=skip_zero) for t in range(2 * total + 2)]
    assert all(type(value) is float and 0 <= value <= 1 for value in values)
    rising, falling = values[: min(warmup + 1, total)], values[warmup:]
    assert all(a <= b for a, b in itertools.pairwise(rising))
    assert all(a >= b for a, b in itertools.pairwise(falling))
    assert set(values[total:]) == {1.0 if name == "constant" else 0.0}


@settings(max_examples=100, deadline=None)
@given(names, runs)
def test_warmup_is_the_line_it_promises(name, run):
    total, warmup = run
    for step in range(warmup):
        assert SCHEDULES[name](step, total, warmup) == step / warmup
        assert SCHEDULES[name](step, total, warmup, skip_zero=True) == (step + 1) / warmup
    if warmup < total:
        assert SCHEDULES[name](warmup, total, warmup) == 1.0  # the rise ends at the peak


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["linear", "cosine", "wsd", "wsd_sqrt"]), runs, st.floats(0, 1))
def test_floor_is_where_the_decay_ends_and_never_undercut(name, run, floor):
    total, warmup = run
    values = [SCHEDULES[name](t, total, warmup, floor=floor) for t in range(warmup, total + 9)]
    assert set(values[total - warmup :]) == {floor}
    assert all(value >= floor - 1e-15 for value in values)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_do_not_jump(name):
    """Over 10^6 steps no two neighbours differ by more than the steepest slope allows."""
    total, warmup = 10**6, 10**5
    joints = (0, warmup, 2 * 10**5, 4 * 10**5, 8 * 10**5, total)
    steps = {t for joint in joints for t in range(max(0, joint - 50), joint + 50)}
    # 1 - sqrt(p) starts with sqrt(1 / K), K = 200,000; everything else is below 1 / W
    bound = 1e-5 if name != "wsd_sqrt" else 1 / math.sqrt(2e5)
    for t in steps:
        a, b = (SCHEDULES[name](x, total, warmup) for x in (t, t + 1))
        assert abs(a - b) <= bound * (1 + 1e-6)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["wsd", "wsd_sqrt"]), st.integers(1, 300), st.integers(1, 300))
def test_wsd_shares_its_trunk_with_longer_runs(name, total, more):
    for step in range(int(0.4 * total)):
        assert SCHEDULES[name](step, total) == SCHEDULES[name](step, total + more)


def test_wsd_gives_way_to_a_long_warmup():
    """Warm-up 8 of 10 leaves 2 of the 6 steps of decay."""
    values = [schedules.wsd(t, 10, 8) for t in (7, 8, 9, 10)]
    assert values == pytest.approx([7 / 8, 1.0, 0.5, 0.0])


@settings(max_examples=50, deadline=None)
@given(names, runs, st.integers(0, 900), st.sampled_from([2, 8, 131_072]))
def test_schedules_may_be_counted_in_tokens(name, run, step, tokens):
    total, warmup = run
    a = SCHEDULES[name](step, total, warmup)
    b = SCHEDULES[name](step * tokens, total * tokens, warmup * tokens)
    assert a == pytest.approx(b, abs=1e-7)  # sqrt near p = 0 magnifies rounding


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    "arguments, word",
    [
        ((-1, 10, 2), "step=-1 must be at least 0"),
        ((0, 0, 0), "total=0 must be above 0"),
        ((0, 10, 11), "warmup=11 must be from 0 to total=10"),
        ((0, 10, -1), "warmup=-1"),
    ],
)
def test_schedules_name_wrong_values(name, arguments, word):
    with pytest.raises(ValueError, match=word):
        SCHEDULES[name](*arguments)


@pytest.mark.parametrize(
    "name, options",
    [
        ("linear", {"floor": -0.1}),
        ("cosine", {"floor": 1.1}),
        ("wsd", {"floor": math.nan}),
        ("wsd", {"cooldown": 0.0}),
        ("wsd_sqrt", {"floor": 2.0}),
        ("wsd_sqrt", {"cooldown": 1.5}),
    ],
)
def test_schedules_name_wrong_options(name, options):
    ((option, value),) = options.items()
    with pytest.raises(ValueError, match=f"{option}={value}"):
        SCHEDULES[name](0, 10, **options)
