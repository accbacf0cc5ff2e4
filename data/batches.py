"""Token files on disk, and batches of them that are a pure function of (seed, step).

A token file is a flat array of uint16, `NAME.bin`, memory-mapped so that it may be larger than
memory, with `NAME.json` beside it: how many tokens and stories, which vocabulary made them, from
what. It begins with the END id and every story is followed by one:

    END s s s s END s s END s s s s s END

A row is a stretch of T inputs and the T targets one place to the right of them. Rows are cut in
one of two ways, and either way each token is a target once per epoch:

    "stories"  a row holds as many whole stories as fit and begins with the END before the first;
               places left over are padding: targets -100, which the losses ignore. No story is
               ever seen without its beginning, unless it is longer than T and has to be cut.
    "blocks"   every T tokens, wherever that falls: no padding, but most rows begin in mid-story.

Batch `step` of size B holds samples step*B .. step*B + B-1 of the endless sequence made of one
shuffle of all rows after another (but see `trim`); the shuffle of epoch e is drawn from (seed, e).
So the position in the data is one integer, nothing has to be replayed to resume at any step, and a
batch is a gather of half a millisecond: there is no loader process. With `device="cuda"` the whole
set lies on the GPU (2 bytes a token: TinyStories is 1.1 GB) and so does the gather.

With `trim` a batch is no wider than its longest row needs (in steps of 8 places, because a CPU's
library keeps code for each shape it meets), and the rows of 8 batches are sorted by length before
they are dealt out, so that the rows of a batch are of like length: less padding is computed. Those
batches come in an order of their own, so that long and short rows take turns. It is for a CPU; a
GPU's captured graph and compiled kernels want one shape.

Letters: B rows, T positions, R rows in an epoch.

Run: `python data/batches.py` (CPU, about 3 s on 2 cores of an AMD EPYC (Zen 5)) prints

    790,959 tokens, 5,000 stories, 1,581,918 bytes
    stories   4,636 rows, 83.4% begin with a story; batches of 16:  67.0% filled,   48 us each
    trimmed   4,636 rows, 83.4% begin with a story; batches of 16:  90.8% filled,   89 us each
    blocks    3,090 rows,  0.6% begin with a story; batches of 16: 100.0% filled,   45 us each
    ok: either way each token is a target exactly once per epoch
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

IGNORE = -100  # the target of padding: torch's ignore_index
SCAN = 1 << 24  # tokens looked at in one piece when searching for END
POOL = 8  # with `trim`: batches whose rows are sorted by length together
STEP = 8  # with `trim`: widths are multiples of this; a CPU's library keeps code for each shape


@dataclass(frozen=True)
class TokenFile:
    """What NAME.json says of NAME.bin."""

    vocabulary: str  # hash of the vocabulary that made the ids
    end: int  # id of the end-of-story token
    tokens: int  # all ids in the file, the first END included
    stories: int
    source: str  # the text: a path, or how it was made
    floor_nats: float | None = None  # entropy per target of this very text, where it is known


def beside(path: Path, suffix: str) -> Path:
    """path with `suffix` behind its whole name: with_suffix would cut a name at its last dot."""
    return path.with_name(path.name + suffix)


def check_ids(ids: np.ndarray, end: int, source: str) -> None:
    """Raises ValueError unless ids (n,) are whole numbers that uint16 holds, none of them END."""
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        shape = tuple(ids.shape)
        raise ValueError(f"{source}: ids of {ids.dtype} and shape {shape} must be integers, (n,)")
    if len(ids) and (ids.min() < 0 or ids.max() > 65535):
        raise ValueError(f"{source}: ids from {ids.min()} to {ids.max()} must fit uint16")
    if (ids == end).any():
        raise ValueError(f"{source}: a story with END ({end}) in it must be given as two")


def write_tokens(
    path: Path,
    stories: Iterable[np.ndarray],
    *,
    vocabulary: str,
    end: int,
    source: str,
    total_nats: float | None = None,
) -> TokenFile:
    """Writes path.bin and path.json from the ids of each story, END not included.

    The json is written last: where it stands, the tokens are complete and on disk.

    Args:
        stories: one uint16 array per story.
        total_nats: -log probability of all the stories together, where they come from a known
            distribution; over the number of targets it is the least mean loss to be expected.
    Raises: ValueError when there is no story, or ids that cannot be one's (see `check_ids`).
    """
    part = beside(path, ".part")
    count, tokens = 0, 1
    try:
        with open(part, "wb") as file:
            separator = np.array([end], dtype=np.uint16).tobytes()
            file.write(separator)
            for ids in stories:
                check_ids(ids, end, source)
                file.write(ids.astype(np.uint16, copy=False).tobytes() + separator)
                count, tokens = count + 1, tokens + len(ids) + 1
            file.flush()
            os.fsync(file.fileno())
        if count == 0:
            raise ValueError(f"{source}: no story found; wanted stories separated by <|endoftext|>")
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    floor = None if total_nats is None else total_nats / (tokens - 1)
    about = TokenFile(vocabulary, end, tokens, count, source, floor)
    beside(path, ".json").unlink(missing_ok=True)
    part.replace(beside(path, ".bin"))
    with open(part, "w") as file:
        file.write(json.dumps(asdict(about), indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(beside(path, ".json"))
    return about


def open_tokens(path: Path, vocabulary: str) -> tuple[np.ndarray, TokenFile]:
    """The memory-mapped uint16 ids of path.bin and what is known of them.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: the file is cut short, damaged, or made with another vocabulary.
    """
    binary, described = beside(path, ".bin"), beside(path, ".json")
    for file in (binary, described):
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing")
    try:
        about = TokenFile(**json.loads(described.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{described} is damaged: {error}") from error
    if about.vocabulary != vocabulary:
        raise ValueError(
            f"{binary} was made with vocabulary {about.vocabulary[:12]}, wanted {vocabulary[:12]}"
        )
    if binary.stat().st_size != 2 * about.tokens:
        raise ValueError(
            f"{binary} has {binary.stat().st_size} bytes, wanted {2 * about.tokens} for "
            f"{about.tokens} tokens"
        )
    # mode "c": torch wants writable memory; writes, which nobody does, would not reach the file
    return np.memmap(binary, dtype=np.uint16, mode="c"), about


def block_rows(tokens: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Start and number of targets of each row, both int64 (R,), for rows cut every seq_len."""
    starts = np.arange(0, tokens - 1, seq_len)
    return starts, np.minimum(seq_len, tokens - 1 - starts)


