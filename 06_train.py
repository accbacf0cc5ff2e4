"""Trains a GPT from text to stories: data, model, loop, checkpoints, samples.

    python 06_train.py

does the whole job. With a GPU it trains the 27M-parameter model on TinyStories, downloading it
once; without one, a 0.5M model on the built-in stories in under three minutes. Both are
the same code with another preset, and every field of `Config` is a flag:

    python 06_train.py --data stories.txt --model 8m --max-steps 2000 --out runs/mine
    python 06_train.py --out runs/mine --resume          # goes on where it stopped
    python 06_train.py --out runs/mine --sample "Once upon a time"
    python 06_train.py --out runs/mine --export exported    # a folder that transformers loads
    python 06_train.py --preset tinystories --plan          # memory, hours, dollars; trains nothing
    torchrun --nproc-per-node 8 06_train.py                 # on 8 GPUs; --shard: the model in parts

What one step computes, for a batch of rows x with targets y, N of them not padding:

    loss      L = 1/N * sum over targets of -ln p(y_t | x_1 .. x_t)             nats/token
    gradient  g = dL/dw, scaled down to norm `grad_clip` where it is longer
    update    Muon for the matrices inside, at the rate muon_learning_rate * schedule(step), and
              AdamW for all else at learning_rate * schedule(step); --optimizer adamw: for all

Losses are printed in nats per token and in bits per byte of story text (bpb); only the second may
be compared between tokenisers. Validation scores every token of the validation text once, in
rows that begin with a story. For the built-in stories the exact entropy of the same text is
printed beside the loss: no model's expected loss is below that floor.

A run lives in its `--out` folder: config.json, vocabulary.json, metrics.jsonl, the newest
checkpoints and the best. A checkpoint holds all that the next step depends on, and the position in
the data is one number in it, so a run that was killed and resumed computes the same numbers as one
that was not. Its name carries a checksum of its content: a file cut short is recognised and passed
over. A guard judges each step by its loss and its gradient before the update: a batch that would
do harm is left out, and where the harm is done already the run goes back to a checkpoint and on
with the data after the spike.

Same numbers: on a CPU, for the same seed, version, number of threads and machine, always. On a GPU
torch's fast kernels, of embeddings for one, add in no fixed order and two runs part slowly;
--deterministic takes those that do (not yet tried on one).

Several processes: each takes its share of the rows of a batch, the same batch for any number of
them, and adds its gradient to the others'. So a run may be resumed with another number: the same
batches, sums in another order. With the same number it is the same numbers. (On a CPU rows of like
length share a batch, but not with --compile: a run that is resumed on another type of device, or
with another --compile, goes on with other rows.)
Over several machines (torchrun --nnodes) --out and --cache have to be on a disk that all of them
see. With --shard each holds its part of weights, gradients and moments alone, for a model that no
GPU holds; a checkpoint is whole either way, so that --resume may go on with --shard or --no-shard.
It does not go with --compile, which the preset of a GPU has: add --no-compile.

Letters: B rows in a batch, T positions in a row, V vocabulary.

Sources: clip 1.0, betas 0.9 and 0.95, decay 0.1: GPT-3 (Brown et al. 2020, arXiv 2005.14165; the
CPU preset has beta2 0.98); decay on matrices only: nanoGPT; Muon: see 10_muon.py;
warmup-stable-decay: MiniCPM (Hu et al. 2024, 2404.06395); TinyStories: Eldan & Li 2023
(2305.07759).

Run: `python 06_train.py` (36 s from start to story on 2 cores of an AMD EPYC (Zen 5), which
multiplies bfloat16; with --dtype float32 a minute, ending at 0.376) ends with

    val_nats: 0.36822941817077154
    floor_nats: 0.2867901733419835
    val_bpb: 0.15377267989359247
    tokens: 1394936
    seconds: 33.31416887300293
    tokens_per_second: 43535.76526242282
    peak_memory_gb: 0.478113792
    parameters: 459520
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import difflib
import hashlib
import importlib
import inspect
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
import typing
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from data import batches, bpe, corpus, stories, tinystories

try:
    import fcntl
    import resource
except ImportError:  # not on Windows: there runs are not locked, and memory is not measured
    fcntl = resource = None

losses = importlib.import_module("01_loss")
gpt = importlib.import_module("03_gpt")
adamw = importlib.import_module("04_adamw")
schedules = importlib.import_module("05_schedules")
stability = importlib.import_module("08_stability")
muon = importlib.import_module("10_muon")

Made = typing.TypeVar("Made")

KEEP = 3  # newest checkpoints kept, in case the last one is damaged; the best is kept too
MAX_REWINDS = 5  # in a row: a run that goes back more often has something wrong with it
NEAR = 10  # steps: spikes closer together than this are in a row
UNTIMED_STEPS = 3  # after a start: they compile, allocate and warm caches
TRIAL_STEPS, TRIAL_TOKENS = 5, 2048  # of --plan; the latter on a CPU
MFU = 0.4  # model FLOP/s over peak, for --plan: autoresearch's 8 x 512 has 0.398 on an H100
# GPUs, by a part of the name that torch reports: dense bfloat16 TFLOP/s (makers' data sheets),
# memory in 10^9 bytes, dollars an hour (RunPod's Secure Cloud, October 2026; of the L4, what
# smolGPT paid: $13 for 18.5 h; None: not looked up)
CARDS = {
    "L4": (121, 24, 0.70),
    "RTX 4090": (165, 24, 0.69),
    "RTX 5090": (209.5, 32, None),
    "A100": (312, 80, 1.59),
    "H100 PCIe": (756, 80, None),
    "H100 NVL": (835, 94, None),
    "H100": (989, 80, 3.49),
    "H200": (989, 141, 4.59),
}


class RunError(Exception):
    """Something the user can put right; shown as one line."""


@dataclass(frozen=True)
class Config:
    preset: str = "stories"  # where these defaults come from: "stories", "tinystories"
    data: str = "stories"  # "stories" (built in), "tinystories" (downloads), or a text file
    out: str = "runs/stories"  # folder of this run
    cache: str = "runs/cache"  # folder of downloaded and tokenised data
    resume: bool = False  # go on from the newest checkpoint in out, if there is one
    branch: str | None = None  # start from the newest checkpoint of the run in this folder
    sample: str | None = None  # continue this text with the model in out, and do nothing else
    checkpoint: str = "newest"  # that --sample and --export take: "newest", or "best" evaluated
    plan: bool = False  # say what the run would take in memory, hours and dollars, and end
    export: str | None = None  # write the model in out to this folder for transformers, and end
    seed: int = 0  # of the weights and of the order of the data
    device: str = "auto"  # "auto": cuda if there is one, else cpu
    dtype: str = "auto"  # of matrix products: "float32", "bfloat16", or what suits the device
    implementation: str = "auto"  # of layers, loss, AdamW: "torch", "triton"; "auto": GPUs triton
    compile: bool = False  # torch.compile the model: minutes once, then faster steps
    shard: bool = False  # under torchrun each process holds its part of the model alone (FSDP)
    model: str = "0.5m"  # shape, by its name in 03_gpt.PRESETS
    vocab_size: int = 1024  # tokens, at most; a small text may have fewer
    seq_len: int = 200  # T, tokens
    story_count: int = 20_000  # built-in stories to train on
    rows: str = "stories"  # how rows are cut: "stories" or "blocks", see data/batches.py
    batch_size: int = 8  # B, rows per step
    accumulate: int = 1  # micro-batches that a step's rows are split into, to save memory
    max_steps: int = 1100  # steps in all
    optimizer: str = "muon"  # "muon" for hidden matrices and AdamW for the rest; "adamw" for all
    learning_rate: float = 6e-3  # peak, of AdamW
    muon_learning_rate: float = 5e-3  # peak, of Muon
    schedule: str = "wsd"  # by its name in 05_schedules.SCHEDULES
    warmup_steps: int = 30  # steps
    cooldown: float | None = None  # of the wsd schedules: steps, or a share of the run up to 1.0
    weight_decay: float = 0.1  # on matrices
    beta1: float = 0.9  # of AdamW: memory of the gradient's mean
    beta2: float = 0.98  # of AdamW: memory of its square
    grad_clip: float = 1.0  # longest gradient; 0: no clipping
    guard: str = "on"  # "on": leave out steps that would do harm, go back if they persist; "off"
    dollars_per_hour: float | None = None  # of one GPU or machine; None: as in CARDS
    track: str = "none"  # where figures go besides metrics.jsonl: "mlflow", "wandb" (offline)
    deterministic: bool = False  # same numbers on a GPU too, where that costs time
    log_every: int = 100  # steps
    eval_every: int = 400  # steps
    eval_tokens: int = 20_000  # validation tokens scored while training; at the end: all
    checkpoint_every: int = 400  # steps
    samples: int = 100  # stories written at the end and checked by the grammar; of real text one
    temperature: float = 0.5  # of samples
    min_p: float = 0.1  # of samples: tokens less likely than this share of the likeliest are cut

    def __post_init__(self):
        check(self.seq_len >= 2, "seq_len", self.seq_len, "at least 2: a token and the next")
        for name in ("story_count", "batch_size", "accumulate", "max_steps"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("log_every", "eval_every", "eval_tokens", "checkpoint_every"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("warmup_steps", "learning_rate", "muon_learning_rate", "weight_decay",
                     "grad_clip", "seed"):  # fmt: skip
            value = getattr(self, name)
            most = 2**63 if name == "seed" else math.inf  # torch's generator takes no larger seed
            check(0 <= value < most, name, value, f"at least 0 and below {most}")
        for name in ("samples", "temperature"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        check(0 <= self.min_p <= 1, "min_p", self.min_p, "in [0, 1]")
        for name in ("beta1", "beta2"):
            check(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        check(257 <= self.vocab_size <= 65536, "vocab_size", self.vocab_size, "257 to 65536")
        check(self.warmup_steps <= self.max_steps, "warmup_steps", self.warmup_steps,
              f"at most max_steps={self.max_steps}")  # fmt: skip
        check(self.batch_size % self.accumulate == 0, "batch_size", self.batch_size,
              f"a multiple of accumulate={self.accumulate}")  # fmt: skip
        check(self.cooldown is None or 0 < self.cooldown <= self.max_steps, "cooldown",
              self.cooldown, f"above 0 and at most max_steps={self.max_steps}")  # fmt: skip
        for name, choices in (
            ("preset", PRESETS),
            ("model", gpt.PRESETS),
            ("schedule", schedules.SCHEDULES),
            ("rows", ("stories", "blocks")),
            ("dtype", ("auto", "float32", "bfloat16")),
            ("guard", ("on", "off")),
            ("optimizer", ("adamw", "muon")),
            ("track", ("none", "mlflow", "wandb")),
            ("checkpoint", ("newest", "best")),
            ("implementation", gpt.IMPLEMENTATIONS),
        ):
            check(getattr(self, name) in choices, name, getattr(self, name),
                  "one of " + ", ".join(choices))  # fmt: skip
        takes = inspect.signature(schedules.SCHEDULES[self.schedule]).parameters
        check(self.cooldown is None or "cooldown" in takes, "cooldown", self.cooldown,
              f"none with --schedule {self.schedule}, which has no cooldown to set")  # fmt: skip

    def multiplier(self, step: int) -> float:
        """What the schedule makes of the peak learning rates at a step, in [0, 1]."""
        options = {"skip_zero": True}
        if self.cooldown is not None:
            options["cooldown"] = self.cooldown if self.cooldown <= 1 else int(self.cooldown)
        schedule = schedules.SCHEDULES[self.schedule]
        return schedule(step, self.max_steps, self.warmup_steps, **options)


def check(good: bool, name: str, value: object, wanted: str) -> None:
    if not good:
        raise RunError(f"--{name.replace('_', '-')} {value}: wanted {wanted}")


PRESETS = {
    "stories": {},  # the defaults above: under three minutes on two CPU cores
    "tinystories": {  # one GPU with 32 GB or more by --plan; on less raise --accumulate
        "data": "tinystories",
        "out": "runs/tinystories",
        "compile": True,
        "model": "27m",
        "vocab_size": 4096,
        "seq_len": 512,
        "batch_size": 256,  # 131,072 positions a step, padding among them
        "max_steps": 7630,  # 1.0B positions
        "learning_rate": 2e-3,  # 3 to 5 times the usual 6e-4: the best of a public sweep at 36M
        "muon_learning_rate": 4e-3,  # at width 512 it is modded-nanogpt's and nanochat's 0.02
        "warmup_steps": 200,
        "beta2": 0.95,
        "eval_every": 500,
        "eval_tokens": 1_000_000,
        "checkpoint_every": 500,
    },
}


# Device and precision


def pick_device(wanted: str) -> torch.device:
    if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()):
        wanted = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    elif wanted == "auto":
        wanted = "cpu"
    try:
        device = torch.device(wanted)
        if device.type not in ("cpu", "cuda"):  # others have no float64, which norms are added in
            raise RunError(f"--device {wanted}: wanted cpu, cuda, cuda:N or auto")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"--device {wanted}: {reason}; try --device cpu") from error
    return device


def pick_dtype(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The type of matrix products, and why.

    bfloat16 on a GPU that has it, and on a CPU with instructions for bfloat16 products
    (amx_bf16 or avx512_bf16); elsewhere it is emulated, several times slower than float32.
    """
    if wanted != "auto":
        return getattr(torch, wanted), "as asked"
    if device.type == "cuda":
        has = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has = any(torch.cpu.get_capabilities().get(name) for name in ("amx_bf16", "avx512_bf16"))
    if has:
        return torch.bfloat16, "this device multiplies bfloat16 in hardware"
    return torch.float32, "this device has no bfloat16 instructions"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU with {torch.get_num_threads()} threads"


