"""A learning rate tuned on a narrow model and used on a wide one: what carries over.

    python results/transfer.py

AdamW moves every weight by about its rate, whatever the gradient's size. What a matrix product
sums over `width` inputs therefore moves by rate * width in one step, and the best rate falls as
1/width. If the hidden matrices (not embedding and gains) get rate * narrow/width instead, and
start with a spread of 1/sqrt(width) as 03_gpt.py's do, the best rate should stay where it was:
Yang et al. 2022 (arXiv 2203.03466). Of their rules these are two; so few steps show that it moves
less, and not that it stays.

Letters: B rows in a batch, T positions in a row, C the width.

47 s of CPU time on an AMD EPYC (Zen 5); it prints

    validation nats/token, mean of 3 seeds, by learning rate

                                       0.00098  0.00195  0.00391  0.00781  0.01562  0.03125     best
    width 32                             4.453    4.015    3.683    3.390    3.345    3.554  0.01562
    width 128, one rate for all          3.387    3.065    3.043    3.395    4.057    3.954  0.00391
    width 128, hidden at 0.25 of it      3.661    3.315    3.055    2.921    3.112    3.411  0.00781

    the best of width 32 costs width 128 1.013 nats with one rate for all, 0.191 with the rule
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import batches, corpus  # noqa: E402

losses = importlib.import_module("01_loss")
gpt = importlib.import_module("03_gpt")
adamw = importlib.import_module("04_adamw")
schedules = importlib.import_module("05_schedules")
stability = importlib.import_module("08_stability")

WIDTHS = (32, 128)
RATES = [2.0**-k for k in range(10, 4, -1)]
SEEDS = 3


def train_width(
    data: corpus.Data, width: int, rate: float, hidden: float, seed: int, steps: int = 80
) -> float:
    """Validation nats/token of a two-layer GPT, its hidden matrices trained at rate * hidden."""
    T, B = 32, 8
    heads = width // 16
    shape = {"n_layer": 2, "n_head": heads, "n_kv_head": heads, "d_model": width}
    torch.manual_seed(seed)
    model = gpt.GPT(gpt.GPTConfig(data.vocabulary.size, T, **shape, d_mlp=2 * width))
    matrices = [p for block in model.blocks for p in block.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    groups = [{"params": matrices, "share": hidden}, {"params": others, "share": 1.0}]
    optimizer = adamw.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)

    def loss(x: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        h = model.hidden(x)  # (B, T, C)
        return losses.linear_cross_entropy(h, model.embedding.weight, y, reduction=reduction)

    end = data.vocabulary.end
    train, val = (
        batches.Batches(ids, batches.story_rows(ids, end, T), B, T, seed, torch.device("cpu"))
        for ids in (data.train, data.val)
    )
    for step in range(steps):
        x, y, _ = train.batch(step)  # (B, T), (B, T)
        optimizer.zero_grad()
        loss(x, y).backward()
        stability.clip_grad_norm_(list(model.named_parameters()), 1.0)
        for group in optimizer.param_groups:
            schedule = schedules.linear(step, steps, steps // 10, skip_zero=True)
            group["lr"] = rate * group["share"] * schedule
        optimizer.step()
    with torch.no_grad():
        parts = [val.take(np.arange(first, first + B)) for first in range(0, 128, B)]
        nats = sum(loss(x, y, "sum").item() for x, y, _ in parts)
    return nats / sum(count for _, _, count in parts)


def main() -> None:
    """Prints the loss over the rate, narrow and wide, with one rate for all and with the rule."""
    torch.set_num_threads(1)
    narrow, wide = WIDTHS
    rows = {
        f"width {narrow}": (narrow, 1.0),
        f"width {wide}, one rate for all": (wide, 1.0),
        f"width {wide}, hidden at {narrow / wide:g} of it": (wide, narrow / wide),
    }
    found = []
    with tempfile.TemporaryDirectory() as folder:
        data = corpus.prepare("stories", Path(folder), vocab_size=300, story_count=1000)
        print(f"validation nats/token, mean of {SEEDS} seeds, by learning rate\n")
        print(" " * 33 + "".join(f"{rate:9.5f}" for rate in RATES) + "     best", flush=True)
        for name, (width, hidden) in rows.items():
            runs = [[train_width(data, width, rate, hidden, seed) for rate in RATES]
                    for seed in range(SEEDS)]  # fmt: skip
            means = np.mean(runs, axis=0)  # (rates,)
            found.append(means)
            line = "".join(f"{x:9.3f}" for x in means) + f"{RATES[means.argmin()]:9.5f}"
            print(f"{name:33}" + line, flush=True)
    tuned = found[0].argmin()
    plain, ruled = (row[tuned] - row.min() for row in found[1:])
    print(f"\nthe best of width {narrow} costs width {wide} {plain:.3f} nats with one rate for "
          f"all, {ruled:.3f} with the rule")  # fmt: skip
    assert ruled < plain, "the rule should carry the rate over"


if __name__ == "__main__":
    main()
