"""Tests of kernels/swiglu.py: against torch's silu in float64, and by property.

Where there is no GPU the kernels run in Triton's interpreter, which tests/conftest.py asks for.
Run: python -m pytest tests/test_kernels_swiglu.py
"""

import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.swiglu import swiglu

DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are the GPU's"),
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
on_devices = pytest.mark.parametrize("device", DEVICES)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy: exp(1e4)
# float32: a handful of roundings. bfloat16: all is float32 but what is written, and that is rounded
# once, to 8 bits: by at most 2^-8 of itself to the nearest, and in the interpreter, which cuts bits
# off, 2^-7.
BOUNDS = {torch.float32: (2e-5, 2e-5), torch.bfloat16: (2**-7, 2e-5)}


def random(*shape, dtype=torch.float32, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype).to(device)


def check(x, f=swiglu, dy=None):
    """y and the gradient against float64, at the very numbers that the kernels saw."""
    x = x.detach().requires_grad_()
    y = f(x, implementation="triton")
    assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], x.shape[-1] // 2)
    dy = random(*y.shape, dtype=y.dtype, device=y.device, seed=3) if dy is None else dy
    (dx,) = torch.autograd.grad(y, x, dy)
    wide = x.detach().double().requires_grad_()
    gate, up = wide.split(x.shape[-1] // 2, dim=-1)
    exact = F.silu(gate) * up
    (exact_dx,) = torch.autograd.grad(exact, wide, dy.double())
    rtol, atol = BOUNDS[x.dtype]
    torch.testing.assert_close(y.double(), exact, rtol=rtol, atol=atol)
    torch.testing.assert_close(dx.double(), exact_dx, rtol=rtol, atol=atol)


@on_devices
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("N, M", [(1, 1), (7, 7), (5, 1023), (2, 1025), (65, 32)])
def test_swiglu_matches_torch(N, M, dtype, device):
    check(random(N, 2 * M, dtype=dtype, device=device))


@on_devices
@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 6), max_size=3), st.integers(1, 200), st.integers(0, 99))
def test_swiglu_matches_torch_at_any_size(device, rows, M, seed):
    check(random(*rows, 2 * M, device=device, seed=seed))


@on_devices
@pytest.mark.parametrize("view", ["columns", "every second", "transposed"])
def test_swiglu_of_rows_that_are_not_contiguous(view, device):
    wide = random(6, 5, 50, device=device)
    x = {
        "columns": wide[:, :, 7:41],
        "every second": wide[::2, :, :34],
        "transposed": wide.transpose(0, 1),
    }[view]
    assert not x.is_contiguous()
    check(x)


@on_devices
def test_swiglu_takes_gradients_of_stride_zero_and_strided_ones(device):
    x = random(7, 66, device=device)
    check(x, dy=torch.ones((), device=device).expand(7, 33))  # as from .sum()
    check(x, dy=random(33, 7, device=device, seed=3).T)


@on_devices
def test_swiglu_of_extreme_gates_is_finite(device):
    """silu is 0 or the gate itself there, and its slope 0 or 1."""
    x = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4, 2.0, 2.0, 2.0, 2.0, 2.0]], device=device)
    x.requires_grad_()
    y = swiglu(x, implementation="triton")
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert y.tolist() == [[0, 0, 0, 200, 20000]]
    assert dx.tolist() == [[0, 0, 1, 2, 2, 0, 0, 0, 100, 10000]]


@on_devices
def test_swiglu_leaves_its_input_and_can_go_back_again(device):
    x = random(5, 34, device=device).requires_grad_()
    before = x.detach().clone()
    y = swiglu(x, implementation="triton")
    first, again = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again) and torch.equal(x, before)


@on_devices
def test_swiglu_of_no_rows(device):
    x = torch.zeros(0, 3, 8, device=device, requires_grad=True)
    y = swiglu(x, implementation="triton")
    assert y.shape == (0, 3, 4)
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


@on_devices
def test_swiglu_compiles_into_one_graph(device):
    check(
        random(2, 3, 34, device=device), torch.compile(swiglu, fullgraph=True, backend="aot_eager")
    )


@on_devices
def test_swiglu_op_passes_opcheck(device):
    x = random(3, 34, device=device).requires_grad_()
    torch.library.opcheck(torch.ops.kernels.swiglu, (x,))


def test_reference_and_auto_equal_the_mlp_of_03():
    """On a CPU auto is the reference; the two halves come in the order of gate_up's rows."""
    gpt = importlib.import_module("03_gpt")
    mlp = gpt.MLP(gpt.GPTConfig(d_model=8, d_mlp=12, n_head=2, n_kv_head=1))
    x, gain = random(2, 5, 8), random(8, seed=1)
    n = gpt.rms_norm(x, gain, 1e-6)
    for implementation in ("auto", "reference"):
        ours = mlp.down(swiglu(mlp.gate_up(n), implementation=implementation))
        torch.testing.assert_close(ours, mlp(x, gain))


@pytest.mark.gpu
def test_auto_takes_the_kernels_on_a_gpu():
    x = random(7, 64, device="cuda")
    assert torch.equal(swiglu(x), swiglu(x, implementation="triton"))
    wide = x.double()  # no kernel for it
    assert torch.equal(swiglu(wide), swiglu(wide, implementation="reference"))


@on_devices
@pytest.mark.parametrize(
    "x, message",
    [
        (torch.ones(3, 5), r"gate_up.shape=\(3, 5\) must be \(..., 2M\)"),
        (torch.ones(3, 0), r"gate_up.shape=\(3, 0\) must be"),
        (torch.ones(()), r"gate_up.shape=\(\) must be"),
        (torch.ones(4, 3).T, r"gate_up.stride\(-1\)=3 must be 1"),
        (torch.ones(3, 4).double(), "gate_up.dtype=torch.float64 must be one of"),
    ],
)
def test_swiglu_names_what_is_wrong(x, message, device):
    with pytest.raises(ValueError, match=message):
        swiglu(x.to(device), implementation="triton")


def test_swiglu_names_an_unknown_implementation():
    with pytest.raises(ValueError, match="implementation='fast' must be one of"):
        swiglu(torch.ones(3, 4), implementation="fast")
