"""Tests of the ways to other projects: the folder of a model and its tokeniser that transformers
loads, the way back, and the comparisons with others in results/.

Run: python -m pytest tests/test_interchange.py
"""

import importlib
import json
import math
import sys
import unicodedata

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data import bpe, stories

compare = importlib.import_module("results.compare")
generation = importlib.import_module("results.generation")
gpt, batches = compare.gpt, compare.batches
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
    assert tokenizer.decode(expected, skip_special_tokens=True) == "abab abab"


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


def test_folder_goes_on_from_prompts_of_different_lengths(exported):
    model, theirs, tokenizer, _ = exported
    prompts = ["Once", "One day a little fox and a bear went to the river", "He"]
    given = tokenizer(prompts, padding=True, return_tensors="pt")
    found = theirs.generate(**given, max_new_tokens=20, do_sample=False)
    for prompt, row in zip(prompts, found):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        wanted = model.generate(ids, 20, temperature=0)[0, ids.shape[1] :]
        assert torch.equal(row[-20:], wanted)


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


# results/generation.py


def test_generation_compares_the_same_tokens(exported, tmp_path, capsys):
    folder, out = str(exported[3]), tmp_path / "out.json"
    flags = ["--rows", "1", "3", "--new-tokens", "12", "--turns", "2", "--json", str(out)]
    assert generation.main([folder, *flags]) == 0
    result = json.loads(out.read_text())
    assert result["parameters"] == sum(p.numel() for p in exported[0].parameters())
    cases = {
        (dtype, rows): found for dtype in generation.DTYPES for rows, found in result[dtype].items()
    }
    assert len(cases) == 4
    for (dtype, rows), found in cases.items():
        assert dtype == "bfloat16" or found["equal_rows"] == int(rows)
        rates = []
        for side in ("ours", "transformers"):
            assert len(found[side]["seconds"]) == 2
            mean = sum(found[side]["seconds"]) / 2  # the median of two
            rates.append(int(rows) * 12 / mean)
            assert math.isclose(found[side]["tokens_per_second"], rates[-1])
        assert math.isclose(found["ratio"], rates[0] / rates[1])
    assert capsys.readouterr().out.count("\n") == 6


def test_generation_writes_a_model_that_says_something(tmp_path, monkeypatch):
    small = gpt.GPTConfig(n_layer=2, n_head=4, n_kv_head=2, d_model=64, d_mlp=192, vocab_size=512)
    monkeypatch.setitem(gpt.PRESETS, "27m", small)
    generation.write_random_model(str(tmp_path))
    model = gpt.from_huggingface(tmp_path)
    ids = model.generate(torch.arange(4).unsqueeze(1), 40, temperature=0)
    assert len(ids.unique()) > 20
    assert all(p.std() > 0.01 for p in model.parameters())


def test_generation_forgives_ties_only(vocabulary):
    model = random_model(vocabulary)
    ids = model.generate(torch.tensor([[5], [6]]), 10, temperature=0)
    twin = 500  # of the token that row 1 says at place 4: the same row in the tied table
    assert not (ids == twin).any()
    with torch.no_grad():
        model.embedding.weight[twin] = model.embedding.weight[ids[1, 4]]
    generation.check_equal(model, ids, ids)
    other = ids.clone()
    other[1, 4], other[1, 5:] = twin, 7  # what follows the tie is another text
    generation.check_equal(model, ids, other)
    other[0, 3] = 7
    with pytest.raises(generation.train.RunError, match="row 0 differs at place 3, where token"):
        generation.check_equal(model, ids, other)


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["none"], "none: no config.json; 06_train.py --export FOLDER"),
        (["FOLDER", "--new-tokens", "145"], "--new-tokens 145: wanted 1 to 144"),
        (["FOLDER", "--json", "no/where.json"], "--json no/where.json: there is no such folder"),
    ],
)
def test_generation_says_in_one_line_what_is_wrong(exported, capsys, flags, error):
    flags = [str(exported[3]) if flag == "FOLDER" else flag for flag in flags]
    assert generation.main(flags) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"generation.py: error: {error}")
    assert printed.err.count("\n") == 1


# results/compare.py, with stand-ins for the other projects


STAND_IN = """
import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear
IMPORT

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        print("a line that nobody asked for")
        self.table = nn.Embedding(config.vocab_size, config.WIDTH)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, idx, targets=None):
        logits = linear(self.drop(self.table(idx)), self.table.weight)
        return logits, cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        assert (weight_decay, learning_rate, betas) == (0.1, 6e-4, (0.9, 0.95))
        return torch.optim.AdamW(self.parameters(), learning_rate, betas)
"""
CONFIG = """
from dataclasses import dataclass

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    WIDTH: int
    dropout: float
    bias: bool
"""
TINY = compare.Shape(n_layer=2, n_head=4, width=32, seq_len=32, vocab_size=300)


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    """Folders laid out as smolGPT's and nanoGPT's are: one with config.py, one without."""
    smol, nano = tmp_path_factory.mktemp("smol"), tmp_path_factory.mktemp("nano")
    (smol / "config.py").write_text(CONFIG.replace("WIDTH", "n_embed"))
    importing = STAND_IN.replace("IMPORT", "from config import GPTConfig")
    (smol / "model.py").write_text(importing.replace("WIDTH", "n_embed"))
    (nano / "model.py").write_text(STAND_IN.replace("IMPORT", CONFIG).replace("WIDTH", "n_embd"))
    return {"smolgpt": str(smol), "nanogpt": str(nano)}


