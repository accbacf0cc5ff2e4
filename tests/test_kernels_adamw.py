"""Tests of kernels/adamw.py: against torch's AdamW and clip_grad_norm_, and by property.

Where there is no GPU the kernels run in Triton's interpreter, which tests/conftest.py asks for.
Run: python -m pytest tests/test_kernels_adamw.py
"""

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import adamw as module
from kernels.adamw import adamw_step, grad_norm

CHUNK = module.TILE["CHUNK"]
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
)  # numpy: 0 * inf, and 0 / 0 in what is not stored
both_forms = pytest.mark.parametrize("implementation", ["triton", "reference"])
# none, one, odd, a whole chunk, whole chunks, one more than a chunk
SHAPES = [(17, 33), (), (0,), (1,), (7,), (1023,), (CHUNK,), (2, CHUNK), (CHUNK + 1,)]


@pytest.fixture(autouse=True)
def no_tables():
    """Every test begins without the tables of the one before."""
    module._tables.clear()


def random(shapes, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).to(device) for shape in shapes]


def state(params):
    return [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]


def against_torch(params, steps=20, max_norm=None, decays=None, implementation="triton", **values):
    """Steps ours in float32 and torch's in float64 from the same gradients; to 1e-6.

    The gradients change in size from step to step, so that some are clipped and some are not.
    """
    values = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8} | values
    decays = [0.1] * len(params) if decays is None else decays
    theirs = [p.detach().double().cpu().requires_grad_() for p in params]
    groups = [{"params": [p], "weight_decay": decay} for p, decay in zip(theirs, decays)]
    optimizer = torch.optim.AdamW(groups, **values)
    m, v = state(params)
    before = [p.clone() for p in params]
    for t in range(1, steps + 1):
        g = random([p.shape for p in params], params[0].device, seed=t)
        torch._foreach_mul_(g, 2.0 ** (t % 3))
        for p, x in zip(theirs, g):
            p.grad = x.double().cpu()
        clip = {}
        if max_norm is not None:
            norm = grad_norm(g, implementation=implementation)
            clip = {"norm": norm, "max_norm": max_norm}
            exact = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
            assert norm.item() == pytest.approx(exact.item(), rel=1e-6)
        adamw_step(
            params, g, m, v, step=t, weight_decay=decays, implementation=implementation,
            **values, **clip,
        )  # fmt: skip
        optimizer.step()
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(params, before) if a.numel())
    for ours, exact in ((params, theirs), (m, None), (v, None)):
        if exact is None:
            name = "exp_avg" if ours is m else "exp_avg_sq"
            exact = [optimizer.state[p][name] for p in theirs]
        for a, b in zip(ours, exact):
            torch.testing.assert_close(a.double().cpu(), b.detach(), rtol=1e-6, atol=1e-6)


@on_devices
@both_forms
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"lr": 1e-2, "betas": (0.9, 0.999), "max_norm": 100.0},
        {"betas": (0.0, 0.99), "eps": 1e-3, "decays": [0.0] * 9},
        {"betas": (0.8, 0.0), "decays": [0.0, 0.5, 0.1] * 3, "max_norm": 1e9},
        {"lr": 1e-2, "eps": 1e-15, "decays": [1.0] * 9, "max_norm": 1e-3},
    ],
)
def test_adamw_step_follows_torch_for_20_steps(values, implementation, device):
    against_torch(random(SHAPES, device), implementation=implementation, **values)


@on_devices
@settings(max_examples=6, deadline=None)
@given(st.lists(st.sampled_from([0, 1, 3, 100, CHUNK - 1, CHUNK, 2 * CHUNK + 5]), max_size=5))
def test_adamw_step_follows_torch_at_any_sizes(device, sizes):
    against_torch(random([(n,) for n in [*sizes, 2]], device), steps=5, max_norm=10.0)


