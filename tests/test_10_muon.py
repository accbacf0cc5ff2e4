"""Tests of 10_muon.py: against a float64 SVD and torch.optim.Muon, by closed form and property.

Run: python -m pytest tests/test_10_muon.py
"""

import copy
import importlib
import io
import math
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

module = importlib.import_module("10_muon")
Muon, orthogonalise, split_parameters = module.Muon, module.orthogonalise, module.split_parameters

SHAPES = [(16, 16), (48, 16), (7, 33), (33, 7), (1, 9), (9, 1), (1, 1), (16, 16)]
LOW, HIGH = module.BAND
ROUND = 2e-3  # the band is that of exact arithmetic and rounded to four digits


def random(*shape, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


def with_values(M, N, values, dtype=torch.float64):
    """A matrix of known SVD: W, its singular values, V^T and their product."""
    W = torch.linalg.qr(random(M, len(values), seed=1, dtype=torch.float64))[0]
    V = torch.linalg.qr(random(N, len(values), seed=2, dtype=torch.float64))[0]
    return W, V.mT, (W * values @ V.mT).to(dtype)


def parameters(shapes=SHAPES, seed=0, dtype=torch.float32):
    return [nn.Parameter(random(*s, seed=seed + i, dtype=dtype)) for i, s in enumerate(shapes)]


def twins(params):
    return [nn.Parameter(p.detach().clone()) for p in params]


def run(steps, *pairs, start=0):
    """Steps each (optimizer, params) of the pairs with the same gradients."""
    for step in range(start, start + steps):
        for optimizer, params in pairs:
            for i, p in enumerate(params):
                p.grad = random(*p.shape, seed=1000 * step + i, dtype=p.dtype)
            optimizer.step()


# orthogonalise


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-11), (torch.float32, 2e-3)])
@pytest.mark.parametrize("shape", [(40, 40), (90, 40), (40, 90)])
def test_orthogonalise_keeps_vectors_and_moves_values_into_the_band(shape, dtype, bound):
    values = torch.logspace(0, -2.2, 40, dtype=torch.float64)
    W, Vt, matrix = with_values(*shape, values, dtype)
    after = orthogonalise(matrix).double()
    inside = W.mT @ after @ Vt.mT
    moved = inside.diagonal()
    assert (values / values.norm()).min() > 0.0016  # where the band begins
    assert LOW - ROUND <= moved.min() and moved.max() <= HIGH + ROUND
    assert (W * moved @ Vt - after).abs().max() < bound
    # each value by itself went through the polynomial
    wanted = torch.tensor(
        [module.polynomial(x, 5, module.COEFFICIENTS) for x in (values / values.norm()).tolist()]
    )
    torch.testing.assert_close(moved, wanted.double(), atol=max(bound, 1e-6), rtol=0)


def test_band_is_the_polynomials_extremes_and_holds_its_own_image():
    a, b, c = module.COEFFICIENTS
    x2 = [(-3 * b + s * math.sqrt(9 * b * b - 20 * a * c)) / (10 * c) for s in (-1, 1)]  # p' = 0
    high, low = (module.polynomial(math.sqrt(x), 1, module.COEFFICIENTS) for x in x2)
    assert (low, high) == pytest.approx(module.BAND, abs=5e-5)
    inside = [LOW + (HIGH - LOW) * i / 1000 for i in range(1001)]
    after = [module.polynomial(x, 1, module.COEFFICIENTS) for x in inside]
    assert LOW - 1e-4 < min(after) and max(after) < HIGH + 1e-4
    start = [0.0016 * (1 / 0.0016) ** (i / 5000) for i in range(5001)]
    five = [module.polynomial(x, 5, module.COEFFICIENTS) for x in start]
    assert LOW - ROUND < min(five) and max(five) < HIGH + ROUND
    assert module.polynomial(0.0013, 5, module.COEFFICIENTS) < 0.62  # below it is not reached


@pytest.mark.parametrize("shape", [(20, 20), (50, 20), (20, 50)])
def test_orthogonalise_with_the_exact_coefficients_is_the_polar_factor(shape):
    matrix = random(*shape, dtype=torch.float64)
    W, _, Vt = torch.linalg.svd(matrix, full_matrices=False)
    exact = orthogonalise(matrix, steps=30, coefficients=module.EXACT)
    torch.testing.assert_close(exact, W @ Vt, atol=1e-10, rtol=0)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(-15, 40), st.integers(0, 99))
