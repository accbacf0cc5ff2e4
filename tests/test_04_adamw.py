"""Tests of 04_adamw.py: against torch.optim.AdamW, by closed form, and by property.

Run: python -m pytest tests/test_04_adamw.py
"""

import copy
import importlib
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

adamw = importlib.import_module("04_adamw")
AdamW = adamw.AdamW

SHAPES = [(17, 33), (33,), (1,), (), (3, 1, 5, 2), (0,), (0, 4), (1023,)]
FORMS = ["reference", "foreach"]


def parameters(shapes=SHAPES, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=g, dtype=dtype) * 0.5) for shape in shapes]


def twins(params):
    return [nn.Parameter(p.detach().clone()) for p in params]


def set_gradients(seed, *lists, scale=1.0):
    """The same random gradients for each of the lists of parameters."""
    for params in lists:
        g = torch.Generator().manual_seed(seed)
        for p in params:
            noise = torch.randn(p.shape, generator=g, dtype=torch.float64)
            p.grad = (scale * (noise + 0.3)).to(p.dtype)


def run(steps, *pairs, start=0):
    """Steps each (optimizer, params) of the pairs with the same gradients."""
    for step in range(start, start + steps):
        for optimizer, params in pairs:
            set_gradients(step, params)
            optimizer.step()


def assert_same(ours, theirs, bound):
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=bound, rtol=bound)


# against torch


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1},
        {"lr": 3e-3, "betas": (0.0, 0.99), "eps": 1e-3},
        {"lr": 3e-3, "betas": (0.8, 0.0), "weight_decay": 0.0},
        {"lr": 1e-3, "eps": 1e-15, "weight_decay": 1.0},
    ],
)
def test_adamw_follows_torch(form, dtype, bound, values):
    ours = parameters(dtype=dtype)
    theirs = twins(ours)
    run(
        100,
        (AdamW(ours, **values, implementation=form), ours),
        (torch.optim.AdamW(theirs, **values), theirs),
    )
    assert (ours[0] - parameters(dtype=dtype)[0]).abs().mean() > 1e-2  # they did move
    assert_same(ours, theirs, bound)


