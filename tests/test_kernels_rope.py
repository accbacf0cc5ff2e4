"""Tests of kernels/rope.py: against complex multiplication in float64, 03_gpt.py, and by property.

Where there is no GPU the kernels run in Triton's interpreter, which tests/conftest.py asks for.
Run: python -m pytest tests/test_kernels_rope.py
"""

import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import rope as module
from kernels.rope import rope, rope_qkv

EPS = 1e-5
DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are the GPU's"),
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
on_devices = pytest.mark.parametrize("device", DEVICES)
pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # numpy: 1 / 0 in rows that are not stored
# float32: sums of up to D terms of size 1. bfloat16: all is float32 but what is written, and that
# is rounded once, to 8 bits: by at most 2^-8 of itself to the nearest, and in the interpreter,
# which cuts bits off, 2^-7.
BOUNDS = {torch.float32: (2e-5, 2e-5), torch.bfloat16: (2**-7, 2e-5)}


def random(*shape, dtype=torch.float32, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).to(device)


def angles(T, D):
    """Those of 03_gpt.py: t * 10000^(-2i/D) radians, float64."""
    frequency = 10_000.0 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    return torch.outer(torch.arange(T, dtype=torch.float64), frequency)


def tables(T, D, device="cpu"):
    return angles(T, D).cos().float().to(device), angles(T, D).sin().float().to(device)


