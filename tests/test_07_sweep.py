"""Tests of 07_sweep.py: against optuna, ray and torch, by closed form, by brute force, by killing.

Run: python -m pytest tests/test_07_sweep.py
The yardstick against optuna, 200 kills and the main run of five seeds, or only the parts that are
named, into results/sweep.json: python tests/test_07_sweep.py [PART ...]
"""

import ast
import importlib
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import types
import typing
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna import distributions as d
from optuna.samplers._tpe import parzen_estimator as theirs
from optuna.samplers._tpe.sampler import default_weights

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

sweep = importlib.import_module("07_sweep")
transfer = importlib.import_module("results.transfer")
Range, Choice, Space, Limits, Report = (
    sweep.Range, sweep.Choice, sweep.Space, sweep.Limits, sweep.Report
)  # fmt: skip
Random, Sobol, Grid, TPE = sweep.Random, sweep.Sobol, sweep.Grid, sweep.TPE
Full, Median, ASHA, Hyperband = sweep.Full, sweep.Median, sweep.ASHA, sweep.Hyperband
SweepError = sweep.SweepError
optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture(autouse=True, scope="module")
def no_git():
    """git is asked in the test of it; elsewhere it would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        real = sweep.surroundings
        patch.setattr(sweep, "surroundings", lambda: {"time": time.time()})
        yield real


LINE = {"x": Range(0.0, 1.0), "y": Range(1e-3, 1.0, log=True), "n": Range(1, 9)}


def bowl(config, budget, folder):
    """Lower near x = 0.3, y = 0.1, and with a longer budget."""
    return (config["x"] - 0.3) ** 2 + 0.1 * math.log10(config["y"] / 0.1) ** 2 + 1 / budget


def bowl_in_steps(config, budget, folder):
    for step in range(1, budget + 1):
        yield step, bowl(config, step, folder), 10 * step


def study(folder, objective=bowl, sampler=None, rule=None, space=LINE, seed=0):
    return sweep.Study(folder, space, objective, sampler or Random(), rule or Full(9), seed)


def run(folder, *args, workers=1, executor="local", **kwargs):
    limits = kwargs.pop("limits", Limits(trials=kwargs.pop("trials", 12)))
    return study(folder, *args, **kwargs).run(limits, workers, show=False, executor=executor)


def outcome(s):
    """What a study found, without times."""
    return [
        (t.index, t.params, t.seed, t.state, [(r.step, r.value, r.tokens) for r in t.reports])
        for t in s.trials
    ]


# space


def test_whole_numbers_and_fine_steps_are_exact():
    far = Range(1_700_000_000_000, 1_700_000_000_004)
    assert {far.at(u / 100) for u in range(100)} == set(range(far.low, far.high + 1))
    fine = Range(1000.0, 1000.0001, step=1e-6)
    assert {fine.at(u / 1000) for u in range(1000)} == {float(f"1000.{i:06d}") for i in range(101)}


@pytest.mark.parametrize("options", [(1, True), (0, 0.0), (math.nan, 1.0)])
def test_options_that_are_equal_or_not_even_that_are_refused(options):
    with pytest.raises(SweepError, match="option"):
        Choice(options)


@settings(max_examples=200, deadline=None)
@given(
    st.floats(-5, 5), st.floats(0.1, 10), st.integers(0, 50), st.integers(1, 50),
    st.floats(0, 1, exclude_max=True),
)  # fmt: skip
def test_range_stays_inside_and_on_its_grid(low, width, first, count, u):
    x = Range(low, low + width).at(u)
    assert isinstance(x, float) and low <= x <= low + width
    n = Range(first, first + count).at(u)
    assert isinstance(n, int) and first <= n <= first + count
    stepped = Range(first, first + 3 * count, step=3).at(u)
    assert isinstance(stepped, int) and (stepped - first) % 3 == 0
    assert first <= stepped <= first + 3 * count
    tenth = Range(0.0, 0.1 * count, step=0.1).at(u)
    assert tenth == round(tenth, 1) and 0 <= tenth <= round(0.1 * count, 1)
    assert 0.01 <= Range(0.01, 0.01 + width, log=True).at(u) <= 0.01 + width


def test_range_whole_numbers_are_equally_likely():
    """Each of 1..8 from an eighth of the unit interval: the ends are not cut in half."""
    found = [Range(1, 8).at((k + 0.5) / 800) for k in range(800)]
    assert [found.count(n) for n in range(1, 9)] == [100] * 8


def test_random_log_uniform_passes_kolmogorov_smirnov():
    space, n = Space({"lr": Range(1e-5, 1e-1, log=True)}), 2000
    values = sorted(Random().suggest(space, 7, i, [])["lr"] for i in range(n))
    share = (np.log10(values) + 5) / 4  # uniform on [0, 1] if the logarithm is
    steps = np.arange(n + 1) / n
    distance = max((steps[1:] - share).max(), (share - steps[:-1]).max())
    assert distance < 1.95 / math.sqrt(n)  # exceeded by chance once in 1000 times


TREE = {
    "model": {"width": Choice((64, 128)), "depth": Range(1, 4)},
    "optimizer": Choice(("adamw", "muon"), then={"muon": {"momentum": Range(0.8, 0.99)}}),
    "schedule": "constant",
}


@pytest.mark.parametrize("sampler", [Random(), Sobol(), Grid(3), TPE(), TPE(joint=False)])
def test_conditional_parameters_exist_only_with_their_choice(sampler, tmp_path):
    seen = []

    def objective(config, budget, folder):
        seen.append(config)
        return config["model"]["width"] / 64 + config.get("momentum", 0.5)

    run(tmp_path / "s", objective, sampler, space=TREE, trials=24)
    assert {c["optimizer"] for c in seen} == {"adamw", "muon"}
    for config in seen:
        assert ("momentum" in config) == (config["optimizer"] == "muon")
        assert set(config["model"]) == {"width", "depth"} and config["schedule"] == "constant"


BRANCHES = {
    "optimizer": Choice(("adamw", "muon"), then={
        "adamw": {"lr": Range(1e-4, 1e-2, log=True), "nesterov": False},
        "muon": {"lr": Range(0.01, 0.1), "steps": Choice((3, 5), then={3: {"beta": 0.5}})},
    }),
}  # fmt: skip


@pytest.mark.parametrize("sampler", [Random(), Sobol(), Grid(3), TPE(), TPE(joint=False)])
def test_branches_may_have_the_same_name_and_constants(sampler, tmp_path, monkeypatch):
    seen, real = [], sweep.Parzen

    def spy(params, points):
        for point in points:  # each leaf learns from its own branch only
            assert all(point["optimizer"] == option for p in params for _, option in p.when[:1])
        return real(params, points)

    def objective(config, budget, folder):
        seen.append({k: v for k, v in config.items() if k != "seed"})
        return config["lr"]

    monkeypatch.setattr(sweep, "Parzen", spy)
    s = run(tmp_path / "s", objective, sampler, space=BRANCHES, trials=24)
    assert {c["optimizer"] for c in seen} == {"adamw", "muon"}
    for c in seen:
        if c["optimizer"] == "adamw":
            assert 1e-4 <= c["lr"] <= 1e-2 and c["nesterov"] is False and len(c) == 3
        else:
            assert 0.01 <= c["lr"] <= 0.1 and ("beta" in c) == (c["steps"] == 3)
    labels = ["optimizer", "lr[adamw]", "lr[muon]", "steps[muon]"]
    shown = sweep.parallel(s).splitlines()
    assert [line.split()[0] for line in shown] == labels
    assert "1" in shown[1] and "1" not in shown[2][12:].split("|")[1]  # adamw's rates are lower
    assert set(sweep.importance(s)) in (set(labels), set())
    assert sweep.Space(sweep.rebuilt(s.identity()["space"])).params == s.space.params


def test_space_from_json_and_from_flags_equal_python():
    text = """{"model": {"width": {"choice": [64, 128]}, "depth": {"low": 1, "high": 4}},
        "optimizer": {"choice": ["adamw", "muon"],
                      "then": {"muon": {"momentum": {"low": 0.8, "high": 0.99}}}},
        "schedule": "constant"}"""
    assert sweep.space_from_json(json.loads(text)) == TREE
    for flag, kind in (
        ("lr=1e-4:1e-1:log", Range(1e-4, 1e-1, log=True)),
        ("warmup-steps=0:100:step=10", Range(0, 100, step=10)),
        ("optimizer=adamw,muon", Choice(("adamw", "muon"))),
        ("width=64,128", Choice((64, 128))),
        ("seed=3", 3),
        ("schedule=wsd", "wsd"),
    ):
        name = flag.split("=")[0].replace("-", "_")
        assert sweep.space_from_flag(flag) == {name: kind}


@pytest.mark.parametrize(
    "make, word",
    [
        (lambda: Range(2, 1), "low=2: wanted below high=1"),
        (lambda: Range(0.0, 1.0, log=True), "low=0.0: wanted above 0"),
        (lambda: Range(0, 10, step=4), "high=10: wanted low [+] a multiple of step"),
        (lambda: Range("a", "b"), "low='a': wanted a number"),
        (lambda: Range(0.0, math.inf), "finite"),
        (lambda: Choice(()), "at least one"),
        (lambda: Choice(("a", "a")), "each of them once"),
        (lambda: Choice(("a",), then={"b": {}}), "then='b'"),
        (lambda: Choice(((1, 2), (3, 4))), r"option=\(1, 2\): wanted a text"),
        (lambda: Space({}), "empty"),
        (lambda: Space({"schedule": "wsd"}), "empty"),
        (lambda: Space({"a": Choice((1, 2), then={1: {"b": Range(0, 1)}}), "b": 3}), "'b' twice"),
        (lambda: sweep.space_from_json({"x": {"low": 0, "hihg": 1}}), "x: .*hihg"),
        (lambda: sweep.space_from_json({"x": {"low": 3, "high": 1}}), "x: low=3"),
        (lambda: sweep.space_from_flag("lr"), "NAME=LOW:HIGH"),
        (lambda: sweep.space_from_flag("lr=0:1:log"), "lr: low=0"),
        (lambda: sweep.space_from_flag("lr=1:2:lin"), "log or step"),
        (lambda: ASHA(10, 20), "min_budget=20: wanted at most 10"),
        (lambda: ASHA(10, 0), "min_budget=0"),
        (lambda: ASHA(10, eta=1), "eta=1"),
        (lambda: ASHA(10, form="pause"), "form='pause'"),
        (lambda: Full(0), "budget=0: wanted at least 1"),
        (lambda: Median(9, every=0), "every=0"),
        (lambda: Hyperband(-5), "budget=-5"),
        (lambda: Hyperband(9, min_budget=10), "min_budget=10: wanted at most 9"),
        (lambda: Grid(0), "points=0"),
        (lambda: TPE(delay=0), "delay=0"),
        (lambda: Limits(trials=-3), "trials=-3: wanted above 0"),
        (lambda: Limits(tokens=math.nan), "tokens=nan"),
        (lambda: Space({"a": 1, "a.b": Range(0, 1)}), "'a.b' and 'a': one is a value"),
        (lambda: Space({3: Range(0, 1)}), "name=3"),
        (lambda: Space({"x": Range(0, 1), "class": "a"}), "class='a': wanted another name"),
        (lambda: sweep.space_from_json({"c": {"choice": ["a"], "then": 3}}), "c: then=3"),
        (lambda: sweep.space_from_json({"c": {"choice": ["a"], "then": {"a": 3}}}), "c: then=3"),
        (lambda: sweep.space_from_json({"c": {"choice": 3}}), "c: choice=3: wanted a list"),
        (lambda: sweep.space_from_json({"c": {"choice": [1, 2], "thn": {}}}), "c: choice=.'thn'.:"),
        (lambda: sweep.space_from_flag("lr=0.1:1:step=x"), "lr: step='x': wanted a number"),
    ],
)
def test_wrong_values_are_named(make, word):
    with pytest.raises(SweepError, match=word) as caught:
        make()
    assert "\n" not in str(caught.value)


# samplers


def test_grid_is_the_exact_product_with_the_last_points():
    space = Space({"a": Range(0.0, 1.0), "b": Range(0, 10, step=5), "c": Choice(("x", "y"))})
    points = [tuple(p.values()) for p in Grid(3).all(space)]
    assert points == list(itertools.product([0.0, 0.5, 1.0], [0, 5, 10], ["x", "y"]))
    logs = Range(1e-4, 1e-1, log=True).grid(4)
    assert logs == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1], rel=1e-12) and logs[-1] == 1e-1


def test_grid_study_tries_each_point_once_and_ends(tmp_path):
    space = {"x": Range(0.0, 1.0), "y": Choice((0.1, 1.0))}
    s = run(tmp_path / "s", sampler=Grid(3), space=space, trials=100)
    assert [tuple(t.params.values()) for t in s.trials] == list(
        itertools.product([0.0, 0.5, 1.0], [0.1, 1.0])
    )


def test_sobol_equals_torch():
    space = Space({"a": Range(0.0, 1.0), "b": Range(0.0, 1.0), "c": Range(0.0, 1.0)})
    ours = [list(Sobol().suggest(space, 5, i, []).values()) for i in range(32)]
    theirs = torch.quasirandom.SobolEngine(3, scramble=True, seed=5).draw(32, dtype=torch.float64)
    assert ours == theirs.tolist()


def test_parzen_known_log_density():
    """Derived by hand from the description and confirmed with optuna 5.0.0."""
    seen = [{"x": x} for x in (0.2, 0.5, 0.55)]
    kernels = sweep.Parzen(Space({"x": Range(0.0, 1.0)}).params, seen)
    found = kernels.log_density([{"x": x} for x in (0.1, 0.5, 0.9)])
    assert found == pytest.approx([-0.156983, 0.329291, -0.634037], abs=1e-6)


def test_parzen_equals_optuna():
    ours = {
        "f": Range(-1.0, 2.0), "log": Range(1e-5, 1e-1, log=True), "n": Range(1, 9),
        "q": Range(0.0, 1.0, step=0.25), "nlog": Range(1, 64, log=True), "c": Choice("abc"),
    }  # fmt: skip
    optunas = {
        "f": d.FloatDistribution(-1, 2), "log": d.FloatDistribution(1e-5, 1e-1, log=True),
        "n": d.IntDistribution(1, 9), "q": d.FloatDistribution(0, 1, step=0.25),
        "nlog": d.IntDistribution(1, 64, log=True), "c": d.CategoricalDistribution("abc"),
    }  # fmt: skip
    space = Space(ours)

    def arrays(points):
        return {k: np.array([optunas[k].to_internal_repr(p[k]) for p in points]) for k in ours}

    for seen in (0, 1, 2, 7, 25, 26, 60):
        points = [Random().suggest(space, 3, i, []) for i in range(seen)]
        queries = [Random().suggest(space, 4, i, []) for i in range(50)]
        settings = theirs._ParzenEstimatorParameters(1.0, True, False, default_weights, True)
        estimator = theirs._ParzenEstimator(arrays(points), optunas, settings)
        found = sweep.Parzen(space.params, points).log_density(queries)
        np.testing.assert_allclose(found, estimator.log_pdf(arrays(queries)), atol=1e-10, rtol=0)


def test_parzen_density_sums_to_one_and_is_what_sample_draws():
    space = Space({"n": Range(1, 6), "c": Choice(("a", "b"))})
    kernels = sweep.Parzen(space.params, [{"n": 2, "c": "a"}, {"n": 5, "c": "b"}])
    everything = [{"n": n, "c": c} for n in range(1, 7) for c in "ab"]
    p = np.exp(kernels.log_density(everything))
    assert p.sum() == pytest.approx(1, abs=1e-12)
    drawn = kernels.sample(np.random.default_rng(0), 20_000)
    counts = np.array([drawn.count(point) for point in everything])
    chi2 = ((counts - 20_000 * p) ** 2 / (20_000 * p)).sum()
    assert chi2 < 31.3  # 11 degrees of freedom, exceeded by chance once in 1000 times


def synthetic(chosen, budget, folder):
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


def search(sampler, seed, trials=60):
    """The best value of the synthetic objective that a sampler finds, without any store."""
    space, seen = Space(SYNTHETIC), []
    for index in range(trials):
        params = sampler.suggest(space, seed, index, seen)
        report = Report(1, synthetic(params, 10**9, Path()))
        seen.append(sweep.Trial(index, params, seed, "done", [report]))
    return min(t.value for t in seen)


def test_tpe_halves_the_best_of_random():
    best = {
        name: statistics.median(search(sampler, seed) for seed in range(7))
        for name, sampler in (("random", Random()), ("one", TPE(joint=False)), ("joint", TPE()))
    }
    assert best["joint"] < 0.5 * best["random"] and best["one"] < 0.7 * best["random"]


def trial(index, params, value, state="done", step=9):
    reports = [] if value is None else [Report(step, value)]
    return sweep.Trial(index, params, 0, state, reports)


def test_tpe_learns_from_finished_before_pruned_and_never_from_nan(monkeypatch):
    """Which trials are the good ones: the best tenth by value, then those that came farthest."""
    space = Space({"x": Range(0.0, 1.0)})
    trials = [trial(i, {"x": i / 40}, 1.0 + i) for i in range(8)]
    trials += [trial(8, {"x": 0.9}, math.nan), trial(9, {"x": 0.8}, -5.0, "pruned", 1)]
    trials += [trial(10, {"x": 0.7}, None, "failed"), trial(11, {"x": 0.6}, None, "running")]
    seen = []
    real = sweep.Parzen

    def spy(params, points):
        seen.append([p["x"] for p in points])
        return real(params, points)

    monkeypatch.setattr(sweep, "Parzen", spy)
    TPE(delay=2).suggest(space, 0, 12, trials)
    good, rest = seen
    assert good == [0.0]  # ceil(0.1 * 10)
    assert sorted(rest) == sorted([i / 40 for i in range(1, 8)] + [0.9, 0.8, 0.7, 0.6])
    seen.clear()
    TPE(delay=6).suggest(space, 0, 12, trials)  # 7 trials may be known: still at random
    assert seen == []


# stopping rules


def test_hyperband_known_table():
    plan = Hyperband(81, 3).plan()
    assert [n for n, _ in plan] == [81, 34, 15, 8, 5]
    assert [rungs for _, rungs in plan] == [
        [1, 3, 9, 27, 81], [3, 9, 27, 81], [9, 27, 81], [27, 81], [81]
    ]  # fmt: skip


@pytest.mark.parametrize("budget, least, eta", [
    (81, 1, 3), (81, 3, 3), (300, 30, 3), (80, 9, 3), (243, 1, 3), (1000, 1, 10), (7, 7, 2),
])  # fmt: skip
def test_hyperband_begins_at_its_least_budget(budget, least, eta):
    """S = floor(log_eta(budget/least)), by search; in floats log(243, 3) is below 5."""
    S = max(s for s in range(20) if budget >= least * eta**s)
    plan = Hyperband(budget, eta, min_budget=least).plan()
    assert len(plan) == S + 1 and plan[0][0] == eta**S and plan[-1] == (S + 1, [budget])
    assert least <= plan[0][1][0] < least * eta and sorted(plan[0][1]) == plan[0][1]
    assert Hyperband(budget, eta, 1, least).plan() == plan[:1]


def test_halving_and_hyperband_take_the_least_budget_of_the_command_line(tmp_path):
    for rule, brackets in (("halving", 1), ("hyperband", 3)):
        flags = ["--rule", rule, "--tune", "learning_rate=1e-3:1e-2", "--out", str(tmp_path / "s")]
        made = sweep.make_study(sweep.read_flags(flags)).rule  # warmup: 30 steps
        assert len(made.plan()) == brackets and made.budgets(0) == [33, 100, 300]


def test_hyperband_runs_the_known_numbers_of_trials(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)
    s = run(tmp_path / "s", rule=Hyperband(81, 3), trials=81 + 34 + 15 + 8 + 5)
    starts = np.cumsum([0, 81, 34, 15, 8, 5])
    wanted = [[81, 27, 9, 3, 1], [34, 11, 3, 1], [15, 5, 1], [8, 2], [5]]
    for first, end, (_, rungs), counts in zip(starts, starts[1:], Hyperband(81).plan(), wanted):
        assert [sum(first <= i < end for i in s.rungs[b]) for b in rungs] == counts
        kept = [i for i in s.rungs[rungs[0]] if first <= i < end]
        for low, high in itertools.pairwise(rungs):  # each time the best third
            n = len(kept)
            kept = sorted(kept, key=lambda i: s.rungs[low][i])[: n // 3]
            assert set(kept) == {i for i in s.rungs[high] if first <= i < end}


def test_halving_goes_on_when_a_trial_fails(tmp_path):
    def fails(config, budget, folder):
        if folder.name == "trial-00002":
            raise ValueError("on purpose")
        return bowl(config, budget, folder)

    s = run(tmp_path / "s", fails, rule=Hyperband(9, 3, brackets=1), trials=9)
    assert s.states[2] == "failed" and len(s.rungs[9]) == 1 and len(s.rungs[3]) == 3


@pytest.mark.parametrize("eta", [2, 3, 4])
def test_asha_stop_decides_as_optuna(eta):
    values = np.random.default_rng(eta).normal(size=(120, 28)).round(1)  # with ties
    values[7, 1] = math.nan
    pruner = optuna.pruners.SuccessiveHalvingPruner(1, eta)
    theirs = optuna.create_study(pruner=pruner)
    reached = []
    for row in values:
        asked = theirs.ask()
        for step in range(1, 28):
            asked.report(row[step], step)
            if asked.should_prune():
                theirs.tell(asked, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            theirs.tell(asked, 0.0)
        reached.append(step)

    # optuna judges at every power of eta, and has no last rung of its own
    rule, rungs, ours = ASHA(eta**9, 1, eta, "stop"), {}, []
    for index, row in enumerate(values):
        for step in range(1, 28):
            rungs.setdefault(step, {})[index] = row[step]
            if rule.judge(rungs, {}, index, step) != "running":
                break
        ours.append(step)
    assert ours == reached and {1, eta, eta**2} <= set(reached)


def ray_bracket():
    """Ray's own class, from its file: importing ray.tune would ask for pandas and pyarrow."""
    place = Path(importlib.util.find_spec("ray").origin).parent
    tree = ast.parse((place / "tune/schedulers/async_hyperband.py").read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", "") == "_Bracket"]
    words = types.SimpleNamespace(CONTINUE="CONTINUE", STOP="STOP")
    names = {"np": np, "TrialScheduler": words, "Trial": object, **vars(typing)}
    exec(compile(tree, "async_hyperband.py", "exec"), names)
    return names["_Bracket"]


@pytest.mark.parametrize("eta", [2, 3, 4])
def test_asha_percentile_decides_as_ray(eta):
    bracket = ray_bracket()(1, 10**6, eta, 0)

    class Named:
        def __init__(self, index):
            self.trial_id = index

    rule, rungs = ASHA(10**9, 1, eta, "percentile"), {}
    values = np.random.default_rng(eta).normal(size=(300, 5))
    survivors = 0
    for index, row in enumerate(values):
        for k in range(5):
            step = eta**k
            theirs = bracket.on_result(Named(index), step, -row[k])
            rungs.setdefault(step, {})[index] = row[k]
            ours = rule.judge(rungs, {}, index, step)
            assert (ours == "running") == (theirs == "CONTINUE")
            if ours != "running":
                break
        else:
            survivors += 1
    assert 0 < survivors < 100


def test_asha_promote_follows_the_paper_line_by_line(tmp_path, monkeypatch):
    """Every promotion is of the top floor(n/eta) of its rung at that moment, the highest rung that
    has one; a new trial begins only when there is none."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    s = run(tmp_path / "s", bowl_in_steps, rule=ASHA(27, 1, 3), trials=40)
    values, state, promotions = {1: {}, 3: {}, 9: {}, 27: {}}, {}, 0

    def candidates():
        for low in (9, 3, 1):
            there = values[low]
            top = sorted(there, key=there.get)[: len(there) // 3]
            found = [i for i in top if state[i] == ("paused", low)]
            if found:
                return found
        return []

    for entry in s.store.read()[2:]:
        i = entry["trial"]
        if "params" in entry:
            assert not candidates()
            state[i] = ("new", 0)
        elif "step" in entry and entry["state"] in ("paused", "done"):
            values[entry["step"]][i] = entry["value"]
            state[i] = (entry["state"], entry["step"])
        elif "step" not in entry and state[i][0] == "paused":
            assert i in candidates()
            state[i] = ("running", 0)
            promotions += 1
    assert not candidates() and promotions > 13 and {x for x, _ in state.values()} == {
        "paused", "done"
    }  # fmt: skip


def test_asha_forms_pass_the_known_fractions():
    """Scores without any order: how many pass after N arrivals, as measured on the real systems."""
    rng = np.random.default_rng(0)
    for form, wanted in (("percentile", (0.57, 0.37)), ("stop", (0.52, 0.29))):
        for N, rows, share in zip((4, 16), (2000, 500), wanted):
            passed = [
                sum(sweep.passes(form, row[i], list(row[:i]), 4) for i in range(N)) / N
                for row in rng.normal(size=(rows, N))
            ]
            assert np.mean(passed) == pytest.approx(share, abs=0.015)


def test_median_decides_as_optuna():
    values = np.random.default_rng(1).normal(size=(80, 11)) + np.linspace(2, 0, 11)
    theirs = optuna.create_study(pruner=optuna.pruners.MedianPruner(5, 2))
    rule, rungs, states = Median(10, startup=5, warmup=2), {}, {}
    finished = 0
    for index, row in enumerate(values):
        asked = theirs.ask()
        states[index] = "running"
        for step in range(1, 11):
            asked.report(row[step], step)
            rungs.setdefault(step, {})[index] = row[step]
            state = rule.judge(rungs, states, index, step)
            if step < 10:
                assert (state == "pruned") == asked.should_prune()
            if state != "running":
                break
        states[index] = state
        finished += state == "done"
        if state == "done":
            theirs.tell(asked, row[10])
        else:
            theirs.tell(asked, state=optuna.trial.TrialState.PRUNED)
    assert 5 < finished < 75


def reports_at(*steps):
    """An objective with an interval of its own, better with each step and the lower x is."""

    def objective(config, budget, folder):
        for step in steps:
            yield step, config["x"] + 1 / step, step

    return objective


def test_a_rung_is_judged_by_the_first_report_at_or_past_it(tmp_path):
    s = run(tmp_path / "full", reports_at(1, 5, 20, 50), rule=Full(9), trials=3)
    assert set(s.states.values()) == {"done"}
    for t in s.trials:
        assert t.last.step == 20 and t.value == t.params["x"] + 1 / 20

    every_50 = reports_at(*range(50, 301, 50))
    s = run(tmp_path / "asha", every_50, rule=ASHA(270, 30, 3), trials=12)
    arrived = {rung: len(there) for rung, there in s.rungs.items()}
    assert arrived == {30: 12, 90: 4, 150: 1, 200: 1, 250: 1, 270: 1}
    x = sorted(t.params["x"] for t in s.trials)
    assert s.best.state == "done" and s.best.params["x"] == x[0] and s.best.reached == 300
    assert sorted(t.reached for t in s.trials) == [50] * 8 + [100] * 3 + [300]
    assert outcome(study(tmp_path / "asha", every_50, rule=ASHA(270, 30, 3))) == outcome(s)
    assert study(tmp_path / "asha", every_50, rule=ASHA(270, 30, 3)).rungs == s.rungs

    s = run(tmp_path / "stop", every_50, rule=ASHA(270, 30, 3, "stop"), trials=12)
    assert {t.reached for t in s.trials if t.state == "pruned"} >= {50}
    s = run(tmp_path / "far", reports_at(100, 300), rule=ASHA(270, 30, 3), trials=12)
    assert len(s.rungs[30]) == len(s.rungs[90]) == 12  # one report that passes both
    assert s.states[s.best.index] == "done" and len(s.rungs[270]) == 4


# the store


def test_store_keeps_nan_and_infinity(tmp_path):
    values = [math.nan, math.inf, -math.inf, 1.0]

    def objective(config, budget, folder):
        return values[int(folder.name.split("-")[1])]

    run(tmp_path / "s", objective, trials=4)
    again = study(tmp_path / "s", objective)
    assert [repr(t.value) for t in again.trials] == ["nan", "inf", "-inf", "1.0"]
    assert again.ranked[-1].index in (0, 1) and again.best.index == 2


def test_store_survives_a_cut_at_every_byte(tmp_path, monkeypatch):
    """The last trials' lines, cut anywhere, and the study gone on with: the same study."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    rule = ASHA(9, 1, 3)
    whole = run(tmp_path / "whole", bowl_in_steps, rule=rule, trials=5)
    data = (tmp_path / "whole" / "study.jsonl").read_bytes()
    first = data.rfind(b'"params"', 0, data.rfind(b'"params"'))  # two last new trials
    ends = {len(data)} | set(range(first - 20, len(data)))
    for n, end in enumerate(sorted(ends)):
        folder = tmp_path / f"cut-{n}"
        folder.mkdir()
        (folder / "study.jsonl").write_bytes(data[:end])
        again = run(folder, bowl_in_steps, rule=rule, trials=5)
        assert outcome(again) == outcome(whole), f"cut at byte {end} of {len(data)}"
        assert outcome(study(folder, bowl_in_steps, rule=rule)) == outcome(whole)
        shutil.rmtree(folder)


def test_store_cut_in_its_first_line_begins_again(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "study.jsonl").write_text('{"study": {"spa')
    assert len(run(tmp_path / "s", trials=3).trials) == 3


def test_store_damaged_in_the_middle_is_refused(tmp_path):
    run(tmp_path / "s", trials=3)
    file = tmp_path / "s" / "study.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    lines[3] = lines[3][:10] + "\n"
    file.write_text("".join(lines))
    with pytest.raises(SweepError, match="study.jsonl, line 4 is damaged"):
        study(tmp_path / "s")


def test_store_refuses_another_study(tmp_path):
    run(tmp_path / "s", trials=2)
    for other, word in (
        ({"seed": 1}, "seed is 0, not 1"),
        ({"rule": Full(10)}, "rule.budget is 9, not 10;"),
        ({"sampler": Sobol()}, "sampler.class is 'Random', not 'Sobol';"),
        ({"space": {**LINE, "n": Range(1, 8)}}, "space.n.high is 9, not 8;"),
        ({"objective": bowl_in_steps}, "objective is 'bowl', not 'bowl_in_steps';"),
    ):
        with pytest.raises(SweepError, match=f"holds another study: its {word}"):
            study(tmp_path / "s", **other)


@pytest.mark.parametrize(
    "line, word",
    [
        ('{"trial": 0}', "'state'"),
        ('{"trial": "a", "state": "done"}', "trial='a': wanted one of the 2"),
        ('{"trial": -1, "state": "done", "time": 0}', "trial=-1: wanted one of the 2"),
        ('{"trial": 2, "state": "done", "time": 0}', "trial=2: wanted one of the 2"),
        ('{"trial": 0, "state": "odd", "time": 0}', "state='odd': wanted one of"),
        ('{"trial": 2, "params": 3, "seed": 0}', "params=3: wanted"),
        ('{"trial": 0, "state": "done", "step": 30, "time": 0}', "'value'"),
        ("[]", "not an object"),
    ],
)
def test_store_lines_that_follow_from_nothing_are_refused(line, word, tmp_path):
    s = run(tmp_path / "s", trials=2)
    number = len(s.store.read()) + 1
    with open(s.store.file, "a") as file:
        file.write(line + "\n")
    with pytest.raises(SweepError, match=f"study.jsonl, line {number} is damaged .*{word}"):
        study(tmp_path / "s")


def test_store_parameters_are_written_once(tmp_path):
    run(tmp_path / "s", trials=2)
    with open(tmp_path / "s" / "study.jsonl", "a") as file:
        file.write('{"trial": 0, "params": {"x": 0.5}, "seed": 1}\n')
    with pytest.raises(SweepError, match="written once"):
        study(tmp_path / "s")


def test_store_one_writer_at_a_time(tmp_path):
    def objective(config, budget, folder):
        with pytest.raises(SweepError, match="another process is running"):
            study(tmp_path / "s", objective).run(Limits(trials=1), show=False)
        return 1.0

    assert run(tmp_path / "s", objective, trials=1).states == {0: "done"}


def test_store_says_where_and_with_what(tmp_path, no_git, monkeypatch):
    monkeypatch.setattr(sweep, "surroundings", no_git)
    run(tmp_path / "s", bowl_in_steps, trials=1)
    entries = [json.loads(x) for x in (tmp_path / "s" / "study.jsonl").read_text().splitlines()]
    session = entries[1]["session"]
    assert session["torch"] == torch.__version__ and session["command"] and session["python"]
    assert session["commit"] is None or len(session["commit"]) == 40
    assert session["dirty"] in (None, True, False)
    last = entries[-1]
    assert last["tokens"] == 90 and last["seconds"] >= 0 and last["state"] == "done"
    assert isinstance(entries[2]["seed"], int)


def slow_bowl(config, budget, folder):
    """Writes down each of its steps, and takes up from there."""
    notes = folder / "steps"
    begun = len(notes.read_text()) if notes.exists() else 0
    for step in range(begun + 1, budget + 1):
        time.sleep(0.002)
        with open(notes, "a") as file:
            file.write("x")
        yield step, bowl(config, step, folder), step
    if begun >= budget:  # was killed between its note and the study's
        yield budget, bowl(config, budget, folder), budget


def killed_study(folder, rule, kills, seed):
    """A study that is killed so many times at random moments, then ends; how often it lived on."""
    draw, context = random.Random(seed), multiprocessing.get_context("fork")
    done = 0
    arguments = {"objective": slow_bowl, "rule": rule, "trials": 12}
    while done < kills:
        process = context.Process(target=run, args=(folder,), kwargs=arguments)
        process.start()
        process.join(draw.uniform(0.01, 0.12))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            done += 1
        elif done < kills:
            assert process.exitcode == 0
            shutil.rmtree(folder)  # it was through: once more from the beginning
        process.join()
    return run(folder, **arguments)


def assert_like_unkilled(folder, rule, kills, seed):
    whole = run(folder / "whole", slow_bowl, rule=rule, trials=12)
    s = killed_study(folder / "killed", rule, kills, seed)

    def finals(study):
        return [(t.params, t.seed, t.state, t.last.step, t.last.value) for t in study.trials]

    assert finals(s) == finals(whole)
    lines = [json.loads(x) for x in s.store.file.read_text().splitlines()]
    once = [(e["trial"], e["step"]) for e in lines if "step" in e]
    assert len(once) == len(set(once))  # no result twice
    assert [e["trial"] for e in lines if "params" in e] == list(range(12))


@pytest.mark.parametrize("rule", [Full(9), ASHA(9, 1, 3), Hyperband(9, 3)])
def test_study_survives_sigkill(rule, tmp_path):
    assert_like_unkilled(tmp_path, rule, kills=8, seed=0)


# execution


def test_random_points_do_not_depend_on_the_number_of_workers(tmp_path):
    results = [
        outcome(run(tmp_path / str(n), bowl_in_steps, rule=Full(2), workers=n)) for n in (1, 2, 8)
    ]
    assert results[0] == results[1] == results[2]


def uneven(config, budget, folder):
    time.sleep(0.05 * (int(folder.name[-1]) % 3))
    return bowl(config, budget, folder)


def test_tpe_points_do_not_depend_on_the_number_of_workers_up_to_its_delay(tmp_path):
    results = [
        outcome(run(tmp_path / str(n), uneven, TPE(delay=3), Full(1), workers=n, trials=18))
        for n in (1, 3)
    ]
    assert results[0] == results[1]
    with pytest.raises(SweepError, match="workers=4: wanted at most TPE's delay=3"):
        run(tmp_path / "4", uneven, TPE(delay=3), Full(1), workers=4)


def troubled(config, budget, folder):
    index = int(folder.name.split("-")[1])
    print(f"trial {index} with x = {config['x']}")
    if index == 1:
        raise ValueError("on\npurpose")
    if index == 2 and (multiprocessing.parent_process() or "RAY_RAYLET_PID" in os.environ):
        os._exit(7)
    if index == 3:
        return iter([(1, 0.5)])  # never reaches its budget
    return bowl(config, budget, folder)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_crashing_trial_is_recorded_and_the_study_goes_on(workers, tmp_path):
    s = run(tmp_path / "s", troubled, workers=workers, trials=6)
    wanted = ["done", "failed", "failed" if workers == 2 else "done", "failed", "done", "done"]
    assert list(s.states.values()) == wanted
    again = study(tmp_path / "s", troubled)
    assert again.trials[1].message == "ValueError: on purpose"
    assert again.trials[3].message == "no report at its budget or past it, the last at 1"
    assert "trial 1 failed: ValueError: on purpose" in sweep.table(again)
    assert "in troubled" in (tmp_path / "s" / "trial-00001" / "error.txt").read_text()
    assert (tmp_path / "s" / "trial-00004" / "log.txt").read_text().startswith("trial 4 with x = ")
    if workers == 2:
        assert again.trials[2].message == "WorkerDied: exit code 7"


def leaves(config, budget, folder):
    sys.exit("enough" if config["x"] < 0.5 else 3)


@pytest.mark.parametrize("workers", [1, 2])
def test_sys_exit_in_an_objective_is_a_failed_trial(workers, tmp_path):
    s = run(tmp_path / "s", leaves, workers=workers, trials=6)
    assert set(s.states.values()) == {"failed"}
    for t in s.trials:
        assert t.message == f"SystemExit: {'enough' if t.params['x'] < 0.5 else 3}"


def killer(config, budget, folder):
    """Trial 1 lasts till 2 has ended, and then kills its worker; 3 dies after its report."""
    index, pid = int(folder.name[-1]), folder.parent / "pid"
    if index == 1:
        while not pid.exists():
            time.sleep(0.01)
        time.sleep(0.3)
        os.kill(int(pid.read_text()), signal.SIGKILL)
        time.sleep(0.3)
    yield 1, bowl(config, 1, folder)
    if index == 2:
        (folder / "pid").write_text(str(os.getpid()))
        (folder / "pid").rename(pid)
    if index == 3:
        os._exit(3)
    yield 2, bowl(config, 2, folder)


def idle_death(folder, **kwargs):
    """Trials 3 and 4 wait for trial 1, and one of them gets the worker that is dead."""
    s = study(folder, killer, TPE(startup=1, delay=2), Full(2))
    s = s.run(Limits(trials=5), 2, show=False, **kwargs)
    assert [state for i, state in s.states.items() if i != 3] == ["done"] * 4
    assert s.states[3] == "failed" and s.trials[3].message.startswith("WorkerDied: ")


def test_a_worker_that_dies_while_it_is_idle_costs_no_trial(tmp_path):
    idle_death(tmp_path / "s")


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster of two CPUs that is there already, as RAY_ADDRESS would name it."""
    import ray
    from ray.cluster_utils import Cluster

    # or its workers would import this file, with all that it compares with
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    head = {"num_cpus": 2, "object_store_memory": 10**8, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=head)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", made.address)
        yield
    made.shutdown()


def test_ray_does_what_workers_here_do(tmp_path, cluster):
    """A crash, a death, a report that is missing, and what is well."""
    here, there = (
        run(tmp_path / executor, troubled, workers=2, trials=8, executor=executor)
        for executor in ("local", "ray")
    )
    assert outcome(there) == outcome(here)
    died = there.trials[2]
    assert died.state == "failed" and died.message.startswith("WorkerDied: ")
    assert [t.message for t in there.trials if t is not died] == [
        t.message for t in here.trials if t.index != 2
    ]
    assert (tmp_path / "ray" / "trial-00004" / "log.txt").read_text().startswith("trial 4 with")


def test_ray_worker_that_dies_while_it_is_idle_costs_no_trial(tmp_path, cluster):
    idle_death(tmp_path / "s", executor="ray")


def test_more_ray_workers_than_the_cluster_has_cpus_are_refused(tmp_path, cluster):
    """They would wait for ever."""
    with pytest.raises(SweepError, match="workers=64: wanted at most the [0-9]+ CPUs of the"):
        run(tmp_path / "s", workers=64, executor="ray")
    with pytest.raises(SweepError, match="executor='?rey'?: wanted local or ray"):
        run(tmp_path / "s", executor="rey")


def test_an_objective_that_no_process_can_import_is_refused(tmp_path):
    with pytest.raises(SweepError, match="objective: .*top level of a file"):
        run(tmp_path / "s", lambda config, budget, folder: 0.0, workers=2)
    assert not (tmp_path / "s" / "study.jsonl").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_commands_and_workers_die_with_a_killed_study(workers, tmp_path):
    """kill -9 of the study: its workers, their commands, and what these have started."""
    words = "sh -c 'sleep 200 & echo $PPID $$ $! {x} > {folder}/pids; wait'"
    out = tmp_path / "s"
    flags = ["--command", words, "--tune", "x=0.0:1.0", "--workers", str(workers),
             "--delay", "2", "--out", str(out)]  # fmt: skip
    process = subprocess.Popen([sys.executable, sweep.__file__, *flags])
    lines, deadline = [], time.time() + 100
    while len(lines) < workers and time.time() < deadline:
        time.sleep(0.1)
        found = [f.read_text() for f in out.glob("trial-*/pids")]
        lines = [text for text in found if text.endswith("\n")]
    process.kill()
    process.wait()
    pids = {int(pid) for line in lines for pid in line.split()[:3]}
    alive = set(pids)
    while alive and time.time() < deadline:
        time.sleep(0.1)
        alive = {pid for pid in alive if Path(f"/proc/{pid}").exists()}
    assert len(pids) == 3 * workers and not alive


def test_median_stops_a_run_in_its_middle(tmp_path):
    s = run(tmp_path / "s", bowl_in_steps, rule=Median(9, startup=3), trials=20)
    pruned = [t for t in s.trials if t.state == "pruned"]
    assert pruned and all(t.last.step < 9 for t in pruned)


def test_median_in_pieces_stops_an_objective_that_reports_at_the_end_only(tmp_path):
    s = run(tmp_path / "s", rule=Median(9, startup=3, every=2), trials=20)
    pruned = [t for t in s.trials if t.state == "pruned"]
    assert pruned and all(t.last.step in (2, 4, 6, 8) for t in pruned)
    assert [r.step for r in s.best.reports] == [2, 4, 6, 8, 9]


def test_trial_seeds_differ_and_reach_the_objective(tmp_path):
    seen = []

    def objective(config, budget, folder):
        seen.append(config["seed"])
        return 0.0

    s = run(tmp_path / "s", objective)
    assert seen == [t.seed for t in s.trials] and len(set(seen)) == 12
    fixed = run(tmp_path / "f", objective, space={**LINE, "seed": 5}, trials=2)
    assert seen[-2:] == [5, 5] and fixed.trials[0].seed != 5


# means over runs


def noisy(config, budget, folder):
    return {0: 1.0, 1: 2.0, 2: 6.0}[config["seed"]] + config["x"] * 0


def test_repeated_gives_mean_and_standard_error(tmp_path):
    s = run(tmp_path / "s", sweep.Repeated(noisy, "seed", (0, 1, 2)), trials=1)
    report = s.trials[0].last
    assert report.value == 3.0
    assert report.error == pytest.approx(math.sqrt(7 / 3))  # sd^2 = (4 + 1 + 9) / 2, over 3
    again = study(tmp_path / "s", sweep.Repeated(noisy, "seed", (0, 1, 2)))
    assert again.trials[0].last == report and "1.5275" in sweep.table(again)


# budgets


def costly(config, budget, folder):
    return [Report(step, config["x"], 1000 * step) for step in (budget,)]


@pytest.mark.parametrize("rule, rung", [(Full(9), 9000), (ASHA(9, 1, 3), 6000)])
@pytest.mark.parametrize("limit", [1, 9000, 25_000, 50_001])
def test_tokens_overrun_by_less_than_one_rung(rule, rung, limit, tmp_path):
    s = run(tmp_path / "s", costly, rule=rule, limits=Limits(tokens=limit))
    spent = sum(t.tokens for t in s.trials)
    assert limit <= spent < limit + rung
    more = study(tmp_path / "s", costly, rule=rule).run(Limits(tokens=limit + 1), show=False)
    assert sum(t.tokens for t in more.trials) < limit + 1 + rung


def test_tokens_overrun_by_less_than_one_rung_with_workers(tmp_path):
    s = run(tmp_path / "s", costly, rule=Full(9), limits=Limits(tokens=25_000), workers=4)
    assert 25_000 <= sum(t.tokens for t in s.trials) < 34_000


def test_dollars_and_seconds_end_a_study(tmp_path):
    def objective(config, budget, folder):
        time.sleep(0.02)
        return 0.0

    s = run(tmp_path / "d", objective, limits=Limits(dollars=0.1, price=3600.0))  # 1 a second
    cost = sum(t.seconds for t in s.trials)
    assert 0.1 <= cost < 0.1 + max(t.seconds for t in s.trials)
    began = time.time()
    s = run(tmp_path / "s", objective, limits=Limits(seconds=0.3))
    assert 0.3 <= time.time() - began < 1 and len(s.trials) > 2
    before = len(s.trials)
    again = study(tmp_path / "s", objective).run(Limits(seconds=0.3), show=False)
    assert len(again.trials) <= before + 2  # what was spent before counts


def test_a_limit_in_tokens_needs_tokens(tmp_path):
    def none(config, budget, folder):
        return 1.0 if folder.name < "trial-00009" else pytest.fail("goes on for ever")

    limits = Limits(tokens=100)
    with pytest.raises(SweepError, match="limit in tokens: the objective reports none; .*seconds"):
        run(tmp_path / "s", none, rule=ASHA(9, 1, 3), limits=limits)
    s = study(tmp_path / "s", none, rule=ASHA(9, 1, 3))
    assert s.states == {0: "paused"}  # and the study goes on by trials
    assert len(s.run(Limits(trials=5), show=False).trials) == 5

    def late(config, budget, folder):  # tokens are there at the end only: all is well
        return [Report(1, 0.5), Report(9, 0.5, 60)]

    assert len(run(tmp_path / "late", late, limits=limits).trials) == 2


@pytest.mark.parametrize("limits", [Limits(tokens=1e9), Limits(dollars=1e9, price=1.0)])
def test_a_study_without_a_number_of_trials_ends_where_all_fail(limits, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)
    fine = {19, 30, 60}  # trials that do not fail

    def broken(config, budget, folder):
        index = int(folder.name.split("-")[1])
        yield 1, 0.5  # a report on the way is no success
        if index > 99:
            pytest.fail("goes on for ever")
        if index not in fine:
            raise ValueError(f"in {index}")
        yield Report(9, 0.5, 1)

    for end in (50, 80):  # a new session counts anew
        with pytest.raises(SweepError, match=f"20 trials in a row failed, the last: .* in {end}"):
            run(tmp_path / "s", broken, limits=limits)
    s = run(tmp_path / "s", broken, trials=99)
    assert len(s.trials) == 99 and sum(x == "failed" for x in s.states.values()) == 96


def test_failures_do_not_end_a_grid(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)

    def broken(config, budget, folder):
        raise ValueError

    assert len(run(tmp_path / "s", broken, Grid(3), limits=Limits(tokens=9)).trials) == 27


# reports


def first(config, budget, folder):
    return config["x"]


def test_importance_finds_what_matters(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)

    def objective(config, budget, folder):
        return 3 * config["x"] + (config["c"] == "b")

    space = {"x": Range(0.0, 1.0), "c": Choice(("a", "b")), "no": Range(0.0, 1.0)}
    s = run(tmp_path / "s", objective, space=space, trials=600)
    shares = sweep.importance(s)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["no"] < 0.02
    # variances: 9/12 of x, 1/4 of the choice
    assert shares["x"] == pytest.approx(0.75, abs=0.06)
    assert shares["c"] == pytest.approx(0.25, abs=0.06)


def test_importance_takes_off_what_chance_explains(tmp_path, monkeypatch):
    """64 trials in 8 groups: chance alone explains 7/63 of the variance."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    space, shares = {"x": Range(0.0, 1.0), "no": Range(0.0, 1.0)}, []
    for seed in range(20):
        folder = tmp_path / str(seed)
        s = run(folder, lambda c, budget, folder: c["x"], space=space, trials=64, seed=seed)
        shares.append(sweep.importance(s)["no"])
    assert np.mean(shares) < 0.05


def test_importance_is_not_judged_by_a_few_trials_or_by_options_tried_once(tmp_path):
    space = {"x": Range(0.0, 1.0), "c": Choice(tuple(range(17)))}
    assert sweep.importance(run(tmp_path / "few", space=space, objective=first, trials=15)) == {}
    s = run(tmp_path / "s", first, Grid(1), space={"c": space["c"], "x": space["x"]}, trials=17)
    assert sweep.importance(s)["c"] == 0.0


def test_importance_of_equal_values_does_not_hang_on_their_order(tmp_path):
    """Only y matters here, and half of the values are equal."""
    space = {"x": Range(0.0, 1.0), "y": Range(0.0, 1.0)}
    flat = run(tmp_path / "flat", lambda *job: 1.0, Grid(5), space=space, trials=25)
    assert sweep.importance(flat) == {"x": 0.0, "y": 0.0}
    s = run(tmp_path / "s", lambda c, *job: float(c["y"] > 0.5), Grid(5), space=space, trials=25)
    assert sweep.importance(s) == {"x": 0.0, "y": 1.0}
    given = np.array([3.0, 1.0, 3.0, math.inf])
    assert sweep.mean_ranks(given).tolist() == [1.5, 0.0, 1.5, 3.0]


def test_a_trial_that_ends_in_nan_is_never_the_best(tmp_path):
    def objective(config, budget, folder):
        return math.nan if budget == 9 else config["x"]

    s = run(tmp_path / "s", objective, rule=ASHA(9, min_budget=1, eta=3), trials=9)
    assert any(t.state == "done" and math.isnan(t.value) for t in s.trials)
    assert not math.isnan(s.best.value) and math.isnan(s.ranked[-1].value)


def test_failed_trials_cost_what_they_took(tmp_path):
    def objective(config, budget, folder):
        time.sleep(0.05)
        raise RuntimeError("no value")

    s = run(tmp_path / "s", objective, limits=Limits(trials=3))
    assert all(0.05 <= t.seconds < 5 for t in s.trials)
    again = study(tmp_path / "s", objective)
    assert [t.seconds for t in again.trials] == [t.seconds for t in s.trials]


def test_a_tensor_of_one_number_is_a_value(tmp_path):
    s = run(tmp_path / "s", lambda c, *job: torch.tensor(c["x"], dtype=torch.float64), trials=3)
    assert [t.value for t in s.trials] == [t.params["x"] for t in s.trials]


def test_limits_hold_until_they_are_raised(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep.Command, "__call__", lambda self, chosen, budget, folder: 1.0)
    flags = ["--command", "run {x}", "--tune", "x=1:9", "--out", str(tmp_path / "s")]
    assert sweep.main([*flags, "--trials", "2", "--dollars", "5", "--price", "3"]) == 0
    for more, wanted in (
        (["--trials", "3"], Limits(trials=3, dollars=5, price=3)),
        (["--dollars", "6"], Limits(trials=3, dollars=6, price=3)),
    ):
        assert sweep.main([*flags, "--resume", *more]) == 0
        s = sweep.make_study(sweep.read_flags([*flags, "--report"]))
        assert s.limits == wanted and len(s.trials) == 3


@pytest.mark.parametrize("flag", ["--max-steps", "--seed", "--out"])
def test_what_each_trial_is_given_may_not_stand_behind_the_dashes(flag, tmp_path, capsys):
    argv = ["--tune", "learning_rate=1e-4:1e-2", "--trials", "1", "--out", str(tmp_path / "s")]
    argv += ["--", flag, "7"]
    assert sweep.main(argv) == 2
    assert f"{flag} behind --: each trial is given its own" in capsys.readouterr().err


def test_reports_of_an_empty_study(tmp_path):
    s = study(tmp_path / "s")
    assert sweep.table(s).split()[:4] == ["trial", "state", "step", "value"]
    assert sweep.importance(s) == {} and s.best is None and s.progress().startswith("0/? trials")
    sweep.parallel(s)
    with pytest.raises(SweepError, match="a study in which a trial has reported"):
        sweep.plot(s, tmp_path)


def test_parallel_shows_the_best_where_they_lie(tmp_path):
    s = run(tmp_path / "s", trials=30)
    x, y, n = (line.split("|")[1] for line in sweep.parallel(s, width=50).splitlines())
    best = s.ranked[0].params
    assert x.index("1") == int(best["x"] * 50)
    assert y.index("1") == int((math.log10(best["y"]) + 3) / 3 * 50)
    assert n.index("1") == int((best["n"] - 0.5) / 9 * 50)


def test_plot_saves_pictures(tmp_path):
    s = run(tmp_path / "s", bowl_in_steps, rule=ASHA(9, 1, 3))
    files = sweep.plot(s, tmp_path / "pictures")
    assert [f.name for f in files] == ["curves.png", "parallel.png", "importance.png", "best.png"]
    for file in files:
        assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and file.stat().st_size > 3000


# trackers


def test_mlflow_gives_back_what_the_study_found(tmp_path, monkeypatch):
    import mlflow

    (tmp_path / "s").mkdir()
    monkeypatch.chdir(tmp_path / "s")
    rule = ASHA(3, 1, 3)
    sweep.to_mlflow(run(".", troubled, rule=rule, trials=5))
    s = run(tmp_path / "s", troubled, rule=rule, trials=9)
    sweep.to_mlflow(s)  # what is new, of old trials too
    assert {"done", "paused", "failed"} <= set(s.states.values())
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/s/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("s").experiment_id])
    assert sorted(int(r.data.tags["trial"]) for r in runs) == list(range(9))
    for r in runs:
        ours = s.trials[int(r.data.tags["trial"])]
        status = {"done": "FINISHED", "failed": "FAILED", "paused": "KILLED"}
        assert r.info.status == status[ours.state] and r.data.tags["state"] == ours.state
        params = {"seed": ours.seed, **ours.params}
        assert r.data.params == {name: str(value) for name, value in params.items()}
        history = client.get_metric_history(r.info.run_id, "value")
        assert [(m.step, m.value) for m in history] == [(x.step, x.value) for x in ours.reports]


