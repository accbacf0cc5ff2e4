"""Masked language modelling: hide some tokens of a text, and learn to name them from both sides.

A row x of n tokens becomes inputs and labels. A scheme chooses positions S, by default 15% of n:

    label_i = x_i for i in S, otherwise -100             nothing else is predicted
    input_i = mask id    with probability 0.8            for i in S; otherwise x_i
              random id  with probability 0.1            so that no token can be trusted, and the
              x_i        with probability 0.1            model learns a vector for real ones too
    loss    = 1/|S| sum_{i in S} -ln p(x_i | input)      0 for an empty S, not 0/0

    scheme       what is chosen                                              it is then
    bert         exactly max(1, round(0.15 n)) tokens                        80/10/10
    roberta      floor(0.15 n + U) tokens, U uniform in [0, 1)               80/10/10
    whole-word   floor(0.15 w + U) of the row's w words, each as a whole     80/10/10 by word
    span         spans of 1..10 words, 3.8 on average, ceil(0.15 n) tokens   80/10/10 by span
    electra      exactly max(1, round(0.15 n)) tokens                        85/0/15
    hf           each token with probability 0.15, by a generator's draws    80/10/10

Special ids and padding are never chosen and never inserted. A row's mask is a function of
(seed, epoch, number of the row): the same in any batch, by any worker, and new in each epoch.

The encoder is BERT's, without dropout. Per layer, on vectors x_t of all positions at once:

    x = norm(x + W_out attention(x));  x = norm(x + W_down gelu(W_up x))      norm: LayerNorm
    logits = E norm(gelu(W x)) + b                       E: the token table (tied)

ELECTRA replaces the masked tokens by draws from a small MLM, and trains an encoder to tell which
tokens are replaced: loss = MLM + 50 * binary cross-entropy, the latter over every real token.

Letters used below: B rows, T positions, M chosen tokens, V vocabulary, C = d_model, H heads,
D = C/H, E = d_embedding, P positions to fill in.

Sources: BERT: Devlin et al. 2018 (arXiv 1810.04805); RoBERTa: Liu et al. 2019 (1907.11692);
SpanBERT: Joshi et al. 2019 (1907.10529, section 3.1); ELECTRA: Clark et al. 2020 (2003.10555);
rates above 0.15: Wettig et al. 2022 (2202.08005); scoring by masking one token at a time:
Salazar et al. 2019 (1910.14659); "hf": DataCollatorForLanguageModeling of transformers 5.23.
Unlike here, BERT and that library may insert special ids, BERT's whole words are taken only while
they fit a budget of tokens (long ones too rarely), that library's are always masked, and ELECTRA
draws positions with replacement, which masks fewer than asked.

Run: `python 02_mlm.py` (CPU, 19 s on one core of an AMD EPYC (Zen 5)) prints, from seed 0,

    tiktoken: 1024 ids, and id 1024 reserved above them: Lily lost her<|mask|>
    2800 beginnings of stories, 74.8 tokens each, V = 396
    two models of one shape, 254 GFLOP each; nats per label on held-out rows
    objective    steps   labels   nats
    masked         700  167,583  1.507
    next token     596  356,712  0.608, achievable 0.491
    one blank in each of 200 held-out rows    nats   right
      masked                                1.443   62.0%
      next token, left side only            0.575   77.5%
      next token, 8 guesses reranked                87.5%
      achievable: the grammar               0.281   90.3%
    fillings by the masked model, with the grammar's probability in brackets
      ... museum. Lily held [MASK] yellow drum tight, but somewhere along ...
        her 38% (100%)  held 23% (0%)  his 19% (0%)  took 2% (0%); all 1 possible: 38% (100%)
      ... held her yellow [MASK] tight, but somewhere along the way ...
        tight 7% (0%)  silver 4% (0%)  red 4% (0%)  shiny 4% (0%); all 24 possible: 53% (100%)
      ... along the way [MASK] was lost. She looked in every ...
        it 67% (100%)  way 15% (0%)  was 14% (0%)  lost 1% (0%); all 1 possible: 67% (100%)
    ok: no loss is below what the grammar allows, and most blanks are filled right
"""

from __future__ import annotations

import difflib
import importlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

loss = importlib.import_module("01_loss")
require, cross_entropy = loss.require, loss.cross_entropy
binary_cross_entropy_with_logits = loss.binary_cross_entropy_with_logits

IGNORE = -100  # the label of a token that is not to be predicted: cross_entropy's ignore_index

