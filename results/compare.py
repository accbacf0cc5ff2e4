"""Our training beside smolGPT's and nanoGPT's own code at the same shape, on this machine.

    git clone https://github.com/Om-Alve/smolGPT /tmp/smolGPT
    git clone https://github.com/karpathy/nanoGPT /tmp/nanoGPT
    python results/compare.py /tmp/smolGPT /tmp/nanoGPT --json results/compare.json
    python results/compare.py /tmp/smolGPT /tmp/nanoGPT --steps 0 \\
        --losses 1_000_000 --train train.txt --val val.txt

The step. The 27M shape, the same random token ids, dropout 0, AdamW on all sides: forward, loss,
backward, clipping to norm 1, update; compiled on a GPU, as all three do there. Each is held by a
process of its own, set up as its script does it (on a CPU 06_train.py has glibc keep what is freed,
which the others leave as it is); they take turns, and the ratio of the medians is reported.

The losses (--losses). A small equal shape is trained on about so many targets of the same token
file, each side with its own defaults: optimiser, learning rate, shape of the schedule, dropout,
initialisation and how rows are cut from the text (our rows of whole stories are padded, so that the
same tokens make more and smaller steps). What a default says in steps is taken as a share of the
run. All are then scored on the same rows of the validation text, cut as we cut them (from the
beginning of a story on) and as they do (every T tokens); the time is that of the steps alone. A
score at each tenth of the run, on fewer rows, says where we are when a peer has ended. Their
learning rate was chosen for larger models and longer runs: this compares what each does when
nobody tunes it, not the best that each could do.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import math
import multiprocessing
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

train = importlib.import_module("06_train")
gpt, losses = train.gpt, train.losses
batches, bpe, corpus = (importlib.import_module(f"data.{n}") for n in ("batches", "bpe", "corpus"))

UNTIMED = {"cpu": 1, "cuda": 4}  # first turns: they allocate, and compile
CLIP = 1.0  # longest gradient, on all sides
VAL_TOKENS = 50_000  # targets that a model is scored on, to the next full row
POINTS, POINT_TOKENS = 10, 20_000  # scores during training, on fewer
ROWS = 8  # rows a step in the losses part, as in 06_train.py without a GPU


@dataclass(frozen=True)
class Shape:
    """In the peers' terms: H heads, each with keys and values of its own."""

    n_layer: int
    n_head: int
    width: int
    seq_len: int  # T
    vocab_size: int  # V

    def ours(self) -> gpt.GPTConfig:
        """As many weights, in the proportions of our 27M model: half the heads, of twice the size,
        half as many for keys and values, and an MLP wider for what that saves."""
        return gpt.GPTConfig(
            vocab_size=self.vocab_size,
            seq_len=self.seq_len,
            n_layer=self.n_layer,
            n_head=self.n_head // 2,
            n_kv_head=self.n_head // 4,
            d_model=self.width,
            d_mlp=3 * self.width,
        )


STEP_SHAPE = Shape(n_layer=8, n_head=8, width=512, seq_len=512, vocab_size=4096)  # 27M
LOSS_SHAPE = Shape(n_layer=2, n_head=4, width=128, seq_len=256, vocab_size=1024)


@dataclass(frozen=True)
class Peer:
    """Another project's defaults; both have AdamW, decay on matrices only, a cosine to a tenth."""

    address: str
    width: str  # the name of the width in its GPTConfig
    dropout: float
    warmup: float  # share of the run
    learning_rate: float = 6e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    floor: float = 0.1  # last learning rate over the peak

    def multiplier(self, step: int, total: int) -> float:
        """The learning rate of a step over the peak."""
        warmup = round(self.warmup * total)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1, total - warmup)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * done)) / 2


PEERS = {  # from smolGPT's config.py and nanoGPT's train.py
    "smolgpt": Peer("github.com/Om-Alve/smolGPT", "n_embed", dropout=0.2, warmup=1_000 / 30_000),
    "nanogpt": Peer("github.com/karpathy/nanoGPT", "n_embd", dropout=0.0, warmup=2_000 / 600_000),
}


