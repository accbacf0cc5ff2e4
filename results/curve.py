"""Draws the losses of a run of 06_train.py over its tokens, beside the floor where it is known.

    python 06_train.py --log-every 10 --eval-every 100 --out runs/curve
    python results/curve.py runs/curve --out results/curve.png

The floor is the entropy of the built-in stories that the run was validated on: no model's expected
loss is below it. Needs matplotlib: pip install matplotlib.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

train = importlib.import_module("06_train")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the --out folder of a run that has ended")
    parser.add_argument("--out", default="curve.png", help="the picture to write")
    args = parser.parse_args()
    try:
        from matplotlib import pyplot
    except ImportError:
        parser.error("this needs matplotlib: pip install matplotlib")
    stored = train.stored_config(args.run)
    if stored is None or not (args.run / "metrics.jsonl").exists():
        parser.error(f"{args.run}: no run of 06_train.py there; train one with --out {args.run}")
    config = train.Config(**stored)
    floor = train.prepare(config).about_val.floor_nats
    lines = [json.loads(line) for line in (args.run / "metrics.jsonl").read_text().splitlines()]

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, label, style in (("loss", "training batch", "-"), ("val_nats", "validation", "o-")):
        points = [(line["step"], line[name]) for line in lines if name in line]
        axes.plot(*zip(*points), style, label=label, linewidth=1, markersize=4)
    if floor is not None:
        axes.axhline(floor, color="black", linestyle="--", label=f"floor, {floor:.3f}")
    axes.set(yscale="log", xlabel="step", ylabel="loss, nats/token")
    axes.set_title(f"{config.model} model, {config.data}: {config.batch_size} rows a step")
    axes.legend()
    figure.savefig(args.out, dpi=120)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
