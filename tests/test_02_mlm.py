"""Tests of 02_mlm.py: against transformers, by closed form, by property, and by learning.

Run: python -m pytest tests/test_02_mlm.py
"""

import collections
import importlib
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import bpe, stories

mlm = importlib.import_module("02_mlm")
mask_tokens, Vocabulary, Scheme, IGNORE = mlm.mask_tokens, mlm.Vocabulary, mlm.Scheme, mlm.IGNORE

V, PAD, MASK, CLS, SEP = 100, 0, 1, 2, 3
VOCABULARY = Vocabulary(V, MASK, (CLS, SEP), PAD)
# ids ending in 0 and 5 begin a word: words of 1 to 5 tokens and more
WORDS = Vocabulary(V, MASK, (CLS, SEP), PAD, tuple(i % 5 == 0 for i in range(V)))
KEYED = ["bert", "roberta", "whole-word", "span", "electra"]


def ordinary_ids(rows, T, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(4, V, (rows, T), generator=g)


def mask(ids, scheme, vocabulary=VOCABULARY, **options):
    """mask_tokens with rows numbered from 0, or with generator 0 for hf."""
    if scheme == "hf":
        options.setdefault("generator", torch.Generator().manual_seed(0))
    else:
        options.setdefault("index", range(len(ids)) if ids.ndim == 2 else 0)
    return mask_tokens(ids, scheme, vocabulary, **options)


def sigmas(count, trials, p):
    return abs(count - trials * p) / math.sqrt(trials * p * (1 - p))


# against transformers


def library_tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    names = ["[PAD]", "[MASK]", "[CLS]", "[SEP]"] + [f"w{i}" for i in range(4, V)]
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[PAD]")
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        mask_token="[MASK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


@pytest.mark.parametrize(
    "rate, mask_share, random_share",
    [(0.15, 0.8, 0.1), (0.4, 0.5, 0.5), (0.3, 1.0, 0.0), (0.3, 0.7, 0.0)],
)
def test_hf_equals_the_librarys_collator_but_for_inserted_specials(rate, mask_share, random_share):
    tokenizer = library_tokenizer()
    collator = importlib.import_module("transformers").DataCollatorForLanguageModeling(
        tokenizer,
        mlm_probability=rate,
        mask_replace_prob=mask_share,
        random_replace_prob=random_share,
        seed=7,
    )
    generator = torch.Generator().manual_seed(7)
    specials_inserted = 0
    for step in range(20):  # one generator runs through all of them
        ids = ordinary_ids(64, 32, seed=step)
        ids[:, 0], ids[:, 20], ids[::3, 25:] = CLS, SEP, PAD
        theirs = collator([{"input_ids": row} for row in ids.tolist()])
        inputs, labels = mask_tokens(
            ids,
            "hf",
            VOCABULARY,
            generator=generator,
            rate=rate,
            mask_share=mask_share,
            random_share=random_share,
        )
        assert torch.equal(labels, theirs["labels"])
        drawn = theirs["input_ids"]
        special = (drawn != inputs) & (drawn < 4)
        assert torch.equal(inputs, torch.where(special, ids, drawn))
        specials_inserted += special.sum().item()
    assert (specials_inserted > 0) == (random_share > 0)  # that the deviation is one


def bert_weights(theirs, n_layer):
    """Our state dict from BertForMaskedLM's. Segment A's vector goes into the positions."""
    state = theirs.state_dict()
    base = "bert.embeddings"
    segment = state[f"{base}.token_type_embeddings.weight"][0]
    ours = {
        "encoder.embedding.token.weight": state[f"{base}.word_embeddings.weight"],
        "encoder.embedding.position.weight": state[f"{base}.position_embeddings.weight"] + segment,
        "bias": state["cls.predictions.bias"],
    }
    names = {
        "encoder.embedding.norm": f"{base}.LayerNorm",
        "transform": "cls.predictions.transform.dense",
        "norm": "cls.predictions.transform.LayerNorm",
    }
    for i in range(n_layer):
        a, b = f"encoder.layers.{i}", f"bert.encoder.layer.{i}"
        names |= {
            f"{a}.out": f"{b}.attention.output.dense",
            f"{a}.attention_norm": f"{b}.attention.output.LayerNorm",
            f"{a}.up": f"{b}.intermediate.dense",
            f"{a}.down": f"{b}.output.dense",
            f"{a}.mlp_norm": f"{b}.output.LayerNorm",
        }
        for kind in ("weight", "bias"):
            parts = [state[f"{b}.attention.self.{x}.{kind}"] for x in ("query", "key", "value")]
            ours[f"{a}.qkv.{kind}"] = torch.cat(parts)
    for a, b in names.items():
        ours |= {f"{a}.{kind}": state[f"{b}.{kind}"] for kind in ("weight", "bias")}
    return ours


def test_masked_lm_agrees_with_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=97,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=80,
        max_position_embeddings=40,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    theirs = transformers.BertForMaskedLM(config).eval()
    for p in theirs.parameters():  # gains and biases too, and large enough to be seen
        torch.nn.init.normal_(p, std=0.3)
    ours = mlm.MaskedLM(mlm.EncoderConfig(97, 40, 3, 4, 48, 80))
    ours.load_state_dict(bert_weights(theirs, 3))
    ids = torch.randint(97, (5, 33))
    real = torch.arange(33) < torch.tensor([33, 20, 7, 1, 32])[:, None]
    with torch.no_grad():
        for visible in (None, real):
            wanted = theirs(ids, attention_mask=visible).logits
            keep = torch.ones_like(real) if visible is None else real
            error = (ours(ids, visible) - wanted)[keep].abs().max()
            assert wanted.abs().max() > 1 and error < 1e-4


def test_masked_lm_loss_agrees_with_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=V,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=40,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    theirs = transformers.BertForMaskedLM(config).eval()
    ours = mlm.MaskedLM(mlm.EncoderConfig(V, 40, 1, 2, 32, 64))
    ours.load_state_dict(bert_weights(theirs, 1))
    inputs, labels = mask(ordinary_ids(6, 30), "bert")
    wanted = theirs(inputs, labels=labels).loss
    torch.testing.assert_close(mlm.masked_lm_loss(ours, inputs, labels), wanted)


# known answers


@pytest.mark.parametrize("n", [1, 3, 10, 23, 50, 128])
@pytest.mark.parametrize("cap", [None, 5])
@pytest.mark.parametrize("scheme", ["bert", "electra"])
def test_exact_count(scheme, cap, n):
    _, labels = mask(ordinary_ids(20, n), scheme, cap=cap)
    wanted = min(cap or n, max(1, round(0.15 * n)))
    assert (labels != IGNORE).sum(1).tolist() == 20 * [wanted]


def test_exact_count_counts_specials_but_not_padding():
    ids = ordinary_ids(20, 60)
    ids[:, :10], ids[:, 40:] = CLS, PAD  # 40 tokens, 30 candidates
    for scheme in ("bert", "electra", "span"):
        _, labels = mask(ids, scheme)
        assert (labels != IGNORE).sum(1).tolist() == 20 * [6], scheme


def test_roberta_count_is_rounded_at_random():
    _, labels = mask(ordinary_ids(2000, 25), "roberta")  # 0.15 * 25 = 3.75
    counts = collections.Counter((labels != IGNORE).sum(1).tolist())
    assert counts.keys() == {3, 4} and sigmas(counts[4], 2000, 0.75) < 5


def test_count_option_makes_roberta_exact():
    _, labels = mask(ordinary_ids(100, 25), "roberta", count="nearest")
    assert (labels != IGNORE).sum(1).tolist() == 100 * [4]


@pytest.mark.parametrize("n", [5, 10, 20])
def test_hf_leaves_rows_without_label_as_often_as_theory_says(n):
    _, labels = mask(ordinary_ids(10_000, n), "hf")
    empty = (labels == IGNORE).all(1).sum().item()
    assert sigmas(empty, 10_000, 0.85**n) < 5


@pytest.mark.parametrize("scheme", ["roberta", "hf", "whole-word"])
def test_at_least_one(scheme):
    ids = ordinary_ids(500, 4)
    ids[0] = CLS  # nothing to choose from
    _, without = mask(ids, scheme)
    inputs, labels = mask(ids, scheme, at_least_one=True)
    assert (without == IGNORE).all(1).sum() > 50
    assert (labels == IGNORE).all(1).nonzero().tolist() == [[0]]
    assert torch.equal(labels[labels != IGNORE], ids[labels != IGNORE])
    assert torch.equal(inputs[labels == IGNORE], ids[labels == IGNORE])


def test_span_lengths_have_the_papers_mean():
    lengths = np.arange(1, 11)
    geometric = 0.2 * 0.8 ** (lengths - 1)
    assert mlm.SPAN_LENGTHS @ lengths == pytest.approx(geometric @ lengths / geometric.sum())
    assert mlm.SPAN_LENGTHS @ lengths == pytest.approx(3.797, abs=5e-4)


def test_span_draws_runs_of_that_length():
    """At a tiny rate there is one span a row, cut by nothing but the row's end and its budget."""
    rng = np.random.default_rng(0)
    word = np.arange(1000)
    lengths = []
    for _ in range(500):
        chosen = mlm.choose_spans(word, 10, rng)
        assert chosen.sum() == 10
        first = np.flatnonzero(chosen)[0]
        run = np.flatnonzero(~np.append(chosen[first:], False))[0]
        lengths.append(run)
    # the leftmost run of a row is one span, or the rest of the budget where that was smaller
    assert 1 <= min(lengths) and max(lengths) == 10


def test_span_of_whole_words_begins_and_ends_between_words():
    """Only the last span of a row may be cut, by the budget: at most one word is split."""
    ids = ordinary_ids(300, 60)
    ids[:, 30] = SEP
    _, labels = mask(ids, "span", WORDS)
    assert ((labels != IGNORE).sum(1) == 9).all()
    for row, chosen in zip(ids.tolist(), (labels != IGNORE).tolist()):
        words = collections.defaultdict(list)
        word = 0
        for token, hit in zip(row, chosen):
            word += token % 5 == 0 or token == SEP
            words[word - (token == SEP) * 0.5].append(hit)
        assert sum(0 < sum(hits) < len(hits) for hits in words.values()) <= 1


def test_whole_word_takes_words_whole_and_decides_once():
    ids = ordinary_ids(1000, 40)
    ids[:, 20] = SEP
    inputs, labels = mask(ids, "whole-word", WORDS)
    fates = collections.Counter()
    for row, seen, chosen in zip(ids.tolist(), inputs.tolist(), (labels != IGNORE).tolist()):
        words = []
        for i, token in enumerate(row):
            if token == SEP:
                words.append([])
            elif i == 0 or token % 5 == 0 or not words[-1]:
                words.append([i])
            else:
                words[-1].append(i)
        for word in filter(None, words):
            assert len({chosen[i] for i in word}) == 1
            if chosen[word[0]] and len(word) > 2:  # a random word equals the old one hardly ever
                hidden = {seen[i] == MASK for i in word}
                assert len(hidden) == 1
                same = all(seen[i] == row[i] for i in word)
                fates["mask" if True in hidden else "same" if same else "random"] += 1
    total = sum(fates.values())
    for fate, share in (("mask", 0.8), ("random", 0.1), ("same", 0.1)):
        assert sigmas(fates[fate], total, share) < 5


# statistics


@pytest.mark.parametrize("rate", [0.15, 0.4])
def test_hf_rate_is_binomial(rate):
    _, labels = mask(ordinary_ids(400, 100), "hf", rate=rate)
    assert sigmas((labels != IGNORE).sum().item(), 40_000, rate) < 5


@pytest.mark.parametrize("scheme", ["bert", "roberta", "whole-word"])
def test_each_position_is_chosen_equally_often(scheme):
    _, labels = mask(ordinary_ids(1500, 20), scheme)
    counts = (labels != IGNORE).sum(0)
    assert all(sigmas(c, 1500, 0.15) < 5 for c in counts.tolist())


@pytest.mark.parametrize("scheme", ["bert", "roberta", "hf", "span", "whole-word"])
def test_shares_are_80_10_10(scheme):
    """Chi-square with two degrees of freedom: 23 is passed once in 100,000 times."""
    ids = ordinary_ids(1200, 60)
    inputs, labels = mask(ids, scheme)
    chosen = labels != IGNORE
    if scheme == "span":  # decided per run of chosen tokens: count runs
        chosen = chosen & ~torch.nn.functional.pad(chosen[:, :-1], (1, 0))
    n = chosen.sum().item()
    masked = (chosen & (inputs == MASK)).sum().item()
    changed = (chosen & (inputs != MASK) & (inputs != ids)).sum().item()
    hit = 0.1 / 96  # a random id that is the old one looks unchanged
    if scheme == "hf":
        hit += 0.1 * 4 / 100  # here a special draw leaves the token alone
        hit -= 0.1 / 96 - 0.1 / 100
    expected = n * np.array([0.8, 0.1 - hit, 0.1 + hit])
    observed = np.array([masked, changed, n - masked - changed])
    assert ((observed - expected) ** 2 / expected).sum() < 23


def test_electra_masks_85_percent_and_inserts_nothing_else():
    ids = ordinary_ids(2000, 40)
    inputs, labels = mask(ids, "electra")
    chosen = labels != IGNORE
    assert torch.equal(inputs == MASK, inputs != ids)
    assert sigmas((inputs == MASK).sum().item(), chosen.sum().item(), 0.85) < 5


def test_random_ids_are_uniform_over_ordinary_ids():
    inputs, labels = mask(
        torch.full((400, 100), 50), "roberta", rate=1.0, mask_share=0.0, random_share=1.0
    )
    counts = inputs.flatten().bincount(minlength=V)
    assert (counts[:4] == 0).all()
    expected = 40_000 / 96
    chi_square = ((counts[4:] - expected) ** 2 / expected).sum()
    assert chi_square < 95 + 5 * math.sqrt(2 * 95)


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from([*KEYED, "hf"]),
    st.lists(st.lists(st.sampled_from([0, *range(2, 12)]), min_size=9, max_size=9), min_size=1),
    st.floats(0, 1),
    st.booleans(),
    st.integers(0, 2**40),
)
def test_only_chosen_ordinary_tokens_change_and_never_to_special(scheme, rows, rate, once, seed):
    vocabulary = Vocabulary(12, MASK, (CLS, SEP), PAD, tuple(i % 2 == 0 for i in range(12)))
    ids = torch.tensor(rows)
    before = ids.clone()
    key = {"generator": torch.Generator().manual_seed(seed)} if scheme == "hf" else {"seed": seed}
    inputs, labels = mask(ids, scheme, vocabulary, rate=rate, at_least_one=once, **key)
    assert torch.equal(ids, before) and inputs.dtype == labels.dtype == torch.int64
    chosen = labels != IGNORE
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(inputs[~chosen], ids[~chosen])
    assert (ids[chosen] >= 4).all()
    assert ((inputs[chosen] >= 4) | (inputs[chosen] == MASK)).all()
    if once:
        assert torch.equal(chosen.any(1), (ids >= 4).any(1))


