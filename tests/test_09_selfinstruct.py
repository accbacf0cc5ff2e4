"""Tests of 09_selfinstruct.py: against rouge_score, nltk and scipy, a real server, and by property.

Run: python -m pytest tests/test_09_selfinstruct.py
"""

import copy
import importlib
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import test_data_endpoint as server_tests
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import bpe, rows, stories

si = importlib.import_module("09_selfinstruct")
gpt = importlib.import_module("03_gpt")
mlm = importlib.import_module("02_mlm")
serve, completion = server_tests.serve, server_tests.completion

ROOT = Path(__file__).parent.parent
SEEDS = rows.load_seeds(ROOT / "data" / "seed_tasks.jsonl")
TEXTS = [task[k] for task in SEEDS for k in ("instruction", "input", "output") if task[k]]


# the seeds


def test_seed_tasks_pass_their_own_filters():
    assert len(SEEDS) >= 60
    assert sum(task["classification"] for task in SEEDS) >= si.SelfInstruct.yes_shots
    assert sum(not task["classification"] for task in SEEDS) >= si.SelfInstruct.no_shots
    gate = si.NoveltyGate()
    for task in SEEDS:
        assert si.instruction_fault(task["instruction"]) is None, task
        assert si.instance_fault(task["input"], task["output"]) is None, task
        assert gate.nearest(task["instruction"], above=0.7) == [], task
        gate.add(task["instruction"])


@pytest.mark.parametrize(
    "line, says",
    [
        ("{", "line 2"),
        ("[]", "line 2"),
        ('{"id": "a", "instruction": 3, "input": "", "output": "", "classification": true}',
         r"row 2: \$.instruction is 3, wanted string"),
        (json.dumps(SEEDS[0]), "same id"),
    ],
)
def test_malformed_seeds_are_named(tmp_path, line, says):
    path = tmp_path / "seeds.jsonl"
    path.write_text(json.dumps(SEEDS[0]) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=says):
        rows.load_seeds(path)


@pytest.mark.parametrize("mode", ["self-instruct", "augment"])
def test_no_seeds_are_one_line(tmp_path, capsys, mode):
    (tmp_path / "seeds").write_text("\n")
    flags = ["--endpoint", "http://localhost:9/v1", "--model", "m"]
    assert si.main(["--mode", mode, *flags, "--seeds", str(tmp_path / "seeds"), "--out",
                    str(tmp_path / "run")]) == 2  # fmt: skip
    error = capsys.readouterr().err
    assert "seeds: no tasks" in error and error.count("\n") == 1


# back end: a checkpoint


@pytest.fixture(scope="module")
def small_model():
    torch.manual_seed(0)
    vocabulary = bpe.train([text for text, _ in stories.corpus(200, seed=0)], 400)
    config = gpt.GPTConfig(
        vocab_size=vocabulary.size, seq_len=48, n_layer=2, n_head=2, n_kv_head=1, d_model=32,
        d_mlp=64,
    )  # fmt: skip
    model = gpt.GPT(config)
    for p in model.parameters():  # fresh output projections are 0: every context would look alike
        torch.nn.init.normal_(p, std=0.3)
    return si.Checkpoint(model, vocabulary)


PROMPTS = ["Once upon a time", "Lily", "", "One sunny day, Tom and his friend went to", "The"]


def test_checkpoint_reply_does_not_depend_on_its_batch(small_model):
    together = small_model(PROMPTS, seed=5, max_tokens=12)
    for i, prompt in enumerate(PROMPTS):
        assert small_model([prompt], seed=5 + i, max_tokens=12) == [together[i]]
    assert len(set(together)) == len(PROMPTS)
    small = si.Checkpoint(small_model.model, small_model.vocabulary, batch=2)
    assert small(PROMPTS, seed=5, max_tokens=12) == together


def test_checkpoint_greedy_reply_is_that_of_generate(small_model):
    model, vocabulary = small_model.model, small_model.vocabulary
    for prompt, reply in zip(PROMPTS, small_model(PROMPTS, temperature=0.0, max_tokens=10)):
        ids = torch.tensor([[vocabulary.end, *vocabulary.encoding().encode_ordinary(prompt)]])
        wanted = model.generate(ids, 10, temperature=0, stop=vocabulary.end)[0, ids.shape[1] :]
        wanted = list(itertools.takewhile(lambda i: i != vocabulary.end, wanted.tolist()))
        assert reply == vocabulary.encoding().decode(wanted)
        assert reply.cut == (len(wanted) == 10)


def test_checkpoint_draws_from_the_models_distribution(small_model):
    """The first token over 2000 seeds: counts within 4 standard deviations of n p."""
    vocabulary = small_model.vocabulary
    ids = torch.tensor([[vocabulary.end, *vocabulary.encoding().encode_ordinary("Lily")]])
    with torch.no_grad():
        p = small_model.model(ids)[0, -1].softmax(-1).double()
    n = 2000
    drawn = Counter(small_model(["Lily"] * n, max_tokens=1))
    texts = [vocabulary.encoding().decode([i]) for i in range(vocabulary.size - 1)]
    for i in p.argsort(descending=True)[:8].tolist():
        if i != vocabulary.end and texts.count(texts[i]) == 1:
            q = p[i].item()
            assert abs(drawn[texts[i]] - n * q) < 4 * math.sqrt(n * q * (1 - q))


def test_checkpoint_stops_penalises_and_refuses(small_model):
    whole = small_model(["Once"], temperature=0.0, max_tokens=12)[0]
    stop = whole[3:5]
    stopped = small_model(["Once"], temperature=0.0, max_tokens=12, stop=[stop])[0]
    assert stopped == whole[: whole.index(stop)] and not stopped.cut
    free = small_model(["Once"], temperature=0.0, max_tokens=12, presence_penalty=1e6)[0]
    encoding = small_model.vocabulary.encoding()
    said = small_model.write([encoding.encode_ordinary("Once")], [0], temperature=0.0,
                             max_tokens=12, presence_penalty=1e6)[0]  # fmt: skip
    assert len(free) and len(said)
    need = len(encoding.encode_ordinary("word " * 60)) + 2  # END before it, a token after it
    with pytest.raises(si.BackendError, match=f"seq_len=48; wanted .* --seq-len {need} or more"):
        small_model(["Once", "word " * 60])


# back end: a server that misbehaves


# journal and ledger


def test_ledger_refuses_other_settings(tmp_path):
    si.Ledger(tmp_path / "l", {"seed": 0, "model": "a"})
    si.Ledger(tmp_path / "l", {"seed": 0, "model": "a"})
    with pytest.raises(ValueError, match="another model"):
        si.Ledger(tmp_path / "l", {"seed": 0, "model": "b"})


# likeness


def brute_lcs(a, b):
    row = [0] * (len(b) + 1)
    for x in a:
        new = [0]
        for j, y in enumerate(b):
            new.append(row[j] + 1 if x == y else max(row[j + 1], new[j]))
        row = new
    return row[-1]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from("abcd"), max_size=90), st.lists(st.sampled_from("abcd"), max_size=90)
)
def test_lcs_length_is_the_longest_common_subsequence(a, b):
    assert si.lcs_length(si.positions(a), len(a), b) == brute_lcs(a, b)


@settings(max_examples=300, deadline=None)
@given(
    st.text(st.characters(max_codepoint=127), max_size=60),
    st.text(st.characters(max_codepoint=127), max_size=60),
)
def test_rouge_l_equals_rouge_score_on_any_ascii(a, b):
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    assert si.rouge_l(a, b) == scorer.score(a, b)["rougeL"].fmeasure


