"""Tests of kernels/cross_entropy.py: against torch's cross_entropy in float64, and by property.

Where there is no GPU the kernels run in Triton's interpreter, which tests/conftest.py asks for.
Run: python -m pytest tests/test_kernels_cross_entropy.py
"""

import importlib
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import cross_entropy as file
from kernels.cross_entropy import cross_entropy

DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are the GPU's"),
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
on_devices = pytest.mark.parametrize("device", DEVICES)
# numpy: -inf times 0, inf - inf and sums of -inf, in masked columns
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
ALL_OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0}


def batch(*shape, dtype=torch.float32, device="cpu", ignored=0.3, seed=0):
    """Random logits (..., V), and targets (...), some of them ignored but never all."""
    g = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype)
    targets = torch.randint(shape[-1], shape[:-1], generator=g)
    targets[torch.rand(shape[:-1], generator=g) < ignored] = -100
    targets.view(-1)[:1] = shape[-1] - 1
    return logits.to(device), targets.to(device)


def exact(x, y, label_smoothing=0.0, z_loss=0.0, softcap=0.0, reduction="mean", ignore_index=-100):
    """The oracle: torch's cross_entropy of the capped logits, and z lse^2 beside it."""
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1)
    options = {"label_smoothing": label_smoothing, "ignore_index": ignore_index}
    counted = y != ignore_index
    losses = F.cross_entropy(x, y, reduction="none", **options)
    losses = losses + (z_loss * x.logsumexp(-1) ** 2).where(counted, 0)
    return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / counted.sum()}[reduction]


def bounds(dtype):
    """rtol and atol of a gradient. Losses are float32 always.

    float32: some ten roundings of 2^-24. Half precision: the gradient is rounded when written,
    and once more when it is multiplied by what comes in from above. bfloat16 has 8 bits, so that
    is twice 2^-8 of itself to the nearest, and 2^-7 in the interpreter, which cuts bits off.
    float16 has 11 bits, and multiples of 6e-8 only, which what comes in (at most 2) doubles.
    """
    return {
        torch.float32: (2e-5, 2e-6),
        torch.bfloat16: (2 * 2**-7, 1e-6),
        torch.float16: (2 * 2**-10, 2.5e-7),
    }[dtype]


def check(logits, targets, function=cross_entropy, implementation="triton", **options):
    """Loss and gradient, under uneven gradients from above, at the very numbers the kernel saw."""
    x = logits.detach().requires_grad_()
    before = logits.detach().clone()
    loss = function(x, targets, implementation=implementation, **options)
    upstream = torch.linspace(0.5, 2, loss.numel(), device=x.device).reshape(loss.shape)
    (g,) = torch.autograd.grad(loss, x, upstream)
    wide = x.detach().double().requires_grad_()
    wanted = exact(wide, targets, **options).reshape(loss.shape)
    (wanted_g,) = torch.autograd.grad(wanted, wide, upstream.double())
    assert loss.dtype == torch.float32 and g.dtype == x.dtype and g.shape == x.shape
    torch.testing.assert_close(loss.double(), wanted, rtol=2e-5, atol=2e-5)
    rtol, atol = bounds(x.dtype)
    torch.testing.assert_close(g.double(), wanted_g, rtol=rtol, atol=atol)
    assert torch.equal(x.detach(), before)  # the caller's logits stay as they are


# numbers


@on_devices
@pytest.mark.parametrize("dtype", file.DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, ALL_OPTIONS])
def test_cross_entropy_matches_torch(dtype, reduction, options, device):
    logits, targets = batch(7, 1023, dtype=dtype, device=device)
    check(logits, targets, reduction=reduction, **options)


@on_devices
@pytest.mark.parametrize("N, V", [(1, 1), (1, 2), (7, 7), (129, 5), (3, 4096), (2, 4097)])
def test_cross_entropy_of_odd_sizes(N, V, device):
    check(*batch(N, V, device=device), **ALL_OPTIONS)


@on_devices
def test_cross_entropy_with_every_combination_of_options(device):
    logits, targets = batch(5, 77, device=device)
    targets[targets == -100] = 3
    for e, z, softcap in itertools.product((0.0, 0.9), (0.0, 0.3), (0.0, 2.0)):
        check(logits, targets, label_smoothing=e, z_loss=z, softcap=softcap, ignore_index=3)