@pytest.fixture(scope="module")
def setting(peers):
    return compare.Setting(peers, "cpu", "float32", seed=0)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, seed in (("train", 0), ("val", 1)):
        told = [story for story, _ in stories.corpus(60, seed=seed)]
        (folder / name).write_text(f"\n{END}\n".join(told))
    return [str(folder / "train"), str(folder / "val")]


def test_compare_gives_all_figures(peers, texts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "STEP_SHAPE", TINY)
    monkeypatch.setattr(compare, "LOSS_SHAPE", TINY)
    monkeypatch.setattr(compare, "VAL_TOKENS", 1000)
    monkeypatch.setattr(compare, "POINT_TOKENS", 500)
    out = tmp_path / "out.json"
    flags = ["--steps", "3", "--rows", "2", "4", "--losses", "4000", "--json", str(out)]
    flags += ["--train", texts[0], "--val", texts[1], "--dtype", "float32"]
    assert compare.main([*peers.values(), *flags]) == 0
    assert "nobody asked" not in capsys.readouterr().out
    assert "config" not in sys.modules
    result = json.loads(out.read_text())
    assert set(result["steps"]) == {"2x32", "4x32"}
    for rows, found in zip((2, 4), result["steps"].values()):
        for name in ("ours", "smolgpt", "nanogpt"):
            median = sorted(found[name]["seconds"])[1]
            assert len(found[name]["seconds"]) == 3
            assert math.isclose(found[name]["tokens_per_second"], rows * 32 / median)
        ours, theirs = found["ours"], found["nanogpt"]
        keys = {"speed": "tokens_per_second", "memory": "peak_memory_bytes"}
        assert found["ours_over_nanogpt"] == {k: ours[v] / theirs[v] for k, v in keys.items()}
    after = result["losses"]
    for name in ("ours", "smolgpt", "nanogpt"):
        assert abs(after[name]["tokens"] - 4000) < 400
        assert after[name]["seconds"] > 0
    for name in ("smolgpt", "nanogpt"):
        for cut in ("stories", "blocks"):  # the same rows for all
            assert after[name][cut]["tokens"] == after["ours"][cut]["tokens"]
            ratio = after["ours"][cut]["bits_per_byte"] / after[name][cut]["bits_per_byte"]
            assert math.isclose(after[f"ours_over_{name}"][cut], ratio)
        assert len(after[name]["curve"]) == compare.POINTS
        assert after[name]["curve"][-1][:2] == [after[name]["tokens"], after[name]["seconds"]]
    assert after["smolgpt"]["steps"] == after["nanogpt"]["steps"] <= after["ours"]["steps"]


def test_compare_scores_every_target_once_without_dropout(setting, texts, tmp_path):
    data = compare.prepare(*texts, 300, tmp_path)
    shape = compare.replace(TINY, vocab_size=data.vocabulary.size)
    token_bytes = torch.tensor(data.vocabulary.token_bytes)
    side = compare.build("smolgpt", shape, setting, own_defaults=True)
    assert side.model.drop.p == 0.2
    ids = torch.from_numpy(data.val.astype("int64"))
    table = side.model.table.weight.detach().double()
    losses = F.cross_entropy(table[ids[:-1]] @ table.T, ids[1:], reduction="none")
    text_bytes = sum(len(story.encode()) for story in bpe.read_stories(texts[1]))
    for row_cut in ("stories", "blocks"):
        val = compare.cut(data.val, row_cut, data, shape, setting)
        found = compare.score(side, val, token_bytes, limit=10**9)
        assert found["tokens"] == len(ids) - 1 and found["bytes"] == text_bytes
        assert math.isclose(found["nats"], losses.mean().item(), rel_tol=1e-5)
        bits = losses.sum().item() / math.log(2) / text_bytes
        assert math.isclose(found["bits_per_byte"], bits, rel_tol=1e-5)
    assert side.model.training