def test_gate_is_20_times_as_fast_as_rouge_score_with_its_scores():
    """The gate's task: each text against all before it, the best score above 0.7 or the best 10."""
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    texts = [" ".join(story.split()[:16]) for story, _ in stories.corpus(90, seed=5)]
    texts += [text + " again" for text in texts[:10]]
    start = time.process_time()
    wanted = [[scorer.score(a, b)["rougeL"].fmeasure for a in texts[:i]]
              for i, b in enumerate(texts)]  # fmt: skip
    theirs = time.process_time() - start
    for count, above in ((1, 0.7), (10, 0.0)):
        gate, found = si.NoveltyGate(), []
        start = time.process_time()
        for text in texts:
            found.append(gate.nearest(text, count, above))
            gate.add(text)
        ours = time.process_time() - start
        for near, scores in zip(found, wanted):
            best = sorted(((-x, i) for i, x in enumerate(scores) if x > above))[:count]
            assert near == [(-x, i) for x, i in best]
        assert theirs > 20 * ours
    assert any(found)
    pairs = list(itertools.combinations(texts[:40], 2))
    assert [si.rouge_l(a, b) for a, b in pairs] == [
        wanted[texts.index(b)][texts.index(a)] for a, b in pairs]  # fmt: skip


def test_words_of_other_scripts():
    assert si.words("Don't stop_me NOW!") == ["don", "t", "stop", "me", "now"]
    assert si.words("Caf\u00e9, STRASSE stra\u00dfe") == ["caf\u00e9", "strasse", "strasse"]
    assert si.words("cafe\u0301") == si.words("caf\u00e9")
    assert si.words("\u0939\u093f\u0928\u094d\u0926\u0940 \u092d\u093e\u0937\u093e") == [
        "\u0939\u093f\u0928\u094d\u0926\u0940", "\u092d\u093e\u0937\u093e"]  # fmt: skip
    assert si.words("\u4eca\u5929\u5929\u6c14") == list("\u4eca\u5929\u5929\u6c14")
    assert si.rouge_l(
        "\u4eca\u5929\u5929\u6c14\u597d", "\u4eca\u5929\u5929\u6c14\u574f"
    ) == pytest.approx(0.8)
    assert si.words("") == si.words("!?") == []


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from("abcdef"), max_size=8).map(" ".join), max_size=12),
    st.lists(st.sampled_from("abcdef"), max_size=8).map(" ".join),
    st.integers(1, 5),
    st.sampled_from([0.0, 0.5, 0.7]),
)
def test_gate_finds_the_nearest_exactly(pool, text, count, above):
    scores = [(-si.rouge_l(a, text), i) for i, a in enumerate(pool)]
    wanted = sorted(x for x in scores if -x[0] > above)[:count]
    assert si.NoveltyGate(pool).nearest(text, count, above) == [(-s, i) for s, i in wanted]


def test_gate_of_equal_scores_the_earlier_wins_though_its_bound_is_lower():
    gate = si.NoveltyGate(["a b c x y", "d a b c x"])  # three in order each; bounds 3 and 4
    assert gate.nearest("a b c d") == [(si.rouge_l("a b c x y", "a b c d"), 0)]


def test_gate_compares_few(monkeypatch):
    texts = [story.split("\n")[0] for story, _ in stories.corpus(400, seed=1)]
    gate, real, calls = si.NoveltyGate(texts), si.lcs_length, []
    monkeypatch.setattr(si, "lcs_length", lambda *args: calls.append(1) or real(*args))
    for story, _ in stories.corpus(50, seed=2):
        gate.nearest(story.split("\n")[0], above=0.7)
    assert 0 < len(calls) < 0.1 * 50 * 400


def test_minhash_estimate_is_within_3_sigma_and_the_curve_holds():
    rng, k = random.Random(0), 16 * 8
    inside, met, expected, variance = 0, 0, 0.0, 0.0
    for trial in range(300):
        shared, own = rng.randint(5, 60), rng.randint(1, 25)
        a = [f"w{trial}x{i}" for i in range(shared)]
        b = a + [f"b{trial}x{i}" for i in range(own)]
        hashes = si.MinHash(shingle=1, seed=trial)
        hashes.add(" ".join(a))
        met += bool(hashes.add(" ".join(b)))
        s = shared / (shared + own)
        inside += abs(hashes.similarity(0, 1) - s) <= 3 * math.sqrt(s * (1 - s) / k)
        p = 1 - (1 - s**8) ** 16
        expected, variance = expected + p, variance + p * (1 - p)
    assert inside >= 0.98 * 300  # 99.7% expected
    assert abs(met - expected) < 4 * math.sqrt(variance)


def test_minhash_hashes_are_independent():
    """For disjoint texts no place agrees, and mean and spread of signatures are those of minima."""
    hashes = si.MinHash(shingle=1)
    values = np.stack(
        [hashes.signature(" ".join(f"{t} {i}x{t}" for i in range(9))) for t in range(99)]
    )
    u = values.astype(np.float64) / 2**64  # (99, 128) minima of n uniform numbers
    n = 9 + 1
    assert abs(u.mean() - 1 / (n + 1)) < 5 * (1 / (n + 1)) / math.sqrt(u.size)
    correlation = np.corrcoef(u.T) - np.eye(128)
    assert np.abs(correlation).mean() < 1.1 * math.sqrt(2 / math.pi / 99)


def test_near_duplicates_leave_one_of_each_group():
    base = [story for story, _ in stories.corpus(40, seed=3)]
    changed = [text.replace(text.split()[-1], "indeed.") for text in base]
    texts = base + changed + base[:5]
    assert si.without_near_duplicates(texts) == list(range(40))


# filters


@pytest.mark.parametrize(
    "text, reason",
    [
        ("Name three kinds of cheese.", None),
        ("Name three kinds.", "too short"),
        ("word " * 151, "too long"),
        ("word " * 150, None),
        ("Describe the image in one sentence.", "image"),
        ("Draw a cat on a mat.", "draw"),
        ("Please go to the website and read.", "go to"),
        ("Describe what imagery does to readers.", None),
        ("Profile the customers of a bakery.", None),
        ("Write a program that sorts numbers.", "write a program"),
        ("Write a programme for the concert tonight.", None),
        ("- list the kings of France", "does not begin"),
        ("\u00dcbersetze diesen Satz ins Englische.", None),
        ("\U0001f600 tell me a good joke", "does not begin"),
        ("", "too short"),
    ],
)
def test_instruction_filters(text, reason):
    fault = si.instruction_fault(text)
    assert fault is None if reason is None else reason in fault, fault


@pytest.mark.parametrize(
    "input, output, reason",
    [
        ("a", "b", None),
        ("", "b", None),
        ("a", " ", "empty output"),
        ("same", "same ", "repeats"),
        ("a", "the list:", "colon"),
        ("see:", "b", "colon"),
    ],
)
def test_instance_filters(input, output, reason):
    fault = si.instance_fault(input, output)
    assert fault is None if reason is None else reason in fault


def test_repetition_filter():
    assert all(si.repetition_fault(story) is None for story, _ in stories.corpus(50, seed=0))
    assert si.repetition_fault("the same again and " * 10)
    assert si.repetition_fault("a b c d e f g h i j a b") == "repeats 2 words"
    assert si.repetition_fault("a b c d e f g h i j k l m n o p q r s t u a b") is None
    assert si.repetition_fault("") is None


def test_decontamination_finds_runs_of_13_words():
    test = " ".join(f"w{i}" for i in range(30))
    check = si.Decontaminator([test, "Short one."])
    assert check.fault("And w3, W4 w5 w6 w7 w8 w9 w10 w11 w12 w13 w14 w15! is in it")
    assert check.fault("only w3 w4 w5 w6 w7 w8 w9 w10 w11 w12 w13 w14 then") is None
    assert "short one" in check.fault("a short, one") and check.fault("short and one") is None
    assert si.Decontaminator([""]).fault("anything") is None


# diversity


def test_self_bleu_equals_nltk():
    bleu = pytest.importorskip("nltk.translate.bleu_score")
    texts = [story.split("\n")[0] for story, _ in stories.corpus(12, seed=4)] + ["a short text"]
    w = [si.words(text) for text in texts]
    smooth = bleu.SmoothingFunction(epsilon=0.1).method1
    wanted = [
        bleu.sentence_bleu(w[:i] + w[i + 1 :], w[i], smoothing_function=smooth)
        for i in range(len(w))
    ]
    assert si.self_bleu(texts) == pytest.approx(np.mean(wanted), rel=1e-6)
    assert si.self_bleu(["a b c d e"] * 3) == pytest.approx(1)