@on_devices
@pytest.mark.parametrize("V", [16384, 16385, 32769, 50257])
@pytest.mark.parametrize("options", [{}, ALL_OPTIONS])
def test_cross_entropy_of_long_rows(V, options, device):
    """Beyond 16,384 logits by tiles: a maximum and a target in the first, a middle, the last."""
    logits, targets = batch(4, V, device=device, ignored=0)
    for row, column in enumerate((5, V // 2, V - 1)):
        logits[row, column] = 20.0
        targets[row] = (V - 1, 5, V // 2)[row]
    targets[3] = -100
    check(logits, targets, reduction="sum", **options)
    check(logits.bfloat16(), targets, **options)


@on_devices
@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.integers(0, 5), max_size=3), st.integers(1, 300), st.booleans(), st.integers(0, 99)
)
def test_cross_entropy_takes_any_shape(device, lead, V, plain, seed):
    logits, targets = batch(*lead, V, device=device, seed=seed)
    check(logits, targets, reduction="none", **({} if plain else ALL_OPTIONS))


@on_devices
@pytest.mark.parametrize("view", ["a slice of a padded vocabulary", "every second", "transposed"])
def test_cross_entropy_of_rows_that_are_not_contiguous(view, device):
    wide, targets = batch(6, 5, 50, device=device)
    logits, y = {
        "a slice of a padded vocabulary": (wide[:, :, :41], targets % 41),
        "every second": (wide[::2], targets[::2]),
        "transposed": (wide.transpose(0, 1), targets.T),
    }[view]
    assert not logits.is_contiguous()
    check(logits, y)


@on_devices
def test_cross_entropy_keeps_its_digits_at_large_logits(device):
    small = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.0, 1.0]], device=device)
    targets = torch.tensor([1, 2], device=device)
    for size in (1e4, -1e4):  # binary fractions: the sum is exact
        check(size + small, targets, label_smoothing=0.1)
        a, b = (cross_entropy(x, targets, implementation="triton") for x in (small, size + small))
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@on_devices
@pytest.mark.parametrize("V, kept", [(50, 30), (20000, 30), (20000, 9000)])
def test_cross_entropy_with_a_masked_vocabulary_equals_the_smaller_one(V, kept, device):
    """-inf at the end and, reversed, at the start, where it fills the whole first tile."""
    few, targets = batch(3, kept, device=device)
    full = torch.full((3, V), -math.inf, device=device)
    wide = few.clone().requires_grad_()
    wanted = cross_entropy(wide, targets, z_loss=0.1, implementation="triton")
    (wanted_g,) = torch.autograd.grad(wanted, wide)
    for place in (slice(None, kept), slice(V - kept, None)):
        x = full.clone()
        x[:, place] = few
        x.requires_grad_()
        y = targets.where(targets == -100, targets + (place.start or 0))
        loss = cross_entropy(x, y, z_loss=0.1, implementation="triton")
        (g,) = torch.autograd.grad(loss, x)
        torch.testing.assert_close(loss, wanted)
        torch.testing.assert_close(g[:, place], wanted_g)
        assert g.count_nonzero() <= wanted_g.numel() and g.isfinite().all()


@on_devices
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_ignored_is_zero_with_zero_gradient(reduction, device):
    """And what an ignored row holds is not looked at."""
    for V in (7, 20000):
        logits = torch.full((3, V), math.nan, device=device, requires_grad=True)
        targets = torch.full((3,), -100, device=device)
        loss = cross_entropy(logits, targets, reduction=reduction, implementation="triton")
        (g,) = torch.autograd.grad(loss.sum(), logits)
        assert (loss == 0).all() and (g == 0).all()


