"""Tests of kernels/attention.py: against a dense float64 reference, torch's own, and by property.

Run: python -m pytest tests/test_kernels_attention.py
Without a GPU the kernels run in Triton's interpreter (conftest.py); the tests marked gpu do not.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import attention as module
from kernels.attention import attention

triton = pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("o", "L", "dq", "dk", "dv")


def set_tiles(monkeypatch, BM, BN):
    """Blocks of this size in all three kernels: small ones meet every kind of block."""
    row = dict.fromkeys(module.KERNELS, (BM, BN, 4, 1))
    for name in module.CONFIGS:
        monkeypatch.setitem(module.CONFIGS, name, row)


def dense(q, k, v, causal=True, window=None, documents=None, scale=None):
    """o and L in float64: visibility decided pair by pair, in Python, from the definition."""
    q, k, v = (x.double() for x in (q, k, v))
    B, T, H, D = q.shape
    visible = torch.zeros(B, T, T, dtype=torch.bool)
    runs = [[0] * T for _ in range(B)]
    for b in range(B):
        for t in range(1, T):
            changed = documents is not None and bool(documents[b, t] != documents[b, t - 1])
            runs[b][t] = runs[b][t - 1] + changed
        for t in range(T):
            for s in range(T):
                near = window is None or abs(t - s) < window
                visible[b, t, s] = near and runs[b][t] == runs[b][s] and (s <= t or not causal)
    o, lse = [], []
    for h in range(H):
        g = h // (H // k.shape[2])
        scores = q[:, :, h] @ k[:, :, g].mT * (D**-0.5 if scale is None else scale)  # (B, T, T)
        scores = scores.masked_fill(~visible.to(scores.device), -math.inf)
        o.append(scores.softmax(-1) @ v[:, :, g])
        lse.append(torch.logsumexp(scores, -1))
    return torch.stack(o, 2), torch.stack(lse, 1)


def random_inputs(B, T, H, G, D, dtype=torch.float32, seed=0, spread=1.0):
    """q, k, v, and upstream gradients of o and L."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(B, T, H, D), (B, T, G, D), (B, T, G, D), (B, T, H, D), (B, H, T)]
    *qkv, do, dlse = (spread * torch.randn(shape, generator=g) for shape in shapes)
    return [x.to(DEVICE, dtype) for x in qkv], (do.to(DEVICE, dtype), dlse.to(DEVICE))


def random_documents(B, T, mean=10, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(B, T, generator=g) < 1 / mean).cumsum(1).to(DEVICE)


def gradients(function, qkv, upstream, **options):
    """o, L, dq, dk, dv of the function."""
    qkv = [x.detach().requires_grad_() for x in qkv]
    o, lse = function(*qkv, **options)
    do, dlse = upstream
    return [
        x.detach()
        for x in (o, lse, *torch.autograd.grad((o, lse), qkv, (do.to(o.dtype), dlse.to(lse.dtype))))
    ]


def kernels(q, k, v, **options):
    return attention(q, k, v, **options, return_lse=True, implementation="triton")


def assert_close(ours, exact, bound):
    for name, a, b in zip(NAMES, ours, exact):
        error = (a.double() - b.double()).abs().max().item()
        assert error <= bound, f"{name} is off by {error:.1e}, wanted at most {bound:.1e}"


def assert_right(shape, bound=2e-5, seed=0, **options):
    """The kernels' values and gradients, in float32, are those of float64."""
    qkv, upstream = random_inputs(*shape, seed=seed)
    ours = gradients(kernels, qkv, upstream, **options)
    exact = gradients(dense, [x.double() for x in qkv], upstream, **options)
    assert_close(ours, exact, bound)


OPTIONS = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 20},
    "window of 1": {"window": 1},
    "window beyond T": {"window": 10**10},
    "full, window": {"window": 35, "causal": False},
    "scale": {"scale": 0.3},
    "documents": {"documents": 9},
    "documents of 1": {"documents": 1},
    "full, documents": {"documents": 25, "causal": False},
    "documents, window": {"documents": 30, "window": 11},
    "full, documents, window": {"documents": 30, "window": 11, "causal": False},
}


