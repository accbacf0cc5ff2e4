"""Tests of 08_stability.py: against torch and pytorch_optimizer, known answers, injected faults.

Run: python -m pytest tests/test_08_stability.py
"""

import copy
import importlib
import io
import json
import math
import random
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

stability = importlib.import_module("08_stability")
doctor = importlib.import_module("results.doctor")


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


def test_guard_leaves_a_margin_where_nothing_ever_strays():
    """With a spread of 0 a spike is more than 0.5 nats, or more than 20 times the norm."""
    guard = stability.SpikeGuard()
    for _ in range(100):
        guard.judge(1.0, 1.0)
    assert [guard.judge(x, 1.0).action for x in (1.49, 1.51)] == ["go", "skip"]
    assert [guard.judge(1.0, x).action for x in (19.0, 21.0)] == ["go", "skip"]


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


# Clipping


def parameters(dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(17, 33), (33,), (), (3, 1, 5, 2), (0,), (1023,)]
    return [nn.Parameter(torch.randn(s, generator=g).to(dtype)) for s in shapes]


def set_gradients(params, scale=1.0, seed=1):
    g = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (scale * torch.randn(p.shape, generator=g)).to(p.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("max_norm", [0.0, 1e-3, 1.0, 1e6, math.inf])
def test_clip_grad_norm_matches_torch(dtype, norm_type, max_norm):
    ours, theirs = parameters(dtype), parameters(dtype)
    set_gradients(ours)
    set_gradients(theirs)
    ours[1].grad = theirs[1].grad = None
    if norm_type == math.inf:  # torch has no largest of nothing
        theirs = [p for p in theirs if p.numel()]
        ours = [*(p for p in ours if p.numel()), ours[4]]
    norm = stability.clip_grad_norm_(ours, max_norm, norm_type)
    wanted = torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type)
    tolerance = {"rtol": 2e-2, "atol": 1e-6} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(norm.to(dtype), wanted, **tolerance)
    for a, b in zip(ours, theirs):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, **tolerance)


def test_clip_grad_norm_returns_the_norm_before_and_leaves_a_shade_less_than_max_norm():
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 4.0])
    assert stability.clip_grad_norm_(p, 1.0).item() == 5.0
    assert p.grad.norm().item() == pytest.approx(5 / (5 + 1e-6), abs=1e-7)
    assert stability.clip_grad_norm_([nn.Parameter(torch.zeros(2))], 1.0).item() == 0.0


@pytest.mark.parametrize(
    "dtype, count, size", [(torch.float16, 4, 60_000.0), (torch.float32, 128, 1e19)]
)
def test_clip_grad_norm_survives_an_overflow_that_zeroes_in_torch(dtype, count, size):
    ours, theirs = (nn.Parameter(torch.zeros(count, dtype=dtype)) for _ in range(2))
    ours.grad = torch.full_like(ours, size)
    theirs.grad = ours.grad.clone()
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    assert theirs.grad.count_nonzero() == 0
    norm = stability.clip_grad_norm_(ours, 1.0).item()
    assert norm == pytest.approx(size * math.sqrt(count), rel=1e-3)
    torch.testing.assert_close(ours.grad.double().norm().item(), 1.0, rtol=1e-3, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_clip_grad_norm_policies_for_numbers_that_are_not_finite(bad):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    def fresh():
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        model[1].weight.grad[0, 1] = bad
        return list(model.named_parameters())

    named = fresh()
    assert not stability.clip_grad_norm_(named, 1.0).isfinite()
    assert model[0].bias.grad.tolist() == [1.0, 1.0]  # as it was
    assert stability.nonfinite_gradients(named) == ["1.weight"]

    with pytest.raises(RuntimeError, match="not finite in 1.weight;"):
        stability.clip_grad_norm_(fresh(), 1.0, error_if_nonfinite=True)
    with pytest.raises(RuntimeError, match=r"parameter 2 of shape \(2, 2\)"):
        stability.clip_grad_norm_([p for _, p in fresh()], 1.0, error_if_nonfinite=True)

    with pytest.warns(UserWarning, match="1.weight"):
        norm = stability.clip_grad_norm_(fresh(), 1.0, nonfinite="zero")
    assert norm.item() == pytest.approx(math.sqrt(11))
    assert model[1].weight.grad[0, 1] == 0
    assert model[0].bias.grad[0].item() == pytest.approx(1 / math.sqrt(11), rel=1e-5)

    with pytest.raises(ValueError, match="nonfinite='raise' must be"):
        stability.clip_grad_norm_(fresh(), 1.0, nonfinite="raise")


def test_clip_grad_value_matches_torch():
    ours, theirs = parameters(), parameters()
    set_gradients(ours, 3.0)
    set_gradients(theirs, 3.0)
    stability.clip_grad_value_(ours, 0.7)
    torch.nn.utils.clip_grad_value_(theirs, 0.7)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours, theirs))


