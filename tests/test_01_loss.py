"""Tests of 01_loss.py: against torch and torchvision's formula, by closed form, and by property.

Run: python -m pytest tests/test_01_loss.py
"""

import importlib
import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

losses = importlib.import_module("01_loss")
cross_entropy, linear_cross_entropy = losses.cross_entropy, losses.linear_cross_entropy
bce, focal_loss = losses.binary_cross_entropy_with_logits, losses.focal_loss

DTYPES = [(torch.float32, 1e-5), (torch.float64, 1e-10)]


@pytest.fixture(autouse=True)
def same_start():
    torch.manual_seed(0)


def batch(N, V, dtype=torch.float64, ignored=0.3, scale=3.0):
    """Random logits (N, V) that want a gradient, and targets (N,), some of them ignored."""
    targets = torch.randint(V, (N,))
    targets[torch.rand(N) < ignored] = -100
    targets[0] = V - 1  # never all of them
    return (scale * torch.randn(N, V, dtype=dtype)).requires_grad_(), targets


def value_and_gradients(loss, *inputs):
    """The loss and its gradients under an uneven upstream gradient."""
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    return loss.detach(), *torch.autograd.grad(loss, inputs, upstream)


def assert_same(ours, wanted, bound):
    for a, b in zip(ours, wanted):
        torch.testing.assert_close(a, b, atol=bound, rtol=bound)


# log_softmax


@pytest.mark.parametrize("dtype, bound", DTYPES)
def test_log_softmax_matches_torch(dtype, bound):
    x = (5 * torch.randn(3, 7, 101, dtype=dtype)).requires_grad_()
    assert_same(
        value_and_gradients(losses.log_softmax(x), x),
        value_and_gradients(F.log_softmax(x, -1), x),
        bound,
    )


def test_log_softmax_survives_what_overflows():
    x = torch.tensor([[1e4, 0.0, -1e4], [-math.inf, 3.0, 3.0]], requires_grad=True)
    y = losses.log_softmax(x)
    half = -math.log(2)
    wanted = torch.tensor([[0.0, -1e4, -2e4], [-math.inf, half, half]])
    torch.testing.assert_close(y, wanted)
    (g,) = torch.autograd.grad(y[:, 1].sum(), x)
    torch.testing.assert_close(g, torch.tensor([[-1.0, 1.0, 0.0], [0.0, 0.5, -0.5]]))


def test_log_softmax_of_bfloat16_is_the_rounded_float32_result():
    x = torch.randn(5, 300).bfloat16()
    assert torch.equal(losses.log_softmax(x), losses.log_softmax(x.float()).bfloat16())


# cross_entropy


@pytest.mark.parametrize("dtype, bound", DTYPES)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_cross_entropy_matches_torch(
    dtype, bound, reduction, label_smoothing, weighted, ignore_index
):
    logits, targets = batch(50, 11, dtype)
    targets[targets == -100] = ignore_index
    options = {
        "weight": 2 * torch.rand(11, dtype=dtype) if weighted else None,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        "ignore_index": ignore_index,
    }
    scale = 50 if reduction == "sum" else 1  # the bound is for a mean
    assert_same(
        value_and_gradients(cross_entropy(logits, targets, **options), logits),
        value_and_gradients(F.cross_entropy(logits, targets, **options), logits),
        bound * scale,
    )