# determinism


@pytest.mark.parametrize("scheme", KEYED)
def test_a_rows_mask_does_not_depend_on_its_batch(scheme):
    ids = ordinary_ids(64, 50)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    inputs, labels = mask(ids, scheme, WORDS, seed=3, epoch=2)
    shuffled = mask(ids[order], scheme, WORDS, seed=3, epoch=2, index=order)
    assert torch.equal(shuffled[0], inputs[order]) and torch.equal(shuffled[1], labels[order])
    for i in range(64):
        alone = mask(ids[i], scheme, WORDS, seed=3, epoch=2, index=i)
        assert torch.equal(alone[0], inputs[i]) and torch.equal(alone[1], labels[i])


class MaskedRows(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        return mask_tokens(ordinary_ids(1, 50, seed=i)[0], "roberta", VOCABULARY, index=i)


def test_a_rows_mask_does_not_depend_on_workers():
    results = []
    for workers in (0, 2):
        loader = torch.utils.data.DataLoader(MaskedRows(), batch_size=8, num_workers=workers)
        results.append(torch.cat([inputs for inputs, _ in loader]))
    assert torch.equal(*results)


@pytest.mark.parametrize("scheme", KEYED)
@pytest.mark.parametrize("other", [{"epoch": 1}, {"seed": 1}, {"index": range(1, 65)}])
def test_another_epoch_seed_or_index_gives_another_mask(scheme, other):
    ids = ordinary_ids(1, 60).repeat(64, 1)
    _, one = mask(ids, scheme)
    _, two = mask(ids, scheme, **other)
    assert ((one != two).any(1).sum() >= 60) and not torch.equal(one[0], one[1])


# errors


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: mask(ordinary_ids(2, 9), "robreta"), "nearest is 'roberta'"),
        (lambda: mask(ordinary_ids(2, 9), "bert", rate=1.5), "rate=1.5 must be in"),
        (lambda: mask(ordinary_ids(2, 9), "bert", rate=math.nan), "rate=nan"),
        (lambda: mask(ordinary_ids(2, 9), "hf", mask_share=-0.1), "mask_share=-0.1"),
        (lambda: mask(ordinary_ids(2, 9), "bert", random_share=0.3), "at most 1"),
        (lambda: mask(ordinary_ids(2, 9), "bert", cap=-1), "cap=-1"),
        (lambda: mask(ordinary_ids(2, 9), "hf", cap=3), "cap=3 must be None"),
        (lambda: mask(ordinary_ids(2, 9), "bert", count="some"), "count='some' must be one of"),
        (lambda: mask(ordinary_ids(2, 9), "bert", unit="line"), "unit='line' must be one of"),
        (lambda: mask(ordinary_ids(2, 9), "span", count="bernoulli"), "unit='span' must be"),
        (lambda: mask(ordinary_ids(2, 9).float(), "bert"), "ids.dtype=torch.float32"),
        (lambda: mask(ordinary_ids(2, 9)[None], "bert", index=0), r"ids.shape=\(1, 2, 9\)"),
        (lambda: mask(ordinary_ids(2, 9) + 95, "bert"), r"ids=\[\d+\] must be in \[0, 99\]"),
        (lambda: mask(torch.tensor([5, MASK]), "bert"), "not masked yet"),
        (lambda: mask(ordinary_ids(2, 9), "bert", index=3), r"len\(index\)=1 must be 2"),
        (lambda: mask(ordinary_ids(2, 9), "bert", index=None), "index=None must be the number"),
        (lambda: mask(ordinary_ids(2, 9), "bert", seed=-1), "seed=-1 must be >= 0"),
        (lambda: mask(ordinary_ids(2, 9), "bert", epoch=-1), "epoch=-1"),
        (lambda: mask(ordinary_ids(2, 9), "hf", generator=None), "generator=None must be"),
        (lambda: mask(ordinary_ids(2, 9), "hf", index=[0, 1]), "None for 'hf'"),
        (lambda: mask(ordinary_ids(1, 9), "bert", generator=torch.Generator()), "None but for"),
        (lambda: Vocabulary(100, 100), r"mask_id=100 must be in \[0, 99\]"),
        (lambda: Vocabulary(100, 99, (100,)), "special id=100"),
        (lambda: Vocabulary(100, 99, pad_id=99), "another id than pad_id"),
        (lambda: Vocabulary(2, 1, (0,)), "all special"),
        (lambda: Vocabulary(3, 1, word_starts=(True,)), r"len\(word_starts\)=1 must be size"),
        (lambda: mlm.EncoderConfig(9, d_model=10, n_head=3), "a multiple of n_head=3"),
        (lambda: mlm.EncoderConfig(0), "vocab_size=0 must be at least 1"),
        (lambda: tiny()(torch.zeros(1, 40, dtype=torch.long)), "T=40 must be at most seq_len=32"),
        (lambda: mlm.grow_vocabulary(tiny(), 5), "vocab_size=5 must be at least"),
        (
            lambda: mlm.Electra(mlm.EncoderConfig(9, 8), mlm.EncoderConfig(9, 9)),
            "generator.seq_len=9",
        ),
    ],
)
def test_wrong_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# loss and model