def assert_triton_follows_torch(device):
    ours = [p.detach().to(device).requires_grad_() for p in parameters()]
    theirs = twins(ours)
    values = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    run(
        20,
        (AdamW(ours, **values, implementation="triton"), ours),
        (torch.optim.AdamW(theirs, **values), theirs),
    )
    assert_same(ours, theirs, 1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where a GPU is")
def test_adamw_triton_follows_torch_in_the_interpreter():
    assert_triton_follows_torch("cpu")


@pytest.mark.gpu
def test_adamw_triton_follows_torch_on_a_gpu():
    assert_triton_follows_torch("cuda")


def test_adamw_takes_the_kernel_for_plain_tensors_only():
    """A subclass may be a part of a tensor, as FSDP's DTensor is, whose address means nothing."""

    class Part(torch.Tensor):
        pass

    gpu = torch.device("cuda")
    p, x = torch.nn.Parameter(torch.zeros(4)), torch.zeros(4)
    optimizer = AdamW([p])
    assert optimizer._takes_triton(gpu, [(p, x, x, x)])
    assert not optimizer._takes_triton(torch.device("cpu"), [(p, x, x, x)])
    assert not optimizer._takes_triton(gpu, [(p, x, x, x), (p, x.as_subclass(Part), x, x)])


def test_adamw_without_kernels_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(adamw, "kernel", None)
    with pytest.raises(ImportError, match="kernels/adamw.py"):
        AdamW(parameters(), implementation="triton")
    run(1, (AdamW(ours := parameters()), ours))


@pytest.mark.parametrize("form", FORMS)
def test_adamw_follows_torch_when_groups_and_rates_change(form):
    ours = parameters()
    theirs = twins(ours)
    pairs = []
    for cls, params, extra in (
        (AdamW, ours, {"implementation": form}),
        (torch.optim.AdamW, theirs, {}),
    ):
        groups = [
            {"params": params[:2], "weight_decay": 0.5},
            {"params": params[2:], "lr": 1e-2, "betas": (0.5, 0.9)},
        ]
        pairs.append((cls(groups, lr=1e-3, **extra), params))
    for step in range(30):
        for optimizer, _ in pairs:
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * (1 - step / 30)
        run(1, *pairs, start=step)
    assert_same(ours, theirs, 1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_adamw_follows_torch_where_gradients_come_and_go(form):
    ours = parameters([(4, 5), (6,), (7,)])
    theirs = twins(ours)
    ours_step = AdamW(ours, implementation=form, weight_decay=0.1)
    theirs_step = torch.optim.AdamW(theirs, weight_decay=0.1)
    for step in range(12):
        set_gradients(step, ours, theirs)
        for params in (ours, theirs):
            params[1].grad = None  # never one
            if step % 3:
                params[2].grad = None  # every third step: its t is its own
        ours_step.step()
        theirs_step.step()
    assert torch.equal(ours[1], parameters([(4, 5), (6,), (7,)])[1])  # no decay either
    assert ours[1] not in ours_step.state
    assert [int(ours_step.state[p]["step"]) for p in (ours[0], ours[2])] == [12, 4]
    assert_same(ours, theirs, 1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_adamw_accepts_parameters_that_are_not_contiguous(form, monkeypatch):
    monkeypatch.setattr(adamw, "CPU_BATCH", 16)
    start = torch.randn(9, 7)
    ours = [nn.Parameter(start.clone().t()), nn.Parameter(torch.randn(5, 8)[:, ::2])]
    theirs = twins(ours)
    assert not any(p.is_contiguous() for p in ours)
    run(20, (AdamW(ours, implementation=form), ours), (torch.optim.AdamW(theirs), theirs))
    assert_same(ours, theirs, 1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_moments_have_the_parameters_dtype(form):
    ours = parameters(dtype=torch.bfloat16)
    theirs = twins(ours)
    optimizer = AdamW(ours, lr=1e-2, implementation=form)
    run(10, (optimizer, ours), (torch.optim.AdamW(theirs, lr=1e-2), theirs))
    assert all(optimizer.state[p]["exp_avg"].dtype == torch.bfloat16 for p in ours)
    assert_same(ours, theirs, 0.05)  # 8 bits: 2^-8 for each of ten steps


def test_foreach_in_batches_equals_reference(monkeypatch):
    """Limits that cut tensors at odd places, share batches, and leave all whole."""
    wanted = parameters()
    run(4, (AdamW(wanted, implementation="reference"), wanted))
    for limit in (1, 7, 100, 10**6):
        monkeypatch.setattr(adamw, "CPU_BATCH", limit)
        ours = parameters()
        run(4, (AdamW(ours, implementation="foreach"), ours))
        assert_same(ours, wanted, 1e-6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=8), st.integers(1, 50))
def test_in_batches_covers_every_element_once(sizes, limit):
    rows = [(torch.zeros(n), torch.zeros(n)) for n in sizes]
    for first, second in adamw.in_batches(rows, limit):
        assert sum(x.numel() for x in first) <= limit
        for x in (*first, *second):
            x += 1
    assert all(torch.equal(x, torch.ones_like(x)) for row in rows for x in row)


def test_foreach_keeps_its_temporary_small():
    """One tensor of 2^21 elements; what a step allocates must stay near CPU_BATCH elements."""
    p = nn.Parameter(torch.ones(2**21))
    p.grad = torch.ones_like(p)
    optimizer = AdamW([p])
    optimizer.step()
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer.step()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest <= 4 * adamw.CPU_BATCH


def test_auto_is_foreach():
    one, two = parameters(), parameters()
    run(10, (AdamW(one), one), (AdamW(two, implementation="foreach"), two))
    assert all(torch.equal(a, b) for a, b in zip(one, two))


# closed forms


@pytest.mark.parametrize("form", FORMS)
def test_first_step_is_lr_times_sign(form):
    p = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    p.grad = torch.tensor([1e-6, -1.0, 1e6], dtype=torch.float64)
    AdamW([p], lr=0.1, weight_decay=0.5, implementation=form).step()
    size = p.grad.abs() / (p.grad.abs() + 1e-8)
    wanted = torch.tensor([1.0, -2.0, 3.0]).double() * (1 - 0.1 * 0.5) - 0.1 * p.grad.sign() * size
    torch.testing.assert_close(p.detach(), wanted, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_second_step_by_hand(form):
    """g = 3, then -1, with beta 0.5 and 0.75: m_hat = 1/3, v_hat = 31/7."""
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = AdamW([p], 1.0, (0.5, 0.75), eps=0.0, weight_decay=0.0, implementation=form)
    for g in (3.0, -1.0):
        p.grad = torch.tensor([g], dtype=torch.float64)
        optimizer.step()
    m_hat = (0.5 * 0.5 * 3 - 0.5 * 1) / (1 - 0.25)
    v_hat = (0.75 * 0.25 * 9 + 0.25 * 1) / (1 - 0.75**2)
    assert m_hat == pytest.approx(1 / 3) and v_hat == pytest.approx(31 / 7)
    assert p.item() == pytest.approx(-1 - m_hat / math.sqrt(v_hat), abs=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_decay_with_zero_gradient_shrinks_geometrically(form):
    p = nn.Parameter(torch.tensor([1.0, -5.0], dtype=torch.float64))
    optimizer = AdamW([p], lr=1e-2, weight_decay=0.3, implementation=form)
    for _ in range(200):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    wanted = torch.tensor([1.0, -5.0], dtype=torch.float64) * (1 - 1e-2 * 0.3) ** 200
    torch.testing.assert_close(p.detach(), wanted, atol=0, rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(FORMS), st.integers(-60, 60), st.integers(0, 1000))
def test_steps_do_not_depend_on_the_gradients_scale(form, exponent, seed):
    """With eps = 0, gradients times any power of two give the same weights."""
    one, two = parameters([(5, 3)], torch.float64), parameters([(5, 3)], torch.float64)
    optimizers = [AdamW(p, 0.01, eps=0.0, implementation=form) for p in (one, two)]
    for step in range(5):
        set_gradients(seed + step, one)
        set_gradients(seed + step, two, scale=2.0**exponent)
        for optimizer in optimizers:
            optimizer.step()
    assert_same(one, two, 1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_lr_zero_leaves_parameters(form):
    params = parameters()
    run(3, (AdamW(params, lr=0.0, weight_decay=0.5, implementation=form), params))
    assert all(torch.equal(a, b) for a, b in zip(params, parameters()))


def test_weight_left_follows_the_theory_of_both_decays():
    torch.manual_seed(0)
    scales = torch.tensor([1.0, 20.0])
    decoupled = adamw.weight_left(scales, 0.1, True, lr=5e-3, steps=400)
    l2 = adamw.weight_left(scales, 0.1, False, lr=5e-3, steps=400)
    wanted = torch.exp(-0.2 / scales)  # lr * decay * n = 0.2, over the gradient's size
    # noise: lr * sqrt(n / copies) = 0.0022
    torch.testing.assert_close(decoupled, torch.full((2,), math.exp(-0.2)), atol=0.01, rtol=0)
    torch.testing.assert_close(l2, wanted, atol=0.01, rtol=0)


# state


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fused", [False, True])
def test_state_dict_moves_to_torch_and_back(form, fused):
    """Torch all the way equals torch, then ours, then torch again."""
    values = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    wanted = parameters()
    run(30, (torch.optim.AdamW(wanted, **values), wanted))

    params = parameters()
    first = torch.optim.AdamW(params, **values, fused=fused)
    second = AdamW(params, implementation=form)  # its values come with the state
    third = torch.optim.AdamW(params)
    run(10, (first, params))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(10, (second, params), start=10)
    third.load_state_dict(copy.deepcopy(second.state_dict()))
    run(10, (third, params), start=20)
    assert second.param_groups[0]["lr"] == third.param_groups[0]["lr"] == 1e-2
    assert_same(params, wanted, 1e-6)


def test_state_dict_has_the_layout_of_torch():
    ours, theirs = parameters(), parameters()
    pairs = (AdamW(ours), ours), (torch.optim.AdamW(theirs), theirs)
    run(3, *pairs)
    a, b = (optimizer.state_dict() for optimizer, _ in pairs)
    assert a["state"].keys() == b["state"].keys()
    for i, entry in b["state"].items():
        assert a["state"][i].keys() == entry.keys()
        for name, value in entry.items():
            mine = a["state"][i][name]
            assert (mine.dtype, mine.shape, mine.device) == (value.dtype, value.shape, value.device)
    for mine, group in zip(a["param_groups"], b["param_groups"]):
        assert mine.items() <= group.items()  # torch's extras have defaults there


def test_state_dict_survives_a_file_read_with_weights_only():
    params = parameters()
    optimizer = AdamW(params)
    run(3, (optimizer, params))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = twins(params)
    other = AdamW(again)
    other.load_state_dict(torch.load(file, weights_only=True))
    run(3, (optimizer, params), (other, again), start=3)
    assert all(torch.equal(a, b) for a, b in zip(params, again))


def test_load_state_dict_makes_step_a_float32_tensor():
    params = parameters()
    optimizer = AdamW(params)
    run(3, (optimizer, params))
    state_dict = optimizer.state_dict()
    for entry in state_dict["state"].values():
        entry["step"] = 3  # what older versions of torch wrote
    other = AdamW(twins(params))
    other.load_state_dict(state_dict)
    for entry in other.state.values():
        assert entry["step"].dtype == torch.float32 and entry["step"] == 3


def test_load_state_dict_keeps_the_chosen_implementation():
    params = parameters()
    optimizer = AdamW(params, implementation="reference")
    optimizer.load_state_dict(AdamW(parameters()).state_dict())
    assert optimizer.implementation == "reference"


@pytest.mark.parametrize("name", ["amsgrad", "maximize"])
def test_load_state_dict_refuses_what_is_not_done_here(name):
    theirs = torch.optim.AdamW(parameters(), **{name: True})
    with pytest.raises(ValueError, match=f"{name}=True"):
        AdamW(parameters()).load_state_dict(theirs.state_dict())


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))],
    ids=["deepcopy", "pickle"],
)
def test_optimizer_and_its_parameters_survive_a_copy(duplicate):
    params = parameters()
    optimizer = AdamW(params, implementation="reference")
    run(3, (optimizer, params))
    optimizer2, params2 = duplicate((optimizer, params))
    assert optimizer2.implementation == "reference"
    run(3, (optimizer, params), (optimizer2, params2), start=3)
    assert all(torch.equal(a, b) and a is not b for a, b in zip(params, params2))
    assert int(optimizer2.state[params2[0]]["step"]) == 6


# behaviour


@pytest.mark.parametrize("form", FORMS)
def test_closure_is_called_with_gradients_on(form):
    torch.manual_seed(0)
    x, wanted = torch.randn(64, 3), torch.tensor([1.0, -2.0, 0.5])
    w = nn.Parameter(torch.zeros(3))
    optimizer = AdamW([w], lr=0.05, weight_decay=0.0, implementation=form)

    def closure():
        optimizer.zero_grad()
        loss = F.mse_loss(x @ w, x @ wanted)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(300)]
    assert losses[0] > 1 and losses[-1] < 1e-4
    assert optimizer.step() is None


def test_param_groups_decay_matrices_only():
    model = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 11))
    model[3].weight = model[0].weight = nn.Parameter(torch.randn(11, 6))  # tied: comes once
    model[1].bias.requires_grad = False
    matrices, rest = adamw.param_groups(model.named_parameters(), 0.25)
    assert (matrices["weight_decay"], rest["weight_decay"]) == (0.25, 0.0)
    assert {id(p) for p in matrices["params"]} == {id(model[0].weight), id(model[1].weight)}
    assert {id(p) for p in rest["params"]} == {
        id(p) for p in (*model[2].parameters(), model[3].bias)
    }
    optimizer = AdamW(adamw.param_groups(model.named_parameters(), 0.25), lr=1.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = copy.deepcopy(model)
    optimizer.step()
    torch.testing.assert_close(model[1].weight, 0.75 * before[1].weight)
    assert torch.equal(model[2].weight, before[2].weight)


def test_param_groups_may_be_empty():
    matrices, rest = adamw.param_groups([("gain", nn.Parameter(torch.ones(3)))], 0.1)
    assert matrices["params"] == [] and len(rest["params"]) == 1
    AdamW([matrices, rest]).step()


@pytest.mark.parametrize(
    "values, word",
    [
        ({"lr": -1e-3}, "lr=-0.001 must be"),
        ({"lr": math.nan}, "lr=nan"),
        ({"lr": math.inf}, "lr=inf"),
        ({"eps": -1.0}, "eps=-1.0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"betas": (1.0, 0.9)}, r"betas=\(1.0, 0.9\)"),
        ({"betas": (0.9, -0.1)}, r"\[0, 1\)"),
        ({"implementation": "fast"}, "'fast' must be one of 'auto', 'reference', 'foreach', 't"),
    ],
)
def test_adamw_names_wrong_values(values, word):
    with pytest.raises(ValueError, match=word):
        AdamW(parameters(), **values)


def test_adamw_names_a_wrong_value_of_a_group():
    with pytest.raises(ValueError, match="weight_decay=-1"):
        AdamW([{"params": parameters(), "weight_decay": -1}])
    with pytest.raises(ValueError, match="parameter"):
        params = parameters()
        AdamW([{"params": params}, {"params": params}])


def test_adamw_refuses_complex_parameters():
    with pytest.raises(ValueError, match="complex64 and must be real"):
        AdamW([nn.Parameter(torch.zeros(3, dtype=torch.complex64))])
    optimizer = AdamW([nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match="complex64 and must be real"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3) + 1j)]})
    assert len(optimizer.param_groups) == 1


def test_adamw_refuses_what_adam_with_l2_saved():
    p = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="part of the gradient"):
        AdamW([p]).load_state_dict(torch.optim.Adam([p], weight_decay=0.1).state_dict())
    with pytest.raises(ValueError, match="two numbers"):
        AdamW([p], betas=(0.9,))


@pytest.mark.parametrize("form", FORMS)
def test_adamw_refuses_sparse_gradients_and_changes_nothing(form):
    table, w = nn.Embedding(5, 3, sparse=True), nn.Parameter(torch.ones(3))
    (table(torch.tensor([1, 2])) * w).sum().backward()
    optimizer = AdamW([w, table.weight], implementation=form)
    with pytest.raises(ValueError, match="must be dense"):
        optimizer.step()
    assert torch.equal(w, torch.ones(3)) and not optimizer.state
