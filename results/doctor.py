"""Tries the doctor of 08_stability.py on bugs put in on purpose, and on runs that are sound.

    python results/doctor.py [--seeds 5] [--sound 20]

Each class below is a small training run with one line gone wrong, and says what `diagnose` is to
name. The table is printed and written to results/doctor.json.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

stability = importlib.import_module("08_stability")
TinyGPT, diagnose = stability.TinyGPT, stability.diagnose


class SoundRun:
    """A small run that is as it should be, different for each seed in what may differ."""

    finding: str | None = None  # what diagnose is to say

    def __init__(self, seed: int):
        draw = random.Random(seed)
        self.seed = seed
        self.width = draw.choice([16, 32])
        self.dropout = draw.choice([0.0, 0.1])
        self.rate = 10 ** draw.uniform(-2.7, -2.0)  # 2e-3 .. 1e-2
        self.clear_first = draw.random() < 0.5
        self.data = stability.echo_batches(8, rows=8, seed=seed)

    def make_model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return TinyGPT(width=self.width, dropout=self.dropout)

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=self.rate)

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        return self.data[0][number % 8], self.data[1][number % 8]

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())

    def clear(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()

    def train_step(self, model, optimizer, x: Tensor, y: Tensor) -> Tensor:
        model.train()
        if self.clear_first:
            self.clear(optimizer)
        loss = self.loss(model(x), y)
        loss.backward()
        stability.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if not self.clear_first:
            self.clear(optimizer)
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        model.eval()
        return self.loss(model(x), y)


class WideInit(SoundRun):
    finding = "loss at init"

    def make_model(self, seed):
        model = super().make_model(seed)
        nn.init.normal_(model.head.weight, std=2.0)
        return model


class Float16Overflow(SoundRun):
    finding = "overflow"

    def make_model(self, seed):
        model = super().make_model(seed)
        model.blocks[0].up.register_forward_hook(lambda m, i, out: (out * 1e5).half().float() / 1e5)
        return model


class NoMask(SoundRun):
    finding = "future leaks"

    def make_model(self, seed):
        model = super().make_model(seed)
        model.mask.zero_()
        return model


class CentredOverRows(SoundRun):
    finding = "rows mix"

    def make_model(self, seed):
        model = super().make_model(seed)
        model.embedding.register_forward_hook(lambda m, i, out: out - out.mean(0))
        return model


class Detached(SoundRun):
    finding = "no gradient"

    def make_model(self, seed):
        model = super().make_model(seed)
        model.blocks[0].act.register_forward_hook(lambda m, i, out: out.detach())
        return model


class SeedIgnored(SoundRun):
    finding = "seeds"

    def make_model(self, seed):
        return super().make_model(0)


class NotSeeded(SoundRun):
    finding = "seeds"

    def make_model(self, seed):
        torch.seed()
        return TinyGPT(width=self.width, dropout=self.dropout)


class ProbabilitiesOut(SoundRun):
    finding = "softmax twice"

    def make_model(self, seed):
        model = super().make_model(seed)
        model.head.register_forward_hook(lambda m, i, out: out.softmax(-1))
        return model


class SoftmaxInLoss(SoundRun):
    finding = "softmax twice"

    def loss(self, logits, y):
        return super().loss(logits.softmax(-1), y)


class SummedLoss(SoundRun):
    finding = "summed loss"

    def loss(self, logits, y):
        return super().loss(logits, y) * y.numel()


class ShiftedInLossToo(SoundRun):
    finding = "shifted twice"

    def loss(self, logits, y):
        return super().loss(logits[:, :-1], y[:, 1:])


class NegatedLoss(SoundRun):
    finding = "wrong sign"

    def loss(self, logits, y):
        return -super().loss(logits, y)


class Ascent(SoundRun):
    finding = "wrong sign"

    def make_optimizer(self, model):
        return torch.optim.AdamW(model.parameters(), lr=self.rate, maximize=True)


class TargetsAreInputs(SoundRun):
    finding = "targets"

    def batch(self, number):
        x, _ = super().batch(number)
        return x, x


class TargetsTwoAhead(SoundRun):
    finding = "targets"

    def batch(self, number):
        x, y = super().batch(number)
        return x[:, :-1], y[:, 1:]


class RowsShuffledApart(SoundRun):
    finding = "targets"

    def batch(self, number):
        x, y = super().batch(number)
        return x, y.roll(1, dims=0)


class BatchRepeats(SoundRun):
    finding = "same batch"

    def batch(self, number):
        return super().batch(0)


class NoZeroGrad(SoundRun):
    finding = "zero_grad"

    def clear(self, optimizer):
        pass


class HeadNotInOptimizer(SoundRun):
    finding = "not updated"

    def make_optimizer(self, model):
        return torch.optim.AdamW(model.blocks.parameters(), lr=self.rate)


class OptimizerOfAnotherModel(SoundRun):
    finding = "not updated"

    def make_optimizer(self, model):
        return super().make_optimizer(copy.deepcopy(model))


class RateTooHigh(SoundRun):
    finding = "rate too high"

    def make_optimizer(self, model):
        return torch.optim.AdamW(model.parameters(), lr=1.0)


class RateTooLow(SoundRun):
    finding = "rate too low"

    def make_optimizer(self, model):
        return torch.optim.AdamW(model.parameters(), lr=1e-6)


class TrainsInEvalMode(SoundRun):
    finding = "train/eval mode"

    def make_model(self, seed):
        self.dropout = 0.1
        return super().make_model(seed).eval()

    def train_step(self, model, optimizer, x, y):
        model.train = lambda mode=True: model  # nobody calls it
        loss = super().train_step(model, optimizer, x, y)
        del model.train
        return loss


class EvaluatesInTrainMode(SoundRun):
    finding = "train/eval mode"

    def make_model(self, seed):
        self.dropout = 0.1
        return super().make_model(seed)

    @torch.no_grad()
    def evaluate(self, model, x, y):
        return self.loss(model(x), y)


BUGS = SoundRun.__subclasses__()


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=5, help="of each bug")
    parser.add_argument("--sound", type=int, default=20, help="sound runs, for false alarms")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.process_time()
    rows = []
    print(f"{'bug':24s} {'to be named':16s} named  first  also named")
    for bug in BUGS:
        names = [[f.name for f in diagnose(bug(seed))] for seed in range(options.seeds)]
        row = {
            "bug": bug.__name__,
            "to_be_named": bug.finding,
            "tried": options.seeds,
            "named": sum(bug.finding in found for found in names),
            "named_first": sum(found[:1] == [bug.finding] for found in names),
            "also_named": sorted({name for found in names for name in found} - {bug.finding}),
        }
        rows.append(row)
        print(
            f"{row['bug']:24s} {row['to_be_named']:16s} {row['named']:2d}/{row['tried']}   "
            f"{row['named_first']:2d}/{row['tried']}  {', '.join(row['also_named'])}",
            flush=True,
        )
    sound = [[f.name for f in diagnose(SoundRun(seed))] for seed in range(options.sound)]
    alarms = sum(bool(found) for found in sound)
    print(f"sound runs: {options.sound}, false alarms: {alarms}")
    print(f"{time.process_time() - began:.0f} s of one CPU thread")
    table = {
        "command": "python results/doctor.py",
        "kinds_of_bugs": len(BUGS),
        "tried": sum(row["tried"] for row in rows),
        "named": sum(row["named"] for row in rows),
        "named_first": sum(row["named_first"] for row in rows),
        "sound_runs": options.sound,
        "false_alarms": alarms,
        "bugs": rows,
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