def tiny(vocab_size=V, **options):
    torch.manual_seed(0)
    return mlm.MaskedLM(mlm.EncoderConfig(vocab_size, 32, 2, 2, 32, 64, **options))


def test_masked_lm_loss_is_the_mean_over_masked_tokens_only():
    model = tiny()
    ids = ordinary_ids(4, 20)
    inputs, labels = mask(ids, "bert")
    with torch.no_grad():
        log_p = model(inputs).log_softmax(-1)
        picked = [
            -log_p[b, t, ids[b, t]].item()
            for b in range(4)
            for t in range(20)
            if labels[b, t] != IGNORE
        ]
        value = mlm.masked_lm_loss(model, inputs, labels).item()
    assert len(picked) == 12 and value == pytest.approx(sum(picked) / 12, rel=1e-5)


def test_masked_lm_loss_without_labels_is_zero_with_zero_gradient():
    model = tiny()
    ids = ordinary_ids(3, 10)
    loss = mlm.masked_lm_loss(model, ids, torch.full_like(ids, IGNORE))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_a_fresh_model_knows_nothing():
    inputs, labels = mask(ordinary_ids(32, 30), "bert")
    loss = mlm.masked_lm_loss(tiny(), inputs, labels).item()
    assert abs(loss - math.log(V)) < 0.3