def test_adaptive_clip_known_answer():
    p = nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    p.grad = torch.tensor([[6.0, 8.0], [1.0, 0.0]])
    stability.adaptive_clip_([p])
    torch.testing.assert_close(p.grad, torch.tensor([[0.03, 0.04], [1e-5, 0.0]]))


@pytest.mark.parametrize("shape", [(), (7,), (9, 5), (4, 3, 2, 2)])
def test_adaptive_clip_matches_pytorch_optimizer(shape):
    agc = pytest.importorskip("pytorch_optimizer").agc
    p = nn.Parameter(torch.randn(shape))
    for scale in (1e-4, 1.0, 100.0):
        p.grad = scale * torch.randn(shape)
        wanted = agc(p.detach(), p.grad)
        stability.adaptive_clip_([p])
        torch.testing.assert_close(p.grad, wanted)


def test_auto_clip_is_the_percentile_so_far():
    clip = stability.AutoClip(10.0)
    assert [clip.max_norm(x) for x in (5.0, 1.0, 2.0)] == [5.0, 1.4, pytest.approx(1.2)]


def test_zclip_known_answer_and_learning_from_the_clipped_norm():
    clip = stability.ZClip()
    for x in [0.9, 1.1] * 12 + [1.0]:  # the 25 of the warmup
        assert clip.max_norm(x) == x
    clip.mean, clip.var = 1.0, 0.01
    assert clip.max_norm(5.0) == pytest.approx(1.015625, rel=1e-4)
    assert clip.mean == pytest.approx(0.97 + 0.03 * 1.015625, rel=1e-4)
    assert clip.max_norm(1.1) == 1.1  # z about 1


# The rewind loop