@settings(max_examples=40, deadline=None)
@given(
    lead=st.sampled_from([(), (1,), (7,), (1023,), (2, 5), (3, 1, 7), (0,)]),
    V=st.sampled_from([1, 2, 7, 64, 1023]),
    seed=st.integers(0, 2**31),
)
def test_cross_entropy_takes_any_shape(lead, V, seed):
    torch.manual_seed(seed)
    logits = torch.randn(*lead, V, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(V, lead)
    ours = cross_entropy(logits, targets, reduction="none")
    assert ours.shape == targets.shape
    wanted = F.cross_entropy(logits.reshape(-1, V), targets.reshape(-1), reduction="none")
    assert_same(
        value_and_gradients(ours, logits),
        value_and_gradients(wanted.reshape(lead), logits),
        1e-10,
    )


def test_cross_entropy_class_axis_is_last_where_torch_has_it_second():
    logits = torch.randn(2, 5, 7, dtype=torch.float64)  # B, T, V
    targets = torch.randint(7, (2, 5))
    wanted = F.cross_entropy(logits.movedim(-1, 1), targets)
    torch.testing.assert_close(cross_entropy(logits, targets), wanted)


def test_cross_entropy_takes_non_contiguous_input_and_leaves_it_alone():
    base = torch.randn(7, 6, 20, dtype=torch.float64)
    logits = base.transpose(0, 2)[::2].requires_grad_()  # (10, 6, 7)
    targets = torch.randint(7, (6, 10)).T
    before, wanted = base.clone(), F.cross_entropy(logits.movedim(-1, 1), targets)
    ours = cross_entropy(logits, targets)
    assert_same(value_and_gradients(ours, logits), value_and_gradients(wanted, logits), 1e-10)
    assert torch.equal(base, before)


def test_cross_entropy_gradients_match_their_finite_differences():
    logits, targets = batch(6, 5)
    for weight, e, z, reduction in itertools.product(
        (None, torch.rand(5, dtype=torch.float64)), (0.0, 0.2), (0.0, 0.3), ("none", "mean")
    ):
        assert gradcheck(
            lambda x, w=weight, e=e, z=z, r=reduction: cross_entropy(
                x, targets, weight=w, label_smoothing=e, z_loss=z, reduction=r
            ),
            logits,
        )


@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_z_loss_by_closed_form(weighted):
    logits, targets = batch(30, 9)
    weight = torch.rand(9, dtype=torch.float64) if weighted else None
    counted = targets != -100
    share = counted.double() if weight is None else counted * weight[targets.clamp(min=0)]
    extra = (share * logits.logsumexp(-1) ** 2).sum() / share.sum()
    wanted = F.cross_entropy(logits, targets, weight) + 0.01 * extra
    ours = cross_entropy(logits, targets, weight=weight, z_loss=0.01)
    assert_same(value_and_gradients(ours, logits), value_and_gradients(wanted, logits), 1e-10)


def test_cross_entropy_class_weight_two_is_the_token_twice():
    logits, targets = batch(20, 6, ignored=0)
    weight = torch.ones(6, dtype=torch.float64)
    weight[2] = 2
    targets[3] = 2
    twice = torch.cat((torch.arange(20), (targets == 2).nonzero().flatten()))
    ours = cross_entropy(logits, targets, weight=weight, z_loss=0.1)
    wanted = cross_entropy(logits[twice], targets[twice], z_loss=0.1)
    torch.testing.assert_close(ours, wanted)


def test_cross_entropy_known_values():
    assert cross_entropy(torch.zeros(4, 4096), torch.arange(4)).item() == pytest.approx(
        math.log(4096), abs=1e-6
    )
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
    assert cross_entropy(logits, torch.tensor([1])).item() == pytest.approx(math.log(4), abs=1e-6)
    smooth = cross_entropy(logits, torch.tensor([1]), label_smoothing=0.3)
    by_hand = 0.8 * math.log(4) + 0.1 * (math.log(2) + math.log(4)) - 0.0
    assert smooth.item() == pytest.approx(by_hand, abs=1e-6)  # q = 0.1, 0.8, 0.1


@settings(max_examples=30, deadline=None)
@given(shift=st.floats(-1e3, 1e3), smoothing=st.sampled_from([0.0, 0.1]))
def test_cross_entropy_does_not_change_with_a_constant_shift(shift, smoothing):
    logits, targets = batch(20, 33)
    one, two = (
        value_and_gradients(cross_entropy(x, targets, label_smoothing=smoothing), logits)
        for x in (logits, logits + shift)
    )
    assert_same(one, two, 1e-10)


def test_cross_entropy_follows_a_permutation_of_tokens_and_classes():
    logits, targets = batch(20, 33, ignored=0)
    tokens, classes = torch.randperm(20), torch.randperm(33)
    moved = logits.detach()[tokens][:, classes].requires_grad_()
    place = classes.argsort()  # where each class went
    loss, g = value_and_gradients(cross_entropy(logits, targets), logits)
    loss_moved, g_moved = value_and_gradients(cross_entropy(moved, place[targets[tokens]]), moved)
    assert_same((loss_moved, g_moved), (loss, g[tokens][:, classes]), 1e-12)


def test_cross_entropy_gradient_of_each_token_sums_to_zero():
    logits, targets = batch(50, 40)
    loss = cross_entropy(logits, targets, label_smoothing=0.1)
    _, g = value_and_gradients(loss, logits)
    assert g.sum(-1).abs().max() < 1e-14
    assert g[targets == -100].abs().max() == 0


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_cross_entropy_keeps_its_digits_at_large_logits(size):
    logits = (size + torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.0, 1.0]])).requires_grad_()
    targets = torch.tensor([1, 2])
    small = (logits.detach().double() - size).requires_grad_()  # exact: the offsets are binary
    ours = value_and_gradients(cross_entropy(logits, targets), logits)
    wanted = value_and_gradients(F.cross_entropy(small, targets), small)
    assert_same(ours, [x.float() for x in wanted], 1e-6)
    apart = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    loss, g = value_and_gradients(cross_entropy(apart, torch.tensor([1])), apart)
    assert loss == 1e4 and g.isfinite().all()


