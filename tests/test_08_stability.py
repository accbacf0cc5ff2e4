"""Tests of 08_stability.py.

Run: python -m pytest tests/test_08_stability.py
"""

import importlib
import io
import json
import math
import random

import pytest
import torch

stability = importlib.import_module("08_stability")


# SpikeGuard


def healthy(steps, seed=0, sigma=0.1):
    """Losses that fall from ln 1000 to 1, and gradient norms with a heavy tail."""
    draw = random.Random(seed)
    for step in range(steps):
        loss = 1 + 5.9 * math.exp(-step / 30) + draw.gauss(0, sigma)
        yield loss, math.exp(draw.gauss(0, 0.1)) * (5 if draw.random() < 0.01 else 1)


@pytest.mark.parametrize("sigma", [0.0, 0.02, 0.3])
def test_guard_lets_a_healthy_run_go(sigma):
    for seed in range(5):
        guard = stability.SpikeGuard()
        verdicts = [guard.judge(*x).action for x in healthy(1000, seed, sigma)]
        assert verdicts == ["go"] * 1000


def test_guard_skips_a_poisoned_batch_and_does_not_learn_from_it():
    guard = stability.SpikeGuard()
    for i, (loss, norm) in enumerate(healthy(300)):
        if i > 30 and i % 10 == 0:
            before = json.dumps(guard.state_dict())
            verdict = guard.judge(loss + 4, norm)
            assert verdict.action == "skip" and "loss" in verdict.reason
            assert json.loads(before) | {"skips": 1} == guard.state_dict()
        assert guard.judge(loss, norm).action == "go"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_guard_never_lets_a_number_go_that_is_not_finite(bad):
    guard = stability.SpikeGuard()
    assert guard.judge(bad, 1.0).action == "skip"  # even the first
    assert guard.judge(1.0, bad).action == "skip"
    assert guard.judge(1.0, 1.0).action == "go"


def test_guard_rewinds_after_patience_skips_in_a_row_and_counts_anew():
    guard = stability.SpikeGuard(patience=3)
    assert [guard.judge(math.nan, 1.0).action for _ in range(7)] == [
        "skip", "skip", "rewind", "skip", "skip", "rewind", "skip",
    ]  # fmt: skip


def test_guard_rewinds_once_when_the_loss_creeps_up_and_stays():
    guard, actions = stability.SpikeGuard(), []
    for i in range(400):
        creep = min(max(0, i - 100) / 50, 2.0)  # 0.02 nats a step: none of them is a spike
        actions.append(guard.judge(1 + creep + 0.02 * (-1) ** i, 1.0).action)
    assert 1 <= actions.count("rewind") <= 4 and actions.count("skip") == 0
    assert 100 < actions.index("rewind") < 160


def test_guard_gives_a_short_batch_more_room():
    guard = stability.SpikeGuard()
    for loss, norm in healthy(100):
        guard.judge(loss, norm, targets=160)
    assert guard.judge(5.0, 20.0, targets=1).action == "go"
    assert guard.judge(5.0, 1.0, targets=160).action == "skip"


def test_guard_state_survives_a_file_read_with_weights_only():
    steps = list(healthy(200))
    one, other = stability.SpikeGuard(), stability.SpikeGuard()
    for x in steps[:100]:
        one.judge(*x)
    one.judge(math.nan, 1.0)
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for loss, norm in steps[100:]:
        assert one.judge(loss + 0.5, norm) == other.judge(loss + 0.5, norm)
    assert one.state_dict() == other.state_dict()