def dropout_run(batches, steps, guard, **options):
    """A model with dropout over a list of batches; parameters, AdamW's state, the generator."""
    torch.manual_seed(0)
    model = stability.TinyGPT(dropout=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    used, log = stability.train_with_rewind(
        model, optimizer, lambda i: batches[i], stability.echo_loss, steps, guard, **options
    )
    moments = [s[k] for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
    return used, log, [*model.parameters(), *moments, torch.get_rng_state()]


def echo_list(count, seed=0):
    return list(zip(*stability.echo_batches(count, 8, seed)))


def poison(batches, numbers):
    g = torch.Generator().manual_seed(9)
    for i in numbers:
        x, y = batches[i]
        batches[i] = x, torch.randint(stability.V, y.shape, generator=g)


@pytest.mark.parametrize(
    "bad, options, left_out",
    [
        ([80], {}, [80]),  # one skip
        ([70, 85, 86], {}, [70, 85, 86]),
        (range(85, 95), {"keep_every": 20}, None),  # rewinds, two of them
        ([85, 86, 87, 88, 89], {"skip_ahead": 6}, None),
    ],
)
def test_rewind_is_bit_identical_to_a_run_that_never_saw_the_batches(bad, options, left_out):
    batches = echo_list(160)
    poison(batches, bad)
    guard, asleep = stability.SpikeGuard(), stability.SpikeGuard(warmup=128)
    used, log, ours = dropout_run(batches, 100, guard, **options)
    missing = sorted(set(range(max(used) + 1)) - set(used))
    assert len(used) == 100 and set(bad) <= set(missing)
    if left_out is None:
        assert "rewind" in log[4] and len(missing) > len(bad)
    else:
        assert missing == left_out and len(log) == len(bad)
    again, log, theirs = dropout_run([batches[i] for i in used], 100, asleep)
    assert again == list(range(100)) and log == []
    assert guard.losses == asleep.losses and guard.log_norms == asleep.log_norms
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_rewind_goes_further_back_each_time_and_gives_up():
    batches = echo_list(400)
    poison(batches, range(85, 400))
    # from 85 to the copies of 80, 70 and 60
    with pytest.raises(RuntimeError, match="4 rewinds; the last: step 60"):
        dropout_run(batches, 100, stability.SpikeGuard(), max_rewinds=3)


def test_rewind_saves_the_run_that_poison_ruins():
    """Within 1% of the clean loss; without the guard more than 5% off."""
    clean, _, _ = stability.poisoned_run(False, stability.SpikeGuard())
    hurt, _, _ = stability.poisoned_run(True, stability.SpikeGuard(warmup=128))
    saved, _, log = stability.poisoned_run(True, stability.SpikeGuard())
    assert saved < 1.01 * clean and hurt > 1.05 * clean and len(log) == 6


def test_random_states_come_back():
    def draw():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()

    states = stability.random_states()
    first = draw()
    assert draw() != first
    stability.restore_random_states(states)
    assert draw() == first


# Remedies


def test_z_loss_known_answer():
    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    loss = stability.z_loss(logits)
    loss.backward()
    assert loss.item() == pytest.approx(1.92181e-4, rel=1e-5)
    assert logits.grad.tolist() == pytest.approx([6.93147e-5] * 4, rel=1e-5)


def test_z_loss_and_softcap_gradients():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: stability.z_loss(x, 0.1), x)
    assert torch.autograd.gradcheck(lambda x: stability.softcap(10 * x, 3.0), x)


def test_softcap_bounds_large_and_leaves_small():
    x = torch.tensor([-1e6, -1e-3, 0.0, 1e-3, 1e6])
    wanted = torch.tensor([-30.0, -1e-3, 0.0, 1e-3, 30.0])
    torch.testing.assert_close(stability.softcap(x, 30.0), wanted, atol=1e-6, rtol=0)


def test_shrink_gradient_keeps_the_value_and_takes_a_share_of_the_gradient():
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    y = stability.shrink_gradient(x, 0.1)
    torch.testing.assert_close(y, x, atol=1e-15, rtol=1e-15)
    weights = torch.randn(50, dtype=torch.float64)
    (y * weights).sum().backward()
    torch.testing.assert_close(x.grad, 0.1 * weights)


def test_qk_norm_bounds_the_attention_logits():
    """|q| = |k| = sqrt(D): q k / sqrt(D) is at most sqrt(D), whatever the weights."""
    model = stability.TinyGPT(qk_norm=True)
    with torch.no_grad():
        model.blocks[0].qkv.weight.mul_(1000)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with stability.watch(model, optimizer) as report:
        model(echo_list(1)[0][0])
    assert 1.0 < report["attention_max_logit"]["blocks.0.scores"] <= math.sqrt(16) + 1e-4


def test_warmup_begins_above_zero_and_ends_at_one():
    assert [stability.warmup(s, 4) for s in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert stability.warmup(0, 1) == stability.warmup(0, 0) == 1.0


def against(ours, theirs, make_ours, make_theirs, steps):
    one, other = make_ours(ours), make_theirs(theirs)
    for step in range(steps):
        scale = 50.0 if step % 17 == 16 else 1.0  # spikes, for what is to be clipped
        set_gradients(ours, scale, seed=step)
        set_gradients(theirs, scale, seed=step)
        one.step()
        other.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_stable_adamw_matches_pytorch_optimizer():
    package = pytest.importorskip("pytorch_optimizer")
    shared = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
    against(
        [p for p in parameters(torch.float64) if p.numel()],
        [p for p in parameters(torch.float64) if p.numel()],
        lambda params: stability.StableAdamW(params, **shared),
        lambda params: package.StableAdamW(params, **shared),
        60,
    )


def test_spam_matches_pytorch_optimizer_over_resets():
    package = pytest.importorskip("pytorch_optimizer")
    against(
        [p for p in parameters(torch.float64) if p.numel()],
        [p for p in parameters(torch.float64) if p.numel()],
        lambda params: stability.SPAM(
            params, 1e-2, threshold=30.0, reset_every=40, warmup=15, settle=10
        ),
        lambda params: package.SPAM(
            params, 1e-2, threshold=30, update_proj_gap=40, warmup_epoch=15, grad_accu_steps=10
        ),
        130,
    )


def test_update_rms_is_one_for_a_steady_gradient_and_the_ratio_for_a_sudden_one():
    v = torch.full((8,), 4.0)
    assert stability.update_rms(torch.full((8,), 2.0), v, 1e-8).item() == 1.0
    assert stability.update_rms(torch.full((8,), 1.0), v, 1e-8).item() == 1.0  # never below
    assert stability.update_rms(torch.full((8,), 20.0), v, 1e-8).item() == 10.0


# Loss scaling


def test_loss_scaler_follows_torch():
    """Good steps with overflows in between: same scale, same steps taken, same weights."""
    draw = random.Random(0)
    torch.manual_seed(0)
    ours, theirs = nn.Linear(4, 4), nn.Linear(4, 4)
    theirs.load_state_dict(ours.state_dict())
    one, other = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (ours, theirs))
    mine = stability.LossScaler(scale=1024.0, growth=4.0, backoff=0.25, interval=3)
    torchs = torch.amp.GradScaler("cpu", 1024.0, 4.0, 0.25, 3)
    for step in range(60):
        x = torch.randn(2, 4)
        bad = draw.random() < 0.25
        for model, optimizer, scaler in ((ours, one, mine), (theirs, other, torchs)):
            optimizer.zero_grad()
            scaler.scale(model(x).square().mean()).backward()
            if bad:
                model.weight.grad[0, 0] = math.inf
            if step % 2:  # something stands between
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        before = theirs.bias.detach().clone()
        stepped = mine.step(one)
        torchs.step(other)
        torchs.update()
        assert mine.scale_now == torchs.get_scale()
        assert stepped == (not bad) == (not torch.equal(before, theirs.bias))
    torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()))


