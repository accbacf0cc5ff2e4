"""Tests of 09_selfinstruct.py: against rouge_score, nltk and scipy, a real server, and by property.

Run: python -m pytest tests/test_09_selfinstruct.py
"""

import copy
import http.server
import importlib
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import bpe, stories

si = importlib.import_module("09_selfinstruct")
gpt = importlib.import_module("03_gpt")
mlm = importlib.import_module("02_mlm")

ROOT = Path(__file__).parent.parent
SEEDS = si.load_seeds(ROOT / "data" / "seed_tasks.jsonl")
TEXTS = [task[k] for task in SEEDS for k in ("instruction", "input", "output") if task[k]]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
        ('{"id": "a", "instruction": 3}', "instruction is 3, wanted str"),
        (json.dumps(SEEDS[0]), "same id"),
    ],
)
def test_malformed_seeds_are_named(tmp_path, line, says):
    path = tmp_path / "seeds.jsonl"
    path.write_text(json.dumps(SEEDS[0]) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=says):
        si.load_seeds(path)


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
    """The first token over 4000 seeds: counts within 4 standard deviations of n p."""
    vocabulary = small_model.vocabulary
    ids = torch.tensor([[vocabulary.end, *vocabulary.encoding().encode_ordinary("Lily")]])
    with torch.no_grad():
        p = small_model.model(ids)[0, -1].softmax(-1).double()
    n = 4000
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
    with pytest.raises(si.BackendError, match="seq_len=48"):
        small_model(["word " * 60])


# back end: a server that misbehaves


def completion(text, finish="stop", prompt_tokens=10, completion_tokens=5):
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return json.dumps({"choices": [choice], "usage": usage}).encode()


class Server(http.server.ThreadingHTTPServer):
    """Plays a script of faults, then answers. `seen` are the requests, `most` the most at once."""

    daemon_threads = True

    def __init__(self, script=(), reply=lambda body: completion("fine")):
        self.script, self.reply = list(script), reply
        self.seen, self.headers, self.times, self.now, self.most = [], [], [], 0, 0
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, *_):
        pass  # clients that gave up


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):  # noqa: N802
        s = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with s.lock:
            s.seen.append(body)
            s.headers.append(dict(self.headers))
            s.times.append(time.monotonic())
            s.now += 1
            s.most = max(s.most, s.now)
            fault = s.script.pop(0) if s.script else None
        try:
            self.answer(fault, body)
        finally:
            with s.lock:
                s.now -= 1

    def answer(self, fault, body):
        status, headers, data, claimed = 200, {}, None, None
        if isinstance(fault, tuple):
            status, headers = fault
            data = b'{"error": "no"}'
        elif fault == "hang":
            time.sleep(1.5)
            return
        elif fault == "drip":
            self.send_response(200)
            self.end_headers()
            for _ in range(30):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.1)
            return
        elif fault == "cut":
            data = self.server.reply(body)[:20]
            claimed = 500
        elif isinstance(fault, bytes):
            data = fault
        data = self.server.reply(body) if data is None else data
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(claimed or len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def serve(monkeypatch):
    servers = []
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def start(*args, **kwargs):
        server = Server(*args, **kwargs)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def endpoint(server, path, **changes):
    options = {"timeout": 0.5, "first_wait": 0.01} | changes
    return si.Endpoint(server.url, "tiny", path / "answers.jsonl", **options)


@pytest.mark.parametrize(
    "fault",
    [
        (500, {}), (503, {}), (429, {}), (408, {}), "hang", "drip", "cut",
        b"", b"not json", b"[]", b"{}", b'{"choices": []}', b"\xff\xfe",
        completion(None), completion(3), completion(["a"]), completion("x", completion_tokens="5"),
        completion("x", prompt_tokens=None), completion("x", prompt_tokens=-1),
    ],
    ids=str,
)  # fmt: skip
def test_endpoint_outlives_a_fault(serve, tmp_path, fault):
    server = serve([fault])
    assert endpoint(server, tmp_path)(["hello"], max_tokens=7) == ["fine"]
    assert len(server.seen) == 2
    assert server.seen[1]["messages"] == [{"role": "user", "content": "hello"}]


def test_endpoint_waits_as_long_as_it_is_told(serve, tmp_path):
    server = serve([(429, {"Retry-After": "1"})])
    assert endpoint(server, tmp_path)(["a"]) == ["fine"]
    assert server.times[1] - server.times[0] >= 1
    later = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))
    assert 27 < si.retry_after(later) <= 31
    assert si.retry_after("soon") == si.retry_after(None) == si.retry_after("-3") == 0
    server = serve([(429, {"Retry-After": "9999"})])
    with pytest.raises(si.BackendError, match="9999 s"):
        endpoint(server, tmp_path / "b")(["a"])