@dataclass
class Side:
    """A model ready to be trained, ours or a peer's."""

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    loss: Callable[[Tensor, Tensor], Tensor]  # mean over the targets that are not IGNORE
    multiplier: Callable[[int, int], float]  # of the peak learning rates: step, total
    row_cut: str  # "stories" or "blocks"

    def step(self, x: Tensor, y: Tensor, multiplier: float = 1.0) -> None:
        self.loss(x, y).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * multiplier
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class Setting:
    """What decides how the sides are built; small, so that it can be sent to another process."""

    folders: dict[str, str]  # of the peers
    device: str
    dtype: str
    seed: int

    def autocast(self):
        dtype = getattr(torch, self.dtype)
        return torch.autocast(self.device, dtype, enabled=dtype != torch.float32)

    def compiled(self, function: Callable) -> Callable:
        return torch.compile(function) if self.device == "cuda" else function


def our_side(shape: Shape, setting: Setting, own_defaults: bool) -> Side:
    model = gpt.GPT(shape.ours()).to(setting.device)
    config = train.Config(dtype=setting.dtype)
    if not own_defaults:
        config = replace(config, optimizer="adamw")

    objective = train.Objective(model, getattr(torch, setting.dtype), "auto")

    def loss(x, y):
        return objective(x, y) / (y != batches.IGNORE).sum()

    def multiplier(step, total):
        warmup = round(total * train.Config.warmup_steps / train.Config.max_steps)
        return replace(config, max_steps=total, warmup_steps=warmup).multiplier(step)

    optimizers = train.make_optimizers(config, model)
    return Side(model, optimizers, setting.compiled(loss), multiplier, config.rows)