# 1. Masking: which tokens are chosen, and what stands in their place


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The ids, as far as masking has to know them."""

    size: int  # V, the rows of the embedding; the mask id and every special id are among them
    mask_id: int
    special_ids: tuple[int, ...] = ()  # never chosen and never inserted
    pad_id: int | None = None  # nor is padding; it is not counted in a row's length either
    word_starts: Sequence[bool] | None = None  # (V,) whether an id begins a word; None: each does
    ordinary: np.ndarray = field(init=False, repr=False)  # (V,) bool: neither special nor padding

    def __post_init__(self):
        special = {self.mask_id, *self.special_ids} | ({self.pad_id} - {None})
        for i in special:
            wanted = f"in [0, {self.size - 1}], a row of the embedding; to reserve an id, add a row"
            require(0 <= i < self.size, "mask_id" if i == self.mask_id else "special id", i, wanted)
        require(self.mask_id != self.pad_id, "mask_id", self.mask_id, "another id than pad_id")
        require(len(special) < self.size, "size", self.size, f"above {len(special)}, all special")
        starts = np.ones(self.size) if self.word_starts is None else self.word_starts
        require(len(starts) == self.size, "len(word_starts)", len(starts), f"size = {self.size}")
        ordinary = np.ones(self.size, dtype=bool)
        ordinary[list(special)] = False
        object.__setattr__(self, "word_starts", np.asarray(starts, dtype=bool))
        object.__setattr__(self, "ordinary", ordinary)


@dataclass(frozen=True)
class Scheme:
    """What is chosen of a row of n tokens, and what becomes of it."""

    unit: str = "token"  # chosen, and replaced, as a whole: "token", "word", "span" of words
    # how many of n units: "nearest" is max(1, round(rate n)), "random" floor(rate n + U), "ceil"
    # ceil(rate n); with "bernoulli" each is drawn by itself
    count: str = "nearest"
    rate: float = 0.15
    mask_share: float = 0.8  # of the chosen become the mask id,
    random_share: float = 0.1  # a random ordinary id; the rest stays as it is
    at_least_one: bool = False  # a row without a label gets one, if it has a candidate
    cap: int | None = None  # the most units chosen of a row (BERT: 20), but for at_least_one

    def __post_init__(self):
        for name, wanted in (
            ("unit", ("token", "word", "span")),
            ("count", ("nearest", "random", "ceil", "bernoulli")),
        ):
            require(getattr(self, name) in wanted, name, getattr(self, name), f"one of {wanted}")
        for name in ("rate", "mask_share", "random_share"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")
        total = self.mask_share + self.random_share
        require(total < 1 + 1e-9, "mask_share + random_share", total, "at most 1")
        require(self.cap is None or self.cap >= 0, "cap", self.cap, "None or >= 0")
        if self.count == "bernoulli":
            require(self.unit == "token", "unit", self.unit, "'token' where count='bernoulli'")
            require(self.cap is None, "cap", self.cap, "None where count='bernoulli'")


SCHEMES = {
    "bert": Scheme(),
    "roberta": Scheme(count="random"),
    "whole-word": Scheme("word", "random"),
    "span": Scheme("span", "ceil"),
    "electra": Scheme(mask_share=0.85, random_share=0.0),
    "hf": Scheme(count="bernoulli"),
}

# P(a span has l words), l = 1..10: geometric with p = 0.2, cut off and renormalised (SpanBERT)
SPAN_LENGTHS = 0.2 * 0.8 ** np.arange(10)
SPAN_LENGTHS /= SPAN_LENGTHS.sum()


def number_words(candidate: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Which word each position belongs to, counted from 0; -1 where there is no candidate: (T,).

    Args: candidate, starts (T,) bool. What follows a non-candidate begins a word in any case.
    """
    begins = candidate & (starts | ~np.concatenate(([False], candidate[:-1])))
    return np.where(candidate, np.cumsum(begins) - 1, -1)


def choose_spans(word: np.ndarray, budget: int, rng: np.random.Generator) -> np.ndarray:
    """Spans of whole words that cover exactly `budget` positions of word (T,) int: (T,) bool.

    A span begins with the word at a random position that is still free, and ends after as many
    words as drawn, before a position that is no candidate, or where the budget is spent.
    """
    chosen = np.zeros(len(word), dtype=bool)
    while budget > 0:
        at = rng.choice(np.flatnonzero((word >= 0) & ~chosen))
        end_word = word[at] + 1 + rng.choice(len(SPAN_LENGTHS), p=SPAN_LENGTHS)
        while at > 0 and word[at - 1] == word[at]:  # back to where the word begins
            at -= 1
        while budget > 0 and at < len(word) and 0 <= word[at] < end_word:
            budget -= not chosen[at]
            chosen[at] = True
            at += 1
    return chosen


