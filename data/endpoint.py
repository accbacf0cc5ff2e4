"""A client for OpenAI-compatible chat servers that never pays for the same answer twice.

    model = Endpoint("https://api.openai.com/v1", NAME, "answers.jsonl", Limits(tokens=100_000))
    replies = model(["Name a river.", "Name a lake."], seed=3, temperature=0.5, max_tokens=20)

Every answer goes into a file before it is used, under a digest of the server's address and the
request, and a request that stands there is not sent again, in this process or a later one. A
budget in tokens and dollars holds over restarts; only what a killed process had under way is not
counted. Up to `concurrency` requests are under way;
what may be over the next time (429, 5xx, a lost connection) is tried again, after 1, 2, 4 ...
seconds or as long as Retry-After says, and what may have been billed three times at most. A prompt
that the server refuses to answer is an answer too: a reply with `refused`, the others go on.

`Ledger` does for the steps of a longer run what the file of answers does for requests, and `Maker`
says of every item where it comes from: parents, operator, prompt, seed, verdict and reason.

Only the standard library is needed, so the file can be copied out alone. It speaks
/chat/completions, without streaming; of a reply it needs `choices[0].message.content`. Where a
server does not count tokens (`usage`), they are estimated from the length of the texts.

Sources: the retry rules follow RFC 9110, section 10.2.3 (Retry-After), and RFC 6585 (429).

Run: `python data/endpoint.py` asks a server in this process that misbehaves (1 s), and prints

    asked     4 prompts; the server begins with 429, a broken body, and a refusal
    answers   'A', 'B', '' (refused: content_filter), 'D'
    sent      6 requests, 109 tokens counted, 69 of them for the answer that was lost
    again     the same answers, 6 requests
    ok: no answer was asked for twice
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import email.utils
import hashlib
import http.client
import http.server
import json
import math
import os
import random
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: two processes must not use one file there
    fcntl = None

BILLED_TRIES = 3  # of a request whose answers may have been billed, but did not come whole
LOCAL = ("localhost", "127.0.0.1", "::1")
REFUSED = ("content_filter", "context_length_exceeded")  # what a status 400 says of one prompt


class BackendError(Exception):
    """The model cannot be asked any more; what it has answered is kept."""


class Reply(str):
    """What a model wrote. `cut`: it was stopped by max_tokens, not by itself. `refused`: why there
    is no text; empty where there is one."""

    cut: bool
    refused: str

    def __new__(cls, text: str, cut: bool = False, refused: str = ""):
        reply = super().__new__(cls, text)
        reply.cut, reply.refused = cut, refused
        return reply


def digest(*parts: object) -> str:
    """Twelve characters that name the parts, the same in every process."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def estimated_tokens(text: str) -> int:
    """Tokens of a text by its length: English has about four bytes a token."""
    return math.ceil(len(text.encode(errors="replace")) / 4)


