"""Tests of data/tinystories.py against a local server that imitates the hub, faults included.

Run: python -m pytest tests/test_data_tinystories.py
"""

import errno
import hashlib
import io
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data import tinystories
from data.tinystories import DownloadError, download

ROOT = Path(__file__).resolve().parent.parent
NAME = "TinyStoriesV2-GPT4-train.txt"
CONTENT = random.Random(0).randbytes(300_000)
OTHER = random.Random(1).randbytes(300_000)


class Hub(ThreadingHTTPServer):
    """Answers /NAME with a redirect to /cdn/NAME. Its fields are the faults, settable at any time;
    those called `each_*` are used up, one a request to the CDN."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.content = CONTENT
        self.ranges = []  # the Range header, or None, of each request to the CDN
        self.sent = 0  # bytes of content sent in all
        self.requests = 0  # of any kind
        self.each_cut = []  # close the connection after so many bytes; None: do not
        self.each_status = []  # answer the first request with this status; 200: do not
        self.linked = {}  # overrides headers of the redirect; None: left out
        self.direct = False  # no redirect: a plain server
        self.headers = {}  # overrides headers of the CDN's answer
        self.resumes = True  # takes notice of Range
        self.each_stall = []  # seconds to wait after the first 10,000 bytes
        self.pace = 0.0  # seconds to wait after each 10,000 bytes
        self.location = self.url + "/cdn"

    def handle_error(self, request, client_address):
        pass  # a client that was killed


class Answer(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def head(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()

    def do_GET(self):
        hub = self.server
        hub.requests += 1
        status = hub.each_status.pop(0) if hub.each_status else 200
        if status != 200:
            self.head(status, {"Content-Length": 0})
        elif hub.direct or self.path.startswith("/cdn/"):
            self.body(hub, hub.content)
        else:
            headers = {
                "X-Linked-Size": len(hub.content),
                "X-Linked-ETag": f'"{hashlib.sha256(hub.content).hexdigest()}"',
                "X-Repo-Commit": "0" * 40,
                "Location": hub.location + self.path,
                "Content-Length": 0,
            }
            self.head(302, headers | hub.linked)

    def body(self, hub, content):
        asked = self.headers["Range"]
        hub.ranges.append(asked)
        start, status = 0, 200
        # 64 digits that are not the sha256 of the content, as the hub's network sends
        headers = {"ETag": f'"{hashlib.sha256(content[::-1]).hexdigest()}"'}
        if asked is not None and hub.resumes:
            start, status = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]), 206
            if start >= len(content):
                return self.head(416, {"Content-Range": f"bytes */{len(content)}"})
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        headers["Content-Length"] = len(content) - start
        self.head(status, headers | hub.headers)
        cut = hub.each_cut.pop(0) if hub.each_cut else None
        stall = hub.each_stall.pop(0) if hub.each_stall else 0
        end = len(content) if cut is None else start + cut
        for i in range(start, end, 10_000):
            piece = content[i : min(i + 10_000, end)]
            self.wfile.write(piece)
            hub.sent += len(piece)
            time.sleep(hub.pace)
            if i == start and stall:
                time.sleep(stall)
        self.close_connection = True


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(tinystories, "BACKOFF", 0.001)
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def get(hub, folder):
    return download("train", folder, base_url=hub.url)


def error_of(hub, folder):
    """The message of the download that is to fail, and checks common to all failures."""
    with pytest.raises(DownloadError) as caught:
        get(hub, folder)
    assert "\n" not in str(caught.value)
    assert not (folder / NAME).exists()
    return str(caught.value)


def part_of(folder):
    part = folder / (NAME + ".part")
    return part.read_bytes() if part.exists() else None


# the usual way


def test_download_follows_the_redirect_and_gives_the_file(hub, tmp_path, capfd):
    path = get(hub, tmp_path / "a" / "b")
    assert path == tmp_path / "a" / "b" / NAME
    assert path.read_bytes() == CONTENT
    assert hub.ranges == [None] and hub.requests == 2
    about = json.loads((path.parent / (NAME + ".json")).read_text())
    assert about == {
        "url": f"{hub.url}/{NAME}",
        "size": len(CONTENT),
        "etag": hashlib.sha256(CONTENT).hexdigest(),
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
    }
    assert sorted(p.name for p in path.parent.iterdir()) == [NAME, NAME + ".json", NAME + ".lock"]
    out, err = capfd.readouterr()
    assert out == ""
    assert re.fullmatch(
        r"TinyStoriesV2-GPT4-train  100\.0%  0 of 0 MB  [\d.]+ MB/s  0:00:00 left\n", err
    )


def test_progress_line_fits_a_terminal(monkeypatch, capfd):
    clock = iter([100.0, 300.0])
    monkeypatch.setattr(tinystories.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    line = tinystories.ProgressLine("TinyStoriesV2-GPT4-train", 10**9, 2_227_753_162)
    line.update(2 * 10**9)
    assert capfd.readouterr().err.rstrip() == (
        "\rTinyStoriesV2-GPT4-train   89.8%  2,000 of 2,228 MB  5.0 MB/s  0:00:46 left"
    )


def test_download_finished_file_needs_no_request_and_no_lock(hub, tmp_path):
    first = get(hub, tmp_path)
    before = hub.requests
    (tmp_path / (NAME + ".lock")).unlink()
    assert get(hub, tmp_path) == first
    assert hub.requests == before
    assert not (tmp_path / (NAME + ".lock")).exists()  # the folder may be read-only
    hub.shutdown()
    assert get(hub, tmp_path) == first


def test_download_truncated_finished_file_is_fetched_again(hub, tmp_path, capfd):
    path = get(hub, tmp_path)
    os.truncate(path, 1000)
    capfd.readouterr()
    assert get(hub, tmp_path).read_bytes() == CONTENT
    assert f"{path} has 1,000 bytes, wanted 300,000: downloading it again" in capfd.readouterr().err


def test_download_leaves_a_file_of_unknown_origin_alone(hub, tmp_path):
    (tmp_path / NAME).write_text("mine")
    with pytest.raises(DownloadError, match="cannot be checked: move it away"):
        get(hub, tmp_path)
    assert (tmp_path / NAME).read_text() == "mine" and hub.requests == 0


@pytest.mark.parametrize("split, url", [("test", "http://x"), ("train", "file:///etc")])
def test_download_refuses_other_names_and_schemes(split, url, tmp_path):
    with pytest.raises(ValueError, match="wanted"):
        download(split, tmp_path, base_url=url)


@pytest.mark.parametrize("etag", ['"short"', f'"{"1" * 64}"', None])
def test_download_without_checksum_says_that_only_the_size_is_checked(hub, tmp_path, capfd, etag):
    # an ETag of 64 digits is no sha256: the hub's delivery network sends such
    hub.direct, hub.headers = True, {"ETag": etag}
    assert get(hub, tmp_path).read_bytes() == CONTENT
    assert "states no sha256, so only the size was checked" in capfd.readouterr().err


# cut connections


def test_download_cut_half_way_resumes_where_it_was(hub, tmp_path, capfd):
    hub.each_cut = [120_000]
    assert get(hub, tmp_path).read_bytes() == CONTENT
    assert hub.ranges == [None, "bytes=120000-"]
    assert hub.sent == len(CONTENT)  # no byte twice
    assert "connection closed after 120,000 of 300,000 bytes; trying again in" in (
        capfd.readouterr().err
    )


def test_download_gives_up_after_some_attempts_and_goes_on_next_time(hub, tmp_path):
    hub.each_cut = [10_000] * tinystories.ATTEMPTS
    message = error_of(hub, tmp_path)
    assert f"given up after {tinystories.ATTEMPTS} attempts" in message
    assert "60,000 of 300,000 bytes are kept, running again goes on from there" in message
    assert part_of(tmp_path) == CONTENT[:60_000]
    assert get(hub, tmp_path).read_bytes() == CONTENT
    assert hub.ranges[-1] == "bytes=60000-" and hub.sent == len(CONTENT)


def test_download_attempts_with_progress_do_not_count(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(tinystories, "PROGRESS", 20_000)
    hub.each_cut = [20_000] * 14
    assert get(hub, tmp_path).read_bytes() == CONTENT
    assert len(hub.ranges) == 15 > tinystories.ATTEMPTS


def test_download_waits_longer_after_each_failure(hub, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(tinystories.time, "sleep", waits.append)
    monkeypatch.setattr(tinystories, "BACKOFF", 1.0)
    hub.each_status = [503] * 9
    error_of(hub, tmp_path)
    assert [w for w in waits if w] == [1, 2, 4, 8, 16]  # 0: the server's pace


def test_download_stalled_connection_is_given_up_and_resumed(hub, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(tinystories, "TIMEOUT", 0.2)
    hub.each_stall = [1.0]
    assert get(hub, tmp_path).read_bytes() == CONTENT
    assert hub.ranges == [None, "bytes=10000-"]
    assert "connection lost (timed out)" in capfd.readouterr().err


def test_download_server_without_ranges_starts_anew(hub, tmp_path, capfd):
    hub.resumes, hub.each_cut = False, [120_000]
    assert get(hub, tmp_path).read_bytes() == CONTENT
    assert hub.sent == 120_000 + len(CONTENT)
    assert "the server sends the file from its beginning" in capfd.readouterr().err


def test_download_version_changed_between_runs_is_not_spliced(hub, tmp_path, capfd):
    hub.each_cut = [50_000] + [0] * (tinystories.ATTEMPTS - 1)
    error_of(hub, tmp_path)
    assert part_of(tmp_path) == CONTENT[:50_000]
    hub.content = OTHER  # as long as the first
    assert get(hub, tmp_path).read_bytes() == OTHER
    assert hub.ranges[-2:] == ["bytes=50000-", None]
    assert "the file on the server has changed" in capfd.readouterr().err


def test_download_version_changed_is_seen_by_a_plain_etag(hub, tmp_path):
    hub.direct, hub.each_cut = True, [50_000, 0, 0, 0, 0, 0]
    error_of(hub, tmp_path)
    hub.content = OTHER
    assert get(hub, tmp_path).read_bytes() == OTHER


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_download_does_not_resume_without_a_reliable_etag(hub, tmp_path, etag):
    hub.direct, hub.headers, hub.each_cut = True, {"ETag": etag}, [50_000]
    assert get(hub, tmp_path).read_bytes() == CONTENT
    assert hub.ranges == [None, None]


def test_download_wrong_content_range_starts_anew(hub, tmp_path):
    hub.each_cut = [120_000] + [0] * (tinystories.ATTEMPTS - 1)
    error_of(hub, tmp_path)
    hub.headers, hub.each_cut = {"Content-Range": "bytes 0-299999/300000"}, [None, None]
    assert get(hub, tmp_path).read_bytes() == CONTENT
    assert hub.ranges[-2:] == ["bytes=120000-", None]


def test_download_range_not_satisfiable_starts_anew(hub, tmp_path):
    hub.each_cut = [120_000] + [0] * (tinystories.ATTEMPTS - 1)
    error_of(hub, tmp_path)
    hub.each_status = [416]
    assert get(hub, tmp_path).read_bytes() == CONTENT
    assert hub.ranges[-1] is None


def test_download_complete_part_is_only_checked(hub, tmp_path):
    path = get(hub, tmp_path)
    path.rename(tmp_path / (NAME + ".part"))
    before = hub.requests
    assert get(hub, tmp_path).read_bytes() == CONTENT
    assert hub.requests == before


def test_download_resumes_from_a_mirror_with_the_same_version(hub, tmp_path):
    hub.each_cut = [120_000] + [0] * (tinystories.ATTEMPTS - 1)
    error_of(hub, tmp_path)
    path = download("train", tmp_path, base_url=f"http://localhost:{hub.server_port}/")
    assert path.read_bytes() == CONTENT and hub.sent == len(CONTENT)


# servers that lie or refuse


@pytest.mark.parametrize("status", [400, 403, 404])
def test_download_client_errors_are_not_tried_again(hub, tmp_path, status):
    hub.each_status = [status]
    message = error_of(hub, tmp_path)
    assert f"{hub.url}/{NAME}: the server answered {status} " in message
    assert hub.requests == 1


@pytest.mark.parametrize("status", [429, 500, 503])
def test_download_server_errors_are_tried_again(hub, tmp_path, status):
    hub.each_status = [status, status]
    assert get(hub, tmp_path).read_bytes() == CONTENT
    assert hub.requests == 4
    (tmp_path / NAME).unlink()
    hub.each_status = [status] * 99
    message = error_of(hub, tmp_path)
    assert f"{hub.url}/{NAME}: the server answered {status} " in message
    assert hub.requests == 4 + tinystories.ATTEMPTS


def test_download_wrong_checksum_leaves_nothing_behind(hub, tmp_path):
    hub.linked = {"X-Linked-ETag": f'"{"0" * 64}"'}
    message = error_of(hub, tmp_path)
    assert f"sha256 is {hashlib.sha256(CONTENT).hexdigest()}, wanted {'0' * 64}" in message
    assert part_of(tmp_path) is None
    hub.linked = {}
    assert get(hub, tmp_path).read_bytes() == CONTENT


def test_download_part_damaged_on_disk_is_found(hub, tmp_path):
    hub.each_cut = [120_000] + [0] * (tinystories.ATTEMPTS - 1)
    error_of(hub, tmp_path)
    (tmp_path / (NAME + ".part")).write_bytes(bytes(120_000))
    assert "wanted" in error_of(hub, tmp_path)
    assert get(hub, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("length", [len(CONTENT) + 5000, len(CONTENT) - 5000])
def test_download_content_length_against_linked_size_is_an_error(hub, tmp_path, length):
    hub.headers = {"Content-Length": length}
    message = error_of(hub, tmp_path)
    low, high = sorted((length, len(CONTENT)))
    assert f"the server states {low:,} bytes and {high:,} bytes as the size" in message
    assert hub.sent <= len(CONTENT) and part_of(tmp_path) is None


def test_download_content_length_too_long_is_given_up(hub, tmp_path):
    hub.direct, hub.headers = True, {"Content-Length": len(CONTENT) + 5000}
    assert "given up after" in error_of(hub, tmp_path)


def test_download_linked_size_alone_is_enough(hub, tmp_path):
    hub.headers = {"Content-Length": None}
    assert get(hub, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("length", [None, 0, "many"])
def test_download_size_must_be_stated(hub, tmp_path, length):
    hub.direct, hub.headers = True, {"Content-Length": length}
    assert "the server states nothing as the size of the file" in error_of(hub, tmp_path)


def test_download_web_page_is_not_taken_for_the_file(hub, tmp_path):
    hub.direct, hub.headers = True, {"Content-Type": "text/html; charset=utf-8"}
    assert "is a web page" in error_of(hub, tmp_path)


def test_download_redirects_in_a_circle_end(hub, tmp_path):
    hub.location = hub.url
    assert "the server answered 302" in error_of(hub, tmp_path)


@pytest.mark.parametrize("target", ["file:///etc/passwd?", "ftp://127.0.0.1", "data:,"])
def test_download_redirect_to_another_scheme_is_refused(hub, tmp_path, target):
    hub.location = target
    message = error_of(hub, tmp_path)
    assert "not allowed" in message or "refused" in message
    assert "cannot reach" not in message and hub.ranges == []


def test_redirects_never_leave_https():
    request = urllib.request.Request("https://127.0.0.1/a")
    for url, refused in (("https://127.0.0.1/b", False), ("http://127.0.0.1/b", True)):
        try:
            tinystories.Redirects().redirect_request(request, io.BytesIO(), 302, "", {}, url)
            assert not refused
        except DownloadError:
            assert refused


def test_download_refused_connection_names_the_other_data(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(DownloadError) as caught:
        download("train", tmp_path, base_url=f"http://127.0.0.1:{port}")
    assert re.fullmatch("cannot reach .*--data stories .*--data PATH .*", str(caught.value))
    assert time.monotonic() - started < 2  # at once: no attempts in vain


def test_download_unknown_host_names_the_other_data(tmp_path, monkeypatch):
    def no_such_host(*args, **kwargs):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(socket, "getaddrinfo", no_such_host)
    with pytest.raises(DownloadError, match="Name or service not known.*--data stories"):
        download("valid", tmp_path)


# the disk


def test_download_disk_too_small_is_refused_before_the_first_byte(hub, tmp_path, monkeypatch):
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=200_000))
    message = error_of(hub, tmp_path)
    assert "needs 300,000 more bytes (0 are there already), and 200,000 are free" in message
    assert not part_of(tmp_path)


def test_download_disk_space_counts_what_is_there(hub, tmp_path, monkeypatch):
    hub.each_cut = [120_000] + [0] * (tinystories.ATTEMPTS - 1)
    error_of(hub, tmp_path)
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=179_999))
    assert "needs 180,000 more bytes (120,000 are there" in error_of(hub, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=180_000))
    assert get(hub, tmp_path).read_bytes() == CONTENT


def test_download_disk_full_in_mid_write_keeps_the_part(hub, tmp_path, monkeypatch):
    class FullDisk:
        """A file opened for append on a disk with room for 100,000 bytes."""

        def __init__(self, path, mode):
            self.file = open(path, mode)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, data):
            self.file.write(data[: 100_000 - self.file.tell()])
            if self.file.tell() == 100_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open_on_full_disk(path, mode="r"):
        return FullDisk(path, mode) if mode == "ab" else open(path, mode)

    with monkeypatch.context() as patch:
        patch.setattr(tinystories, "open", open_on_full_disk, raising=False)
        message = error_of(hub, tmp_path)
    assert "No space left on device; 100,000 of 300,000 bytes are kept" in message
    assert part_of(tmp_path) == CONTENT[:100_000]
    assert get(hub, tmp_path).read_bytes() == CONTENT
    assert hub.ranges[-1] == "bytes=100000-"


def test_download_folder_that_cannot_be_made_is_one_line(hub, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in error_of(hub, tmp_path / "file" / "folder")


# other processes and signals


def in_subprocess(hub, folder):
    """Starts `python data/tinystories.py` on the folder, as a user would."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "data" / "tinystories.py")]
        + ["--folder", str(folder), "--base-url", hub.url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(true, seconds=10):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


@pytest.mark.parametrize("seed", range(3))
def test_download_killed_at_any_moment_completes_later(hub, tmp_path, seed):
    hub.pace = 0.1  # 3 s in all
    process = in_subprocess(hub, tmp_path)
    wait_until(lambda: part_of(tmp_path))
    time.sleep(random.Random(seed).uniform(0, 0.5))
    process.kill()
    process.communicate()
    have = len(part_of(tmp_path))
    assert 0 < have < len(CONTENT) and part_of(tmp_path) == CONTENT[:have]
    hub.pace = 0.0
    assert get(hub, tmp_path).read_bytes() == CONTENT
    assert hub.ranges[-1] == f"bytes={have}-"


def test_main_interrupted_keeps_the_part(hub, tmp_path):
    hub.pace = 0.1
    process = in_subprocess(hub, tmp_path)
    wait_until(lambda: part_of(tmp_path))
    process.send_signal(2)
    _, err = process.communicate()
    assert process.returncode == 130 and "stopped: running again goes on" in err
    assert "Traceback" not in err and 0 < len(part_of(tmp_path)) < len(CONTENT)


def test_download_second_process_is_refused_while_the_first_works(hub, tmp_path):
    hub.pace = 0.1
    process = in_subprocess(hub, tmp_path)
    wait_until(lambda: part_of(tmp_path))
    assert f"another process is downloading {tmp_path / NAME} now" in error_of(hub, tmp_path)
    hub.pace = 0.0
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert (tmp_path / NAME).read_bytes() == CONTENT
    get(hub, tmp_path)  # the lock is free again


def test_main_fetches_both_files_and_checks_them(hub, tmp_path, capfd):
    arguments = ["--folder", str(tmp_path), "--base-url", hub.url]
    assert tinystories.main(arguments) == 0
    lines = capfd.readouterr().out.splitlines()
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert lines == [
        f"{tmp_path}/TinyStoriesV2-GPT4-{split}.txt  300,000 bytes  sha256 {digest}"
        for split in ("train", "valid")
    ] + ["ok: both files have the server's size and checksum"]
    (tmp_path / NAME).write_bytes(OTHER)  # as long: found by reading only
    assert tinystories.main(arguments) == 2
    assert "is damaged" in capfd.readouterr().err
