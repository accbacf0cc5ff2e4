"""Tests of data/batches.py: files whole or refused, each token a target once, resuming, cost.

Run: python -m pytest tests/test_data_batches.py
"""

import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data import batches

END = 7
ABOUT = dict(vocabulary="hash of a vocabulary", end=END, source="made up")
LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=30)  # ids of each story, END left out


def made_up(lengths, seed=0):
    """Stories of these lengths, of ids other than END."""
    rng = np.random.default_rng(seed)
    return [rng.integers(END + 1, 60_000, n).astype(np.uint16) for n in lengths]


def flat(stories):
    """What the file should hold, spelled out."""
    ids = [END]
    for story in stories:
        ids += [*story.tolist(), END]
    return np.array(ids, dtype=np.uint16)


def numbered(tokens):
    """Ids that tell their own place, to be cut in blocks."""
    return np.arange(tokens, dtype=np.uint16)


def same(a, b):
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2] == b[2]


# the files


@settings(max_examples=50, deadline=None)
@given(LENGTHS)
@example([0])
def test_write_tokens_round_trip(tmp_path_factory, lengths):
    path, stories = tmp_path_factory.mktemp("tokens") / "some", made_up(lengths)
    about = batches.write_tokens(path, iter(stories), **ABOUT, total_nats=12.0)
    ids, read = batches.open_tokens(path, ABOUT["vocabulary"])
    assert np.array_equal(ids, flat(stories)) and ids.dtype == np.uint16
    assert read == about and (about.tokens, about.stories) == (len(ids), len(stories))
    assert {k: asdict(about)[k] for k in ABOUT} == ABOUT
    assert about.floor_nats == pytest.approx(12.0 / (len(ids) - 1))  # every id but the first
    assert sorted(p.name for p in path.parent.iterdir()) == ["some.bin", "some.json"]


def test_write_tokens_layout_is_end_story_end(tmp_path):
    stories = [np.array(s, dtype=np.uint16) for s in ([1, 2, 3], [], [4])]
    about = batches.write_tokens(tmp_path / "some", stories, **ABOUT)
    words = np.frombuffer((tmp_path / "some.bin").read_bytes(), dtype="<u2")
    assert words.tolist() == [END, 1, 2, 3, END, END, 4, END]
    assert about.floor_nats is None  # not known, not zero
    assert json.loads((tmp_path / "some.json").read_text()) == asdict(about)


def test_write_tokens_crash_among_the_stories_leaves_no_json(tmp_path):
    def stories():
        yield from made_up([5, 6])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        batches.write_tokens(tmp_path / "some", stories(), **ABOUT)
    assert not (tmp_path / "some.json").exists()
    with pytest.raises(FileNotFoundError):
        batches.open_tokens(tmp_path / "some", ABOUT["vocabulary"])
    batches.write_tokens(tmp_path / "some", made_up([5]), **ABOUT)  # what is left is no hindrance
    ids, _ = batches.open_tokens(tmp_path / "some", ABOUT["vocabulary"])
    assert np.array_equal(ids, flat(made_up([5])))


@pytest.mark.parametrize("moment", ["stories", ".bin", ".json"])
def test_write_tokens_crash_over_an_older_file_never_mixes_the_two(tmp_path, monkeypatch, moment):
    """Same length, so that nothing but the order of writing tells the old from the new."""
    path, older = tmp_path / "some", made_up([5, 6])
    batches.write_tokens(path, older, **ABOUT)

    def newer():
        yield from made_up([5, 6], seed=1)
        if moment == "stories":
            raise KeyboardInterrupt

    def replace(part, target):
        if Path(target).suffix == moment:
            raise KeyboardInterrupt
        os.replace(part, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        batches.write_tokens(path, newer(), **{**ABOUT, "source": "newer"})
    if moment == "stories":
        ids, about = batches.open_tokens(path, ABOUT["vocabulary"])
        assert np.array_equal(ids, flat(older)) and about.source == ABOUT["source"]
    else:
        with pytest.raises(FileNotFoundError, match=r"some\.json"):
            batches.open_tokens(path, ABOUT["vocabulary"])


def test_write_tokens_without_a_story_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="made up: no story"):
        batches.write_tokens(tmp_path / "some", [], **ABOUT)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def written(tmp_path):
    batches.write_tokens(tmp_path / "some", made_up([5, 9]), **ABOUT)
    return tmp_path / "some"


