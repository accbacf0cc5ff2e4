"""One training step of the 27M model beside smolGPT's own code at the same shape, on this machine.

Both take the same token ids (B rows of T, V 4096), dropout 0, autocast to one type, and do forward,
loss, backward, clipping to norm 1 and their own AdamW step. In one process the two take turns and
the ratio of the medians is reported; peak memory comes from a process of each alone.

    git clone https://github.com/Om-Alve/smolGPT /tmp/smolGPT
    python results/compare.py /tmp/smolGPT [--steps 9] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

B, T, V = 4, 512, 4096


def ours(dtype: torch.dtype) -> Callable[[torch.Tensor, torch.Tensor], float]:
    losses = importlib.import_module("01_loss")
    gpt = importlib.import_module("03_gpt")
    adamw = importlib.import_module("04_adamw")
    model = gpt.GPT(gpt.PRESETS["27m"])
    optimizer = adamw.AdamW(adamw.param_groups(model.named_parameters(), 0.1), lr=6e-4)

    def step(x, y):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            hidden = model.hidden(x)
            loss = losses.linear_cross_entropy(hidden, model.embedding.weight, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def theirs(folder: str, dtype: torch.dtype) -> Callable[[torch.Tensor, torch.Tensor], float]:
    sys.path.insert(0, folder)
    smol = importlib.import_module("model")
    config = smol.GPTConfig(block_size=T, vocab_size=V, dropout=0.0)
    model = smol.GPT(config)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cpu")

    def step(x, y):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            _, loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="a checkout of github.com/Om-Alve/smolGPT")
    parser.add_argument("--steps", type=int, default=9, help="timed steps of each")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--alone", choices=("ours", "theirs"), help="print one's peak memory")
    args = parser.parse_args()
    if not (Path(args.folder) / "model.py").is_file():
        parser.error(f"{args.folder}: no model.py there; clone github.com/Om-Alve/smolGPT to it")
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)
    ids = torch.randint(V, (B, T + 1))
    x, y = ids[:, :-1], ids[:, 1:].contiguous()

    make = {"ours": lambda: ours(dtype), "theirs": lambda: theirs(args.folder, dtype)}
    if args.alone:
        step = make[args.alone]()
        for _ in range(2):
            step(x, y)
        # not ru_maxrss: that begins with what the parent process had at its peak
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        print(int(peak[1]) * 1024)
        return

    steps = {name: build() for name, build in make.items()}
    seconds = {name: [] for name in steps}
    for turn in range(args.steps + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step(x, y)
            if turn:  # the first one allocates
                seconds[name].append(time.perf_counter() - start)
    result = {"dtype": args.dtype, "torch": torch.__version__, "threads": torch.get_num_threads()}
    for name in steps:
        alone = [sys.executable, __file__, args.folder, "--dtype", args.dtype, "--alone", name]
        memory = subprocess.run(alone, capture_output=True, text=True, check=True).stdout
        median = statistics.median(seconds[name])
        result[name] = {
            "tokens_per_second": B * T / median,
            "seconds": seconds[name],
            "peak_memory_bytes": int(memory.split()[-1]),
        }
        print(
            f"{name:6s} {B * T / median:7.0f} tok/s (median of {args.steps} steps), peak memory "
            f"{result[name]['peak_memory_bytes'] / 1e9:.2f} GB"
        )
    result["ratio"] = result["ours"]["tokens_per_second"] / result["theirs"]["tokens_per_second"]
    print(f"ratio of the medians: {result['ratio']:.2f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