def card(device: torch.device) -> tuple[float | None, int | None, float | None]:
    """The device's row of CARDS; three times None for a CPU and for what is not there.

    A part of a GPU (MIG) is not.
    """
    name = device_name(device) if device.type == "cuda" else ""
    whole_card = not re.search(r"\bMIG\b", name)
    found = [row for part, row in CARDS.items() if whole_card and re.search(rf"\b{part}\b", name)]
    return found[0] if found else (None, None, None)


def peak_memory_gb(device: torch.device) -> float:
    """The most memory used so far, 10^9 bytes: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if resource is None:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def keep_freed_memory() -> None:
    """Makes glibc keep what is freed: the next step asks for the same again.

    Pages that went back to the system would come again by a page fault each. Every block now comes
    from the heap, at whose end up to 2 GiB may lie free. It holds for the process, to its end. In
    bfloat16 on 2 cores of an AMD EPYC (Zen 5) a
    step of the 27M model took a tenth less than with this left out. Does nothing without glibc.
    Source: mallopt(3), malloc.h.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: blocks that are mapped by themselves, and unmapped when freed
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: what may lie free at the heap's end


def leave_out_dynamo() -> None:
    """Keeps torch's optimisers from importing torch._dynamo, of use only to a compiled program.

    Four of their methods do so when first called, to mark themselves as not to be compiled: 0.8 s
    and 150 MB. To set the mark here, for the rest of the process, avoids it; they are not compiled
    in 06 anyway. (torch 2.13; another may ignore it.)
    """
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        method = inspect.unwrap(getattr(torch.optim.Optimizer, name))
        vars(method).setdefault("__dynamo_disable", method)


