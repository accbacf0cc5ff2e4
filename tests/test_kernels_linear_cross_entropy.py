"""Tests of kernels/linear_cross_entropy.py: against torch in float64, by property, and its memory.

Run: python -m pytest tests/test_kernels_linear_cross_entropy.py
"""

import importlib
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import linear_cross_entropy as file
from kernels.cross_entropy import DTYPES
from kernels.linear_cross_entropy import linear_cross_entropy

DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are the GPU's"),
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
on_devices = pytest.mark.parametrize("device", DEVICES)
# numpy: -inf times 0, in masked columns
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
ALL_OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0}


@pytest.fixture(autouse=True)
def float32_products():
    """Of a GPU too: its TF32 has 11 bits."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def batch(*lead, C=8, V=50, dtype=torch.float32, device="cpu", ignored=0.3, seed=0):
    """hidden (..., C), weight (V, C), targets (...), some of them ignored but never all."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*lead, C, generator=g, dtype=torch.float64).to(dtype).to(device)
    weight = (3 * torch.randn(V, C, generator=g, dtype=torch.float64) / C**0.5).to(dtype)
    targets = torch.randint(V, lead, generator=g)
    targets[torch.rand(lead, generator=g) < ignored] = -100
    targets.view(-1)[:1] = V - 1
    return hidden, weight.to(device), targets.to(device)


def exact(
    hidden, weight, y, label_smoothing=0.0, z_loss=0.0, softcap=0.0, reduction="mean", **ignored
):
    """The oracle: torch's cross_entropy of all capped logits, and z lse^2 beside it."""
    x = (hidden @ weight.T).reshape(-1, len(weight))
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    counted = y.reshape(-1) != -100
    loss = F.cross_entropy(x, y.reshape(-1), reduction="sum", label_smoothing=label_smoothing)
    loss = loss + z_loss * (x.logsumexp(-1) ** 2)[counted].sum()
    return loss / counted.sum() if reduction == "mean" else loss


def relative_error(a, b):
    return ((a.double() - b).norm() / b.norm()).item() if b.any() else a.double().norm().item()


# Relative errors of a whole gradient. float32: sums of some thousand products. Half precision, with
# u the last of its bits: logits of size 3, with a few of 10, are rounded by u/2 of themselves: that
# moves a probability by 1.5 u, at most by 5 u; the gradient is rounded when it replaces the logits
# (by u in the interpreter, which cuts bits off bfloat16) and when it is returned. 6 u is for all.
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 6 * 2**-8, torch.float16: 6 * 2**-11}


def check(hidden, weight, targets, function=linear_cross_entropy, upstream=1.0, **options):
    """Loss and both gradients at the very numbers that the op saw."""
    h, w = (x.detach().requires_grad_() for x in (hidden, weight))
    loss = function(h, w, targets, implementation="triton", **options)
    found = torch.autograd.grad(upstream * loss, (h, w))
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    wanted = exact(*wide, targets, **options)
    wanted_found = torch.autograd.grad(upstream * wanted, wide)
    assert loss.dtype == torch.float32 and loss.shape == ()
    bound = BOUNDS[hidden.dtype]
    assert loss.item() == pytest.approx(wanted.item(), rel=bound, abs=bound)
    for g, wanted_g, x in zip(found, wanted_found, (hidden, weight)):
        assert g.dtype == x.dtype and g.shape == x.shape
        assert relative_error(g, wanted_g) < bound


# numbers


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("options", [{}, ALL_OPTIONS])
@pytest.mark.parametrize("chunk_tokens", [None, 8])
def test_linear_cross_entropy_matches_torch(dtype, reduction, options, chunk_tokens, device):
    inputs = batch(23, C=16, V=1023, dtype=dtype, device=device)
    check(*inputs, reduction=reduction, chunk_tokens=chunk_tokens, **options)


@on_devices
@pytest.mark.parametrize("N, C, V, chunk", [(1, 1, 1, 1), (7, 3, 7, 7), (129, 5, 2, 50)])
def test_linear_cross_entropy_of_odd_sizes(N, C, V, chunk, device):
    check(*batch(N, C=C, V=V, device=device), chunk_tokens=chunk, upstream=-2.5)