def test_loss_scaler_rescues_a_gradient_that_float16_loses():
    w = torch.ones(1, requires_grad=True)
    for scale, found in ((1.0, False), (2.0**16, True)):
        w.grad = None
        optimizer = torch.optim.SGD([w], lr=0.0)
        scaler = stability.LossScaler(scale)
        scaler.scale((w.half() * 1e-4).float() * 1e-4).backward()  # 1e-8 is 0 in float16
        scaler.unscale_(optimizer)
        assert (w.grad.item() == pytest.approx(1e-8, rel=1e-2)) == found


def test_loss_scaler_refuses_float16_gradients_and_stops_at_infinity():
    p = nn.Parameter(torch.ones(2, dtype=torch.float16))
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="float16 and must be float32"):
        stability.LossScaler().unscale_(torch.optim.SGD([p], lr=0.1))
    q = nn.Parameter(torch.ones(2))
    q.grad = torch.zeros_like(q)
    scaler = stability.LossScaler(scale=1e308, growth=1e10, interval=1)
    assert scaler.step(torch.optim.SGD([q], lr=0.1)) and scaler.scale_now == 1e308


# Monitors


def test_watch_reports_what_is_computed_by_hand_and_leaves_no_hook():
    torch.manual_seed(0)
    model = stability.TinyGPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    with torch.no_grad():
        model.blocks[0].up.weight[:7] = 0  # 7 units of 128 that are never above 0
    x, y = echo_list(1)[0]
    before = model.head.weight.detach().clone()
    with stability.watch(model, optimizer) as report:
        stability.echo_loss(model, x, y).backward()
        optimizer.step()
    change = model.head.weight.detach() - before
    assert report["update_ratio"]["head.weight"] == pytest.approx(
        (change.norm() / before.norm()).item()
    )
    grad = model.head.weight.grad
    assert report["gradient_norm"]["head.weight"] == pytest.approx(grad.norm().item())
    assert report["weight_norm"]["head.weight"] == pytest.approx(before.norm().item())
    v = 0.001 * grad.square()
    low = (v.sqrt() < 1e-4).float().mean().item()
    assert 0 < low < 1 and report["adam_floor"]["head.weight"] == pytest.approx(low)
    assert report["dead_units"]["blocks.0.act"] >= 7 / 128
    assert not any(m._forward_hooks for m in model.modules())
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_watch_sees_attention_and_activations():
    model = stability.TinyGPT()
    with torch.no_grad():
        model.blocks[0].qkv.weight.zero_()
        model.head.weight.fill_(1.0)
    x, _ = echo_list(1)[0]
    with stability.watch(model, torch.optim.SGD(model.parameters(), lr=0.1)) as report:
        logits = model(x)
    T = x.shape[1]
    # all scores equal: position t attends evenly to t + 1 places
    even = sum(math.log(t + 1) for t in range(T)) / T
    assert report["attention_entropy"]["blocks.0.scores"] == pytest.approx(even, rel=1e-5)
    assert report["attention_max_logit"]["blocks.0.scores"] == 0.0
    rms = logits.square().mean().sqrt().item()
    assert report["activation_rms"]["head"] == pytest.approx(rms)


