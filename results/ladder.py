"""What each choice of 06's recipe buys: its CPU model trained with one choice at a time taken back.

    python results/ladder.py                    # the built-in stories, runs of 06's default length
    python results/ladder.py --data FILE        # another text, as 06_train.py takes it
    python results/ladder.py --tune --steps 250 # first: the learning rates, on a seed of their own
    python results/ladder.py --speed            # what a step of each arm costs
    python results/ladder.py --plot results/ladder.png

Each arm is a run of 06_train.py's own `train` with other settings, or with a model changed after
it was built, on the same tokens in the same order (the arm of equal time goes on to 1.12 times as
many). What is taken back is what smolGPT has, where most people start: AdamW for all weights, a
tenth of the learning rates (its 6e-4), no QK-norm, learned positions, dropout 0.2, a cosine down to
a tenth, random output projections. The
arm "none of them" takes back all. The shape stays ours (SwiGLU, RMSNorm, tied embeddings), and so
do beta2, the scales of the first weights, rows of whole stories, the guard and the tokeniser.

Runs are kept in --json as they end and are not done again: stop it at any time, start it again, add
seeds. The table takes the runs whose settings are today's, and the runs of --tune stay out of it.
Noise is one figure for each text: the standard deviation between seeds, pooled over the arms; a
mean of n runs has the standard error sd / sqrt(n), a difference to the full recipe
sd * sqrt(1/n + 1/m).

A run takes about a minute of one thread of an AMD EPYC (Zen 5) in bfloat16, all arms with three
seeds on a text about 35 minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import math
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

train = importlib.import_module("06_train")
gpt, batches, stability = train.gpt, train.batches, train.stability

STEPS = train.Config().max_steps
DTYPE, _ = train.pick_dtype("auto", torch.device("cpu"))  # 06's own choice
TUNING_SEED = 100  # no seed of the table, so that what was tuned is not tuned to its noise
DROPOUT = 0.2


# Changes of a built model. None of them touches 03_gpt.py: nobody would train with its old options


def without_qk_norm(model: gpt.GPT) -> gpt.GPT:
    """The same weights in a model that does not normalise queries and keys."""
    plain = gpt.GPT(replace(model.config, qk_norm=False))
    plain.load_state_dict(model.state_dict(), strict=False)  # all but the gains of those norms
    return plain


def with_learned_positions(model: gpt.GPT) -> gpt.GPT:
    """No rotation; a learned vector for each position is added to the embedding."""
    model.cos.fill_(1.0)
    model.sin.zero_()
    std = gpt.EMBEDDING_SCALE / model.config.d_model  # the embedding's
    # by this name 10_muon.split_parameters leaves it to AdamW
    model.wpe = nn.Parameter(torch.randn(model.config.seq_len, model.config.d_model) * std)
    model.embedding.register_forward_hook(lambda module, args, x: x + model.wpe[: x.shape[1]])
    return model


def with_dropout(model: gpt.GPT) -> gpt.GPT:
    """Dropout on what each attention and each MLP adds; none where no gradient is taken."""

    def drop(module, args, y):
        return F.dropout(y, DROPOUT, training=torch.is_grad_enabled())

    for block in model.blocks:
        block.attention.register_forward_hook(drop)
        block.mlp.register_forward_hook(drop)
    return model


def with_random_projections(model: gpt.GPT) -> gpt.GPT:
    """Output projections as GPT-2 begins: like other matrices, over sqrt(2 layers)."""
    std = gpt.WEIGHT_SCALE / math.sqrt(model.config.d_model * 2 * model.config.n_layer)
    for block in model.blocks:
        nn.init.normal_(block.attention.out.weight, std=std)
        nn.init.normal_(block.mlp.down.weight, std=std)
    return model


# Arms


@dataclass(frozen=True)
class Arm:
    settings: dict  # fields of 06's Config that differ from FULL
    change: Callable[[gpt.GPT], gpt.GPT] = lambda model: model  # of the model just built
    length: float = 1.0  # steps, in those of the full recipe


def all_changes(model: gpt.GPT) -> gpt.GPT:
    for arm in BACK.values():
        model = arm.change(model)
    return model


FULL = {
    "optimizer": "muon",
    "learning_rate": 6e-3,
    "muon_learning_rate": 5e-3,
    "schedule": "wsd",
}
BACK = {  # a choice of the recipe -> what was there before it
    "Muon": Arm({"optimizer": "adamw"}),
    "the learning rates": Arm({"learning_rate": 6e-4, "muon_learning_rate": 5e-4}),
    "QK-norm": Arm({}, without_qk_norm),
    "RoPE": Arm({}, with_learned_positions),
    "dropout 0": Arm({}, with_dropout),
    "cooldown to zero": Arm({"schedule": "cosine_with_min_lr"}),
    "projections from zero": Arm({}, with_random_projections),
}
ARMS = {
    "full recipe": Arm({}),
    **{f"without {name}": arm for name, arm in BACK.items()},
    "none of them": Arm({k: v for arm in BACK.values() for k, v in arm.settings.items()},
                        all_changes),
    "without Muon, equal time": Arm({"optimizer": "adamw"}, length=1.12),  # --speed: 1 / 0.89
}  # fmt: skip
TUNED = [  # arm and rates, --tune
    *[("without Muon", {"learning_rate": rate}) for rate in (3e-3, 6e-3, 1e-2)],
    *[("full recipe", {"muon_learning_rate": rate}) for rate in (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2)],
]


def settings_of(name: str, rates: dict) -> dict:
    """The fields of 06's Config that make an arm, `rates` on top."""
    settings = FULL | ARMS[name].settings | rates
    if settings["optimizer"] == "adamw":
        del settings["muon_learning_rate"]  # a rate that nothing uses makes no other run
    return settings