def make_deterministic() -> None:
    """Makes torch take kernels that add in a fixed order, and fail where there is none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by torch's manual
    torch.use_deterministic_algorithms(True)


# Several processes, started by torchrun, each with its share of every batch


def team_size() -> int:
    """Processes in all, as torchrun says, on all machines. Raises: RunError."""
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdecimal() or int(size) < 1:
        raise RunError(f"WORLD_SIZE={size}: wanted the number of processes, at least 1")
    return int(size)


def check_team(config: Config) -> None:
    """Raises: RunError where these processes cannot share such a run."""
    size = team_size()
    check(config.batch_size % (config.accumulate * size) == 0, "batch_size",
          config.batch_size, f"a multiple of accumulate={config.accumulate} times {size} "
          "processes")  # fmt: skip
    check(not config.shard or (size > 1 and not config.compile), "shard", config.shard,
          "torchrun with more than one process, and no --compile; or --no-shard")  # fmt: skip


class Team:
    """The processes that train one model together: this one alone, or those of torchrun.

    A batch is the same rows for any number of them, of which process r takes r, r + size, ...; the
    gradients are averaged in the backward pass, and `Run.backward` makes that a sum. Each holds the
    whole model (torch's DDP), or its part of every weight, gradient and moment (FSDP), and gathers
    a layer while it computes it.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.rank = int(os.environ.get("RANK", 0))
        self.size = team_size()
        self.first = self.rank == 0  # the one that writes files and the log
        self.sharded = False  # whether FSDP has left it a part of the model

    def __enter__(self) -> Team:
        if self.size > 1:
            if "RANK" not in os.environ:
                raise RunError(f"WORLD_SIZE={self.size}: wanted torchrun, or --plan")
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            hours = datetime.timedelta(hours=6)  # for the first one to download and tokenise
            distributed.init_process_group(backend, timeout=hours)
        return self

    def __exit__(self, *error) -> None:
        if self.size > 1:
            distributed.destroy_process_group()
            # gloo's threads free their last tensors, and abort if Python has ended: with --shard 6
            # of 50 runs did without this, none of 40 with it (torch 2.13)
            time.sleep(0.1)

    def one_first(self, make: Callable[[], Made]) -> Made:
        """What `make` returns in each process, the others' call coming after the first's."""
        if self.size == 1:
            return make()
        if self.first:
            made = make()
            distributed.barrier()
            return made
        distributed.barrier()
        return make()

    def sum(self, x: Tensor) -> Tensor:
        """x, to which all processes' x have been added in place."""
        if self.size > 1:
            distributed.all_reduce(x)
        return x

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process."""
        if self.size == 1:
            return flag
        return self.sum(torch.tensor(float(flag), device=self.device)).item() > 0

    def shard(self, objective: Objective) -> None:
        """Leaves each process its part of every weight, along the first axis: a DTensor."""
        from torch.distributed.fsdp import fully_shard  # half a second and 40 MB: only if needed

        self.sharded = True
        mesh = distributed.init_device_mesh(self.device.type, (self.size,))
        for block in objective.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(objective, mesh=mesh)  # what is outside of blocks

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module, whose backward pass then leaves the mean of all processes' gradients."""
        alone = self.size == 1 or self.sharded  # FSDP sees to it by itself
        return module if alone else DistributedDataParallel(module, broadcast_buffers=False)

    def reducing(self, module: nn.Module, now: bool) -> contextlib.AbstractContextManager:
        """Around a backward pass: it averages gradients now, or leaves that to the last one."""
        if now or self.size == 1 or self.sharded:  # FSDP adds up its part alone
            return contextlib.nullcontext()
        return module.no_sync()

    def dollars(self, config: Config, seconds: float) -> float | None:
        """What that time costs, where the price is given or known."""
        _, _, price = card(self.device)
        if config.dollars_per_hour is not None:
            price = config.dollars_per_hour
        return price and price * self.size * seconds / 3600


def whole(state):
    """The state with what is in parts put together on the CPU; a call that all processes make."""
    if isinstance(state, dict):
        return {name: whole(part) for name, part in state.items()}
    if isinstance(state, list):
        return [whole(part) for part in state]
    return state.full_tensor().cpu() if hasattr(state, "full_tensor") else state  # of a DTensor


def parted(value, like: Tensor):
    """A whole tensor in parts, as another of its shape is; what has another shape as it is."""
    if hasattr(like, "full_tensor") and isinstance(value, Tensor) and value.shape == like.shape:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value


# The run folder: config.json, vocabulary.json, metrics.jsonl, step-STEP-CHECKSUM.pt

STARTED = {"config.json.part"}  # all that a run killed at its start may have left
# what a resumed run may be given anew; all else has to be as it was
MAY_CHANGE = {"preset", "shard", "out", "cache", "resume", "sample", "checkpoint", "plan", "export"}
MAY_CHANGE |= {"device", "compile", "accumulate", "implementation", "deterministic"}
MAY_CHANGE |= {"log_every", "eval_every", "eval_tokens", "checkpoint_every"}
MAY_CHANGE |= {"samples", "temperature", "min_p", "dollars_per_hour", "track"}
BRANCH_MAY_CHANGE = MAY_CHANGE | {"branch", "schedule", "cooldown", "max_steps"}


def write_atomically(path: Path, text: str) -> None:
    """Writes a small file so that at every instant either the old or the new one is there."""
    part = path.with_name(path.name + ".part")
    with open(part, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def stored_config(folder: Path) -> dict | None:
    """The fields of the run in a folder; None when there is no run."""
    file = folder / "config.json"
    try:
        stored = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise RunError(f"{file} is damaged: {error}; choose another --out") from error
    if not isinstance(stored, dict) or stored.keys() - Config.__dataclass_fields__:
        raise RunError(f"{file} was not written by this version; choose another --out")
    return stored


def check_folder(config: Config) -> None:
    """Checks that the run's folder is free, or holds this run, which is to go on.

    Raises: RunError when the folder holds something else.
    """
    folder = Path(config.out)
    stored = stored_config(folder)
    if stored is None:
        if folder.exists() and (not folder.is_dir() or set(os.listdir(folder)) - STARTED):
            raise RunError(f"--out {folder}: not empty and not a run; choose another folder")
        return
    for name, value in asdict(config).items():
        if name not in MAY_CHANGE and stored.get(name) != value:
            raise RunError(
                f"--out {folder}: holds a run with {name}={stored.get(name)}, not {value}; "
                "choose another folder, or resume it without changing this"
            )
    if not config.resume:
        raise RunError(
            f"--out {folder}: holds this run already; add --resume to go on with it, "
            "or choose another folder"
        )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds FOLDER.lock, so that no other run writes there; the system releases it, come what may.

    It lies beside the folder: one that is removed in mid-run stays locked. Raises: RunError when
    another process holds it.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(folder.name + ".lock"), "w") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(
                f"--out {folder}: another process is training in it; wait, or choose another folder"
            ) from error
        yield


def set_up_folder(folder: Path, config: Config, vocabulary: bpe.Vocabulary) -> None:
    """Makes the folder and what belongs to the run as a whole, where it is not there already."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.json").exists() or stored_config(folder) != asdict(config):
        write_atomically(folder / "config.json", json.dumps(asdict(config), indent=2) + "\n")
    if not (folder / "vocabulary.json").exists():
        vocabulary.save(folder / "vocabulary.json")


def add_metrics(folder: Path, **entry) -> None:
    """Appends a line to metrics.jsonl, even where somebody has removed the folder meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(entry) + "\n")


