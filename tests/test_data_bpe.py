"""Tests of data/bpe.py: against brute force, Hugging Face tokenizers and merges replayed by hand.

Run: python -m pytest tests/test_data_bpe.py
"""

import dataclasses
import json
import random
import re
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data import bpe

SCRIPT = Path(bpe.__file__)
# characters whose class is the same in every version of Unicode that the three engines know
LETTERS = st.characters(max_codepoint=0x24F) | st.sampled_from(
    "ßЖщ中文字日本語あア한글กिُé́ ٣½Ⅷ。—“”🙂👩‍🚀\u200b\u3000\ufeff"
)
FEW = st.text("ab '\n", max_size=40)  # few letters: many ties and overlaps


def pseudo_stories(count, seed=0):
    """Made-up words in the proportions of a natural language, with all that can stand between."""
    rng = random.Random(seed)
    syllables = "ka to mi ré ßu lo an er ing th ou ō ж ли 中 文 qu st".split()
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(800)]
    weights = [1 / rank for rank in range(1, 801)]
    ends = [" "] * 20 + [", ", ". ", '."\n\n', "! ", "'s ", "'LL ", " 12345 ", "\n", "   ", " 🙂 "]
    for _ in range(count):
        chosen = rng.choices(words, weights, k=rng.randint(5, 120))
        yield "".join(word + rng.choice(ends) for word in chosen).strip()


def cut(text):
    """The pieces of a text, each as a string with one character per byte: chr(id)."""
    return ["".join(map(chr, piece.encode())) for piece in regex.findall(bpe.PATTERN, text)]


def brute_force_merges(stories, most):
    """Merges learnt by counting all pairs anew for each; str.replace goes left to right."""
    pieces, merges = [piece for story in stories for piece in cut(story)], []
    while len(merges) < most:
        counts = Counter(pair for piece in pieces for pair in zip(piece, piece[1:]))
        best = min(counts, key=lambda pair: (-counts[pair], pair), default=None)
        if best is None or counts[best] < 2:
            break
        new = chr(256 + len(merges))
        pieces = [piece.replace("".join(best), new) for piece in pieces]
        merges.append((ord(best[0]), ord(best[1])))
    return tuple(merges)


def replay(text, vocabulary):
    """The ids of a text by applying each merge in order to each piece."""
    ids = []
    for piece in cut(text):
        for i, (a, b) in enumerate(vocabulary.merges):
            piece = piece.replace(chr(a) + chr(b), chr(256 + i))
        ids += map(ord, piece)
    return ids


@pytest.fixture(scope="module")
def vocabulary():
    return bpe.train(pseudo_stories(300), 700)


# training


@settings(max_examples=150, deadline=None)
@given(st.lists(FEW | st.text(LETTERS, max_size=30), max_size=5), st.integers(257, 280))
@example(["aaaaaaa aaaa aaaaa"], 270)
@example(["ab ba ab ba", "bb aa"], 280)
def test_train_matches_brute_force(stories, vocab_size):
    assert bpe.train(stories, vocab_size).merges == brute_force_merges(stories, vocab_size - 257)


def test_train_matches_brute_force_on_many_words():
    stories = list(pseudo_stories(30))
    assert bpe.train(stories, 557).merges == brute_force_merges(stories, 300)


@pytest.mark.parametrize("size", [900, 4096])  # 4096: until no pair occurs twice
def test_train_matches_huggingface(size):
    tokenizers = pytest.importorskip("tokenizers")
    pre, models = tokenizers.pre_tokenizers, tokenizers.models
    stories = list(pseudo_stories(400))
    vocabulary = bpe.train(stories, size + 1)

    # ByteLevel writes each byte as a printable character: itself, or the next free one from 256 on
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = {byte: chr(byte) for byte in visible}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(hidden)}

    def as_letters(token):
        return "".join(letters[byte] for byte in token)

    split = pre.Split(tokenizers.Regex(bpe.PATTERN), behavior="isolated")
    pieces = pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    theirs = tokenizers.Tokenizer(models.BPE())
    theirs.pre_tokenizer = pieces
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=bpe.MIN_COUNT,
        show_progress=False,
        # ties are broken by ids, and theirs would otherwise number the bytes by their letters
        special_tokens=[letters[byte] for byte in range(256)],
    )
    theirs.train_from_iterator(stories, trainer)
    model = json.loads(theirs.to_str())["model"]
    assert (vocabulary.size == size + 1) == (size == 900)
    assert {as_letters(token): i for i, token in enumerate(vocabulary.tokens)} == model["vocab"]
    ours = [[as_letters(vocabulary.tokens[i]) for i in pair] for pair in vocabulary.merges]
    assert ours == model["merges"]

    merges = [tuple(pair) for pair in model["merges"]]
    theirs = tokenizers.Tokenizer(models.BPE(model["vocab"], merges))
    theirs.pre_tokenizer = pieces
    unseen = list(pseudo_stories(100, seed=1))
    for ids, story in zip(bpe.encode(unseen, vocabulary), unseen):
        assert ids.tolist() == theirs.encode(story).ids