def describe(name: str, data: str, seed: int, steps: int, rates: dict) -> dict:
    """What tells one run from every other; the first part of its entry in the json."""
    return {
        "text": Path(data).name,
        "arm": name,
        "seed": seed,
        "steps": round(steps * ARMS[name].length),
        "dtype": str(DTYPE).removeprefix("torch."),
        "settings": settings_of(name, rates),
    }


@contextlib.contextmanager
def building(name: str):
    """Within it, 06 builds the models of an arm."""
    plain = train.build
    with mock.patch.object(train, "build", lambda *args: ARMS[name].change(plain(*args))):
        yield


def run_arm(run: dict, data: str, cache: str) -> dict:
    """Trains what `describe` describes; returns it with the results. 06's own output is dropped."""
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        building(run["arm"]),
    ):
        config = train.Config(
            data=data,
            out=f"{folder}/run",
            cache=cache,
            seed=run["seed"],
            max_steps=run["steps"],
            eval_every=run["steps"],
            checkpoint_every=run["steps"],
            samples=0,
            **run["settings"],
        )
        began = time.process_time()
        results = train.train(config)
    names = ("val_nats", "val_bpb", "floor_nats", "tokens")
    results = {name: results[name] for name in names if name in results}
    return run | results | {"cpu_seconds": round(time.process_time() - began, 1)}