@pytest.mark.parametrize("status", [400, 401, 403, 404, 307])
def test_endpoint_gives_up_where_no_try_will_help(serve, tmp_path, status):
    server = serve([(status, {"Location": "http://127.0.0.1:1/"})] * 3)
    with pytest.raises(si.BackendError, match=f"status {status}"):
        endpoint(server, tmp_path)(["a"])
    assert len(server.seen) == 1


def test_endpoint_gives_up_after_its_tries_and_keeps_what_it_has(serve, tmp_path):
    def reply(body):
        bad = body["messages"][0]["content"] == "bad"
        return b"broken" if bad else completion("fine")

    server = serve(reply=reply)
    with pytest.raises(si.BackendError, match="after 3 tries"):
        endpoint(server, tmp_path, tries=3, concurrency=1)(["good", "bad", "never asked"])
    assert [b["messages"][0]["content"] for b in server.seen] == ["good", "bad", "bad", "bad"]
    assert len(si.Journal(tmp_path / "answers.jsonl").entries) == 1


def test_endpoint_unreachable_is_one_line(tmp_path):
    dead = si.Endpoint("http://127.0.0.1:9/v1", "m", tmp_path / "a", tries=2, first_wait=0.01)
    with pytest.raises(si.BackendError, match="unreachable.*refused.*after 2 tries") as error:
        dead(["a"])
    assert "\n" not in str(error.value)
    assert dead.tokens == 0


def test_endpoint_asks_nothing_twice_even_across_processes(serve, tmp_path):
    server = serve(reply=lambda body: completion(body["messages"][0]["content"].upper(), "length"))
    first = endpoint(server, tmp_path)
    assert first(["a", "b"], seed=3, temperature=0.5) == ["A", "B"]
    again = endpoint(server, tmp_path)
    replies = again(["a", "b"], seed=3, temperature=0.5)
    assert replies == ["A", "B"] and all(reply.cut for reply in replies)
    assert len(server.seen) == 2 and again.tokens == first.tokens == 30
    again(["a", "b"], seed=3, temperature=0.6)
    assert len(server.seen) == 4
    assert {(b["seed"], b["temperature"]) for b in server.seen} == {
        (3, 0.5), (4, 0.5), (3, 0.6), (4, 0.6)}  # fmt: skip


def test_endpoint_concurrency_is_bounded_and_used(serve, tmp_path):
    def slow(body):
        time.sleep(0.03)
        return completion("x")

    server = serve(reply=slow)
    endpoint(server, tmp_path, concurrency=3)([str(i) for i in range(12)])
    assert server.most == 3


def test_endpoint_stays_within_its_budget(serve, tmp_path):
    """The server bills all that it may: the sum must not pass the limit, and is used up to it."""
    def reply(body):
        most = len(body["messages"][0]["content"]) + 16
        return completion("x", prompt_tokens=most, completion_tokens=body["max_tokens"])

    server = serve(reply=reply)
    limited = endpoint(server, tmp_path, limits=si.Limits(tokens=300), concurrency=4)
    with pytest.raises(si.BackendError, match="over budget.*--tokens 300"):
        limited(["aaaa"] * 20, max_tokens=30)  # 50 tokens each
    assert limited.tokens == 300 and len(server.seen) == 6
    limits = si.Limits(tokens=10**9, dollars=0.01, dollars_per_million_out=100.0)
    limited = endpoint(server, tmp_path / "b", limits=limits, concurrency=1)
    with pytest.raises(si.BackendError, match="over budget.*dollars"):
        limited(["aaaa"] * 20, max_tokens=30)  # 0.003 dollars each
    assert len(server.seen) == 6 + 3
    again = endpoint(server, tmp_path / "b", limits=limits)  # a new process has no new budget
    with pytest.raises(si.BackendError, match="over budget"):
        again(["other"], max_tokens=30)


