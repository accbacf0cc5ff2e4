"""Tests of kernels/rmsnorm.py: against torch's rms_norm in float64, and by property.

Where there is no GPU the kernels run in Triton's interpreter, which tests/conftest.py asks for.
Run: python -m pytest tests/test_kernels_rmsnorm.py
"""

import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import rmsnorm as module
from kernels.rmsnorm import rmsnorm

EPS = 1e-5
DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are the GPU's"),
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
on_devices = pytest.mark.parametrize("device", DEVICES)
# float32: sums of up to 1023 terms of size 1. bfloat16: all is float32 but what is written, and
# that is rounded once, to 8 bits: by at most 2^-8 of itself to the nearest, and in the interpreter,
# which cuts bits off, 2^-7.
BOUNDS = {torch.float32: (2e-5, 2e-5), torch.bfloat16: (2**-7, 2e-5)}


def random(*shape, dtype=torch.float32, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).to(device)


def assert_near(ours, exact, dtype=torch.float32):
    """Within the bound of dtype; the absolute part counts in units of the tensor's own size."""
    rtol, atol = BOUNDS[dtype]
    size = max(1.0, exact.abs().max().item()) if exact.numel() else 1.0
    torch.testing.assert_close(
        ours.double().cpu(), exact.double().cpu(), rtol=rtol, atol=atol * size
    )


def exact(s, g, dy, ds=None):
    """y, and the gradients of s and g, in float64 by torch and its autograd."""
    s, g = (a.detach().double().requires_grad_() for a in (s, g))
    y = F.rms_norm(s, (s.shape[-1],), g, EPS)
    d_s, d_g = torch.autograd.grad(y, (s, g), dy.double())
    return y.detach(), d_s if ds is None else d_s + ds.double(), d_g


def check(x, g, f=rmsnorm):
    x, g = x.detach().requires_grad_(), g.detach().requires_grad_()
    y = f(x, g, EPS, implementation="triton")
    assert y.dtype == x.dtype and y.shape == x.shape
    dy = random(*y.shape, dtype=y.dtype, device=y.device, seed=3)
    ours = y, *torch.autograd.grad(y, (x, g), dy)
    for a, b in zip(ours, exact(x, g, dy)):
        assert_near(a, b, x.dtype)


def check_residual(x, r, g, f=rmsnorm):
    x, r, g = (a.detach().requires_grad_() for a in (x, r, g))
    y, s = f(x, g, EPS, r, implementation="triton")
    assert y.dtype == s.dtype == torch.promote_types(x.dtype, r.dtype)
    assert_near(s, x.double() + r.double(), s.dtype)
    dy, ds = (random(*y.shape, dtype=y.dtype, device=y.device, seed=i) for i in (3, 4))
    dx, dr, dg = torch.autograd.grad((y, s), (x, r, g), (dy, ds))
    assert (dx.dtype, dr.dtype, dg.dtype) == (x.dtype, r.dtype, g.dtype)
    wanted_y, wanted_d, wanted_dg = exact(s, g, dy, ds)  # at the s that was written
    assert_near(y, wanted_y, y.dtype)
    assert_near(dx, wanted_d, x.dtype)
    assert_near(dr, wanted_d, r.dtype)
    assert_near(dg, wanted_dg, y.dtype)


@on_devices
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("N, C", [(1, 1), (7, 7), (3, 1023), (300, 16), (1, 4097)])
def test_rmsnorm_matches_torch(N, C, dtype, device):
    x, g = random(N, C, dtype=dtype, device=device), random(C, dtype=dtype, device=device, seed=1)
    check(x, g)
    check_residual(x, random(N, C, dtype=dtype, device=device, seed=2), g)


@on_devices
@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(1, 200), st.booleans(), st.integers(0, 99))
def test_rmsnorm_matches_torch_at_any_size(device, N, C, residual, seed):
    x, g = random(N, C, device=device, seed=seed), random(C, device=device, seed=seed + 1)
    if residual:
        check_residual(x, random(N, C, device=device, seed=seed + 2), g)
    else:
        check(x, g)


@on_devices
def test_rmsnorm_of_types_that_differ(device):
    """As under autocast: a bfloat16 branch joins a float32 stream, with float32 gains."""
    x, r = random(5, 33, dtype=torch.bfloat16, device=device), random(5, 33, device=device, seed=2)
    g = random(33, device=device, seed=1)
    check_residual(x, r, g)
    check_residual(r, x, g)
    check(x, g)