def story_rows(ids: np.ndarray, end: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Start and number of targets of each row, both int64 (R,), for rows of whole stories.

    A row begins at an END and ends at the last END that is at most seq_len places further; if
    there is none, the story is longer than a row and is cut every seq_len.

    Raises: ValueError unless the ids begin and end with END, with a story in between.
    """
    if len(ids) < 2 or ids[0] != end or ids[-1] != end:
        raise ValueError(f"{len(ids)} ids: the first and the last must be END, {end}")
    ends = np.concatenate(
        [i + np.flatnonzero(ids[i : i + SCAN] == end) for i in range(0, len(ids), SCAN)]
    )
    # for each END, the place of the last END that a row beginning there can reach
    reach = np.searchsorted(ends, ends + seq_len, side="right") - 1
    starts, i = [], 0
    while i < len(ends) - 1:
        if reach[i] > i:
            starts.append(ends[i : i + 1])
            i = reach[i]
        else:
            starts.append(np.arange(ends[i], ends[i + 1], seq_len))
            i += 1
    starts = np.concatenate(starts)
    return starts, np.diff(starts, append=ends[-1])


class Batches:
    """Batches of a token file, each a function of the step alone.

    Args:
        ids: (N,) uint16, as `open_tokens` returns them.
        rows: start and number of targets of each row, from `story_rows` or `block_rows`.
        batch_size, seq_len: B and T.
        seed: of the shuffles.
        device: where the tokens are kept and the batches are made.
        trim: rows of like length make a batch, which is no wider than the longest of them needs.
    """

    def __init__(
        self,
        ids: np.ndarray,
        rows: tuple[np.ndarray, np.ndarray],
        batch_size: int,
        seq_len: int,
        seed: int,
        device: torch.device | str = "cpu",
        trim: bool = False,
    ):
        self.starts, self.lengths = rows
        if ids.dtype != np.uint16:
            raise ValueError(f"ids of {ids.dtype} must be uint16, as open_tokens returns them")
        if len(self.lengths) == 0 or self.lengths.max() > seq_len:
            longest = max(self.lengths, default=0)
            raise ValueError(f"{len(self.lengths)} rows, the longest of {longest} targets: wanted "
                             f"one or more, of at most seq_len={seq_len}")  # fmt: skip
        self.batch_size, self.seq_len, self.seed, self.trim = batch_size, seq_len, seed, trim
        # int16 holds the same bits: torch cannot index uint16 on every device
        self.ids = torch.from_numpy(ids.view(np.int16)).to(device)
        self.places = torch.arange(seq_len + 1, device=device)  # (T+1,)
        self.order: dict[int, np.ndarray] = {}  # epoch -> its shuffle; at most two are kept

    def __len__(self) -> int:
        """Rows in an epoch."""
        return len(self.starts)

    def shuffle(self, epoch: int) -> np.ndarray:
        """The order of all rows in an epoch, (R,) int64."""
        if epoch not in self.order:
            self.order = {e: o for e, o in self.order.items() if e == epoch - 1}
            self.order[epoch] = np.random.default_rng((self.seed, epoch)).permutation(len(self))
        return self.order[epoch]

    def sequence(self, first: int, count: int) -> np.ndarray:
        """Rows first .. first + count - 1 of one shuffle after another, (count,) int64."""
        epochs, places = np.divmod(np.arange(first, first + count), len(self))
        return np.array([self.shuffle(int(e))[i] for e, i in zip(epochs, places)])

    def rows_of(self, step: int) -> np.ndarray:
        """Which rows batch `step` holds, (B,) int64."""
        B = self.batch_size
        if not self.trim:
            return self.sequence(step * B, B)
        pool, place = divmod(step, POOL)
        rows = self.sequence(pool * POOL * B, POOL * B)
        by_length = rows[np.argsort(self.lengths[rows], kind="stable")].reshape(POOL, B)
        return by_length[np.random.default_rng((self.seed, pool, POOL)).permutation(POOL)[place]]

    def batch(self, step: int, rank: int = 0, size: int = 1) -> tuple[Tensor, Tensor, int]:
        """Inputs (B, T) int64, targets (B, T) int64 with -100 for padding, number of targets.

        With `trim` T is the length of the longest row taken, to the next multiple of `STEP`.
        With size > 1 every size-th row only, from the rank-th on: the share of one of `size`
        processes. The number of targets is that of the whole batch in any case.
        """
        rows = self.rows_of(step)
        inputs, targets, _ = self.take(rows[rank::size])
        return inputs, targets, int(self.lengths[rows].sum())

    def take(self, rows: np.ndarray) -> tuple[Tensor, Tensor, int]:
        """The same three for the rows given, (B,) int64; B may be any number."""
        device = self.ids.device
        starts = torch.from_numpy(self.starts[rows]).to(device, non_blocking=True).unsqueeze(1)
        lengths = torch.from_numpy(self.lengths[rows]).to(device, non_blocking=True).unsqueeze(1)
        T = self.seq_len
        if self.trim:
            T = min(T, -(-self.lengths[rows].max(initial=1) // STEP) * STEP)
        places = (starts + self.places[: T + 1]).clamp_(max=len(self.ids) - 1)  # (B, T+1)
        tokens = self.ids[places].long() & 0xFFFF  # (B, T+1)
        targets = tokens[:, 1:].masked_fill(self.places[:T] >= lengths, IGNORE)
        return tokens[:, :-1], targets, int(self.lengths[rows].sum())


def demo() -> None:
    rng, end, seq_len = np.random.default_rng(0), 999, 256
    stories = [rng.integers(0, end, rng.integers(20, 300)).astype(np.uint16) for _ in range(5000)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random"
        about = write_tokens(path, stories, vocabulary="none", end=end, source="random numbers")
        ids, _ = open_tokens(path, "none")
        print(f"{about.tokens:,} tokens, {about.stories:,} stories, {2 * about.tokens:,} bytes")
        for name, rows, trim in (
            ("stories", story_rows(ids, end, seq_len), False),
            ("trimmed", story_rows(ids, end, seq_len), True),
            ("blocks", block_rows(len(ids), seq_len), False),
        ):
            batches = Batches(ids, rows, 16, seq_len, seed=0, trim=trim)
            whole = np.mean(ids[batches.starts] == end)
            targets, places, start = 0, 0, time.perf_counter()
            for step in range(200):
                inputs, _, count = batches.batch(step)
                targets, places = targets + count, places + inputs.numel()
            each = (time.perf_counter() - start) / 200
            print(
                f"{name:8s} {len(batches):6,} rows, {whole:5.1%} begin with a story; "
                f"batches of 16: {targets / places:6.1%} filled, {each * 1e6:4.0f} us each"
            )
            seen = np.concatenate([s + np.arange(n) for s, n in zip(*rows)])
            assert np.array_equal(np.sort(seen), np.arange(len(ids) - 1)), name
    print("ok: either way each token is a target exactly once per epoch")


if __name__ == "__main__":
    demo()
