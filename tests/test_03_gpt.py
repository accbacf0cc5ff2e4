"""Tests of 03_gpt.py: against transformers and torch, by closed form, and by property.

Run: python -m pytest tests/test_03_gpt.py
"""

import dataclasses
import importlib
import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

gpt = importlib.import_module("03_gpt")

SMALL = gpt.GPTConfig(
    vocab_size=97, seq_len=48, n_layer=3, n_head=4, n_kv_head=2, d_model=64, d_mlp=96
)


def scrambled(config, seed=0):
    """A model in which every parameter matters: no zero projections, no gains of one."""
    torch.manual_seed(seed)
    model = gpt.GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.15 + (1.0 if p.ndim == 1 else 0.0))
    return model.eval()


def random_ids(config, batch, length, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, length), generator=g)


def gradients(function, inputs, dy):
    """The output and the gradient of every input."""
    y = function(*inputs)
    return y.detach(), *torch.autograd.grad(y, inputs, dy)


def distance(ours, wanted):
    """|ours - wanted| / |wanted|, and 0 where both are 0."""
    error = torch.dist(ours.double(), wanted.double())
    return (error / wanted.norm()).item() if error else 0.0


def rounding(dtype):
    """The rms of the relative error that a rounding makes.

    It is eps/2 at most; evenly spread over all mantissas the rms is 0.42 of that, and 2/3 leaves
    room for chance. Independent roundings add like standard deviations: n make sqrt(n) of it.
    """
    return torch.finfo(dtype).eps / 3


# against independent implementations


@pytest.mark.parametrize("qk_norm", [True, False], ids=["qwen3", "llama"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_model_matches_transformers(tmp_path, qk_norm, kv_heads):
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(SMALL, qk_norm=qk_norm, n_kv_head=kv_heads, rope_theta=500.0)
    model = scrambled(config)
    gpt.to_huggingface(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if qk_norm else "LlamaForCausalLM")
    ids = random_ids(config, 2, 48)
    with torch.no_grad():
        ours, wanted = model(ids), theirs(ids).logits
    assert wanted.std() > 0.5  # the comparison means something
    torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=0)


def test_gradients_match_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = scrambled(SMALL)
    gpt.to_huggingface(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = random_ids(SMALL, 2, 33)
    for m, logits in ((model, model(ids)), (theirs, theirs(ids).logits)):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        assert m is model or m.model.embed_tokens.weight.grad is not None
    ours = model.embedding.weight.grad
    torch.testing.assert_close(ours, theirs.model.embed_tokens.weight.grad, atol=1e-5, rtol=1e-4)
    layer = theirs.model.layers[0]
    q = model.blocks[0].attention.qkv.weight.grad[:64]
    torch.testing.assert_close(q, layer.self_attn.q_proj.weight.grad, atol=1e-5, rtol=1e-4)
    down = model.blocks[0].mlp.down.weight.grad
    torch.testing.assert_close(down, layer.mlp.down_proj.weight.grad, atol=1e-5, rtol=1e-4)


def test_from_huggingface_restores_the_model(tmp_path):
    model = scrambled(SMALL)
    gpt.to_huggingface(model, tmp_path)
    back = gpt.from_huggingface(tmp_path)
    assert back.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters()))


def test_from_huggingface_reads_what_transformers_saved(tmp_path):
    transformers = pytest.importorskip("transformers")
    gpt.to_huggingface(scrambled(SMALL), tmp_path / "a")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    theirs.save_pretrained(tmp_path / "b")
    ids = random_ids(SMALL, 1, 20)
    with torch.no_grad():
        ours, wanted = gpt.from_huggingface(tmp_path / "b")(ids), theirs(ids).logits
    torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=0)