@pytest.mark.parametrize("suffix", [".bin", ".json"])
def test_open_tokens_names_the_missing_file(written, suffix):
    written.with_suffix(suffix).unlink()
    with pytest.raises(FileNotFoundError, match=rf"some\{suffix} is missing"):
        batches.open_tokens(written, ABOUT["vocabulary"])


@pytest.mark.parametrize("change", [-34, -2, -1, 1, 2])
def test_open_tokens_refuses_another_length(written, change):
    content = written.with_suffix(".bin").read_bytes()  # 17 tokens
    written.with_suffix(".bin").write_bytes((content + b"\0\0")[: len(content) + change])
    with pytest.raises(ValueError, match=rf"has {34 + change} bytes, wanted 34 for 17 tokens"):
        batches.open_tokens(written, ABOUT["vocabulary"])


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[:-10],
        lambda text: "[]",
        lambda text: "null",
        lambda text: text.replace('"tokens"', '"tokns"'),
        lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "end"}),
    ],
    ids=["empty", "cut", "list", "null", "misspelt", "incomplete"],
)
def test_open_tokens_refuses_a_damaged_json(written, damage):
    described = written.with_suffix(".json")
    described.write_text(damage(described.read_text()))
    with pytest.raises(ValueError, match=r"some\.json is damaged"):
        batches.open_tokens(written, ABOUT["vocabulary"])


def test_open_tokens_refuses_another_vocabulary(written):
    with pytest.raises(ValueError, match="made with vocabulary hash of a vo, wanted other"):
        batches.open_tokens(written, "other")


# the rows


def greedy_rows(ids, seq_len):
    """(start, number of targets) of each row of whole stories, one place at a time."""
    rows, at, last = [], 0, len(ids) - 1
    while at < last:
        within = [e for e in range(at + 1, min(at + seq_len, last) + 1) if ids[e] == END]
        if within:
            rows.append((at, within[-1] - at))
            at = within[-1]
            continue
        end = next(e for e in range(at + 1, last + 1) if ids[e] == END)
        while at < end:
            rows.append((at, min(seq_len, end - at)))
            at += rows[-1][1]
    return rows


def pairs(rows):
    starts, lengths = rows
    return list(zip(starts.tolist(), lengths.tolist()))


def is_target_once(rows, tokens):
    """Every place but the first is predicted by exactly one row."""
    targets = [start + 1 + i for start, length in pairs(rows) for i in range(length)]
    return sorted(targets) == list(range(1, tokens))


@settings(max_examples=300, deadline=None)
@given(LENGTHS, st.integers(1, 50), st.sampled_from([1, 2, 3, 8, 1 << 24]))
@example([0], 1, 1)
@example([0, 0, 0], 2, 2)
@example([9, 10, 11], 10, 4)  # with its END a story just fits, is one too long, is two too long
@example([4, 4, 4], 10, 5)  # two fit to the last place
@example([40], 7, 6)
def test_story_rows_are_the_greedy_ones(lengths, seq_len, scan):
    ids = flat(made_up(lengths))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "SCAN", scan)
        rows = batches.story_rows(ids, END, seq_len)
    assert pairs(rows) == greedy_rows(ids, seq_len)
    assert is_target_once(rows, len(ids))
    assert rows[0].dtype == rows[1].dtype == np.int64
    assert 1 <= rows[1].min() and rows[1].max() <= seq_len


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 300), st.integers(1, 50))
@example(2, 1)
@example(21, 10)
@example(22, 10)
def test_block_rows_cover_each_target_once(tokens, seq_len):
    rows = batches.block_rows(tokens, seq_len)
    assert is_target_once(rows, tokens)
    assert rows[0].dtype == rows[1].dtype == np.int64
    assert set(rows[1][:-1].tolist()) <= {seq_len} and 1 <= rows[1][-1] <= seq_len


@pytest.mark.parametrize("scan", [*range(1, 14), 100])
def test_story_rows_find_an_end_at_every_piece_boundary(monkeypatch, scan):
    ids = flat(made_up([0, 3, 1, 4, 0]))
    assert len(ids) == 14
    monkeypatch.setattr(batches, "SCAN", scan)
    assert pairs(batches.story_rows(ids, END, 5)) == [(0, 5), (5, 2), (7, 5), (12, 1)]


# the batches