def load_model_file(name: str, folder: str):
    """The module model.py of a peer's checkout, which may import config.py beside it."""
    path = Path(folder) / "model.py"
    if not path.is_file():
        raise train.RunError(f"{folder}: no model.py; clone {PEERS[name].address} to it")
    spec = importlib.util.spec_from_file_location(f"{name}_model", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for themselves there
    sys.path.insert(0, str(folder))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("config", None)  # another peer's is another
    return module


def their_side(name: str, shape: Shape, setting: Setting, own_defaults: bool) -> Side:
    peer, folder = PEERS[name], setting.folders[name]
    theirs = load_model_file(name, folder)
    sizes = {"n_layer": shape.n_layer, "n_head": shape.n_head, peer.width: shape.width}
    sizes |= {"block_size": shape.seq_len, "vocab_size": shape.vocab_size, "bias": False}
    dropout = peer.dropout if own_defaults else 0.0
    with contextlib.redirect_stdout(io.StringIO()):  # they print while they build
        try:
            model = theirs.GPT(theirs.GPTConfig(**sizes, dropout=dropout)).to(setting.device)
            optimizer = model.configure_optimizers(
                peer.weight_decay, peer.learning_rate, peer.betas, setting.device
            )
        except (AttributeError, TypeError) as error:
            raise train.RunError(
                f"{folder}: not as expected of {name} ({error}); clone {peer.address} to it"
            ) from error
    forward = setting.compiled(model)

    def loss(x, y):
        with setting.autocast():
            return forward(x, y.masked_fill(y == batches.IGNORE, -1))[1]  # they ignore -1

    return Side(model, [optimizer], loss, peer.multiplier, "blocks")


def build(name: str, shape: Shape, setting: Setting, own_defaults: bool) -> Side:
    torch.manual_seed(setting.seed)
    if name == "ours":
        return our_side(shape, setting, own_defaults)
    return their_side(name, shape, setting, own_defaults)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# The step


def random_batch(shape: Shape, rows: int, setting: Setting) -> tuple[Tensor, Tensor]:
    torch.manual_seed(setting.seed)
    ids = torch.randint(shape.vocab_size, (rows, shape.seq_len + 1), device=setting.device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


# In a worker process, which holds one side and nothing else

held: tuple[Side, tuple[Tensor, Tensor]] | None = None


def hold(name: str, shape: Shape, rows: int, setting: Setting) -> int:
    """Builds a side and its batch, to be stepped here; returns its number of parameters."""
    global held
    if name == "ours" and setting.device == "cpu":
        train.keep_freed_memory()  # as 06_train.py does
    side = build(name, shape, setting, own_defaults=False)
    held = side, random_batch(shape, rows, setting)
    return sum(p.numel() for p in side.model.parameters())


def timed_step(device: str) -> float:
    side, batch = held
    start = time.perf_counter()
    side.step(*batch)
    wait(device)
    return time.perf_counter() - start


def peak_memory(device: str) -> int | None:
    """Bytes, of the GPU or of this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    try:  # not ru_maxrss: that begins with what the parent process had at its peak
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    except FileNotFoundError:
        return None


def compare_steps(shape: Shape, rows: int, steps: int, setting: Setting) -> dict:
    """Tokens per second of each side, steps taken in turns, and its peak memory."""
    spawn, device = multiprocessing.get_context("spawn"), setting.device
    names, untimed, result = ("ours", *PEERS), UNTIMED[setting.device], {}
    with contextlib.ExitStack() as running:
        pools = {name: running.enter_context(ProcessPoolExecutor(1, spawn)) for name in names}

        def ask(name, function, *args):
            return pools[name].submit(function, *args).result()

        parameters = {name: ask(name, hold, name, shape, rows, setting) for name in names}
        turns = [{name: ask(name, timed_step, device) for name in names}
                 for _ in range(untimed + steps)]  # fmt: skip
        for name in names:
            seconds = [turn[name] for turn in turns[untimed:]]
            result[name] = {
                "parameters": parameters[name],
                "tokens_per_second": rows * shape.seq_len / statistics.median(seconds),
                "seconds": seconds,
                "peak_memory_bytes": ask(name, peak_memory, device),
            }
    for name in PEERS:
        mine, theirs = result["ours"], result[name]
        ratio = {"speed": mine["tokens_per_second"] / theirs["tokens_per_second"]}
        if theirs["peak_memory_bytes"]:
            ratio["memory"] = mine["peak_memory_bytes"] / theirs["peak_memory_bytes"]
        result[f"ours_over_{name}"] = ratio
    return result


def print_steps(rows: int, shape: Shape, result: dict) -> None:
    print(f"{rows} x {shape.seq_len}    parameters   tokens/s   peak memory   ours over it")
    for name in ("ours", *PEERS):
        side, ratio = result[name], result.get(f"ours_over_{name}", {})
        memory = side["peak_memory_bytes"]
        print(
            f"{name:8s} {side['parameters']:12,d} {side['tokens_per_second']:10,.0f} "
            + (f"{memory / 1e9:10.2f} GB" if memory else "      unknown")
            + (f"   {ratio['speed']:.2f} x the speed" if ratio else "")
            + (f", {ratio['memory']:.2f} x the memory" if "memory" in ratio else "")
        )


# The losses


def prepare(train_text: str, val_text: str, vocab_size: int, folder: Path) -> corpus.Data:
    """Our vocabulary of the training text, and both texts as token files in the folder."""
    try:
        vocabulary = bpe.train(bpe.read_stories(train_text), vocab_size)
        files = {}
        for name, text in (("train", train_text), ("val", val_text)):
            about = {"vocabulary": vocabulary.hash, "end": vocabulary.end, "source": str(text)}
            encoded = bpe.encode(bpe.read_stories(text), vocabulary)
            batches.write_tokens(folder / name, encoded, **about)
            files[name] = batches.open_tokens(folder / name, vocabulary.hash)
    except (OSError, ValueError) as error:
        raise train.RunError(str(error)) from error
    (ids, about), (val, about_val) = files["train"], files["val"]
    return corpus.Data(vocabulary, ids, val, about, about_val)


def cut(ids, row_cut: str, data: corpus.Data, shape: Shape, setting: Setting) -> batches.Batches:
    if row_cut == "stories":
        rows = batches.story_rows(ids, data.vocabulary.end, shape.seq_len)
    else:
        rows = batches.block_rows(len(ids), shape.seq_len)
    return batches.Batches(ids, rows, ROWS, shape.seq_len, setting.seed, setting.device)


@torch.no_grad()
def score(side: Side, val: batches.Batches, token_bytes: Tensor, limit: int) -> dict[str, float]:
    """The mean loss over the first `limit` targets or so, with dropout off."""
    side.model.eval()
    nats = tokens = size = first = 0
    while tokens < limit and first < len(val):
        x, y, count = val.take(range(first, min(first + ROWS, len(val))))
        nats += side.loss(x, y).item() * count
        size += (token_bytes[y.clamp(min=0)] * (y != batches.IGNORE)).sum().item()
        tokens, first = tokens + count, first + ROWS
    side.model.train()
    bits = losses.bits_per_byte(nats / tokens, tokens, size)
    return {"nats": nats / tokens, "bits_per_byte": bits, "tokens": tokens, "bytes": size}


def compare_losses(tokens: int, data: corpus.Data, shape: Shape, setting: Setting) -> dict:
    """Each side trained on about `tokens` targets, a step of each in turn, then scored."""
    sides = {name: build(name, shape, setting, own_defaults=True) for name in ("ours", *PEERS)}
    vals = {way: cut(data.val, way, data, shape, setting) for way in ("stories", "blocks")}
    token_bytes = torch.tensor(data.vocabulary.token_bytes, device=setting.device)
    result, sources = {}, {}
    for name, side in sides.items():
        sources[name] = cut(data.train, side.row_cut, data, shape, setting)
        per_step = sources[name].lengths.mean() * ROWS  # rows of whole stories are not full
        result[name] = {
            "parameters": sum(p.numel() for p in side.model.parameters()),
            "steps": max(1, round(tokens / per_step)),
            "tokens": 0,
            "seconds": 0.0,
            "curve": [],
        }
    for step in range(max(of["steps"] for of in result.values())):
        for name, side in sides.items():
            of = result[name]
            if step >= of["steps"]:
                continue
            start = time.perf_counter()
            x, y, count = sources[name].batch(step)
            side.step(x, y, side.multiplier(step, of["steps"]))
            wait(setting.device)
            of["seconds"] += time.perf_counter() - start
            of["tokens"] += count
            if (step + 1) * POINTS // of["steps"] > step * POINTS // of["steps"]:
                point = score(side, vals["blocks"], token_bytes, POINT_TOKENS)
                of["curve"].append([of["tokens"], of["seconds"], point["bits_per_byte"]])
    for name, side in sides.items():
        for way, val in vals.items():
            result[name][way] = score(side, val, token_bytes, VAL_TOKENS)
    return result | {f"ours_over_{name}": ratios(result["ours"], result[name]) for name in PEERS}


def ratios(ours: dict, theirs: dict) -> dict[str, float | None]:
    """Our bits per byte over theirs: after equal tokens, and at our last point in their time."""
    ratio = {way: ours[way]["bits_per_byte"] / theirs[way]["bits_per_byte"]
             for way in ("stories", "blocks")}  # fmt: skip
    in_time = [bits for _, seconds, bits in ours["curve"] if seconds <= theirs["seconds"]]
    return ratio | {"in_its_time": in_time[-1] / theirs["curve"][-1][2] if in_time else None}


def print_losses(shape: Shape, result: dict) -> None:
    print(
        f"{shape.n_layer} layers x {shape.width}, T {shape.seq_len}, V {shape.vocab_size}, "
        f"{ROWS} rows a step; losses on rows of whole stories, and on every {shape.seq_len} tokens"
        "\n         parameters    tokens  steps  seconds   nats/token     bpb   nats/token     bpb"
    )
    for name in ("ours", *PEERS):
        side = result[name]
        scores = [side[way] for way in ("stories", "blocks")]
        print(
            f"{name:8s} {side['parameters']:10,d} {side['tokens']:9,d} {side['steps']:6d} "
            f"{side['seconds']:8.1f}"
            + "".join(f"{s['nats']:13.4f} {s['bits_per_byte']:7.4f}" for s in scores)
        )
    for name in PEERS:
        ratio = result[f"ours_over_{name}"]
        in_time = ratio["in_its_time"]
        print(
            f"our bpb over that of {name}: {ratio['stories']:.3f} and {ratio['blocks']:.3f} after "
            "equal tokens" + (f", {in_time:.3f} when it has ended (every T)" if in_time else "")
        )


# The command line


def run(args: argparse.Namespace) -> dict:
    if len({args.losses is None, args.train is None, args.val is None}) > 1:
        raise train.RunError("--losses TOKENS goes with --train FILE and --val FILE")
    if args.steps < 0 or min(args.rows) < 1 or (args.losses is not None and args.losses < 1):
        raise train.RunError(
            f"--steps {args.steps} --rows {args.rows} --losses {args.losses}: wanted 0, 1, 1 up"
        )
    if args.steps == 0 and args.losses is None:
        raise train.RunError("--steps 0 without --losses leaves nothing to do")
    for text in filter(None, (args.train, args.val)):  # now, not after the steps
        if not Path(text).is_file():
            raise train.RunError(f"{text}: no such file; wanted stories separated by <|endoftext|>")
    if args.json is not None and not args.json.resolve().parent.is_dir():
        raise train.RunError(f"--json {args.json}: there is no such folder; make it first")
    device = train.pick_device("auto")
    dtype, why = train.pick_dtype(args.dtype, device)
    folders = {"smolgpt": args.smolgpt, "nanogpt": args.nanogpt}
    setting = Setting(folders, device.type, str(dtype).removeprefix("torch."), args.seed)
    for name in PEERS:
        load_model_file(name, folders[name])
    machine = {"machine": train.device_name(device), "torch": torch.__version__}
    print(f"{machine['machine']}, torch {torch.__version__}, {dtype}: {why}")
    result = machine | {"dtype": setting.dtype, "seed": args.seed, "steps": {}}
    for rows in args.rows if args.steps else ():
        steps = compare_steps(STEP_SHAPE, rows, args.steps, setting)
        result["steps"][f"{rows}x{STEP_SHAPE.seq_len}"] = steps
        print_steps(rows, STEP_SHAPE, steps)
    if args.losses:
        with tempfile.TemporaryDirectory() as folder:
            data = prepare(args.train, args.val, LOSS_SHAPE.vocab_size, Path(folder))
            shape = replace(LOSS_SHAPE, vocab_size=data.vocabulary.size)
            after = compare_losses(args.losses, data, shape, setting)
        about = {"train": Path(args.train).name, "val": Path(args.val).name, "rows": ROWS}
        result["losses"] = about | {"shape": asdict(shape)} | after
        print_losses(shape, after)
    return result


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("smolgpt", help=f"a checkout of {PEERS['smolgpt'].address}")
    parser.add_argument("nanogpt", help=f"a checkout of {PEERS['nanogpt'].address}")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each; 0: none")
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 16], help="of T 512, a step")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))
    parser.add_argument("--losses", type=int, metavar="TOKENS", help="train each on so many")
    parser.add_argument("--train", metavar="FILE", help="stories separated by <|endoftext|>")
    parser.add_argument("--val", metavar="FILE", help="others")
    parser.add_argument("--seed", type=int, default=0, help="of weights, dropout and data order")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to it")
    args = parser.parse_args(argv)
    try:
        result = run(args)
        if args.json is not None:
            args.json.write_text(json.dumps(result, indent=1) + "\n")
    except (train.RunError, OSError) as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