def test_diversity_closed_forms():
    assert si.distinct_n(["a b a b"], 2) == 2 / 3
    assert si.distinct_n([""], 2) == 0
    assert si.vendi_score(["a b"] * 7) == pytest.approx(1)
    assert si.vendi_score([f"w{i} v{i}" for i in range(7)]) == pytest.approx(7)
    assert si.vendi_score(["a"] * 4 + ["b"] * 4) == pytest.approx(2)
    pairs = si.verb_nouns(["Write a short poem.", "Write the poem.", "Write poem"])
    assert pairs == {("write", "short"): 1, ("write", "poem"): 2}


# Self-Instruct with a scripted model


THINGS = "apples rivers clocks horses lamps ships roofs bells crows boots pears drums".split()


class Script:
    """A model whose replies are known: proposals by number of the call, instances by task."""

    def __init__(self):
        self.calls = 0

    def __call__(self, prompts, *, seed, **sampling):
        self.calls += 1
        return [self.reply(prompt, seed + i) for i, prompt in enumerate(prompts)]

    def reply(self, prompt, seed):
        if prompt.startswith("Here is a list"):
            rng = random.Random(seed)
            number, (a, b, c, d, e, f) = rng.randrange(10**6), rng.sample(THINGS, 6)
            return si.Reply(
                f" Count {number} {a} {b} among {c} by hand.\n"
                f"10. {SEEDS[3]['instruction']}\n"  # a seed again
                f"11. Too short.\n12. Draw a picture of {number} {d} quiet dogs.\n"
                f"13. Decide whether {d} {e} beats {f} in {number} years."
            )
        if prompt.startswith("Does the task"):
            return si.Reply(" Yes" if "Decide" in prompt.split("Task:")[-1] else " No")
        if "Decide" in prompt.split("Task:")[-1]:
            return si.Reply("Output: yes\nInput: It rains a lot.\nOutput: no\nInput: It is dry.\n"
                            "Output: maybe\nInput: cut he", cut=True)  # fmt: skip
        number = int(re.search(r"\d+", prompt.split("Task:")[-1])[0])
        if number % 2:
            return si.Reply("Input: three\nOutput: 3\n\nInput: three\nOutput: 4\n")
        return si.Reply(
            "Input: none\nOutput: Done.\n\nInput: two\nOutput: two\n\nInput: x\nOutput:"
        )


def make(path, model, wanted=12, seed=0):
    ledger = si.Ledger(path, {})
    return si.self_instruct(si.Maker(model, "script", seed, ledger), SEEDS, wanted), ledger


def test_self_instruct_accepts_exactly_what_it_should(tmp_path):
    items, ledger = make(tmp_path / "ledger.jsonl", Script())
    entries = [e for step in ledger.steps.values() for e in step if "verdict" in e]
    tasks = [e for e in entries if e["operator"] == "SelfInstruct"]
    for e in tasks:
        text = e["instruction"]
        if text.startswith("Too short"):
            assert e["reason"] == "too short"
        elif text.startswith("Draw"):
            assert e["reason"] == "asks for what text cannot do: draw"
        elif text == SEEDS[3]["instruction"]:
            assert e["reason"] == "too much like another task"
    good = si.accepted(tasks)
    # brute force over the pool in order: accepted if and only if nothing before is alike
    pool = [task["instruction"] for task in SEEDS]
    for e in tasks:
        if si.instruction_fault(e["instruction"]) is None:
            like = max(si.rouge_l(text, e["instruction"]) for text in pool)
            assert (e["verdict"] == "accepted") == (like <= 0.7)
            if e["verdict"] == "accepted":
                pool.append(e["instruction"])
                assert e["near"][0][1] == pytest.approx(like, abs=1e-4)
    assert 12 <= len(good) < 12 + 2 * 5  # a request brings at most two good ones of each prompt
    assert {"rejected", "accepted"} == {e["verdict"] for e in tasks}
    done = {i["parents"][0] for i in entries if i["operator"] == "instance"}
    assert done == {task["id"] for task in good[:12]}  # the last request has brought more
    for task in good[:12]:
        mine = [i for i in entries if i["operator"] == "instance" and i["parents"] == [task["id"]]]
        got = [(i["input"], i["output"]) for i in si.accepted(mine)]
        if task["instruction"].startswith("Decide"):
            assert got == [("It rains a lot.", "yes"), ("It is dry.", "no")]
        elif int(re.search(r"\d+", task["instruction"])[0]) % 2:
            assert got == [] and {i["reason"] for i in mine} == {"one input, two outputs"}
        else:
            assert got == [("", "Done.")]
            assert [i["reason"] for i in mine] == ["", "output repeats the input", "empty output"]
    assert {i["id"] for i in items} == {
        e["id"] for e in entries if e["operator"] == "instance" and e["verdict"] == "accepted"
    }
    ids = {task["id"] for task in SEEDS}
    assert all(e["ancestor"] in ids for e in entries)
    assert len({e["id"] for e in entries}) == len(entries)


def test_self_instruct_shows_8_tasks_of_which_at_most_2_are_made(tmp_path):
    prompts = []

    class Watch(Script):
        def reply(self, prompt, seed):
            prompts.append(prompt)
            return super().reply(prompt, seed)

    make(tmp_path / "l", Watch(), wanted=20)
    shown = [re.findall(r"^\d+\. (.*)$", p, re.M) for p in prompts if p.startswith("Here is")]
    own = {task["instruction"] for task in SEEDS}
    made = [sum(text not in own for text in texts) for texts in shown]
    assert all(len(texts) == 8 for texts in shown)
    assert made[:5] == [0] * 5 and max(made) == 2


def test_self_instruct_killed_at_any_call_goes_on_to_the_same_data(tmp_path):
    whole = Script()
    make(tmp_path / "whole", whole)
    wanted = (tmp_path / "whole").read_bytes()
    for stop in range(1, whole.calls + 1, 2):
        path, model = tmp_path / f"cut {stop}", Script()

        def dying(prompts, _model=model, _stop=stop, **sampling):
            if _model.calls + 1 == _stop:
                raise KeyboardInterrupt
            return _model(prompts, **sampling)

        with pytest.raises(KeyboardInterrupt):
            make(path, dying)
        again = Script()
        make(path, again)
        assert path.read_bytes() == wanted
        assert again.calls < whole.calls or stop <= 3


def test_self_instruct_goes_on_when_more_is_wanted(tmp_path):
    """From 5 to 12 as to 12 at once, and nothing is asked twice; back to 5, the first are there."""

    def content(items):
        return [(i["instruction"], i["input"], i["output"]) for i in items]

    model = Script()
    few, _ = make(tmp_path / "l", model, wanted=5)
    calls = model.calls
    more, ledger = make(tmp_path / "l", model, wanted=12)
    at_once, whole = make(tmp_path / "whole", Script(), wanted=12)
    assert content(more) == content(at_once) and more[: len(few)] == few
    made, wanted = ([i["parents"] for i in x.items() if i["operator"] == "instance"]
                    for x in (ledger, whole))  # fmt: skip
    assert made == wanted
    assert model.calls > calls
    calls = model.calls
    assert make(tmp_path / "l", model, wanted=5)[0] == few and model.calls == calls


@pytest.mark.parametrize("text", ["", "1. Too short.\n2. Draw it."])
def test_a_model_without_ideas_is_asked_no_more(tmp_path, text):
    calls = []

    def dead(prompts, **sampling):
        calls.append(len(prompts))
        return [text] * len(prompts)

    for make_data in (si.self_instruct, si.alpaca):
        ledger = si.Ledger(tmp_path / make_data.__name__, {})
        with pytest.raises(si.BackendError, match="5 requests running without an accepted task"):
            make_data(si.Maker(dead, "dead", 0, ledger), SEEDS, 10)
        assert calls == [5] * 5
        calls.clear()


SCRIPTED = """
import importlib, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
test = importlib.import_module("test_09_selfinstruct")
test.make({path!r}, test.Script())
"""


def test_ledger_is_the_same_under_any_hash_seed(tmp_path):
    paths = [tmp_path / hash_seed for hash_seed in ("0", "1", "random")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPTED.format(root=str(ROOT), path=str(path))],
            env=os.environ | {"PYTHONHASHSEED": path.name},
        )
        for path in paths
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    ledgers = [path.read_bytes() for path in paths]
    assert ledgers[0] == ledgers[1] == ledgers[2] and len(ledgers[0]) > 10_000