def test_orthogonalise_ignores_scale_and_sign(M, N, exponent, seed):
    matrix = random(M, N, seed=seed, dtype=torch.float64)
    matrix /= matrix.norm()  # eps = 1e-7 is about 2^-23
    wanted = orthogonalise(matrix)
    torch.testing.assert_close(orthogonalise(2.0**exponent * matrix), wanted, atol=1e-12, rtol=0)
    assert torch.equal(orthogonalise(-matrix), -wanted)


@pytest.mark.parametrize("shape", [(9, 9), (30, 9), (1, 5), (5, 1), (1, 1)])
def test_orthogonalise_of_the_transpose_is_the_transpose(shape):
    matrix = random(*shape, dtype=torch.float64)
    torch.testing.assert_close(
        orthogonalise(matrix.mT), orthogonalise(matrix).mT, atol=1e-12, rtol=0
    )


def test_orthogonalise_turns_with_the_matrix():
    """Rotating inputs and outputs rotates the result; elementwise AdamW cannot do that."""
    matrix = random(12, 8, dtype=torch.float64)
    P, R = (torch.linalg.qr(random(n, n, seed=n, dtype=torch.float64))[0] for n in (12, 8))
    turned = orthogonalise(P @ matrix @ R)
    torch.testing.assert_close(turned, P @ orthogonalise(matrix) @ R, atol=1e-11, rtol=0)


def test_orthogonalise_takes_each_matrix_of_a_batch_by_itself():
    batch = random(2, 3, 8, 5)
    batch[0, 1] *= 1e4
    alone = torch.stack([torch.stack([orthogonalise(m) for m in row]) for row in batch])
    torch.testing.assert_close(orthogonalise(batch), alone, atol=1e-5, rtol=0)