def test_compare_trains_each_side_as_it_should(setting):
    x, y = compare.random_batch(TINY, 2, setting)
    for name in ("ours", "smolgpt", "nanogpt"):
        side = compare.build(name, TINY, setting, own_defaults=False)
        before, padded = [side.loss(x, y).item()], y.clone()
        padded[1] = batches.IGNORE
        assert math.isclose(side.loss(x, padded).item(), side.loss(x[:1], y[:1]).item())
        for step in range(30):
            side.step(x, y, multiplier=side.multiplier(step, 60))
        assert side.loss(x, y).item() < before[0] - 0.002
        weights = [p.clone() for p in side.model.parameters()]
        side.step(x, y, multiplier=0.0)
        assert all(torch.equal(p, w) for p, w in zip(side.model.parameters(), weights))


def test_compare_schedules_go_as_their_projects_say():
    smol, nano = compare.PEERS["smolgpt"], compare.PEERS["nanogpt"]
    assert math.isclose(smol.multiplier(0, 30_000), 1 / 1001)
    assert smol.multiplier(1_000, 30_000) == 1
    assert math.isclose(smol.multiplier(15_500, 30_000), 0.55)
    assert math.isclose(smol.multiplier(30_000, 30_000), 0.1)
    assert smol.multiplier(10, 300) == 1 and math.isclose(smol.multiplier(155, 300), 0.55)
    assert nano.multiplier(2_000, 600_000) == 1 and nano.multiplier(1_999, 600_000) < 1
    assert 0 < nano.multiplier(0, 1) <= 1


def test_compare_says_where_we_are_when_the_other_has_ended():
    ways = {"stories": {"bits_per_byte": 2.0}, "blocks": {"bits_per_byte": 3.0}}
    ours = ways | {"curve": [[10, 1.0, 5.0], [20, 2.0, 4.0], [30, 3.0, 3.0]]}
    theirs = {"stories": {"bits_per_byte": 4.0}, "blocks": {"bits_per_byte": 4.0}}
    theirs |= {"seconds": 2.5, "curve": [[15, 1.2, 6.0], [30, 2.5, 5.0]]}
    expected = {"stories": 0.5, "blocks": 0.75, "in_its_time": 0.8}
    assert compare.ratios(ours, theirs) == expected
    assert compare.ratios(ours, theirs | {"seconds": 0.5})["in_its_time"] is None


@pytest.mark.parametrize("shape", [compare.STEP_SHAPE, compare.LOSS_SHAPE])
def test_compare_shapes_have_as_many_weights(shape):
    """Beside a plain transformer: 12 C^2 a layer, and the tied table."""
    plain = shape.n_layer * 12 * shape.width**2 + shape.vocab_size * shape.width
    assert abs(gpt.parameter_count(shape.ours()) / plain - 1) < 0.005
    if shape is compare.STEP_SHAPE:
        assert shape.ours() == gpt.PRESETS["27m"]


def test_compare_memory_is_that_of_a_process_alone(setting):
    ballast = torch.ones(2**28)  # 1 GiB in this process, none of it in the other
    found = compare.compare_steps(TINY, 2, 1, setting)
    for name in ("ours", "smolgpt", "nanogpt"):
        assert 10**8 < found[name]["peak_memory_bytes"] < ballast.nbytes


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["none", "NANO"], "none: no model.py; clone github.com/Om-Alve/smolGPT to it"),
        (["SMOL", "none"], "none: no model.py; clone github.com/karpathy/nanoGPT to it"),
        (["NANO", "NANO"], "NANO: not as expected of smolgpt"),
        (["SMOL", "NANO", "--losses", "9"], "--losses TOKENS goes with --train FILE and --val"),
        (["SMOL", "NANO", "--train", "a", "--val", "b"], "--losses TOKENS goes with --train"),
        (["SMOL", "NANO", "--losses", "9", "--train", "none", "--val", "b"], "none: no such file"),
        (["SMOL", "NANO", "--losses", "9", "--train", "NANO", "--val", "b"], "NANO: no such file"),
        (["SMOL", "NANO", "--losses", "9", "--train", "TEXT", "--val", "TEXT"], "TEXT: no <|endof"),
        (["SMOL", "NANO", "--rows", "0"], "--steps 1 --rows [0] --losses None: wanted 0, 1, 1 up"),
        (["SMOL", "NANO", "--json", "no/where"], "--json no/where: there is no such folder"),
    ],
)
def test_compare_says_in_one_line_what_is_wrong(peers, monkeypatch, capsys, flags, error):
    text = peers["nanogpt"] + "/model.py"  # no stories in it
    monkeypatch.setattr(compare, "STEP_SHAPE", TINY)
    names = {"SMOL": peers["smolgpt"], "NANO": peers["nanogpt"], "TEXT": text}
    flags = [names.get(flag, flag) for flag in flags]
    assert compare.main([*flags, "--steps", "0" if "--losses" in flags else "1"]) == 2
    printed = capsys.readouterr()
    error = error.replace("NANO", peers["nanogpt"]).replace("TEXT", text)
    assert printed.err.startswith(f"compare.py: error: {error}"), printed.err
    assert printed.err.count("\n") == 1
