"""Fetches TinyStories, the real data set, with resume and an integrity check.

TinyStories (Eldan & Li 2023, arXiv 2305.07759; licence CDLA-Sharing-1.0) is short stories in the
words of a small child, written by a language model. The second version, fetched here, holds only
GPT-4's: `TinyStoriesV2-GPT4-train.txt` (2,227,753,162 bytes by published counts) and
`TinyStoriesV2-GPT4-valid.txt`, UTF-8, stories separated by <|endoftext|>.

In the folder there are, for each file:

    NAME        complete and checked: it gets this name only after that
    NAME.json   which version it is: url, size, etag, sha256, as the server stated them
    NAME.part   what has been fetched so far of the version in NAME.json
    NAME.lock   held while a process downloads, so that two do not write one file

Every attempt is one request, `GET url` with `Range: bytes=N-` where N bytes are there already.
The hub redirects it to a content delivery network, and states on the redirect `X-Linked-Size` and
`X-Linked-ETag`, the sha256 of the content. So each answer says which version its bytes belong to:
they are appended only if that is the version of NAME.part and the answer begins at byte N;
otherwise the download begins anew. Two versions are never spliced. A cut connection is tried
again; whatever ends the program, the next run goes on from NAME.part. At the end size
and sha256 have to match. A later run compares the size with NAME.json, without network.

Run: `python data/tinystories.py` downloads both files into runs/cache, unless they are there, and
reads them once to check them; the time depends on the network. It prints size and checksum of
each and ends with a line `ok: ...`. `--base-url` fetches from a mirror of the hub. Tested against
a local server that imitates the hub, not yet against the hub itself.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import http.client
import json
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from email.message import Message
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: no lock there
    fcntl = None

BASE_URL = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main"
SPLITS = ("train", "valid")
CHUNK = 1 << 20  # bytes asked of the socket at once
TIMEOUT = 30.0  # seconds without a byte, when connecting and when reading
ATTEMPTS = 6  # failed ones in a row until the download is given up ...
PROGRESS = 16 << 20  # ... where one that brought this many bytes starts the count anew
BACKOFF = 1.0  # seconds until the second attempt; doubles with every further one
OTHER_DATA = (
    "without a network use --data stories (built in, needs no download) or --data PATH "
    "(your own text file, stories separated by <|endoftext|>)"
)


class DownloadError(Exception):
    """Why there is no file, in one line for the user."""


class Broken(Exception):
    """Why one attempt failed, where another may succeed."""


class Unreachable(Broken):
    """No connection could be made."""


class Stale(Broken):
    """What is in NAME.part cannot be continued with what the server offers."""


@dataclass(frozen=True)
class Version:
    """What NAME.json holds: which file the server offered."""

    url: str
    size: int  # bytes
    etag: str  # tells versions apart; empty if the server gives none to rely on
    sha256: str | None  # of the content, where the server states it


def beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def bytes_in(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def read_version(path: Path) -> Version | None:
    """The version in path.json; None if there is none or it cannot be read."""
    try:
        return Version(**json.loads(beside(path, ".json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def is_finished(path: Path) -> bool:
    """Whether path is there with the size in path.json. Its content is not read."""
    version = read_version(path)
    return version is not None and bytes_in(path) == version.size


def say(line: str, end: str = "\n") -> None:
    print(line, end=end, file=sys.stderr, flush=True)


def kept(path: Path) -> str:
    """The end of an error message: how much there is to go on from."""
    have, version = bytes_in(beside(path, ".part")), read_version(path)
    if have == 0 or version is None:
        return ""
    return f"; {have:,} of {version.size:,} bytes are kept, running again goes on from there"


# Asking the server


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, and keeps the headers of the first that states a version."""

    stated = None

    def redirect_request(self, request, file, code, message, headers, url):
        wanted = "https:" if request.full_url.startswith("https:") else ("https:", "http:")
        if not url.startswith(wanted):
            file.close()
            raise DownloadError(f"{request.full_url} redirects to {url}: refused")
        if self.stated is None and "X-Linked-ETag" in headers:
            self.stated = headers
        return super().redirect_request(request, file, code, message, headers, url)