KILLS = """
import importlib, os, random, signal, sys, time
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
test = importlib.import_module("test_09_selfinstruct")
def child(path):  # in a process of its own, so that a SIGKILL ends nothing else
    pid = os.fork()
    if pid == 0:
        test.make(path, test.Script(), wanted=60)
        os._exit(0)
    return pid
def size(path):
    return os.path.getsize(path) if os.path.exists(path) else 0
os.waitpid(child({whole!r}), 0)
rng, kills, sizes = random.Random(0), 0, set()
while True:  # killed a moment after the file has grown by a random part of what it will be
    pid, aim = child({cut!r}), size({cut!r}) + rng.uniform(0, size({whole!r}) / 10)
    ended, status = 0, 0
    while not ended and size({cut!r}) <= aim:
        time.sleep(0.0005)
        ended, status = os.waitpid(pid, os.WNOHANG)
    if not ended:
        time.sleep(rng.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
    if os.WIFEXITED(status):
        break
    kills += 1
    sizes.add(size({cut!r}))
print(kills, len(sizes), os.WEXITSTATUS(status))
"""


def test_ledger_survives_sigkill_at_random_moments(tmp_path):
    whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    script = KILLS.format(root=str(ROOT), whole=whole, cut=cut)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    kills, places, status = map(int, done.stdout.split())
    assert kills >= 3 and places >= 3 and status == 0
    assert Path(cut).read_bytes() == Path(whole).read_bytes()


def test_maker_refuses_a_model_that_breaks_the_contract(tmp_path):
    ledger = si.Ledger(tmp_path / "l", {})
    for wrong in (lambda p, **s: [], lambda p, **s: [None] * len(p)):
        with pytest.raises(si.BackendError, match="wanted 2 texts"):
            si.Maker(wrong, "wrong", 0, ledger).ask(["a", "b"])


# Alpaca and Evol-Instruct


def test_alpaca_reads_whole_tasks_and_names_broken_ones():
    reply = si.Reply(
        " Name a river.\n4. Input: none\n4. Output: The Nile.\n###\n5. Instruction: Add them.\n"
        "5. Input: 2, 3\n5. Output: 5\n###\n6. Instruction: No fields at all here\n###\n"
        "7. Instruction: Cut off.\n7. Input: a\n7. Output: b"
    )
    whole = [
        {"instruction": "Name a river.", "input": "", "output": "The Nile."},
        {"instruction": "Add them.", "input": "2, 3", "output": "5"},
    ]
    tasks = si.read_tasks(reply)
    assert tasks[:2] == whole and tasks[2]["fault"] == "fields missing" and len(tasks) == 4
    assert si.read_tasks(si.Reply(reply, cut=True)) == tasks[:3]


def test_alpaca_reads_its_own_prompt_back():
    prompt = si.alpaca_prompt(SEEDS[:3])
    body = prompt[prompt.index("1. Instruction:") :].rsplit("###", 1)[0]
    tasks = si.read_tasks(si.Reply(body.removeprefix("1. Instruction:")))
    assert tasks == [{k: t[k] for k in ("instruction", "input", "output")} for t in SEEDS[:3]]


def test_alpaca_accepts_what_it_should(tmp_path):
    def model(prompts, *, seed, **sampling):
        replies = []
        for i in range(len(prompts)):
            a, b, c, d, e = random.Random(seed + i).sample(THINGS, 5)
            replies.append(si.Reply(
                f" Compare {a} {b} {c} {d} {e}.\nInput: none\nOutput: Both are {c}.\n###\n"
                f"5. Instruction: Count the {c} and the {d} below.\nInput: {d}\nOutput: {d}\n###\n"
                f"6. Instruction: {SEEDS[0]['instruction']}\nInput: none\nOutput: x\n"
            ))  # fmt: skip
        return replies

    ledger = si.Ledger(tmp_path / "l", {})
    items = si.alpaca(si.Maker(model, "m", 0, ledger), SEEDS, 8)
    assert len(items) >= 8 and all(i["instruction"].startswith("Compare") for i in items)
    reasons = {e["reason"] for step in ledger.steps.values() for e in step if e.get("reason")}
    assert reasons == {"too much like another task", "output repeats the input"}


@pytest.mark.parametrize(
    "instruction, output, verdict, reason",
    [
        ("Name two rivers.", "Nile, Rhine.", "Not Equal", None),
        ("Name two rivers.", "Nile, Rhine.", " Equal", "nothing new"),
        ("", "x", "Not Equal", "empty task"),
        ("Name it.", "Sorry, I cannot do that.", "Not Equal", "could not answer"),
        (
            "Name it.",
            "I am sorry for the king. " + "He ruled long and well. " * 20,
            "Not Equal",
            None,
        ),
        ("Name it.", "The. And, of?!", "Not Equal", "punctuation and stop words"),
        ("Name it.", "...", "Not Equal", "punctuation and stop words"),
        ("Name the given prompt here.", "x y z", "Not Equal", "given prompt"),
    ],
)
def test_elimination_rules(instruction, output, verdict, reason):
    fault = si.evolution_fault(instruction, output, verdict)
    assert fault is None if reason is None else reason in fault, fault


def test_evolve_eliminates_retries_and_goes_on_from_its_results(tmp_path):
    seen = Counter()

    def model(prompts, *, seed, **sampling):
        replies = []
        for i, prompt in enumerate(prompts):
            if prompt.startswith("Here is a task."):
                task = prompt.rstrip().split("\n\n")[-1].split("\n")[0]
                seen[task] += 1
                replies.append(si.Reply(f"{task} And then {random.Random(seed + i).random()}."))
            elif prompt.startswith("Do these two"):
                stuck = "Task 1: " + SEEDS[1]["instruction"] in prompt
                replies.append(si.Reply(" Equal" if stuck else " Not Equal"))
            else:
                replies.append(si.Reply("An answer of some length."))
        return replies

    ledger = si.Ledger(tmp_path / "l", {})
    made = si.evolve(si.Maker(model, "m", 0, ledger), SEEDS[:6], rounds=4, batch=4)
    assert len(made) == 5 * 4  # one of six never comes through
    assert seen[SEEDS[1]["instruction"]] == 4  # and is tried in each round
    assert seen[SEEDS[0]["instruction"]] == 1
    by_id = {item["id"]: item for item in made} | {task["id"]: task for task in SEEDS}
    for item in made:
        parent = by_id[item["parents"][0]]
        assert item["instruction"].startswith(parent["instruction"])
        assert item["ancestor"] == parent.get("ancestor", parent["id"])
    entries = [e for step in ledger.steps.values() for e in step if "verdict" in e]
    assert sum(e["reason"] == "nothing new" for e in entries) == 4
    assert {e["operator"] for e in entries} == {f"evol {name}" for name in si.OPERATIONS}


# rows of a table, and schemas


SCHEMA = {"type": "object", "required": ["kind", "price"], "additionalProperties": False,
          "properties": {"kind": {"enum": ["fruit", "tool"]},
                         "price": {"type": "number", "minimum": 0}}}  # fmt: skip
TABLE = [  # name, reply, reason; the server refuses a reply of None
    ("apple", '{"kind": "fruit", "price": 2}', ""),
    ("saw", '```json\n{"kind": "tool", "price": 9.5}\n```', ""),
    ("dog", '{"kind": "pet", "price": 2}', '$.kind is "pet", wanted one of ["fruit", "tool"]'),
    ("pear", '{"kind": "fruit", "price": -1}', "$.price is -1, wanted at least 0"),
    ("pen, red", "It is a tool.", "no JSON: Expecting value: line 1 column 1 (char 0)"),
    ("nail", '{"kind": "tool"}', "$.price is missing"),
    ("", "", "no JSON: Expecting value: line 1 column 1 (char 0)"),
    ("gun", None, "refused: content_filter"),
]