@on_devices
@pytest.mark.parametrize("first", [1, 2, 4])
def test_tensors_at_any_address_are_served(first, device):
    """Views that begin 4, 8 or 16 bytes into an allocation: only the last can go by 16 bytes."""
    buffer = random([(3 * CHUNK,)], device)[0]
    params = [buffer[first : first + 2 * CHUNK], buffer[2 * CHUNK + 8 : -first]]
    outside = [buffer[:first].clone(), buffer[-first:].clone()]
    against_torch(params)
    assert torch.equal(buffer[:first], outside[0]) and torch.equal(buffer[-first:], outside[1])


@on_devices
def test_lr_step_and_norm_may_be_tensors_of_any_type(device):
    wanted, m, v = (lists := random(SHAPES, device)), *state(lists)
    g = random(SHAPES, device, seed=1)
    norm = grad_norm(g, implementation="reference")
    adamw_step(wanted, g, m, v, lr=0.25, step=3, norm=norm, max_norm=0.5, implementation="triton")
    for kind in (torch.float32, torch.float64, torch.int64):
        p = random(SHAPES, device)
        m, v = state(p)
        lr = torch.tensor(0.25, dtype=kind if kind.is_floating_point else None, device=device)
        step = torch.tensor(3, dtype=kind, device=device)
        adamw_step(
            p, g, m, v, lr=lr, step=step, norm=norm.to(lr), max_norm=0.5, implementation="triton"
        )
        assert all(torch.equal(a, b) for a, b in zip(p, wanted))


@on_devices
@both_forms
def test_first_step_is_lr_times_sign_even_for_the_slowest_beta(implementation, device):
    """1 - 0.9999 in float32 is off by 2e-4 of itself, and the step with it."""
    p = [torch.zeros(4, device=device)]
    g = [torch.tensor([1.0, -1.0, 1e4, -1e-4], device=device)]
    options = {"betas": (0.9, 0.9999), "weight_decay": 0.0, "eps": 1e-12}
    adamw_step(p, g, *state(p), lr=1.0, step=1, implementation=implementation, **options)
    assert p[0].tolist() == pytest.approx([-1, 1, -1, 1], rel=2e-6)


@on_devices
@both_forms
def test_second_step_by_hand(implementation, device):
    """g = 3, then -1, with beta 0.5 and 0.75: m_hat = 1/3, v_hat = 31/7."""
    p = [torch.zeros(1, device=device)]
    m, v = state(p)
    for t, g in ((1, 3.0), (2, -1.0)):
        g = [torch.tensor([g], device=device)]
        options = {"betas": (0.5, 0.75), "eps": 0.0, "implementation": implementation}
        adamw_step(p, g, m, v, lr=1.0, step=t, weight_decay=0.0, **options)
    assert p[0].item() == pytest.approx(-1 - (1 / 3) / math.sqrt(31 / 7), abs=1e-6)


@on_devices
@both_forms
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_shows(bad, implementation, device):
    """As with clip_grad_norm_: a norm of nan spoils all, one of inf zeroes the finite rest."""
    g = random([(5,), (7,)], device, seed=1)
    g[1][3] = bad
    theirs = [torch.ones_like(x).requires_grad_() for x in g]
    for p, x in zip(theirs, g):
        p.grad = x.clone()
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.1).step()
    norm = grad_norm(g, implementation=implementation)
    assert str(norm.item()) == str(bad)
    p = [torch.ones_like(x) for x in g]
    options = {"weight_decay": 0.1, "norm": norm, "max_norm": 1.0}
    adamw_step(p, g, *state(p), lr=0.1, step=1, implementation=implementation, **options)
    for a, b in zip(p, theirs):
        torch.testing.assert_close(a, b.detach(), equal_nan=True)


@on_devices
def test_grad_norm_gives_the_same_bits_again_and_leaves_gradients(device):
    g = random(SHAPES, device)
    before = [x.clone() for x in g]
    one, two = (grad_norm(g, implementation="triton") for _ in range(2))
    assert one.shape == () and one.dtype == torch.float32 and torch.equal(one, two)
    assert all(torch.equal(a, b) for a, b in zip(g, before))