@settings(max_examples=100, deadline=None)
@given(
    LENGTHS, st.integers(1, 50), st.integers(1, 9), st.booleans(), st.integers(0, 2**32),
    st.booleans(),
)  # fmt: skip
def test_batch_targets_are_inputs_shifted_and_padding_ignored(
    lengths, seq_len, batch_size, whole, seed, trim
):
    ids = flat(made_up(lengths))
    rows = batches.story_rows(ids, END, seq_len) if whole else batches.block_rows(len(ids), seq_len)
    data = batches.Batches(ids, rows, batch_size, seq_len, seed, trim=trim)
    for step in range(3):
        inputs, targets, count = data.batch(step)
        longest = max(rows[1][row] for row in data.rows_of(step))
        width = min(seq_len, math.ceil(longest / 8) * 8) if trim else seq_len
        assert inputs.shape == targets.shape == (batch_size, width)
        assert inputs.dtype == targets.dtype == torch.int64
        assert count == int((targets != batches.IGNORE).sum()) and type(count) is int
        for x, y, row in zip(inputs.tolist(), targets.tolist(), data.rows_of(step)):
            start, length = rows[0][row], rows[1][row]
            assert x[:length] == ids[start : start + length].tolist()
            assert y[:length] == ids[start + 1 : start + 1 + length].tolist()
            assert x[1:length] == y[: length - 1]
            assert y[length:] == [-100] * (width - length)
            assert all(0 <= token < 2**16 for token in x)  # an embedding has a row for padding too


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4, 7, 10, 16, 45])
def test_batch_depends_on_seed_and_step_only(batch_size, trim):
    ids = numbered(101)
    rows = batches.block_rows(len(ids), 10)  # 10 rows: the steps go through many epochs

    def fresh(seed=5):
        return batches.Batches(ids, rows, batch_size, 10, seed, trim=trim)

    one = fresh()
    forward = [one.batch(step) for step in range(40)]
    for step in [*reversed(range(40)), *np.random.default_rng(0).permutation(40).tolist()]:
        assert same(one.batch(step), forward[step])
    for step in (0, 1, 13, 39):
        assert same(fresh().batch(step), forward[step])
    other = fresh(seed=6)
    assert not all(same(other.batch(step), forward[step]) for step in range(40))
    assert one.rows_of(3).tolist() == fresh().rows_of(3).tolist()