@on_devices
@pytest.mark.parametrize("V", [16385, 32769])
def test_linear_cross_entropy_of_long_rows(V, device):
    check(*batch(4, C=8, V=V, device=device), chunk_tokens=3, **ALL_OPTIONS)


@on_devices
@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.integers(0, 5), max_size=3), st.integers(1, 129), st.integers(1, 12),
    st.integers(0, 99),
)  # fmt: skip
def test_linear_cross_entropy_takes_any_shape(device, lead, V, chunk_tokens, seed):
    hidden, weight, targets = batch(*lead, C=5, V=V, device=device, seed=seed, ignored=0.0)
    options = {"chunk_tokens": chunk_tokens, "reduction": "sum", "z_loss": 0.1}
    check(hidden, weight, targets, **options)
    # neither is contiguous
    hidden, weight = hidden.movedim(-1, 0).contiguous().movedim(0, -1), weight.T.contiguous().T
    check(hidden, weight, targets, **options)


@on_devices
def test_chunks_and_what_comes_in_change_nothing_else(device):
    hidden, weight, targets = batch(20, device=device)
    found = []
    for chunk_tokens in (1, 7, 20, 1000):
        h, w = (x.clone().requires_grad_() for x in (hidden, weight))
        loss = linear_cross_entropy(
            h, w, targets, chunk_tokens=chunk_tokens, implementation="triton"
        )
        once = torch.autograd.grad(loss, (h, w), retain_graph=True)
        again = torch.autograd.grad(loss, (h, w), retain_graph=True)
        third = torch.autograd.grad(loss / 3, (h, w))
        for a, b, c in zip(once, again, third):
            assert torch.equal(a, b)
            torch.testing.assert_close(c, a / 3)
        found.append((loss.detach(), *once))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(h.detach(), hidden) and torch.equal(w.detach(), weight)


@on_devices
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_all_ignored_is_zero_with_zero_gradients(reduction, device):
    hidden, weight, _ = batch(5, device=device)
    nothing = torch.full((5,), -7, device=device)
    for implementation in ("triton", "reference"):
        h, w = (x.clone().requires_grad_() for x in (hidden, weight))
        loss = linear_cross_entropy(
            h, w, nothing, ignore_index=-7, reduction=reduction, implementation=implementation
        )
        for x in (loss, *torch.autograd.grad(loss, (h, w))):
            assert (x == 0).all()


@on_devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_multiplies_in_its_type_and_adds_up_in_float32(dtype, device):
    hidden, weight, targets = batch(64, C=16, V=60, device=device)
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    with torch.autocast(device, dtype):
        loss = linear_cross_entropy(h, w, targets, chunk_tokens=16, implementation="triton")
    found = torch.autograd.grad(loss, (h, w))
    wide = [x.detach().double().requires_grad_() for x in (h, w)]
    wanted = torch.autograd.grad(exact(*wide, targets), wide)
    for g, wanted_g in zip(found, wanted):
        assert g.dtype == torch.float32
        # the inputs are rounded to the type as well, which moves a logit by 2 u more
        assert 1e-5 < relative_error(g, wanted_g) < 1.5 * BOUNDS[dtype]


