"""Tokens per second of our `generate` beside that of transformers, on one model, on this machine.

    python results/generation.py --json results/generation.json
    python results/generation.py FOLDER      # a model that 06_train.py --export wrote

Both load the same folder, as `03_gpt.to_huggingface` writes it; without one it is the 27M shape
with random weights, for which the time is the same. Both continue the same prompts greedily, with
their key/value caches, and nothing ends a row early. First the tokens of float32 are compared: they
have to be equal, but for places where the two likeliest tokens are so close that rounding decides.
Then the two take turns, in float32 and in bfloat16, and the ratio of the medians is reported.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

train = importlib.import_module("06_train")
gpt = train.gpt

PROMPT = 16  # tokens
NOISE = 1.2  # std times sqrt(C) of what is added to all weights: as built, the layers do nothing
DTYPES = ("float32", "bfloat16")
TIE = 1e-3  # of logits: a difference that rounding in float32 may turn round


def write_random_model(folder: str) -> None:
    torch.manual_seed(0)
    model = gpt.GPT(gpt.PRESETS["27m"])
    std = NOISE / math.sqrt(model.config.d_model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += std * torch.randn_like(parameter)
    gpt.to_huggingface(model, folder)


def load(
    folder: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[gpt.GPT, torch.nn.Module]:
    """The folder's model, as ours and as transformers' own."""
    try:
        import transformers
    except ImportError as error:
        raise train.RunError("this needs transformers: pip install transformers") from error
    if not (Path(folder) / "config.json").is_file():
        raise train.RunError(f"{folder}: no config.json; 06_train.py --export FOLDER writes one")
    try:
        ours = gpt.from_huggingface(folder).to(device, dtype)
    except ValueError as error:
        raise train.RunError(str(error)) from error
    transformers.utils.logging.disable_progress_bar()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    theirs.generation_config.eos_token_id = None  # so that no row ends early
    return ours, theirs.to(device)


def greedy(model: gpt.GPT, ids: Tensor, new: int) -> Tensor:
    return model.generate(ids, new, temperature=0)


def their_greedy(model: torch.nn.Module, ids: Tensor, new: int) -> Tensor:
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)


def check_equal(model: gpt.GPT, ours: Tensor, theirs: Tensor) -> None:
    """RunError when a row (B, T) differs from a place on where one token was the likeliest."""
    rows = (ours != theirs).any(dim=1).nonzero().flatten().tolist()
    for row in rows:
        place = int((ours[row] != theirs[row]).nonzero()[0])
        with torch.no_grad():
            logits = model(ours[row : row + 1, :place])[0, -1]  # (V,)
        apart = (logits[ours[row, place]] - logits[theirs[row, place]]).abs().item()
        if apart > TIE:
            raise train.RunError(
                f"row {row} differs at place {place}, where token {ours[row, place]} and token "
                f"{theirs[row, place]} have logits {apart:.2g} apart; wanted the same tokens"
            )


def compare(
    sides: dict[str, Callable[[Tensor, int], Tensor]], ids: Tensor, new: int, turns: int
) -> dict:
    """Seconds and tokens per second of each side for `new` tokens behind the prompts ids (B, T)."""
    seconds = {name: [] for name in sides}
    for _ in range(turns):
        for name, generate in sides.items():
            start = time.perf_counter()
            generate(ids, new)
            if ids.is_cuda:
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    result = {}
    for name, taken in seconds.items():
        rate = len(ids) * new / statistics.median(taken)
        result[name] = {"tokens_per_second": rate, "seconds": taken}
    return result


def run(args: argparse.Namespace) -> dict:
    if args.json is not None and not args.json.resolve().parent.is_dir():
        raise train.RunError(f"--json {args.json}: there is no such folder; make it first")
    if min(args.turns, *args.rows) < 1:
        raise train.RunError(f"--turns {args.turns} --rows {args.rows}: wanted at least 1")
    torch.manual_seed(0)
    device = train.pick_device("auto")
    with tempfile.TemporaryDirectory() as made:
        if args.folder is None:
            write_random_model(made)
        folder = args.folder or made
        loaded = {dtype: load(folder, device, getattr(torch, dtype)) for dtype in args.dtypes}
    model, _ = loaded[args.dtypes[0]]
    new, most = args.new_tokens, model.config.seq_len - PROMPT
    if not 1 <= new <= most:
        raise train.RunError(f"--new-tokens {new}: wanted 1 to {most}, seq_len less the prompt")
    result = {
        "machine": train.device_name(device),
        "torch": torch.__version__,
        "transformers": importlib.import_module("transformers").__version__,
        "parameters": gpt.parameter_count(model.config),
        "new_tokens": new,
    }
    print(f"{result['machine']}, {result['parameters']:,} parameters, {new} tokens a row, tokens/s")
    print("dtype      rows       ours   transformers   ratio   rows with equal tokens")
    for dtype in args.dtypes:
        model, other = loaded[dtype]
        sides = {"ours": partial(greedy, model), "transformers": partial(their_greedy, other)}
        result[dtype] = {}
        for rows in args.rows:
            ids = torch.randint(model.config.vocab_size, (rows, PROMPT), device=device)
            ours, theirs = (generate(ids, new) for generate in sides.values())  # and warms up
            if dtype == "float32":
                check_equal(model, ours, theirs)
            equal = int((ours == theirs).all(dim=1).sum())
            found = compare(sides, ids, new, args.turns)
            rates = [found[name]["tokens_per_second"] for name in sides]
            found |= {"ratio": rates[0] / rates[1], "equal_rows": equal}
            result[dtype][rows] = found
            numbers = f"{rates[0]:10.0f} {rates[1]:14.0f} {found['ratio']:7.2f} {equal:8d}"
            print(f"{dtype:10} {rows:4d} {numbers}")
    return result


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", help="an exported model; left out: random weights")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32], help="B, in turn")
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES, help="in turn")
    parser.add_argument("--new-tokens", type=int, default=200, help="of each row")
    parser.add_argument("--turns", type=int, default=5, help="timed runs of each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to it")
    args = parser.parse_args(argv)
    try:
        result = run(args)
        if args.json is not None:
            args.json.write_text(json.dumps(result, indent=1) + "\n")
    except (train.RunError, OSError) as error:
        print(f"generation.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