def test_train_gives_the_merges_found_by_hand():
    # "low" 5, " lower" 2, " newest" 6, " widest" 3: es 9, es+t 9, lo 7, lo+w 7, " n" 6, ...
    stories = ["low"] * 5 + ["- lower"] * 2 + ["- newest"] * 6 + ["- widest"] * 3
    vocabulary = bpe.train(stories, 257 + 5)
    assert vocabulary.tokens[256:] == [b"es", b"est", b"lo", b"low", b" n"]


def test_train_breaks_ties_by_smaller_ids():
    vocabulary = bpe.train(["zy", "by", "ba", "zy", "by", "ba"], 259)
    assert vocabulary.tokens[256:] == [b"ba", b"by"]


@pytest.mark.parametrize(
    ("stories", "tokens"),
    [
        (["x", "y"] * 9, []),
        (["a b a b a b"], [b" b", b" a"]),
        (["one.two.one.two"], [b".t", b"ne", b"one", b"wo", b".two"]),
        (["1234", "1234"], [b"12", b"123"]),
    ],
)
def test_train_never_merges_across_pieces_or_stories(stories, tokens):
    assert bpe.train(stories, 400).tokens[256:] == tokens


def test_train_smaller_vocabulary_is_a_prefix(vocabulary):
    assert bpe.train(pseudo_stories(300), 400).merges == vocabulary.merges[: 400 - 257]


def test_train_stops_when_no_pair_occurs_twice():
    vocabulary = bpe.train(["abc", "abc", "xyz"], 4096)
    assert vocabulary.tokens[256:] == [b"ab", b"abc"]
    assert vocabulary.size == 259 and vocabulary.end == 258
    assert bpe.train([], 4096).size == 257


def test_train_does_not_depend_on_the_order_of_stories(vocabulary):
    stories = list(pseudo_stories(300))
    random.Random(1).shuffle(stories)
    assert bpe.train(stories, 700) == vocabulary


@pytest.mark.parametrize("size", [-1, 0, 256, 65537])
def test_train_rejects_sizes_that_cannot_be(size):
    with pytest.raises(ValueError, match=rf"vocab_size={size} must be 257 to 65536"):
        bpe.train(["text"], size)


def test_train_puts_special_tokens_last():
    vocabulary = bpe.train(["aaaa aaaa"], 1000, special_tokens=("<|pad|>", bpe.END_OF_TEXT))
    assert vocabulary.end == vocabulary.size - 1
    assert vocabulary.encoding().encode_single_token("<|pad|>") == vocabulary.size - 2
    with pytest.raises(ValueError, match="must be 258 to"):
        bpe.train(["text"], 257, special_tokens=("<|pad|>", bpe.END_OF_TEXT))
    with pytest.raises(ValueError, match="must hold '<|endoftext|>'"):
        bpe.train(["text"], 300, special_tokens=("<|pad|>",))


def test_train_takes_text_without_spaces():
    rng = random.Random(0)
    dna = "".join(rng.choices("acgt", k=20_000))  # one piece; uncut, each merge would rewrite it
    assert bpe.train([dna], 500).size == 500


# bounded memory


class Story(str):
    """A string that counts how many of its kind are alive."""

    alive = most_alive = 0

    def __init__(self, *_):
        Story.alive += 1
        Story.most_alive = max(Story.alive, Story.most_alive)

    def __del__(self):
        Story.alive -= 1