def test_cross_entropy_with_a_masked_vocabulary_equals_the_smaller_one():
    logits, targets = batch(20, 30)
    targets = torch.where(targets == -100, -100, targets % 25)
    weight = torch.rand(30, dtype=torch.float64)
    weight[25:] = 0  # a class that counts nothing
    targets[1] = -100
    masked = logits.detach().clone()
    masked[:, 25:] = -math.inf
    masked[1, 0] = -math.inf  # the class that an ignored token would look up
    masked.requires_grad_()
    few = masked.detach()[:, :25].clone().requires_grad_()
    ours = cross_entropy(masked, targets, weight=weight, z_loss=0.1)
    wanted = cross_entropy(few, targets, weight=weight[:25], z_loss=0.1)
    loss, g = value_and_gradients(ours, masked)
    assert_same((loss, g[:, :25]), value_and_gradients(wanted, few), 1e-12)
    assert g[:, 25:].abs().max() == 0
    smooth = cross_entropy(masked, targets, weight=weight, label_smoothing=0.1)
    assert smooth.isfinite() and value_and_gradients(smooth, masked)[1].isfinite().all()
    infinite = cross_entropy(masked, targets, label_smoothing=0.1)  # as torch, see the docstring
    assert infinite == math.inf
    assert value_and_gradients(infinite, masked)[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cross_entropy_of_half_precision_is_computed_in_float32(dtype):
    logits, targets = batch(64, 500, torch.float32)
    half = logits.detach().to(dtype).requires_grad_()
    full = half.detach().float().requires_grad_()
    loss, g = value_and_gradients(cross_entropy(half, targets), half)
    wanted, wanted_g = value_and_gradients(cross_entropy(full, targets), full)
    assert loss == wanted and loss.dtype == torch.float32
    assert g.dtype == dtype and torch.equal(g, wanted_g.to(dtype))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_all_ignored_is_zero_with_zero_gradient(reduction):
    logits, _ = batch(5, 7)
    nothing = torch.full((5,), -100)
    weight = torch.rand(7, dtype=torch.float64)
    loss = cross_entropy(logits, nothing, weight=weight, z_loss=0.1, reduction=reduction)
    assert (loss == 0).all() and (value_and_gradients(loss, logits)[1] == 0).all()
    if reduction != "none":
        head = torch.randn(9, 7, dtype=torch.float64, requires_grad=True)
        loss = linear_cross_entropy(logits, head, nothing, z_loss=0.1, reduction=reduction)
        for x in value_and_gradients(loss, logits, head):
            assert (x == 0).all()


def test_cross_entropy_without_gradient_makes_none():
    logits, targets = batch(5, 7)
    with torch.no_grad():
        assert not cross_entropy(logits, targets).requires_grad
    assert not cross_entropy(logits.detach(), targets).requires_grad


def test_no_second_derivative_is_said_clearly():
    logits, targets = batch(5, 7)
    head = torch.randn(9, 7, dtype=torch.float64, requires_grad=True)
    for loss in (cross_entropy(logits, targets), linear_cross_entropy(logits, head, targets)):
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad(loss, logits, create_graph=True)


def test_backward_twice_gives_the_same_gradient():
    logits, targets = batch(5, 7)
    head = torch.randn(9, 7, dtype=torch.float64, requires_grad=True)
    for loss in (cross_entropy(logits, targets), linear_cross_entropy(logits, head, targets)):
        one, two = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(one, two)


# linear_cross_entropy


def linear_batch(N, C, V, dtype=torch.float64):
    hidden = torch.randn(N, C, dtype=dtype, requires_grad=True)
    head = torch.randn(V, C, dtype=dtype, requires_grad=True)
    return hidden, head, batch(N, V)[1]


@pytest.mark.parametrize("dtype, bound", DTYPES)
@pytest.mark.parametrize("chunk_tokens", [1, 7, 23, 46, 1000, None])  # 46 tokens, also ragged
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linear_cross_entropy_equals_the_whole_for_any_chunk(dtype, bound, chunk_tokens, reduction):
    hidden, head, targets = linear_batch(46, 8, 31, dtype)
    options = {"label_smoothing": 0.1, "reduction": reduction}
    ours = linear_cross_entropy(hidden, head, targets, chunk_tokens=chunk_tokens, **options)
    wanted = F.cross_entropy(hidden @ head.T, targets, **options)
    assert_same(
        value_and_gradients(ours, hidden, head),
        value_and_gradients(wanted, hidden, head),
        bound * (46 if reduction == "sum" else 1),
    )


@settings(max_examples=25, deadline=None)
@given(
    lead=st.sampled_from([(), (1,), (7,), (1023,), (2, 5), (0,)]),
    V=st.sampled_from([1, 7, 129]),
    chunk_tokens=st.integers(1, 12),
    seed=st.integers(0, 2**31),
)
def test_linear_cross_entropy_takes_any_shape(lead, V, chunk_tokens, seed):
    torch.manual_seed(seed)
    hidden = torch.randn(5, *lead, dtype=torch.float64).movedim(0, -1).requires_grad_()
    head = torch.randn(5, V, dtype=torch.float64).T.requires_grad_()  # neither is contiguous
    targets = torch.randint(V, lead)
    ours = linear_cross_entropy(hidden, head, targets, chunk_tokens=chunk_tokens, z_loss=0.1)
    wanted = cross_entropy(hidden @ head.T, targets, z_loss=0.1)
    assert_same(
        value_and_gradients(ours, hidden, head), value_and_gradients(wanted, hidden, head), 1e-10
    )


def test_linear_cross_entropy_gradients_match_their_finite_differences():
    hidden, head, targets = linear_batch(7, 3, 5)

    def loss(hidden, head):
        return linear_cross_entropy(
            hidden, head, targets, chunk_tokens=3, label_smoothing=0.2, z_loss=0.1
        )

    assert gradcheck(loss, (hidden, head))
    for frozen in (0, 1):  # gradients of one of the two only
        inputs = [x.detach().requires_grad_(i != frozen) for i, x in enumerate((hidden, head))]
        assert gradcheck(loss, inputs)


def largest_tensor(N, C, V, chunk_tokens, gradient=True):
    hidden, head, targets = linear_batch(N, C, V, torch.float32)
    with losses.LargestTensor() as largest, torch.set_grad_enabled(gradient):
        loss = linear_cross_entropy(hidden, head, targets, chunk_tokens=chunk_tokens)
        if gradient:
            loss.backward()
    return largest.bytes


def test_linear_cross_entropy_memory_is_that_of_one_chunk():
    V, chunk_tokens = 512, 16
    for N in (64, 640):
        assert largest_tensor(N, 4, V, chunk_tokens) == 4 * V * chunk_tokens
    with losses.LargestTensor() as largest:  # the measure sees what is large
        cross_entropy(torch.zeros(640, V), torch.zeros(640, dtype=torch.long))
    assert largest.bytes == 4 * V * 640


def test_linear_cross_entropy_without_gradient_does_no_backward_products():
    products = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            products.extend([function] if "mm" in str(function) else [])
            return function(*args, **(kwargs or {}))

    hidden, head, targets = linear_batch(20, 4, 9)
    for enabled, wanted in ((False, 2), (True, 6)):  # per chunk: logits, d_hidden, d_weight
        products.clear()
        with Count(), torch.set_grad_enabled(enabled):
            loss = linear_cross_entropy(hidden, head, targets, chunk_tokens=10)
        assert len(products) == wanted and loss.requires_grad == enabled


def relative_error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_cross_entropy_under_autocast_is_as_exact_as_torch(dtype):
    hidden, head, targets = linear_batch(300, 32, 200, torch.float32)
    exact = value_and_gradients(F.cross_entropy(hidden @ head.T, targets), hidden, head)
    found = {}
    for name, chunk_tokens in (("ours", 64), ("torch", None)):
        with torch.autocast("cpu", dtype):
            if name == "torch":
                loss = F.cross_entropy(F.linear(hidden, head), targets)
            else:
                loss = linear_cross_entropy(hidden, head, targets, chunk_tokens=chunk_tokens)
        assert loss.dtype == torch.float32
        found[name] = value_and_gradients(loss, hidden, head)
    for ours, theirs, wanted in zip(found["ours"], found["torch"], exact):
        assert ours.dtype == torch.float32
        assert relative_error(ours, wanted) < 1.5 * relative_error(theirs, wanted) + 1e-4
        assert relative_error(ours, wanted) > 0  # the products did run in the narrow type


def test_linear_cross_entropy_under_autocast_keeps_the_softmax_in_float32():
    hidden, head, targets = linear_batch(40, 8, 50, torch.float32)
    narrow = hidden.detach().bfloat16() @ head.detach().bfloat16().T  # what autocast multiplies
    options = {"label_smoothing": 0.1, "z_loss": 0.1}
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(hidden, head, targets, chunk_tokens=16, **options)
        plain = cross_entropy(narrow, targets, **options)
    wanted = cross_entropy(narrow.double(), targets, **options)
    assert_same((ours.detach(), plain), (wanted.float(), wanted.float()), 1e-5)


def test_linear_cross_entropy_adds_up_the_weight_gradient_in_float32():
    hidden, head, targets = linear_batch(1024, 2, 3, torch.bfloat16)
    ours = linear_cross_entropy(hidden, head, targets, chunk_tokens=2)  # 512 summands
    wide = [x.detach().double().requires_grad_() for x in (hidden, head)]
    wanted = value_and_gradients(linear_cross_entropy(*wide, targets), *wide)
    found = value_and_gradients(ours, hidden, head)
    assert found[1].dtype == found[2].dtype == torch.bfloat16
    assert relative_error(found[2], wanted[2]) < 0.01  # in bfloat16 0.1: small ones are lost


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_gives_the_same_numbers(backend):
    hidden, head, targets = linear_batch(22, 8, 30, torch.float32)

    def by_parts(hidden, head, targets):
        return cross_entropy(hidden @ head.T, targets, label_smoothing=0.1, z_loss=0.1)

    def in_one(hidden, head, targets):
        with torch.autocast("cpu", torch.bfloat16):
            h = (hidden * 2).unflatten(0, (2, 11))
            y = targets.unflatten(0, (2, 11))
            return linear_cross_entropy(h, head, y, chunk_tokens=8, reduction="sum") / 3

    for function in (by_parts, in_one):
        compiled = torch.compile(function, backend=backend)
        assert_same(
            value_and_gradients(compiled(hidden, head, targets), hidden, head),
            value_and_gradients(function(hidden, head, targets), hidden, head),
            1e-6,
        )


# the two-class losses


@pytest.mark.parametrize("dtype, bound", DTYPES)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_binary_cross_entropy_matches_torch(dtype, bound, reduction, weighted):
    x = (4 * torch.randn(7, 5, dtype=dtype)).requires_grad_()
    y = torch.rand(7, 5, dtype=dtype)
    y[:3] = y[:3].round()
    options = {"reduction": reduction}
    if weighted:
        options["weight"] = torch.rand(7, 1, dtype=dtype)
        options["pos_weight"] = 3 * torch.rand(5, dtype=dtype)
    assert_same(
        value_and_gradients(bce(x, y, **options), x),
        value_and_gradients(F.binary_cross_entropy_with_logits(x, y, **options), x),
        bound * 35,
    )


def test_two_class_gradients_match_their_finite_differences():
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    y = torch.randint(2, (3, 7)).double()
    w = torch.rand(7, dtype=torch.float64)
    assert gradcheck(lambda x: bce(x, y, w, pos_weight=w, reduction="none"), x)
    for gamma, alpha in ((0.0, None), (0.5, 0.25), (2.0, 0.25), (5.0, 0.9)):
        assert gradcheck(lambda x, g=gamma, a=alpha: focal_loss(x, y, g, a), x)


def test_two_class_losses_are_stable_at_large_logits():
    x = torch.tensor([1e4, -1e4, 1e4, -1e4], requires_grad=True)
    y = torch.tensor([1.0, 0.0, 0.0, 1.0])
    wanted = torch.tensor([0.0, 0.0, 1e4, 1e4]), torch.tensor([0.0, 0.0, 1.0, -1.0])
    for loss in (
        bce(x, y, reduction="none"),
        focal_loss(x, y, alpha=None, reduction="none"),
        focal_loss(x, y, 0.0, None, reduction="none"),
    ):
        (g,) = torch.autograd.grad(loss.sum(), x)
        assert_same((loss.detach(), g), wanted, 1e-6)


@pytest.mark.parametrize("gamma, alpha", [(2.0, 0.25), (0.5, 0.9), (5.0, None)])
def test_focal_loss_matches_its_definition(gamma, alpha):
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    y = torch.randint(2, (6, 5)).double()
    p = torch.where(y == 1, torch.sigmoid(x), 1 - torch.sigmoid(x))
    a = 1.0 if alpha is None else alpha * y + (1 - alpha) * (1 - y)
    assert_same(
        value_and_gradients(focal_loss(x, y, gamma, alpha, reduction="none"), x),
        value_and_gradients(-a * (1 - p) ** gamma * p.log(), x),
        1e-10,
    )


def test_focal_loss_at_gamma_zero_is_binary_cross_entropy():
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    y = torch.randint(2, (6, 5)).double()
    assert_same(
        value_and_gradients(focal_loss(x, y, 0.0, None), x),
        value_and_gradients(F.binary_cross_entropy_with_logits(x, y), x),
        1e-10,
    )
    x = torch.tensor([math.log(9.0)])  # p = 0.9: gamma 2 makes it (1 - 0.9)^2 = 1/100
    ratio = focal_loss(x, torch.ones(1), 2.0, None) / focal_loss(x, torch.ones(1), 0.0, None)
    assert ratio.item() == pytest.approx(0.01, rel=1e-5)


def test_two_class_losses_of_half_precision_are_computed_in_float32():
    x = torch.randn(100).bfloat16().requires_grad_()
    y = torch.randint(2, (100,)).bfloat16()
    for function in (bce, focal_loss):
        loss, g = value_and_gradients(function(x, y), x)
        assert loss == function(x.detach().float(), y.float())
        assert loss.dtype == torch.float32 and g.dtype == torch.bfloat16


# distillation and units


@pytest.mark.parametrize("T, alpha", [(1.0, 1.0), (2.0, 0.5), (4.0, 0.9), (3.0, 0.0)])
def test_distillation_loss_matches_torch(T, alpha):
    student, targets = batch(20, 9)
    teacher = batch(20, 9)[0]
    kept = targets != -100
    kl = F.kl_div(
        F.log_softmax(student[kept] / T, -1),
        F.log_softmax(teacher.detach()[kept] / T, -1),
        log_target=True,
        reduction="batchmean",
    )
    wanted = alpha * T**2 * kl + (1 - alpha) * F.cross_entropy(student, targets)
    ours = losses.distillation_loss(student, teacher, targets, T, alpha)
    assert_same(value_and_gradients(ours, student), value_and_gradients(wanted, student), 1e-10)
    assert torch.autograd.grad(ours, teacher, allow_unused=True) == (None,)


def test_distillation_loss_gradient_is_the_difference_of_distributions():
    student, targets = batch(20, 9, ignored=0)
    teacher = batch(20, 9)[0].detach()
    loss = losses.distillation_loss(student, teacher, targets, 3.0, 1.0)
    (g,) = torch.autograd.grad(loss, student)
    wanted = 3.0 * ((student / 3).softmax(-1) - (teacher / 3).softmax(-1)) / 20
    torch.testing.assert_close(g, wanted.detach())
    same = losses.distillation_loss(student, student.detach(), targets, 3.0, 1.0)
    assert abs(same.item()) < 1e-12


def test_distillation_loss_allows_a_masked_vocabulary():
    student, targets = batch(6, 9)
    teacher = batch(6, 9)[0].detach().clone()
    masked = student.detach().clone()
    masked[:, 8] = teacher[:, 8] = -math.inf
    masked.requires_grad_()
    loss = losses.distillation_loss(masked, teacher, targets % 8, 2.0, 0.5)
    assert loss.isfinite() and value_and_gradients(loss, masked)[1].isfinite().all()


def test_distillation_loss_of_padding_is_zero():
    student, _ = batch(5, 9)
    loss = losses.distillation_loss(student, student.detach() + 1, torch.full((5,), -100), 2.0, 0.5)
    assert loss == 0 and (value_and_gradients(loss, student)[1] == 0).all()


def test_perplexity_and_bits_per_byte_known_values():
    assert losses.perplexity(math.log(50)) == pytest.approx(50)
    assert losses.perplexity(1e4) == math.inf and math.isnan(losses.perplexity(math.nan))
    assert losses.bits_per_byte(math.log(2) * 3, tokens=10, bytes=40) == pytest.approx(0.75)
    # equally likely bytes are 8 bits each, whether taken one or two at a time
    one = losses.bits_per_byte(math.log(256), 1000, 1000)
    two = losses.bits_per_byte(math.log(256**2), 500, 1000)
    assert one == pytest.approx(8) and two == pytest.approx(8)


# errors


X, Y = torch.zeros(4, 7), torch.zeros(4, dtype=torch.long)
HEAD = torch.zeros(9, 7)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: cross_entropy(X, Y[:3]), r"targets.shape=\(3,\).*\(4,\)"),
        (lambda: cross_entropy(X, X), "torch.float32.*class indices"),
        (lambda: cross_entropy(X, Y + 7), r"\[7\].*\[0, 6\]"),
        (lambda: cross_entropy(X, Y - 1), r"\[-1\].*ignore_index=-100"),
        (lambda: cross_entropy(torch.tensor(1.0), Y), "logits.shape"),
        (lambda: cross_entropy(X, Y, weight=torch.ones(4)), r"weight.shape=\(4,\).*\(7,\)"),
        (lambda: cross_entropy(X, Y, label_smoothing=1.0), r"label_smoothing=1.0.*\[0, 1\)"),
        (lambda: cross_entropy(X, Y, z_loss=-1.0), "z_loss=-1.0"),
        (lambda: cross_entropy(X, Y, reduction="avg"), "reduction='avg'.*mean"),
        (lambda: linear_cross_entropy(X, X[:, :5], Y), r"\(4, 7\), \(4, 5\)"),
        (lambda: linear_cross_entropy(X, HEAD, Y + 9), r"\[9\].*\[0, 8\]"),
        (lambda: linear_cross_entropy(X, HEAD, Y, reduction="none"), "'none' call cross_entropy"),
        (lambda: linear_cross_entropy(X, HEAD, Y, chunk_tokens=0), "chunk_tokens=0"),
        (lambda: linear_cross_entropy(X, HEAD, Y, label_smoothing=-0.1), "label_smoothing=-0.1"),
        (lambda: bce(X, X[0]), r"targets.shape=\(7,\).*\(4, 7\)"),
        (lambda: bce(X, X, reduction="avg"), "reduction='avg'"),
        (lambda: focal_loss(X, X[0]), "targets.shape"),
        (lambda: focal_loss(X, X + 0.5), r"\[0.5\].*0 or 1"),
        (lambda: focal_loss(X, X, gamma=-1), "gamma=-1"),
        (lambda: focal_loss(X, X, alpha=2), "alpha=2"),
        (lambda: losses.distillation_loss(X, X[:3], Y, 1.0, 0.5), "teacher.shape"),
        (lambda: losses.distillation_loss(X, X, Y, 0.0, 0.5), "temperature=0.0.*> 0"),
        (lambda: losses.distillation_loss(X, X, Y, 1.0, 1.5), "alpha=1.5"),
        (lambda: losses.bits_per_byte(1.0, 5, 0), "bytes=0"),
    ],
)
def test_wrong_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_file_runs_alone_and_prints_what_its_docstring_says(tmp_path):
    copy = tmp_path / "01_loss.py"
    copy.write_text(Path(losses.__file__).read_text())
    run = subprocess.run([sys.executable, copy], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    documented = losses.__doc__.split("prints\n\n")[1]
    printed, wanted = (text.strip().splitlines() for text in (run.stdout, documented))
    # the rounding errors at the end of a line are the machine's own
    assert [line.strip()[:28] for line in printed] == [line.strip()[:28] for line in wanted]


# the kernels, in Triton's interpreter or on a GPU


def assert_triton_equals_torch(device):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 5, 50, generator=g).to(device)
    hidden, weight = (torch.randn(n, 16, generator=g).to(device) for n in (35, 50))
    y = torch.randint(50, (7, 5), generator=g).to(device)
    y[0] = -100
    for options in ({}, {"label_smoothing": 0.1, "z_loss": 1e-3}, {"reduction": "sum"}):
        results = []
        for form in ("torch", "triton"):
            leaves = [x.clone().requires_grad_() for x in (logits, hidden, weight)]
            one = losses.cross_entropy(leaves[0], y, **options, implementation=form)
            two = losses.linear_cross_entropy(
                leaves[1], leaves[2], y.flatten(), **options, implementation=form
            )
            (one + 2 * two).backward()
            results.append([one, two, *(x.grad for x in leaves)])
        for ours, wanted in zip(*results):
            torch.testing.assert_close(ours, wanted, atol=2e-5, rtol=2e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where a GPU is")
def test_losses_with_kernels_equal_the_plain_ones_in_the_interpreter():
    assert_triton_equals_torch("cpu")


@pytest.mark.gpu
def test_losses_with_kernels_equal_the_plain_ones_on_a_gpu():
    assert_triton_equals_torch("cuda")


def test_losses_without_kernels_say_what_is_missing(monkeypatch):
    monkeypatch.setattr(losses, "triton", None)
    x, y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    assert losses.cross_entropy(x, y).item() == pytest.approx(math.log(3))
    with pytest.raises(ImportError, match="pip install triton"):
        losses.cross_entropy(x, y, implementation="triton")
    with pytest.raises(ValueError, match="implementation='fast'"):
        losses.cross_entropy(x, y, implementation="fast")


def test_reference_is_torch_and_what_ours_is():
    x, y = torch.randn(3, 5, 11, dtype=torch.float64), torch.randint(11, (3, 5))
    wanted = F.cross_entropy(x.flatten(0, 1), y.flatten())
    torch.testing.assert_close(losses.cross_entropy_reference(x, y), wanted)
    torch.testing.assert_close(losses.cross_entropy(x, y), wanted)