def exact(x, gain):
    """Norm by torch, then each pair as a complex number times exp(i angle); float64."""
    B, T, H, D = x.shape
    if gain is not None:
        x = F.rms_norm(x, (D,), gain, EPS)
    pairs = torch.complex(x[..., : D // 2], x[..., D // 2 :])
    turn = torch.polar(torch.ones(T, D // 2).double(), angles(T, D)).to(x.device)
    turned = pairs * turn[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


def assert_near(ours, wanted, dtype):
    """Within the bound of dtype; the absolute part counts in units of the tensor's own size."""
    rtol, atol = BOUNDS[dtype]
    size = max(1.0, wanted.abs().max().item())
    torch.testing.assert_close(ours.double(), wanted, rtol=rtol, atol=atol * size)


def check(qkv, H, G, gains, f=rope_qkv, packed=True):
    """q, k, v and the gradients of qkv and the gains, all at the numbers that the kernels saw."""
    T, D = qkv.shape[1], qkv.shape[3]
    cos, sin = tables(T, D, qkv.device)
    qkv = qkv.detach().requires_grad_()
    gains = [None if g is None else g.detach().requires_grad_() for g in gains]
    given = [g for g in gains if g is not None]
    options = {"q_gain": gains[0], "k_gain": gains[1], "eps": EPS, "implementation": "triton"}
    if packed:
        ours = f(qkv, cos, sin, H, G, **options)
    else:
        q, k, v = qkv.split((H, G, G), dim=2)
        ours = *f(q, k, cos, sin, **options), v
    wide = qkv.detach().double().requires_grad_()
    wide_gains = [None if g is None else g.detach().double().requires_grad_() for g in gains]
    q, k, v = wide.split((H, G, G), dim=2)
    wanted = exact(q, wide_gains[0]), exact(k, wide_gains[1]), v
    dy = [random(*y.shape, dtype=y.dtype, device=y.device, seed=i) for i, y in enumerate(ours)]
    ours = *ours, *torch.autograd.grad(ours, (qkv, *given), dy)
    inputs = (wide, *(g for g in wide_gains if g is not None))
    wanted = *wanted, *torch.autograd.grad(wanted, inputs, [a.double() for a in dy])
    for a, b in zip(ours, wanted):
        assert a.shape == b.shape and a.dtype == qkv.dtype
        assert_near(a, b, qkv.dtype)


def case(B, T, H, G, D, norm, dtype=torch.float32, device="cpu", seed=0):
    kind = {"dtype": dtype, "device": device}
    qkv = random(B, T, H + 2 * G, D, seed=seed + 10, **kind)
    gains = [random(D, seed=seed + i, **kind) if norm else None for i in (20, 30)]
    return qkv, H, G, gains


SIZES = [(1, 1, 1, 1, 2), (2, 7, 4, 2, 64), (1, 5, 6, 3, 96), (1, 3, 2, 1, 256)]


@on_devices
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("B, T, H, G, D", SIZES)
def test_rope_qkv_matches_complex_multiplication(B, T, H, G, D, norm, dtype, device):
    check(*case(B, T, H, G, D, norm, dtype, device))


@on_devices
def test_rope_qkv_of_1023_positions(device):
    check(*case(1, 1023, 1, 1, 2, True, device=device))


@on_devices
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("norm", [False, True])
def test_rope_of_separate_views_matches_complex_multiplication(norm, dtype, device):
    """q and k are views of the packed tensor here: strided, and no copy is asked for."""
    check(*case(2, 7, 4, 2, 64, norm, dtype, device), f=rope, packed=False)


@on_devices
@settings(max_examples=10, deadline=None)
@given(
    *(st.integers(1, n) for n in (3, 9, 5, 3, 40)),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_rope_matches_complex_multiplication_at_any_size(
    device, B, T, H, G, half, norm, packed, seed
):
    arguments = case(B, T, H, G, 2 * half, norm, device=device, seed=seed)
    check(*arguments, f=rope_qkv if packed else rope, packed=packed)


@on_devices
@pytest.mark.parametrize("view", ["columns", "every second token", "heads first", "expanded"])
def test_rope_qkv_of_tensors_that_are_not_contiguous(view, device):
    wide = random(3, 8, 12, 40, device=device)
    qkv = {
        "columns": wide[:, :, 1:9, 5:37],
        "every second token": wide[:, ::2, :8, :32],
        "heads first": wide.transpose(1, 2)[:, :, :, :32],
        "expanded": wide[:1, :, :8, :32].expand(3, 8, 8, 32),
    }[view]
    gains = [random(32, device=device, seed=i) for i in (1, 2)]
    check(qkv, 4, 2, gains)


@on_devices
@pytest.mark.parametrize("norm", [False, True])
def test_rope_takes_gradients_of_stride_zero(norm, device):
    qkv, H, G, gains = case(2, 5, 2, 1, 16, norm, device=device)
    cos, sin = tables(5, 16, device)
    options = {"q_gain": gains[0], "k_gain": gains[1]}
    results = []
    for implementation in ("triton", "reference"):
        x = qkv.clone().requires_grad_()
        outputs = rope_qkv(x, cos, sin, H, G, **options, implementation=implementation)
        results.append(torch.autograd.grad(sum(y.sum() for y in outputs), x)[0])
    torch.testing.assert_close(*results, rtol=2e-5, atol=2e-5)


@on_devices
def test_rope_qkv_when_only_keys_are_used(device):
    qkv, H, G, gains = case(2, 5, 2, 1, 16, True, device=device)
    qkv.requires_grad_()
    k = rope_qkv(
        qkv, *tables(5, 16, device), H, G, q_gain=gains[0], k_gain=gains[1], implementation="triton"
    )[1]
    (dx,) = torch.autograd.grad(k.square().sum(), qkv)
    assert dx[:, :, 2].abs().min() > 0
    assert torch.equal(dx[:, :, [0, 1, 3]], torch.zeros_like(dx[:, :, [0, 1, 3]]))


@on_devices
def test_rope_of_more_tiles_than_programs(device, monkeypatch):
    """Every program then sums the gains' gradients over several tiles, of queries and of keys."""
    monkeypatch.setattr(module, "PROGRAMS", 2)
    check(*case(2, 11, 3, 2, 128, True, device=device))


@on_devices
def test_rope_backward_gives_the_same_bits_again(device):
    qkv, H, G, gains = case(2, 33, 4, 2, 64, True, device=device)
    inputs = [a.requires_grad_() for a in (qkv, *gains)]
    options = {"q_gain": gains[0], "k_gain": gains[1], "implementation": "triton"}
    runs = []
    for _ in range(2):
        q, k, v = rope_qkv(qkv, *tables(33, 64, device), H, G, **options)
        loss = q.square().sum() + k.sum() + v.sum()
        runs.append((q, k, v, *torch.autograd.grad(loss, inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@on_devices
def test_rotation_keeps_lengths_and_its_gradient_turns_back(device):
    """R^T R = 1: with the output itself as gradient, what comes back is the input."""
    x = random(1, 50, 3, 32, device=device).requires_grad_()
    q, k = rope(x, x, *tables(50, 32, device), implementation="triton")
    torch.testing.assert_close(q.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(torch.autograd.grad(q, x, q)[0], x, rtol=2e-5, atol=2e-5)


@on_devices
def test_rope_scores_depend_only_on_distance(device):
    one = random(1, 1, 1, 64, device=device)
    q, k = rope(
        one.expand(1, 40, 1, 64), random(1, 1, 1, 64, device=device, seed=1).expand(1, 40, 1, 64),
        *tables(40, 64, device), implementation="triton",
    )  # fmt: skip
    scores = q[0, :, 0] @ k[0, :, 0].T  # (T, T)
    for distance in (0, 1, 13):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=0)
    assert scores.diagonal(0)[0] != pytest.approx(scores.diagonal(13)[0].item(), abs=0.1)


@on_devices
def test_rope_keeps_the_zero_head_zero_without_eps(device):
    """Rows beyond the end are zero, too: with eps = 0 they must not turn a sum into nan."""
    qkv, H, G, gains = case(1, 3, 2, 1, 16, True, device=device)
    qkv.requires_grad_()
    gains[0].requires_grad_()
    options = {"q_gain": gains[0], "k_gain": gains[1], "eps": 0.0, "implementation": "triton"}
    q, k, v = rope_qkv(qkv, *tables(3, 16, device), H, G, **options)
    gradients = torch.autograd.grad(q.sum() + k.sum() + v.sum(), (qkv, gains[0]))
    assert all(a.isfinite().all() for a in (q, k, v, *gradients))


@on_devices
def test_rope_leaves_its_input(device):
    qkv, H, G, gains = case(2, 5, 2, 1, 16, True, device=device)
    before = qkv.clone()
    qkv.requires_grad_()
    outputs = rope_qkv(
        qkv, *tables(5, 16, device), H, G, q_gain=gains[0], k_gain=gains[1], implementation="triton"
    )
    sum(y.sum() for y in outputs).backward()
    assert torch.equal(qkv, before)


@on_devices
def test_rope_of_no_tokens(device):
    qkv = torch.zeros(0, 5, 4, 16, device=device, requires_grad=True)
    gains = [torch.ones(16, device=device, requires_grad=True) for _ in range(2)]
    options = {"q_gain": gains[0], "k_gain": gains[1], "implementation": "triton"}
    q, k, v = rope_qkv(qkv, *tables(5, 16, device), 2, 1, **options)
    assert (q.shape, k.shape, v.shape) == ((0, 5, 2, 16), (0, 5, 1, 16), (0, 5, 1, 16))
    assert torch.equal(torch.autograd.grad(q.sum(), gains[0])[0], torch.zeros(16, device=device))


@on_devices
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_rope_compiles_into_one_graph(packed, norm, device):
    f = torch.compile(rope_qkv if packed else rope, fullgraph=True, backend="aot_eager")
    check(*case(2, 3, 4, 2, 16, norm, device=device), f=f, packed=packed)


@on_devices
@pytest.mark.parametrize("H, G, norm", [(4, 2, True), (4, 2, False), (8, 0, True)])
def test_rope_op_passes_opcheck(H, G, norm, device):
    qkv, _, _, gains = case(2, 3, 4, 2, 16, norm, device=device)
    inputs = [a if a is None else a.requires_grad_() for a in (qkv, *gains)]
    arguments = (inputs[0], *tables(3, 16, device), *inputs[1:], EPS, H, G)
    torch.library.opcheck(torch.ops.kernels.rope, arguments)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(
    "implementation",
    ["auto", "reference", pytest.param("triton", marks=DEVICES[0].marks)],
)
def test_rope_qkv_serves_the_attention_of_03(implementation, qk_norm, monkeypatch):
    """Its packed rows, its table, its norms; on a CPU auto is the reference."""
    gpt = importlib.import_module("03_gpt")
    config = gpt.GPTConfig(
        vocab_size=11,
        seq_len=9,
        n_layer=1,
        n_head=4,
        n_kv_head=2,
        d_model=32,
        d_mlp=8,
        qk_norm=qk_norm,
    )
    layer = gpt.GPT(config).blocks[0].attention
    if qk_norm:
        for norm, seed in ((layer.q_norm, 1), (layer.k_norm, 2)):
            norm.weight.data = random(8, seed=seed)
    layer.out.weight.data = torch.eye(32)
    cos, sin = gpt.rope_table(9, 8, config.rope_theta)
    x, gain = random(2, 9, 32), random(32, seed=3)
    seen = {}

    def spy(q, k, v, *_):
        seen["theirs"] = q, k, v
        return q

    monkeypatch.setattr(gpt, "attention", spy)
    with torch.no_grad():  # training on a CPU takes another way
        layer(x, gain, cos, sin)
    gains = {}
    if qk_norm:
        gains = {"q_gain": layer.q_norm.weight, "k_gain": layer.k_norm.weight}
    qkv = layer.qkv(gpt.rms_norm(x, gain, config.norm_eps)).unflatten(-1, (8, 8))
    options = {"eps": config.norm_eps, "implementation": implementation, **gains}
    ours = rope_qkv(qkv, cos, sin, 4, 2, **options)
    for a, b in zip(ours, seen["theirs"]):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.gpu
def test_auto_takes_the_kernels_on_a_gpu():
    qkv, H, G, _ = case(2, 5, 4, 2, 64, False, device="cuda")
    arguments = qkv, *tables(5, 64, "cuda"), H, G
    q, k, v = rope_qkv(*arguments)
    assert v.is_contiguous()
    for a, b in zip((q, k, v), rope_qkv(*arguments, implementation="triton")):
        assert torch.equal(a, b)


ones = torch.ones
X, TABLE, GAIN = ones(2, 3, 4, 8), ones(3, 4), ones(8)


@on_devices
@pytest.mark.parametrize(
    "change, message",
    [
        ({"qkv": ones(2, 3, 8)}, r"qkv.shape=\(2, 3, 8\) must be \(B, T, heads, D\)"),
        ({"qkv": ones(2, 3, 4, 7)}, "even D"),
        ({"qkv": ones(2, 3, 5, 8)}, r"n_head \+ 2 n_kv_head = 4"),
        ({"n_head": 4, "n_kv_head": 0}, "at least one head of each"),
        ({"cos": ones(4, 4)}, r"cos.shape=\(4, 4\) must be \(3, 4\)"),
        ({"sin": ones(3, 8)}, r"sin.shape=\(3, 8\) must be \(3, 4\)"),
        ({"q_gain": GAIN}, r"the gains given=\['q_gain'\] must be both or none"),
        ({"q_gain": GAIN, "k_gain": ones(4)}, r"k_gain.shape=\(4,\) must be \(8,\)"),
        ({"qkv": X.double()}, "qkv.dtype=torch.float64"),
        ({"qkv": ones(2, 3, 8, 4).mT}, r"qkv.stride\(-1\)=4 must be 1"),
        ({"cos": TABLE.double()}, "cos.dtype=torch.float64"),
        ({"sin": TABLE.bfloat16()}, "sin.dtype=torch.bfloat16"),
        ({"sin": ones(4, 3).T}, r"sin.stride\(\)=\(1, 3\) must be contiguous"),
        ({"q_gain": GAIN, "k_gain": GAIN.double()}, "k_gain.dtype=torch.float64"),
        ({"q_gain": GAIN, "k_gain": GAIN.half()}, "the gains' dtypes=.* must be the same"),
        ({"cos": ones(3, 4, device="meta")}, "cos.device=meta must be c"),
        (
            {"qkv": ones(1, 1, 4, 2050), "cos": ones(1, 1025), "sin": ones(1, 1025)},
            r"qkv.shape\[-1\]=2050 must be at most 2048",
        ),
    ],
)
def test_rope_qkv_names_what_is_wrong(change, message, device):
    arguments = {"qkv": X, "cos": TABLE, "sin": TABLE, "n_head": 2, "n_kv_head": 1} | change
    for name, a in arguments.items():
        if isinstance(a, torch.Tensor) and not a.is_meta:
            arguments[name] = a.to(device)
    with pytest.raises(ValueError, match=message):
        rope_qkv(**arguments, implementation="triton")


def test_rope_names_the_argument_that_is_wrong():
    with pytest.raises(ValueError, match=r"k.shape=\(2, 3, 4, 7\) must be"):
        rope(X, ones(2, 3, 4, 7), TABLE, TABLE)
    with pytest.raises(ValueError, match=r"cos.shape=\(3, 4\) must be \(5, 4\) for k's shape"):
        rope(X, ones(2, 5, 4, 8), TABLE, TABLE)
    with pytest.raises(ValueError, match="implementation='fast' must be one of"):
        rope(X, X, TABLE, TABLE, implementation="fast")