@on_devices
def test_the_weight_gradient_adds_up_in_float32(device):
    """256 chunks of one token that all push the same way, the later ones below bfloat16's grid."""
    hidden, weight, _ = batch(256, C=2, V=3, dtype=torch.bfloat16, device=device)
    hidden = 1 + hidden.abs()
    targets = torch.zeros(256, dtype=torch.long, device=device)
    w = weight.clone().requires_grad_()
    loss = linear_cross_entropy(hidden, w, targets, chunk_tokens=1, implementation="triton")
    (g,) = torch.autograd.grad(loss, w)
    wide = weight.double().requires_grad_()
    (wanted,) = torch.autograd.grad(exact(hidden.double(), wide, targets), wide)
    ours = relative_error(g, wanted)
    # the same numbers added up in bfloat16
    naive = torch.zeros_like(weight)
    x = hidden.double() @ wide.detach().T
    slope = (x.softmax(-1) - F.one_hot(targets, 3)).bfloat16()
    for row, h in zip(slope, hidden):
        naive += torch.outer(row, h) / 256
    assert ours < BOUNDS[torch.bfloat16] < relative_error(naive, wanted)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reference_matches_01_and_torch(reduction):
    losses = importlib.import_module("01_loss")
    hidden, weight, targets = batch(2, 20, dtype=torch.float64)
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "reduction": reduction}
    for implementation in ("reference", "auto"):
        h, w = (x.clone().requires_grad_() for x in (hidden, weight))
        ours = linear_cross_entropy(h, w, targets, implementation=implementation, **options)
        assert ours.dtype == torch.float64
        for other in (losses.linear_cross_entropy, exact):
            wanted = other(h, w, targets, **options)
            torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(
                torch.autograd.grad(ours, (h, w), retain_graph=True),
                torch.autograd.grad(wanted, (h, w)),
                rtol=1e-10,
                atol=1e-12,
            )


# memory


class Memory(TorchDispatchMode):
    """Within it, `peak` is the most bytes of tensors made here that were alive at once."""

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0
        self.seen = set()

    def gone(self, key, bytes):
        self.alive -= bytes
        self.seen.discard(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                key, bytes = storage._cdata, storage.nbytes()
                owned = any(
                    isinstance(a, torch.Tensor) and a.untyped_storage()._cdata == key for a in args
                )
                if key not in self.seen and not owned:
                    self.seen.add(key)
                    self.alive += bytes
                    weakref.finalize(storage, self.gone, key, bytes)
        self.peak = max(self.peak, self.alive)
        return result


def peak(N, C, V, chunk_tokens, gradient=True):
    hidden, weight, targets = batch(N, C=C, V=V)
    scale = torch.ones(())
    with Memory() as memory:
        result = file.loss_and_gradients(
            hidden, weight, targets, scale, torch.float32, chunk_tokens, -100, 0.0, 0.0, 0.0,
            gradient, gradient,
        )  # fmt: skip
    return memory.peak, result


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch.cuda measures it there")
@pytest.mark.parametrize("N, chunk_tokens", [(64, 64), (64, 16), (160, 16)])
def test_memory_is_that_of_one_chunk(N, chunk_tokens):
    """The docstring's sum for float32, twice its 2-byte types except for the float32 dw."""
    C, V = 4, 512
    most, result = peak(N, C, V, chunk_tokens)
    logits = 4 * chunk_tokens * V
    others = 4 * N * C + 4 * chunk_tokens * C + 8 * V * C + 4 * N  # the last: losses
    assert logits < most <= logits + others
    assert peak(N, C, V, chunk_tokens, gradient=False)[0] <= logits + 4 * N + 64
    assert [x.numel() for x in result] == [1, N * C, V * C]


def test_memory_of_the_plain_way_is_that_of_all_logits():
    """The measure sees what is large: logits, log-softmax and gradient."""
    hidden, weight, targets = batch(64, C=4, V=512)
    with Memory() as memory:
        loss = F.cross_entropy(hidden.requires_grad_() @ weight.T, targets)
        loss.backward()
    assert memory.peak >= 2 * 4 * 64 * 512


@pytest.mark.gpu
def test_memory_on_a_gpu_is_that_of_one_chunk():
    N, C, V, n = 8192, 256, 4096, 1024
    hidden, weight, targets = batch(N, C=C, V=V, dtype=torch.bfloat16, device="cuda")
    hidden.requires_grad_(), weight.requires_grad_()

    def step():
        loss = linear_cross_entropy(hidden, weight, targets, chunk_tokens=n)
        return torch.autograd.grad(loss, (hidden, weight))

    step()  # cuBLAS takes its workspace
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    most = torch.cuda.max_memory_allocated() - before
    assert most <= 2 * n * V + 4 * N * C + 2 * n * C + 12 * V * C + 2**21
    assert most < 2 * N * V / 2  # half of the logits alone


# autograd


@on_devices
def test_gradients_of_one_of_the_two_only(device):
    hidden, weight, targets = batch(20, device=device)
    wide = [x.double().requires_grad_() for x in (hidden, weight)]
    wanted = torch.autograd.grad(exact(*wide, targets), wide)
    for i in (0, 1):
        inputs = [x.clone().requires_grad_(i == j) for j, x in enumerate((hidden, weight))]
        loss = linear_cross_entropy(*inputs, targets, chunk_tokens=7, implementation="triton")
        loss.backward()
        assert relative_error(inputs[i].grad, wanted[i]) < 2e-5 and inputs[1 - i].grad is None


@on_devices
def test_without_gradient_there_is_one_product_a_chunk(device, monkeypatch):
    made = []
    op = file.linear_cross_entropy_op

    def watch(*arguments):
        made.append([x.numel() for x in op(*arguments)[1:]])
        return op(*arguments)

    monkeypatch.setattr(file, "linear_cross_entropy_op", watch)
    hidden, weight, targets = batch(20, device=device)
    linear_cross_entropy(hidden, weight, targets, implementation="triton")
    hidden.requires_grad_()
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets, implementation="triton")
    assert not loss.requires_grad and made == [[0, 0], [0, 0]]


