"""Breaks running training in many ways, and counts how often anything was lost.

Each try starts 06_train.py's main in a process of its own on a small run, breaks it there or from
outside, and lets it go on with --resume. It has survived when the numbers that it leaves (metrics,
weights, moments) are bit for bit those of a run that nothing disturbed; where the disturbance has
to end the run, that must be said in one line with exit status 2, before it is resumed.

    python tests/faults.py [--kills 100] [--tries 10] [--json FILE]

So many tries take 91 s on 2 cores of an AMD EPYC (Zen 5).

`tests/test_06_train.py` tries each fault once or twice.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

train = importlib.import_module("06_train")
gpt = train.gpt
gpt.PRESETS["tiny"] = gpt.GPTConfig(n_layer=1, n_head=2, n_kv_head=1, d_model=64, d_mlp=64)

# one or two seconds of training that take every path: several epochs, evaluations, checkpoints
SMALL = """--preset stories --model tiny --vocab-size 300 --seq-len 64 --story-count 40
--batch-size 4 --max-steps 40 --warmup-steps 4 --log-every 1 --eval-every 8 --eval-tokens 500
--checkpoint-every 1 --samples 4 --device cpu --dtype float32""".split()
STEPS = 40


def flags(cache: Path, out: Path, *more) -> list[str]:
    return [*SMALL, "--cache", str(cache), "--out", str(out), *map(str, more)]


def make_small() -> None:
    """Fewer stories to validate on: this is about the loop."""
    train.corpus.VAL_STORIES = 20
    torch.set_num_threads(1)


def numbers_of(out: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """What a run leaves: its metrics, and all tensors of its last checkpoint."""
    state = train.load_checkpoint(out)
    tensors = dict(state["model"])
    for number, optimizer in enumerate(state["optimizers"]):
        for i, moments in optimizer["state"].items():
            tensors |= {f"{number}.{i}.{name}": value for name, value in moments.items()}
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return metrics, tensors


def assert_same(out: Path, reference, whole_metrics: bool = True) -> None:
    metrics, tensors = numbers_of(out)
    wanted_metrics, wanted_tensors = reference
    if not whole_metrics:
        wanted_metrics = wanted_metrics[len(wanted_metrics) - len(metrics) :]
    assert metrics == wanted_metrics
    assert tensors.keys() == wanted_tensors.keys()
    assert all(torch.equal(tensors[name], wanted_tensors[name]) for name in tensors)


# Sabotage: what is done inside the process, at a moment that the generator draws


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def around_rename(rng: random.Random, before: bool) -> None:
    """Dies when a finished checkpoint is about to get its name, or has just got it."""
    countdown, rename = [rng.randrange(1, STEPS)], Path.replace

    def replace(self, target):
        countdown[0] -= self.name == "checkpoint.part"
        if countdown[0] or self.name != "checkpoint.part":
            return rename(self, target)
        if not before:
            rename(self, target)
        die()

    Path.replace = replace


def half_written(rng: random.Random) -> None:
    """Dies when some of a checkpoint has been written."""
    countdown, save, share = [rng.randrange(1, STEPS)], torch.save, rng.random()

    def half(state, file):
        save(state, file)
        countdown[0] -= 1
        if not countdown[0]:
            file.truncate(int(share * file.tell()))
            file.flush()
            die()

    torch.save = half


def signal_in_evaluation(rng: random.Random) -> None:
    countdown, evaluate = [rng.randrange(1, 5)], train.evaluate

    def interrupted(*args, **kwargs):
        countdown[0] -= 1
        if not countdown[0]:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **kwargs)

    train.evaluate = interrupted


def full_disk(rng: random.Random) -> None:
    """From some step on no file may be larger than half a checkpoint."""
    import resource

    countdown, save = [rng.randrange(2, STEPS)], torch.save

    def limited(state, file):
        countdown[0] -= 1
        if not countdown[0]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write error instead
        save(state, file)

    torch.save = limited


def folder_removed(rng: random.Random) -> None:
    countdown, backward = [rng.randrange(1, STEPS)], train.Run.backward

    def removing(self, *batch):
        countdown[0] -= 1
        if not countdown[0]:
            shutil.rmtree(self.folder)
        return backward(self, *batch)

    train.Run.backward = removing


def nan_gradient(rng: random.Random) -> None:
    countdown, backward = [rng.randrange(1, STEPS - 1)], train.Run.backward

    def poisoned(self, *batch):
        loss = backward(self, *batch)
        countdown[0] -= 1
        if not countdown[0]:
            rng.choice(list(self.model.parameters())).grad.view(-1)[0] = math.nan
        return loss

    train.Run.backward = poisoned


def poisoned_batch(rng: random.Random) -> None:
    """Targets drawn at random, in one batch after the guard has seen what is usual."""
    countdown, backward = [rng.randrange(26, STEPS - 1)], train.Run.backward

    def poisoned(self, x, y, count):
        countdown[0] -= 1
        if not countdown[0]:
            generator = torch.Generator().manual_seed(rng.randrange(1000))
            y = torch.where(y < 0, y, torch.randint(300, y.shape, generator=generator))
        return backward(self, x, y, count)

    train.Run.backward = poisoned


def nothing(rng: random.Random) -> None:
    pass


def child(argv: list[str], sabotage: Callable, seed: int, errors: Path, environ) -> None:
    """What the process does: the run, sabotaged."""
    os.environ.update(environ)
    make_small()
    sabotage(random.Random(seed))
    with open(errors, "w", buffering=1) as file, contextlib.redirect_stderr(file):
        with open(errors.with_suffix(".out"), "w", buffering=1) as output:
            with contextlib.redirect_stdout(output):
                status = train.main(argv)
    sys.stdout.flush()
    os._exit(status)


class Faults:
    """One method per fault: breaks a run, lets it go on, asserts that nothing was lost."""

    def __init__(self, folder: Path):
        self.folder, self.cache, self.count = folder, folder / "cache", 0
        self.context = multiprocessing.get_context("forkserver")
        # a parent that has imported all of it already: each try saves those seconds
        self.context.set_forkserver_preload(["pytest", "torch._dynamo", "faults"])
        # which Python 3.11 looks for in the path that a new process has, and fails to find silently
        with mock.patch.dict(os.environ, PYTHONPATH=str(Path(__file__).resolve().parent)):
            forkserver.ensure_running()
        out = folder / "reference"
        assert self.run(out) == 0
        self.reference = numbers_of(out)

    def start(self, out: Path, *more, sabotage=nothing, seed=0, name: str = "", environ=()):
        """A run as a process; what it says goes to NAME.errors and NAME.out, NAME being out's."""
        self.errors = self.folder / f"{name or out.name}.errors"
        args = flags(self.cache, out, *more), sabotage, seed, self.errors, environ
        process = self.context.Process(target=child, args=args)
        process.start()
        return process

    def run(self, out: Path, *more, **how) -> int:
        """The exit status of a run, or minus the signal that ended it."""
        process = self.start(out, *more, **how)
        process.join(300)
        assert process.exitcode is not None, "it hangs"
        return process.exitcode

    def new(self) -> Path:
        self.count += 1
        return self.folder / f"run{self.count}"

    def goes_on(self, out: Path, **how) -> None:
        assert self.run(out, "--resume") == 0, self.errors.read_text()
        assert_same(out, self.reference, **how)
        shutil.rmtree(out)

    def said(self, words: str) -> None:
        text = self.errors.read_text()
        assert words in text and text.count("\n") == 1, text

    def kills(self, seed: int, times: int) -> None:
        """One run, killed at `times` random moments."""
        rng, out = random.Random(seed), self.new()
        for _ in range(times):
            process = self.start(out, "--resume")
            while not list(out.glob("step-*")) and process.is_alive():
                time.sleep(0.005)  # the first kill waits for the first checkpoint
            time.sleep(rng.uniform(0, 0.5))
            process.kill()
            process.join()
        self.goes_on(out)

    def killed_before_rename(self, seed: int) -> None:
        out = self.new()
        assert self.run(out, sabotage=before_rename, seed=seed) == -signal.SIGKILL
        self.goes_on(out)

    def killed_after_rename(self, seed: int) -> None:
        out = self.new()
        assert self.run(out, sabotage=after_rename, seed=seed) == -signal.SIGKILL
        self.goes_on(out)

    def killed_in_a_checkpoint(self, seed: int) -> None:
        out = self.new()
        assert self.run(out, sabotage=half_written, seed=seed) == -signal.SIGKILL
        assert (out / "checkpoint.part").exists()
        self.goes_on(out)

    def newest_checkpoint_damaged(self, seed: int) -> None:
        rng, out = random.Random(seed), self.new()
        self.run(out, sabotage=before_rename, seed=seed % 30 + 1)
        files = train.checkpoint_files(out)
        if not files:  # it died before the first
            return self.goes_on(out)
        content = bytearray(files[0].read_bytes())
        at = rng.randrange(len(content))
        if rng.random() < 0.5:
            del content[at:]
        else:
            content[at] ^= 1 << rng.randrange(8)
        files[0].write_bytes(content)
        self.goes_on(out)

    def sigterm_in_evaluation(self, seed: int) -> None:
        out = self.new()
        assert self.run(out, sabotage=signal_in_evaluation, seed=seed) == 130
        self.goes_on(out)

    def disk_full(self, seed: int) -> None:
        out = self.new()
        assert self.run(out, sabotage=full_disk, seed=seed) == 2
        self.said("no checkpoint could be written")
        assert train.checkpoint_files(out) and not (out / "checkpoint.part").exists()
        self.goes_on(out)

    def folder_removed(self, seed: int) -> None:
        """The run makes the folder again; what metrics.jsonl held is gone with it."""
        out = self.new()
        first = self.start(out, sabotage=folder_removed, seed=seed)
        while not out.exists() and first.is_alive():
            time.sleep(0.01)
        errors = self.errors.read_text  # of the run itself
        status = self.run(self.folder / out.name, "--resume")  # a second one may not come in
        if first.is_alive():
            assert status == 2, "a second run came in"
        first.join(300)
        assert first.exitcode == 0, errors()
        assert_same(out, self.reference, whole_metrics=False)
        self.goes_on(out, whole_metrics=False)

    def two_runs_in_one_folder(self, seed: int) -> None:
        out = self.new()
        first = self.start(out)
        while not (out / "metrics.jsonl").exists():
            time.sleep(0.01)
        time.sleep(random.Random(seed).uniform(0, 1))
        status = self.run(out, "--resume")
        if first.is_alive():
            assert status == 2
            self.said("another process is training in it")
        first.join()
        assert first.exitcode == 0
        assert_same(out, self.reference)
        shutil.rmtree(out)

    def guarded(self, sabotage: Callable, seed: int) -> None:
        """One step is left out, the log says which, and the loss ends where it does otherwise."""
        out = self.new()
        assert self.run(out, sabotage=sabotage, seed=seed) == 0
        metrics, tensors = numbers_of(out)
        assert [entry["guard"] for entry in metrics if "guard" in entry] == ["skip"]
        assert all(x.isfinite().all() for x in tensors.values())
        wanted = self.reference[0][-1]["val_nats"]
        assert abs(metrics[-1]["val_nats"] - wanted) < 0.1, (metrics[-1], wanted)
        shutil.rmtree(out)

    def gradient_nan(self, seed: int) -> None:
        self.guarded(nan_gradient, seed)

    def batch_poisoned(self, seed: int) -> None:
        self.guarded(poisoned_batch, seed)