@pytest.mark.parametrize("rows, batch_size", [(10, 3), (10, 10), (10, 7), (7, 16), (64, 5), (1, 3)])
def test_batch_has_each_row_once_per_epoch(rows, batch_size):
    ids = numbered(rows * 10 + 1)
    data = batches.Batches(ids, batches.block_rows(len(ids), 10), batch_size, 10, seed=3)
    assert len(data) == rows
    seen = [i for step in range(6 * rows) for i in (data.batch(step)[0][:, 0] // 10).tolist()]
    epochs = [seen[i : i + rows] for i in range(0, len(seen) - rows + 1, rows)]
    assert len(epochs) >= 6
    for epoch in epochs:
        assert sorted(epoch) == list(range(rows))
    if rows >= 10:
        assert list(range(rows)) not in epochs
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_trimmed_batches_are_those_of_a_pool_by_length(batch_size):
    """The same rows in every POOL batches, lengths apart, and not from short to long each time."""
    rng = np.random.default_rng(0)
    ids = flat(made_up(rng.integers(0, 40, 500)))
    rows = batches.story_rows(ids, END, 40)
    plain, trimmed = (batches.Batches(ids, rows, batch_size, 40, 1, trim=t) for t in (False, True))
    ascending = []
    for pool in range(20):
        steps = range(pool * batches.POOL, (pool + 1) * batches.POOL)
        of = [trimmed.rows_of(step) for step in steps]
        assert sorted(np.concatenate(of)) == sorted(np.concatenate([*map(plain.rows_of, steps)]))
        spans = sorted((min(rows[1][r]), max(rows[1][r])) for r in of)
        assert all(longest <= next_[0] for (_, longest), next_ in zip(spans, spans[1:]))
        ascending.append(spans == [(min(rows[1][r]), max(rows[1][r])) for r in of])
    assert not any(ascending[:2]) and sum(ascending) < 5
    x, y, _ = trimmed.batch(3, rank=0, size=2)  # a process's own rows are cut to their own width
    assert 0 <= x.shape[1] - rows[1][trimmed.rows_of(3)[::2]].max() < 8 and x.shape == y.shape


def test_batch_shuffles_seeds_and_epochs_apart():
    """Neither the next epoch nor the next seed repeats a shuffle, whichever of the two goes up."""
    rows = batches.block_rows(1001, 10)
    shuffles = {
        tuple(batches.Batches(numbered(1001), rows, 100, 10, seed).rows_of(epoch).tolist())
        for seed in range(8)
        for epoch in range(8)
    }
    assert len(shuffles) == 64


def test_batch_keeps_ids_up_to_65535(tmp_path):
    story = np.array([0, 1, 32767, 32768, 32769, 65534, 65535], dtype=np.uint16)
    batches.write_tokens(tmp_path / "some", [story], **{**ABOUT, "end": 50256})
    ids, about = batches.open_tokens(tmp_path / "some", ABOUT["vocabulary"])
    data = batches.Batches(ids, batches.story_rows(ids, about.end, 10), 1, 10, seed=0)
    inputs, targets, count = data.batch(0)
    assert inputs[0, :8].tolist() == [50256, *story.tolist()]
    assert targets[0].tolist() == [*story.tolist(), 50256, -100, -100] and count == 8


@pytest.mark.parametrize("number", [0, 1, 3, 4, 11])
def test_take_gives_any_rows_in_the_order_asked(number):
    ids = numbered(48)  # 5 rows, the last of 7
    data = batches.Batches(ids, batches.block_rows(len(ids), 10), 4, 10, seed=0)
    wanted = np.arange(number)[::-1] % 5
    inputs, targets, count = data.take(wanted)
    assert inputs.shape == targets.shape == (number, 10)
    assert inputs[:, 0].tolist() == (10 * wanted).tolist()
    assert count == sum(7 if row == 4 else 10 for row in wanted)
    assert count == int((targets != -100).sum())


def test_batch_is_cheap(tmp_path):
    """At most 1% of a training step of 120 ms on two CPU cores."""
    rng = np.random.default_rng(0)
    batches.write_tokens(tmp_path / "some", made_up(rng.integers(50, 250, 3000)), **ABOUT)
    ids, _ = batches.open_tokens(tmp_path / "some", ABOUT["vocabulary"])
    starts, lengths = batches.story_rows(ids, END, 200)
    rows = np.tile(starts, 100), np.tile(lengths, 100)  # so many that a shuffle a batch would show
    data = batches.Batches(ids, rows, 8, 200, seed=0)
    seconds = []
    for step in range(200):
        start = time.perf_counter()
        data.batch(step)
        seconds.append(time.perf_counter() - start)
    assert statistics.median(seconds) < 1.2e-3  # takes about 0.1 ms


def test_demo_runs_and_ends_with_ok():
    script = Path(batches.__file__)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("ok")


def test_write_tokens_refuses_ids_beyond_uint16(tmp_path):
    for ids in (np.array([5, 65536]), np.array([-1])):
        with pytest.raises(ValueError, match="must fit uint16"):
            batches.write_tokens(tmp_path / "a", [ids], vocabulary="x", end=0, source="test")


def test_names_with_dots_are_kept_apart(tmp_path):
    for name, ids in (("v1.train", [1, 2]), ("v1.val", [3])):
        array = np.array(ids, dtype=np.uint16)
        batches.write_tokens(tmp_path / name, [array], vocabulary="x", end=0, source="test")
    assert batches.open_tokens(tmp_path / "v1.train", "x")[0].tolist() == [0, 1, 2, 0]
    assert batches.open_tokens(tmp_path / "v1.val", "x")[0].tolist() == [0, 3, 0]


@pytest.mark.parametrize(
    "story, wanted",
    [
        (np.array([1.7, 2.0]), "must be integers"),
        (np.array([[1, 2]]), "must be integers"),
        (np.array([1, END, 2]), "must be given as two"),
    ],
)
def test_write_tokens_refuses_what_is_no_story_and_leaves_nothing(story, wanted, tmp_path):
    with pytest.raises(ValueError, match=wanted):
        batches.write_tokens(tmp_path / "x", [story], vocabulary="v", end=END, source="made up")
    assert list(tmp_path.iterdir()) == []


def test_batches_refuse_rows_and_ids_that_do_not_fit():
    ids = np.array([END, 1, 2, END, 3, END], dtype=np.uint16)
    rows = batches.story_rows(ids, END, 8)
    with pytest.raises(ValueError, match="must be uint16"):
        batches.Batches(ids.astype(np.int64), rows, 1, 8, seed=0)
    with pytest.raises(ValueError, match="the longest of 5 targets"):
        batches.Batches(ids, rows, 1, 4, seed=0)
    with pytest.raises(ValueError, match="0 rows"):
        batches.Batches(ids, (rows[0][:0], rows[1][:0]), 1, 8, seed=0)
    with pytest.raises(ValueError, match="first and the last must be END"):
        batches.story_rows(ids, END + 1, 8)