def test_draw_sample_holds_no_more_than_it_may():
    Story.alive = Story.most_alive = 0
    most = 1000 * (10 + bpe.PER_STORY)
    kept = bpe.draw_sample((Story(f"{i:010d}") for i in range(50_000)), most)
    assert len(kept) == 1000 and len(set(kept)) == 1000
    assert Story.most_alive <= 1003


def test_draw_sample_is_spread_over_the_stream():
    most = 5000 * (10 + bpe.PER_STORY)
    kept = bpe.draw_sample((f"{i:010d}" for i in range(50_000)), most)
    tenths = np.bincount([int(story) // 5000 for story in kept], minlength=10)
    assert tenths.sum() == 5000
    assert np.abs(tenths - 500).max() < 4 * np.sqrt(500)
    assert kept == bpe.draw_sample((f"{i:010d}" for i in range(50_000)), most)


def test_draw_sample_keeps_all_that_fits():
    stories = list(pseudo_stories(50))
    assert sorted(bpe.draw_sample(stories)) == sorted(stories)
    assert bpe.draw_sample(["a" * 100], most=10) == ["a" * 100]  # never nothing
    assert bpe.draw_sample([]) == []
    assert bpe.draw_sample(["", "a", ""]) == ["a"]


def test_one_text_in_place_of_texts_is_refused():
    with pytest.raises(ValueError, match="iterable of texts"):
        bpe.train("hello world", 300)
    with pytest.raises(ValueError, match="iterable of texts"):
        bpe.train(["hello"], 300, special_tokens=bpe.END_OF_TEXT)
    with pytest.raises(ValueError, match="each one once"):
        bpe.train(["hello"], 300, special_tokens=(bpe.END_OF_TEXT, bpe.END_OF_TEXT))
    with pytest.raises(ValueError, match="iterable of texts"):
        next(bpe.encode("hello", bpe.Vocabulary(())))


def test_count_pieces_forgets_only_rare_pieces():
    rng = random.Random(0)
    stories = ("the cat " + "".join(rng.choices("abcdefgh", k=20)) for _ in range(20_000))
    tracemalloc.start()
    counts = bpe.count_pieces(stories, most=300)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0 < len(counts) <= 300 and peak < 200_000
    assert counts[b"the"] == counts[b" cat"] == 20_000


def test_count_pieces_cuts_long_pieces_and_loses_no_byte():
    counts = bpe.count_pieces(["é" * 1000, "b\ud800"])
    assert max(map(len, counts)) <= bpe.LONGEST_PIECE
    assert sum(len(piece) * count for piece, count in counts.items()) == 2002
    assert len(bpe.count_pieces(["".join(map(chr, range(0x4E00, 0x5E00)))], most=7)) == 7


# encoding


def test_encode_replays_the_merges(vocabulary):
    @settings(max_examples=100, deadline=None)
    @given(FEW | st.text(LETTERS, max_size=60))
    def check(text):
        (ids,) = bpe.encode([text], vocabulary)
        assert ids.dtype == np.uint16 and ids.tolist() == replay(text, vocabulary)

    check()
    for text in pseudo_stories(20, seed=2):
        assert next(bpe.encode([text], vocabulary)).tolist() == replay(text, vocabulary)


@settings(max_examples=100, deadline=None)
@given(st.text("ab", min_size=1, max_size=60), st.text("ab", max_size=60))
def test_encode_replays_merges_learnt_from_overlaps(learnt, text):
    vocabulary = bpe.train([learnt], 300)
    assert len(set(vocabulary.tokens)) == len(vocabulary.tokens)
    (ids,) = bpe.encode([text], vocabulary)
    assert ids.tolist() == replay(text, vocabulary)


def test_encode_gives_back_any_text(vocabulary):
    encoding = vocabulary.encoding()

    @settings(max_examples=150, deadline=None)
    @given(st.text())
    @example("\0")
    @example("\u2028\ufeff\U0010ffff")
    @example("e\u0301\u0301\u0301 \U0001f469\u200d\U0001f680")
    @example(bpe.END_OF_TEXT)
    def check(text):
        (ids,) = bpe.encode([text], vocabulary)
        assert encoding.decode_bytes(ids.tolist()) == text.encode()
        assert vocabulary.end not in ids

    check()


@given(st.binary())
def test_encoding_represents_any_bytes(data):
    encoding = bpe.Vocabulary(merges=((97, 98),)).encoding()
    assert encoding.decode_bytes(list(data)) == data


def test_encode_replaces_lone_surrogates(vocabulary):
    (ids,) = bpe.encode(["a\ud800b"], vocabulary)
    assert vocabulary.encoding().decode(ids.tolist()) == "a\ufffdb"


@pytest.mark.parametrize("run", [" ", "\n", "\t\u3000", "\n ", "a", "!", "1"])
def test_encode_takes_a_million_of_the_same(vocabulary, run):
    text = "x" + run * (10**6 // len(run)) + "x"
    start = time.process_time()
    (ids,) = bpe.encode([text], vocabulary)
    bpe.train([text], 260)
    assert time.process_time() - start < 5  # unbounded white space takes minutes
    assert vocabulary.encoding().decode(ids.tolist()) == text


def test_encode_reads_no_further_than_asked(vocabulary):
    stories = iter(["one", "two", "three"])
    next(bpe.encode(stories, vocabulary))
    assert list(stories) == ["two", "three"]


def test_pattern_cuts_as_cl100k():
    original = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    original += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

    @settings(max_examples=500)
    @given(st.text("aS1!' \n\r\t\u3000é", max_size=40) | st.text(max_size=40))
    def check(text):
        pieces = regex.findall(bpe.PATTERN, text)
        assert pieces == regex.findall(original, text) and "".join(pieces) == text

    check()


# the vocabulary


def test_vocabulary_counts_the_bytes_of_text(vocabulary):
    for story, ids in zip(pseudo_stories(20), bpe.encode(pseudo_stories(20), vocabulary)):
        assert sum(vocabulary.token_bytes[i] for i in ids) == len(story.encode())
    assert len(vocabulary.token_bytes) == vocabulary.size == vocabulary.encoding().n_vocab
    assert vocabulary.token_bytes[vocabulary.end] == 0
    assert vocabulary.encoding().decode([vocabulary.end]) == bpe.END_OF_TEXT


def test_vocabulary_hash_changes_with_every_field(vocabulary):
    changes = {
        "merges": vocabulary.merges[:-1],
        "special_tokens": ("<|pad|>", bpe.END_OF_TEXT),
        "pattern": vocabulary.pattern + "|x",
    }
    hashes = {dataclasses.replace(vocabulary, **{k: v}).hash for k, v in changes.items()}
    assert set(changes) == {field.name for field in dataclasses.fields(vocabulary)}
    assert len(hashes | {vocabulary.hash}) == 4
    assert re.fullmatch("[0-9a-f]{64}", vocabulary.hash)


def test_save_then_load_changes_nothing(vocabulary, tmp_path):
    vocabulary.save(tmp_path / "vocabulary.json")
    loaded = bpe.Vocabulary.load(str(tmp_path / "vocabulary.json"))
    assert loaded == vocabulary and loaded.hash == vocabulary.hash
    assert [file.name for file in tmp_path.iterdir()] == ["vocabulary.json"]


def test_save_puts_a_whole_file_in_place_of_the_old(vocabulary, tmp_path):
    bpe.Vocabulary(merges=()).save(tmp_path / "vocabulary.json")
    with open(tmp_path / "vocabulary.json") as reader:
        vocabulary.save(tmp_path / "vocabulary.json")
        assert json.load(reader)["merges"] == []  # the file that was open is still the old one


def test_save_that_fails_leaves_the_old_file(vocabulary, tmp_path, monkeypatch):
    path = tmp_path / "vocabulary.json"
    vocabulary.save(path)

    def full_disk(_):
        raise OSError("No space left on device")

    monkeypatch.setattr(bpe.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        bpe.Vocabulary(merges=()).save(path)
    assert bpe.Vocabulary.load(path) == vocabulary
    assert len(list(tmp_path.iterdir())) == 1


def test_load_notices_every_cut_and_every_changed_byte(tmp_path):
    path, vocabulary = tmp_path / "v.json", bpe.Vocabulary(((97, 98), (256, 99)), pattern=".")
    vocabulary.save(path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="v.json is damaged"):
            bpe.Vocabulary.load(path)
    for place in range(len(whole)):
        for byte in (b"7", b"\xff", b'"'):
            path.write_bytes(whole[:place] + byte + whole[place + 1 :])
            try:
                assert bpe.Vocabulary.load(path) == vocabulary
                assert whole[place : place + 1] == byte
            except ValueError as error:
                assert "\n" not in str(error) and "is damaged" in str(error)


@pytest.mark.parametrize("content", ["[]", "3", "{}", '{"merges": 3}', '{"merges": [[1]]}'])
def test_load_rejects_other_json(tmp_path, content):
    (tmp_path / "v.json").write_text(content)
    with pytest.raises(ValueError, match="v.json is damaged"):
        bpe.Vocabulary.load(tmp_path / "v.json")


def test_load_names_what_is_missing(vocabulary, tmp_path):
    with pytest.raises(FileNotFoundError):
        bpe.Vocabulary.load(tmp_path / "none.json")
    (tmp_path / "v.json").write_text(json.dumps(vocabulary.content))
    with pytest.raises(ValueError, match=r"damaged \('hash' is missing\)"):
        bpe.Vocabulary.load(tmp_path / "v.json")


# Hugging Face's form; test_interchange.py has transformers read it


def test_from_huggingface_gives_back_the_vocabulary(vocabulary, tmp_path):
    bpe.to_huggingface(vocabulary, tmp_path / "new" / "folder")
    assert bpe.from_huggingface(str(tmp_path / "new" / "folder")).hash == vocabulary.hash
    names = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert {file.name for file in (tmp_path / "new" / "folder").iterdir()} == names


@settings(max_examples=60, deadline=None)
@given(st.lists(FEW | st.text(LETTERS, max_size=30), max_size=5), st.integers(258, 300))
def test_from_huggingface_gives_back_any_trained_vocabulary(tmp_path_factory, stories, size):
    folder = tmp_path_factory.getbasetemp() / "any"
    vocabulary = bpe.train(stories, size, special_tokens=("<|pad|>", bpe.END_OF_TEXT))
    bpe.to_huggingface(vocabulary, folder)
    assert bpe.from_huggingface(folder) == vocabulary


def test_from_huggingface_reads_merges_written_as_strings(vocabulary, tmp_path):
    bpe.to_huggingface(vocabulary, tmp_path)
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    stored["model"]["merges"] = [" ".join(pair) for pair in stored["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    assert bpe.from_huggingface(tmp_path) == vocabulary


def change(stored, *keys, to):
    for key in keys[:-1]:
        stored = stored[key]
    stored[keys[-1]] = to


@pytest.mark.parametrize(
    ("keys", "value", "error"),
    [
        (["model", "type"], "WordPiece", "its model has type 'WordPiece', not 'BPE'"),
        (["model", "ignore_merges"], True, "its model has ignore_merges True, not False"),
        (["model", "unk_token"], "?", "its model has unk_token '[?]', not None"),
        (["normalizer"], {"type": "NFC"}, "its normalizer is another"),
        (["decoder"], {"type": "Metaspace"}, "its decoder is another"),
        (["pre_tokenizer", "pretokenizers", 1, "add_prefix_space"], True, "its pre_tokenizer is"),
        (["pre_tokenizer", "pretokenizers", 0, "behavior"], "Removed", "its pre_tokenizer is an"),
        (["pre_tokenizer"], {"type": "ByteLevel"}, "'pretokenizers' is missing"),
        (["added_tokens", 0, "special"], False, "added tokens that are not special"),
        (["added_tokens", 0, "content"], "<eos>", r"it has no special token <\|endoftext\|>"),
        (["added_tokens", 0, "id"], 7, "its ids are not bytes, merges in order and special"),
        (["model", "vocab", "a"], 98, "its ids are not bytes, merges in order and special"),
        (["model", "merges", 0], ["a", "none"], "'none' is missing"),
        (["model", "merges", 0], "ab", "not enough values"),
        (["model", "merges"], 7, "not iterable"),
        (["model"], None, "not subscriptable"),
    ],
)
def test_from_huggingface_says_in_one_line_what_it_cannot_represent(
    vocabulary, tmp_path, keys, value, error
):
    bpe.to_huggingface(vocabulary, tmp_path)
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    change(stored, *keys, to=value)
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=error) as raised:
        bpe.from_huggingface(tmp_path)
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)


def test_from_huggingface_refuses_merges_that_tiktoken_would_not_replay(tmp_path):
    # "abc": the merges give a, bc; tiktoken would go on to abc, which it knows as ab + c
    bpe.to_huggingface(bpe.Vocabulary(((98, 99), (97, 98), (257, 99))), tmp_path)
    with pytest.raises(ValueError, match="its merges do not make token 258 from its bytes"):
        bpe.from_huggingface(tmp_path)


def test_from_huggingface_refuses_every_cut_file(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        bpe.from_huggingface(tmp_path)
    bpe.to_huggingface(bpe.Vocabulary(((97, 98),)), tmp_path)
    whole = path.read_text().rstrip()
    for length in range(0, len(whole), 97):
        path.write_text(whole[:length])
        with pytest.raises(ValueError, match="tokenizer.json") as raised:
            bpe.from_huggingface(tmp_path)
        assert "\n" not in str(raised.value)


# reading


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("aé中🙂 \n<|end", max_size=12), min_size=2, max_size=8), st.integers(1, 40))
def test_read_stories_does_not_depend_on_chunks(tmp_path_factory, stories, chunk):
    path = tmp_path_factory.getbasetemp() / "chunks.txt"
    path.write_bytes(bpe.END_OF_TEXT.join(["first", *stories]).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe, "CHUNK", chunk)
        read = list(bpe.read_stories(path))
    assert read == [s for s in map(str.strip, ["first", *stories]) if s]


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", "no text in its 0 bytes"),
        (b" \n\n", "no text in its 3 bytes"),
        (b"<|endoftext|>\n<|endoftext|>\n", "no text in its 28 bytes"),
        (b"one story", r"no <\|endoftext\|> in its 9 bytes"),
        (b"A" * 300, r"no <\|endoftext\|> in 0 MiB from byte 0"),
        (b"one<|endoftext|>" + b"A" * 300, r"no <\|endoftext\|> in 0 MiB from byte 16"),
        (b"caf\xe9<|endoftext|>two", "byte 3 is not UTF-8"),
        (b"one<|endoftext|>caf\xe9<|endoftext|>", "byte 19 is not UTF-8"),
        (b"one<|endoftext|>two<|endoftext|>caf\xc3", "byte 35 is not UTF-8"),
        (b"\xff\xfeo\0n\0e\0", "byte 0 is not UTF-8"),
    ],
)
def test_read_stories_says_in_one_line_what_is_wrong(tmp_path, monkeypatch, content, error):
    monkeypatch.setattr(bpe, "CHUNK", 10)
    monkeypatch.setattr(bpe, "LONGEST_STORY", 200)
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(ValueError, match=error) as raised:
        list(bpe.read_stories(tmp_path / "text"))
    assert "\n" not in str(raised.value) and str(tmp_path / "text") in str(raised.value)


def test_read_stories_needs_little_memory(tmp_path):
    with open(tmp_path / "text", "w") as file:
        for i in range(3000):
            file.write(f"{i} " * 2000 + bpe.END_OF_TEXT + "\n")
    tracemalloc.start()
    count = sum(1 for _ in bpe.read_stories(tmp_path / "text"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 3000
    assert peak < 6 * bpe.CHUNK < (tmp_path / "text").stat().st_size / 4


# the script


def run_script(*arguments):
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=60
    )


def test_demo_prints_what_the_docstring_says():
    done = run_script()
    assert done.returncode == 0, done.stderr
    indented = "".join(f"    {line}\n" for line in done.stdout.splitlines())
    assert indented in bpe.__doc__


def test_demo_takes_a_file(tmp_path):
    (tmp_path / "text").write_text(bpe.END_OF_TEXT.join(pseudo_stories(100)))
    done = run_script(tmp_path / "text")
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith("ok:")
    (tmp_path / "text").write_text("one story")
    for name in ("text", "none"):
        done = run_script(tmp_path / name)
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


def test_import_prints_nothing():
    done = subprocess.run(
        [sys.executable, "-c", "import data.bpe"],
        capture_output=True,
        text=True,
        cwd=SCRIPT.parent.parent,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