def stated_version(url: str, linked: Message, answer: http.client.HTTPResponse) -> Version:
    """What the server says of the file, from the headers with X-Linked-* and of the answer.

    Raises: DownloadError when they contradict each other or leave the size open.
    """
    if answer.headers.get_content_type() == "text/html":  # the login page of some network, often
        raise DownloadError(f"{url}: the answer is a web page, not the file; {OTHER_DATA}")
    if answer.status == 206:  # "bytes 500-999/1000": the part after the slash
        total = answer.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        total = answer.headers.get("Content-Length")
    sizes = {int(n) for n in (linked.get("X-Linked-Size"), total) if n and n.isdecimal()} - {0}
    if len(sizes) != 1:
        saying = " and ".join(f"{size:,} bytes" for size in sorted(sizes)) or "nothing"
        raise DownloadError(f"{url}: the server states {saying} as the size of the file")
    # a plain ETag is no checksum: the hub's network sends one of 64 digits that are not the sha256
    digest = re.search("[0-9a-f]{64}", linked.get("X-Linked-ETag", ""))
    if digest is not None:
        return Version(url, sizes.pop(), digest[0], digest[0])
    etag = linked.get("X-Linked-ETag") or answer.headers.get("ETag", "")
    # a weak one, W/"...", does not promise the same bytes
    return Version(url, sizes.pop(), "" if etag.startswith("W/") else etag, None)


def ask(url: str, start: int) -> tuple[http.client.HTTPResponse, Version]:
    """The server's answer for the bytes from `start` on, body unread, and what it states.

    Raises: Broken and its kinds; DownloadError.
    """
    redirects = Redirects()
    request = urllib.request.Request(url, headers={"User-Agent": "llm-training-fundamentals"})
    if start > 0:
        request.add_header("Range", f"bytes={start}-")
    try:
        answer = urllib.request.build_opener(redirects).open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        status = f"the server answered {error.code} {' '.join(error.reason.split())}"
        if error.code == 416:  # no such range
            raise Stale(status) from error
        if error.code in (408, 429) or error.code >= 500:  # slow, too many requests, its fault
            raise Broken(status) from error
        raise DownloadError(f"{url}: {status}") from error
    except urllib.error.URLError as error:
        raise Unreachable(str(error.reason)) from error
    except (OSError, http.client.HTTPException) as error:
        raise Broken(f"no answer ({error})") from error
    try:
        return answer, stated_version(url, redirects.stated or answer.headers, answer)
    except DownloadError:
        answer.close()
        raise


# Fetching


class ProgressLine:
    """Shows how far it is: on a terminal in one line, in a log every ten seconds."""

    def __init__(self, name: str, have: int, size: int):
        self.name, self.first, self.size = name, have, size
        self.terminal = sys.stderr.isatty()
        self.started = self.shown = time.monotonic()

    def update(self, have: int, last: bool = False) -> None:
        now = time.monotonic()
        if not last and now - self.shown < (0.2 if self.terminal else 10):
            return
        self.shown = now
        rate = (have - self.first) / max(now - self.started, 1e-3)
        left = datetime.timedelta(seconds=round((self.size - have) / rate)) if rate else "?"
        line = (
            f"{self.name}  {have / self.size:6.1%}  {have / 1e6:,.0f} of {self.size / 1e6:,.0f} MB"
            f"  {rate / 1e6:.1f} MB/s  {left} left"
        )
        # shorter than 80 columns: a line that wraps cannot be overwritten
        say(f"\r{line:<78}" if self.terminal else line, end="" if self.terminal else "\n")
        if last and self.terminal:
            say("")


def check_space(path: Path, needed: int, have: int) -> None:
    """Raises DownloadError where the disk cannot take the rest of the file."""
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise DownloadError(
            f"{path.parent}: {path.name} needs {needed:,} more bytes ({have:,} are there already), "
            f"and {free:,} are free"
        )


def append(answer: http.client.HTTPResponse, path: Path, have: int, size: int) -> None:
    """Writes what the server sends behind the first `have` bytes of path.part, up to `size`.

    Raises: Broken when the connection ends before. What came until then is written.
    """
    progress = ProgressLine(path.stem, have, size)
    with open(beside(path, ".part"), "ab") as file:
        try:
            while have < size:
                try:
                    chunk = answer.read1(min(CHUNK, size - have))
                except (OSError, http.client.HTTPException) as error:
                    raise Broken(f"connection lost ({error})") from error
                if not chunk:
                    raise Broken(f"connection closed after {have:,} of {size:,} bytes")
                file.write(chunk)
                have += len(chunk)
                progress.update(have)
        finally:
            progress.update(have, last=True)
        file.flush()
        os.fsync(file.fileno())


def attempt(url: str, path: Path) -> None:
    """Completes path.part with one request, from where it ends or from the beginning.

    Raises: Broken when path.part is not complete afterwards; DownloadError.
    """
    part, known = beside(path, ".part"), read_version(path)
    have = bytes_in(part) if known is not None and known.etag else 0
    if have > 0 and have == known.size:
        return  # an earlier run was stopped between the last byte and the check
    answer, offered = ask(url, have)
    with answer:
        if answer.status == 206:
            # the url may differ: the same version from a mirror is as good
            if have == 0 or (offered.size, offered.etag) != (known.size, known.etag):
                raise Stale("the file on the server has changed")
            given = answer.headers.get("Content-Range", "")
            if not given.startswith(f"bytes {have}-"):
                raise Stale(f"asked for the bytes from {have} on, the server sent {given!r}")
        else:  # the whole file: the first request, or a server that cannot resume
            if have > 0:
                say(f"{path.name}: the server sends the file from its beginning")
            # in this order: path.part never holds bytes of another version than path.json says
            part.unlink(missing_ok=True)
            beside(path, ".json").write_text(json.dumps(asdict(offered), indent=2) + "\n")
            have = 0
        check_space(path, offered.size - have, have)
        append(answer, path, have, offered.size)