def test_rows_are_mapped_and_checked(serve, tmp_path, capsys):
    """From a CSV and from JSONL alike; the same command again asks for nothing."""
    replies = {f"What is {name}?": reply for name, reply, _ in TABLE}

    def reply(body):
        text = replies[body["messages"][0]["content"]]
        return completion(text, "stop" if text is not None else "content_filter")

    (tmp_path / "t.txt").write_text("What is {name}?")
    (tmp_path / "s.json").write_text(json.dumps(SCHEMA))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"name": n}) + "\n"
                                                 for n, _, _ in TABLE))  # fmt: skip
    (tmp_path / "rows.csv").write_text("name\n" + "".join(f'"{n}"\n' for n, _, _ in TABLE))
    server, outputs = serve(reply=reply), []
    for table in ("rows.csv", "rows.jsonl"):
        out = tmp_path / f"out-{table}"
        argv = ["--mode", "rows", "--endpoint", server.url, "--model", "m", "--out", str(out),
                "--rows", str(tmp_path / table), "--template", str(tmp_path / "t.txt"),
                "--schema", str(tmp_path / "s.json")]  # fmt: skip
        before = len(server.seen)
        assert si.main([*argv, "--plan"]) == 0 and len(server.seen) == before
        assert re.search(r"plan +about 8 prompts", capsys.readouterr().out) and not out.exists()
        assert si.main(argv) == 0
        asked = len(server.seen)
        good, bad = (
            [json.loads(line) for line in (out / name).read_text().splitlines()]
            for name in ("rows.jsonl", "rejects.jsonl")
        )
        assert [r["row"]["name"] for r in good] == ["apple", "saw"]
        assert good[1]["answer"] == {"kind": "tool", "price": 9.5}
        assert [(r["row"]["name"], r["reply"] or None, r["reason"]) for r in bad] == [
            (name, reply or None, reason) for name, reply, reason in TABLE[2:]]  # fmt: skip
        ledger = (out / "ledger.jsonl").read_bytes()
        assert si.main(argv) == 0 and len(server.seen) == asked
        assert (out / "ledger.jsonl").read_bytes() == ledger
        outputs.append((good, bad))
    assert outputs[0] == outputs[1]


class Gifted(Script):
    """Writes as many and as long tasks, instances and answers as our seeds are, half of them new;
    Alpaca's and Evol-Instruct's prompts too."""

    def reply(self, prompt, seed):
        rng = random.Random(seed)
        tasks = [
            [f"{' '.join(rng.sample(THINGS, 9))} of {rng.randrange(10**6)}.", "", "An answer. " * 8]
            if i % 2 else [SEEDS[i]["instruction"], SEEDS[i]["input"], SEEDS[i]["output"]]
            for i in range(17)
        ]  # fmt: skip
        if prompt.startswith("Here is a list"):
            return si.Reply(" " + "\n12. ".join(task[0] for task in tasks[:7]))
        if prompt.startswith("A list of 20"):
            text = "".join(f"4. Instruction: {i}\n4. Input: {x or 'none'}\n4. Output: {o}\n###\n"
                           for i, x, o in tasks)  # fmt: skip
            return si.Reply(text.removeprefix("4. Instruction:"))
        if prompt.startswith("Here is a task."):
            task = prompt.rstrip().split("\n\n")[-1]
            return si.Reply(f"{task} And say {' '.join(rng.sample(THINGS, 12))}.")
        if prompt.startswith(("Does the task", "Do these two")):
            return si.Reply(" No")
        return si.Reply(f"Input: none\nOutput: {'So it is, and so it was. ' * 3}")


@pytest.mark.parametrize("mode", ["self-instruct", "alpaca", "evol"])
def test_plan_is_within_a_factor_of_two(serve, tmp_path, capsys, mode):
    """The server does not count, so tokens are a quarter of the bytes that were really sent."""

    def reply(body):
        text = Gifted().reply(body["messages"][0]["content"], body["seed"])
        return json.dumps({"choices": [{"message": {"content": text}}]}).encode()

    server, seeds = serve(reply=reply), tmp_path / "seeds.jsonl"
    rows.write_rows(seeds, SEEDS[::5] if mode == "evol" else SEEDS)
    argv = ["--mode", mode, "--endpoint", server.url, "--model", "m", "--wanted", "30", "--seeds",
            str(seeds), "--out", str(tmp_path / "run"), "--price-in", "1000", "--price-out", "2000"]
    assert si.main([*argv, "--plan"]) == 0 and not server.seen and not (tmp_path / "run").exists()
    out = capsys.readouterr().out
    said = [float(x.replace(",", "")) for x in re.findall(r"[\d,.]*\d", out)]
    assert "stops at 1,000,000 tokens" in out and "prices" not in out
    assert si.main(argv) == 0
    spent = re.search(r"spent +([\d,]+) tokens, ([\d.]+) dollars", capsys.readouterr().out)
    for planned, real in ((said[0], len(server.seen)),
                          (said[1] + said[2], float(spent[1].replace(",", ""))),
                          (said[3], float(spent[2]))):  # fmt: skip
        assert 0.5 < planned / real < 2, (planned, real)


def test_plan_without_prices_says_so_and_dollars_need_them(capsys, tmp_path):
    argv = ["--mode", "evol", "--endpoint", "http://localhost:9/v1", "--model", "m", "--plan",
            "--out", str(tmp_path)]  # fmt: skip
    assert si.main(argv) == 0
    assert re.search("prices unknown; .*give --price-in and --price-out", capsys.readouterr().out)
    assert si.main([*argv, "--dollars", "2", "--price-in", "1"]) == 2
    assert "--dollars: give --price-in and --price-out" in capsys.readouterr().err
    argv += ["--dollars", "2", "--price-in", "1", "--price-out", "1"]
    assert si.main(argv) == 0 and "or 2.00 dollars" in capsys.readouterr().out


def test_rows_go_on_after_a_stop(tmp_path):
    table, calls = [{"name": str(i)} for i in range(7)], []

    def model(prompts, *, stop_at=None, **sampling):
        calls.extend(prompts)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return ["[]" if "3" in prompt else "1" for prompt in prompts]

    def run(path, model):
        maker = si.Maker(model, "m", 0, si.Ledger(path, {"job": 1}))
        return si.process_rows(maker, table, "{name}", {"type": "integer"}, batch=2)

    items = run(tmp_path / "whole", model)
    assert [i["answer"] for i in items] == [1, 1, 1, "[]", 1, 1, 1]
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", partial(model, stop_at=6))
    assert run(tmp_path / "cut", model) == items
    assert calls == [str(i) for i in [0, 1, 2, 3, 4, 5, 4, 5, 6]]
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes()


def test_rows_of_a_bad_table_or_schema_are_named(tmp_path, capsys):
    good = {"rows": '{"a": 1}\n', "template": "{a}", "schema": "{}"}
    for name, text, says in (
        ("rows", '{"a": 1}\n[1]\n', "rows, line 2: no JSON object"),
        ("schema", "{", "schema: no JSON"),
        ("schema", '{"pattern": "a"}', "'pattern' is not among"),
        ("rows", "", "rows: no rows"),
        ("template", "What is {b}?", "row 1: {b} in the template is no column; wanted one of a"),
    ):
        argv = ["--mode", "rows", "--endpoint", "http://localhost:9/v1", "--model", "m"]
        for key, value in (good | {name: text}).items():
            (tmp_path / key).write_text(value)
            argv += [f"--{key}", str(tmp_path / key)]
        assert si.main(argv) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1


# augmentation

PLAIN = st.text(st.characters(codec="utf-8"), max_size=80)


