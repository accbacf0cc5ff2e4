"""Tests of data/endpoint.py: a real server on this machine, which misbehaves.

Run: python -m pytest tests/test_data_endpoint.py
"""

import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from data import endpoint as client

ROOT = Path(__file__).parent.parent


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
            status, headers, *body = fault
            data = body[0] if body else b'{"error": "no"}'
            claimed = 500 if body == [b"cut"] else None
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
    options = {"timeout": 0.5, "first_wait": 0.01} | changes  # short: these servers are near
    return client.Endpoint(server.url, "tiny", path / "answers.jsonl", **options)


@pytest.mark.parametrize(
    "fault",
    [
        (500, {}), (503, {}), (429, {}), (408, {}), "hang", "drip", "cut",
        b"", b"not json", b"[]", b"{}", b'{"choices": []}', b"\xff\xfe",
        b"<html>Not here</html>", b'{"choices": "abc"}', b'{"choices": [{"message": "text"}]}',
        completion(3), completion(["a"]), (500, {}, b"cut"),
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
    assert 27 < client.retry_after(later) <= 31
    assert client.retry_after("soon") == client.retry_after(None) == client.retry_after("-3") == 0
    server = serve([(429, {"Retry-After": "9999"})])
    with pytest.raises(client.BackendError, match="9999 s"):
        endpoint(server, tmp_path / "b")(["a"])


@pytest.mark.parametrize("status", [400, 401, 403, 404, 302, 307])
def test_endpoint_gives_up_where_no_try_will_help(serve, tmp_path, status):
    server = serve([(status, {"Location": "http://127.0.0.1:1/"})] * 3)
    with pytest.raises(client.BackendError, match=f"status {status}"):
        endpoint(server, tmp_path)(["a"])
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    "fault, reason",
    [
        (completion(None, "content_filter"), "content_filter"),
        (completion(None, "stop"), "stop"),
        (completion(None, None), "no content"),
        (b'{"choices": [{"message": {"content": null, "refusal": "I will not."}}]}', "I will not."),
        ((400, {}, b'{"error": {"code": "content_filter"}}'), "content_filter"),
    ],
)
def test_endpoint_takes_a_refusal_for_an_answer_and_asks_the_others(serve, tmp_path, fault, reason):
    server = serve([fault])
    model = endpoint(server, tmp_path, concurrency=1)
    replies = model(["bad", "good"])
    assert replies == ["", "fine"] and [r.refused for r in replies] == [reason, ""]
    again = endpoint(server, tmp_path)(["bad", "good"])
    assert [r.refused for r in again] == [reason, ""] and len(server.seen) == 2


def test_endpoint_takes_a_reply_that_was_thought_to_its_end_for_cut(serve, tmp_path):
    reply = endpoint(serve([completion(None, "length")]), tmp_path)(["a"])[0]
    assert (reply, reply.cut, reply.refused) == ("", True, "")


@pytest.mark.parametrize("usage", ["", ', "usage": null', ', "usage": {"prompt_tokens": "3"}',
                                   ', "usage": {"prompt_tokens": -1, "completion_tokens": 2}'])
def test_endpoint_counts_by_length_where_the_server_does_not(serve, tmp_path, usage):
    data = '{"choices": [{"message": {"content": "Four words are here."}}]' + usage + "}"
    model = endpoint(serve([data.encode()]), tmp_path)
    replies = model(["How many?"], max_tokens=50)
    assert replies == ["Four words are here."] and not replies[0].cut
    assert model.spent == [3, 5]  # 9 and 20 bytes
    model = endpoint(serve([data.encode()]), tmp_path / "b")
    assert model(["How many?"], max_tokens=5)[0].cut


@pytest.mark.parametrize("fault", [b"<html>Sign in</html>", b"{}", "cut"], ids=str)
def test_endpoint_asks_three_times_at_most_where_it_may_pay(serve, tmp_path, fault):
    server = serve([fault] * 9)
    with pytest.raises(client.BackendError, match="after 3 tries") as error:
        endpoint(server, tmp_path)(["a"])
    assert len(server.seen) == 3 and "\n" not in str(error.value)


def test_endpoint_sends_nothing_more_after_ctrl_c(serve, tmp_path):
    """Two of thirty are under way when it comes: they are waited for, and kept."""

    def slow(body):
        if len(server.seen) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        return completion("fine")

    server = serve(reply=slow)
    with pytest.raises(KeyboardInterrupt):
        endpoint(server, tmp_path, concurrency=2)([str(i) for i in range(30)])
    assert len(server.seen) == 4
    assert len(client.Journal(tmp_path / "answers.jsonl").entries) == 4


def test_endpoint_gives_up_after_its_tries_and_keeps_what_it_has(serve, tmp_path):
    def reply(body):
        bad = body["messages"][0]["content"] == "bad"
        return b"broken" if bad else completion("fine")

    server = serve(reply=reply)
    with pytest.raises(client.BackendError, match="after 3 tries"):
        endpoint(server, tmp_path, tries=3, concurrency=1)(["good", "bad", "never asked"])
    assert [b["messages"][0]["content"] for b in server.seen] == ["good", "bad", "bad", "bad"]
    entries = client.Journal(tmp_path / "answers.jsonl").entries
    assert ["text" in entry for entry in entries] == [True, False, False, False]
    lost = sum(entry["in"] + entry["out"] for entry in entries[1:])
    again = endpoint(server, tmp_path)  # what may have been billed counts in the next process too
    assert again.tokens == entries[0]["in"] + entries[0]["out"] + lost


def test_endpoint_unreachable_is_one_line(tmp_path):
    dead = client.Endpoint("http://127.0.0.1:9/v1", "m", tmp_path / "a", tries=2, first_wait=0.01)
    with pytest.raises(client.BackendError, match="unreachable.*refused.*after 2 tries") as error:
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
    limited = endpoint(server, tmp_path, limits=client.Limits(tokens=300), concurrency=4)
    with pytest.raises(client.BackendError, match="over budget.*tokens, above the limit of 300"):
        limited(["aaaa"] * 20, max_tokens=30)  # 50 tokens each
    assert limited.tokens == 300 and len(server.seen) == 6
    limits = client.Limits(tokens=10**9, dollars=0.01, price_in=0.0, price_out=100.0)
    limited = endpoint(server, tmp_path / "b", limits=limits, concurrency=1)
    with pytest.raises(client.BackendError, match="over budget.*dollars"):
        limited(["aaaa"] * 20, max_tokens=30)  # 0.003 dollars each
    assert len(server.seen) == 6 + 3
    again = endpoint(server, tmp_path / "b", limits=limits)  # a new process has no new budget
    with pytest.raises(client.BackendError, match="over budget"):
        again(["other"], max_tokens=30)
    with pytest.raises(ValueError, match="dollars=2: no limit without"):
        client.Limits(dollars=2, price_in=1.0)


def test_endpoint_waits_for_what_is_set_aside_before_it_refuses(serve, tmp_path):
    """Each may cost 50 of 400 tokens and costs 15: 24 fit when they come one after another."""

    def slow(body):
        time.sleep(0.02)
        return completion("x")

    server = serve(reply=slow)
    limited = endpoint(server, tmp_path, limits=client.Limits(tokens=400), concurrency=8)
    with pytest.raises(client.BackendError, match="over budget"):
        limited(["aaaa"] * 40, max_tokens=30)
    assert len(server.seen) == 24 and limited.tokens == 360 and limited.reserved == [0, 0]


@pytest.mark.parametrize("fault", [(500, {}), (401, {}), (401, {}, b"cut"), (404, {}, b"cut"),
                                   b"broken", "cut", "hang"], ids=str)  # fmt: skip
def test_endpoint_keeps_nothing_set_aside_after_a_failure(serve, tmp_path, fault):
    model = endpoint(serve([fault] * 6), tmp_path, tries=2, timeout=0.2)
    with pytest.raises(client.BackendError) as error:
        model(["a"], max_tokens=9)
    assert model.reserved == [0, 0]
    assert model.tokens == (0 if isinstance(fault, tuple) else 2 * (16 + 1 + 9))
    if isinstance(fault, tuple) and fault[0] < 500:
        assert f"status {fault[0]}" in str(error.value)


def test_endpoint_counts_what_may_have_been_billed(serve, tmp_path):
    for fault, billed in (((500, {}), 0), ((429, {}), 0), (b"broken", 16 + 1 + 9), ("cut", 26)):
        model = endpoint(serve([fault]), tmp_path / str(fault)[:5])
        model(["a"], max_tokens=9)
        assert model.tokens == 15 + billed, fault


def test_endpoint_key_goes_to_the_server_and_nowhere_else(serve, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    server = serve([(500, {}, b"no sk-very-secret")])
    model = endpoint(server, tmp_path, key_variable="MY_KEY")
    model(["a"])
    assert server.headers[1]["Authorization"] == "Bearer sk-very-secret"
    assert "secret" not in repr(vars(model))
    for path in tmp_path.rglob("*"):
        assert "secret" not in path.read_text()
    refusing = serve([(401, {}, b"wrong key sk-very-secret")])
    with pytest.raises(client.BackendError, match="wrong key .key.") as error:
        endpoint(refusing, tmp_path / "b", key_variable="MY_KEY")(["a"])
    assert "secret" not in str(error.value) + "".join(capfd.readouterr())


def test_endpoint_takes_the_key_that_it_should(serve, tmp_path, monkeypatch):
    def make(url, **options):
        return client.Endpoint(url, "m", tmp_path / "x", **options)

    assert make("http://example.org/v1").key() == ""  # as on a machine in the next room
    with pytest.raises(client.BackendError, match="no key in the environment as OPENAI_API_KEY"):
        make("https://example.org/v1")
    with pytest.raises(client.BackendError, match="no key in the environment as MINE"):
        make("http://localhost/v1", key_variable="MINE")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    server = serve()
    assert endpoint(server, tmp_path)(["a"]) == ["fine"]
    assert "Authorization" not in server.headers[0]  # not to this machine, unless asked for
    assert make("https://example.org/v1").key() == "sk-very-secret"
    assert make("http://localhost/v1", key_variable="OPENAI_API_KEY").key() == "sk-very-secret"
    with pytest.raises(client.BackendError, match="in clear"):
        make("http://example.org/v1")
    assert make("http://example.org/v1", key_variable="").key() == ""
    for url in ("example.org", "ftp://example.org"):
        with pytest.raises(client.BackendError, match="wanted a server"):
            make(url)


def test_journal_cut_at_any_byte_keeps_whole_groups(tmp_path):
    path = tmp_path / "j.jsonl"
    groups = [[{"a": 1}], [{"b": "\u00e9\n"}, {"c": 2}, {"d": None}], [{"e": [1, 2]}]]
    journal, ends = client.Journal(path), [0]
    for group in groups:
        journal.add(group)
        ends.append(path.stat().st_size)
    data = path.read_bytes()
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        whole = sum(end <= cut for end in ends) - 1
        journal = client.Journal(path)
        assert journal.entries == sum(groups[:whole], [])
        for group in groups[whole:]:
            journal.add(group)
        assert path.read_bytes() == data


def test_journal_damaged_inside_is_an_error(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_text('{"a": 1, "last": true}\nnonsense\n{"b": 1, "last": true}\n')
    with pytest.raises(ValueError, match="line 2"):
        client.Journal(path)


WRITER = """
import sys
sys.path.insert(0, {root!r})
from data.endpoint import Journal
journal = Journal({path!r})
for i in range(60):
    journal.add([{{"who": sys.argv[1], "number": i, "part": part}} for part in range(3)])
"""


def test_journal_of_two_writers_keeps_every_group_whole(tmp_path):
    script = WRITER.format(root=str(ROOT), path=str(tmp_path / "j"))
    writers = [subprocess.Popen([sys.executable, "-c", script, who]) for who in "ab"]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    entries = client.Journal(tmp_path / "j").entries
    for i in range(0, len(entries), 3):
        group = entries[i : i + 3]
        assert len({(e["who"], e["number"]) for e in group}) == 1
        assert [e["part"] for e in group] == [0, 1, 2]
    for who in "ab":
        assert [e["number"] for e in entries[::3] if e["who"] == who] == list(range(60))


def test_journal_sees_what_another_has_added(tmp_path):
    one, two = client.Journal(tmp_path / "j"), client.Journal(tmp_path / "j")
    one.add([{"a": 1}])
    two.add([{"b": 2}])
    one.add([{"c": 3}])
    assert one.entries == [{"a": 1}, {"b": 2}, {"c": 3}] and two.entries == one.entries[:2]


def test_file_works_alone(tmp_path):
    shutil.copy(ROOT / "data" / "endpoint.py", tmp_path)
    done = subprocess.run([sys.executable, "endpoint.py"], cwd=tmp_path, capture_output=True,
                          text=True, timeout=60)  # fmt: skip
    assert done.returncode == 0, done.stderr
    shown = client.__doc__[client.__doc__.index("    asked ") :]
    assert done.stdout.splitlines() == [line.strip() for line in shown.splitlines()]


def test_no_part_of_a_key_is_in_a_message(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-very-secret\r\n")  # as a file with other line ends leaves it
    server = serve([(401, {}, b"." * 195 + b"sk-very-secret is wrong")])
    model = endpoint(server, tmp_path, key_variable="MY_KEY")
    with pytest.raises(client.BackendError) as error:
        model(["a"])
    assert server.headers[0]["Authorization"] == "Bearer sk-very-secret"
    assert "sk-v" not in str(error.value)
    monkeypatch.setenv("MY_KEY", "sk-very\x07secret")
    with pytest.raises(client.BackendError, match="characters that no key has") as error:
        endpoint(server, tmp_path, key_variable="MY_KEY")
    assert "secret" not in str(error.value)
    with pytest.raises(client.BackendError, match="user or password") as error:
        client.Endpoint("https://me:secret@example.org/v1", "m", tmp_path / "b.jsonl")
    assert "secret" not in str(error.value)


def test_two_endpoints_on_one_file_share_the_budget(serve, tmp_path):
    server = serve()
    one, two = (endpoint(server, tmp_path, limits=client.Limits(tokens=1200)) for _ in range(2))
    for number in range(10):
        one([f"one {number}"], max_tokens=20)
    two(["two"], max_tokens=20)
    assert one.tokens == 150 and two.tokens == 165


def test_a_lone_surrogate_is_paid_once_and_kept(serve, tmp_path):
    server = serve(reply=lambda body: completion("\ud83d"))
    assert endpoint(server, tmp_path)(["\ud83d?"]) == ["\ud83d"]
    assert endpoint(server, tmp_path)(["\ud83d?"]) == ["\ud83d"]
    assert len(server.seen) == 1


@pytest.mark.parametrize("text", ['{"a": 1}\n{"a": 2}\n', "a letter"])
def test_journal_keeps_what_it_cuts_off_a_file_that_is_no_journal(text, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(text)
    assert client.Journal(path).entries == []
    assert (tmp_path / "mine.jsonl.cut").read_text() == text


def test_too_long_a_prompt_is_refused_and_the_others_go_on(serve, tmp_path):
    def reply(body):
        return completion("fine")

    server = serve([(400, {}, b'{"code": "context_length_exceeded"}')], reply=reply)
    replies = endpoint(server, tmp_path, concurrency=1)(["long", "short"])
    assert replies == ["", "fine"] and replies[0].refused == "context_length_exceeded"


def test_the_same_request_of_two_threads_is_sent_once(serve, tmp_path):
    def slow(body):
        time.sleep(0.3)
        return completion("fine")

    server = serve(reply=slow)
    model, replies = endpoint(server, tmp_path), []
    threads = [threading.Thread(target=lambda: replies.append(model(["a"]))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert replies == [["fine"]] * 3 and len(server.seen) == 1