# The tiny language, and the score


def test_echo_floor_is_the_loss_of_who_knows_the_language():
    x, y = stability.echo_batches(1, 4000, seed=3)
    x, y = x[0], y[0]
    noise, V, lag = stability.NOISE, stability.V, stability.LAG
    p = torch.full((*x.shape, V), 1 / V)
    p[:, lag - 1 :] = noise / V
    place = x[:, : x.shape[1] - lag + 1, None]  # the target at t echoes x[t + 1 - lag]
    p[:, lag - 1 :].scatter_add_(-1, place, torch.full(place.shape, 1 - noise))
    torch.testing.assert_close(p.sum(-1), torch.ones(x.shape))
    loss = -p.gather(-1, y[..., None]).log().mean().item()
    assert loss == pytest.approx(stability.echo_floor(), abs=0.01)


def test_tiny_gpt_starts_near_ln_v_and_does_not_see_the_future():
    torch.manual_seed(0)
    model = stability.TinyGPT(layers=2, qk_norm=True, score_cap=50.0)
    x, y = echo_list(1)[0]
    assert stability.echo_loss(model, x, y).item() == pytest.approx(math.log(32), abs=0.3)
    other = x.clone()
    other[:, 20:] = 0
    assert torch.equal(model(x)[:, :20], model(other)[:, :20])


def test_lr_sensitivity_counts_up_to_the_loss_at_init():
    assert stability.lr_sensitivity([1.0, 2.0, math.inf], at_init=3.0) == 1.0
    assert stability.lr_sensitivity([2.0, 2.0], at_init=3.0) == 0.0


def test_qk_norm_takes_most_of_the_instability_away():
    """At a rate where the plain model ends near ln V; three seeds each, and no overlap."""
    plain = [stability.train_tiny(0.1, seed)[-10:] for seed in range(3)]
    cured = [stability.train_tiny(0.1, seed, qk_norm=True)[-10:] for seed in range(3)]
    mean = statistics.fmean
    assert min(map(mean, plain)) > max(map(mean, cured)) + 0.5


# The doctor


@pytest.mark.parametrize("bug", doctor.BUGS, ids=lambda bug: bug.__name__)
def test_diagnose_names_the_bug(bug):
    found = stability.diagnose(bug(seed=11))  # results/doctor.json has seeds 0 to 4
    assert found[0].name == bug.finding, found