@on_devices
def test_cross_entropy_known_values(device):
    y = torch.tensor([1], device=device)
    flat = cross_entropy(torch.zeros(1, 4096, device=device), y, implementation="triton")
    assert flat.item() == pytest.approx(math.log(4096), abs=1e-6)
    x = torch.tensor([[0.5, 0.25, 0.25]], device=device).log().requires_grad_()
    smooth = cross_entropy(x, y, label_smoothing=0.3, z_loss=0.5, implementation="triton")
    by_hand = 0.8 * math.log(4) + 0.1 * (math.log(2) + math.log(4))  # q = 0.1, 0.8, 0.1; lse = 0
    assert smooth.item() == pytest.approx(by_hand, abs=1e-6)
    (g,) = torch.autograd.grad(smooth, x)
    torch.testing.assert_close(g.cpu(), torch.tensor([[0.4, -0.55, 0.15]]))


@on_devices
def test_small_gradients_survive_in_float16(device):
    """Over N tokens they are p / N, often below float16's 6e-8, until a loss scale comes in."""
    logits, targets = batch(130, 64, dtype=torch.float16, device=device)
    x = logits.requires_grad_()
    (g,) = torch.autograd.grad(2.0**16 * cross_entropy(x, targets, implementation="triton"), x)
    wide = x.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(2.0**16 * exact(wide, targets), wide)
    torch.testing.assert_close(g.double(), wanted, rtol=2 * 2**-10, atol=2.0**16 / 91 * 6e-8)


@on_devices
def test_row_offsets_are_64_bit_integers(device):
    """Rows 2^30 elements apart: the third begins at 2^31. Most of the 4 GiB is never touched."""
    stride = 2**30 + 16
    storage = torch.empty(2 * stride + 16, dtype=torch.bfloat16, device=device)
    logits = storage.as_strided((3, 7), (stride, 1))
    values, _ = batch(3, 7, dtype=torch.bfloat16, device=device)
    logits.copy_(values)
    targets = torch.tensor([1, 2, 3], device=device)
    losses = cross_entropy(logits, targets, reduction="none", implementation="triton")
    torch.testing.assert_close(losses.double(), exact(values.double(), targets, reduction="none"))


@pytest.mark.parametrize("options", [{}, ALL_OPTIONS])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reference_matches_torch(reduction, options):
    logits, targets = batch(20, 33, dtype=torch.float64)
    for implementation in ("reference", "auto"):
        x = logits.clone().requires_grad_()
        ours = cross_entropy(
            x, targets, reduction=reduction, implementation=implementation, **options
        )
        wanted = exact(x, targets, reduction=reduction, **options)
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)
        found, expected = (torch.autograd.grad(loss.sum(), x)[0] for loss in (ours, wanted))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    nothing = torch.full((20,), -100)
    loss = cross_entropy(x, nothing, reduction=reduction, implementation="reference", **options)
    assert (loss == 0).all() and (torch.autograd.grad(loss.sum(), x)[0] == 0).all()


def test_reference_equals_01():
    losses = importlib.import_module("01_loss")
    logits, targets = batch(2, 20, 33)
    options = {"label_smoothing": 0.1, "z_loss": 0.01}
    ours = cross_entropy(logits, targets, implementation="reference", **options)
    torch.testing.assert_close(ours, losses.cross_entropy(logits, targets, **options))


# autograd


@on_devices
def test_backward_multiplies_by_what_comes_in(device):
    logits, targets = batch(7, 33, device=device)
    found = []
    for factor in (1.0, 0.25, 0.0, -3.0):
        x = logits.clone().requires_grad_()
        (factor * cross_entropy(x, targets, implementation="triton")).backward()
        found.append(x.grad)
    for factor, g in zip((0.25, 0.0, -3.0), found[1:]):
        torch.testing.assert_close(g, factor * found[0])
    assert found[0].abs().max() > 0


@on_devices
def test_a_second_backward_raises_and_does_not_multiply_twice(device):
    x, targets = batch(7, 33, device=device)
    loss = cross_entropy(x.requires_grad_(), targets, implementation="triton")
    torch.autograd.grad(2 * loss, x, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, x)


@on_devices
def test_no_second_derivative_is_said_clearly(device):
    x, targets = batch(7, 33, device=device)
    loss = cross_entropy(x.requires_grad_(), targets, implementation="triton")
    with pytest.raises(RuntimeError, match="second derivative.*implementation='reference'"):
        torch.autograd.grad(loss, x, create_graph=True)