@on_devices
@pytest.mark.parametrize("view", ["columns", "every second", "transposed"])
def test_rmsnorm_of_rows_that_are_not_contiguous(view, device):
    wide = random(6, 5, 50, device=device)
    x = {
        "columns": wide[:, :, 7:40],
        "every second": wide[::2, :, :33],
        "transposed": wide.transpose(0, 1)[..., :33],
    }[view]
    assert not x.is_contiguous()
    g, r = random(33, device=device, seed=1), random(*x.shape, device=device, seed=2)
    check(x, g)
    check_residual(x, r, g)
    check_residual(r, x, g)


@on_devices
def test_rmsnorm_takes_gradients_of_stride_zero(device):
    """What .sum() sends back is one number, expanded."""
    x = random(7, 33, device=device).requires_grad_()
    g, r = random(33, device=device, seed=1), random(7, 33, device=device, seed=2)
    y, s = rmsnorm(x, g, EPS, r, implementation="triton")
    (y.sum() + s.sum()).backward()
    ones = torch.ones(7, 33, device=device)
    assert_near(x.grad, exact(s, g, ones, ones)[1])


@on_devices
@pytest.mark.parametrize("used", [0, 1])
def test_rmsnorm_when_only_one_output_is_used(used, device):
    x, g, r = (
        random(*shape, device=device).requires_grad_() for shape in [(4, 20), (20,), (4, 20)]
    )
    out = rmsnorm(x, g, EPS, r, implementation="triton")
    dy = random(4, 20, device=device, seed=3)
    zero = torch.zeros_like(dy)
    dx, dg = torch.autograd.grad(out[used], (x, g), dy)
    wanted = exact(out[1], g, *((dy, zero) if used == 0 else (zero, dy)))
    assert_near(dx, wanted[1])
    assert_near(dg, wanted[2])


@on_devices
def test_rmsnorm_of_more_tiles_than_programs(device, monkeypatch):
    """Every program then sums dg over several tiles."""
    monkeypatch.setattr(module, "PROGRAMS", 3)
    check_residual(random(37, 300, device=device), random(37, 300, device=device, seed=2),
                   random(300, device=device, seed=1))  # fmt: skip


@on_devices
def test_rmsnorm_backward_gives_the_same_bits_again(device):
    x, g = random(600, 40, device=device).requires_grad_(), random(40, device=device, seed=1)
    g.requires_grad_()
    dy = random(600, 40, device=device, seed=3)
    runs = []
    for _ in range(2):
        y = rmsnorm(x, g, EPS, implementation="triton")
        runs.append((y, *torch.autograd.grad(y, (x, g), dy)))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@on_devices
def test_rmsnorm_leaves_its_input_and_may_be_differentiated_twice_over(device):
    x, r = random(5, 33, device=device).requires_grad_(), random(5, 33, device=device, seed=2)
    g = random(33, device=device, seed=1)
    before = x.detach().clone(), r.clone()
    y, s = rmsnorm(x, g, EPS, r, implementation="triton")
    first = torch.autograd.grad(y.sum() + s.sum(), x, retain_graph=True)[0]
    again = torch.autograd.grad(y.sum() + s.sum(), x)[0]
    assert torch.equal(first, again)
    assert torch.equal(x, before[0]) and torch.equal(r, before[1])


@on_devices
def test_rmsnorm_of_no_rows(device):
    x, g = torch.zeros(0, 5, 8, device=device).requires_grad_(), torch.ones(8, device=device)
    g.requires_grad_()
    y = rmsnorm(x, g, EPS, implementation="triton")
    assert y.shape == (0, 5, 8)
    assert torch.equal(torch.autograd.grad(y.sum(), g)[0], torch.zeros(8, device=device))


@on_devices
@pytest.mark.parametrize("residual", [False, True])
def test_rmsnorm_compiles_into_one_graph(residual, device):
    f = torch.compile(rmsnorm, fullgraph=True, backend="aot_eager")
    x, g = random(2, 3, 33, device=device), random(33, device=device, seed=1)
    if residual:
        check_residual(x, random(2, 3, 33, device=device, seed=2), g, f)
    else:
        check(x, g, f)