def options_of(name, B, T):
    options = dict(OPTIONS[name])
    if "documents" in options:
        options["documents"] = random_documents(B, T, options["documents"])
    return options


# the reference


@pytest.mark.parametrize("name", OPTIONS)
def test_reference_is_the_definition(name):
    qkv, upstream = random_inputs(2, 29, 4, 2, 5)
    qkv = [x.double() for x in qkv]
    options = options_of(name, 2, 29)
    ours = gradients(module.attention_reference, qkv, upstream, **options)
    assert_close(ours, gradients(dense, qkv, upstream, **options), 1e-12)


@pytest.mark.parametrize("causal", [True, False])
def test_reference_matches_torch(causal):
    (q, k, v), _ = random_inputs(2, 37, 4, 2, 16)
    o = attention(q, k, v, causal=causal, implementation="reference")
    t = [x.transpose(1, 2) for x in (q, k, v)]
    theirs = F.scaled_dot_product_attention(*t, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(o, theirs.transpose(1, 2), atol=2e-6, rtol=0)


# the kernels against float64


@pytest.mark.parametrize("name", OPTIONS)
def test_kernels_match_float64(name, monkeypatch):
    """T = 63 is no multiple of any block; the last rows of "full, window" have blocks that they see
    in part to the left, then a whole one, then in part to the right."""
    set_tiles(monkeypatch, 32, 16)
    assert_right((1, 63, 1, 1, 32), **options_of(name, 1, 63))


@pytest.mark.parametrize("name", ["causal", "full, window", "documents, window"])
def test_kernels_match_float64_with_blocks_wider_than_high(name, monkeypatch):
    set_tiles(monkeypatch, 16, 32)
    assert_right((1, 63, 1, 1, 32), **options_of(name, 1, 63))


@pytest.mark.parametrize("T", [1, 7, 32, 129])
@pytest.mark.parametrize("causal", [True, False])
def test_kernels_match_float64_at_odd_lengths(T, causal):
    """With the blocks that the file has."""
    assert_right((1, T, 1, 1, 64), causal=causal)


@pytest.mark.parametrize("name", ["causal", "full, documents, window"])
def test_kernels_match_float64_at_1023(name, monkeypatch):
    set_tiles(monkeypatch, 512, 256)
    qkv, upstream = random_inputs(1, 1023, 1, 1, 32)
    options = options_of(name, 1, 1023)
    exact = gradients(module.attention_reference, [x.double() for x in qkv], upstream, **options)
    assert_close(gradients(kernels, qkv, upstream, **options), exact, 2e-5)


@pytest.mark.parametrize("heads", [(2, 2), (3, 1), (4, 2)], ids=str)
def test_kernels_match_float64_with_shared_heads(heads, monkeypatch):
    set_tiles(monkeypatch, 32, 32)
    assert_right((2, 37, *heads, 32), documents=random_documents(2, 37))


@pytest.mark.parametrize("D", module.HEAD_DIMS)
def test_kernels_match_float64_at_each_head_dim(D, monkeypatch):
    set_tiles(monkeypatch, 64, 32)
    assert_right((1, 70, 1, 1, D), window=40)


@settings(max_examples=6, deadline=None)
@given(st.data())
def test_kernels_match_float64_whatever_the_shape(data):
    G, share = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    B, T = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 33))
    options = {"causal": data.draw(st.booleans())}
    if data.draw(st.booleans()):
        options["window"] = data.draw(st.integers(1, 50))
    if data.draw(st.booleans()):
        ids = data.draw(st.lists(st.integers(-2, 2), min_size=B * T, max_size=B * T))
        options["documents"] = torch.tensor(ids, device=DEVICE).view(B, T).sort(1).values
    blocks = st.sampled_from([16, 32])
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_tiles(monkeypatch, data.draw(blocks), data.draw(blocks))
        assert_right((B, T, G * share, G, 32), **options)