def import_extra(name: str) -> object:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RunError(f"--track {name} needs a package: pip install {name}") from error


@contextlib.contextmanager
def tracker(config: Config) -> Iterator[Callable[[dict], None]]:
    """What takes the lines of metrics.jsonl, too: each start of a run is one run over there.

    MLflow writes where MLFLOW_TRACKING_URI says, or its own default; W&B below the run's folder,
    for `wandb sync` to upload.
    """
    name, settings = Path(config.out).name, asdict(config)
    if config.track == "none":
        yield lambda entry: None
        return
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # a training run calls nobody
    package = import_extra(config.track)
    if config.track == "mlflow":
        package.set_experiment("06_train")
        with package.start_run(run_name=name):
            package.log_params(settings)
            yield lambda entry: package.log_metrics(numbers(entry), step=entry["step"])
    else:
        options = {"project": "06_train", "dir": config.out, "mode": "offline"}
        with package.init(name=name, config=settings, **options) as their_run:
            yield lambda entry: their_run.log(numbers(entry), step=entry["step"])
        package.teardown()  # only then the file is whole


def numbers(entry: dict) -> dict[str, float]:
    return {k: v for k, v in entry.items() if k != "step" and isinstance(v, (int, float))}


def checkpoint_files(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    return sorted(folder.glob("step-*.pt"), reverse=True)


def checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def step_of(path: Path) -> int:
    return int(path.name.split("-")[1])


def sync_names(folder: Path) -> None:
    """Waits until the names in a folder are on disk, so that a power cut cannot undo a rename."""
    if os.name == "posix":
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def save_checkpoint(folder: Path, state: dict, best: int) -> Path:
    """Writes step-STEP-CHECKSUM.pt; then removes all but the newest `KEEP` and that of step `best`.

    At every instant the newest complete checkpoint is on disk under its final name.
    """
    part = folder / "checkpoint.part"
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        path = folder / f"step-{state['step']:08d}-{checksum(part)}.pt"
        part.replace(path)
        sync_names(folder)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        if not folder.is_dir():
            raise RunError(f"--out {folder}: it is not a folder any more") from error
        part.unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free / 1e6
        newest = next((path.name for path in checkpoint_files(folder)), "not there yet")
        reason = getattr(error, "strerror", None) or "write error"
        raise RunError(
            f"no checkpoint could be written to {folder} ({reason}, {free:.0f} MB free); make "
            f"room, then --resume from the newest, which is {newest}"
        ) from error
    for old in checkpoint_files(folder)[KEEP:]:
        if step_of(old) != best:
            old.unlink()
    return path


def load_checkpoint(folder: Path, step: int | None = None) -> dict | None:
    """The newest checkpoint, or that of a step, whose content fits the checksum in its name.

    None without any.
    """
    for path in checkpoint_files(folder):
        if step is not None and step_of(path) != step:
            continue
        reason = "its checksum is wrong"
        if path.stem.endswith(checksum(path)):
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # torch raises a dozen kinds for what is no checkpoint
                reason = str(error).splitlines()[0]
        print(f"resume   {path.name} is damaged and passed over: {reason}")
    return None


def branch_point(config: Config) -> dict:
    """The newest checkpoint of the run that `config.branch` names, of the same model and data."""
    folder = Path(config.branch)
    state = load_checkpoint(folder) if folder.is_dir() else None
    check(state is not None, "branch", config.branch, "the --out folder of a run with a checkpoint")
    for name, value in state["config"].items():
        if name not in BRANCH_MAY_CHANGE:
            check(getattr(config, name) == value, name, getattr(config, name),
                  f"{value}, as in the run that --branch {folder} goes on from")  # fmt: skip
    check(config.max_steps > state["step"], "max_steps", config.max_steps,
          f"more than the {state['step']} steps behind the run in --branch")  # fmt: skip
    last = state["step"] - 1
    peak = config.learning_rate
    before = peak * Config(**state["config"]).multiplier(last)
    now = peak * config.multiplier(last)
    if not math.isclose(before, now, rel_tol=1e-9):
        raise RunError(
            f"--branch {folder}: its learning rate at step {last} was {before:.3g}, and here it "
            f"would be {now:.3g}; a cooldown has to begin at or after step {state['step']}: raise "
            "--max-steps or lower --cooldown"
        )
    return state


def keep_metrics(folder: Path, step: int, max_steps: int) -> None:
    """Drops the lines of metrics.jsonl that a run resumed at `step` will write again.

    An evaluation stands before its step's checkpoint, but the last one of all stands behind it.
    After a rewind the same step stands there twice, and the second time counts.
    """
    kept = []
    if (folder / "metrics.jsonl").exists():
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # the line that a kill cut short
                break
            evaluated = "val_nats" in entry and step < max_steps
            if entry["step"] < step or (evaluated and entry["step"] == step):
                kept.append(line + "\n")
    write_atomically(folder / "metrics.jsonl", "".join(kept))


# Evaluation and samples


@torch.no_grad()
def evaluate(
    loss_sum: Callable[[Tensor, Tensor], Tensor],
    val: batches.Batches,
    token_bytes: Tensor,
    limit: int,
    team: Team,
) -> tuple[float, float]:
    """Mean loss over the first `limit` targets, to the next full row: nats/token, bits/byte.

    Args: token_bytes (V,) int64, bytes of text that each id stands for; END stands for none.
    """
    rows = min(len(val), int(np.searchsorted(val.lengths.cumsum(), limit)) + 1)
    sums = torch.zeros(3, dtype=torch.float64, device=token_bytes.device)
    size = val.batch_size
    for start in range(0, rows, team.size * size):  # as many batches in each process, of one size
        first = start + team.rank * size
        x, y, _ = val.take(np.arange(first, first + size).clip(max=rows - 1))
        y[max(0, rows - first) :] = batches.IGNORE  # rows that only fill the batch up
        counted = y != batches.IGNORE
        text_bytes = (token_bytes[y.clamp(min=0)] * counted).sum()
        sums += torch.stack((loss_sum(x, y).double(), text_bytes, counted.sum()))
    nats, text_bytes, tokens = team.sum(sums).tolist()
    return nats / tokens, losses.bits_per_byte(nats / tokens, int(tokens), int(text_bytes))


def write_stories(
    model: gpt.GPT, vocabulary: bpe.Vocabulary, config: Config, prompt: str = "", count: int = 1
) -> list[str]:
    """Texts that begin with the prompt, as the model goes on; the same for the same seed."""
    encoding = vocabulary.encoding()
    start = [vocabulary.end, *encoding.encode_ordinary(prompt)]
    if len(start) >= config.seq_len:
        raise RunError(f"--sample: {len(start)} tokens; wanted fewer than seq_len={config.seq_len}")
    device = model.embedding.weight.device
    ids = model.generate(
        torch.tensor([start] * count, device=device),
        config.seq_len - len(start),
        temperature=config.temperature,
        min_p=config.min_p,
        generator=torch.Generator(device).manual_seed(config.seed),
        stop=vocabulary.end,
    )
    texts = []
    for row in ids[:, 1:].tolist():
        story = row[: row.index(vocabulary.end)] if vocabulary.end in row else row
        texts.append(encoding.decode(story))
    return texts


def count_sound(texts: list[str]) -> int:
    """How many of the texts are stories that the grammar of the built-in corpus could have told.

    Prints what is wrong with the first few others.
    """
    verdicts = [stories.parse(text) for text in texts]
    broken = [v for v in verdicts if isinstance(v, stories.Broken)]
    for verdict in broken[:3]:
        print(f"broken   {verdict.rule}: {verdict.message}")
    return len(texts) - len(broken)


# The loop


class Stopped(Exception):
    """A signal asked the run to end; it has saved a checkpoint."""


@contextlib.contextmanager
def signals_noted() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are put into the list, for the loop to end at its next step.

    A second one acts as usual. Outside the main thread nothing is caught.
    """
    noted: list[int] = []
    old = {}

    def note(number, frame):
        noted.append(number)
        signal.signal(number, old[number])

    if threading.current_thread() is threading.main_thread():
        old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class Meter:
    """Rates of the steps alone: no evaluation, no checkpoint, none of the slow first steps."""

    def __init__(self, run: Run):
        self.flops = gpt.flops_per_token(run.model.config)
        peak, _, _ = card(run.device)
        self.peak = peak and peak * run.team.size  # TFLOP/s, of all GPUs together
        self.seen, self.steps, self.tokens, self.seconds = 0, 0, 0, 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self.seen += 1
        if self.seen > UNTIMED_STEPS:
            self.steps, self.tokens = self.steps + 1, self.tokens + tokens
            self.seconds += seconds

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else math.nan

    @property
    def mfu_percent(self) -> float | None:
        """Model FLOP/s over the device's peak; None where the peak is not known."""
        return self.peak and self.tokens_per_second * self.flops / (self.peak * 1e12) * 100

    def line(self, steps_left: int) -> str:
        if not self.seconds:
            return ""
        each = self.seconds / self.steps
        mfu = f" | mfu {self.mfu_percent:.1f}%" if self.peak else ""
        left = f"{int(steps_left * each) // 60}:{int(steps_left * each) % 60:02d} left"
        return f" | {each * 1e3:.0f} ms | {self.tokens_per_second:,.0f} tok/s{mfu} | {left}"


def shape_of(config: Config, vocab_size: int) -> gpt.GPTConfig:
    return replace(
        gpt.PRESETS[config.model],
        vocab_size=vocab_size,
        seq_len=config.seq_len,
        implementation=config.implementation,
    )


def build(config: Config, vocabulary: bpe.Vocabulary) -> gpt.GPT:
    """A fresh model for this vocabulary, the same for the same seed."""
    torch.manual_seed(config.seed)
    return gpt.GPT(shape_of(config, vocabulary.size))


def make_optimizers(config: Config, model: gpt.GPT) -> list[torch.optim.Optimizer]:
    """AdamW for all weights; or Muon for the hidden matrices, and AdamW for the others."""
    if not config.compile:
        leave_out_dynamo()
    named, optimizers = list(model.named_parameters()), []
    if config.optimizer == "muon":
        hidden, named = muon.split_parameters(named)
        settings = {"weight_decay": config.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
        settings["dtype"], _ = pick_dtype(config.dtype, hidden[0][1].device)
        optimizers.append(muon.Muon(hidden, config.muon_learning_rate, **settings))
    plain = config.shard or config.implementation == "torch"  # the kernel takes no parts
    implementation = "foreach" if plain else config.implementation
    optimizers.append(
        adamw.AdamW(
            adamw.param_groups(named, config.weight_decay),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            implementation=implementation,
        )
    )
    return optimizers


@dataclass
class Place:
    """Where a run stands: together with weights, moments and random state, all that matters."""

    step: int = 0  # steps done, those that the guard left out among them
    batch: int = 0  # the next batch of the data: ahead of step by what a rewind passed over
    tokens: int = 0  # targets trained on
    seconds: float = 0.0  # spent so far
    rewinds: int = 0  # in a row
    rewound_to: int = -1  # step that the last of them went back to
    rewound_from: int = -NEAR  # step that it came from
    best: float = math.inf  # lowest loss of an evaluation, nats/token
    best_step: int = -1


class Objective(nn.Module):
    """From tokens to the loss, as one module: what is compiled, and shared between processes."""

    def __init__(self, model: gpt.GPT, dtype: torch.dtype, implementation: str):
        super().__init__()
        self.model, self.dtype, self.implementation = model, dtype, implementation

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Sum of the losses of all targets: x, y (B, T) int64 -> () float32."""
        enabled = self.dtype != torch.float32
        # a cache would hold each weight's copy to the end, and each is taken once
        with torch.autocast(x.device.type, self.dtype, enabled=enabled, cache_enabled=False):
            h = self.model.hidden(x)  # (B, T, C)
            weight = self.model.embedding.weight  # (V, C)
            options = {"reduction": "sum", "implementation": self.implementation}
            return losses.linear_cross_entropy(h, weight, y, **options)


class Run:
    """Model, optimiser and guard of a run, and the place where it stands."""

    def __init__(
        self,
        config: Config,
        vocabulary: bpe.Vocabulary,
        device: torch.device,
        dtype: torch.dtype,
        team: Team,
    ):
        self.config, self.vocabulary, self.device, self.team = config, vocabulary, device, team
        self.folder = Path(config.out)
        self.model = build(config, vocabulary)
        self.loss_sum = Objective(self.model, dtype, config.implementation)
        if config.shard:
            team.shard(self.loss_sum)  # before it goes to the device, which may not hold it
        self.loss_sum.to(device)
        self.optimizers = make_optimizers(config, self.model)
        self.guard = stability.SpikeGuard()
        self.place = Place()
        self.started = time.perf_counter()
        if config.compile:
            self.loss_sum.compile()
        self.shared = team.wrap(self.loss_sum)

    def backward(self, x: Tensor, y: Tensor, count: int) -> Tensor:
        """Adds the gradient of the mean loss over all `count` targets; returns that loss, ().

        x, y: this process's rows of the batch; count: of the team's together.
        """
        loss, parts = torch.zeros((), device=self.device), self.config.accumulate
        for number, (x_part, y_part) in enumerate(zip(x.chunk(parts), y.chunk(parts)), 1):
            with self.team.reducing(self.shared, now=number == parts):
                part = self.shared(x_part, y_part) / count
                (part * self.team.size).backward()  # of which the team's mean is the sum of parts
            loss += part.detach()
        return self.team.sum(loss)

    @property
    def seconds(self) -> float:
        return self.place.seconds + time.perf_counter() - self.started

    def save(self) -> Path:
        """Writes a checkpoint; makes the folder again where somebody has removed it."""
        weights = whole(self.model.state_dict())
        moments = [whole(optimizer.state_dict()) for optimizer in self.optimizers]
        if not self.team.first:
            return self.folder
        cuda = self.device.type == "cuda"
        state = {
            "step": self.place.step,
            "place": asdict(self.place) | {"seconds": self.seconds},
            "model": weights,
            "optimizers": moments,
            "guard": self.guard.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if cuda else None,
            "config": asdict(self.config),
            "vocabulary": self.vocabulary.hash,
        }
        set_up_folder(self.folder, self.config, self.vocabulary)
        return save_checkpoint(self.folder, state, self.place.best_step)

    def restore(self, state: dict | None) -> None:
        """Goes to where a checkpoint was taken; without one, to the beginning."""
        if state is None:
            self.load_weights(build(self.config, self.vocabulary).state_dict())
            self.optimizers = make_optimizers(self.config, self.model)
            self.guard, self.place = stability.SpikeGuard(), Place()
            return
        if state["vocabulary"] != self.vocabulary.hash:
            raise RunError(
                f"--out {self.folder}: the text of --data {self.config.data} has changed since the "
                "checkpoint was made, and its vocabulary with it; start anew in another --out"
            )
        self.load_weights(state["model"])
        for optimizer, stored in zip(self.optimizers, state["optimizers"]):
            weights = [p for group in optimizer.param_groups for p in group["params"]]
            moments = {
                i: {name: parted(value, weights[i]) for name, value in of_one.items()}
                for i, of_one in stored["state"].items()
            }
            optimizer.load_state_dict(stored | {"state": moments})
        self.guard.load_state_dict(state["guard"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        self.place = Place(**state["place"])

    def load_weights(self, state: dict[str, Tensor]) -> None:
        own = self.model.state_dict()
        self.model.load_state_dict({name: parted(state[name], own[name]) for name in own})

    def whole_model(self) -> gpt.GPT:
        """The model for one process alone, of parts a copy on the CPU; a call of all processes."""
        if not self.config.shard:
            return self.model
        model = build(self.config, self.vocabulary)
        model.load_state_dict(whole(self.model.state_dict()))
        return model

    def rewind(self) -> None:
        """Goes back to the newest checkpoint, and on with the data after the present batch.

        Where that is the one gone back to the last time, the harm is older than it: it is deleted,
        and the one before it is taken.
        """
        past = self.place
        near = past.step < past.rewound_from + NEAR
        if near and past.rewinds == MAX_REWINDS:
            raise RunError(
                f"went back {MAX_REWINDS} times and the loss still spikes, at step {past.step}; "
                "try a lower --learning-rate in another --out"
            )
        files = checkpoint_files(self.folder)
        if near and files and step_of(files[0]) == past.rewound_to:
            check(self.config.branch is None or len(files) > 1, "branch", self.config.branch,
                  "a run that does not spike where it is left")  # fmt: skip
            files[0].unlink(missing_ok=True)  # another process may have been first
        self.team.any(False)  # until all are here
        self.restore(load_checkpoint(self.folder))
        self.place.batch = past.batch + 1
        self.place.rewinds = past.rewinds + 1 if near else 1
        self.place.rewound_to, self.place.rewound_from = self.place.step, past.step
        self.place.seconds = past.seconds  # the time since is counted from self.started


def prepare(config: Config) -> corpus.Data:
    """Vocabulary and tokens of the text that the config names."""
    return corpus.prepare(config.data, Path(config.cache), config.vocab_size, config.story_count)


def describe(run: Run, data: corpus.Data, source: batches.Batches, reason: str) -> None:
    """The first lines of the log: what is about to be trained, on what, and what to expect."""
    config, about, floor = run.config, data.about_train, data.about_val.floor_nats
    flops, (peak, _, _) = gpt.flops_per_token(run.model.config), card(run.device)
    machine = device_name(run.device)
    if run.team.size > 1:
        machine = f"{run.team.size} processes, this one on {machine}"
    print(f"machine  {machine}, torch {torch.__version__}, {run.loss_sum.dtype}: {reason}")
    print("config   " + " ".join(f"{name}={value}" for name, value in asdict(config).items()))
    print(
        f"data     {about.source}: {about.stories:,} stories, {about.tokens:,} tokens of "
        f"{data.vocabulary.size:,}; an epoch is {len(source) / config.batch_size:,.0f} steps"
    )
    print(
        f"model    {config.model}: {gpt.parameter_count(run.model.config):,} parameters, "
        f"{flops / 1e6:.1f} MFLOP/token, GPU peak "
        + (f"{peak} TFLOP/s" if peak else "unknown: no mfu")
    )
    print(f"expect   {math.log(data.vocabulary.size):.4f} nats at step 0 (ln V)", end="")
    print("" if floor is None else f", and at best about {floor:.4f} at the end, the floor")


Report = Callable[[int, float], None]


def train(config: Config, report: Report | None = None) -> dict[str, float]:
    """Runs the whole job and returns the figures of its last lines.

    report: called as report(step, val_nats) after every evaluation, the last one too; what it
    raises ends the run.
    Raises: RunError for what the user can put right; Stopped after SIGINT or SIGTERM.
    """
    device = pick_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    if config.deterministic:
        make_deterministic()
    with Team(device) as team:
        return train_together(config, device, team, report or (lambda step, val_nats: None))


def train_together(
    config: Config, device: torch.device, team: Team, report: Report
) -> dict[str, float]:
    """What each process of the team does."""
    started = time.perf_counter()
    dtype, reason = pick_dtype(config.dtype, device)
    check_team(config)
    folder, trunk = Path(config.out), None
    if team.first:
        check_folder(config)
    if config.branch and not (config.resume and checkpoint_files(folder)):
        trunk = branch_point(config)

    # 1. data: rows of tokens, a batch of them for each step
    try:
        data = team.one_first(lambda: prepare(config))
    except (ValueError, FileNotFoundError) as error:  # the text is not as wanted
        raise RunError(str(error)) from error
    end = data.vocabulary.end
    if config.rows == "stories":
        rows = batches.story_rows(data.train, end, config.seq_len)
    else:
        rows = batches.block_rows(len(data.train), config.seq_len)
    val_rows = batches.story_rows(data.val, end, config.seq_len)
    trim = device.type == "cpu" and not config.compile  # else batches have to be of one shape
    options = (config.seq_len, config.seed, device, trim)
    source = batches.Batches(data.train, rows, config.batch_size, *options)
    part = config.batch_size // config.accumulate // team.size  # rows that fit at once
    val = batches.Batches(data.val, val_rows, part, *options)
    token_bytes = torch.tensor(data.vocabulary.token_bytes, device=device)  # (V,)

    # 2. model and optimiser
    run = Run(config, data.vocabulary, device, dtype, team)
    run.started = started
    meter = Meter(run)
    describe(run, data, source, reason)
    with contextlib.ExitStack() as held:
        stops = held.enter_context(signals_noted())
        if team.first:
            held.enter_context(locked(folder))
            check_folder(config)  # again: another run may have been first
            set_up_folder(folder, config, data.vocabulary)
            track = held.enter_context(tracker(config))

        def log(**entry) -> None:
            if team.first:
                add_metrics(folder, **entry)
                track(entry)

        # 3. where to begin
        state = load_checkpoint(folder) if config.resume else None
        if state is not None:
            run.restore(state)
            print(f"resume   at step {run.place.step}")
        elif trunk is not None:
            run.restore(trunk)
            run.place.best_step = -1  # that checkpoint is in the other folder
            run.save()
            print(f"branch   from {config.branch} at step {run.place.step}")
        elif config.resume:
            print(f"resume   no checkpoint in {folder} to go on from: this run begins at step 0")
        if team.first:
            keep_metrics(folder, run.place.step, config.max_steps)

        while run.place.step < config.max_steps:
            began, step, place = time.perf_counter(), run.place.step, run.place

            # 4. gradient of the mean loss over all targets of this step, clipped
            x, y, count = source.batch(place.batch, team.rank, team.size)  # (B, T), (B, T)
            loss = run.backward(x, y, count)
            named = list(run.model.named_parameters())
            norm = whole(stability.clip_grad_norm_(named, config.grad_clip or math.inf))

            # 5. judge it, then update: a step that would do harm is left out or undone
            if config.guard == "on":
                verdict = run.guard.judge(loss.item(), norm.item(), count)
            else:
                verdict = stability.Verdict("go", "not judged")
            multiplier = config.multiplier(step)
            if verdict.action == "go":
                for optimizer in run.optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = optimizer.defaults["lr"] * multiplier
                    optimizer.step()
                place.tokens += count
            else:
                gradients = [(name, p.grad) for name, p in named if p.grad is not None]
                names = [name for name, g in gradients if not whole(g.isfinite().all())]
                reason = verdict.reason
                if names:
                    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                    reason += f"; gradient not finite in {', '.join(names[:3])}{more}"
                print(f"guard    step {step}, batch {place.batch}: {verdict.action}: {reason}")
                log(step=step, guard=verdict.action, reason=reason)
            run.model.zero_grad()
            if verdict.action == "rewind":
                run.rewind()
                print(
                    f"guard    back to step {run.place.step}, and on with batch {run.place.batch}"
                )
                continue
            place.step, place.batch = step + 1, place.batch + 1
            meter.add(count, time.perf_counter() - began)

            # 6. log
            if step % config.log_every == 0 and verdict.action == "go":
                rate = config.learning_rate * multiplier
                entry = {"loss": loss.item(), "lr": rate, "gnorm": norm.item()}
                log(step=step, **entry)
                print(
                    f"step {step:6d}/{config.max_steps} | loss {entry['loss']:.4f} nats | "
                    f"lr {rate:.2e} | gnorm {entry['gnorm']:.2f}"
                    + meter.line(config.max_steps - place.step)
                )
            looks = config.log_every, config.checkpoint_every, config.max_steps
            look = config.guard == "off" and any(place.step % n == 0 for n in looks)
            if look and not math.isfinite(loss.item() + norm.item()):  # for which a GPU waits
                raise RunError(
                    f"loss {loss.item()} and gradient norm {norm.item()} at step {step}; try a "
                    "lower --learning-rate in another --out"
                )

            # 7. evaluate, save, stop
            last, stopping = place.step == config.max_steps, team.any(bool(stops))
            best = False
            if place.step % config.eval_every == 0 or last:
                nats, bpb = evaluate(run.loss_sum, val, token_bytes, config.eval_tokens, team)
                best = nats < place.best
                if best:
                    place.best, place.best_step = nats, place.step
            if place.step % config.eval_every == 0 and not last:
                log(step=place.step, val_nats=nats, val_bpb=bpb)
                print(
                    f"eval {place.step:6d}/{config.max_steps} | val {nats:.4f} nats | "
                    f"{bpb:.4f} bpb" + (" | best so far" if best else "")
                )
                report(place.step, nats)
            if place.step % config.checkpoint_every == 0 or best or last or stopping:
                path = run.save()
            if stopping and not last:
                name = signal.Signals(stops[0]).name if stops else "a signal to another process"
                raise Stopped(f"{name} after step {step}: saved {path}; --resume goes on from it")

        # 8. the whole validation text, and stories
        nats, bpb = evaluate(run.loss_sum, val, token_bytes, len(data.val), team)
        log(step=config.max_steps, val_nats=nats, val_bpb=bpb)
    seconds = run.seconds
    report(config.max_steps, nats)
    built_in = config.data == "stories"
    count = config.samples if built_in else min(1, config.samples)
    if count:
        texts = write_stories(run.whole_model(), data.vocabulary, config, count=count)
        if built_in:
            sound = count_sound(texts)
            print(f"sound    {sound} of {len(texts)} sampled stories break no rule of the grammar")
        print(f"sample   (temperature {config.temperature}, min_p {config.min_p})\n\n{texts[0]}\n")
    results = {
        "val_nats": nats,
        "floor_nats": data.about_val.floor_nats,
        "val_bpb": bpb,
        "tokens": run.place.tokens,
        "seconds": seconds,
        "dollars": team.dollars(config, seconds),
        "tokens_per_second": meter.tokens_per_second,
        "mfu_percent": meter.mfu_percent,
        "peak_memory_gb": peak_memory_gb(device),
        "parameters": gpt.parameter_count(run.model.config),
    }
    results = {name: value for name, value in results.items() if value is not None}
    for name, value in results.items():
        print(f"{name}: {value}")
    return results


# What a run takes, told before anything is spent


def memory_parts(
    config: Config, model: gpt.GPT, device_type: str, dtype: torch.dtype
) -> dict[str, int]:
    """Bytes that a process holds at the height of a step, by what they are for.

    The height is where backward enters the last layer: all activations are there, and of the
    gradients those that the loss has made and, with --accumulate, those of the micro-batches
    before. The others come as the activations go. On a CPU the program comes on top: torch has
    0.25 GB. Each of several processes has its share of the rows, and with --shard of weights and
    moments, beside the layer that it gathers and the next.
    """
    shape, parameters, processes = model.config, gpt.parameter_count(model.config), team_size()
    tokens = config.batch_size // config.accumulate // processes * config.seq_len
    moments = 2 * parameters
    if config.optimizer == "muon":  # keeps one where AdamW keeps two
        hidden, _ = muon.split_parameters(model.named_parameters())
        moments -= sum(p.numel() for _, p in hidden)
    gathered = 0
    if config.shard:
        layer = sum(p.numel() for p in model.blocks[0].parameters())
        gathered = 2 * layer + shape.vocab_size * shape.d_model
        moments, parameters = moments // processes, parameters // processes
    summed = 4 * parameters * (config.accumulate > 1)  # those of the micro-batches before
    summed += 4 * parameters * (processes > 1 and not config.shard)  # DDP's, to be sent
    chunk = losses.CHUNK_LOGITS_CPU if device_type == "cpu" else losses.CHUNK_LOGITS
    logits = min(tokens * shape.vocab_size, chunk)
    parts = {
        "weights": 4 * (parameters + gathered),
        "moments": 4 * moments,
        "activations": gpt.activation_bytes(shape, tokens, dtype, fused=device_type == "cuda"),
        "logits": logits * (4 if dtype == torch.float32 else 4 + dtype.itemsize),
        "gradients at the head": 4 * (shape.vocab_size + tokens) * shape.d_model,
        "gradients added up": summed,
        # of gate|up and silu * up, 3 numbers a channel, and what comes and goes: 5 as measured
        "backward of an MLP": dtype.itemsize * 5 * tokens * shape.d_mlp,
    }
    if device_type == "cpu":  # where glibc keeps freed blocks, the gradients' too: measured with
        # 4 to 16 rows of the 27M model (of 32 it is 0.2 GB more)
        passing = sum(parts.values()) - parts["weights"] - parts["moments"] - summed
        parts["freed, but kept"] = passing // 4 + 4 * parameters * (config.accumulate == 1)
    return parts


def trial(config: Config, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Measured medians: seconds a token takes forward and backward, seconds of an update.

    On random tokens: a micro-batch of them on a GPU, on a CPU as many as take seconds.
    """
    if device.type == "cpu":
        keep_freed_memory()
    model = gpt.GPT(shape_of(config, config.vocab_size)).to(device)
    objective = Objective(model, dtype, config.implementation)
    optimizers = make_optimizers(config, model)
    if config.compile:
        objective.compile()
    rows = config.batch_size // config.accumulate
    if device.type == "cpu":
        rows = min(rows, max(1, TRIAL_TOKENS // config.seq_len))
    ids = torch.randint(config.vocab_size, (rows, config.seq_len + 1), device=device)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    times = []
    for _ in range(UNTIMED_STEPS + TRIAL_STEPS):
        times.append([now()])
        objective(ids[:, :-1], ids[:, 1:]).backward()
        times[-1].append(now())
        stability.clip_grad_norm_(list(model.named_parameters()), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        times[-1].append(now())
    passes, updates = np.median(np.diff(times[UNTIMED_STEPS:]), axis=0)
    return passes / (rows * config.seq_len), updates


def plan(config: Config) -> None:
    """Prints what the run would take: nothing is downloaded, and no run is begun.

    Of several processes, as torchrun or WORLD_SIZE say, without what they send each other.
    """
    check_team(config)
    device = pick_device(config.device)
    dtype, _ = pick_dtype(config.dtype, device)
    with torch.device("meta"):  # shapes without numbers
        model = gpt.GPT(shape_of(config, config.vocab_size))
    per_token = gpt.flops_per_token(model.config)
    tokens = config.max_steps * config.batch_size * config.seq_len  # positions, padding too
    evaluated = config.max_steps // config.eval_every * config.eval_tokens
    print(
        f"plan     {config.model}: {gpt.parameter_count(model.config):,} parameters, "
        f"{config.max_steps:,} steps of {config.batch_size} rows of {config.seq_len}: "
        f"{tokens:,} positions at {per_token / 1e6:.1f} MFLOP: {tokens * per_token:.2e} FLOP"
    )

    processes = team_size()
    of_each, several, each = "", "", ""
    if processes > 1:
        of_each, several, each = f" of each of {processes} processes", f"{processes} ", " each"
    print(f"memory   here{of_each}, with {dtype}, accumulate {config.accumulate}, rows full")
    parts = memory_parts(config, model, device.type, dtype)  # bytes
    total = sum(parts.values()) / 1e9
    for name, size in parts.items():
        print(f"         {name:21s} {size / 1e9:8.3f} GB")
    print(f"         {'in all':21s} {total:8.3f} GB, and the program")

    on_card = sum(memory_parts(config, model, "cuda", torch.bfloat16).values()) / 1e9
    print(
        f"cards    {several}at {MFU:.0%} of their bfloat16 peak, with {on_card:.1f} GB{each}; "
        "--dollars-per-hour for your own price"
    )
    for name, (peak, memory, price) in CARDS.items():
        price = price if config.dollars_per_hour is None else config.dollars_per_hour
        hours = tokens * per_token / (peak * 1e12 * MFU) / 3600 / processes
        print(
            f"         {name:9s} {hours:8.2f} h"
            + (f" {hours * price * processes:8.2f} dollars at {price:.2f}/h" if price else "")
            + ("" if on_card < 0.9 * memory else f"; too large for its {memory} GB: --accumulate")
        )

    if processes > 1:
        return  # one process cannot time a step of several
    token, update = trial(config, device, dtype)
    seconds = tokens * token + evaluated * token / 3 + config.max_steps * update
    print(
        f"here     {device_name(device)}: {TRIAL_STEPS} steps of it measured: "
        f"{seconds / 3600:.3f} h = {seconds:.0f} s of training and evaluation"
    )


# What to do with a trained model


def trained(config: Config, flag: str) -> tuple[gpt.GPT, bpe.Vocabulary]:
    """The model of the run in --out, from the --checkpoint asked for, and its vocabulary."""
    folder = Path(config.out)
    state = load_checkpoint(folder) if folder.is_dir() else None
    if state is not None and config.checkpoint == "best":
        state = load_checkpoint(folder, state["place"]["best_step"])
    if state is None:
        raise RunError(
            f"{flag}: no {config.checkpoint} checkpoint in {folder}; train first, or give its --out"
        )
    for name in ("model", "vocab_size", "seq_len"):
        check(getattr(config, name) == state["config"][name], name, getattr(config, name),
              f"{state['config'][name]}, as the run in {folder} has it")  # fmt: skip
    try:
        vocabulary = bpe.Vocabulary.load(folder / "vocabulary.json")
    except (ValueError, FileNotFoundError) as error:
        raise RunError(str(error)) from error
    model = build(config, vocabulary)
    model.load_state_dict(state["model"])
    return model.to(pick_device(config.device)), vocabulary


def continue_text(config: Config) -> None:
    """Prints how the model in --out goes on from --sample."""
    model, vocabulary = trained(config, "--sample")
    print(write_stories(model, vocabulary, config, config.sample)[0])


def export(config: Config) -> None:
    """Writes the model in --out, with its tokeniser, as a folder that `transformers` loads."""
    model, vocabulary = trained(config, "--export")
    try:
        gpt.to_huggingface(model, config.export)
    except ImportError as error:
        raise RunError(f"--export: {error}") from error
    bpe.to_huggingface(vocabulary, config.export)
    print(f"export   {config.export}: AutoModelForCausalLM and AutoTokenizer load it")


# The command line: every field of Config is a flag


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise RunError(message)


def read_flags(argv: list[str]) -> dict:
    """The fields that were given, by name.

    Raises: RunError for an unknown flag, naming the nearest one, and for a wrong type.
    """
    source = inspect.getsource(Config)
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, flags=re.MULTILINE))
    parser = Parser(
        description=__doc__.splitlines()[0],
        allow_abbrev=False,  # "--l 3" would silently mean --learning-rate
        argument_default=argparse.SUPPRESS,
    )
    for name, kind in typing.get_type_hints(Config).items():
        flag, default = "--" + name.replace("_", "-"), getattr(Config, name)
        about = f"{comments[name]} (default: {default})".replace("%", "%%")
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=about)
        else:
            kind = (typing.get_args(kind) or (kind,))[0]  # str | None -> str
            parser.add_argument(flag, type=kind, help=about, metavar=kind.__name__.upper())
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1)
        hint = f"; did you mean {near[0]}?" if near else "; --help lists the flags"
        raise RunError(f"unknown argument {unknown[0]}{hint}")
    return vars(given)


def resolve(flags: dict) -> Config:
    """The config that the flags ask for: a stored run's or a preset's, with the flags on top."""
    machine = "tinystories" if torch.cuda.is_available() else "stories"
    preset = flags.get("preset", machine)
    check(preset in PRESETS, "preset", preset, "one of " + ", ".join(PRESETS))
    base = {"preset": preset, **PRESETS[preset]}
    stored = {}
    if flags.get("branch") is not None:
        stored |= stored_config(Path(flags["branch"])) or {}
    if flags.get("resume") or flags.keys() & {"sample", "export"}:
        stored |= stored_config(Path(flags.get("out", base.get("out", Config.out)))) or {}
    for name in ("out", "resume", "sample", "checkpoint", "export", "plan"):  # of a command
        stored.pop(name, None)
    try:
        return Config(**base | stored | flags)
    except TypeError as error:  # a flag has its type from the parser, so it is the stored run's
        raise RunError(f"the run's config.json is damaged: {error}; start anew") from error


def quiet_unless_first() -> contextlib.AbstractContextManager:
    """Of several processes only the first one prints."""
    if int(os.environ.get("RANK", 0)) == 0:
        return contextlib.nullcontext()
    return contextlib.redirect_stdout(io.StringIO())


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    try:
        config = resolve(read_flags(argv))
        if config.sample is not None:
            continue_text(config)
            return 0
        if config.export is not None:
            export(config)
            return 0
        if config.plan:
            with quiet_unless_first():
                plan(config)
            return 0
        has = "a GPU" if torch.cuda.is_available() else "no GPU"
        with quiet_unless_first():
            print(f"preset   {config.preset}: this machine has {has}; --preset NAME for another")
            train(config)
        return 0
    except (RunError, tinystories.DownloadError) as error:
        print(f"06_train.py: error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        with quiet_unless_first():
            print(f"stopped  {stopped}")
        return 130
    except torch.OutOfMemoryError:
        print(
            "06_train.py: error: the GPU's memory is too small for this batch; double --accumulate",
            file=sys.stderr,
        )
        return 2
    except OSError as error:
        print(f"06_train.py: error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        lost = isinstance(error, distributed.DistError) or "gloo" in str(error)
        if "RANK" not in os.environ or not lost:
            raise
        print(
            f"06_train.py: error: process {os.environ['RANK']} lost the others "
            f"({str(error).splitlines()[0]}); --resume goes on from the newest checkpoint",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        with quiet_unless_first():
            print("stopped  at once; what the run has saved is there for --resume")
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