@on_devices
@both_forms
def test_grad_norm_of_a_known_length(implementation, device):
    g = [torch.full((3,), 2.0, device=device), torch.full((CHUNK + 1,), -2.0, device=device)]
    wanted = 2 * math.sqrt(CHUNK + 4)
    assert grad_norm(g, implementation=implementation).item() == pytest.approx(wanted, rel=1e-6)
    assert grad_norm([x[:0] for x in g], implementation=implementation).item() == 0
    assert grad_norm([]).item() == 0


@on_devices
def test_parameters_that_require_gradients_change_in_place(device):
    p = [torch.nn.Parameter(x) for x in random([(3, 4), (5,)], device)]
    sum(x.square().sum() for x in p).backward()
    addresses = [x.data_ptr() for x in p]
    wanted = [x.detach() - 0.1 * x.detach().sign() for x in p]
    grads = [x.grad for x in p]
    adamw_step(p, grads, *state(p), lr=0.1, step=1, weight_decay=0.0, implementation="triton")
    assert [x.data_ptr() for x in p] == addresses
    for a, b in zip(p, wanted):
        torch.testing.assert_close(a.detach(), b, rtol=1e-5, atol=1e-6)


@on_devices
def test_a_table_is_made_once_and_the_oldest_goes(device, monkeypatch):
    p, g = random(SHAPES, device), random(SHAPES, device, seed=1)
    m, v = state(p)
    for t in (1, 2, 3):
        adamw_step(p, g, m, v, lr=0.1, step=t, implementation="triton")
    assert len(module._tables) == 1
    adamw_step(p, g, m, v, lr=0.1, step=4, weight_decay=0.3, implementation="triton")
    assert len(module._tables) == 2  # another decay is another table
    monkeypatch.setattr(module, "TABLES", 3)
    others = [random([(5,)], device, seed=i) for i in range(4)]
    for x in others:
        grad_norm(x, implementation="triton")
    assert len(module._tables) == 3


@on_devices
def test_adamw_step_compiles_into_one_graph(device):
    def both(p, g, m, v, lr, step):
        norm = grad_norm(g, implementation="triton")
        options = {"norm": norm, "max_norm": 1.0, "implementation": "triton"}
        adamw_step(p, g, m, v, lr=lr, step=step, **options)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    results = []
    for f in (both, compiled):
        p, g = random(SHAPES, device), random(SHAPES, device, seed=1)
        m, v = state(p)
        for t in (1, 2):
            f(p, g, m, v, torch.tensor(0.1, device=device), torch.tensor(t, device=device))
        results.append((*p, *m, *v))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@on_devices
def test_adamw_ops_pass_opcheck(device):
    p, g = random([(3,), (5, 2)], device), random([(3,), (5, 2)], device, seed=1)
    lr, step, norm = (torch.tensor(x, device=device) for x in (0.1, 3.0, 2.0))
    arguments = (p, g, *state(p), lr, step, 0.9, 0.99, 1e-8, [0.1, 0.0], norm, 1.0)
    torch.library.opcheck(torch.ops.kernels.adamw, arguments)
    torch.library.opcheck(torch.ops.kernels.grad_norm, (g,))


@pytest.mark.gpu
def test_a_cuda_graph_takes_new_rates_and_counts_its_own_steps():
    against = random(SHAPES, "cuda")
    p, g = [x.clone() for x in against], random(SHAPES, "cuda", seed=1)
    lr, step = torch.tensor(0.0, device="cuda"), torch.tensor(0.0, device="cuda")
    m, v = state(p)

    def one():
        step.add_(1)
        norm = grad_norm(g)
        adamw_step(p, g, m, v, lr=lr, step=step, norm=norm, max_norm=1.0)

    one()  # compiles, and makes the tables; with lr = 0 no parameter moves
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one()
    for x in (*m, *v, step):
        x.zero_()
    module._tables.clear()  # the graph's own are kept
    reference = state(against)
    for t in range(1, 6):
        noise = random(SHAPES, "cuda", seed=10 + t)
        torch._foreach_copy_(g, noise)
        lr.fill_(0.1 / t)
        graph.replay()
        norm = grad_norm(noise, implementation="reference")
        options = {"norm": norm, "max_norm": 1.0, "implementation": "reference"}
        adamw_step(against, noise, *reference, lr=0.1 / t, step=t, **options)
    for a, b in zip(p, against):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