@pytest.mark.parametrize("packing", ["one projection", "heads first", "only v"])
def test_kernels_read_strided_views(packing, monkeypatch):
    """No copy is made for q, k, v that lie in a larger tensor, and their gradients arrive there."""
    set_tiles(monkeypatch, 32, 32)
    B, T, H, G, D = 2, 23, 2, 2, 32
    if packing == "one projection":
        whole = torch.randn(B, T, (H + 2 * G) * D, device=DEVICE)
        views = [x.unflatten(-1, (-1, D)) for x in whole.split((H * D, G * D, G * D), -1)]
    elif packing == "heads first":
        whole = torch.randn(B, H + 2 * G, T, D, device=DEVICE)
        views = [x.transpose(1, 2) for x in whole.split((H, G, G), 1)]
    else:
        v = torch.randn(T, B, 2 * G, D + 3, device=DEVICE)[:, :, ::2, :D].transpose(0, 1)
        views = [torch.randn(B, T, heads, D, device=DEVICE) for heads in (H, G)] + [v]
    assert not views[2].is_contiguous() and views[2].stride(3) == 1
    _, upstream = random_inputs(B, T, H, G, D)
    ours = gradients(kernels, views, upstream)
    assert_close(ours, gradients(dense, [x.double() for x in views], upstream), 2e-5)