def fetch(url: str, path: Path) -> None:
    """Completes path.part, with as many attempts as it takes while they make progress."""
    failures, part = 0, beside(path, ".part")
    while True:
        before = bytes_in(part)
        try:
            return attempt(url, path)
        except Broken as error:
            if isinstance(error, Unreachable) and failures == 0:
                message = f"cannot reach {url} ({error}); {OTHER_DATA}{kept(path)}"
                raise DownloadError(message) from error
            if isinstance(error, Stale):
                part.unlink(missing_ok=True)
            failures = 1 if bytes_in(part) - before >= PROGRESS else failures + 1
            if failures == ATTEMPTS:
                message = f"{url}: {error}; given up after {ATTEMPTS} attempts{kept(path)}"
                raise DownloadError(message) from error
            wait = BACKOFF * 2 ** (failures - 1)
            say(f"{path.name}: {error}; trying again in {wait:g} s")
            time.sleep(wait)


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(path: Path) -> None:
    """Gives path.part its final name if it is what the server stated; deletes it otherwise."""
    part, version = beside(path, ".part"), read_version(path)
    if version.sha256 is None:
        say(f"{path.name}: the server states no sha256, so only the size was checked")
    elif (found := sha256_of(part)) != version.sha256:
        part.unlink()
        raise DownloadError(
            f"{version.url}: sha256 is {found}, wanted {version.sha256}; what was fetched is "
            "deleted, running again starts from the beginning"
        )
    part.replace(path)


# Front door


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds path.lock; the system releases it however the process ends."""
    with open(beside(path, ".lock"), "w") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DownloadError(
                f"another process is downloading {path} now; wait until it has finished"
            ) from error
        yield


def remove_damaged(path: Path) -> None:
    """Makes room for a new download where path is there but not as path.json says."""
    if not path.exists():
        return
    version = read_version(path)
    if version is None:  # somebody's own copy, perhaps: not ours to delete
        raise DownloadError(
            f"{path} is there but {beside(path, '.json').name} is not, so it cannot be checked: "
            f"move it away to have it downloaded, or train on it with --data {path}"
        )
    say(f"{path} has {bytes_in(path):,} bytes, wanted {version.size:,}: downloading it again")
    path.unlink()


def download(split: str, folder: Path, *, base_url: str = BASE_URL) -> Path:
    """The path of a complete and checked file of the data set, downloaded if it is not there.

    Args:
        split: "train" or "valid".
        folder: where the file is or goes; made if missing.
        base_url: where the server keeps the files, http or https.
    Raises: DownloadError, with one line for the user. What has been fetched is kept.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: wanted one of {', '.join(SPLITS)}")
    if not base_url.startswith(("https://", "http://")):
        raise ValueError(f"base_url={base_url!r}: wanted https://... or http://...")
    path = Path(folder) / f"TinyStoriesV2-GPT4-{split}.txt"
    if is_finished(path):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path):
            if not is_finished(path):  # the holder of the lock before may have finished it
                remove_damaged(path)
                fetch(f"{base_url.rstrip('/')}/{path.name}", path)
                verify(path)
    except OSError as error:  # of the disk: those of the network do not come this far
        message = f"{error.filename or path}: {error.strerror or error}{kept(path)}"
        raise DownloadError(message) from error
    return path


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--folder", type=Path, default=Path("runs/cache"), help="where to put it")
    parser.add_argument("--base-url", default=BASE_URL, help="the hub, or a mirror of it")
    given = parser.parse_args(argv)
    stated = "size and checksum"
    try:
        for split in SPLITS:
            path = download(split, given.folder, base_url=given.base_url)
            version, found = read_version(path), sha256_of(path)
            print(f"{path}  {path.stat().st_size:,} bytes  sha256 {found}")
            if version.sha256 not in (None, found):
                raise DownloadError(f"{path} is damaged: wanted {version.sha256}; delete it")
            if version.sha256 is None:
                stated = "size; it stated no checksum"
    except DownloadError as error:
        print(f"tinystories.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: running again goes on from here", file=sys.stderr)
        return 130
    print(f"ok: both files have the server's {stated}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