def test_encoder_looks_both_ways_and_causal_only_left():
    ids = ordinary_ids(2, 20)
    changed = ids.clone()
    changed[:, 12] = (changed[:, 12] - 3) % 96 + 4
    for causal in (False, True):
        model = tiny(causal=causal)
        moved = (model(ids) - model(changed)).abs().amax(-1).gt(1e-7)  # (B, T)
        assert moved[:, 12:].all()
        assert moved[:, :12].any() != causal


@pytest.mark.parametrize("causal", [False, True])
def test_padding_changes_nothing(causal):
    model = tiny(causal=causal)
    ids = ordinary_ids(2, 20)
    padded = torch.cat((ids, torch.zeros(2, 5, dtype=torch.long)), dim=1)
    error = (model(padded, padded != PAD)[:, :20] - model(ids)).abs().max()
    assert error < 1e-5


def test_head_is_tied_to_the_token_table():
    model = tiny()
    names = [name for name, p in model.named_parameters() if p.shape[:1] == (V,)]
    assert names == ["bias", "encoder.embedding.token.weight"]


# filling in


def test_fill_in_masks_one_position_at_a_time():
    model = tiny()
    ids = ordinary_ids(1, 20)[0]
    positions = torch.tensor([3, 19, 0])
    log_p = mlm.fill_in(model, ids, positions, MASK)
    for row, at in zip(log_p, positions.tolist()):
        alone = ids.clone()
        alone[at] = MASK
        torch.testing.assert_close(row, model(alone[None])[0, at].log_softmax(-1))