@on_devices
@pytest.mark.parametrize("residual", [False, True])
def test_rmsnorm_writes_the_type_asked_for(residual, device):
    """y in bfloat16 of a float32 stream is the float32 y, rounded; the gradients are float32."""
    x, g = random(5, 33, device=device), random(33, device=device, seed=1)
    r = random(5, 33, device=device, seed=2) if residual else None
    dy = random(5, 33, device=device, seed=3).bfloat16()
    results = []
    for dtype in (None, torch.bfloat16):
        inputs = [a.clone().requires_grad_() for a in (x, g, r) if a is not None]
        y = rmsnorm(*inputs[:2], EPS, *inputs[2:], dtype=dtype, implementation="triton")
        y, s = y if residual else (y, None)
        assert y.dtype == (dtype or torch.float32) and (s is None or s.dtype == torch.float32)
        results.append((y.float(), *torch.autograd.grad(y, inputs, dy.to(y.dtype))))
    (wide, *wanted), (narrow, *found) = results
    assert ((narrow - wide).abs() <= 2**-7 * wide.abs()).all() and not torch.equal(narrow, wide)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))


@on_devices
@pytest.mark.parametrize("residual", [False, True])
def test_rmsnorm_op_passes_opcheck(residual, device):
    x, g = random(5, 16, device=device).requires_grad_(), random(16, device=device, seed=1)
    r = random(5, 16, device=device, seed=2).requires_grad_() if residual else None
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(torch.ops.kernels.rmsnorm, (x, g.requires_grad_(), EPS, r, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_reference_and_auto_equal_03(dtype):
    """On a CPU auto is the reference, which is the norm of 03_gpt.py."""
    gpt = importlib.import_module("03_gpt")
    x, g = random(4, 24, dtype=dtype), random(24, dtype=dtype, seed=1)
    r = random(4, 24, dtype=dtype, seed=2)
    for implementation in ("auto", "reference"):
        y = rmsnorm(x, g, EPS, implementation=implementation)
        assert torch.equal(y, gpt.rms_norm(x, g, EPS))
        y, s = rmsnorm(x, g, EPS, r, implementation=implementation)
        assert torch.equal(s, x + r) and torch.equal(y, gpt.rms_norm(x + r, g, EPS))


@pytest.mark.gpu
def test_auto_takes_the_kernels_on_a_gpu():
    x, g = random(7, 64, device="cuda"), random(64, device="cuda", seed=1)
    assert torch.equal(rmsnorm(x, g, EPS), rmsnorm(x, g, EPS, implementation="triton"))
    wide = x.double()  # no kernel for it
    assert torch.equal(rmsnorm(wide, g, EPS), rmsnorm(wide, g, EPS, implementation="reference"))


ones = torch.ones


@on_devices
@pytest.mark.parametrize(
    "x, g, r, message",
    [
        (ones(3, 4), ones(5), None, r"weight.shape=\(5,\) must be \(4,\)"),
        (ones(3, 4), ones(4), ones(3, 5), r"residual.shape=\(3, 5\) must be \(3, 4\)"),
        (ones(()), ones(1), None, r"x.shape=\(\) must be"),
        (ones(3, 0), ones(0), None, "C at least 1"),
        (ones(4, 3).T, ones(4), None, r"x.stride\(-1\)=3 must be 1"),
        (ones(3, 4), ones(4), ones(4, 3).T, r"residual.stride\(-1\)=3 must be 1"),
        (ones(3, 4).double(), ones(4), None, "x.dtype=torch.float64 must be one of"),
        (ones(3, 4), ones(4).double(), None, "weight.dtype=torch.float64"),
        (ones(1, 8193), ones(8193), None, r"x.shape\[-1\]=8193 must be at most 8192"),
        (ones(3, 4), ones(4, device="meta"), None, "weight.device=meta must be c"),
    ],
)
def test_rmsnorm_names_what_is_wrong(x, g, r, message, device):
    x, g, r = (a if a is None or a.is_meta else a.to(device) for a in (x, g, r))
    with pytest.raises(ValueError, match=message):
        rmsnorm(x, g, EPS, r, implementation="triton")


@on_devices
def test_rmsnorm_names_a_type_that_it_cannot_write(device):
    with pytest.raises(ValueError, match="dtype=torch.float64 must be one of"):
        rmsnorm(ones(3, 4, device=device), ones(4, device=device), EPS, dtype=torch.float64,
                implementation="triton")  # fmt: skip


def test_rmsnorm_names_an_unknown_implementation():
    with pytest.raises(ValueError, match="implementation='fast' must be one of"):
        rmsnorm(ones(3, 4), ones(4), EPS, implementation="fast")