@settings(max_examples=150, deadline=None)
@given(PLAIN, st.integers(0, 99), st.integers(0, 5))
def test_augmentation_properties(text, seed, n):
    w = text.split()

    def rng():
        return random.Random(seed)

    assert sorted(si.swap_words(text, n, rng()).split()) == sorted(w)
    kept = iter(w)
    assert all(word in kept for word in si.delete_words(text, 0.3, rng()).split())  # in order
    assert len(si.delete_words(text, 1.0, rng()).split()) == min(1, len(w))
    assert si.delete_words(text, 0.0, rng()).split() == w
    assert len(si.replace_synonyms(text, n, rng()).split()) == len(w)
    assert si.eda(text, rng(), alpha=0) == [text]
    variants = si.eda(text, rng())
    assert len(variants) == 10 and variants[-1] == text
    assert si.mistype(text, 0.0, rng()) == text
    for change in (si.aeda, lambda t, r: si.mistype(t, 0.3, r), lambda t, r: si.eda(t, r)):
        assert change(text, rng()) == change(text, rng())


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(["big", "house", "stands", "there"]), max_size=30), st.integers(0, 99)
)
def test_aeda_without_its_marks_is_the_text(w, seed):
    new = si.aeda(" ".join(w), random.Random(seed)).split()
    marks = [x for x in new if x in ".;?:!,"]
    assert [x for x in new if x not in ".;?:!,"] == w
    assert (1 <= len(marks) <= max(1, len(w) // 3)) if w else not marks


def test_aeda_reaches_the_end():
    ends = sum(si.aeda("one two three", random.Random(i))[-1] in ".;?:!," for i in range(400))
    assert abs(ends - 100) < 4 * math.sqrt(400 * 0.25 * 0.75)  # one mark in four places


def test_eda_changes_what_it_says():
    text = "choose a big house and explain a short story"
    assert si.replace_synonyms(text, 1, random.Random(0)) != text
    new = si.insert_synonyms(text, 3, random.Random(0)).split()
    left = Counter(new) - Counter(text.split())
    assert left.total() == 3 and all(any(x in si.SYNONYMS[w] for w in text.split() if w in
                                         si.SYNONYMS) for x in left)  # fmt: skip
    typed = [si.mistype("abcdefghij" * 20, 0.05, random.Random(i)) for i in range(50)]
    changed = sum(t != "abcdefghij" * 20 for t in typed)
    assert changed == 50


def test_synonyms_reach_the_seeds():
    texts = [task["instruction"] for task in SEEDS if task["area"] == "story"]
    changed = sum(si.replace_synonyms(text, 2, random.Random(0)) != text for text in texts)
    assert changed >= 0.8 * len(texts)
    assert si.synonym("(Write,", random.Random(0)) == "(Compose,"
    assert si.synonym("--", random.Random(0)) is si.synonym("the", random.Random(0)) is None


def test_replace_in_context_changes_the_share_it_says():
    vocabulary = bpe.train([text for text, _ in stories.corpus(100, seed=0)], 400)
    encoding, mask_id = mlm.with_mask_token(vocabulary.encoding())
    torch.manual_seed(0)
    model = mlm.MaskedLM(mlm.EncoderConfig(mask_id + 1, 64, 1, 2, 16, 32))
    text = "Once upon a time, there was a kind girl named Lily."
    ids = encoding.encode_ordinary(text)
    new = si.replace_in_context(text, random.Random(0), model, encoding, mask_id)
    assert new == si.replace_in_context(text, random.Random(0), model, encoding, mask_id) != text
    assert "mask" not in new
    for short in ("", "a", "Lily"):
        assert isinstance(
            si.replace_in_context(short, random.Random(0), model, encoding, mask_id), str
        )
    assert len(ids) > 6


def test_rewrite_goes_there_and_back(tmp_path):
    def model(prompts, *, seed, **sampling):
        replies = []
        for prompt in prompts:
            text = prompt.rstrip().split("\n\n")[-1]
            if "into French" in prompt:
                replies.append(si.Reply("le " + text))
            elif "into English" in prompt:
                replies.append(si.Reply(text.removeprefix("le ") + "!", cut="long" in text))
            else:
                replies.append(si.Reply("" if "dog" in text else text.upper()))
        return replies

    maker = si.Maker(model, "m", 0, si.Ledger(tmp_path / "l", {}))
    assert si.rewrite(maker, ["cat", "dog"]) == ["CAT", "dog"]
    assert si.rewrite(maker, ["cat", "a long one"], through="French") == ["cat!", "a long one"]
    assert si.rewrite(maker, []) == []


# the copula


def test_copula_both_below_is_the_bivariate_normal():
    scipy = pytest.importorskip("scipy.stats")
    for h, k, rho in [(0, 0, 0.5), (1, -0.5, -0.8), (-2, 1, 0.95), (0.3, 0.3, -0.999), (1, 1, 0)]:
        wanted = scipy.multivariate_normal.cdf([h, k], [0, 0], [[1, rho], [rho, 1]])
        assert si.both_below(h, k, rho) == pytest.approx(wanted, abs=2e-5)
    assert si.both_below(0, 0, 0.6) == pytest.approx(0.25 + math.asin(0.6) / (2 * math.pi))


def test_copula_keeps_shares_and_pairs():
    rng = np.random.default_rng(0)
    z = rng.standard_normal((4000, 1)) * [0.9, -0.7, 0.5, 0] + rng.standard_normal((4000, 4)) * 0.6
    rows = z < [0.2, -0.5, 0.8, 0]
    drawn = si.Copula(rows).sample(40_000, seed=1)
    assert np.abs(drawn.mean(0) - rows.mean(0)).max() < 0.01
    pairs, wanted = drawn.T @ drawn.astype(float), rows.T @ rows.astype(float)
    assert np.abs(pairs / 40_000 - wanted / 4000).max() < 0.015
    assert np.abs(wanted / 4000 - np.outer(rows.mean(0), rows.mean(0))).max() > 0.1  # not alone
    constant = np.stack([rows[:, 0], np.ones(4000, bool), np.zeros(4000, bool)], 1)
    drawn = si.Copula(constant).sample(4000, seed=2)
    assert drawn[:, 1].mean() > 0.995 and drawn[:, 2].mean() < 0.005


# formats, folds, training rows


def test_formats_of_all_seeds():
    for task in SEEDS:
        assert rows.chat_fault(rows.chat_record(task)) is None
        assert set(rows.alpaca_record(task)) == {"instruction", "input", "output"}
        prompt, response = rows.training_text(task)
        assert task["instruction"] in prompt and task["input"] in prompt
        assert response == task["output"] and "{" not in prompt
    used = {rows.training_text(task)[0].replace(task["instruction"], "").replace(task["input"], "")
            for task in SEEDS}  # fmt: skip
    assert len(used) > 8


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("abcdefgh"), max_size=60), st.integers(1, 6))
def test_folds_keep_families_together_and_are_even(ancestors, k):
    folds = rows.grouped_folds(ancestors, k)
    assert all(
        len({f for f, a in zip(folds, ancestors) if a == name}) == 1 for name in set(ancestors)
    )
    sizes = [folds.count(i) for i in range(k)]
    largest = max(Counter(ancestors).values(), default=0)
    assert max(sizes) - min(sizes) <= largest


@pytest.fixture(scope="module")
def vocabulary():
    return bpe.train([text for text, _ in stories.corpus(100, seed=0)], 400)


def test_pack_learns_responses_only(vocabulary):
    pairs = [(f"Say {i}:", f" {'very ' * i}well") for i in range(9)] + [("x", "too long " * 99)]
    x, y, used = si.pack(pairs, vocabulary, 40)
    assert used == 9 and x.shape == y.shape and x.shape[1] == 40
    encoding, end = vocabulary.encoding(), vocabulary.end
    learned, texts = [], []
    for row, labels in zip(x.tolist(), y.tolist()):
        told = [i for i in labels if i != si.IGNORE]
        learned += told
        for place, label in enumerate(labels[:-1]):  # a label is the next input, but END's
            if label not in (si.IGNORE, end):
                assert row[place + 1] == label
        texts += [encoding.decode(part) for part in split(row, end)]
    wanted = [i for _, r in pairs[:9] for i in [*encoding.encode_ordinary(r), end]]
    assert learned == wanted
    assert [t for t in texts if t] == [p + r for p, r in pairs[:9]]
    assert len(x) < 9  # rows are shared


def split(row, end):
    parts = [[]]
    for i in row:
        if i == end:
            parts.append([])
        else:
            parts[-1].append(i)
    return parts