def test_pseudo_perplexity_of_a_model_that_knows_nothing_is_the_vocabulary():
    model = tiny()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    ids = ordinary_ids(1, 20)[0]
    assert mlm.pseudo_perplexity(model, ids, torch.arange(20), MASK) == pytest.approx(V, rel=1e-5)


# a mask id for tiktoken


def test_with_mask_token_reserves_an_id_that_no_text_is_encoded_to():
    texts = [story for story, _ in stories.corpus(20, seed=0)]
    encoding = bpe.train(texts, 400).encoding()
    larger, mask_id = mlm.with_mask_token(encoding)
    assert mask_id == encoding.n_vocab == 400 and larger.n_vocab == 401
    for text in (*texts[:5], "a <|mask|> b", "<|endoftext|>", "\u1234 \x00"):
        ids = larger.encode_ordinary(text)
        assert ids == encoding.encode_ordinary(text) and max(ids) < mask_id
    assert larger.decode([mask_id]) == "<|mask|>"
    ids = torch.tensor(larger.encode_ordinary(texts[0]))
    vocabulary = Vocabulary(larger.n_vocab, mask_id, (larger.eot_token,))
    inputs, _ = mask(ids, "bert", vocabulary)
    assert "<|mask|>" in larger.decode(inputs.tolist())