def test_endpoint_counts_what_may_have_been_billed(serve, tmp_path):
    for fault, billed in (((500, {}), 0), ((429, {}), 0), (b"broken", 16 + 1 + 9), ("cut", 26)):
        model = endpoint(serve([fault]), tmp_path / str(fault)[:5])
        model(["a"], max_tokens=9)
        assert model.tokens == 15 + billed, fault


def test_endpoint_key_goes_to_the_server_and_nowhere_else(serve, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    server = serve()
    model = endpoint(server, tmp_path)
    model(["a"])
    assert server.headers[0]["Authorization"] == "Bearer sk-very-secret"
    assert "secret" not in repr(vars(model))
    for path in tmp_path.rglob("*"):
        assert "secret" not in path.read_text()
    server = serve([(401, {}), (401, {})])
    Handler_data = si.urllib.error.HTTPError  # the body of an error may repeat the key
    assert Handler_data
    assert model.hide("wrong key sk-very-secret") == "wrong key [key]"
    assert "secret" not in "".join(capfd.readouterr())
    with pytest.raises(si.BackendError, match="https only"):
        si.Endpoint("http://example.org/v1", "m", tmp_path / "x")
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(si.BackendError, match="OPENAI_API_KEY"):
        si.Endpoint("https://example.org/v1", "m", tmp_path / "x")
    for url in ("example.org", "ftp://example.org", "http://user:pass@localhost/v1"):
        with pytest.raises(si.BackendError, match="--endpoint"):
            si.Endpoint(url, "m", tmp_path / "x")


# journal and ledger


def test_journal_cut_at_any_byte_keeps_whole_groups(tmp_path):
    path = tmp_path / "j.jsonl"
    groups = [[{"a": 1}], [{"b": "\u00e9\n"}, {"c": 2}, {"d": None}], [{"e": [1, 2]}]]
    journal, ends = si.Journal(path), [0]
    for group in groups:
        journal.add(group)
        ends.append(path.stat().st_size)
    data = path.read_bytes()
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        whole = sum(end <= cut for end in ends) - 1
        journal = si.Journal(path)
        assert journal.entries == sum(groups[:whole], [])
        for group in groups[whole:]:
            journal.add(group)
        assert path.read_bytes() == data


def test_journal_damaged_inside_is_an_error(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_text('{"a": 1, "last": true}\nnonsense\n{"b": 1, "last": true}\n')
    with pytest.raises(ValueError, match="line 2"):
        si.Journal(path)


def test_ledger_refuses_other_settings(tmp_path):
    si.Ledger(tmp_path / "l", {"seed": 0, "wanted": 3})
    si.Ledger(tmp_path / "l", {"seed": 0, "wanted": 3})
    with pytest.raises(ValueError, match="another wanted"):
        si.Ledger(tmp_path / "l", {"seed": 0, "wanted": 4})


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
@given(st.lists(st.sampled_from("abcd"), max_size=90), st.lists(st.sampled_from("abcd"), max_size=90))
def test_common_is_the_longest_common_subsequence(a, b):
    assert si.common(si.places(a), len(a), b) == brute_lcs(a, b)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(max_codepoint=127), max_size=60), st.text(st.characters(max_codepoint=127), max_size=60))
def test_rouge_l_equals_rouge_score_on_any_ascii(a, b):
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    assert si.rouge_l(a, b) == scorer.score(a, b)["rougeL"].fmeasure


def test_rouge_l_equals_rouge_score_on_texts_and_is_20_times_as_fast():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    texts = [text for text in TEXTS if text.isascii() and len(si.words(text)) > 4][:60]
    pairs = list(itertools.combinations(texts, 2))
    start = time.process_time()
    wanted = [scorer.score(a, b)["rougeL"].fmeasure for a, b in pairs]
    theirs = time.process_time() - start
    assert [si.rouge_l(a, b) for a, b in pairs] == wanted
    # as the gate compares: each text is split once, the candidate's table is made once
    gate = si.NoveltyGate(texts)
    start = time.process_time()
    for text in texts:
        gate.nearest(text, count=len(texts))
    ours = time.process_time() - start
    assert theirs / 2 > 20 * ours / 2 / 2  # the gate sees every pair twice, the scorer once