@on_devices
def test_no_second_derivative_is_said_clearly(device):
    hidden, weight, targets = batch(7, device=device)
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets, implementation="triton")
    with pytest.raises(RuntimeError, match="second derivative.*implementation='reference'"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@on_devices
def test_linear_cross_entropy_compiles_into_one_graph(device):
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    check(*batch(2, 11, device=device), function=compiled, chunk_tokens=8, **ALL_OPTIONS)


@on_devices
def test_op_passes_opcheck(device):
    hidden, weight, targets = batch(7, device=device)
    scale = torch.tensor(0.5, device=device)
    for gradients in ((True, True), (True, False), (False, True), (False, False)):
        h, w = (x.clone().requires_grad_(g) for x, g in zip((hidden, weight), gradients))
        options = (torch.float32, 3, -100, 0.1, 0.01, 3.0, *gradients)
        torch.library.opcheck(
            torch.ops.kernels.linear_cross_entropy, (h, w, targets, scale, *options)
        )


@pytest.mark.gpu
def test_no_step_waits_for_the_gpu_and_a_cuda_graph_replays_it():
    hidden, weight, targets = batch(64, C=64, V=4096, dtype=torch.bfloat16, device="cuda")
    hidden.requires_grad_(), weight.requires_grad_()

    def step():
        loss = 0.5 * linear_cross_entropy(hidden, weight, targets, chunk_tokens=20)
        return torch.autograd.grad(loss, (hidden, weight))

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
        found = step()
    with torch.no_grad():
        hidden.copy_(torch.randn_like(hidden))
    targets[:20] = -100  # another count
    graph.replay()
    torch.testing.assert_close(found, step())


# errors


X, HEAD, Y = torch.zeros(4, 7), torch.zeros(9, 7), torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    "h, w, y, options, message",
    [
        (X, X[:, :5], Y, {}, r"\(4, 7\), \(4, 5\)\) must be \(\(..., C\), \(V, C\)\)"),
        (X, HEAD, Y[:3], {}, r"targets.shape=\(3,\) must be \(4,\)"),
        (X, HEAD, Y.float(), {}, "targets.dtype=torch.float32 must be an integer"),
        (X, HEAD, Y + 9, {}, r"targets=\[9\] must be a class in \[0, 8\]"),
        (X.double(), HEAD, Y, {}, "hidden.dtype=torch.float64 must be one of"),
        (X, HEAD, Y, {"reduction": "none"}, "'none' call cross_entropy"),
        (X, HEAD, Y, {"chunk_tokens": 0}, "chunk_tokens=0 must be >= 1"),
        (X, HEAD, Y, {"label_smoothing": -0.1}, "label_smoothing=-0.1"),
        (X, HEAD, Y, {"z_loss": -1.0}, "z_loss=-1.0"),
        (X, HEAD, Y, {"softcap": -1.0}, "softcap=-1.0"),
        (X, HEAD, Y, {"implementation": "fast"}, "implementation='fast'"),
    ],
)
def test_wrong_arguments_are_named(h, w, y, options, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(h, w, y, **{"implementation": "triton"} | options)