def test_grow_vocabulary_appends_rows_and_keeps_the_others():
    model = tiny()
    ids = ordinary_ids(2, 20)
    before = model(ids)
    mlm.grow_vocabulary(model, V + 1)
    after = model(ids)
    assert after.shape[-1] == V + 1 == model.encoder.config.vocab_size
    torch.testing.assert_close(after[..., :V], before)
    model(torch.full((1, 3), V)).sum().backward()  # the new id has a row, and it is trained
    assert model.encoder.embedding.token.weight.grad[V].abs().sum() > 0


# learning


def markov_chain(states=8, seed=0):
    """Transition matrix with a few likely ways, and its stationary distribution."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(states, 0.3), size=states) * 0.95 + 0.05 / states
    stationary = np.linalg.matrix_power(p, 200)[0]
    return p, stationary


def markov_rows(p, stationary, rows, T, seed=0):
    rng = np.random.default_rng(seed)
    state = rng.choice(len(p), size=rows, p=stationary)
    columns = [state]
    for _ in range(T - 1):
        state = (p[state].cumsum(1) > rng.random(rows)[:, None]).argmax(1)
        columns.append(state)
    return torch.from_numpy(np.stack(columns, 1)) + 2  # ids 0, 1: padding and mask


def train(step, parameters, steps, lr=1e-2):
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.0)
    for i in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((i + 1) / 20, 1 - i / steps)
        optimizer.zero_grad()
        step(i).backward()
        optimizer.step()


def test_mlm_loss_approaches_the_conditional_entropy_of_a_markov_chain():
    """H(x_t | both neighbours), in closed form; one token in the middle of five is masked."""
    p, stationary = markov_chain()
    joint = stationary[:, None, None] * p[:, :, None] * p[None, :, :]  # (left, x, right)
    outer = joint.sum(1, keepdims=True)
    floor = -(joint * np.log(joint / outer)).sum()
    one_sided = -(stationary[:, None] * p * np.log(p)).sum()
    torch.manual_seed(0)
    model = mlm.MaskedLM(mlm.EncoderConfig(10, 5, 1, 2, 32, 64))
    rows = markov_rows(p, stationary, 30_000, 5)

    def masked(batch):
        labels = torch.full_like(batch, IGNORE)
        labels[:, 2] = batch[:, 2]
        return batch.masked_fill(labels != IGNORE, 1), labels

    train(
        lambda i: mlm.masked_lm_loss(model, *masked(rows[64 * i : 64 * i + 64])),
        model.parameters(),
        400,
    )
    held_out = markov_rows(p, stationary, 20_000, 5, seed=1)
    with torch.no_grad():
        loss = mlm.masked_lm_loss(model, *masked(held_out)).item()
    assert floor + 0.15 < one_sided < math.log(8)
    assert floor - 0.03 < loss < floor + 0.1


def electra_model(vocab_size=10):
    torch.manual_seed(0)
    discriminator = mlm.EncoderConfig(vocab_size, 16, 1, 2, 32, 64)
    generator = mlm.EncoderConfig(vocab_size, 16, 1, 1, 4, 8, d_embedding=32)
    return mlm.Electra(discriminator, generator)


def test_electra_detection_beats_the_base_rate():
    """Rows count upwards modulo 30. The generator is too small to count well after so few steps:
    one that could would make no replacements to find."""
    vocabulary = Vocabulary(32, 1, pad_id=0)
    model = electra_model(32)
    g = torch.Generator().manual_seed(0)
    rows = (torch.randint(30, (14_800, 1), generator=g) + torch.arange(5)) % 30 + 2

    def step(first, last):
        ids = rows[first:last]
        pair = mask_tokens(ids, "electra", vocabulary, index=range(first, last))
        return mlm.electra_loss(model, ids, *pair)

    train(lambda i: step(32 * i, 32 * i + 32).loss, model.parameters(), 400, lr=5e-3)
    with torch.no_grad():
        result = step(12_800, 14_800)
    replaced = result.corrupted != rows[12_800:]
    accuracy = ((result.logits > 0) == replaced).double().mean().item()
    base = 1 - replaced.double().mean().item()
    assert 0.75 < base < 0.9
    assert accuracy > base + 0.03


def test_electra_loss_parts():
    model = electra_model()
    ids = torch.randint(2, 10, (6, 16))
    ids[:, 12:] = 0
    vocabulary = Vocabulary(10, 1, pad_id=0)
    inputs, labels = mask(ids, "electra", vocabulary, rate=0.4)
    g = torch.Generator().manual_seed(0)
    result = mlm.electra_loss(model, ids, inputs, labels, ids != 0, g, weight=7.0)
    chosen = labels != IGNORE
    assert torch.equal(result.corrupted[~chosen], ids[~chosen])
    torch.testing.assert_close(result.loss, result.mlm + 7 * result.detection)
    torch.testing.assert_close(
        result.mlm, mlm.masked_lm_loss(model.generator, inputs, labels, ids != 0)
    )
    hits = (result.corrupted == ids) & chosen  # guesses that are right count as original
    assert hits.any()
    real = ids != 0
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(
        result.logits[real], (result.corrupted != ids)[real].float()
    )
    torch.testing.assert_close(result.detection, wanted)


def test_electra_shares_the_embedding_and_nothing_else():
    model = electra_model()
    assert model.discriminator.embedding is model.generator.encoder.embedding
    ids = torch.randint(2, 10, (6, 16))
    pair = mask(ids, "electra", Vocabulary(10, 1))
    mlm.electra_loss(model, ids, *pair).detection.backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None}
    own = ("discriminator.", "transform", "verdict", "generator.encoder.embedding.")
    assert touched and all(name.startswith(own) for name in touched)


def test_electra_samples_from_the_generators_distribution():
    model = electra_model()
    with torch.no_grad():
        for p in model.generator.parameters():
            p.zero_()
        model.generator.bias.copy_(torch.randn(10, generator=torch.Generator().manual_seed(1)))
    p = model.generator.bias.softmax(0)
    ids = torch.full((2000, 16), 5)
    pair = mask(ids, "electra", Vocabulary(10, 1), rate=0.5)
    with torch.no_grad():
        result = mlm.electra_loss(model, ids, *pair)
    drawn = result.corrupted[pair[1] != IGNORE].bincount(minlength=10)
    expected = p * drawn.sum()
    assert drawn.sum() == 16_000
    assert ((drawn - expected) ** 2 / expected).sum() < 9 + 5 * math.sqrt(18)


# the demo


def test_fillings_equal_substituting_each_token_and_parsing():
    """The oracle is stories.parse: put the token in, ask for the probability, normalise."""
    whole = stories.RULES["story"]
    rng = random.Random(0)
    tokens = sorted({t for s, _ in stories.corpus(300, 1) for t in mlm.TOKEN.findall(s)})
    several = 0
    for story, _ in stories.corpus(8, seed=2):
        text = mlm.TOKEN.findall(story)
        assert "".join(text) == story
        plot = stories.parse(story).choices[0][1]
        for at in rng.sample(range(len(text)), 40):  # up to a place where there is a choice
            left, right = "".join(text[:at]), "".join(text[at + 1 :])
            found = mlm.fillings(stories, whole[plot], left, right, tokens)
            if len(found) > 1:
                break
        wanted = {}
        for token in {*found, *rng.sample(tokens, 25), text[at]}:
            reading = stories.parse(left + token + right)
            if isinstance(reading, stories.Derivation):
                wanted[token] = math.exp(reading.log_probability)
        total = sum(wanted.values())
        assert found == pytest.approx({t: p / total for t, p in wanted.items()})
        several += len(found) > 1
    assert several > 1


def test_demo_runs_and_fails_without_training(monkeypatch):
    monkeypatch.setattr(mlm, "STEPS", 3)
    with pytest.raises(SystemExit, match="FAILED: wanted"):
        mlm.demo()


def test_flops_per_token_counts_weights_in_products():
    config = mlm.EncoderConfig(50, 16, 2, 2, 32, 64)
    weights = [p.numel() for name, p in tiny(50).named_parameters() if p.ndim == 2]
    position = 32 * 32
    assert mlm.flops_per_token(config, 0, 1.0) == 6 * (sum(weights) - position)
    attention = mlm.flops_per_token(config, 16, 0) - mlm.flops_per_token(config, 0, 0)
    assert attention == 2 * 12 * 16 * 32


def test_import_prints_nothing_and_draws_nothing():
    code = (
        "import importlib, torch; s = torch.get_rng_state();"
        "importlib.import_module('02_mlm');"
        "assert torch.equal(s, torch.get_rng_state())"
    )
    folder = Path(mlm.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("scheme", KEYED)
@pytest.mark.parametrize("before, behind", [(0, 7), (5, 0), (3, 4)])
def test_mask_tokens_does_not_depend_on_padding(scheme, before, behind):
    vocabulary = mlm.Vocabulary(1000, 1, (2, 3), pad_id=0)
    row = torch.arange(10, 50)
    padded = torch.nn.functional.pad(row, (before, behind))
    for index in range(100):
        inputs, labels = mlm.mask_tokens(row, scheme, vocabulary, index=index)
        inputs2, labels2 = mlm.mask_tokens(padded, scheme, vocabulary, index=index)
        assert torch.equal(inputs2[before : before + 40], inputs)
        assert torch.equal(labels2[before : before + 40], labels)


def test_mask_tokens_of_no_tokens_and_at_least_one_beyond_the_cap():
    vocabulary = mlm.Vocabulary(100, 1)
    empty = torch.zeros(2, 0, dtype=torch.int64)
    assert mlm.mask_tokens(empty, "bert", vocabulary, index=[0, 1])[0].shape == (2, 0)
    assert mlm.mask_tokens(empty[0], "span", vocabulary, index=0)[0].shape == (0,)
    row = torch.arange(10, 30)
    _, labels = mlm.mask_tokens(row, "bert", vocabulary, index=0, cap=0, at_least_one=True)
    assert (labels >= 0).sum() == 1


def test_padding_as_numbers_and_no_positions_are_refused():
    torch.manual_seed(0)
    shape = dict(vocab_size=20, seq_len=8, n_layer=1, n_head=2, d_model=16, d_mlp=32)
    model = mlm.MaskedLM(mlm.EncoderConfig(**shape))
    ids = torch.arange(4, 10)
    with pytest.raises(ValueError, match="real.dtype"):
        model(ids[None], torch.ones(1, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match="positions"):
        mlm.pseudo_perplexity(model, ids, ids[:0], 1)
    mlm.grow_vocabulary(model, 2020)
    new = model.encoder.embedding.token.weight[20:]
    assert new.std().item() == pytest.approx(0.5 / 4, rel=0.05)