class Journal:
    """An append-only JSONL file. What `add` has written together is there together or not at all.

    The last line of a group carries "last": true. Who writes holds a lock on the file, and reads
    first what others have added. So what stands behind the last such line was left by a process
    that was killed, and is cut off.
    """

    def __init__(self, path: str | Path):
        self.path, self.entries, self.size = Path(path), [], 0
        if self.path.exists():
            with self.locked() as file:
                self.catch_up(file)

    @contextlib.contextmanager
    def locked(self):
        with open(self.path, "a+b") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed, or the process ends
            yield file

    def catch_up(self, file) -> None:
        """Reads what stands in the file behind what is known."""
        file.seek(self.size)
        data, at, whole, group = file.read(), 0, 0, []  # whole: bytes of complete groups
        for line in data.splitlines(keepends=True):
            at += len(line)
            try:
                entry = json.loads(line)
                group.append({k: v for k, v in entry.items() if k != "last"})
            except (ValueError, AttributeError) as error:
                if at < len(data):
                    number = len(self.entries) + len(group) + 1
                    raise ValueError(
                        f"{self.path}, line {number}: no JSON object: {error}"
                    ) from error
                break
            if entry.get("last") and line.endswith(b"\n"):
                self.entries += group
                whole, group = at, []
        if self.size + whole == 0 and data:
            # perhaps no file of ours at all: what is cut off stays beside it
            self.path.with_name(self.path.name + ".cut").write_bytes(data)
        self.size += whole
        file.truncate(self.size)

    def add(self, entries: list[dict]) -> None:
        # a lone surrogate, which JSON can hold, is written as its escape
        lines = [json.dumps(e, ensure_ascii=False) for e in entries[:-1]]
        lines.append(json.dumps(entries[-1] | {"last": True}, ensure_ascii=False))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.locked() as file:
            self.catch_up(file)
            file.write(("\n".join(lines) + "\n").encode(errors="backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
            self.size = file.tell()
        self.entries += entries


@dataclass
class Limits:
    """What may be spent in all, by the requests of all processes that share the file of answers.

    A request counts before it is sent at the most it can cost. Prices are dollars per million
    tokens; without them dollars are not counted and cannot be limited.
    """

    tokens: int = 1_000_000
    dollars: float = math.inf
    price_in: float | None = None
    price_out: float | None = None

    def __post_init__(self):
        if self.dollars < math.inf and (self.price_in is None or self.price_out is None):
            raise ValueError(f"dollars={self.dollars}: no limit without price_in and price_out")

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        """Dollars; 0 where the prices are not known."""
        return (tokens_in * (self.price_in or 0) + tokens_out * (self.price_out or 0)) / 1e6

    def plan(self, prompts: list[tuple[int, str, float]]) -> str:
        """About what it will cost to send so many prompts like one, with replies of so many tokens,
        for each of a list; and where it stops in any case."""
        tokens_in = sum(n * estimated_tokens(prompt) for n, prompt, _ in prompts)
        tokens_out = round(sum(n * reply for n, _, reply in prompts))
        cost, stop = "prices unknown", f"{self.tokens:,} tokens"
        if self.price_in is not None and self.price_out is not None:
            cost = f"about {self.cost(tokens_in, tokens_out):.2f} dollars"
        if self.dollars < math.inf:
            stop += f" or {self.dollars:.2f} dollars"
        count = sum(n for n, _, _ in prompts)
        return (f"about {count:,} prompts, {tokens_in:,} tokens in and {tokens_out:,} out; {cost}; "
                f"stops at {stop}")  # fmt: skip


class Retry(Exception):
    """A failure that may be over the next time; `wait` is what the server asked for, seconds."""

    def __init__(self, reason: str, wait: float = 0.0, billed: bool = False):
        super().__init__(reason)
        self.wait, self.billed = wait, billed


class Stopped(Exception):
    """Not asked, because another request of the same call failed for good."""


class AnyStatus(urllib.request.HTTPErrorProcessor):
    """Hands on every status as it is. So no redirect is followed, which would take the key along
    to wherever it points."""

    def http_response(self, request, response):
        return response

    https_response = http_response


def retry_after(value: str | None) -> float:
    """Seconds to wait by a Retry-After header: a number or a date; 0 where it says nothing."""
    try:
        return max(0.0, float(value))
    except (TypeError, ValueError):
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


class Endpoint:
    """A /chat/completions server as a callable: complete(prompts, **sampling) -> replies.

    Args:
        url: up to and without /chat/completions, such as https://api.openai.com/v1.
        cache: a JSONL file of all answers; what stands there is never asked again.
        limits: see `Limits`. A request whose answer is lost on the way counts in full, since it
            may have been billed.
        key_variable: the environment variable that holds the key; "" sends none. By default
            OPENAI_API_KEY for other hosts, and none for this machine. The key is read when a
            request is sent, is in no message and no file, and to other hosts goes by https only.
    Sampling, all optional: temperature, top_p, presence_penalty, max_tokens, stop, seed; prompt i
    is asked with seed + i.
    Raises: BackendError after the last try, for an error that no try will mend, and over budget.
    After that, or Ctrl-C, nothing more is sent; what is under way is waited for and kept.
    """

    def __init__(
        self,
        url: str,
        model: str,
        cache: str | Path,
        limits: Limits | None = None,
        *,
        key_variable: str | None = None,
        concurrency: int = 8,
        timeout: float = 120.0,
        tries: int = 6,
        first_wait: float = 1.0,
        longest_wait: float = 120.0,
    ):
        parts = urllib.parse.urlsplit(url)
        if parts.username or parts.password:
            raise BackendError("a user or password in the server's address: name a key's variable")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BackendError(f"{url}: wanted a server such as https://HOST/v1")
        local, open_line = parts.hostname in LOCAL, parts.scheme == "http"
        self.key_variable = key_variable
        if key_variable is None:
            self.key_variable = "" if local else "OPENAI_API_KEY"
        if self.key() and open_line and not local:
            raise BackendError(
                f"{url}: the key in {self.key_variable} would be sent in clear; use https, or an "
                "empty name for its variable if the server needs none"
            )
        if self.key_variable and not self.key() and not (open_line and key_variable is None):
            raise BackendError(f"{url}: no key in the environment as {self.key_variable}")
        if not self.key().isascii() or not self.key().isprintable():
            raise BackendError(f"the key in {self.key_variable} has characters that no key has")
        self.url, self.model = url.rstrip("/") + "/chat/completions", model
        self.limits, self.concurrency, self.timeout = limits or Limits(), concurrency, timeout
        self.tries, self.first_wait, self.longest_wait = tries, first_wait, longest_wait
        self.journal, self.cached = Journal(cache), {}
        self.spent, self.reserved = [0, 0], [0, 0]  # tokens in and out; reserved: under way
        self.known = 0  # entries of the file that are counted in `spent`
        self.count()
        self.changed = threading.Condition()  # of all the above
        self.under_way: dict[str, threading.Lock] = {}  # by the request's key
        handlers = [AnyStatus] + ([urllib.request.ProxyHandler({})] if local else [])
        self.opener = urllib.request.build_opener(*handlers)

    def key(self) -> str:
        return os.environ.get(self.key_variable, "").strip() if self.key_variable else ""

    def count(self) -> None:
        """Takes what is new in the file into account, whoever has written it."""
        for entry in self.journal.entries[self.known :]:
            self.spent = [self.spent[0] + entry["in"], self.spent[1] + entry["out"]]
            if "text" in entry:  # else: an answer that was lost, and may have been billed
                self.cached[entry["key"]] = entry
        self.known = len(self.journal.entries)

    @property
    def tokens(self) -> int:
        return sum(self.spent)

    @property
    def dollars(self) -> float:
        return self.limits.cost(*self.spent)

    def __call__(self, prompts: Sequence[str], *, seed: int = 0, **sampling) -> list[Reply]:
        sampling.setdefault("max_tokens", 1024)  # without it no bound on the cost is known
        bodies = [
            {"model": self.model, "messages": [{"role": "user", "content": prompt}],
             "seed": seed + i, **sampling}
            for i, prompt in enumerate(prompts)
        ]  # fmt: skip
        stopped = threading.Event()
        pool = concurrent.futures.ThreadPoolExecutor(self.concurrency)
        futures = [pool.submit(self.answer, body, stopped) for body in bodies]
        try:
            concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_EXCEPTION)
        finally:  # also on Ctrl-C
            stopped.set()
            pool.shutdown(cancel_futures=True)
        errors = [f.exception() for f in futures if not f.cancelled() and f.exception()]
        if errors:
            raise min(errors, key=lambda error: isinstance(error, Stopped))
        return [future.result() for future in futures]

    def answer(self, body: dict, stopped: threading.Event) -> Reply:
        """The reply to one request: from the cache, or from the server and then in the cache."""
        key = digest(self.url, body)
        with self.changed:
            one_at_a_time = self.under_way.setdefault(key, threading.Lock())
        try:
            with one_at_a_time:  # the same request of another thread waits for this answer
                entry = self.cached.get(key) or self.fetch(key, body, stopped)
        except BaseException:
            stopped.set()  # at once: the next in the queue need not begin
            raise
        return Reply(entry["text"], entry["cut"], entry.get("refused", ""))

    def fetch(self, key: str, body: dict, stopped: threading.Event) -> dict:
        """The server's answer, after as many tries as it takes, written into the cache."""
        for attempt in range(1, self.tries + 1):
            most = self.reserve(body, stopped)
            entry = {"key": key, "in": most[0], "out": most[1]}  # if the answer should be lost
            try:
                entry = {"key": key, **self.ask(body)}
                return entry
            except Retry as error:
                failure = error
                entry = entry if error.billed else None
            except BackendError:
                entry = None
                raise
            finally:
                self.settle(most, entry)
            self.wait(failure, attempt, stopped)
        raise AssertionError("the last try returns, or `wait` raises")

    def wait(self, failure: Retry, attempt: int, stopped: threading.Event) -> None:
        """Until the next try. Raises: BackendError where there will be none."""
        wait = self.first_wait * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
        wait = max(failure.wait, min(wait, self.longest_wait))
        tries = min(self.tries, BILLED_TRIES) if failure.billed else self.tries
        if attempt >= tries or wait > self.longest_wait:
            about = f"; it asks to wait {wait:.0f} s" if wait > self.longest_wait else ""
            raise BackendError(f"{self.url}: {failure}, after {attempt} tries{about}")
        stopped.wait(wait)

    def above(self, *spent: Sequence[int]) -> str | None:
        """Which limit the sum of these tokens, in and out, is above."""
        tokens, limits = [sum(column) for column in zip(*spent)], self.limits
        if sum(tokens) > limits.tokens:
            return f"{sum(tokens):,} tokens, above the limit of {limits.tokens:,}"
        if limits.cost(*tokens) > limits.dollars:
            return f"{limits.cost(*tokens):.4g} dollars, above the limit of {limits.dollars:.4g}"
        return None

    def reserve(self, body: dict, stopped: threading.Event) -> tuple[int, int]:
        """Sets aside the most that a request can cost: a token has at least one byte."""
        text = body["messages"][0]["content"].encode(errors="replace")
        most = 16 + len(text), body["max_tokens"]
        with self.changed:
            while not stopped.is_set():
                if above := self.above(self.spent, most):
                    raise BackendError(
                        f"over budget: with the next request it may be {above}; raise the limit to "
                        "go on, the answers so far are kept"
                    )
                if not self.above(self.spent, self.reserved, most):
                    self.reserved = [a + b for a, b in zip(self.reserved, most)]
                    return most
                self.changed.wait(0.1)  # those under way will have cost less, mostly
        raise Stopped

    def settle(self, most: tuple[int, int], entry: dict | None) -> None:
        """Takes back what was set aside, and writes down what came of it, or was lost."""
        with self.changed:
            self.reserved = [a - b for a, b in zip(self.reserved, most)]
            try:
                if entry is not None:
                    self.journal.add([entry])  # and reads what other processes have added
                    self.count()
            finally:
                self.changed.notify_all()

    def ask(self, body: dict) -> dict:
        """One request. Raises: Retry, BackendError."""
        headers = {"Content-Type": "application/json"}
        if self.key():
            headers["Authorization"] = "Bearer " + self.key()
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        response = None
        try:
            with self.opener.open(request, timeout=self.timeout) as response:
                data = self.receive(response)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error or type(error).__name__
            if response is None or response.status == 200:
                sent = not isinstance(error, urllib.error.URLError)  # that is of a request not sent
                raise Retry(f"unreachable: {reason}", billed=sent) from None
            data = b""  # the status says enough
        if response.status == 200:
            return self.read(data, body)
        text = data.decode(errors="replace")
        for reason in REFUSED if response.status == 400 else ():  # of this prompt, not of others
            if reason in text:
                return {"text": "", "cut": False, "refused": reason, "in": 0, "out": 0}
        text = text.replace(self.key() or "\0", "[key]")  # servers repeat keys they refuse
        reason = f"status {response.status}: {text[:200]!r}"
        if response.status in (408, 429) or response.status >= 500:
            wait = retry_after(response.headers.get("Retry-After"))
            raise Retry(reason, wait, billed=response.status == 504)
        raise BackendError(f"{self.url}: {reason}")

    def receive(self, response: http.client.HTTPResponse) -> bytes:
        """The body, within the timeout: by itself that of a socket bounds each wait only."""
        data, deadline = b"", time.monotonic() + self.timeout
        while piece := response.read1(1 << 16):
            data += piece
            if time.monotonic() > deadline or len(data) > 1 << 24:
                raise TimeoutError("the answer is too slow or too long")
        if response.length:
            raise ConnectionError("the answer broke off")
        return data

    @staticmethod
    def read(data: bytes, body: dict) -> dict:
        """What the body of a reply says, its types checked."""
        try:
            reply = json.loads(data)
            choice, usage = reply["choices"][0], reply.get("usage") or {}
            message, finish = choice["message"], choice.get("finish_reason")
            text, refused = message.get("content"), ""
            counts = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise Retry(f"not a chat completion: {error!r}", billed=True) from None
        if text is None:
            text = ""
            if finish != "length":  # a model may think until nothing is left to write with
                refused = str(message.get("refusal") or finish or "no content")
        if not isinstance(text, str):
            raise Retry(f"not a chat completion: its content is {text!r:.40}", billed=True)
        if not all(type(n) is int and n >= 0 for n in counts):
            prompt = body["messages"][0]["content"]
            counts = [estimated_tokens(prompt), estimated_tokens(text)]
        cut = finish == "length" or finish is None and counts[1] >= body["max_tokens"]
        return {"text": text, "cut": cut, "refused": refused, "in": counts[0], "out": counts[1]}


# A run of many steps on top of it: every item with its parents and its verdict


class Ledger:
    """Every item that a run has made, with its verdict: a file that a killed run goes on from.

    A run is a loop of steps, each of which depends on the seed and the results of earlier ones
    only. `step` looks a result up before it has it computed, so a resumed run repeats the loop
    at no cost up to where it was killed, and ends with the same data.
    """

    def __init__(self, path: str | Path, settings: dict):
        self.journal = Journal(path)
        self.steps: dict[str, list[dict]] = collections.defaultdict(list)
        for entry in self.journal.entries:
            self.steps[entry["step"]].append(entry)
        settings = {"step": "settings", **json.loads(json.dumps(settings))}
        if not self.journal.entries:
            self.journal.add([settings])
        elif settings != (old := self.journal.entries[0]):
            names = [k for k in settings | old if old.get(k) != settings.get(k)]
            raise ValueError(f"{path} has a run with another {', '.join(names)}; take a new folder")

    def step(self, name: str, work: Callable[[], list[dict]]) -> list[dict]:
        """The items of a step: those in the file, or else what work() returns, written there.

        A replayed step never calls `work`: what the closure does beside returning its items (take
        them into a pool, say) must be done again by the caller, from what this returns.
        """
        if name not in self.steps:
            entries = [{"step": name, **item} for item in work()] or [{"step": name}]
            entries = json.loads(json.dumps(entries))  # as they will be read: no tuples
            self.journal.add(entries)
            self.steps[name] = entries
        return [entry for entry in self.steps[name] if "verdict" in entry]

    def items(self) -> list[dict]:
        """All items, whatever their verdict; what a later step judges again, once."""
        items, known = [], set()
        for step in self.steps.values():
            new = [e for e in step if "verdict" in e and e["id"] not in known]
            known.update(e["id"] for e in new)
            items += new
        return items


@dataclass(frozen=True)
class Maker:
    """Who makes items: the model asked, its name for the ledger, the seed, the ledger."""

    complete: Callable[..., list[str]]
    model: str
    seed: int
    ledger: Ledger

    def ask(self, prompts: Sequence[str], *about: object, **sampling) -> list[Reply]:
        """The replies; their seed is a function of the run's and of what it is about."""
        if not prompts:
            return []
        replies = self.complete(prompts, seed=self.seed_of(*about), **sampling)
        if len(replies) != len(prompts) or not all(isinstance(r, str) for r in replies):
            raise BackendError(f"{self.model}: wanted {len(prompts)} texts, one for each prompt")
        return [r if isinstance(r, Reply) else Reply(r) for r in replies]

    def seed_of(self, *about: object) -> int:
        return int(digest(self.seed, *about)[:7], 16)  # 28 bits: every server takes them

    def item(self, operator: str, parents: list[dict], prompt: str, fault: str | None,
             seed: int, **content) -> dict:  # fmt: skip
        """An entry of the ledger: where an item comes from, what it says, whether it is used.

        Its ancestor is the seed task of the parent that comes first.
        """
        names = [parent["id"] for parent in parents]
        return {
            "id": digest(operator, names, seed, content),
            "operator": operator,
            "parents": names,
            "ancestor": parents[0].get("ancestor", parents[0]["id"]) if parents else "",
            "prompt": digest(prompt),
            "seed": seed,
            "model": self.model,
            "verdict": "rejected" if fault else "accepted",
            "reason": fault or "",
            **content,
        }


def accepted(items: Iterable[dict]) -> list[dict]:
    return [item for item in items if item["verdict"] == "accepted"]


def refusal(reply: Reply) -> str:
    """Why the server gave no text; "" where it gave one."""
    return f"refused: {reply.refused}" if reply.refused else ""


def demo() -> None:
    """Asks a server that misbehaves; fails unless each answer was paid for once."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_POST(self):  # noqa: N802
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(body["messages"][0]["content"])
            status = 429 if len(seen) == 1 else 200
            text = None if seen[-1] == "c" else seen[-1].upper()
            choice = {"message": {"content": text}, "finish_reason": "stop" if text else
                      "content_filter"}  # fmt: skip
            usage = {"prompt_tokens": 9, "completion_tokens": 1}
            data = json.dumps({"choices": [choice], "usage": usage}).encode()
            self.send_response(status)
            self.end_headers()
            self.wfile.write(data[: 20 if len(seen) == 3 else None])

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    url, prompts = f"http://127.0.0.1:{server.server_address[1]}/v1", list("abcd")
    with tempfile.TemporaryDirectory() as folder:
        options = {"concurrency": 1, "first_wait": 0.1}
        model = Endpoint(url, "tiny", Path(folder) / "answers.jsonl", **options)
        replies = model(prompts, max_tokens=52)
        first = len(seen)
        print("asked     4 prompts; the server begins with 429, a broken body, and a refusal")
        print("answers   " + ", ".join(repr(str(r)) + (f" (refused: {r.refused})" if r.refused else
                                                     "") for r in replies))  # fmt: skip
        print(f"sent      {first} requests, {model.tokens} tokens counted, {model.tokens - 40} of "
              "them for the answer that was lost")  # fmt: skip
        again = Endpoint(url, "tiny", Path(folder) / "answers.jsonl", **options)
        same = again(prompts, max_tokens=52) == replies
        print(f"again     {'the same' if same else 'other'} answers, {len(seen)} requests")
    server.shutdown()
    if not (same and len(seen) == first == 6):
        raise SystemExit("FAILED: wanted six requests and the same answers for nothing")
    print("ok: no answer was asked for twice")


if __name__ == "__main__":
    demo()