def mask_row(
    row: np.ndarray, scheme: Scheme, vocabulary: Vocabulary, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """inputs and labels (T,) int64 of one row (T,)."""
    candidate = vocabulary.ordinary[row]  # (T,)
    starts = candidate if scheme.unit == "token" else vocabulary.word_starts[row]  # (T,)
    word = number_words(candidate, starts)  # (T,)
    n_words = word.max(initial=-1) + 1
    n = n_words if scheme.unit == "word" else np.count_nonzero(row != vocabulary.pad_id)
    wanted, u = scheme.rate * n, rng.random()
    if scheme.count == "nearest":
        k = max(1, round(wanted))
    else:
        k = math.ceil(wanted) if scheme.count == "ceil" else math.floor(wanted + u)
    k = k if scheme.cap is None else min(k, scheme.cap)
    k = max(k, int(scheme.at_least_one))

    if scheme.unit == "span":
        chosen = choose_spans(word, min(k, np.count_nonzero(candidate)), rng)
        group = np.cumsum(chosen & ~np.concatenate(([False], chosen[:-1])))  # spans that meet: one
    else:
        chosen = np.isin(word, rng.permutation(n_words)[:k])  # all of them if k exceeds n_words
        group = word
    # (T,) decided once for a group; as many draws as groups, however long the row is padded
    fate = rng.random(group.max(initial=-1) + 2)[group]
    masked = chosen & (fate < scheme.mask_share)
    swapped = chosen & ~masked & (fate < scheme.mask_share + scheme.random_share)
    inputs = np.where(masked, vocabulary.mask_id, row)
    inputs[swapped] = rng.choice(np.flatnonzero(vocabulary.ordinary), np.count_nonzero(swapped))
    return inputs, np.where(chosen, row, IGNORE)


def mask_batch(
    ids: Tensor, scheme: Scheme, vocabulary: Vocabulary, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """inputs and labels of ids, by the draws of DataCollatorForLanguageModeling in their order."""

    def bernoulli(p: Tensor | float) -> Tensor:
        return torch.bernoulli(torch.zeros(ids.shape) + p, generator=generator).bool()

    ordinary = torch.from_numpy(vocabulary.ordinary)
    candidate = ordinary[ids]
    chosen = bernoulli(scheme.rate * candidate)
    masked = bernoulli(scheme.mask_share) & chosen
    inputs = ids.masked_fill(masked, vocabulary.mask_id)
    if scheme.mask_share < 1 and scheme.random_share > 0:
        # the share among those not masked: 0.1 / (1 - 0.8) = 0.5
        swapped = bernoulli(scheme.random_share / (1 - scheme.mask_share)) & chosen & ~masked
        drawn = torch.randint(vocabulary.size, ids.shape, generator=generator)
        # the library inserts whatever it drew; here a special id leaves the token as it is
        inputs = torch.where(swapped & ordinary[drawn], drawn, inputs)
    if scheme.at_least_one and ids.numel():
        draw = torch.rand(ids.shape, generator=generator).masked_fill(~candidate, -1)
        drawn = F.one_hot(draw.argmax(-1), ids.shape[-1]).bool() & candidate
        lacking = drawn & ~chosen.any(-1, keepdim=True)
        inputs, chosen = inputs.masked_fill(lacking, vocabulary.mask_id), chosen | lacking
    return inputs, ids.masked_fill(~chosen, IGNORE)


def mask_tokens(
    ids: Tensor,
    scheme: str,
    vocabulary: Vocabulary,
    *,
    index: int | Sequence[int] | Tensor | None = None,
    seed: int = 0,
    epoch: int = 0,
    generator: torch.Generator | None = None,
    **changes,
) -> tuple[Tensor, Tensor]:
    """What the encoder reads and what it has to predict: inputs and labels, both of ids' shape.

    Args:
        ids (T,) or (B, T) int64; stays as it is.
        scheme: "bert", "roberta", "whole-word", "span", "electra" or "hf": a row of SCHEMES.
        index: the row's number in the data set; for (B, T) one for each row. A row's mask depends
            on (seed, epoch, index) and the row, and on nothing else: not on the batch it is in,
            not on who draws it. A new epoch brings new masks; BERT's static ones are
            epoch=e % 10.
        generator: for "hf" only, whose draws run through the batch, in the place of those three.
        changes: fields of `Scheme` by name, such as rate=0.3, cap=20, at_least_one=True, or
            count="nearest" for exact counts.
    Returns: inputs; labels, which are -100 for what was not chosen.
    Raises: ValueError for what is out of its range, and for ids that hold the mask id already.
    """
    near = difflib.get_close_matches(scheme, SCHEMES, n=1, cutoff=0)
    require(scheme in SCHEMES, "scheme", scheme, f"of {tuple(SCHEMES)}; the nearest is {near[0]!r}")
    plan = replace(SCHEMES[scheme], **changes)
    require(ids.dtype == torch.int64, "ids.dtype", ids.dtype, "torch.int64")
    require(ids.ndim in (1, 2), "ids.shape", tuple(ids.shape), "(T,) or (B, T)")
    device, ids = ids.device, ids.cpu()
    strange = ids[(ids < 0) | (ids >= vocabulary.size) | (ids == vocabulary.mask_id)]
    wanted = f"in [0, {vocabulary.size - 1}] and not masked yet (mask_id={vocabulary.mask_id})"
    require(len(strange) == 0, "ids", strange[:1].tolist(), wanted)
    if plan.count == "bernoulli":
        require(generator is not None, "generator", None, "a torch.Generator for scheme 'hf'")
        require(index is None, "index", index, "None for 'hf', which draws from its generator")
        inputs, labels = mask_batch(ids, plan, vocabulary, generator)
        return inputs.to(device), labels.to(device)
    require(generator is None, "generator", generator, "None but for 'hf'; give seed, epoch, index")
    require(index is not None, "index", index, "the number of each row in the data set")
    rows = np.atleast_2d(ids.numpy())
    keys = np.atleast_1d(np.asarray(index)).tolist()
    require(len(keys) == len(rows), "len(index)", len(keys), f"{len(rows)}, one for each row")
    for name, value in (("seed", seed), ("epoch", epoch), ("index", min(keys, default=0))):
        require(value >= 0, name, value, ">= 0")
    inputs, labels = np.empty_like(rows), np.empty_like(rows)
    for i, key in enumerate(keys):  # default_rng hashes the three numbers
        rng = np.random.default_rng((seed, epoch, key))
        inputs[i], labels[i] = mask_row(rows[i], plan, vocabulary, rng)
    inputs, labels = (torch.from_numpy(x).reshape(ids.shape) for x in (inputs, labels))
    return inputs.to(device), labels.to(device)


# 2. The encoder, BERT's, and its two heads


@dataclass(frozen=True)
class EncoderConfig:
    vocab_size: int = 30522  # V; the defaults are BERT-base
    seq_len: int = 512  # longest row
    n_layer: int = 12
    n_head: int = 12  # H heads of D = d_model / n_head
    d_model: int = 768  # C
    d_mlp: int = 3072  # M
    d_embedding: int | None = None  # E, the width of the tables; None: C. See Electra
    causal: bool = False  # each position sees only what is left of it: for the comparison
    norm_eps: float = 1e-12  # BERT's; in float32 it only says that 0/0 is 0

    def __post_init__(self):
        if self.d_embedding is None:
            object.__setattr__(self, "d_embedding", self.d_model)
        for name in ("vocab_size", "seq_len", "n_layer", "n_head", "d_model", "d_mlp"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        wanted = f"a multiple of n_head={self.n_head}"
        require(self.d_model % self.n_head == 0, "d_model", self.d_model, wanted)


class Embedding(nn.Module):
    """The sum of a token's and its position's vector, normalised.

    BERT also adds one of two vectors that tell sentence A from B. With one segment that is a
    constant, and the position table has it in it.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.token = nn.Embedding(config.vocab_size, config.d_embedding)
        self.position = nn.Embedding(config.seq_len, config.d_embedding)
        self.norm = nn.LayerNorm(config.d_embedding, config.norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        T, longest = ids.shape[1], self.position.num_embeddings
        require(T <= longest, "T", T, f"at most seq_len={longest}; cut the rows")
        return self.norm(self.token(ids) + self.position.weight[:T])  # (B, T, E)


class Layer(nn.Module):
    """Attention, then an MLP; each adds to its input, and the sum is normalised (post-norm)."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        C, M = config.d_model, config.d_mlp
        self.n_head = config.n_head
        self.qkv = nn.Linear(C, 3 * C)
        self.out = nn.Linear(C, C)
        self.attention_norm = nn.LayerNorm(C, config.norm_eps)
        self.up, self.down = nn.Linear(C, M), nn.Linear(M, C)
        self.mlp_norm = nn.LayerNorm(C, config.norm_eps)

    def forward(self, x: Tensor, visible: Tensor | None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.n_head, -1))  # (B, T, 3, H, D)
        q, k, v = qkv.transpose(1, 3).unbind(2)  # (B, H, T, D) each
        y = F.scaled_dot_product_attention(q, k, v, visible)  # softmax(q k^T / sqrt(D)) v
        x = self.attention_norm(x + self.out(y.transpose(1, 2).flatten(2)))  # (B, T, C)
        return self.mlp_norm(x + self.down(F.gelu(self.up(x))))  # (B, T, C)


class Encoder(nn.Module):
    """Ids in, one vector for each token out, which knows the whole row (causal: what is left)."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        same = config.d_embedding == config.d_model
        self.widen = nn.Identity() if same else nn.Linear(config.d_embedding, config.d_model)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layer))

    def forward(self, ids: Tensor, real: Tensor | None = None) -> Tensor:
        """(B, T, C) for ids (B, T) int64; real (B, T) bool is False for padding, None: no padding.

        What comes out at padding means nothing; nobody else looks there.
        """
        good = real is None or real.dtype == torch.bool  # numbers would be added to the scores
        require(good, "real.dtype", None if real is None else real.dtype, "torch.bool")
        visible = None if real is None else real[:, None, None, :]  # (B, 1, 1, T), for every query
        if self.config.causal:
            T = ids.shape[1]
            left = torch.ones(T, T, dtype=torch.bool, device=ids.device).tril()
            visible = left if visible is None else left & visible  # (T, T) or (B, 1, T, T)
        x = self.widen(self.embedding(ids))  # (B, T, C)
        for layer in self.layers:
            x = layer(x, visible)
        return x


def initialize(model: nn.Module) -> None:
    """Weights normal with std 0.5 / sqrt(width), at width 768 BERT's 0.02; biases 0."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.5 / math.sqrt(module.weight.shape[1]))
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


class MaskedLM(nn.Module):
    """Encoder and the head that names tokens: its last matrix is the token table (tied)."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.encoder = Encoder(config)
        self.transform = nn.Linear(config.d_model, config.d_embedding)
        self.norm = nn.LayerNorm(config.d_embedding, config.norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        initialize(self)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) for hidden (..., C)."""
        x = self.norm(F.gelu(self.transform(hidden)))  # (..., E)
        return F.linear(x, self.encoder.embedding.token.weight, self.bias)

    def forward(self, ids: Tensor, real: Tensor | None = None) -> Tensor:
        """Logits (B, T, V)."""
        return self.head(self.encoder(ids, real))


def masked_lm_loss(
    model: MaskedLM, inputs: Tensor, labels: Tensor, real: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy in nats of the tokens that have a label; 0, with gradient 0, for none.

    Args: inputs, labels (B, T) of `mask_tokens`; real (B, T) bool, False for padding. The head
    works on those tokens only: at rate 0.15 that is a seventh of its cost.
    """
    chosen = labels != IGNORE  # (B, T), M of them True
    logits = model.head(model.encoder(inputs, real)[chosen])  # (M, V)
    return cross_entropy(logits, labels[chosen])


def grow_vocabulary(model: MaskedLM, vocab_size: int) -> None:
    """Appends rows to the token table, and zeros to the head's bias, in place.

    New rows are drawn as at the start. For a model that has to learn an id it was built without,
    such as a mask id reserved later; make the optimiser after this, since the parameters are new.
    """
    old = model.encoder.embedding.token.weight.detach()
    more = vocab_size - len(old)
    require(more >= 0, "vocab_size", vocab_size, f"at least the present {len(old)}")
    std = 0.5 / math.sqrt(old.shape[1])  # as in `initialize`
    rows = torch.cat((old, std * torch.randn(more, old.shape[1]).to(old)))
    model.encoder.embedding.token = nn.Embedding.from_pretrained(rows, freeze=False)
    model.bias = nn.Parameter(F.pad(model.bias.detach(), (0, more)))
    model.encoder.config = replace(model.encoder.config, vocab_size=vocab_size)


def with_mask_token(encoding):
    """The tiktoken.Encoding with one more id, its old n_vocab, for "<|mask|>": (encoding, id).

    All other ids stay. `encode_ordinary` never returns the new id, whatever the text, and decode
    prints it as <|mask|>. The model needs n_vocab + 1 rows, or `grow_vocabulary`.
    """
    mask_id = encoding.n_vocab  # ids below it may be taken; gaps are not looked for
    larger = type(encoding)(
        name=f"{encoding.name}-mask",
        pat_str=encoding._pat_str,  # tiktoken documents no other way to extend an encoding
        mergeable_ranks=encoding._mergeable_ranks,
        special_tokens={**encoding._special_tokens, "<|mask|>": mask_id},
    )
    return larger, mask_id


# 3. Filling in, and scoring a text


@torch.no_grad()
def fill_in(model: MaskedLM, ids: Tensor, positions: Tensor, mask_id: int) -> Tensor:
    """ln p(token | all the rest of the row), a row for each position masked by itself: (P, V).

    Args: ids (T,), positions (P,), both int64. Takes P forward passes, in batches of 32.
    """
    results = []
    for part in positions.split(32):
        rows = ids.repeat(len(part), 1)  # (p, T)
        rows[torch.arange(len(part)), part] = mask_id
        hidden = model.encoder(rows)[torch.arange(len(part)), part]  # (p, C)
        results.append(loss.log_softmax(model.head(hidden)))
    return torch.cat(results)


def pseudo_perplexity(model: MaskedLM, ids: Tensor, positions: Tensor, mask_id: int) -> float:
    """exp of the mean -ln p of the tokens at positions (P,) of ids (T,), each masked by itself.

    Not a perplexity: these conditionals need not be those of any distribution over rows, and each
    sees its right side too. It ranks texts under one model.
    """
    require(len(positions) > 0, "positions", positions, "at least one: nothing has no perplexity")
    log_p = fill_in(model, ids, positions, mask_id)
    return loss.perplexity(cross_entropy(log_p, ids[positions]).item())


# 4. ELECTRA: find the tokens that a small generator has replaced


class Electra(nn.Module):
    """A small masked LM and an encoder that tells its guesses from the real tokens.

    They share the embedding, which has the discriminator's width; a generator of another width
    has a matrix behind it. After pretraining the generator is thrown away.
    """

    def __init__(self, discriminator: EncoderConfig, generator: EncoderConfig):
        super().__init__()
        for name in ("vocab_size", "seq_len", "d_embedding"):
            ours, wanted = getattr(generator, name), getattr(discriminator, name)
            require(ours == wanted, f"generator.{name}", ours, f"the discriminator's, {wanted}")
        self.generator = MaskedLM(generator)
        self.discriminator = Encoder(discriminator)
        self.transform = nn.Linear(discriminator.d_model, discriminator.d_model)
        self.verdict = nn.Linear(discriminator.d_model, 1)
        initialize(self)
        self.discriminator.embedding = self.generator.encoder.embedding

    def suspect(self, ids: Tensor, real: Tensor | None = None) -> Tensor:
        """Logits (B, T): above 0 where a token is rather replaced than original."""
        hidden = self.discriminator(ids, real)  # (B, T, C)
        return self.verdict(F.gelu(self.transform(hidden))).squeeze(-1)


class ElectraStep(NamedTuple):
    loss: Tensor  # mlm + weight * detection
    mlm: Tensor  # nats per masked token
    detection: Tensor  # nats per real token
    corrupted: Tensor  # (B, T) what the discriminator read
    logits: Tensor  # (B, T) its verdicts


def electra_loss(
    model: Electra,
    ids: Tensor,
    inputs: Tensor,
    labels: Tensor,
    real: Tensor | None = None,
    generator: torch.Generator | None = None,
    weight: float = 50.0,
) -> ElectraStep:
    """The generator's loss plus weight times the discriminator's; no gradient flows between them.

    Args:
        ids (B, T), with the inputs and labels that `mask_tokens` made of it.
        real (B, T) bool: False for padding, which is not judged.
        generator: randomness of the sampling, on ids' device; None: torch's own.
        weight: 50, ELECTRA's: a verdict costs tenths of a nat, a guess several nats.
    A guess that hits the original is labelled original.
    """
    chosen = labels != IGNORE  # (B, T), M of them True
    logits = model.generator.head(model.generator.encoder(inputs, real)[chosen])  # (M, V)
    mlm = cross_entropy(logits, labels[chosen])
    # Gumbel's trick: the argmax of logits - ln(E), E exponential, is a draw from softmax(logits)
    noise = torch.empty_like(logits, requires_grad=False).exponential_(generator=generator)
    corrupted = ids.clone()
    corrupted[chosen] = (logits.detach() - noise.log()).argmax(-1)
    verdicts = model.suspect(corrupted, real)  # (B, T)
    judged = torch.ones_like(chosen) if real is None else real
    replaced = (corrupted != ids)[judged].to(verdicts.dtype)
    detection = binary_cross_entropy_with_logits(verdicts[judged], replaced)
    return ElectraStep(mlm + weight * detection, mlm, detection, corrupted, verdicts)


# 5. The demo: stories whose grammar knows the right answer


def fillings(stories, parts: tuple, left: str, right: str, tokens: list[str]) -> dict[str, float]:
    """p(token | left, right), exactly, for each token that makes left + token + right a text.

    Args: parts of an alternative of `stories.RULES`, whose texts are meant; tokens to try.
    Reads by the rules as `stories.parse` does, but all the tokens at once: what stands in the gap
    is decided when the reading comes to it.
    """
    found = {}
    start = None
    for part in reversed(parts):
        start = (part, start)
    states = [(None, 0, {}, 0.0, start)]  # token, place, memory, ln p, linked list of what comes
    while states:
        token, at, memory, log_p, todo = states.pop()
        text = left + (token or "") + right
        if todo is None:
            if token is not None and at == len(text):
                found[token] = math.exp(log_p)
            continue
        part, todo = todo
        if isinstance(part, tuple):  # a variable and where its text began
            states.append((token, at, {**memory, part[0]: text[part[1] : at]}, log_p, todo))
        elif isinstance(part, stories.Expand):
            alternatives = stories.RULES[part.name(memory)]
            todo = todo if part.variable is None else ((part.variable, at), todo)
            for parts in alternatives:
                after = todo
                for new in reversed(parts):
                    after = (new, after)
                states.append((token, at, memory, log_p - math.log(len(alternatives)), after))
        else:
            wanted = part if isinstance(part, str) else part.text(memory)
            end = at + len(wanted)
            if token is None and end > len(left):
                if wanted.startswith(left[at:]):
                    rest = wanted[len(left) - at :]
                    fit = [t for t in tokens if (t + right).startswith(rest)]
                    states += [(t, end, memory, log_p, todo) for t in fit]
            elif text.startswith(wanted, at):
                states.append((token, end, memory, log_p, todo))
    total = sum(found.values())
    return {token: p / total for token, p in found.items()}


# Words and signs, with the space before them: joined, they are the text again.
TOKEN = re.compile(r" ?[A-Za-z]+(?:-[A-Za-z]+)*| ?[^\sA-Za-z]|\n\n")
# Phrases of the rule "search": only stories of something lost and found have one
SEARCHED = re.compile("only crumbs|No luck|began to cry|twice, but")
PAD, MASK, BEGIN, FIRST_WORD = range(4)  # the ids, words from 3 on
RATE = 0.4  # of tokens masked, as Wettig et al.: a step has more labels than at 0.15
STEPS = 700
HELD_OUT = 200


def beginnings(stories, count: int) -> list[list[str]]:
    """The first two paragraphs, in tokens, of `count` stories of something lost."""
    texts = []
    for story, _ in stories.corpus(6 * count, seed=0):  # a fifth of all stories are such
        if SEARCHED.search(story):
            texts.append(TOKEN.findall("\n\n".join(story.split("\n\n")[:2])))
    return texts[:count]


def flops_per_token(config: EncoderConfig, T: int, labelled: float) -> float:
    """Of forward and backward, where the head works on a share `labelled` of the tokens.

    6 per weight in a matrix product, 12 T C per layer for attention.
    """
    C, V = config.d_model, config.vocab_size
    layers = config.n_layer * (6 * (4 * C * C + 2 * C * config.d_mlp) + 12 * T * C)
    return layers + labelled * 6 * (C * C + C * V)


def next_token_loss(model: MaskedLM, ids: Tensor) -> Tensor:
    """Mean nats per token of ids (B, T) but its first; model must be causal."""
    targets = ids[:, 1:].masked_fill(ids[:, 1:] == PAD, IGNORE)
    return cross_entropy(model(ids[:, :-1]), targets)


def pretrain(model: MaskedLM, ids: Tensor, vocabulary: Vocabulary, steps: int) -> None:
    """Trains on rows of ids (N, T), 8 a step: masked, or if the model is causal the next token."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        epoch, first = divmod(8 * step, len(ids))
        index = torch.arange(first, first + 8)
        batch = ids[index]
        batch = batch[:, : (batch != PAD).sum(1).max()]  # (8, T) without columns of padding only
        if model.encoder.config.causal:
            value = next_token_loss(model, batch)
        else:
            pair = mask_tokens(batch, "roberta", vocabulary, index=index, epoch=epoch, rate=RATE)
            value = masked_lm_loss(model, *pair, batch != PAD)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 6e-3 * min((step + 1) / 30, 1 - step / steps)
        optimizer.step()


class Blank(NamedTuple):
    """A row with one token to fill in, and what the grammar says about it."""

    row: Tensor  # (T,) ids, no padding
    position: int
    posterior: Tensor  # (V,) p(token | the rest of the row)


def make_blank(stories, text: list[str], at: int, number: dict[str, int]) -> Blank:
    """The blank at token `at` of a beginning; number gives each token's id."""
    parts = stories.RULES["story"][0]  # of something lost and found
    parts = parts[: 1 + parts.index(stories.Expand("search", None, None))]
    posterior = torch.zeros(FIRST_WORD + len(number))
    left, right = "".join(text[:at]), "".join(text[at + 1 :])
    for token, p in fillings(stories, parts, left, right, list(number)).items():
        posterior[number[token]] = p
    return Blank(torch.tensor([BEGIN, *(number[t] for t in text)]), at + 1, posterior)


@torch.no_grad()
def fill_from_left(model: MaskedLM, blank: Blank, candidates: int) -> tuple[float, int]:
    """A causal model's -ln p(answer | left side), and its guess.

    With more than one candidate the guess sees both sides: it is the one of the likeliest that
    makes the whole row likeliest.
    """
    row, position, _ = blank
    log_p = loss.log_softmax(model(row[None, :position])[0, -1])  # (V,)
    guesses = log_p.topk(candidates).indices
    rows = row.repeat(candidates, 1)
    rows[:, position] = guesses
    losses = cross_entropy(model(rows[:, :-1]), rows[:, 1:], reduction="none").sum(-1)
    return -log_p[row[position]].item(), guesses[losses.argmin()].item()


def print_fills(model: MaskedLM, blank: Blank, tokens: list[str]) -> None:
    """The words around a blank, and the model's four best fillings beside the grammar's p."""
    row, at, posterior = blank
    words = ["", "", "", *tokens]
    left, right = ("".join(words[i] for i in part) for part in (row[:at], row[at + 1 :]))
    p = fill_in(model, row, torch.tensor([at]), MASK)[0].exp()
    best = [f"{words[i].strip()} {p[i]:.0%} ({posterior[i]:.0%})" for i in p.topk(4).indices]
    possible = posterior > 0
    around = [*left.split()[-3:], "[MASK]", *right.split()[:6]]
    print(f"  ... {' '.join(around)} ...")
    print(f"    {'  '.join(best)}; all {possible.sum()} possible: {p[possible].sum():.0%} (100%)")


def score(
    stories, masked: MaskedLM, causal: MaskedLM, texts: list[list[str]], number: dict[str, int]
) -> dict[str, np.ndarray]:
    """Mean nats and share of right fillings, by who fills in one random blank in each text."""
    rng = np.random.default_rng(0)
    results = {name: [] for name in ("masked", "from the left", "reranked", "grammar")}
    for text in texts:
        blank = make_blank(stories, text, int(rng.integers(len(text))), number)
        answer = blank.row[blank.position].item()
        log_p = fill_in(masked, blank.row, torch.tensor([blank.position]), MASK)[0]
        results["masked"].append((-log_p[answer].item(), log_p.argmax() == answer))
        nats, guess = fill_from_left(causal, blank, 1)
        results["from the left"].append((nats, guess == answer))
        results["reranked"].append((math.nan, fill_from_left(causal, blank, 8)[1] == answer))
        # of several possible answers the likeliest is right as often as it is likely
        p = blank.posterior
        results["grammar"].append((-p[answer].log().item(), p.max().item()))
    return {name: np.mean(pairs, axis=0) for name, pairs in results.items()}


def demo() -> None:
    stories, bpe = (importlib.import_module(f"data.{name}") for name in ("stories", "bpe"))
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the matrices are small
    encoding = bpe.train((story for story, _ in stories.corpus(200, seed=0)), 1024).encoding()
    larger, mask_id = with_mask_token(encoding)
    hidden = larger.decode([*larger.encode_ordinary("Lily lost her"), mask_id])
    print(f"tiktoken: {encoding.n_vocab} ids, and id {mask_id} reserved above them: {hidden}")

    texts = beginnings(stories, 3000)
    tokens = sorted({token for text in texts for token in text})
    number = {token: FIRST_WORD + i for i, token in enumerate(tokens)}
    rows = [torch.tensor([BEGIN, *(number[t] for t in text)]) for text in texts]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)  # (N, T)
    V, T, mean_tokens = FIRST_WORD + len(tokens), ids.shape[1], sum(map(len, texts)) / len(texts)
    train, held_out, blanked = ids[:-HELD_OUT], ids[-HELD_OUT:], texts[-HELD_OUT:]
    print(f"{len(train)} beginnings of stories, {mean_tokens:.1f} tokens each, V = {V}")

    config = EncoderConfig(V, T, n_layer=2, n_head=4, d_model=64, d_mlp=128)
    masked, causal = MaskedLM(config), MaskedLM(replace(config, causal=True))
    cost = {share: flops_per_token(config, T, share) for share in (RATE, 1.0)}
    steps = round(STEPS * cost[RATE] / cost[1.0])  # the same compute
    vocabulary = Vocabulary(V, MASK, (BEGIN,), PAD)
    pretrain(masked, train, vocabulary, STEPS)
    pretrain(causal, train, vocabulary, steps)

    compute = STEPS * 8 * mean_tokens * cost[RATE] / 1e9
    print(f"two models of one shape, {compute:.0f} GFLOP each; nats per label on held-out rows")
    print("objective    steps   labels   nats")
    pair = mask_tokens(held_out, "roberta", vocabulary, index=range(HELD_OUT), rate=RATE)
    with torch.no_grad():
        many = masked_lm_loss(masked, *pair, held_out != PAD)
        following = next_token_loss(causal, held_out)
    labels = [round(n * 8 * mean_tokens * share) for n, share in ((STEPS, RATE), (steps, 1.0))]
    print(f"masked {STEPS:11d} {labels[0]:8,d} {many:6.3f}")
    floor = sum(map(stories.entropy, ("opening", "setting", "lose", "search"))) / mean_tokens
    print(f"next token {steps:7d} {labels[1]:8,d} {following:6.3f}, achievable {floor:.3f}")

    results = score(stories, masked, causal, blanked, number)
    print(f"one blank in each of {HELD_OUT} held-out rows    nats   right")
    for name, label in (
        ("masked", "masked"),
        ("from the left", "next token, left side only"),
        ("reranked", "next token, 8 guesses reranked"),
        ("grammar", "achievable: the grammar"),
    ):
        nats, right = results[name]
        print(f"  {label:35}{'' if math.isnan(nats) else f'{nats:.3f}':>8}{right:8.1%}")

    print("fillings by the masked model, with the grammar's probability in brackets")
    text = next(text for text in blanked if "Lily held her" in "".join(text))
    for at in (text.index(" held") + 1, text.index(" tight") - 1, text.index(" tight") + 7):
        print_fills(masked, make_blank(stories, text, at, number), tokens)

    nats, right = results["masked"]
    if not (nats > results["grammar"][0] and following > floor and right > 0.5):
        raise SystemExit("FAILED: wanted losses above the grammar's, and most blanks filled right")
    print("ok: no loss is below what the grammar allows, and most blanks are filled right")


if __name__ == "__main__":
    demo()