@pytest.mark.parametrize("seed", range(100, 104))
def test_diagnose_finds_nothing_in_a_sound_run(seed):
    assert stability.diagnose(doctor.SoundRun(seed)) == []


def test_diagnose_finds_nothing_in_the_repositorys_own_model():
    gpt = importlib.import_module("03_gpt")
    adamw = importlib.import_module("04_adamw")

    class OurRun(doctor.SoundRun):
        def make_model(self, seed):
            torch.manual_seed(seed)
            return gpt.GPT(gpt.GPTConfig(**shape))

        def make_optimizer(self, model):
            return adamw.AdamW(model.parameters(), lr=3e-3)

    shape = {"vocab_size": 32, "seq_len": 32, "n_layer": 2, "n_head": 2, "n_kv_head": 1}
    shape |= {"d_model": 32, "d_mlp": 64}
    assert stability.diagnose(OurRun(0)) == []


def test_diagnose_leaves_the_random_states_alone():
    states = stability.random_states()
    stability.diagnose(doctor.SoundRun(0), overfit_steps=2)
    assert torch.equal(states["torch"], torch.get_rng_state())
    assert states["python"] == random.getstate()


def test_doctor_json_is_whole():
    """Every kind of bug tried and named, no false alarm: what the table is quoted for."""
    table = json.loads((Path(doctor.__file__).with_suffix(".json")).read_text())
    assert [row["bug"] for row in table["bugs"]] == [bug.__name__ for bug in doctor.BUGS]
    assert table["named"] == table["tried"] >= 5 * 12
    assert table["sound_runs"] >= 20 and table["false_alarms"] == 0


def test_file_runs_alone_in_an_empty_folder(tmp_path):
    shutil.copy(stability.__file__, tmp_path)
    code = "import importlib; s = importlib.import_module('08_stability'); s.show_clipping()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "norm    120000, then 0.50" in done.stdout, done.stderr


def test_auto_clip_and_z_clip_forget_a_norm_that_is_not_finite():
    for make in (stability.AutoClip, stability.ZClip):
        with_nan, without = make(), make()
        for i in range(60):
            wanted = without.max_norm(1.0 + i % 3)
            assert with_nan.max_norm(1.0 + i % 3) == wanted
            assert math.isfinite(with_nan.max_norm(math.nan)) and with_nan.max_norm(math.inf) > 0
        assert with_nan.max_norm(100.0) == without.max_norm(100.0) < 100


def test_spam_goes_on_from_its_state_dict():
    torch.manual_seed(0)
    one, two = (nn.Parameter(torch.ones(4)) for _ in range(2))
    first = stability.SPAM([one], lr=1e-2, reset_every=10, warmup=3)
    second = stability.SPAM([two], lr=1e-2, reset_every=10, warmup=3)
    for step in range(25):
        one.grad = torch.randn(4)
        two.grad = one.grad.clone()
        if step == 12:
            second = stability.SPAM([two], lr=1e-2, reset_every=10, warmup=3)
            second.load_state_dict(copy.deepcopy(first.state_dict()))
        first.step()
        second.step()
        assert torch.equal(one, two), step


def test_watch_leaves_no_state_for_parameters_of_nobody():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = torch.optim.AdamW(model[1].parameters())
    with stability.watch(model, optimizer) as report:
        model(torch.randn(2, 3)).sum().backward()
        optimizer.step()
    optimizer.state_dict()
    assert "1.weight" in report["adam_floor"] and "0.weight" not in report["adam_floor"]


def test_wrong_use_is_an_error():
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    for wrong in (-1.0, math.nan):
        with pytest.raises(ValueError, match="max_norm"):
            stability.clip_grad_norm_([p], wrong)
    scaler, optimizer = stability.LossScaler(), torch.optim.SGD([p], lr=0.1)
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="unscaled already"):
        scaler.unscale_(optimizer)