def measure_speed(data: str, cache: str, turns: int = 60) -> dict[str, float]:
    """CPU time of a step of each arm over that of the full recipe: medians, taken in turns."""
    steps, seconds = {}, defaultdict(list)
    device = torch.device("cpu")
    for name in ARMS:
        with building(name):
            config = train.Config(data=data, cache=cache, **settings_of(name, {}))
            prepared = train.prepare(config)
            run = train.Run(config, prepared.vocabulary, device, DTYPE, train.Team(device))
        rows = batches.story_rows(prepared.train, prepared.vocabulary.end, config.seq_len)
        size = (config.batch_size, config.seq_len, config.seed, device)
        source = batches.Batches(prepared.train, rows, *size)

        def step(turn, run=run, source=source):
            run.backward(*source.batch(turn))
            stability.clip_grad_norm_(list(run.model.named_parameters()), 1.0)
            for optimizer in run.optimizers:
                optimizer.step()
                optimizer.zero_grad()

        steps[name] = step
    for turn in range(turns + 1):
        for name, step in steps.items():
            began = time.process_time()
            step(turn)
            if turn:  # the first one allocates
                seconds[name].append(time.process_time() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {name: medians[name] / medians["full recipe"] for name in ARMS}


# The json: {"speed": {arm: ratio}, "runs": [one entry per run]}


def load(path: Path) -> dict:
    if not path.exists():
        return {"speed": {}, "runs": []}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        wanted = "delete it, or name another"
        raise train.RunError(f"--json {path} is damaged ({error}); {wanted}") from error


def save(path: Path, kept: dict) -> None:
    lines = ",\n  ".join(json.dumps(run) for run in kept["runs"])
    speed = json.dumps(kept["speed"])
    train.write_atomically(path, f'{{"speed": {speed},\n "runs": [\n  {lines}\n]}}\n')


def is_done(run: dict, kept: dict) -> bool:
    return any(run.items() <= done.items() for done in kept["runs"])


def train_missing(wanted: list[dict], data: str, path: Path, cache: str) -> None:
    """Trains those of the wanted runs that the json lacks, and adds each to it as it ends."""
    for run in wanted:
        if is_done(run, load(path)):
            continue
        result = run_arm(run, data, cache)
        kept = load(path)  # anew: another process may have added to it meanwhile
        kept["runs"].append(result)
        save(path, kept)
        print(
            f"{run['text']}, seed {run['seed']}, {run['steps']} steps: {run['arm']} "
            f"{run['settings']}: {score(result):.4f} {unit(result)}, {result['cpu_seconds']} s",
            flush=True,
        )


# The table


def score(run: dict) -> float:
    """What is to be low: the gap to the floor where that is known, else bits per byte."""
    return run["val_nats"] - run["floor_nats"] if "floor_nats" in run else run["val_bpb"]


def unit(run: dict) -> str:
    return "nats/token above the floor" if "floor_nats" in run else "bits per byte"


def scores(kept: dict, text: str, steps: int) -> dict[str, list[float]]:
    """Scores of each arm's runs on a text, tuning left out; arms without a run are left out."""
    found = {}
    for name in ARMS:
        wanted = describe(name, text, 0, steps, {})
        del wanted["seed"]
        of_arm = [run for run in kept["runs"] if wanted.items() <= run.items()]
        of_arm = [score(run) for run in of_arm if run["seed"] != TUNING_SEED]
        if of_arm:
            found[name] = of_arm
    return found


def pooled_deviation(groups: list[list[float]]) -> float:
    """Standard deviation within groups, over all of them; nan where no group has two members."""
    squares = sum(statistics.variance(group) * (len(group) - 1) for group in groups if group[1:])
    freedom = sum(len(group) - 1 for group in groups)
    return math.sqrt(squares / freedom) if freedom else math.nan


def table(kept: dict, text: str, steps: int) -> str:
    """Markdown: mean and standard error of each arm, its difference to the full recipe, its cost.

    An empty string if there is no run of the full recipe.
    """
    found = scores(kept, text, steps)
    if "full recipe" not in found:
        return ""
    noise, full = pooled_deviation(list(found.values())), found["full recipe"]
    what = next(unit(run) for run in kept["runs"] if run["text"] == text)
    lines = [
        f"{text}, {steps} steps; standard deviation between seeds {noise:.4f}",
        "",
        f"| arm | {what} | to the full recipe | time per step | seeds |",
        "|---|---|---|---|---|",
    ]
    for name, values in found.items():
        n, m, mean = len(values), len(full), statistics.fmean(values)
        apart, error = mean - statistics.fmean(full), noise * math.sqrt(1 / n + 1 / m)
        difference = f"{apart:+.3f} ± {error:.3f}" if name != "full recipe" else ""
        cost = f"x {kept['speed'][name]:.2f}" if name in kept["speed"] else ""
        shown = f"{mean:.3f} ± {noise / math.sqrt(n):.3f}"
        lines.append(f"| {name} | {shown} | {difference} | {cost} | {n} |")
    return "\n".join(lines)


def tuning(kept: dict, text: str) -> str:
    """What --tune found on a text, one line per run; an empty string where it was not done."""
    lines = []
    for run in kept["runs"]:
        if run["text"] == text and run["seed"] == TUNING_SEED:
            rates = [f"{k} {v:g}" for k, v in run["settings"].items() if k.endswith("rate")]
            lines.append(
                f"tuning, {text}, {run['steps']} steps, {run['settings']['optimizer']}, "
                f"{', '.join(rates)}: {score(run):.3f} {unit(run)}"
            )
    return "\n".join(sorted(lines))


def plot(kept: dict, texts: list[str], steps: int, path: str) -> None:
    """Every run a dot and every mean a bar, an arm a line, a text a panel."""
    try:
        import matplotlib
    except ImportError as error:
        raise train.RunError("--plot: pip install matplotlib") from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(texts), figsize=(5 * len(texts), 4), squeeze=False)
    for panel, text in zip(panels[0], texts):
        found = scores(kept, text, steps)
        names = list(found)[::-1]
        for i, name in enumerate(names):
            panel.plot(found[name], [i] * len(found[name]), "o", color="tab:blue", alpha=0.5)
            panel.plot(statistics.fmean(found[name]), i, "k|", markersize=14)
        panel.axvline(statistics.fmean(found["full recipe"]), color="0.7", linewidth=1, zorder=0)
        panel.set_yticks(range(len(names)), names)
        panel.set_xscale("log")  # what leaves the plateau late is ten times further off
        low, high = math.log(min(map(min, found.values()))), math.log(max(map(max, found.values())))
        ticks = [math.exp(low + i / 3 * (high - low)) for i in range(4)]
        panel.set_xticks(ticks, [f"{tick:.2f}" for tick in ticks])
        panel.minorticks_off()
        panel.set_title(f"{text}, {steps} steps")
        panel.set_xlabel(next(unit(run) for run in kept["runs"] if run["text"] == text))
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = Path(__file__).resolve().parent
    parser.add_argument("--data", default="stories", help="stories, or a text file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--tune", action="store_true", help="the rates, on a seed of their own")
    parser.add_argument("--speed", action="store_true", help="time a step of each arm")
    parser.add_argument("--plot", metavar="FILE", help="draw what the json holds, train nothing")
    parser.add_argument("--json", type=Path, default=here / "ladder.json")
    parser.add_argument("--cache", default="runs/cache", help="tokenised data, as in 06_train.py")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        if args.speed:
            kept = load(args.json)
            kept["speed"] = measure_speed(args.data, args.cache)
            save(args.json, kept)
        elif args.tune:
            wanted = [(name, args.data, TUNING_SEED, args.steps, rates) for name, rates in TUNED]
            train_missing([describe(*of) for of in wanted], args.data, args.json, args.cache)
        elif not args.plot:
            wanted = [(name, args.data, s, args.steps, {}) for s in args.seeds for name in ARMS]
            train_missing([describe(*of) for of in wanted], args.data, args.json, args.cache)
        kept = load(args.json)
        texts = list(dict.fromkeys(run["text"] for run in kept["runs"]))
        parts = [[tuning(kept, text), table(kept, text, args.steps)] for text in texts]
        print("\n\n".join(part for of_text in parts for part in of_text if part))
        texts = [text for text, of_text in zip(texts, parts) if of_text[1]]
        if args.plot and not texts:
            raise train.RunError(f"--plot: no full recipe of {args.steps} steps in {args.json}")
        if args.plot:
            plot(kept, texts, args.steps, args.plot)
    except train.RunError as error:
        print(f"ladder.py: error: {error}", file=sys.stderr)
        return 2
    except train.Stopped:
        print("stopped; the runs that had ended are kept")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