def test_words_of_other_scripts():
    assert si.words("Don't stop_me NOW!") == ["don", "t", "stop", "me", "now"]
    assert si.words("Caf\u00e9, STRASSE stra\u00dfe") == ["caf\u00e9", "strasse", "strasse"]
    assert si.words("cafe\u0301") == si.words("caf\u00e9")
    assert si.words("\u0939\u093f\u0928\u094d\u0926\u0940 \u092d\u093e\u0937\u093e") == [
        "\u0939\u093f\u0928\u094d\u0926\u0940", "\u092d\u093e\u0937\u093e"]  # fmt: skip
    assert si.words("\u4eca\u5929\u5929\u6c14") == list("\u4eca\u5929\u5929\u6c14")
    assert si.rouge_l("\u4eca\u5929\u5929\u6c14\u597d", "\u4eca\u5929\u5929\u6c14\u574f") == 0.8
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


def test_gate_compares_few():
    texts = [story.split("\n")[0] for story, _ in stories.corpus(400, seed=1)]
    gate = si.NoveltyGate(texts)
    for story, _ in stories.corpus(50, seed=2):
        gate.nearest(story.split("\n")[0], above=0.7)
    assert gate.compared < 0.1 * 50 * 400


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
    values = np.stack([hashes.signature(" ".join(f"{t} {i}x{t}" for i in range(9))) for t in range(99)])
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
    assert si.repetition_fault("one line\n" * 5) == "repeated lines"
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


class Script:
    """A model whose replies are known: proposals by number of the call, instances by task."""

    def __init__(self):
        self.calls, self.proposals = 0, 0

    def __call__(self, prompts, *, seed, **sampling):
        self.calls += 1
        return [self.reply(prompt, seed + i) for i, prompt in enumerate(prompts)]

    def reply(self, prompt, seed):
        if prompt.startswith("Here is a list"):
            rng = random.Random(seed)
            number = rng.randrange(10**6)
            return si.Reply(
                f" Count the {number} apples of basket {number} by hand.\n"
                f"10. {SEEDS[3]['instruction']}\n"  # a seed again
                f"11. Too short.\n12. Draw a picture of {number} quiet dogs.\n"
                f"13. Decide whether {number} rivers near {number} towns flood every spring."
            )
        if prompt.startswith("Does the task"):
            return si.Reply(" Yes" if "Decide" in prompt.split("Task:")[-1] else " No")
        if "Decide" in prompt.split("Task:")[-1]:
            return si.Reply("Output: yes\nInput: It rains a lot.\nOutput: no\nInput: It is dry.\n"
                            "Output: maybe\nInput: cut he", cut=True)  # fmt: skip
        number = int(re.search(r"\d+", prompt.split("Task:")[-1])[0])
        if number % 2:
            return si.Reply("Input: three\nOutput: 3\n\nInput: three\nOutput: 4\n")
        return si.Reply("Input: none\nOutput: Done.\n\nInput: two\nOutput: two\n\nInput: x\nOutput:")


def make(path, model, wanted=12, seed=0):
    ledger = si.Ledger(path, {"wanted": wanted})
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
            assert e["reason"].endswith("picture") or e["reason"].endswith("draw")
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
    assert len(good) >= 12 or len(tasks) > 1000
    for task in good:
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
        e["id"] for e in entries if e["operator"] == "instance" and e["verdict"] == "accepted"}  # fmt: skip
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


SCRIPTED = """
import importlib, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
test = importlib.import_module("test_09_selfinstruct")
test.make({path!r}, test.Script())
"""


def test_ledger_is_the_same_under_any_hash_seed(tmp_path):
    ledgers = []
    for hash_seed in ("0", "1", "random"):
        path = str(tmp_path / hash_seed)
        subprocess.run(
            [sys.executable, "-c", SCRIPTED.format(root=str(ROOT), path=path)],
            env=os.environ | {"PYTHONHASHSEED": hash_seed}, check=True, timeout=120,
        )  # fmt: skip
        ledgers.append(Path(path).read_bytes())
    assert ledgers[0] == ledgers[1] == ledgers[2] and len(ledgers[0]) > 10_000


def test_maker_refuses_a_model_that_breaks_the_contract(tmp_path):
    ledger = si.Ledger(tmp_path / "l", {})
    for wrong in (lambda p, **s: [], lambda p, **s: [None] * len(p)):
        with pytest.raises(si.BackendError, match="wanted 2 texts"):
            si.Maker(wrong, "wrong", 0, ledger).ask(["a", "b"])