def test_fine_tune_learns_the_response_and_not_the_prompt(small_model):
    model = copy.deepcopy(small_model.model)
    x, y, _ = si.pack([("Once upon", " a time"), ("Lily", " was kind")], small_model.vocabulary, 48)
    with torch.no_grad():
        before = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).item()
    last = si.fine_tune(model, x, y, steps=60, batch=2, learning_rate=1e-2)
    assert last < 0.1 * before
    tuned = si.Checkpoint(model, small_model.vocabulary)
    assert tuned(["Lily", "Once upon"], temperature=0.0) == [" was kind", " a time"]
    with pytest.raises(ValueError, match="no rows"):
        si.fine_tune(model, x[:0], y[:0], steps=1)


def test_logit_distillation_brings_the_student_to_the_teacher(small_model):
    """Where texts are few, soft targets tell more than the texts: KL on other texts is lower."""
    vocabulary, teacher = small_model.vocabulary, small_model.model
    texts = small_model([""] * 40, seed=7, max_tokens=40)
    x, y, _ = si.pack([("", text) for text in texts[:20]], vocabulary, 48)
    new, _, _ = si.pack([("", text) for text in texts[20:]], vocabulary, 48)

    def kl(student):
        with torch.no_grad():
            p, q = (m(new).log_softmax(-1) for m in (teacher, student))
        return (p.exp() * (p - q)).sum(-1).mean().item()

    results = []
    for options in ({}, {"teacher": teacher, "alpha": 1.0, "temperature": 1.0}):
        torch.manual_seed(1)
        student = gpt.GPT(teacher.config)
        si.fine_tune(student, x, y, steps=80, batch=8, learning_rate=1e-2, **options)
        results.append(kl(student))
    torch.manual_seed(1)
    assert results[1] < 0.5 * kl(gpt.GPT(teacher.config)) < results[0]


# from data to what they are worth: augment, clean, folds, distil


@pytest.fixture(scope="module")
def run_of_06(tmp_path_factory):
    """A checkpoint of 06 after two steps, in the folder that --checkpoint names."""
    folder = tmp_path_factory.mktemp("06")
    texts = [story.split("\n")[0] for story, _ in stories.corpus(200, seed=0)]
    (folder / "texts").write_text("<|endoftext|>".join(texts))
    training = importlib.import_module("06_train")
    training.train(training.Config(data=str(folder / "texts"), out=str(folder / "run"),
                                   cache=str(folder / "cache"), max_steps=2, warmup_steps=1,
                                   vocab_size=400, seq_len=96))  # fmt: skip
    return folder / "run"


def test_augment_makes_data_that_folds_can_judge(run_of_06, tmp_path, capsys):
    argv = ["--out", str(tmp_path), "--steps", "1"]
    assert si.main(["--mode", "augment", *argv]) == 0
    items = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    seeds = {task["id"]: task for task in SEEDS}
    assert {i["operator"] for i in items} == {"eda", "aeda", "mistype"} and len(items) > 200
    for item in items:
        seed = seeds[item["ancestor"]]
        assert item["instruction"] != seed["instruction"] and item["output"] == seed["output"]
    texts = [i["instruction"] for i in items]
    assert len(set(texts)) == len(texts)
    capsys.readouterr()
    assert si.main(["--mode", "folds", "--checkpoint", str(run_of_06), *argv]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"^fold \d", out, re.M)) == si.FOLDS
    seen = [int(n) for n in re.findall(r"and (\d+) seeds to train on", out)]
    assert sum(len(SEEDS) - n for n in seen) == len(SEEDS)  # each seed is tested once
    # a seed has 6 variants at most, all on its side; what is trained on is of the other folds
    made = [int(n) for n in re.findall(r"^fold \d +(\d+) items", out, re.M)]
    left = int(re.search(r"^(\d+) items left out", out, re.M)[1])
    assert sum(made) + left == (si.FOLDS - 1) * len(items)


def test_clean_leaves_out_test_texts_and_near_duplicates(tmp_path):
    long = " ".join(f"w{i}" for i in range(30))
    texts = [long, long + " w30", "Quite another task.", " ".join(f"t{i}" for i in range(20))]
    items = [{"id": t[:9] + str(i), "instruction": t, "input": "", "output": "yes"}
             for i, t in enumerate(texts)]  # fmt: skip
    tests = ["so " + " ".join(f"t{i}" for i in range(3, 18))]
    ledger = si.Ledger(tmp_path / "l", {})
    maker = si.Maker(None, "none", 0, ledger)
    assert si.clean(maker, items, tests) == [items[0], items[2]]
    assert [(e["parents"], e["reason"].split(":")[0]) for e in ledger.items()] == [
        ([items[1]["id"]], "near duplicate"), ([items[3]["id"]], "in the test set")]  # fmt: skip
    assert si.clean(si.Maker(None, "none", 0, si.Ledger(tmp_path / "m", {})), items, [],
                    alike=True) == items  # fmt: skip
    silent = [items[0] | {"output": ""}]
    ledger = si.Ledger(tmp_path / "n", {})
    assert si.clean(si.Maker(None, "none", 0, ledger), silent, []) == []
    assert [e["reason"] for e in ledger.items()] == ["content is no text"]  # for a chat file


def test_distil_compares_two_students_at_equal_tokens(run_of_06, tmp_path, capsys, monkeypatch):
    def write(self, prompts, **sampling):  # two steps of training write nothing that ends
        return [si.Reply(f"Once there was a girl who had {i} kites.") for i in range(len(prompts))]

    monkeypatch.setattr(si.Checkpoint, "__call__", write)
    argv = ["--mode", "distil", "--out", str(tmp_path), "--checkpoint", str(run_of_06),
            "--requests", "4", "--steps", "2"]  # fmt: skip
    assert si.main(argv) == 0
    out = capsys.readouterr().out
    kl = {name: float(re.search(rf"^{name}.*? (\d+\.\d+) +\d", out, re.M)[1])
          for name in ("none", "response", "logit")}  # fmt: skip
    assert kl["none"] == 0 < kl["logit"] and kl["response"] > 0


# statistics


def test_interval_and_paired_test_against_scipy():
    scipy = pytest.importorskip("scipy.stats")
    for hits, n in ((0, 20), (7, 50), (200, 200), (1, 3)):
        ci = scipy.binomtest(hits, n).proportion_ci(method="wilson")
        assert si.interval(hits, n) == pytest.approx((ci.low, ci.high), abs=1e-4)
    assert si.interval(0, 20)[0] == 0 and si.interval(20, 20)[1] == 1
    a = [True] * 9 + [False] * 2 + [True] * 5
    b = [False] * 9 + [True] * 2 + [True] * 5
    assert si.paired_p(a, b) == pytest.approx(scipy.binomtest(2, 11).pvalue)
    assert si.paired_p(a, a) == 1


# the small world


def test_small_world_is_part_of_the_grammar():
    world, rng = si.SmallWorld(), random.Random(0)
    for _ in range(60):
        request, story = world.instruct(rng)
        assert stories.check(*si.read_request(request), story) == []
        assert world.fault(request) is None
    requests = [world.instruct(rng)[0] for _ in range(100)]
    drawn = world.draw(si.Copula(np.array([world.row(r) for r in requests])), 40, seed=0)
    assert len(drawn) == 40 and all(world.fault(r) is None for r in drawn)


def test_small_world_keeps_what_the_test_asks_for_out_of_all_else():
    world, rng = si.SmallWorld(), random.Random(1)

    def combination(request):
        return frozenset(si.read_request(request)[0])

    tests = {combination(world.instruct(rng, test=True)[0]) for _ in range(150)}
    requests = [world.instruct(rng)[0] for _ in range(150)]
    others = {combination(r) for r in requests}
    assert not tests & others and len(tests) > 20 and len(others) > 80
    spoiled = [world.spoil(r, 0.0, rng) for r in requests]
    assert not tests & {combination(r) for r in spoiled}
    assert all(world.spoil(r, 1.0, rng) == r for r in requests)
    for old, new in zip(requests, spoiled):  # the kinds and the features stay
        assert world.row(old) == world.row(new)
    same = sum(a == b for old, new in zip(requests, spoiled)
               for a, b in zip(si.read_request(old)[0], si.read_request(new)[0]))  # fmt: skip
    n, p = 3 * len(requests), 1 / si.WORDS
    assert abs(same - n * p) < 4 * math.sqrt(n * p * (1 - p)) + 0.05 * n  # held-out ones redrawn
    request = next(iter(world.instruct(rng, test=True)))
    assert world.fault(request) == "held out for the test"


