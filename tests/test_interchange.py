"""Tests of a model and its tokeniser as a folder that transformers loads, and of the way back.

Run: python -m pytest tests/test_interchange.py
"""

import importlib
import json
import unicodedata

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data import bpe, stories

gpt = importlib.import_module("03_gpt")
transformers = pytest.importorskip("transformers")
END = bpe.END_OF_TEXT
UNSETTLED = ("Cn", "Co", "Cs")  # in Unicode's next version these may be letters, or are no text
TEXT = st.text(st.characters(exclude_categories=UNSETTLED))
TEXT |= st.text("aS1é!' \n\r\t\u3000ſ中🙂", max_size=40)


@pytest.fixture(scope="module", autouse=True)
def offline():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def vocabulary():
    return bpe.train((story for story, _ in stories.corpus(1000, seed=0)), 1024)


@pytest.fixture(scope="module")
def encoding(vocabulary):
    return vocabulary.encoding()


@pytest.fixture(scope="module")
def tokenizer(vocabulary, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    bpe.to_huggingface(vocabulary, folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def random_model(vocabulary, seed=0, **shape):
    """A model whose weights are all noise: as built, its layers add nothing to the embedding."""
    shape = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_model": 64, "d_mlp": 128} | shape
    torch.manual_seed(seed)
    model = gpt.GPT(gpt.GPTConfig(vocab_size=vocabulary.size, seq_len=160, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    return model


# the tokeniser


def test_tokenizer_gives_the_ids_of_thousands_of_stories(vocabulary, encoding, tokenizer):
    told = [story for story, _ in stories.corpus(3000, seed=1)]
    theirs = tokenizer(told, add_special_tokens=False)["input_ids"]
    assert theirs == [ids.tolist() for ids in bpe.encode(told, vocabulary)]
    assert [encoding.decode(ids) for ids in theirs] == told == tokenizer.batch_decode(theirs)


def test_tokenizer_gives_the_ids_of_any_text(encoding, tokenizer):
    @settings(max_examples=400, deadline=None)
    @given(TEXT)
    @example("")
    @example("'ſ it'ſ 'LL 'ſs")
    @example("a" + " " * 1000 + "b" + "\n" * 600 + " ")
    @example("\0\u2028\ufeff e\u0301\u0301 \U0001f469\u200d\U0001f680")
    @example("fine . It 's n't , really ?")  # what clean_up_tokenization_spaces would change
    def check(text):
        ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ids == encoding.encode_ordinary(text)
        assert tokenizer.decode(ids) == text

    check()


def test_tokenizer_gives_the_ids_of_every_kind_of_character(encoding, tokenizer):
    for first in range(0, 0x110000, 64):
        text = ""
        for code in range(first, first + 64):
            kind = unicodedata.category(chr(code))
            if kind not in UNSETTLED and (kind != "Lo" or code % 16 == 0):  # 127,000 are Lo
                text += f"a{chr(code)}b {chr(code)}1'{chr(code)}. "
        ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == encoding.encode_ordinary(text), hex(first)


def test_tokenizer_never_splits_the_end_token(vocabulary, encoding, tokenizer):
    @settings(max_examples=100, deadline=None)
    @given(st.lists(TEXT.filter(lambda text: END not in text), min_size=2, max_size=4))
    @example(["once ", " upon"])
    @example(["<|endof", "text|><|"])
    @example(["<", ">"])
    def check(parts):
        text = END.join(parts)
        special = encoding.encode(text, allowed_special="all")
        assert vocabulary.end in special
        assert tokenizer.encode(text, add_special_tokens=False) == special
        assert tokenizer.decode(special) == text
        assert tokenizer.decode(special, skip_special_tokens=True) == "".join(parts)

    check()


def test_tokenizer_begins_with_end_as_training_does(vocabulary, encoding, tokenizer):
    start = [vocabulary.end, *encoding.encode_ordinary("Once")]
    assert tokenizer("Once")["input_ids"] == tokenizer.encode("Once") == start
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        assert token == vocabulary.end
    assert len(tokenizer) == vocabulary.size and tokenizer.all_special_tokens == [END]


def test_tokenizer_takes_more_special_tokens(tmp_path):
    vocabulary = bpe.train(["abab abab"], 300, special_tokens=("<|pad|>", END, "<|x|>"))
    bpe.to_huggingface(vocabulary, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = f"ab<|x|>ab{END} <|pad|>abab"
    expected = vocabulary.encoding().encode(text, allowed_special="all")
    assert tokenizer.encode(text, add_special_tokens=False) == expected
    assert tokenizer.decode(expected) == text and len(tokenizer) == vocabulary.size


def test_from_huggingface_reads_what_transformers_saved(vocabulary, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert bpe.from_huggingface(tmp_path).hash == vocabulary.hash


def test_from_huggingface_reads_a_tokenizer_trained_by_huggingface(vocabulary, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    pre = tokenizers.pre_tokenizers
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = pre.Sequence(
        [
            pre.Split(tokenizers.Regex(bpe.PATTERN), behavior="isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    theirs.decoder = tokenizers.decoders.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = bpe.byte_letters()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary.end,
        min_frequency=bpe.MIN_COUNT,
        show_progress=False,
        special_tokens=[letters[byte] for byte in range(256)],  # numbered as ours are
    )
    theirs.train_from_iterator((story for story, _ in stories.corpus(1000, seed=0)), trainer)
    stored = json.loads(theirs.to_str())
    stored["added_tokens"] = [{"id": vocabulary.end, "content": END, "special": True}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    assert bpe.from_huggingface(tmp_path) == vocabulary


def test_from_huggingface_refuses_bytes_in_the_order_of_gpt2(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator(["abab abab"], vocab_size=270, special_tokens=[END])
    theirs.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="wanted a byte-level BPE") as raised:
        bpe.from_huggingface(tmp_path)
    assert "\n" not in str(raised.value)


# the whole folder: model and tokeniser


@pytest.fixture(scope="module", params=[True, False], ids=["qwen3", "llama"])
def exported(request, vocabulary, tmp_path_factory):
    """Our model, and the model and tokeniser that transformers loads from its folder."""
    folder = tmp_path_factory.mktemp("exported")
    model = random_model(vocabulary, qk_norm=request.param)
    gpt.to_huggingface(model, folder)
    bpe.to_huggingface(vocabulary, folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, theirs, transformers.AutoTokenizer.from_pretrained(folder), folder


def test_folder_generates_the_same_greedy_text(vocabulary, encoding, exported):
    model, theirs, tokenizer, _ = exported
    different = set()
    for prompt in ("Once", "", "Lily found a 🙂 and", "One day,\n"):
        given = tokenizer(prompt, return_tensors="pt")
        ids = torch.tensor([[vocabulary.end, *encoding.encode_ordinary(prompt)]])
        assert torch.equal(given["input_ids"], ids)
        wanted = model.generate(ids, 80, temperature=0, stop=vocabulary.end)
        found = theirs.generate(**given, max_new_tokens=80, do_sample=False)
        assert torch.equal(found, wanted)
        text = encoding.decode(wanted[0, 1:].tolist())
        assert tokenizer.decode(found[0, 1:]) == text
        different |= set(wanted[0].tolist())
    assert len(different) > 30, "a model that repeats itself would prove nothing"


@pytest.mark.parametrize("qk_norm", [True, False])
def test_folder_stops_at_the_end_token(vocabulary, tmp_path, qk_norm):
    """Left to itself a Llama stops at id 2, which is a byte here, and a Qwen3 at none."""
    model = random_model(vocabulary, qk_norm=qk_norm)
    with torch.no_grad():
        model.embedding.weight[[vocabulary.end, 2]] *= 3  # so that these two are likely
    gpt.to_huggingface(model, tmp_path)
    bpe.to_huggingface(vocabulary, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ended, bytes_2 = 0, 0
    for prompt in ("One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight"):
        given = tokenizer(prompt, return_tensors="pt")
        wanted = model.generate(given["input_ids"], 30, temperature=0, stop=vocabulary.end)
        assert torch.equal(theirs.generate(**given, max_new_tokens=30, do_sample=False), wanted)
        ended += wanted.shape[1] < given["input_ids"].shape[1] + 30
        bytes_2 += int((wanted == 2).any())
    assert 0 < ended and 0 < bytes_2, f"{ended} ended, {bytes_2} went over a byte 2"


def test_folder_comes_back_whole(vocabulary, exported, tmp_path):
    model, theirs, tokenizer, folder = exported
    theirs.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for where in (folder, tmp_path):
        back = gpt.from_huggingface(where)
        assert bpe.from_huggingface(where) == vocabulary
        for name, tensor in model.state_dict().items():
            assert torch.equal(back.state_dict()[name], tensor), name