def test_orthogonalise_leaves_zero_at_zero_and_does_not_touch_its_input():
    batch = torch.zeros(2, 6, 4)
    batch[1] = random(6, 4)
    before = batch.clone()
    after = orthogonalise(batch)
    assert torch.equal(after[0], torch.zeros(6, 4)) and after[1].norm() > 1
    assert torch.equal(batch, before)
    assert orthogonalise(1e-14 * random(6, 4)).abs().max() < 1e-3  # below eps: noise stays small
    a, _, _ = module.COEFFICIENTS
    assert a**5 == pytest.approx(485, abs=0.5)  # what a tiny matrix is multiplied by
    tiny = 1e-12 * random(6, 4)
    torch.testing.assert_close(orthogonalise(tiny), tiny / module.EPS * a**5, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_orthogonalise_returns_the_dtype_it_was_given(dtype):
    after = orthogonalise(random(10, 6, dtype=dtype))
    assert after.dtype == dtype
    values = torch.linalg.svdvals(after.double())
    assert LOW - 0.01 < values.min() and values.max() < HIGH + 0.01  # bfloat16 keeps 8 bits


def test_orthogonalise_refuses_a_vector():
    with pytest.raises(ValueError, match=r"shape \(3,\) must have two or more axes"):
        orthogonalise(torch.ones(3))


# against torch, which computes in bfloat16


@pytest.fixture
def torch_in_float32(monkeypatch):
    """torch's own Newton-Schulz without its rounding to bfloat16, to compare more digits."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x.clone())


needs_torch_muon = pytest.mark.skipif(
    not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9"
)
VARIANTS = [
    {},
    {"lr": 0.02, "weight_decay": 0.0, "adjust_lr_fn": "original"},
    {"lr": 0.01, "weight_decay": 2.0, "adjust_lr_fn": "match_rms_adamw"},
    {"lr": 0.02, "momentum": 0.8, "nesterov": False},
    {"lr": 0.02, "momentum": 0.0, "ns_steps": 3, "ns_coefficients": (1.5, -0.5, 0.0)},
]


@needs_torch_muon
@pytest.mark.parametrize("values", VARIANTS)
def test_muon_follows_torch(values, torch_in_float32):
    ours = parameters()
    theirs = twins(ours)
    run(20, (Muon(ours, **values), ours), (torch.optim.Muon(theirs, **values), theirs))
    for a, b, start in zip(ours, theirs, parameters()):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)
        assert (a - start).abs().max() > 2e-3  # they did move


@needs_torch_muon
def test_muon_follows_torch_in_its_bfloat16_to_8_bits():
    ours = parameters()
    theirs = twins(ours)
    values = {"lr": 1.0, "weight_decay": 0.0}
    run(1, (Muon(ours, **values), ours), (torch.optim.Muon(theirs, **values), theirs))
    for a, b in zip(ours, theirs):
        assert (a - b).norm() < 0.05 * math.sqrt(max(a.shape))  # the step's norm is about that root


@needs_torch_muon
def test_state_dict_moves_to_torch_and_back(torch_in_float32):
    wanted, params = parameters(), parameters()
    values = {"lr": 0.02, "adjust_lr_fn": "match_rms_adamw"}
    run(9, (torch.optim.Muon(wanted, **values), wanted))
    first, third = torch.optim.Muon(params, **values), torch.optim.Muon(params)
    second = Muon(params)  # its values come with the state
    run(3, (first, params))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(3, (second, params), start=3)
    third.load_state_dict(copy.deepcopy(second.state_dict()))
    run(3, (third, params), start=6)
    for a, b in zip(params, wanted):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


# closed forms


@pytest.mark.parametrize("adjust_lr_fn", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(32, 32), (96, 32), (32, 96)])
def test_one_step_has_the_derived_size(shape, adjust_lr_fn):
    """Singular values 1 give entries of RMS 1 / sqrt(max(M, N)); the exact constants make them."""
    w = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    w.grad = random(*shape, dtype=torch.float64)
    exact = {"ns_coefficients": module.EXACT, "ns_steps": 30}
    Muon([w], lr=0.5, weight_decay=0.0, adjust_lr_fn=adjust_lr_fn, **exact).step()
    M, N = shape
    rms = {
        "match_rms_adamw": 0.2,
        "original": math.sqrt(max(1, M / N)) / math.sqrt(max(M, N)),
    }[adjust_lr_fn or "original"]
    assert w.detach().square().mean().sqrt().item() == pytest.approx(0.5 * rms, rel=1e-9)


def test_second_step_by_hand():
    """1 x 1 matrices: g = 3, then -1, with mu 0.5: B = 1.5, then 0.25; Nesterov looks at -0.375."""
    exact = {"ns_coefficients": module.EXACT, "weight_decay": 0.0, "momentum": 0.5}
    for nesterov, wanted in ((True, -1.0 + 1.0), (False, -1.0 - 1.0)):
        w = nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))
        optimizer = Muon([w], lr=1.0, nesterov=nesterov, **exact)
        for g in (3.0, -1.0):
            w.grad = torch.full((1, 1), g, dtype=torch.float64)
            optimizer.step()
        assert optimizer.state[w]["momentum_buffer"].item() == 0.25
        assert w.item() == pytest.approx(wanted)


def test_decay_with_zero_gradient_shrinks_geometrically():
    w = nn.Parameter(random(5, 3, dtype=torch.float64))
    wanted = w.detach().clone() * (1 - 1e-2 * 0.3) ** 100
    optimizer = Muon([w], lr=1e-2, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    for _ in range(100):
        w.grad = torch.zeros_like(w)
        optimizer.step()
    torch.testing.assert_close(w.detach(), wanted, atol=0, rtol=1e-12)


# behaviour


def test_stacks_of_any_size_give_the_same(monkeypatch):
    one = parameters([(6, 4)] * 5)
    run(3, (Muon(one), one))
    for limit in (1, 50, 10**6):  # alone, in pairs, all at once
        monkeypatch.setattr(module, "STACKED", limit)
        two = parameters([(6, 4)] * 5)
        run(3, (Muon(two), two))
        for a, b in zip(one, two):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_state_dict_survives_a_file_and_goes_on_bit_identically():
    params = parameters()
    optimizer = Muon(params, lr=0.02, adjust_lr_fn="match_rms_adamw", weight_decay=0.2)
    run(3, (optimizer, params))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = twins(params)
    other = Muon(again)  # its values come with the state
    other.load_state_dict(torch.load(file, weights_only=True))
    run(3, (optimizer, params), (other, again), start=3)
    assert all(torch.equal(a, b) for a, b in zip(params, again))


def test_learning_rate_is_read_at_each_step():
    params = parameters()
    optimizer = Muon(params, lr=0.1)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    run(2, (optimizer, params))
    assert all(torch.equal(a, b) for a, b in zip(params, parameters()))


def test_parameters_without_gradient_are_left_alone():
    moved, still = parameters([(4, 4), (4, 4)])
    before = still.detach().clone()
    moved.grad = random(4, 4)
    optimizer = Muon([moved, still], weight_decay=0.5)
    optimizer.step()
    assert torch.equal(still, before) and still not in optimizer.state and moved in optimizer.state


def test_closure_is_called_with_gradients_on():
    w = nn.Parameter(random(4, 4))
    optimizer = Muon([w], lr=0.05, weight_decay=0.0)

    def closure():
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(60)]
    assert losses[-1] < 0.1 * losses[0]


def test_split_parameters_takes_hidden_matrices_only():
    gpt = importlib.import_module("03_gpt")
    model = gpt.GPT(gpt.PRESETS["0.5m"])
    model.blocks[0].mlp.down.weight.requires_grad = False
    hidden, rest = split_parameters(model.named_parameters())
    assert [name for name, _ in hidden] == [
        f"blocks.{i}.{name}.weight"
        for i in (0, 1)
        for name in ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")
        if (i, name) != (0, "mlp.down")
    ]
    names = [name for name, _ in rest]
    assert "embedding.weight" in names and "norm.weight" in names
    assert len(hidden) + len(rest) + 1 == len(list(model.named_parameters()))
    Muon(hidden)


@pytest.mark.parametrize("bad", [(3,), (2, 3, 4), ()])
def test_muon_refuses_what_is_no_matrix_by_name(bad):
    good, other = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(bad))
    with pytest.raises(ValueError, match="parameter layer.gain is torch.float32 of shape"):
        Muon([("layer.weight", good), ("layer.gain", other)])
    with pytest.raises(ValueError, match="parameter number 1 is"):
        Muon([good, other])
    with pytest.raises(ValueError, match="complex64"):
        Muon([nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))])


@pytest.mark.parametrize(
    "values, word",
    [
        ({"lr": -1e-3}, "lr=-0.001 must be"),
        ({"lr": math.nan}, "lr=nan"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"momentum": 1.0}, r"momentum=1.0 must be in \[0, 1\)"),
        ({"adjust_lr_fn": "none"}, "'none' must be one of 'original', 'match_rms_adamw'"),
    ],
)
def test_muon_names_wrong_values(values, word):
    with pytest.raises(ValueError, match=word):
        Muon(parameters(), **values)


def test_muon_beats_adamw_where_inputs_are_steep():
    """One seed of the demo's claim."""
    muon, adamw = (module.learn(make, 0.064, 3, 1.5) for make in (module.muon, module.adamw))
    assert muon < 0.1 * adamw


def test_file_runs_alone(tmp_path):
    source = pathlib.Path(module.__file__)
    shutil.copy(source, tmp_path)
    code = "import importlib; importlib.import_module('10_muon')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": ""},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "values, word",
    [
        ({"eps": 0.0}, "eps=0.0"),
        ({"ns_steps": 0}, "ns_steps=0"),
        ({"ns_steps": 200}, "from 1 to 99"),
        ({"ns_coefficients": (1.0, 2.0)}, "three numbers"),
    ],
)
def test_muon_names_wrong_constants(values, word):
    with pytest.raises(ValueError, match=word):
        module.Muon([nn.Parameter(torch.ones(2, 3))], **values)


def test_a_refused_group_leaves_the_optimizer_as_it_was():
    w = nn.Parameter(torch.ones(2, 3))
    optimizer = module.Muon([w])
    with pytest.raises(ValueError, match="must be a real"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    w.grad = torch.ones_like(w)
    optimizer.step()
    assert len(optimizer.param_groups) == 1


def test_split_parameters_takes_names_by_their_parts():
    shapes = {"lm_head.weight": (4, 4), "embed_tokens.weight": (4, 4), "verdict.weight": (1, 4)}
    shapes |= {"block.multihead_attn.weight": (4, 4), "block.bias": (4,)}
    named = [(name, nn.Parameter(torch.zeros(shape))) for name, shape in shapes.items()]
    hidden, _ = module.split_parameters(named)
    assert [name for name, _ in hidden] == ["block.multihead_attn.weight"]


def test_orthogonalise_refuses_integers():
    with pytest.raises(ValueError, match="torch.int64"):
        module.orthogonalise(torch.ones(2, 2, dtype=torch.int64))
