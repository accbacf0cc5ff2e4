"""A byte-level BPE tokeniser: trained here in plain Python, executed by tiktoken.

A text is first cut into pieces (about: words with the space before them, numbers, signs) by a
regular expression, and no token ever spans two pieces. Byte-pair encoding then names frequent
stretches of bytes within the pieces:

    ids 0..255       the single bytes, so that every text has an encoding
    id  256 + i      merge i = (a, b), standing for bytes(a) + bytes(b), where (a, b) is the pair
                     of neighbours with the highest count  sum over pieces p of
                     count(p) * (places in p where b follows a),  counted after merges 0..i-1
    ids at the end   special tokens; no text is ever encoded to one of them

    encode           cut into pieces; in each apply merges 0, 1, 2, ... from left to right

Ties go to the pair with the smaller a, then the smaller b: to older tokens. Training stops early
when no pair occurs twice. A smaller vocabulary is the beginning of any larger one.

tiktoken is given only the bytes of each token, and joins again and again those two neighbours
whose joined bytes have the lowest id. That is the same as replaying the merges, because no two
merges make the same bytes: what stands left and right of a stretch of bytes cannot change how it
is merged inside, as long as no token reaches across its ends. The tests replay the merges.

`to_huggingface` writes the same tokeniser as files that transformers loads offline, and
`from_huggingface` reads them back; neither needs transformers.

Letters: V vocabulary size, everything counted: 256 bytes + merges + special tokens.

Sources: Gage 1994 (The C Users Journal 12(2): the compression algorithm); Sennrich et al. 2016
(arXiv 1508.07909: for words); Radford et al. 2019 (GPT-2: on bytes, pieces by a regular
expression). The expression is GPT-4's (cl100k_base in the source of tiktoken). Counting and ties
are those of Hugging Face's BpeTrainer, which the tests compare with.

Run: `python data/bpe.py` (CPU, 0.2 s on one core of an AMD EPYC (Zen 5)), or
`python data/bpe.py FILE` for a text with stories separated by <|endoftext|>; the first prints

    900 stories to train on, 100 held out (23,870 bytes)
    asked for V = 4096, had pairs enough for V = 464; the first merges:
    ' a' ' t' 'ed' ' i' ' th' ' the' ' "' 'ho' 'li' 'ne' 'ou' 'nd'
        V   bytes/token   the beginning of a held-out story
      257         1.000   O|n|c|e| |t|h|e|r|e| |w|a|s| |a| |l|i|t|t|l|e| |k|i|t|t|e|n| |n|a|m|e|d
      300         1.567   O|nc|e| the|re| was| a| li|tt|l|e| |k|i|tt|en| na|m|ed
      400         2.994   Once| there| was| a| little| k|itt|en| named
      464         3.855   Once| there| was| a| little| kitten| named
    ok: every held-out story comes back byte for byte, and no text is encoded to END
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from heapq import heapify, heappop, heappush
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import regex  # tiktoken depends on it: the standard library's re lacks \p{L}
import tiktoken

END_OF_TEXT = "<|endoftext|>"
MAX_VOCAB = 1 << 16  # ids are stored as uint16
MIN_COUNT = 2  # a pair that occurs once is no pattern

# What bounds the memory, however large or odd the input is.
CHUNK = 1 << 20  # bytes read from a file at once
LONGEST_STORY = 1 << 22  # bytes; War and Peace is 3.2 MB
SAMPLE = 1 << 25  # characters that training looks at, drawn from all stories if they have more
PER_STORY = 100  # what a story in the sample takes beside its characters, about as many bytes
MOST_PIECES = 1 << 18  # distinct pieces that are counted; the rarest are dropped when more turn up
LONGEST_PIECE = 64  # bytes; longer ones (base64, DNA) are cut up, in training only

# As in cl100k, with two differences. "At most 256" in two places: both engines step back through a
# run of white space, and without a bound a million spaces take minutes or overflow tiktoken's
# stack. And white space at the end of a text is cut as anywhere else, where cl100k keeps it whole.
PATTERN = "|".join(
    (
        r"'(?i:[sdmt]|ll|ve|re)",  # the ends of it's, I'd, I'm, don't, we'll, I've, you're
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # letters, with one space or sign before them
        r"\p{N}{1,3}",  # digits, three at most
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # signs, with a space before and line ends after them
        r"\s{0,256}[\r\n]",  # white space up to the last line end in it
        r"\s{1,256}(?!\S)",  # other white space, but its last goes with the next word
        r"\s",
    )
)


def read_stories(path: str | Path) -> Iterator[str]:
    """The stories of a UTF-8 file that separates them by <|endoftext|>, one after another.

    White space around a story is removed and empty stories are skipped. Holds one story and one
    chunk in memory, whatever the size of the file.

    Raises: ValueError where the file is not UTF-8, has no story, or has no separator at all or
        for LONGEST_STORY bytes: then it is not such a file, and nothing could be learnt from it.
    """
    separator = END_OF_TEXT.encode()

    def wrong(what: str) -> ValueError:
        return ValueError(
            f"{path}: {what}; wanted UTF-8 text with stories separated by {END_OF_TEXT}"
        )

    def decode(data: bytes, start: int) -> str:
        try:
            return data.decode().strip()
        except UnicodeDecodeError as error:
            place = start + error.start
            raise wrong(f"byte {place:,} is not UTF-8 ({error.reason})") from error

    # Splitting bytes is safe: in UTF-8 no part of another character looks like the separator.
    start, rest = 0, b""  # what is still to be split, and at which byte of the file it begins
    separated = found = False
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            *stories, rest = (rest + chunk).split(separator)
            for data in stories:
                separated = True
                if story := decode(data, start):
                    found = True
                    yield story
                start += len(data) + len(separator)
            if len(rest) > LONGEST_STORY:
                size = f"{LONGEST_STORY >> 20} MiB"
                raise wrong(f"no {END_OF_TEXT} in {size} from byte {start:,} on")
    story, size = decode(rest, start), start + len(rest)
    if story and not separated:
        raise wrong(f"no {END_OF_TEXT} in its {size:,} bytes")
    if story:
        yield story
    elif not found:
        raise wrong(f"no text in its {size:,} bytes")


def draw_sample(stories: Iterable[str], most: int = SAMPLE) -> list[str]:
    """All stories if they have at most `most` characters; otherwise as many as fit, at random.

    Each story draws a number and those with the lowest are kept, so the sample is spread evenly
    over a stream of any length. The same stream gives the same sample. A story counts `PER_STORY`
    characters more than it has, and an empty one is left out.
    """
    rng, kept, size = Random(0), [], 0  # kept: a heap with the highest draw on top
    for story in stories:
        if not story:
            continue
        heappush(kept, (-rng.random(), story))
        size += len(story) + PER_STORY
        while size > most and len(kept) > 1:
            size -= len(heappop(kept)[1]) + PER_STORY
    return [story for _, story in kept]


def count_pieces(stories: Iterable[str], most: int = MOST_PIECES) -> dict[bytes, int]:
    """How often each of at most `most` distinct pieces occurs in the stories.

    Whenever there are more of them, the rarer half is forgotten.
    """
    find, counts = regex.compile(PATTERN).findall, Counter()
    for story in stories:
        counts.update(find(story))
        if len(counts) > most:
            counts = Counter(dict(counts.most_common(most // 2)))
    pieces = Counter()
    for piece, count in counts.items():
        data = piece.encode(errors="replace")  # lone surrogates, which json can hold
        for start in range(0, len(data), LONGEST_PIECE):
            pieces[data[start : start + LONGEST_PIECE]] += count
    return dict(pieces.most_common(most))


def merge(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """ids with `new` in place of each occurrence of the pair, from left to right."""
    a, b = pair
    merged, i, last = [], 0, len(ids) - 1
    while i <= last:
        if ids[i] == a and i < last and ids[i + 1] == b:
            merged.append(new)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


def learn_merges(pieces: dict[bytes, int], most: int) -> list[tuple[int, int]]:
    """At most `most` merges for pieces that occur so many times each, in the order of their ids.

    A merge changes the counts only in the pieces that hold its pair, and it can raise only the
    counts of pairs with the new token. So there is an index of pieces by pair, and a heap in
    which each pair stands once, with a count that may be out of date but never too low.
    """
    words, counts = [list(piece) for piece in pieces], list(pieces.values())
    pair_counts = Counter()
    holders = defaultdict(set)  # pair -> indices of all words that hold it, and perhaps others
    for index, (word, count) in enumerate(zip(words, counts)):
        for pair in pairwise(word):
            pair_counts[pair] += count
            holders[pair].add(index)
    heap = [(-count, pair) for pair, count in pair_counts.items()]  # ties: smallest pair first
    heapify(heap)
    merges = []
    while heap and len(merges) < most:
        negative, pair = heappop(heap)
        count = pair_counts[pair]
        if count < MIN_COUNT:
            continue
        if count < -negative:
            heappush(heap, (-count, pair))
            continue
        new = 256 + len(merges)
        merges.append(pair)
        born = set()
        for index in holders.pop(pair):
            before, after = words[index], merge(words[index], pair, new)
            words[index] = after
            for old in pairwise(before):
                pair_counts[old] -= counts[index]
            for now in pairwise(after):
                pair_counts[now] += counts[index]
                if new in now:
                    born.add(now)
                    holders[now].add(index)
        for now in born:
            heappush(heap, (-pair_counts[now], now))
    return merges


@dataclass(frozen=True)
class Vocabulary:
    """A trained vocabulary: all that decides which ids a text is encoded to."""

    merges: tuple[tuple[int, int], ...]
    special_tokens: tuple[str, ...] = (END_OF_TEXT,)
    pattern: str = PATTERN

    @property
    def size(self) -> int:
        """V: ids run from 0 to V-1."""
        return 256 + len(self.merges) + len(self.special_tokens)

    @property
    def end(self) -> int:
        """The id of <|endoftext|>."""
        return 256 + len(self.merges) + self.special_tokens.index(END_OF_TEXT)

    @cached_property
    def tokens(self) -> list[bytes]:
        """The bytes that each id stands for, special tokens left out."""
        tokens = [bytes([value]) for value in range(256)]
        for a, b in self.merges:
            tokens.append(tokens[a] + tokens[b])
        return tokens

    @property
    def token_bytes(self) -> list[int]:
        """How many bytes of text each id stands for; a special token: 0."""
        return [len(token) for token in self.tokens] + [0] * len(self.special_tokens)

    @property
    def content(self) -> dict:
        """The fields, as json holds them."""
        return {name: getattr(self, name) for name in ("merges", "special_tokens", "pattern")}

    @property
    def hash(self) -> str:
        """SHA-256 of the content, in hexadecimal: equal only for equal vocabularies."""
        return hashlib.sha256(json.dumps(self.content).encode()).hexdigest()

    def encoding(self) -> tiktoken.Encoding:
        """The tiktoken encoding with these ids; `encode_ordinary` is the method for text."""
        return tiktoken.Encoding(
            name=f"bpe-{self.hash[:12]}",
            pat_str=self.pattern,
            mergeable_ranks={token: i for i, token in enumerate(self.tokens)},
            special_tokens=dict(zip(self.special_tokens, range(len(self.tokens), self.size))),
            explicit_n_vocab=self.size,
        )

    def save(self, path: str | Path) -> None:
        """Writes the vocabulary as json; under its name stands a whole file or none."""
        path = Path(path)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            with open(part, "w") as file:
                json.dump({"hash": self.hash, **self.content}, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """The vocabulary that `save` wrote.

        Raises: FileNotFoundError; ValueError when the file is not as it was written.
        """
        try:
            stored = json.loads(Path(path).read_bytes())
            vocabulary = cls(
                merges=tuple((a, b) for a, b in stored["merges"]),
                special_tokens=tuple(stored["special_tokens"]),
                pattern=stored["pattern"],
            )
            if stored["hash"] != vocabulary.hash:
                raise ValueError("its contents do not match its hash")
        except (ValueError, TypeError, KeyError) as error:
            why = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(
                f"{path} is damaged ({why}); wanted a vocabulary as Vocabulary.save writes it: "
                "train it again or restore a copy"
            ) from error
        return vocabulary


def train(
    stories: Iterable[str],
    vocab_size: int,
    special_tokens: tuple[str, ...] = (END_OF_TEXT,),
) -> Vocabulary:
    """A vocabulary of V = vocab_size ids, or fewer where the text runs out of pairs to merge.

    Reads the stories once and keeps a bounded sample of them; see the constants above. The
    order of the stories makes no difference unless one of those bounds is met.

    Raises: ValueError for a vocab_size out of range, for special_tokens without <|endoftext|> or
        with a repetition, and for one text where an iterable of texts is wanted.
    """
    for name, value in (("stories", stories), ("special_tokens", special_tokens)):
        if isinstance(value, (str, bytes)):
            raise ValueError(f"{name}={value[:20]!r} must be an iterable of texts, as in [text]")
    least = 256 + len(special_tokens)
    if not least <= vocab_size <= MAX_VOCAB:
        raise ValueError(
            f"vocab_size={vocab_size} must be {least} to {MAX_VOCAB}: 256 bytes and "
            f"{len(special_tokens)} special at least, and ids are stored as uint16"
        )
    if END_OF_TEXT not in special_tokens:
        raise ValueError(f"special_tokens={special_tokens} must hold {END_OF_TEXT!r}")
    if len(set(special_tokens)) < len(special_tokens):
        raise ValueError(f"special_tokens={special_tokens} must hold each one once")
    pieces = count_pieces(draw_sample(stories))
    return Vocabulary(tuple(learn_merges(pieces, vocab_size - least)), tuple(special_tokens))


def encode(stories: Iterable[str], vocabulary: Vocabulary) -> Iterator[np.ndarray]:
    """The ids of each story, a uint16 array without END; what looks special is ordinary text."""
    if isinstance(stories, (str, bytes)):
        raise ValueError(f"stories={stories[:20]!r} must be an iterable of texts, as in [text]")
    encode_ordinary = vocabulary.encoding().encode_ordinary
    for story in stories:
        yield np.array(encode_ordinary(story), dtype=np.uint16)


# Interchange with Hugging Face: a folder that `AutoTokenizer.from_pretrained` loads offline.


def byte_letters() -> dict[int, str]:
    """The printable character that stands for each byte in tokenizer.json.

    Visible bytes of Latin-1 stand for themselves, the others for the characters from 256 on.
    Source: Radford et al. 2019 (GPT-2), whose vocabulary is a text file.
    """
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}


HUGGINGFACE_LETTERS = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}


def huggingface_steps(pattern: str) -> dict:
    """What tokenizer.json says of the way from a text to its pieces, in letters."""
    cut = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, HUGGINGFACE_LETTERS]},
    }


HUGGINGFACE_MODEL = {  # byte-pair encoding as it is here
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}


def to_huggingface(vocabulary: Vocabulary, folder: str | Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and generation_config.json for transformers.

    As in training an END stands before each text; with `add_special_tokens=False` there is none.
    Special tokens in a text become their ids, with `split_special_tokens=True` they are text, as
    in `encode`. Generation ends at END.
    """
    letters, end = byte_letters(), vocabulary.end
    tokens = ["".join(letters[byte] for byte in token) for token in vocabulary.tokens]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    special = [
        {"id": i, "content": token, **flags, "special": True}
        for i, token in enumerate(vocabulary.special_tokens, len(tokens))
    ]
    first = {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}
    a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    begin_with_end = {
        "type": "TemplateProcessing",
        "single": [first, a],
        "pair": [first, a, first, b],
        "special_tokens": {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [end], "tokens": [END_OF_TEXT]}},
    }
    files = {
        "tokenizer.json": {
            "version": "1.0",
            "added_tokens": special,
            **huggingface_steps(vocabulary.pattern),
            "post_processor": begin_with_end,
            "decoder": HUGGINGFACE_LETTERS,
            "model": {
                **HUGGINGFACE_MODEL,
                "vocab": {token: i for i, token in enumerate(tokens)},
                "merges": [[tokens[a], tokens[b]] for a, b in vocabulary.merges],
            },
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "pad_token": END_OF_TEXT,
            "padding_side": "left",  # or generation would go on from padding
            "clean_up_tokenization_spaces": False,  # transformers 4 may take spaces out
            "model_input_names": ["input_ids", "attention_mask"],  # what a decoder takes
        },
        "generation_config.json": {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end},
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def apply_merges(ids: list[int], rank: dict[tuple[int, int], int]) -> list[int]:
    """ids after all merges that apply, the lowest first: rank gives the i of merge i."""
    while len(ids) > 1:
        pair = min(pairwise(ids), key=lambda pair: rank.get(pair, MAX_VOCAB))
        if pair not in rank:
            break
        ids = merge(ids, pair, 256 + rank[pair])
    return ids


def read_huggingface(stored: dict) -> Vocabulary:
    """The vocabulary that the content of a tokenizer.json describes.

    Raises: ValueError, and KeyError and its like, when it describes something else.
    """

    def check(good: bool, what: str) -> None:
        if not good:
            raise ValueError(what)

    model, ids = stored["model"], stored["model"]["vocab"]
    for name, ours in HUGGINGFACE_MODEL.items():
        same = model.get(name, ours) == ours or (ours is None and model[name] == "")
        check(same, f"its model has {name} {model.get(name)!r}, not {ours!r}")
    pattern = stored["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    for name, ours in huggingface_steps(pattern).items():
        check(stored.get(name) == ours, f"its {name} is another")
    check(stored["decoder"]["type"] == "ByteLevel", "its decoder is another")
    added = sorted(stored["added_tokens"], key=lambda token: token["id"])
    check(all(token["special"] for token in added), "it has added tokens that are not special")
    special = tuple(token["content"] for token in added)
    check(END_OF_TEXT in special, f"it has no special token {END_OF_TEXT}")

    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    merges = tuple((ids[a], ids[b]) for a, b in pairs)
    vocabulary = Vocabulary(merges, special, pattern)
    check(vocabulary.size <= MAX_VOCAB, f"it has {vocabulary.size} ids, more than {MAX_VOCAB}")
    letters = byte_letters()
    tokens = ["".join(letters[byte] for byte in token) for token in vocabulary.tokens]
    numbered = {token: i for i, token in enumerate((*tokens, *special))}
    theirs = ids | {token["content"]: token["id"] for token in added}
    check(theirs == numbered, "its ids are not bytes, merges in order and special tokens")
    # tiktoken joins any two neighbours that make a token: right if merges make it of its bytes
    rank = {pair: i for i, pair in enumerate(merges)}
    for i, token in enumerate(vocabulary.tokens):
        whole = apply_merges(list(token), rank) == [i]
        check(whole, f"its merges do not make token {i} from its bytes")
    return vocabulary


def from_huggingface(folder: str | Path) -> Vocabulary:
    """The vocabulary in a folder that `to_huggingface` wrote, with the same hash, or in another
    whose tokenizer works in the same way.

    Raises: FileNotFoundError; ValueError for a tokenizer that gives other ids than a Vocabulary
        can: those of GPT-2, Llama 3 and Qwen number the bytes in another order.
    """
    path = Path(folder) / "tokenizer.json"
    try:
        return read_huggingface(json.loads(path.read_bytes()))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(
            f"{path}: {why}; wanted a byte-level BPE as bpe.to_huggingface writes it"
        ) from error


def little_stories(count: int) -> Iterator[str]:
    """Stories enough for the demo, when no file is given."""
    pick = Random(0).choice
    for _ in range(count):
        name = pick(("Lily", "Tom", "Mia", "Ben", "Anna", "Max"))
        kind = pick(("rabbit", "duckling", "hedgehog", "squirrel", "kitten", "puppy"))
        place = pick(("by the river", "under a tall tree", "near the garden", "on a quiet farm"))
        thing = pick(("a shiny button", "a red balloon", "an old key", "a bunch of 12 flowers"))
        mood = pick(("happy", "proud", "surprised", "thankful"))
        yield (
            f"Once there was a little {kind} named {name}. {name} lived {place}.\n"
            f'One day, {name} found {thing}. "Whose is it?" the {kind} asked. '
            f'"It isn\'t mine," said the {pick(("owl", "fox", "bear"))}, "so it\'s yours!"\n'
            f"{name} was very {mood} and took {thing} home."
        )


def demo(stories: Iterable[str]) -> None:
    stories = draw_sample(stories, most=1 << 23)
    held_out, rest = stories[::10], [story for i, story in enumerate(stories) if i % 10]
    text_bytes = sum(len(story.encode()) for story in held_out)
    vocabulary = train(rest, vocab_size=4096)
    print(f"{len(rest):,} stories to train on, {len(held_out):,} held out ({text_bytes:,} bytes)")
    print(f"asked for V = 4096, had pairs enough for V = {vocabulary.size}; the first merges:")
    print(" ".join(repr(token.decode(errors="replace")) for token in vocabulary.tokens[256:268]))

    print("    V   bytes/token   the beginning of a held-out story")
    for size in sorted({257, 300, 400, 1024, 2048, vocabulary.size}):
        if size > vocabulary.size:
            break
        smaller = replace(vocabulary, merges=vocabulary.merges[: size - 257])
        encoding = smaller.encoding()
        encoded = list(encode(held_out, smaller))
        ids = encoding.encode_ordinary(held_out[0][:36].rstrip())
        cut = "|".join(encoding.decode([i]) for i in ids)
        print(f"{size:5d} {text_bytes / sum(map(len, encoded)):13.3f}   {cut}")
        for story, ids in zip(held_out, encoded):
            assert encoding.decode(ids.tolist()) == story, f"V={size}: the text does not come back"
    ids = encoding.encode_ordinary(f"no {END_OF_TEXT} yet")
    assert vocabulary.end not in ids and encoding.decode(ids) == f"no {END_OF_TEXT} yet"
    print("ok: every held-out story comes back byte for byte, and no text is encoded to END")


if __name__ == "__main__":
    try:
        demo(read_stories(sys.argv[1]) if len(sys.argv) > 1 else little_stories(1000))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