@pytest.mark.parametrize(
    "text, reason",
    [
        ("Words: a\nStory:", "no request"),
        ("Words: sunny, park\nFeatures: \nStory:", "three words"),
        ("Words: sunny, windy, park\nFeatures: \nStory:", "three words"),
        ("Words: sunny, xyz, park\nFeatures: \nStory:", "unknown word"),
        ("Words: sunny, rabbit, park\nFeatures: Love\nStory:", "unknown feature"),
        ("Words: sunny, rabbit, park\nFeatures: Moral, Moral\nStory:", "unknown feature"),
        ("Words: sunny, rabbit, park\nFeatures: Moral, Dialogue\nStory:", None),
    ],
)
def test_request_filters(text, reason):
    fault = si.SmallWorld().fault(text)
    assert fault is None if reason is None else reason in fault


# the command


def test_command_against_a_server_accepts_the_known_set(serve, tmp_path, capsys):
    """The server plays the scripted model, and loses two answers. Then again, for free."""
    script = Script()

    def reply(body):
        text = script.reply(body["messages"][0]["content"], body["seed"])
        return completion(str(text), "length" if text.cut else "stop")

    server = serve([(429, {"Retry-After": "0.1"}), b"broken"], reply=reply)
    argv = ["--mode", "self-instruct", "--endpoint", server.url, "--model", "tiny",
            "--wanted", "12", "--out", str(tmp_path / "run")]  # fmt: skip
    assert si.main(argv) == 0
    asked = len(server.seen)
    wanted, _ = make(tmp_path / "direct", Script())
    lines = (tmp_path / "run" / "alpaca.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [rows.alpaca_record(item) for item in wanted]
    chat = rows.read_rows(tmp_path / "run" / "chat.jsonl")
    assert all(rows.chat_fault(record) is None for record in chat) and len(chat) == len(lines)
    ledger = (tmp_path / "run" / "ledger.jsonl").read_bytes()
    assert si.main(argv) == 0
    assert len(server.seen) == asked
    assert (tmp_path / "run" / "ledger.jsonl").read_bytes() == ledger
    (tmp_path / "run" / "ledger.jsonl").unlink()  # the answers are kept apart from it
    assert si.main(argv) == 0
    assert len(server.seen) == asked
    assert (tmp_path / "run" / "ledger.jsonl").read_bytes() == ledger


def test_command_over_budget_writes_what_it_has_and_goes_on(serve, tmp_path, capsys):
    """From a budget for a part to one for all: as in one run, and nothing is paid for twice."""

    def reply(body):  # it does not count tokens
        text = Script().reply(body["messages"][0]["content"], body["seed"])
        choice = {"message": {"content": text}, "finish_reason": "length" if text.cut else "stop"}
        return json.dumps({"choices": [choice]}).encode()

    server, out = serve(reply=reply), tmp_path / "run"
    argv = ["--mode", "self-instruct", "--endpoint", server.url, "--model", "tiny",
            "--wanted", "24", "--out", str(out)]  # fmt: skip
    assert si.main([*argv, "--tokens", "20000"]) == 2
    said = capsys.readouterr()
    assert "over budget" in said.err and said.err.count("\n") == 1 and "spent" in said.out
    part = rows.read_rows(out / "alpaca.jsonl")
    assert si.main(argv) == 0
    whole = rows.read_rows(out / "alpaca.jsonl")
    wanted, _ = make(tmp_path / "direct", Script(), wanted=24)
    assert whole == [rows.alpaca_record(item) for item in wanted]
    assert 0 < len(part) < len(whole) and part == whole[: len(part)]
    sent = [json.dumps(body) for body in server.seen]
    assert len(set(sent)) == len(sent)


@pytest.mark.parametrize("mode", ["self-instruct", "alpaca", "evol"])
def test_command_with_a_model_that_says_nothing_fails_soon(serve, tmp_path, capsys, mode):
    server = serve(reply=lambda body: completion(""))
    rows.write_rows(tmp_path / "seeds", SEEDS[::6])
    argv = ["--mode", mode, "--endpoint", server.url, "--model", "m", "--out", str(tmp_path / "r"),
            "--seeds", str(tmp_path / "seeds")]  # fmt: skip
    assert si.main(argv) == 2
    error = capsys.readouterr().err
    says = "no data" if mode == "evol" else "5 requests running without an accepted task"
    assert says in error and error.count("\n") == 1
    assert len(server.seen) == (3 * si.ROUNDS * len(SEEDS[::6]) if mode == "evol" else 5 * 5)
    assert rows.read_rows(tmp_path / "r" / "items.jsonl") == []


def test_command_has_its_folder_alone(tmp_path, capsys):
    argv = ["--mode", "augment", "--out", str(tmp_path / "run")]
    with si.training.locked(tmp_path / "run"):
        assert si.main(argv) == 2
    assert "another process" in capsys.readouterr().err
    assert si.main(argv) == 0


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--endpoint", "http://localhost:9/v1", "--model", "m"], "stories asks no server"),
        (["--checkpoint", "x"], "stories trains a model of its own"),
        (["--mode", "distil", "--endpoint", "http://h/v1", "--model", "m"], "asks no server"),
        (["--price-in", "1"], "--price-out"),
        (["--price-in", "nan", "--price-out", "1"], "--price-in nan"),
        (["--mode", "alpaca", "--plan", "--endpoint", "ftp://h", "--model", "m"], "a server such"),
        (["--mode", "alpaca", "--plan", "--endpoint", "https://h/v1", "--model", "m"], "no key"),
        (["--mode", "alpaca", "--endpoint", "http://localhost/v1", "--model", "m",
          "--key-variable", "NOT_THERE"], "no key in the environment as NOT_THERE"),
        (["--mode", "nonsense"], "wanted one of"),
        (["--mode", "alpaca"], "give --endpoint"),
        (["--mode", "alpaca", "--endpoint", "http://localhost:9/v1"], "give the --model"),
        (["--mode", "alpaca", "--endpoint", "https://h/v1", "--model", "m"], "OPENAI_API_KEY"),
        (["--mode", "alpaca", "--checkpoint", "OUT/none"], "no checkpoint"),
        (["--mode", "rows", "--checkpoint", "x"], "--template FILE"),
        (["--mode", "folds"], "give --checkpoint"),
        (["--mode", "alpaca", "--checkpoint", "x", "--seeds", "OUT/none"], "No such file"),
        (["--wanted", "0"], "wanted >= 1"),
    ],
)
def test_bad_input_is_one_line(argv, says, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    argv = [a.replace("OUT", str(tmp_path)) for a in [*argv, "--out", "OUT/run"]]
    assert si.main(argv) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_experiment_without_a_single_good_story_says_so(tmp_path, capsys, monkeypatch):
    argv = ["--out", str(tmp_path), "--base-texts", "200", "--base-steps", "2", "--requests", "6",
            "--samples", "1", "--held-out", "4", "--rounds", "1"]  # fmt: skip
    assert si.main(argv) == 2
    assert "no story has passed" in capsys.readouterr().err
    ledger = (tmp_path / "ledger.jsonl").read_bytes()

    monkeypatch.setattr(si, "fine_tune", None)
    assert si.main(argv) == 2  # goes on from the base model and the ledger
    assert "no story has passed" in capsys.readouterr().err
    assert (tmp_path / "ledger.jsonl").read_bytes() == ledger


def test_what_was_cut_off_is_not_taken_for_a_task(tmp_path):
    cut = si.Reply("Name a river.\n4. Write a poem about the", cut=True)
    assert [t["instruction"] for t in si.read_instructions(cut)] == ["Name a river."]
    task = {"id": "a", "instruction": "Name a river.", "input": "", "output": "The Rhine."}

    def model(prompts, **sampling):
        return [si.Reply("Name a river and say where it ends, in the", cut=True) for _ in prompts]

    maker = si.Maker(model, "none", 0, si.Ledger(tmp_path / "l", {}))
    assert si.evolve(maker, [task | {"ancestor": "a"}], rounds=1) == []
    assert [e["reason"] for e in maker.ledger.items()] == ["cut off"]