@on_devices
def test_without_gradient_none_is_made(device, monkeypatch):
    made = []
    op = file.cross_entropy_op

    def watch(*arguments):
        made.append(op(*arguments)[1])
        return op(*arguments)

    monkeypatch.setattr(file, "cross_entropy_op", watch)
    x, targets = batch(7, 33, device=device)
    cross_entropy(x, targets, implementation="triton")
    x.requires_grad_()
    with torch.no_grad():
        assert not cross_entropy(x, targets, implementation="triton").requires_grad
    cross_entropy(x, targets, implementation="triton")
    assert [g.numel() for g in made] == [0, 0, x.numel()]


@on_devices
def test_cross_entropy_compiles_into_one_graph(device):
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    check(*batch(2, 5, 33, device=device), function=compiled, **ALL_OPTIONS)
    check(*batch(2, 5, 33, device=device), function=compiled, reduction="none")


@on_devices
def test_ops_pass_opcheck(device):
    x, targets = batch(5, 33, device=device)
    scale = torch.tensor(0.5, device=device)
    for gradient in (True, False):
        arguments = (x.requires_grad_(gradient), targets, scale, -100, 0.1, 0.01, 3.0, gradient)
        torch.library.opcheck(torch.ops.kernels.cross_entropy, arguments)
    x = x.detach()
    for factors in (torch.rand(5, device=device), scale.expand(5)):
        torch.library.opcheck(torch.ops.kernels.scale_rows_, (x, factors))


@on_devices
def test_a_class_out_of_range_has_loss_nan_where_nothing_can_raise(device):
    x, _ = batch(3, 33, device=device)
    y, scale = torch.tensor([0, 33, -1], device=device), torch.tensor(1.0, device=device)
    losses, _ = file.cross_entropy_op(x, y, scale, -100, 0.0, 0.0, 0.0, False)
    assert losses.isnan().tolist() == [False, True, True]


@pytest.mark.gpu
def test_no_step_waits_for_the_gpu_and_a_cuda_graph_replays_it():
    x, targets = batch(64, 4096, dtype=torch.bfloat16, device="cuda")
    x.requires_grad_()

    def step():
        return torch.autograd.grad(0.5 * cross_entropy(x, targets), x)[0]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        g = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    targets[:20] = -100  # another count
    graph.replay()
    torch.testing.assert_close(g, step())


@pytest.mark.gpu
def test_auto_takes_the_kernel_on_a_gpu():
    x, targets = batch(7, 64, device="cuda")
    assert torch.equal(
        cross_entropy(x, targets), cross_entropy(x, targets, implementation="triton")
    )
    assert cross_entropy(x.double(), targets).dtype == torch.float64  # no kernel for it


# errors


X, Y = torch.zeros(4, 7), torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    "x, y, options, message",
    [
        (X, Y[:3], {}, r"targets.shape=\(3,\) must be \(4,\)"),
        (X, X, {}, "targets.shape|targets.dtype=torch.float32 must be an integer"),
        (X, Y + 7, {}, r"targets=\[7\] must be a class in \[0, 6\]"),
        (X, Y - 1, {}, r"targets=\[-1\].*ignore_index=-100"),
        (torch.tensor(1.0), Y, {}, r"logits.shape=\(\) must be \(..., V\)"),
        (torch.zeros(7, 4).T, Y, {}, r"logits.stride\(-1\)=4 must be 1; call .contiguous"),
        (X.double(), Y, {}, "logits.dtype=torch.float64 must be one of"),
        (X, Y, {"weight": torch.ones(7)}, "weight=.* must be None"),
        (X, Y, {"label_smoothing": 1.0}, r"label_smoothing=1.0 must be in \[0, 1\)"),
        (X, Y, {"z_loss": -1.0}, "z_loss=-1.0 must be >= 0"),
        (X, Y, {"softcap": -1.0}, "softcap=-1.0 must be >= 0"),
        (X, Y, {"reduction": "avg"}, "reduction='avg' must be one of"),
        (X, Y, {"implementation": "fast"}, "implementation='fast' must be 'auto', 'reference'"),
    ],
)
def test_wrong_arguments_are_named(x, y, options, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(x, y, **{"implementation": "triton"} | options)