def test_from_huggingface_names_what_it_cannot_load(tmp_path):
    gpt.to_huggingface(scrambled(SMALL), tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    for change in (
        {"model_type": "gpt2"},
        {"tie_word_embeddings": False},
        {"head_dim": 8},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
        {"attention_bias": True},
        {"hidden_act": "gelu"},
    ):
        (tmp_path / "config.json").write_text(json.dumps(described | change))
        with pytest.raises(ValueError, match="wanted"):
            gpt.from_huggingface(tmp_path)
    short = {k: v for k, v in described.items() if k not in ("rope_theta", "hidden_size")}
    (tmp_path / "config.json").write_text(json.dumps(short))
    with pytest.raises(ValueError, match="lacks hidden_size, rope_theta"):
        gpt.from_huggingface(tmp_path)


def test_from_huggingface_takes_as_many_key_heads_as_heads_where_nothing_is_said(tmp_path):
    model = scrambled(dataclasses.replace(SMALL, n_kv_head=SMALL.n_head))
    gpt.to_huggingface(model, tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    del described["num_key_value_heads"]
    (tmp_path / "config.json").write_text(json.dumps(described))
    assert gpt.from_huggingface(tmp_path).config == model.config


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("shape", [(1,), (7, 3), (2, 5, 64)])
def test_rms_norm_matches_torch(dtype, bound, shape):
    x = (torch.randn(*shape, 33, dtype=dtype) * 3).requires_grad_()
    gain = torch.randn(33, dtype=dtype, requires_grad=True)
    upstream = torch.randn(*shape, 33, dtype=dtype)
    ours = gpt.rms_norm(x, gain, 1e-6)
    wanted = F.rms_norm(x, (33,), gain, 1e-6)
    torch.testing.assert_close(ours, wanted, atol=bound, rtol=bound)
    for a, b in zip(
        torch.autograd.grad(ours, (x, gain), upstream),
        torch.autograd.grad(wanted, (x, gain), upstream),
    ):
        torch.testing.assert_close(a, b, atol=bound, rtol=bound)


def test_rms_norm_of_bfloat16_is_the_rounded_float32_result():
    x = torch.randn(64, 128).bfloat16()
    wanted = gpt.rms_norm(x.float(), torch.ones(128), 1e-6)
    ours = gpt.rms_norm(x, torch.ones(128), 1e-6)
    assert torch.equal(ours, wanted.bfloat16())


def randn64(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("shape, gain", [((1,), (1,)), ((7, 5), (5,)), ((2, 3, 4, 6), (4, 6))])
def test_rms_norm_gradient_matches_its_finite_differences(shape, gain):
    x, gain = randn64(*shape), randn64(*gain)
    assert torch.autograd.gradcheck(lambda x, gain: gpt.rms_norm(x, gain, 1e-3), (x, gain))
    flipped = x.detach().mT.clone().mT.requires_grad_() if x.ndim > 1 else x
    assert torch.autograd.gradcheck(lambda x, gain: gpt.rms_norm(x, gain, 1e-3), (flipped, gain))
    piece = randn64(*shape[:-1], 2 * shape[-1])
    assert torch.autograd.gradcheck(
        lambda x, gain: gpt.rms_norm(x[..., : shape[-1]], gain, 1e-3), (piece, gain)
    )


def test_rms_norm_of_bfloat16_has_gradients_that_are_rounded_once():
    inputs = [torch.randn(300, 65), 1 + torch.randn(65) / 3, torch.randn(300, 65)]
    x, gain, dy = (a.bfloat16() for a in inputs)
    got = gradients(
        lambda *of: gpt.rms_norm(*of, 1e-6), [a.requires_grad_() for a in (x, gain)], dy
    )
    wide = [a.detach().double().requires_grad_() for a in (x, gain)]
    wanted = gradients(lambda x, g: F.rms_norm(x, (65,), g, 1e-6), wide, dy.double())
    for a, b in zip(got, wanted):
        assert distance(a, b) < rounding(torch.bfloat16)


def plain_normed_linear(x, gain, weight, eps):
    return F.linear(F.rms_norm(x, x.shape[-1:], gain, eps), weight)


@pytest.mark.parametrize("shape", [(1,), (7, 3), (2, 5, 64)])
@pytest.mark.parametrize("kind", ["float64", "float32", "bfloat16", "autocast"])
def test_normed_linear_matches_torch(kind, shape):
    dtype = getattr(torch, kind.replace("autocast", "float32"))
    x, gain, weight = torch.randn(*shape, 65), 1 + torch.randn(65) / 3, torch.randn(129, 65)
    inputs = [a.to(dtype).requires_grad_() for a in (3 * x, gain, weight)]
    dy = torch.randn(*shape, 129).to(torch.bfloat16 if kind == "autocast" else dtype)

    def ours(*inputs):
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            return gpt.normed_linear(*inputs, 1e-6)

    got = gradients(ours, inputs, dy)
    wide = [a.detach().double().requires_grad_() for a in inputs]
    wanted = gradients(lambda *wide: plain_normed_linear(*wide, 1e-6), wide, dy.double())
    # The most are on the way to y: x_hat, gain, h, weight and y itself. Sums round once a term, a
    # channel or a token, but those of bfloat16 are made in float32.
    n = 5 if dy.dtype == torch.bfloat16 else 5 + max(129, math.prod(shape))
    bound = rounding(dy.dtype) * math.sqrt(n)
    for a, b, like in zip(got, wanted, (dy, *inputs)):
        assert a.dtype == like.dtype and a.shape == like.shape
        assert distance(a, b) < max(bound, 1e-14)  # float64 is not exact either


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (2, 3, 6)])
def test_normed_linear_gradient_matches_its_finite_differences(shape, monkeypatch):
    monkeypatch.setattr(gpt, "pieces", two_by_two)
    x, gain, weight = randn64(*shape), randn64(shape[-1]), randn64(3, shape[-1])
    flipped = x.detach().mT.clone().mT.requires_grad_()
    for layout in (x, flipped):
        assert torch.autograd.gradcheck(
            lambda *inputs: gpt.normed_linear(*inputs, 1e-3), (layout, gain, weight)
        )


@pytest.mark.parametrize("shape", [(1, 2), (7, 6), (2, 3, 10)])
def test_gated_product_gradient_matches_its_finite_differences(shape, monkeypatch):
    monkeypatch.setattr(gpt, "pieces", two_by_two)
    gate_up, weight = randn64(*shape), randn64(3, shape[-1] // 2)
    assert torch.autograd.gradcheck(gpt.GatedProduct.apply, (gate_up, weight))
    flipped = gate_up.detach().mT.clone().mT.requires_grad_()
    assert torch.autograd.gradcheck(gpt.GatedProduct.apply, (flipped, weight.mT.clone().mT))


def test_gated_product_of_bfloat16_is_near_float64():
    shapes, dy = ((2, 50, 64), (24, 32)), torch.randn(2, 50, 24).bfloat16()
    inputs = [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    wanted = gradients(lambda x, w: gpt.swiglu(x) @ w.T, wide, dy.double())
    for a, b in zip(gradients(gpt.GatedProduct.apply, inputs, dy), wanted):
        # each is rounded, and before it silu and silu * up, or dh, and what dh is multiplied by
        assert a.dtype == torch.bfloat16 and distance(a, b) < rounding(a.dtype) * math.sqrt(3)


def self_attention(qkv, gain):
    """Of 2 query heads that share 1 key head and its values, with the rotation's base at 100."""
    cos, sin = gpt.rope_table(qkv.shape[1], qkv.shape[3], 100.0)
    return gpt.SelfAttention.apply(qkv, gain, cos, sin, 1, 1e-6)


def plain_heads(qkv, gain):
    q, k, v = qkv.split((2, 1, 1), dim=2)
    cos, sin = gpt.rope_table(qkv.shape[1], qkv.shape[3], 100.0)
    normed = (F.rms_norm(x, x.shape[-1:], eps=1e-6) for x in (q, k))
    q, k = (gpt.rope(x * g, cos, sin) for x, g in zip(normed, gain.split((2, 1))))
    return q, k, v


def test_heads_of_bfloat16_are_positioned_in_float32():
    qkv, gain = torch.randn(2, 9, 4, 16).bfloat16(), 1 + 0.1 * torch.randn(3, 16).bfloat16()
    found = gpt.positioned(qkv[:, :, :3], gain, *gpt.rope_table(9, 16, 100.0), 1e-6)
    q, k, _ = plain_heads(qkv.double(), gain.double())
    torch.testing.assert_close(found, torch.cat((q, k), dim=2).float(), atol=1e-6, rtol=1e-6)


def test_gradient_of_positioned_heads_is_made_in_float32():
    x, gain = torch.randn(9, 3, 16).bfloat16(), 1 + 0.1 * torch.randn(3, 16).bfloat16()
    slope, (cos, sin) = torch.randn(9, 3, 16).bfloat16(), gpt.rope_table(9, 16, 100.0)
    found = gpt.positioned_gradient(slope, x, gain, cos, sin, 1e-6)
    wide = [a.double().requires_grad_() for a in (x, gain)]
    y = gpt.rope(F.rms_norm(wide[0], (16,), eps=1e-6) * wide[1], cos, sin)
    for a, b in zip(found, torch.autograd.grad(y, wide, slope.double())):
        torch.testing.assert_close(a, b.float(), atol=1e-5, rtol=1e-5)


def test_an_empty_batch_has_empty_results():
    for shape in ((0, 5), (2, 0)):
        x, weight = torch.randn(*shape, 8).requires_grad_(), torch.randn(6, 8, requires_grad=True)
        y = gpt.normed_linear(x, torch.ones(8), weight, 1e-6)
        assert y.shape == (*shape, 6)
        dx, dw = torch.autograd.grad(y.sum(), (x, weight))
        assert dx.shape == x.shape and not dw.any()
    assert gpt.GPT(SMALL)(torch.zeros(0, 5, dtype=torch.long)).shape == (0, 5, SMALL.vocab_size)


@pytest.mark.parametrize("B, T", [(1, 1), (2, 3), (3, 35)])
def test_self_attention_gradient_matches_its_finite_differences(B, T, monkeypatch):
    qkv, gain = randn64(B, T, 4, 2), randn64(3, 2)
    assert (T > 3) == (T > block_size(torch.float64))
    monkeypatch.setattr(gpt, "pieces", two_by_two)
    assert torch.autograd.gradcheck(self_attention, (qkv, gain))
    assert torch.autograd.gradcheck(lambda qkv: self_attention(qkv, None), (qkv,))


def two_by_two(x, numbers):
    return [slice(first, first + 2) for first in range(0, len(x), 2)]


@pytest.mark.parametrize("shape", [(1, 1), (1, 99), (3, 40), (5, 10), (10, 5), (4, 5, 6), (0, 7)])
def test_pieces_are_all_of_it_and_small(shape):
    x = torch.randn(shape)
    found = [x[part] for part in gpt.pieces(x, 50)]
    assert torch.equal(torch.cat([x[:0], *found]), x)
    assert all(0 < len(part) and part.numel() <= max(50, x[0].numel()) for part in found)
    on_gpu = gpt.pieces(torch.empty(shape, device="meta"), 50)
    assert len(on_gpu) == (shape[0] > 0)


def test_self_attention_of_bfloat16_rounds_what_is_between_once():
    """And sums the gain's gradient in float32: over 300 rows it would halt in bfloat16."""
    qkv, gain = torch.randn(300, 8, 4, 16), 1 + 0.1 * torch.randn(3, 16)
    dy = torch.randn(300, 8, 2, 16).bfloat16()
    inputs = [x.bfloat16().requires_grad_() for x in (qkv, gain)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    found = gradients(self_attention, inputs, dy)
    wanted = gradients(
        lambda *inputs: gpt.attention(*plain_heads(*inputs), "reference"), wide, dy.double()
    )
    # as for blocks below, and q and k, two more of |s|, and the slopes of dx and of the gain
    n = 4 * squared_score(*plain_heads(*wide)[:2]) + 5 + 2 + 1
    bound = rounding(dy.dtype) * math.sqrt(n)
    for a, b in zip(found, wanted):
        assert a.dtype == torch.bfloat16 and distance(a, b) < bound


def test_a_second_derivative_is_refused():
    x, gain = randn64(3, 4), randn64(4)
    tables = gpt.rope_table(1, 2, 100.0)
    for y in (
        gpt.rms_norm(x, gain, 1e-6),
        gpt.normed_linear(x, gain, randn64(2, 4), 1e-6),
        gpt.GatedProduct.apply(x, randn64(3, 2)),
        gpt.SelfAttention.apply(x.view(1, 1, 6, 2), None, *tables, 2, 1e-6),
    ):
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()


def plain_block(x, block, config, cos, sin):
    """A layer in torch's own functions, from the equations alone; autograd does the rest."""
    B, T, C = x.shape
    H, G, D = config.n_head, config.n_kv_head, config.head_dim
    n = F.rms_norm(x, (C,), block.attention_norm.weight, config.norm_eps)
    q, k, v = (n @ block.attention.qkv.weight.T).view(B, T, -1, D).split((H, G, G), dim=2)
    if config.qk_norm:
        q = F.rms_norm(q, (D,), block.attention.q_norm.weight, config.norm_eps)
        k = F.rms_norm(k, (D,), block.attention.k_norm.weight, config.norm_eps)
    q, k = (gpt.rope(a, cos, sin) for a in (q, k))
    y = gpt.attention(q, k, v, "reference")
    x = x + y.flatten(2) @ block.attention.out.weight.T
    n = F.rms_norm(x, (C,), block.mlp_norm.weight, config.norm_eps)
    gate, up = (n @ block.mlp.gate_up.weight.T).chunk(2, dim=-1)
    return x + (F.silu(gate) * up) @ block.mlp.down.weight.T


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("bound", [1e-10, 0.06], ids=["float64", "bfloat16 autocast"])
def test_gradients_match_autograd_of_the_plain_equations(bound, qk_norm):
    config = dataclasses.replace(SMALL, qk_norm=qk_norm)
    model, ids = scrambled(config).double(), random_ids(config, 3, 19)
    x = model.embedding(ids)
    for block in model.blocks:
        x = plain_block(x, block, config, model.cos[:19], model.sin[:19])
    wanted = F.rms_norm(x, (64,), model.norm.weight, config.norm_eps)
    upstream = torch.randn_like(wanted)
    parameters = tuple(model.parameters())
    wanted_gradients = torch.autograd.grad(wanted, parameters, upstream)
    if bound > 1e-3:
        model, upstream = model.float(), upstream.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=bound > 1e-3):
        ours = model.hidden(ids)
    gradients = torch.autograd.grad(ours, tuple(model.parameters()), upstream)
    for p, a, b in zip(model.parameters(), gradients, wanted_gradients):
        assert a.dtype == p.dtype
        # bfloat16 has 8 bits: 0.4% a rounding, over a hundred roundings one after another
        assert torch.dist(a.double(), b) < bound * b.norm()


def test_compiled_model_has_the_same_gradients():
    model, ids = scrambled(SMALL), random_ids(SMALL, 2, 17)
    gradients = []
    # aot_eager traces forward and backward as inductor does, and spares g++'s 20 s
    for f in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        loss = f(ids).logsumexp(-1).sum()
        gradients.append(torch.autograd.grad(loss, tuple(model.parameters())))
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=1e-4 * b.abs().max().item(), rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["rms_norm", "normed_linear", "mlp"])
def test_without_gradients_the_numbers_are_the_same(name, dtype):
    mlp, x = scrambled(SMALL).to(dtype).blocks[0].mlp, torch.randn(2, 5, 64).to(dtype)
    gain = torch.randn(64).to(dtype)
    piece = {
        "rms_norm": lambda: gpt.rms_norm(x, gain, 1e-6),
        "normed_linear": lambda: gpt.normed_linear(x, gain, mlp.gate_up.weight, 1e-6),
        "mlp": lambda: mlp(x, gain),
    }[name]
    with torch.no_grad():
        first, second = piece(), piece()
    assert torch.equal(first, second) and torch.equal(first, piece())


def bytes_kept(model, ids):
    """Bytes of the distinct tensors, but the model's own, that autograd keeps for backward."""
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x  # held, so that no address comes twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model.hidden(ids)
    return sum(x.untyped_storage().nbytes() for place, x in kept.items() if place not in own)


IN_INTERPRETER = pytest.param(
    True, marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off")
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("fused", [False, IN_INTERPRETER])
def test_backward_keeps_what_the_formula_says(fused, qk_norm, dtype):
    implementation = "triton" if fused else "torch"
    config = dataclasses.replace(SMALL, qk_norm=qk_norm, implementation=implementation)
    model, ids = scrambled(config), random_ids(config, 4, 40)
    on = dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=on, cache_enabled=False):
        measured = bytes_kept(model, ids)
    # beside the formula: ids, and once for all rows the gains of QK-norm and a rounded table
    known = gpt.activation_bytes(config, ids.numel(), dtype, fused)
    assert measured == pytest.approx(known, rel=0.01)


def attention_by_loops(q, k, v):
    """Softmax attention in float64, one query at a time, straight from the definition."""
    B, T, H, D = q.shape
    S, G = k.shape[1:3]
    out = torch.zeros_like(q)
    for b in range(B):
        for t in range(T):
            for h in range(H):
                g = h * G // H
                seen = S - T + t + 1
                scores = k[b, :seen, g] @ q[b, t, h] / math.sqrt(D)
                weights = (scores - scores.max()).exp()
                out[b, t, h] = (weights / weights.sum()) @ v[b, :seen, g]
    return out


TWO_FORMS = gpt.GPTConfig(
    vocab_size=97, seq_len=24, n_layer=2, n_head=4, n_kv_head=2, d_model=128, d_mlp=96
)


def assert_triton_equals_torch(qk_norm, device):
    """Values, every gradient, and generated tokens of one model with both implementations."""
    config = dataclasses.replace(TWO_FORMS, qk_norm=qk_norm)
    models = [
        scrambled(dataclasses.replace(config, implementation=form)).to(device)
        for form in ("torch", "triton")
    ]
    ids = random_ids(config, 2, 24).to(device)
    values = []
    for model in models:
        logits = model(ids)
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        values.append(logits)
    assert values[0].std() > 0.5
    torch.testing.assert_close(values[1], values[0], atol=1e-4, rtol=1e-4)
    for (name, p), q in zip(models[1].named_parameters(), models[0].parameters()):
        error = (p.grad - q.grad).norm() / q.grad.norm()
        assert error < 1e-4, (name, error)
    torch.testing.assert_close(*(model.generate(ids[:, :5], 6, temperature=0) for model in models))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where a GPU is")
@pytest.mark.parametrize("qk_norm", [True, False])
def test_model_with_kernels_equals_the_plain_one_in_the_interpreter(qk_norm):
    assert_triton_equals_torch(qk_norm, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("qk_norm", [True, False])
def test_model_with_kernels_equals_the_plain_one_on_a_gpu(qk_norm):
    assert_triton_equals_torch(qk_norm, "cuda")


def test_triton_that_is_not_there_is_one_error(monkeypatch):
    monkeypatch.setattr(gpt, "triton", None)
    ids = random_ids(SMALL, 1, 4)
    assert gpt.GPT(SMALL)(ids).shape == (1, 4, 97)
    with pytest.raises(ImportError, match="pip install triton"):
        gpt.GPT(dataclasses.replace(SMALL, implementation="triton"))(ids)
    with pytest.raises(ValueError, match="'fast' must be one of"):
        dataclasses.replace(SMALL, implementation="fast")


@pytest.mark.parametrize("implementation", ["auto", "reference", "triton"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("T, S, H, G", [(1, 1, 2, 2), (7, 7, 4, 2), (5, 9, 4, 1), (1, 6, 2, 2)])
def test_attention_matches_its_definition(implementation, training, T, S, H, G):
    q = torch.randn(2, T, H, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, S, G, 8, dtype=torch.float64).unbind()
    with torch.set_grad_enabled(training):
        ours = gpt.attention(q, k, v, implementation)
    torch.testing.assert_close(ours, attention_by_loops(q, k, v), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    "implementation, T, S", [("auto", 5, 5), ("auto", 4, 6), ("reference", 4, 6)]
)
def test_attention_gradients_match_their_finite_differences(implementation, T, S):
    q, k, v = randn64(1, T, 2, 2), randn64(1, S, 1, 2), randn64(1, S, 1, 2)
    assert torch.autograd.gradcheck(
        lambda q, k, v: gpt.attention(q, k, v, implementation), (q, k, v)
    )


def block_size(dtype):
    """The number of positions that SelfAttention takes together."""
    x = torch.zeros(1, 999, 1, dtype=dtype)
    return next(gpt.SelfAttention.blocks(x, x))[1]


def block_attention(q, k, v):
    """SelfAttention without norm, and turned by no angle."""
    T, G, D = k.shape[1:]
    qkv = torch.cat((q, k, v), dim=2)
    return gpt.SelfAttention.apply(qkv, None, torch.ones(T, D // 2), torch.zeros(T, D // 2), G, 0.0)


def random_qkv(dtype, T, H, G, D=16, spread=1.0):
    """Leaves q, k, v, whose scores have a standard deviation of spread^2, and dy."""
    q, k, v, dy = (torch.randn(2, T, heads, D) for heads in (H, G, G, H))
    leaves = [x.to(dtype).requires_grad_() for x in (q * spread, k * spread, v)]
    return leaves, dy.to(dtype)


def attention_in_float64(inputs, dy):
    wide = [x.detach().double().requires_grad_() for x in inputs]
    return gradients(lambda q, k, v: gpt.attention(q, k, v, "reference"), wide, dy.double())


def squared_score(q, k):
    """The mean of s^2 over all weights p = softmax(s), each counted p^2 times."""
    H, G, T = q.shape[2], k.shape[2], q.shape[1]
    q, k = q.detach().double().transpose(1, 2), k.detach().double().transpose(1, 2)
    s = q @ k.repeat_interleave(H // G, dim=1).mT / math.sqrt(q.shape[-1])  # (B, H, T, T)
    p = s.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf).softmax(-1)
    return ((p * s).square().sum() / p.square().sum()).item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("H, G", [(2, 2), (4, 2), (4, 1)])
def test_block_attention_matches_the_reference(dtype, H, G):
    block = block_size(dtype)
    for T in (1, 7, block - 1, block, block + 1, 3 * block + 5):
        inputs, dy = random_qkv(dtype, T, H, G)
        # An error e of s is one of e in p = exp(s) / sum; s = q/sqrt(D) k has two roundings, of
        # |s| each. The longest way beside them: p, dp, ds, q or k, result, and in dk and dv one
        # for each block. Sums: a rounding a term, which in bfloat16 float32 makes.
        n = 2 * squared_score(*inputs[:2]) + 5 + math.ceil(T / block)
        n += 0 if dtype == torch.bfloat16 else 16 + T * H // G
        bound = max(rounding(dtype) * math.sqrt(n), 1e-14)  # float64 is not exact either
        got = gradients(block_attention, inputs, dy)
        for a, b, like in zip(got, attention_in_float64(inputs, dy), (dy, *inputs)):
            assert a.dtype == dtype and a.shape == like.shape
            assert distance(a, b) < bound


@pytest.mark.parametrize("spread", [1.0, 2.0, 4.0])
def test_block_attention_of_bfloat16_errs_more_than_torch_by_the_rounding_of_its_scores(spread):
    """A score s is off by up to 2^-9 s, root mean square 2^-9 s / sqrt(3), and so is its weight;
    scores that matter reach twice their deviation, spread^2; dk and dq meet the weights' error
    twice, in p and in the sum of p dp."""

    def theirs(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2)

    inputs, dy = random_qkv(torch.bfloat16, 400, 4, 2, 64, spread)
    wanted = attention_in_float64(inputs, dy)
    of_ours = gradients(block_attention, inputs, dy)
    for a, b, exact in zip(of_ours, gradients(theirs, inputs, dy), wanted):
        assert distance(a, exact) < distance(b, exact) + 2 * 2 * spread**2 * 2**-9 / math.sqrt(3)


def layouts(heads, T=40, D=6):
    """The same shape (2, T, heads, D) in memory in many ways."""
    yield randn64(2, heads, T, D).detach().transpose(1, 2)
    yield randn64(T, 2, heads, D).detach().transpose(0, 1)
    yield randn64(2, T, heads + 3, D).detach()[:, :, 1:-2]  # of a packed projection
    yield randn64(2, T, heads, 2 * D).detach()[..., ::2]
    yield randn64(1, T, 1, D).detach().expand(2, -1, heads, -1)
    yield randn64(2, T, heads, D).detach()


@pytest.mark.parametrize("H, G", [(1, 1), (2, 1), (4, 2)])
def test_block_attention_takes_any_layout_and_leaves_it_alone(H, G):
    for tensors in zip(layouts(H), layouts(G), layouts(G), layouts(H)):
        *inputs, dy = tensors
        before = [x.clone() for x in tensors]
        got = gradients(block_attention, [x.requires_grad_() for x in inputs], dy)
        for a, b in zip(got, attention_in_float64(inputs, dy)):
            assert distance(a, b) < 1e-14
        assert all(torch.equal(a, b) for a, b in zip(tensors, before))


def test_block_attention_does_not_see_a_future_that_overflows():
    q, k, v = (torch.ones(1, 4, 1, 64).half() for _ in range(3))
    q, k[:, 3] = 30 * q, 400
    y = block_attention(q, k, v)
    assert torch.equal(y[:, :3], torch.ones(1, 3, 1, 64).half()) and y[:, 3].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_attention_does_not_see_the_future(dtype):
    block = block_size(dtype)
    inputs, _ = random_qkv(dtype, 2 * block + 9, 4, 2)
    y = block_attention(*inputs)
    for cut in (1, block - 1, block, block + 1, 2 * block + 3):
        changed = [torch.cat((x[:, :cut], 1 - x[:, cut:]), dim=1) for x in inputs]
        after = block_attention(*changed)
        assert torch.equal(y[:, :cut], after[:, :cut])
        assert not torch.equal(y[:, cut:], after[:, cut:])
        for g in torch.autograd.grad(y[:, :cut].sum(), inputs, retain_graph=True):
            assert not g[:, cut:].any()


def test_attention_names_a_wrong_implementation():
    q = torch.randn(1, 4, 2, 6)
    with pytest.raises(ValueError, match="'fast'"):
        gpt.attention(q, q, q, "fast")


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_swiglu_matches_its_definition(dtype, bound):
    mlp = scrambled(SMALL).blocks[0].mlp.to(dtype)
    x, gain = torch.randn(2, 7, 64, dtype=dtype, requires_grad=True), torch.randn(64, dtype=dtype)
    gate_weight, up_weight = mlp.gate_up.weight[:96], mlp.gate_up.weight[96:]
    n = F.rms_norm(x, (64,), gain, 1e-6)
    gate = n @ gate_weight.T
    wanted = (gate / (1 + torch.exp(-gate)) * (n @ up_weight.T)) @ mlp.down.weight.T
    ours = mlp(x, gain)
    scale = wanted.abs().max().item()  # the bound is relative to the largest output
    torch.testing.assert_close(ours, wanted, atol=bound * scale, rtol=bound)
    (a,), (b,) = (torch.autograd.grad(y.sum(), x, retain_graph=True) for y in (ours, wanted))
    torch.testing.assert_close(a, b, atol=bound * b.abs().max().item(), rtol=bound)


# rotation


@settings(max_examples=50, deadline=None)
@given(t=st.integers(0, 60), s=st.integers(0, 60), shift=st.integers(1, 60))
def test_rope_depends_only_on_distance(t, s, shift):
    cos, sin = (x.double() for x in gpt.rope_table(128, 16, 10_000.0))
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64).unbind()

    def score(t, s):
        at_t = gpt.rope(q, cos[t : t + 1], sin[t : t + 1])
        return (at_t * gpt.rope(k, cos[s : s + 1], sin[s : s + 1])).sum()

    # the table is float32: an angle's cosine is right to 6e-8
    torch.testing.assert_close(score(t, s), score(t + shift, s + shift), atol=1e-5, rtol=1e-5)


def test_rope_is_a_rotation_by_complex_numbers():
    x = torch.randn(2, 9, 3, 10, dtype=torch.float64)
    cos, sin = gpt.rope_table(9, 10, 100.0)
    pairs = torch.complex(x[..., :5], x[..., 5:])
    angle = torch.arange(9.0).outer(100.0 ** (-torch.arange(5) / 5)).double()
    turned = pairs * torch.polar(torch.ones(9, 5).double(), angle).unsqueeze(1)
    wanted = torch.cat((turned.real, turned.imag), dim=-1)
    torch.testing.assert_close(gpt.rope(x, cos, sin), wanted, atol=1e-5, rtol=1e-5)


def test_rope_keeps_lengths():
    x, (cos, sin) = torch.randn(2, 60, 3, 10).double(), gpt.rope_table(60, 10, 100.0)
    lengths = [y.unflatten(-1, (2, 5)).norm(dim=-2) for y in (x, gpt.rope(x, cos, sin))]  # of pairs
    torch.testing.assert_close(*lengths, atol=0, rtol=1e-7)  # the table is float32: 2^-24


def test_rope_gradient_matches_its_finite_differences():
    x, (cos, sin) = randn64(2, 5, 3, 6), gpt.rope_table(5, 6, 100.0)
    packed = randn64(2, 5, 5, 6).detach()[:, :, 1:-1].requires_grad_()
    for layout in (x, packed):
        assert torch.autograd.gradcheck(lambda x: gpt.rope(x, cos, sin), (layout,))


def test_rope_leaves_position_zero_alone():
    x = torch.randn(2, 1, 3, 10)
    cos, sin = gpt.rope_table(1, 10, 10_000.0)
    assert torch.equal(gpt.rope(x, cos, sin), x)


# the model as a whole


@pytest.mark.parametrize("name", gpt.PRESETS)
def test_loss_at_step_zero_is_ln_vocabulary(name):
    torch.manual_seed(0)
    config = gpt.PRESETS[name]
    model, ids = gpt.GPT(config), random_ids(config, 1, 257)
    with torch.no_grad():
        loss = F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:])
        echo = F.cross_entropy(model(ids[:, :-1])[0], ids[0, :-1])  # does it repeat its input?
    assert abs(loss - math.log(config.vocab_size)) < 0.1
    assert abs(echo - loss) < 3  # with std 0.02 the input token's logit would stand out by 10


@pytest.mark.parametrize("config", [*gpt.PRESETS.values(), SMALL])
def test_counts_match_the_modules(config):
    with torch.device("meta"):
        model = gpt.GPT(config)
    assert gpt.parameter_count(config) == sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)  # the head is the table
    attention = 12 * config.n_layer * config.seq_len * config.d_model
    assert gpt.flops_per_token(config) == 6 * matrices + attention


def test_causal_future_does_not_leak():
    model = scrambled(SMALL)
    ids = random_ids(SMALL, 2, 40)
    with torch.no_grad():
        before = model(ids)
        for cut in (1, 17, 39):
            changed = ids.clone()
            changed[:, cut:] = (changed[:, cut:] + 1) % SMALL.vocab_size
            after = model(changed)
            assert torch.equal(before[:, :cut], after[:, :cut])
            assert not torch.equal(before[:, cut:], after[:, cut:])


def test_rows_of_a_batch_do_not_mix():
    model, ids = scrambled(SMALL), random_ids(SMALL, 3, 20)
    with torch.no_grad():
        together, alone = model(ids), model(ids[1:2])
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-5)


def test_every_parameter_gets_a_gradient():
    model, ids = scrambled(SMALL), random_ids(SMALL, 2, 20)
    model(ids).logsumexp(-1).sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_fresh_model_learns_one_row_by_heart():
    torch.manual_seed(0)
    model, ids = gpt.GPT(SMALL), random_ids(SMALL, 1, 33)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        loss = F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    assert torch.equal(model.generate(ids[:, :1], 32, temperature=0), ids)


def test_too_long_input_is_named():
    model = gpt.GPT(SMALL)
    with pytest.raises(ValueError, match="seq_len=48"):
        model(random_ids(SMALL, 1, 49))


@pytest.mark.parametrize(
    "change, word",
    [
        ({"d_model": 65}, "d_model=65"),
        ({"n_kv_head": 3}, "n_kv_head=3"),
        ({"n_layer": 0}, "n_layer=0"),
        ({"n_head": 64}, "n_head"),
    ],
)
def test_config_names_wrong_values(change, word):
    with pytest.raises(ValueError, match=word):
        dataclasses.replace(SMALL, **change)


# generation


# float64's rotation table is float32 on both sides, so it cancels; float32's products are packed
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 2e-5)])
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("pieces", [[40], [1] * 40, [13, 1, 1, 20, 5]])
def test_decoder_in_pieces_equals_full_recomputation(pieces, qk_norm, dtype, tolerance):
    config = dataclasses.replace(SMALL, qk_norm=qk_norm)
    model, ids = scrambled(config).double(), random_ids(config, 2, 40)
    with torch.no_grad():
        wanted = model(ids)[:, [end - 1 for end in itertools.accumulate(pieces)]]
    decoder = gpt.Decoder(model.to(dtype), 2, 40)
    found = torch.stack([decoder(part) for part in ids.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(found, wanted.to(dtype), atol=tolerance, rtol=tolerance)


def test_decoder_rounds_no_more_than_the_model_in_bfloat16():
    model, ids = scrambled(SMALL), random_ids(SMALL, 4, 40)
    model = model.bfloat16().double()  # so that both begin from the same weights
    with torch.no_grad():
        exact = model(ids)
        model = model.bfloat16()
        whole = model(ids)
    decoder = gpt.Decoder(model, 4, 40)
    parts = torch.stack([decoder(ids[:, t : t + 1]) for t in range(40)], dim=1)
    assert parts.dtype == torch.bfloat16
    ours, wanted = ((x - exact).square().mean().sqrt() for x in (parts, whole))
    assert ours < 1.1 * wanted


@pytest.mark.parametrize("S, G", [(4, 2), (5, 3)])
@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_attention_names_keys_that_do_not_fit(S, G, implementation):
    q, k = torch.zeros(1, 5, 4, 8), torch.zeros(1, S, G, 8)
    wanted = rf"k.shape=\(1, {S}, {G}, 8\) must be \(B, at least 5, a divisor of 4, 8\)"
    with pytest.raises(ValueError, match=wanted):
        gpt.attention(q, k, k, implementation)


def test_decoder_reads_no_further_than_its_capacity():
    decoder = gpt.Decoder(scrambled(SMALL), 2, 10)
    decoder(random_ids(SMALL, 2, 8))
    with pytest.raises(ValueError, match="11 positions; wanted at most capacity=10"):
        decoder(random_ids(SMALL, 2, 3))
    with pytest.raises(ValueError, match="ids have 1 rows; wanted batch=2"):
        decoder(random_ids(SMALL, 1, 1))
    with pytest.raises(ValueError, match="ids have no position; wanted at least one"):
        decoder(random_ids(SMALL, 2, 0))
    with pytest.raises(ValueError, match="capacity=1000 must be at most seq_len"):
        gpt.Decoder(scrambled(SMALL), 2, 1000)


def test_generate_greedy_equals_full_recomputation():
    model, ids = scrambled(SMALL).double(), random_ids(SMALL, 3, 5)
    slow = ids
    with torch.no_grad():
        for _ in range(30):
            slow = torch.cat((slow, model(slow)[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(model.generate(ids, 30, temperature=0), slow)


def test_generate_repeats_with_the_same_generator():
    model, ids = scrambled(SMALL), random_ids(SMALL, 2, 5)
    one, two, three = (
        model.generate(ids, 20, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one, two) and not torch.equal(one, three)


def test_generate_stops_each_row_at_stop():
    model, ids = scrambled(SMALL), random_ids(SMALL, 8, 1)
    free = model.generate(ids, 40, generator=torch.Generator().manual_seed(0))
    stop = int(free[0, 5])
    out = model.generate(ids, 40, generator=torch.Generator().manual_seed(0), stop=stop)
    for row, unstopped in zip(out[:, 1:], free[:, 1:]):
        places = (row == stop).nonzero()
        if len(places):
            first = int(places[0])
            assert (row[first:] == stop).all()
            assert torch.equal(row[: first + 1], unstopped[: first + 1])


def test_generate_ends_early_when_all_rows_have_stopped():
    model, ids = scrambled(SMALL), random_ids(SMALL, 1, 1)
    first = int(model.generate(ids, 1, temperature=0)[0, 1])
    assert model.generate(ids, 40, temperature=0, stop=first).shape == (1, 2)


def test_generate_names_what_does_not_fit():
    model = gpt.GPT(SMALL)
    with pytest.raises(ValueError, match="at most 38"):
        model.generate(random_ids(SMALL, 1, 10), 39)
    with pytest.raises(ValueError, match="no tokens"):
        model.generate(torch.zeros(1, 0, dtype=torch.long), 3)


def test_temperature_divides_the_logits():
    logits = torch.randn(5, 50)
    p = gpt.next_token_probabilities(logits, temperature=0.7)
    torch.testing.assert_close(p, (logits / 0.7).softmax(-1), atol=1e-6, rtol=1e-5)
    greedy = gpt.next_token_probabilities(logits, temperature=0)
    assert torch.equal(greedy.argmax(-1), logits.argmax(-1)) and greedy.max() == greedy.min() + 1


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.integers(0, 2**31))
def test_top_k_keeps_the_k_likeliest(k, seed):
    logits = torch.randn(40, generator=torch.Generator().manual_seed(seed))
    p = gpt.next_token_probabilities(logits, top_k=k)
    kept = p > 0
    assert kept.sum() == min(k, 40)
    assert k >= 40 or logits[kept].min() >= logits[~kept].max()
    torch.testing.assert_close(p[kept], logits[kept].softmax(-1), atol=1e-6, rtol=1e-5)


@settings(max_examples=100, deadline=None)
@given(st.floats(0.01, 0.999), st.integers(0, 2**31))
def test_top_p_keeps_the_fewest_tokens_with_mass_p(top_p, seed):
    logits = 2 * torch.randn(40, generator=torch.Generator().manual_seed(seed))
    full = logits.softmax(-1)
    p = gpt.next_token_probabilities(logits, top_p=top_p)
    kept = p > 0
    mass = full[kept].double().sum()
    assert mass >= top_p - 1e-6  # float32 sums
    assert mass - full[kept].min() < top_p + 1e-6  # one token fewer would not reach it
    torch.testing.assert_close(p[kept], full[kept] / full[kept].sum(), atol=1e-6, rtol=1e-5)


def test_top_p_of_a_known_distribution():
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    for top_p, kept in ((0.4, [1]), (0.6, [1, 3]), (0.8, [1, 2, 3]), (1.0, [0, 1, 2, 3])):
        p = gpt.next_token_probabilities(logits, top_p=top_p)
        assert p.nonzero().flatten().tolist() == kept


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1), st.integers(0, 2**31))
def test_min_p_keeps_what_is_likely_beside_the_likeliest(min_p, seed):
    logits = 2 * torch.randn(40, generator=torch.Generator().manual_seed(seed))
    ratio = (logits - logits.max()).exp()
    kept = gpt.next_token_probabilities(logits, min_p=min_p) > 0
    assert kept[ratio > min_p + 1e-5].all() and not kept[ratio < min_p - 1e-5].any()


def test_filters_follow_one_another():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    p = gpt.next_token_probabilities(logits, top_k=2, top_p=0.6)  # 0.4/0.7 alone is below 0.6
    torch.testing.assert_close(p, torch.tensor([4 / 7, 3 / 7, 0, 0]), atol=1e-6, rtol=1e-5)
    p = gpt.next_token_probabilities(logits, top_k=2, top_p=0.55)  # and above 0.55
    assert p.nonzero().flatten().tolist() == [0]


@pytest.mark.parametrize(
    "name, value",
    [("temperature", -1.0), ("top_k", 0), ("top_p", 0.0), ("top_p", 1.5), ("min_p", 2)],
)
def test_sampling_names_wrong_values(name, value):
    with pytest.raises(ValueError, match=name):
        gpt.next_token_probabilities(torch.zeros(3), **{name: value})


def test_draw_takes_each_token_as_often_as_it_is_likely_and_none_of_mass_zero():
    p = torch.tensor([0.0, 0.125, 0.0, 0.5, 0.375, 0.0])
    drawn = gpt.draw(p.expand(40_000, -1), torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn[:, 0], minlength=6) / 40_000
    assert (counts - p).abs().max() < 5 * math.sqrt(0.25 / 40_000)  # five standard errors
    assert not counts[p == 0].any()


def test_draw_at_the_ends_of_the_uniform_number(monkeypatch):
    p = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    for random, token in ((0.0, 3), (0.75, 1), (1 - 2**-24, 1)):  # torch.rand is in [0, 1)
        monkeypatch.setattr(torch, "rand", lambda *_, r=random, **__: torch.tensor([[r]]))
        assert gpt.draw(p).tolist() == [[token]]


def test_sampling_follows_the_probabilities():
    torch.manual_seed(0)
    model, ids = scrambled(SMALL), random_ids(SMALL, 1, 4)
    with torch.no_grad():
        p = gpt.next_token_probabilities(model(ids)[0, -1], top_k=5)
    drawn = model.generate(ids.expand(4000, -1), 1, top_k=5)[:, -1]
    counts = torch.bincount(drawn, minlength=SMALL.vocab_size) / 4000
    assert (counts - p).abs().max() < 5 * math.sqrt(0.25 / 4000)  # five standard errors
