"""From a text to tokens on disk: vocabulary and token files, made once and kept in a cache.

    text     the built-in stories, TinyStories, or a UTF-8 file with stories between <|endoftext|>
    split    stories to train on and stories to validate on; no story is on both sides
    tokens   a vocabulary learned from the first, and both as uint16 ids in memory-mapped files

The cache's folder is named after a hash of what the tokens depend on: the text, the tokeniser's
code, the size of the vocabulary, the split. It appears under its name only when it is complete, so
a killed process leaves nothing that another would take for whole.

Run: `python -m data.corpus` prepares 2,000 built-in stories in a temporary folder and prints

    data     prepared in 0.9 s, kept in ...
    built-in stories, train: 2,000 stories, 484,411 tokens
    built-in stories, val: 500 stories, 121,563 tokens
    begins: In a small town, there were shy twins named Milo and Nick. More than anyt
    floor: 0.1905 nats/token, known from the grammar
    ok: the second time the tokens come from the cache
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import batches, bpe, stories, tinystories

HELD_OUT = 50  # of a user's file, one story in 50 is kept for validation
VAL_STORIES = 500  # built-in stories to validate on


@dataclass(frozen=True)
class Text:
    """Stories to train on, and others to validate on. Each call reads them from the beginning."""

    name: str
    identity: object  # what has to be equal for prepared tokens to be used again
    train: Callable[[], Iterable[str]]
    val: Callable[[], Iterable[str]]
    val_nats: float | None = None  # -ln probability of all val stories, where it is known


@dataclass(frozen=True)
class Data:
    vocabulary: bpe.Vocabulary
    train: np.ndarray  # uint16 ids
    val: np.ndarray
    about_train: batches.TokenFile
    about_val: batches.TokenFile


def builtin_text(story_count: int) -> Text:
    val = list(stories.corpus(VAL_STORIES, seed=1))
    return Text(
        name="built-in stories",
        identity=(Path(stories.__file__).read_bytes(), story_count),
        train=lambda: (story for story, _ in stories.corpus(story_count, seed=0)),
        val=lambda: (story for story, _ in val),
        val_nats=-sum(log_probability for _, log_probability in val),
    )


def tinystories_text(cache: Path) -> Text:
    train, val = (tinystories.download(split, cache) for split in ("train", "valid"))
    return Text(
        name="TinyStoriesV2-GPT4",
        identity=(train.stat().st_size, val.stat().st_size),
        train=lambda: bpe.read_stories(train),
        val=lambda: bpe.read_stories(val),
    )


def file_text(path: Path) -> Text:
    """A user's file. One story in 50 is held out for validation, by a checksum of its text:
    so the choice does not move when the file grows, and copies of a story stay on one side."""

    def split(held_out: bool) -> Iterator[str]:
        found = False
        for story in bpe.read_stories(path):
            if (zlib.crc32(story.encode()) % HELD_OUT == 0) == held_out:
                found = True
                yield story
        if held_out and not found:
            raise ValueError(
                f"{path}: too few stories: none fell to validation, which takes one in {HELD_OUT}; "
                "wanted some hundred stories separated by <|endoftext|>"
            )

    if not path.is_file():
        raise FileNotFoundError(
            f"--data {path}: no such file; wanted 'stories', 'tinystories' or a UTF-8 text file "
            "with stories separated by <|endoftext|>"
        )
    about = path.stat()
    return Text(
        name=path.name,
        identity=(str(path.resolve()), about.st_size, about.st_mtime_ns),
        train=lambda: split(held_out=False),
        val=lambda: split(held_out=True),
    )


def prepare(name: str, cache: Path, vocab_size: int, story_count: int = 20_000) -> Data:
    """Vocabulary and tokens of a text: from the cache, or made now.

    Args:
        name: "stories" (built in, `story_count` of them), "tinystories" (downloaded into the
            cache), or the path of a text file.
        vocab_size: tokens, at most; a small text may have fewer.
    Raises: FileNotFoundError and ValueError where the text or the cached tokens are not as wanted,
    `tinystories.DownloadError`.
    """
    if name == "stories":
        text = builtin_text(story_count)
    elif name == "tinystories":
        text = tinystories_text(cache)
    else:
        text = file_text(Path(name))
    code = Path(bpe.__file__).read_bytes(), Path(batches.__file__).read_bytes()
    made_from = (text.identity, code, vocab_size, HELD_OUT, VAL_STORIES)
    key = hashlib.sha256(repr(made_from).encode()).hexdigest()[:12]
    folder = cache / f"tokens-{key}"
    if not folder.exists():
        started = time.perf_counter()
        cache.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f"tokens-{key}.", suffix=".part", dir=cache))
        try:
            vocabulary = bpe.train(text.train(), vocab_size)
            vocabulary.save(part / "vocabulary.json")
            for split, read, nats in (
                ("train", text.train, None),
                ("val", text.val, text.val_nats),
            ):
                batches.write_tokens(
                    part / split,
                    bpe.encode(read(), vocabulary),
                    vocabulary=vocabulary.hash,
                    end=vocabulary.end,
                    source=f"{text.name}, {split}",
                    total_nats=nats,
                )
            if not folder.exists():  # or another run has made the same in the meantime
                part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        print(f"data     prepared in {time.perf_counter() - started:.1f} s, kept in {folder}")
    try:
        vocabulary = bpe.Vocabulary.load(folder / "vocabulary.json")
        train, about_train = batches.open_tokens(folder / "train", vocabulary.hash)
        val, about_val = batches.open_tokens(folder / "val", vocabulary.hash)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{error}; delete {folder} to have it made again") from error
    return Data(vocabulary, train, val, about_train, about_val)


def demo() -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = prepare("stories", Path(folder), vocab_size=512, story_count=2000)
        for about, ids in ((data.about_train, data.train), (data.about_val, data.val)):
            assert about.tokens == len(ids) and ids[0] == ids[-1] == data.vocabulary.end
            print(f"{about.source}: {about.stories:,} stories, {about.tokens:,} tokens")
        text = data.vocabulary.encoding().decode(data.train[1:30].tolist())
        print(f"begins: {text}")
        print(f"floor: {data.about_val.floor_nats:.4f} nats/token, known from the grammar")
        again = prepare("stories", Path(folder), vocab_size=512, story_count=2000)
        assert again.about_train == data.about_train and np.array_equal(again.train, data.train)
    print("ok: the second time the tokens come from the cache")


if __name__ == "__main__":
    demo()