def test_wandb_writes_offline_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "s").mkdir()
    monkeypatch.chdir(tmp_path / "s")
    s = run(".", troubled, rule=ASHA(9, 1, 3), trials=2)
    sweep.to_wandb(s)
    files = sorted((tmp_path / "s" / "wandb").glob("offline-run-*/*.wandb"))
    assert [f.name for f in files] == ["run-s-0-paused-1.wandb", "run-s-1-failed-0.wandb"]
    for file, ours in zip(files, s.trials):
        assert json.dumps(ours.params["x"]).encode() in file.read_bytes()


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_trackers_that_are_not_there_say_how_to_get_them(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    s = run(tmp_path / "s", trials=1)
    with pytest.raises(SweepError, match=f"--track {name} needs {name}: pip install {name}"):
        sweep.TRACKERS[name](s)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nowhere:x"])
def test_ray_address_where_nobody_answers_is_one_line_at_once(address, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    began = time.time()
    with pytest.raises(SweepError, match=f"RAY_ADDRESS={address}: .*Error"):
        run(tmp_path / "s", executor="ray", trials=1)
    assert time.time() - began < 10


def test_ray_that_is_not_there_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SweepError, match="--executor ray needs ray: pip install ray"):
        run(tmp_path / "s", executor="ray", trials=1)


# the command line


PROGRAM = """
import sys
x, budget = float(sys.argv[1]), int(sys.argv[2])
if x > 0.9:
    sys.exit("too large")
print("loss: 99")
print(f"loss: {(x - 0.3) ** 2 + 1 / budget}")
"""


def test_command_line_runs_any_program(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(PROGRAM)
    command = f"{sys.executable} {tmp_path}/mine.py {{x}} {{budget}}"
    flags = ["--command", command, "--key", "loss", "--tune", "x=0.0:1.0", "--sampler", "grid",
             "--points", "5", "--budget", "10", "--out", str(tmp_path / "s")]  # fmt: skip
    assert sweep.main(flags) == 0
    printed = capsys.readouterr().out
    assert "5/5 trials | best 0.1025 (trial 1) | done 4 failed 1" in printed
    assert "exit status 1: too large" in printed and "importance  too few" in printed
    assert sweep.main(flags) == 2
    assert "add --resume" in capsys.readouterr().err
    assert sweep.main([*flags, "--resume"]) == 0 and sweep.main([*flags, "--report"]) == 0
    capsys.readouterr()
    other = [flag.replace("x=0.0:1.0", "x=0.0:2.0") for flag in flags]
    assert sweep.main([*other, "--report", "--points", "6"]) == 2
    holds = f"{tmp_path}/s holds another study: its space.x.high is 1.0, not 2.0; "
    assert holds + "sampler.points is 5, not 6; choose" in capsys.readouterr().err


def test_report_and_resume_need_no_flags_but_the_folder(tmp_path, capsys):
    (tmp_path / "space.json").write_text(
        """{"model": {"width": {"choice": [64, true], "then": {"true": {"x": {"low": 1, "high": 9}},
        "64": {"x": {"low": 0.0, "high": 1.0}, "c": 5}}}}, "k": "v"}"""
    )
    command = "sh -c 'echo {fold}; echo loss: {model.width:.1f}; echo loss: {model.x}'"
    flags = ["--command", command, "--key", "loss", "--space", str(tmp_path / "space.json"),
             "--folds", "2", "--rule", "median", "--min-budget", "3", "--budget", "4", "--seed",
             "3", "--sampler", "tpe-independent", "--delay", "2"]  # fmt: skip
    flags[1] += " # {budget}"
    out = ["--out", str(tmp_path / "s")]
    assert sweep.main([*flags, *out, "--trials", "4"]) == 0
    assert f"trial 0 begins; its log is in {tmp_path}/s/trial-00000" in capsys.readouterr().out
    assert sweep.main([*out, "--report"]) == 0
    assert "4" in capsys.readouterr().out
    assert sweep.main([*out, "--resume", "--trials", "6"]) == 0
    first = json.loads((tmp_path / "s" / "study.jsonl").read_text().splitlines()[0])["study"]
    again = sweep.make_study(sweep.read_flags([*out, "--resume"]))
    whole = sweep.make_study(sweep.read_flags([*flags, "--out", str(tmp_path / "whole")]))
    assert again.identity() == first == whole.identity() and len(again.trials) == 6
    whole.run(Limits(trials=6), show=False)
    assert outcome(again) == outcome(whole)
    first = again.trials[0]
    assert first.last.error == 0.0 and first.params["model.x"] == first.value

    run(tmp_path / "python", trials=2)  # whose objective is a function: it can be shown
    out = ["--out", str(tmp_path / "python")]
    assert sweep.main([*out, "--report"]) == 0
    assert sweep.main([*out, "--resume"]) == 2
    assert "bowl is a function" in capsys.readouterr().err


def test_a_command_takes_all_that_there_is_as_args(tmp_path, capsys):
    """With conditions, a constant, a group and a value that a shell would take apart."""
    tree = {
        "optimizer": {"choice": ["a b", "sgd"], "then": {"a b": {"beta": {"choice": [0.5]}}}},
        "model": {"width": 64}, "lr": {"low": 1.0, "high": 2.0},
    }  # fmt: skip
    (tmp_path / "space.json").write_text(json.dumps(tree))
    (tmp_path / "mine.py").write_text("import sys; print(*sys.argv[1:], sep='|'); print('v: 1')")
    mine, out = f"{sys.executable} {tmp_path}/mine.py", tmp_path / "s"
    flags = ["--space", str(tmp_path / "space.json"), "--key", "v", "--sampler", "grid",
             "--points", "2", "--folds", "2", "--out"]  # fmt: skip
    for command in (f"{mine} {{args}}", f"sh -c '{mine} {{args}}'"):
        shutil.rmtree(out, ignore_errors=True)
        assert sweep.main([*flags, str(out), "--command", command]) == 0
        for index, words in enumerate((
            "--model.width|64|--optimizer|a b|--beta|0.5|--lr|1.0",
            "--model.width|64|--optimizer|a b|--beta|0.5|--lr|2.0",
            "--model.width|64|--optimizer|sgd|--lr|1.0",
            "--model.width|64|--optimizer|sgd|--lr|2.0",
        )):  # fmt: skip
            printed = (out / f"trial-{index:05d}/fold-1/output.txt").read_text()
            assert printed == f"{words}|--fold|1\nv: 1\n"
    capsys.readouterr()
    for command in ("run {optimizer} {lr} {fold}", "run {args} {beta}"):
        assert sweep.main([*flags, str(tmp_path / "no"), "--command", command]) == 2
        assert "{beta} is not there in every trial; write {args}" in capsys.readouterr().err


def test_a_resumed_study_ends_where_it_was_to_end(tmp_path, monkeypatch):
    """Or where it is told to; a store of old, that does not say, after 20 trials."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setattr(sweep.Command, "__call__", lambda self, chosen, budget, folder: 1.0)
    flags = ["--sampler", "random", "--command", "run {x}", "--tune", "x=1:9", "--out"]

    def trials(folder, *more):
        assert sweep.main([*flags, str(tmp_path / folder), "--resume", *more]) == 0
        return len(sweep.make_study(sweep.read_flags([*flags, str(tmp_path / folder), "--report"]))
                   .trials)  # fmt: skip

    assert trials("s", "--trials", "25") == 25
    file = tmp_path / "s" / "study.jsonl"
    whole = file.read_text()
    file.write_text("".join(whole.splitlines(keepends=True)[:12]))
    assert trials("s") == 25 and trials("s", "--trials", "26") == 26 and trials("s") == 26
    lines = [json.loads(line) for line in whole.splitlines()[:12]]
    del lines[1]["session"]["limits"]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert trials("s") == 20 and trials("new") == 20
    dollars = ["--dollars", "0.001", "--price", "3600"]
    monkeypatch.setattr(sweep.Command, "__call__", lambda *job: time.sleep(0.002) or 1.0)
    assert trials("d", *dollars) == trials("d") < trials("d", "--price", "7.2")  # 0.5 s of them


def test_only_a_store_that_is_there_is_called_damaged(tmp_path, monkeypatch):
    flags = sweep.read_flags(["--tune", "x=1:2", "--out", str(tmp_path / "s"), "--resume"])
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "read_space", lambda settings: {}["nothing"])
        with pytest.raises(KeyError, match="nothing"):
            sweep.make_study(flags)
    run(tmp_path / "s", trials=1)
    text = (tmp_path / "s" / "study.jsonl").read_text()
    (tmp_path / "s" / "study.jsonl").write_text(text.replace('"Random"', '"Randam"'))
    with pytest.raises(SweepError, match="line 1 is damaged .KeyError: 'Randam'"):
        sweep.make_study(flags)


def test_a_resumed_space_is_the_one_that_was_given(tmp_path):
    """Lists stay lists, and a parameter, a group or an option may be called class."""
    text = """{"class": {"choice": ["class", 3], "then": {"class": {"x": {"low": 0, "high": 9}}}},
        "model": {"class": {"y": {"low": 0.0, "high": 1.0}}, "betas": [0.9, [0.95, {"class": 1}]]}}
        """
    space = Space(sweep.space_from_json(json.loads(text)))
    run(tmp_path / "s", sweep.Command("echo", "loss"), space=space, trials=1)
    out = ["--out", str(tmp_path / "s"), "--resume"]
    again = sweep.make_study(sweep.read_flags(out)).space
    assert again.tree == space.tree and again.params == space.params
    assert again.config({}) == {"model": {"betas": [0.9, [0.95, {"class": 1}]]}}


def test_a_study_without_any_value_ends_with_status_1(tmp_path, capsys):
    flags = ["--command", "sh -c 'exit 3 {x}'", "--tune", "x=0.0:1.0", "--trials", "2"]
    assert sweep.main([*flags, "--out", str(tmp_path / "s"), "--plot", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"07_sweep.py: no trial in {tmp_path}/s has a value\n"
    (tmp_path / "file").touch()
    assert sweep.main([*flags, "--out", str(tmp_path / "file")]) == 2
    assert "error: " in capsys.readouterr().err


def test_ctrl_c_in_the_demonstration_is_one_line(capsys, monkeypatch):
    def stopped():
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "demo", stopped)
    assert sweep.main([]) == 130 and capsys.readouterr().out == "stopped\n"


def test_progress_counts_paused_trials_as_paused(tmp_path):
    s = run(tmp_path / "s", bowl_in_steps, rule=ASHA(9, 1, 3), trials=9)
    assert s.progress().startswith("1/9 trials | ") and "| done 1 paused 8 |" in s.progress()


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--trails 3", "unrecognized arguments: --trails"),
        ("--tune learnin_rate=1:2", "no such field to choose; did you mean learning_rate?"),
        ("--tune max_steps=1:2", "max_steps: 06_train.py has no such field"),
        ("", "the space is empty"),
        ("--tune learning_rate=3:2", "low=3: wanted below high=2"),
        ("--tune learning_rate=0:1:log", "above 0"),
        ("--space nowhere.json", "nowhere.json"),
        ("--tune seed=1:2 --dollars 3", "price=0.0: wanted above 0"),
        ("--tune seed=1:2 --workers 3", "TPE's delay=1"),
        ("--tune seed=1:2 --rule asha -- --schedule wsd", "constant, because early stopping"),
        ("--tune seed=1:2 --tune schedule=wsd --rule asha", "schedule='wsd': wanted constant"),
        ("--tune schedule=constant,linear --rule asha", "schedule='linear': wanted constant"),
        ("--tune warmup_steps=1:99 --rule asha", "at most the first rung, 30 steps"),
        ("--tune warmup_steps=1,99 --rule asha", "warmup_steps=99: wanted at most the first"),
        ("--tune seed=1:2 --tune warmup_steps=99 --rule asha", "warmup_steps=99: wanted at most"),
        ("--tune warmup_steps=a,b --rule asha", "warmup_steps='a': wanted at most the first"),
        ("--tune preset=stories,tinystories", "preset: 06_train.py has no such field to choose"),
        ("--tune eval_every=1:9", "eval_every: 06_train.py has no such field to choose"),
        ("--tune vocab_size=300:999", "vocab_size: 06_train.py has no such field to choose"),
        ("--tune seed=1:2 -- --modle 8m", "did you mean --model"),
        ("--tune x=1:2 --command run_{y}_{x}", "{y} is not in the space"),
        ("--tune x=1:2 --command run_{x", "expected '}'"),
        ("--tune x=1:2 --command run_{x}}", "Single '}'"),
        ("--tune x=1:2 --command run", "{x} is not in it"),
        ("--tune x=1:2 --command run_{x} --seeds 2", "{seed} is not in it"),
        ("--tune x=1:2 --command run{args} --seeds 2", "{seed} is not in it"),
        ("--tune seed=1:2 --command run{args}", "{seed} is not in it"),
        ("--tune x=1:2 --tune seed=3 --command run{args}", "{seed} is not in it"),
        ("--tune x=1:2 --command run{args} --rule asha", "{budget} is not in it"),
        ("--tune budget=1:2 --command run_{budget}", "--tune='budget': wanted another name"),
        ("--tune folder.x=1:2 --command run_{folder.x}", "'folder.x': wanted another name"),
        ("--tune args=1:2 --command run_{args}", "--tune='args': wanted another name"),
        ("--tune seed=1:2 --seeds 2", "--tune='seed': wanted another name"),
        ("--tune fold=1:2 --command run_{fold} --folds 2", "--tune='fold': wanted another name"),
        ("--tune x=1:2 --command run_{x} --folds 2", "{fold} is not in it"),
        ("--tune x=1:2 --command run_{x} --rule asha", "{budget} is not in it"),
        ("--tune seed=1:2 --folds 2", "a --command that has {fold}"),
        ("--tune seed=1:2 --seeds 0", "--seeds=0: wanted at least 1"),
        ("--tune seed=1:2 --seed -1", "seed=-1: wanted at least 0"),
        ("--tune seed=1:2 --budget -5", "budget=-5: wanted at least 1"),
        ("--tune seed=1:2 --trials -3", "trials=-3: wanted above 0"),
        ("--tune seed=1:2 --tune seed=3", "--tune='seed': wanted each name once"),
        ("--report", "there is no study in"),
    ],
)
def test_command_line_errors_are_one_clear_line(flags, word, tmp_path, capsys):
    first, *rest = flags.split(" -- ")
    argv = [*first.split(), "--out", str(tmp_path / "s")] + ["--", *" ".join(rest).split()]
    assert sweep.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("07_sweep.py: error: ") and word in error
    assert error.count("\n") == 1


# real runs of 06_train.py


@pytest.fixture(scope="module")
def train_flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    text = "<|endoftext|>".join(s for s, _ in sweep.stories.corpus(150, seed=0))
    (folder / "stories.txt").write_text(text)
    return [*sweep.TINY, "--batch-size", "2", "--eval-every", "2", "--eval-tokens", "300",
            "--data", str(folder / "stories.txt"), "--cache", str(folder / "cache")]  # fmt: skip


def train_study(folder, flags, *more):
    argv = ["--tune", "learning_rate=1e-3:1e-1:log", "--tune", "beta2=0.9:0.99", "--tune",
            "warmup_steps=0:2", "--sampler", "random", "--out", str(folder), *more]  # fmt: skip
    return sweep.make_study(sweep.read_flags([*argv, "--", *flags]))


def test_asha_on_training_goes_on_exactly_where_it_paused(tmp_path, train_flags):
    asha = ["--rule", "asha", "--min-budget", "2", "--budget", "6", "--eta", "3"]
    s = train_study(tmp_path / "asha", train_flags, *asha).run(Limits(trials=3), show=False)
    assert sorted(s.states.values()) == ["done", "paused", "paused"]
    best = next(t for t in s.trials if t.state == "done")
    full = train_study(tmp_path / "full", train_flags, "--budget", "6")
    full.run(Limits(trials=3), show=False)
    same = full.trials[best.index]
    assert same.params == best.params
    assert same.value == best.value and same.tokens == best.tokens  # bit for bit
    assert [r.step for r in same.reports] == [2, 4, 6]
    out = tmp_path / "asha" / f"trial-{best.index:05d}"
    used = json.loads((out / "step-00000006" / "config.json").read_text())
    assert {name: used[name] for name in best.params} == best.params and used["samples"] == 0
    assert not list((out / "step-00000002").glob("*.pt"))  # only the newest checkpoints stay


def test_a_value_that_does_not_reach_the_run_is_an_error(tmp_path, train_flags, monkeypatch):
    real = sweep.training.train
    lost = lambda config: real(replace(config, beta2=0.5))  # noqa: E731
    monkeypatch.setattr(sweep.training, "train", lost)
    s = train_study(tmp_path / "s", train_flags, "--budget", "2").run(Limits(trials=1), show=False)
    assert s.states == {0: "failed"} and "which was chosen" in s.trials[0].message


def test_a_signal_while_06_trains_stops_the_study_and_fails_no_trial(
    tmp_path, train_flags, monkeypatch
):
    s = train_study(tmp_path / "s", train_flags, "--budget", "2")
    real = sweep.training.add_metrics
    with monkeypatch.context() as patch:  # Ctrl-C when the first step has been logged
        patch.setattr(sweep.training, "add_metrics", lambda *a, **k: os.kill(os.getpid(), 2))
        with pytest.raises(KeyboardInterrupt):
            s.run(Limits(trials=1), show=False)
    assert s.states == {0: "running"} and sweep.training.add_metrics is real
    assert s.run(Limits(trials=1), show=False).states == {0: "done"}


def test_an_interrupted_rung_keeps_its_evaluations(tmp_path, train_flags, monkeypatch):
    asha = ["--rule", "asha", "--min-budget", "6", "--budget", "7", "--eta", "3"]
    whole = train_study(tmp_path / "whole", train_flags, *asha).run(Limits(trials=1), show=False)
    s, real = train_study(tmp_path / "s", train_flags, *asha), sweep.training.add_metrics

    def stop_at_4(folder, **entry):  # Ctrl-C after the second evaluation
        real(folder, **entry)
        if entry["step"] == 4 and "val_nats" in entry:
            os.kill(os.getpid(), 2)

    with monkeypatch.context() as patch:
        patch.setattr(sweep.training, "add_metrics", stop_at_4)
        with pytest.raises(KeyboardInterrupt):
            s.run(Limits(trials=1), show=False)
    s.run(Limits(trials=1), show=False)
    assert [r.step for r in s.trials[0].reports] == [2, 4, 6] and outcome(s) == outcome(whole)


def test_report_gives_the_command_that_trains_the_best_in_one_run(tmp_path, train_flags, capsys):
    s = train_study(tmp_path / "s", train_flags, "--budget", "2").run(Limits(trials=2), show=False)
    sweep.report(s)
    words = shlex.split(capsys.readouterr().out.strip().splitlines()[-1])
    assert words[:2] == ["python", "06_train.py"]
    config = vars(sweep.training.resolve(sweep.training.read_flags(words[2:])))
    run_folder = tmp_path / f"s/trial-{s.best.index:05d}/step-00000002"
    used = json.loads((run_folder / "config.json").read_text())
    other = {name for name in used if used[name] != config[name]}
    assert other == {"out", "resume", "samples"} and config["samples"] == 100


def test_ray_trains_by_the_command_line(tmp_path, train_flags, cluster, capsys):
    argv = ["--tune", "learning_rate=1e-3:1e-1:log", "--sampler", "random", "--trials", "2",
            "--budget", "2"]  # fmt: skip
    flags, tables = ["--", *train_flags, "--warmup-steps", "1"], []
    for executor in ("local", "ray"):
        out = ["--executor", executor, "--out", str(tmp_path / executor)]
        assert sweep.main([*argv, *out, *flags]) == 0
        rows = capsys.readouterr().out.split("\n\n")[1].splitlines()
        tables.append([row.split()[:-1] for row in rows])  # all but the seconds
    assert tables[0] == tables[1] and len(tables[0]) == 3


# width transfer


def test_train_width_is_adamw_with_a_rate_for_each_group(tmp_path):
    """Against torch's AdamW, loss and clipping, the rates by hand."""
    data = transfer.corpus.prepare("stories", tmp_path, vocab_size=300, story_count=60)
    ours = transfer.train_width(data, 32, 0.01, 0.25, seed=3, steps=10)
    gpt, end = transfer.gpt, data.vocabulary.end
    torch.manual_seed(3)
    shape = {"n_layer": 2, "n_head": 2, "n_kv_head": 2, "d_model": 32, "d_mlp": 64}
    model = gpt.GPT(gpt.GPTConfig(vocab_size=data.vocabulary.size, seq_len=32, **shape))
    hidden = {"qkv.weight", "out.weight", "gate_up.weight", "down.weight"}
    slow = [n for n, _ in model.named_parameters() if ".".join(n.split(".")[-2:]) in hidden]
    assert len(slow) == 8
    groups = [{"params": [p]} for p in model.parameters()]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)

    train, val = (
        transfer.batches.Batches(ids, transfer.batches.story_rows(ids, end, 32), 8, 32, 3, "cpu")
        for ids in (data.train, data.val)
    )

    def loss(x, y):
        cross_entropy = torch.nn.functional.cross_entropy
        return cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-100)

    for step in range(10):
        x, y, _ = train.batch(step)
        adamw.zero_grad()
        loss(x, y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for (name, _), group in zip(model.named_parameters(), adamw.param_groups):
            falls = min(1.0, (10 - step) / 9)  # one step of warmup, at the full rate
            group["lr"] = 0.01 * falls * (0.25 if name in slow else 1.0)
        adamw.step()
    x, y, _ = val.take(np.arange(128))
    assert ours == pytest.approx(loss(x, y).item(), abs=1e-4)


# the main run


def test_curve_is_the_least_value_of_all_trials_by_their_tokens(tmp_path):
    s = run(tmp_path / "s", bowl_in_steps, rule=ASHA(9, 1, 3))
    lines = [json.loads(x) for x in s.store.file.read_text().splitlines()]
    lines = [e for e in lines if "step" in e]
    assert len(s.curve) == len(lines)
    for k in (0, 5, len(lines) - 1):
        tokens = {e["trial"]: e["tokens"] for e in lines[: k + 1]}
        assert s.curve[k] == (sum(tokens.values()), min(e["value"] for e in lines[: k + 1]))


def optuna_search(sampler, seed, trials=60):
    """What `search` does, by optuna."""

    def objective(asked):
        point = {
            name: (asked.suggest_int if kind.whole else asked.suggest_float)(
                name, kind.low, kind.high, log=kind.log, step=kind.step
            )
            for name, kind in SYNTHETIC.items()
        }
        return synthetic(point, 10**9, Path())

    theirs = optuna.create_study(sampler=sampler(seed))
    theirs.optimize(objective, n_trials=trials)
    return theirs.best_value


def yardstick(seeds=30):
    """Best of 60 trials, median over the seeds: ours and optuna's, in one process."""
    tpe = optuna.samplers.TPESampler
    ours = {
        "random": Random(), "sobol": Sobol(), "tpe, each parameter by itself": TPE(joint=False),
        "tpe, jointly": TPE(), "tpe, jointly, delay 4": TPE(delay=4),
        "tpe, jointly, delay 8": TPE(delay=8),
    }  # fmt: skip
    theirs = {
        "optuna random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
        "optuna tpe, each parameter by itself": lambda seed: tpe(seed=seed, multivariate=False),
        "optuna tpe, jointly": lambda seed: tpe(seed=seed),
    }
    runs = {name: [search(s, seed) for seed in range(seeds)] for name, s in ours.items()}
    runs |= {name: [optuna_search(s, seed) for seed in range(seeds)] for name, s in theirs.items()}
    return {name: statistics.median(values) for name, values in runs.items()}


def tpe_against_optuna(seeds=range(1000, 1120)):
    """Whether joint TPE and optuna's are the same: their best values, by rank (Mann & Whitney)."""
    from scipy.stats import mannwhitneyu

    ours = [search(TPE(), seed) for seed in seeds]
    theirs = [optuna_search(lambda s: optuna.samplers.TPESampler(seed=s), seed) for seed in seeds]
    quartiles = [np.quantile(values, (0.25, 0.5, 0.75)).tolist() for values in (ours, theirs)]
    p = float(mannwhitneyu(ours, theirs).pvalue)
    both = dict(zip(("quartiles", "optuna_quartiles"), quartiles))
    return {"seeds": len(seeds), **both, "p": p}


def kill_many(kills=200):
    rules, done = itertools.cycle([Full(9), ASHA(9, 1, 3), Hyperband(9, 3)]), 0
    for rule in rules:
        with tempfile.TemporaryDirectory() as place:
            assert_like_unkilled(Path(place), rule, kills=min(10, kills - done), seed=done)
        done += min(10, kills - done)
        if done == kills:
            return {"kills": kills, "trials_lost": 0, "trials_repeated": 0, "other_results": 0}


def races(seeds=range(5)):
    """07_sweep.py's main run for several seeds: what ASHA and random search found."""
    found = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            found.append(sweep.demo_race(Path(folder), seed))
    return found


PARTS = {
    "best_of_60_trials_median_of_30_seeds": lambda: yardstick(30),
    "best_of_60_trials_median_of_150_seeds": lambda: yardstick(150),
    "tpe_against_optuna": tpe_against_optuna,
    "sigkill": kill_many,
    "races": races,
}


@pytest.mark.parametrize("end", ["log=false", "step", "step=", "logs"])
def test_half_a_flag_is_refused(end):
    with pytest.raises(sweep.SweepError, match="log or step=S"):
        sweep.space_from_flag(f"x=1:10:{end}")


@pytest.mark.parametrize("old, new", [
    ({"a": [1, 2], "b": [3]}, {"b": [3], "a": [1, 2]}),
    ({"a": {"low": 0.0}}, {"a": {"low": 0}}),
    ({"a": [0]}, {"a": [False]}),
])  # fmt: skip
def test_spaces_that_number_their_points_otherwise_differ(old, new):
    assert sweep.differences({"space": old}, {"space": old}) == []
    assert len(sweep.differences({"space": old}, {"space": new})) == 1


def machine():
    """Such as "2 cores, AMD EPYC, family 26, model 2" (Zen 5)."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    about = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    name, family, model = (about[key] for key in ("model name", "cpu family", "model"))
    return f"{os.cpu_count()} cores, {name}, family {family}, model {model}"


if __name__ == "__main__":
    sweep.surroundings = lambda: {"time": time.time()}
    torch.set_num_threads(1)
    results = Path(sweep.__file__).resolve().parent / "results" / "sweep.json"
    for part in sys.argv[1:] or PARTS:
        measured = json.loads(results.read_text()) if results.exists() else {}
        measured |= {
            "command": "python tests/test_07_sweep.py [PART]",
            part: PARTS[part](),
            "machines": measured.get("machines", {}) | {part: machine()},
        }
        print(json.dumps(measured[part], indent=2))
        results.write_text(json.dumps(measured, indent=2) + "\n")