def test_bfloat16_stays_within_its_rounding():
    """With Hopper's blocks. The bound, with u = 2^-7, the relative spacing of bfloat16:

    Written results are truncated by the interpreter and rounded to nearest by a GPU: at most u |x|.
    A GPU also rounds P and dS before they are multiplied, by u/2 each: o is off by another
    u/2 P|v|, dv by u/2 P^T|do|. Backward takes delta from the o that was written: off by at most
    u a, if a_t = sum_d |do_d| (P|v|)_d, which is no less than |delta|. So dS = P (dP - delta) is
    off by u P a from there and by u/2 P (|dP| + a) from its own rounding; dq by that times |k|,
    dk by that times |q|. All else is float32 (1e-5); the 1.02 covers products of two errors.
    """
    u = 2.0**-7
    B, T, H, G, D = 1, 130, 2, 1, 128
    qkv, (do, dlse) = random_inputs(B, T, H, G, D, torch.bfloat16)
    upstream = do, torch.zeros_like(dlse)
    ours = gradients(kernels, qkv, upstream)
    exact = gradients(dense, [x.double() for x in qkv], upstream)
    q, k, v, do = (x.double() for x in (*qkv, do))
    k, v = (x.repeat_interleave(H // G, 2) for x in (k, v))
    hidden = torch.ones(T, T, dtype=torch.bool, device=DEVICE).triu(1)
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(D)
    p = scores.masked_fill(hidden, -math.inf).softmax(-1)  # (B, H, T, T)
    p_v = torch.einsum("bhts,bshd->bthd", p, v.abs())
    a = (p_v * do.abs()).sum(-1).transpose(1, 2)[..., None]  # (B, H, T, 1)
    ds = p * (torch.einsum("bthd,bshd->bhts", do, v).abs() / 2 + 3 / 2 * a) / math.sqrt(D)
    shares = {
        "o": p_v / 2,
        "dq": torch.einsum("bhts,bshd->bthd", ds, k.abs()),
        "dk": torch.einsum("bhts,bthd->bshd", ds, q.abs()).sum(2, keepdim=True),
        "dv": torch.einsum("bhts,bthd->bshd", p, do.abs() / 2).sum(2, keepdim=True),
    }
    for name, x, y in zip(NAMES, ours, exact):
        assert x.dtype == (torch.float32 if name == "L" else torch.bfloat16)
        bound = 1.02 * u * (y.abs() + shares[name]) if name in shares else 0
        excess = ((x.double() - y).abs() - bound).max().item()
        assert excess <= 1e-5, f"{name} is off by {excess:.1e} more than rounding explains"


# properties


def test_lse_is_torchs_logsumexp_in_natural_log():
    (q, k, v), _ = random_inputs(1, 33, 1, 1, 32)
    scores = (q[0, :, 0] @ k[0, :, 0].T / math.sqrt(32)).double()
    hidden = torch.ones(33, 33, dtype=torch.bool, device=DEVICE).triu(1)
    _, lse = kernels(q, k, v)
    wanted = torch.logsumexp(scores.masked_fill(hidden, -math.inf), -1)
    torch.testing.assert_close(lse[0, 0].double(), wanted, atol=2e-6, rtol=0)


def test_same_input_gives_the_same_bits(monkeypatch):
    set_tiles(monkeypatch, 32, 16)
    qkv, upstream = random_inputs(1, 33, 1, 1, 32)
    runs = [gradients(kernels, qkv, upstream, window=21) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_documents_do_not_see_each_other(implementation, monkeypatch):
    """A document packed with another gives what it gives alone, whatever the other holds."""
    set_tiles(monkeypatch, 16, 16)
    (q, k, v), _ = random_inputs(1, 48, 1, 1, 32)
    documents = torch.tensor([[3] * 16 + [5] * 32], device=DEVICE)
    k[:, 16:], v[:, 16:] = 100.0, 1e6
    o = attention(q, k, v, documents=documents, causal=False, implementation=implementation)
    alone = attention(q[:, :16], k[:, :16], v[:, :16], causal=False, implementation="reference")
    torch.testing.assert_close(o[:, :16], alone, atol=2e-6, rtol=0)
    torch.testing.assert_close(o[:, 16:], v[:, 16:])  # a mix of equal values


def test_future_does_not_leak(monkeypatch):
    set_tiles(monkeypatch, 16, 16)
    (q, k, v), _ = random_inputs(1, 40, 1, 1, 32)
    before = kernels(q, k, v)
    k[:, 23:], v[:, 23:] = 7.0, -3.0
    after = kernels(q, k, v)
    assert torch.equal(before[0][:, :23], after[0][:, :23])
    assert not torch.equal(before[0][:, 23:], after[0][:, 23:])


@pytest.mark.filterwarnings("ignore:overflow")  # numpy's, where the masked exponentials are
def test_large_scores_neither_overflow_nor_become_nan(monkeypatch):
    """Invisible scores far above a row's log-sum-exp: exp overflows there and must not matter."""
    set_tiles(monkeypatch, 16, 16)
    qkv, upstream = random_inputs(1, 40, 1, 1, 32, spread=1.0)
    qkv[1][:, 20:] *= 300  # scores up to 1e3 that rows below 20 do not see
    ours = gradients(kernels, qkv, upstream)
    exact = gradients(dense, [x.double() for x in qkv], upstream)
    assert all(x.isfinite().all() for x in ours)
    # scores of 1e3 have an error of 1e-4 in float32, and so have the weights
    assert_close([x[:, :20] for x in ours[:1]], [x[:, :20] for x in exact[:1]], 2e-5)
    assert_close([ours[4]], [exact[4]], 1e-2)


@pytest.mark.parametrize("name", ["causal", "full, documents, window"])
def test_limits_are_what_a_row_sees(name):
    """START and END against the pairs that `dense` finds visible."""
    T = 23
    options = options_of(name, 2, T)
    limits = module.visible_limits(
        2, T, torch.device(DEVICE), options.get("window"), options.get("documents")
    )
    # with scores of 0 and one-hot values a row of o is 1/n where the row sees a column
    zeros, eye = torch.zeros(2, T, 1, T), torch.eye(T).expand(2, T, T)[:, :, None]
    options.setdefault("causal", True)
    sees = dense(*(x.to(DEVICE) for x in (zeros, zeros, eye)), **options)[0][:, :, 0] > 0
    for b in range(2):
        for t in range(T):
            columns = sees[b, t].nonzero().flatten()
            assert columns[0] == limits[0][b, t]
            assert columns[-1] == (t if options["causal"] else limits[1][b, t])
            assert len(columns) == columns[-1] - columns[0] + 1


# custom operators


def test_operators_pass_opcheck(monkeypatch):
    set_tiles(monkeypatch, 16, 16)
    B, T, H, G, D = 1, 9, 2, 1, 32
    qkv = torch.randn(B, T, H + 2 * G, D, device=DEVICE)
    q, k, v = (x.requires_grad_() for x in qkv.split((H, G, G), 2))
    limits = module.visible_limits(B, T, q.device, 5, None)
    for start, end in ((None, None), limits):
        torch.library.opcheck(module._attention, (q, k, v, start, end, True, 0.2))
    q, k, v = (x.detach() for x in (q, k, v))
    o, lse = module._attention(q, k, v, *limits, True, 0.2)
    saved = (q, k, v, *limits, o, lse)
    torch.library.opcheck(
        module._attention_backward,
        (*saved, torch.ones((), device=DEVICE).expand_as(o), torch.zeros_like(lse), True, 0.2),
    )


def test_gradient_of_a_sum_has_stride_zero(monkeypatch):
    set_tiles(monkeypatch, 16, 16)
    qkv, _ = random_inputs(1, 20, 1, 1, 32)
    ours, exact = ([x.requires_grad_() for x in c] for c in (qkv, [x.double() for x in qkv]))
    kernels(*ours)[0].sum().backward()
    dense(*exact)[0].sum().backward()
    for a, b in zip(ours, exact):
        torch.testing.assert_close(a.grad.double(), b.grad, atol=2e-5, rtol=0)


def test_kernels_compile_into_one_graph_for_all_lengths(monkeypatch):
    set_tiles(monkeypatch, 32, 32)

    def loss(q, k, v, documents):
        q = q * 2  # something for the compiler to do on both sides
        o = attention(q, k, v, window=9, documents=documents, implementation="triton")
        return (o * o).sum()

    compiled_loss = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (30, 23):
        qkv, _ = random_inputs(2, T, 2, 1, 32)
        documents = random_documents(2, T)
        plain, compiled = ([x.clone().requires_grad_() for x in qkv] for _ in range(2))
        loss(*plain, documents).backward()
        with torch._dynamo.config.patch(error_on_recompile=True):
            compiled_loss(*compiled, documents).backward()
        for a, b in zip(plain, compiled):
            assert torch.equal(a.grad, b.grad)


def test_second_derivative_is_refused(monkeypatch):
    set_tiles(monkeypatch, 16, 16)
    qkv, _ = random_inputs(1, 8, 1, 1, 32)
    q, k, v = (x.requires_grad_() for x in qkv)
    (dq,) = torch.autograd.grad(kernels(q, k, v)[0].sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        dq.sum().backward()


# errors and fallbacks


def bad_inputs():
    def zeros(*shape, **kind):
        return torch.zeros(shape, device=DEVICE, **kind)

    q, k = zeros(2, 5, 4, 32), zeros(2, 5, 2, 32)
    strided = zeros(2, 5, 32, 4).transpose(2, 3)
    ids = zeros(2, 5, dtype=torch.int64)
    yield "q.shape=(2, 5, 128) of torch.float32 must be floating-point", (q.flatten(2), k, k), {}
    yield "q.shape=(0, 5, 4, 32)", (q[:0], k[:0], k[:0]), {}
    yield "q.shape=(2, 5, 4, 32) of torch.int64", (q.long(), k.long(), k.long()), {}
    yield "k.shape=(2, 4, 2, 32) must be (2, 5, G, 32)", (q, k[:, :4], k), {}
    yield "G dividing H=4", (q, zeros(2, 5, 3, 32), k), {}
    yield "v.shape=(2, 5, 2, 16) must be (2, 5, 2, 32), as k", (q, k, k[..., :16]), {}
    yield "k.dtype=torch.float16 must be torch.float32, as q", (q, k.half(), k), {}
    yield "v.dtype=torch.float16", (q, k, k.half()), {}
    yield "v.device=meta must be", (q, k, k.to("meta")), {}
    yield "window=0 must be at least 1", (q, k, k), {"window": 0}
    yield "documents.shape=(2, 4) must be (2, 5)", (q, k, k), {"documents": ids[:, :4]}
    yield "documents.dtype=torch.float32 must be an integer", (q, k, k), {"documents": ids.float()}
    yield "documents.device=meta", (q, k, k), {"documents": ids.to("meta")}
    yield "implementation='fast' must be one of", (q, k, k), {"implementation": "fast"}
    yield "q.dtype=torch.float64 must be one of", (q.double(), k.double(), k.double()), {}
    yield "head_dim=16 must be one of (32, 64, 128)", (q[..., :16], k[..., :16], k[..., :16]), {}
    yield "q.stride(3)=4 must be 1; call .contiguous()", (strided, k, k), {}


@pytest.mark.parametrize("message, tensors, options", list(bad_inputs()), ids=lambda x: str(x)[:24])
def test_attention_names_what_is_wrong(message, tensors, options):
    with pytest.raises(ValueError) as error:
        attention(*tensors, **{"implementation": "triton"} | options)
    assert message in str(error.value)


def test_reference_takes_what_the_kernels_do_not():
    q = torch.randn(1, 6, 2, 8, dtype=torch.float64).transpose(2, 3)  # (1, 6, 8, 2), stride 8
    torch.testing.assert_close(attention(q, q, q), dense(q, q, q)[0])


# on a GPU


GPU_SHAPES = [(64, 1), (32, 129), (128, 512), (64, 1023), (128, 4096)]


@pytest.mark.gpu
@pytest.mark.parametrize("D, T", GPU_SHAPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_gpu_float32_matches_float64(name, D, T):
    qkv, upstream = random_inputs(1, T, 2, 1, D)
    options = options_of(name, 1, T)
    exact = gradients(module.attention_reference, [x.double() for x in qkv], upstream, **options)
    ours = gradients(kernels, qkv, upstream, **options)
    sizes = [x.abs().max().clamp(min=1) for x in exact]  # up to 20, where float32 itself errs 3e-5
    ours, exact = ([x / size for x, size in zip(found, sizes)] for found in (ours, exact))
    assert_close(ours, exact, 2e-5)


def every_step_rounded(q, k, v, causal=True, window=None, documents=None, scale=None):
    """o and L by torch in q's dtype throughout: scores, weights and o are rounded to it."""
    B, T, H, D = q.shape
    k, v = (x.repeat_interleave(H // k.shape[2], 2) for x in (k, v))
    start, end = module.visible_limits(B, T, q.device, window, documents)
    t = torch.arange(T, device=q.device)
    visible = (t >= start[..., None]) & (t <= (t[:, None] if causal else end[..., None]))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * (D**-0.5 if scale is None else scale)
    scores = scores.masked_fill(~visible[:, None], -math.inf)
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v), scores.logsumexp(-1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("D, T", GPU_SHAPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_gpu_half_precision_errs_at_most_twice_as_much_as_torch(name, D, T, dtype):
    """flash-attention's criterion; plus one rounding, for where torch happens to err by nothing."""
    qkv, upstream = random_inputs(1, T, 4, 2, D, dtype)
    options = options_of(name, 1, T)
    exact = gradients(module.attention_reference, [x.double() for x in qkv], upstream, **options)
    ours = gradients(kernels, qkv, upstream, **options)
    theirs = gradients(every_step_rounded, qkv, upstream, **options)
    for name, a, b, rounded in zip(NAMES, ours, exact, theirs):
        error, limit = ((x.double() - b).abs().max().item() for x in (a, rounded))
        limit = 2 * limit + torch.finfo(dtype).eps * b.abs().max().item() + 1e-4
        assert error <= limit, f"{name} is off by {error:.1e}, wanted at most {limit:.1e}"


@pytest.mark.gpu
def test_gpu_same_input_gives_the_same_bits():
    qkv, upstream = random_inputs(8, 1023, 4, 2, 128, torch.bfloat16)
    runs = [gradients(kernels, qkv, upstream, window=300) for _ in range(5)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


@pytest.mark.gpu
def test_gpu_kernels_run_inside_an_inductor_graph():
    def loss(q, k, v):
        return attention(q * 2, k, v).float().square().sum()

    qkv, _ = random_inputs(2, 512, 4, 2, 128, torch.bfloat16)
    plain, compiled = ([x.clone().requires_grad_() for x in qkv] for _ in range(2))
    loss(*plain).backward()
    torch.compile(loss, fullgraph=True)(*compiled).backward()
    for a, b in zip(plain, compiled):
        torch.testing.assert_close(a.grad, b.grad, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
def test_gpu_offsets_beyond_32_bits():
    """The last batch row of a projection of more than 2^31 elements."""
    B, T, heads, D = 2**31 // (4096 * 12 * 64) + 2, 4096, 12, 64
    qkv = torch.zeros(B, T, heads, D, dtype=torch.bfloat16, device="cuda")
    qkv[-1].normal_()
    o = attention(*qkv.split((4, 4, 4), 2))
    alone = attention(*(x.contiguous() for x in qkv[-1:].split((4, 4, 4), 2)))
    assert qkv.numel() > 2**31 and torch.equal(o[-1:], alone)