def test_new_addresses_within_a_capture_are_refused():
    g = random(SHAPES, "cuda")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="set_to_none=False"), torch.cuda.graph(graph):
        grad_norm(g)


@pytest.mark.gpu
def test_auto_takes_the_kernels_where_they_fit():
    def step(implementation, params):
        g = [torch.ones_like(p) for p in params]
        adamw_step(params, g, *state(params), lr=0.1, step=1, implementation=implementation)
        return len(module._tables)

    assert step("auto", random(SHAPES, "cuda")) == 1
    assert step("auto", [x.half() for x in random(SHAPES, "cuda")]) == 1  # the reference
    assert step("auto", [random([(4, 4)], "cuda")[0].T]) == 1
    assert step("auto", random(SHAPES)) == 1


def test_auto_is_the_reference_on_a_cpu_and_equals_04():
    adamw = importlib.import_module("04_adamw")
    values = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    results = []
    for form in ("auto", "reference", "04"):
        p = [x.double() for x in random(SHAPES)]
        m, v = state(p)
        for t in range(1, 5):
            g = [x.double() for x in random(SHAPES, seed=t)]
            if form == "04":
                for row in zip(p, g, m, v):
                    adamw.adamw_reference(*row, t, *values.values())
            else:
                adamw_step(p, g, m, v, step=t, implementation=form, **values)
        results.append((*p, *m, *v))
    for ours in results[:2]:
        for a, b in zip(ours, results[2]):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def ones(*shape, **kind):
    return [torch.ones(shape, **kind), torch.ones(shape, **kind)]


def at(device, x):
    """x on the device with the strides that it has here."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)


@on_devices
@pytest.mark.parametrize(
    "change, message",
    [
        ({"grads": ones(3)[:1]}, r"len\(grads\)=1 must be 2"),
        ({"weight_decay": [0.1]}, r"len\(weight_decay\)=1 must be 2"),
        ({"exp_avgs": ones(4)}, r"exp_avgs\[0\].shape=\(4,\) must be \(3,\)"),
        ({"exp_avg_sqs": ones(3, dtype=torch.float64)}, r"exp_avg_sqs\[0\].dtype=torch.float64"),
        (
            {"params": ones(3, dtype=torch.bfloat16)},
            "params.0..dtype=torch.bfloat16 must be torch.f",
        ),
        ({"params": [torch.ones(3), torch.ones(6)[::2]]}, r"params\[1\].stride\(\)=\(2,\) must be"),
        ({"grads": ones(3, device="meta")}, r"grads\[0\].device=meta must be c"),
        ({"max_norm": 1.0}, "max_norm=1.0 must be given exactly with norm"),
        ({"norm": torch.ones(())}, "max_norm=None must be given exactly with norm"),
        ({"lr": torch.ones(2)}, r"lr.shape=\(2,\) must be \(\)"),
        ({"step": torch.ones((), device="meta")}, "step.device=meta must be c"),
        ({"implementation": "fast"}, "implementation='fast' must be one of"),
    ],
)
def test_adamw_step_names_what_is_wrong(change, message, device):
    lists = {name: ones(3) for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    arguments = lists | {"lr": 0.1, "step": 1, "implementation": "triton"} | change
    for name, value in arguments.items():
        if isinstance(value, list) and name != "weight_decay":
            arguments[name] = [x if x.is_meta else at(device, x) for x in value]
        elif isinstance(value, torch.Tensor) and not value.is_meta:
            arguments[name] = value.to(device)
    with pytest.raises(ValueError, match=message):
        adamw_step(**arguments)