def before_rename(rng: random.Random) -> None:
    around_rename(rng, before=True)


def after_rename(rng: random.Random) -> None:
    around_rename(rng, before=False)


NAMES = [
    "killed_before_rename", "killed_after_rename", "killed_in_a_checkpoint",
    "newest_checkpoint_damaged", "sigterm_in_evaluation", "disk_full", "folder_removed",
    "two_runs_in_one_folder", "gradient_nan", "batch_poisoned",
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="kills at random moments, in all")
    parser.add_argument("--tries", type=int, default=10, help="tries of each other fault")
    parser.add_argument("--json", type=Path, help="file for the table")
    args = parser.parse_args()
    if args.json is not None and not args.json.parent.is_dir():
        parser.error(f"--json {args.json}: no folder {args.json.parent}; make it first")
    table = []
    with tempfile.TemporaryDirectory() as folder:
        faults = Faults(Path(folder))
        plan = [("killed_at_random_moments", args.kills // 10, 10)]
        plan += [(name, args.tries, 1) for name in NAMES]
        print(f"{'fault':28s} tried  survived  lost")
        for name, tries, each in plan:
            survived = 0
            for seed in range(tries):
                try:
                    if each > 1:
                        faults.kills(seed, each)
                    else:
                        getattr(faults, name)(seed)
                    survived += each
                except AssertionError as error:
                    print(f"{name} with seed {seed}: {error}", file=sys.stderr)
            tried = tries * each
            print(f"{name:28s} {tried:5d} {survived:9d} {tried - survived:5d}", flush=True)
            table.append({"fault": name, "tried": tried, "survived": survived})
    if args.json:
        command = f"python tests/faults.py --kills {args.kills} --tries {args.tries}"
        about = {"torch": torch.__version__, "command": command}
        args.json.write_text(json.dumps(about | {"faults": table}, indent=1) + "\n")
    return int(any(row["survived"] < row["tried"] for row in table))


if __name__ == "__main__":
    sys.exit(main())
