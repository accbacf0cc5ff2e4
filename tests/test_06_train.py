"""Tests of 06_train.py: exact resume through kills, damaged files, clear errors, right figures.

Run: python -m pytest tests/test_06_train.py
"""

import contextlib
import importlib
import json
import math
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import faults
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from faults import assert_same, flags, numbers_of

from data import batches, bpe, stories

train = importlib.import_module("06_train")
gpt = importlib.import_module("03_gpt")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True, scope="module")
def small_corpus():
    """Fewer stories to validate on: the tests are about the loop."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.corpus, "VAL_STORIES", 20)
        yield


def run(capsys, cache, out, *more):
    """Exit status, standard output, standard error of a run in this process."""
    capsys.readouterr()
    status = train.main(flags(cache, out, *more))
    return status, *capsys.readouterr()


@pytest.fixture(scope="module")
def finished(cache, tmp_path_factory):
    """The folder of a run that nothing disturbed, with what it printed beside it. Only to read."""
    out = tmp_path_factory.mktemp("reference") / "run"
    with open(out.with_name("stdout"), "w") as file, contextlib.redirect_stdout(file):
        assert train.main(flags(cache, out)) == 0
    return out


@pytest.fixture(scope="module")
def reference(finished):
    return numbers_of(finished)


# a run that is broken and goes on


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    return faults.Faults(tmp_path_factory.mktemp("faults"))


def test_train_killed_at_random_moments_gives_the_same_numbers(broken):
    broken.kills(seed=0, times=7)


@pytest.mark.parametrize("name", faults.NAMES)
def test_train_broken_loses_nothing(name, broken):
    getattr(broken, name)(seed=0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_train_saves_on_signals_and_goes_on(number, broken):
    out = broken.new()
    process = broken.start(out, "--checkpoint-every", 1000)
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 130
    assert 0 < train.load_checkpoint(out)["step"] < 40
    broken.goes_on(out)


def test_train_resume_of_nothing_starts_and_of_a_finished_run_changes_nothing(
    capsys, cache, reference, tmp_path
):
    out = tmp_path / "run"
    status, stdout, _ = run(capsys, cache, out, "--resume")
    assert status == 0 and f"no checkpoint in {out} to go on from" in stdout
    assert_same(out, reference)
    status, stdout, _ = run(capsys, cache, out, "--resume")
    assert status == 0 and "resume   at step 40" in stdout
    assert_same(out, reference)


@pytest.mark.parametrize("damage", ["truncated", "empty", "changed", "not a checkpoint"])
def test_train_passes_over_a_damaged_checkpoint(damage, capsys, cache, finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    newest, before, *_ = train.checkpoint_files(out)
    content = newest.read_bytes()
    if damage == "changed":
        damaged = content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]
    else:
        damaged = {"truncated": content[: len(content) // 2], "empty": b""}.get(damage, b"hello")
    newest.write_bytes(damaged)
    if damage == "not a checkpoint":  # its checksum is right, and still it is none
        newest.rename(newest.with_name(f"step-00000040-{train.checksum(newest)}.pt"))
    status, stdout, _ = run(capsys, cache, out, "--resume")
    assert status == 0
    assert "is damaged" in stdout and f"resume   at step {int(before.stem.split('-')[1])}" in stdout
    assert_same(out, numbers_of(finished))


class Trap:
    """Unpickling this would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_load_checkpoint_executes_no_code(capsys, cache, tmp_path):
    out, mark = tmp_path / "run", tmp_path / "mark"
    out.mkdir()
    saves = [lambda f: torch.save({"step": Trap(mark)}, f), lambda f: pickle.dump(Trap(mark), f, 2)]
    for save in saves:
        with open(out / "trap", "wb") as file:
            save(file)
        (out / "trap").rename(out / f"step-00000001-{train.checksum(out / 'trap')}.pt")
        assert train.load_checkpoint(out) is None
        assert "is damaged" in capsys.readouterr().out
    assert not mark.exists()


def test_train_accumulation_gives_the_same_gradient(capsys, cache, reference, tmp_path):
    run(capsys, cache, tmp_path / "run", "--accumulate", 2)
    metrics, _ = numbers_of(tmp_path / "run")
    first = [entry["loss"] for entry in metrics if "loss" in entry][:10]
    wanted = [entry["loss"] for entry in reference[0] if "loss" in entry][:10]
    assert first == pytest.approx(wanted, abs=1e-3)  # float32 sums in another order, 10 updates on


# the guard


def test_guard_off_shows_the_crash(monkeypatch, capsys, cache, tmp_path):
    backward = train.Run.backward
    calls, bad = [], 6

    def poisoned(self, *batch):
        loss = backward(self, *batch)
        calls.append(batch)
        if len(calls) == bad:
            self.model.norm.weight.grad[0] = math.nan
        return loss

    monkeypatch.setattr(train.Run, "backward", poisoned)
    status, stdout, stderr = run(capsys, cache, tmp_path / "off", "--guard", "off")
    assert status == 2 and f"gradient norm nan at step {bad - 1}" in stderr
    calls.clear()
    seldom = ["--guard", "off", "--log-every", 100, "--checkpoint-every", 10]
    status, _, stderr = run(capsys, cache, tmp_path / "seldom", *seldom)
    assert status == 2 and "gradient norm nan at step 9" in stderr
    assert not train.checkpoint_files(tmp_path / "seldom")
    calls.clear()
    status, stdout, _ = run(capsys, cache, tmp_path / "on", "--max-steps", 8)
    assert status == 0
    assert f"guard    step {bad - 1}, batch {bad - 1}: skip: gradient norm nan" in stdout
    assert "gradient not finite in norm.weight" in stdout


def corrupt(monkeypatch, bad):
    """Batches whose number is in `bad` get targets that no model can know."""
    true_batch = batches.Batches.batch

    def batch(self, number, *share):
        x, y, count = true_batch(self, number, *share)
        if number in bad:
            noise = torch.randint(300, y.shape, generator=torch.Generator().manual_seed(number))
            y = torch.where(y < 0, y, noise)
        return x, y, count

    monkeypatch.setattr(batches.Batches, "batch", batch)


def test_rewound_run_is_bit_identical_to_one_that_never_saw_the_batches(
    monkeypatch, capsys, cache, tmp_path
):
    more = ["--checkpoint-every", 9, "--eval-every", 100]
    with monkeypatch.context() as patch:
        corrupt(patch, range(28, 33))
        status, stdout, _ = run(capsys, cache, tmp_path / "rewound", *more)
    assert status == 0
    assert stdout.count(": skip: ") == 4 and stdout.count(": rewind: ") == 1
    assert "guard    back to step 27, and on with batch 33" in stdout
    with monkeypatch.context() as patch:
        true_batch = batches.Batches.batch
        patch.setattr(
            batches.Batches,
            "batch",
            lambda self, n, *share: true_batch(self, n if n < 27 else n + 6, *share),
        )
        run(capsys, cache, tmp_path / "never", *more)
    metrics, tensors = numbers_of(tmp_path / "rewound")
    wanted, wanted_tensors = numbers_of(tmp_path / "never")
    assert all(torch.equal(tensors[name], wanted_tensors[name]) for name in wanted_tensors)
    assert metrics[-13:] == wanted[-13:] and metrics[-1]["step"] == 40


def test_muon_turns_the_hidden_matrices_and_adamw_the_rest(capsys, cache, finished, tmp_path):
    momentum, moments = train.load_checkpoint(finished)["optimizers"]
    assert len(momentum["state"]) == 4  # in the one layer: qkv, out, gate_up, down
    assert all(set(state) == {"momentum_buffer"} for state in momentum["state"].values())
    assert len(moments["state"]) == 1 + 4 + 1  # the embedding and the gains
    run(capsys, cache, tmp_path / "run", "--optimizer", "adamw", "--max-steps", 5)
    (moments,) = train.load_checkpoint(tmp_path / "run")["optimizers"]
    assert len(moments["state"]) == 1 + 4 + 4 + 1
    assert numbers_of(tmp_path / "run")[0][1]["loss"] != numbers_of(finished)[0][1]["loss"]


def test_rewinding_twice_to_one_checkpoint_goes_to_the_one_before(
    monkeypatch, capsys, cache, tmp_path
):
    corrupt(monkeypatch, [*range(28, 33), *range(35, 40)])
    more = ["--checkpoint-every", 9, "--eval-every", 100]
    _, stdout, _ = run(capsys, cache, tmp_path / "run", *more)
    assert re.findall(r"back to step (\d+), and on with batch (\d+)", stdout) == [
        ("27", "33"),
        ("18", "40"),
    ]


def test_spikes_far_apart_do_not_end_a_run(monkeypatch, capsys, cache, tmp_path):
    monkeypatch.setattr(train, "MAX_REWINDS", 1)
    corrupt(monkeypatch, [*range(25, 30), *range(45, 50), *range(65, 70)])
    more = ["--checkpoint-every", 5, "--eval-every", 100, "--max-steps", 60]
    status, stdout, stderr = run(capsys, cache, tmp_path / "run", *more)
    assert status == 0 and stdout.count("guard    back to step") == 3, stderr


def test_a_run_that_only_spikes_ends_in_one_line(monkeypatch, capsys, cache, tmp_path):
    corrupt(monkeypatch, range(25, 1000))
    status, _, stderr = run(capsys, cache, tmp_path / "run", "--max-steps", 60)
    assert status == 2 and "went back 5 times" in stderr and stderr.count("\n") == 1


@pytest.mark.parametrize("last, best", [(2.7, 16), (1.0, 40)])
def test_best_checkpoint_is_kept(last, best, monkeypatch, capsys, cache, tmp_path):
    values = iter([3.0, 2.0, 2.5, 2.6, last, 9.0])  # after each 8 steps; and the whole text
    monkeypatch.setattr(train, "evaluate", lambda *args, **kwargs: (next(values), 1.0))
    run(capsys, cache, tmp_path / "run")
    kept = [train.step_of(p) for p in train.checkpoint_files(tmp_path / "run")]
    assert kept == [40, 39, 38] + [16] * (best == 16)
    argv = ["--out", tmp_path / "run", "--sample", "Once", "--checkpoint"]
    for name, step in (("best", best), ("newest", 40)):
        config = train.resolve(train.read_flags([str(x) for x in [*argv, name]]))
        model, _ = train.trained(config, "--sample")
        wanted = train.load_checkpoint(tmp_path / "run", step)["model"]
        assert all(torch.equal(x, wanted[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("more", [["--deterministic"], ["--implementation", "torch"]])
def test_nothing_changes_on_a_cpu(more, capsys, cache, reference, tmp_path):
    try:
        run(capsys, cache, tmp_path / "run", *more)
        assert_same(tmp_path / "run", reference)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
def test_triton_and_torch_train_alike_on_a_gpu(capsys, cache, tmp_path):
    losses = []
    for form in ("torch", "triton"):
        run(capsys, cache, tmp_path / form, "--implementation", form, "--device", "cuda")
        losses.append([x["loss"] for x in numbers_of(tmp_path / form)[0] if "loss" in x])
    assert losses[0] == pytest.approx(losses[1], abs=0.05)  # bfloat16, rounded in other places


@pytest.mark.gpu
def test_deterministic_gives_the_same_numbers_on_a_gpu(capsys, cache, tmp_path):
    try:
        for name in ("a", "b"):
            run(capsys, cache, tmp_path / name, "--deterministic", "--device", "cuda")
        assert_same(tmp_path / "a", numbers_of(tmp_path / "b"))
    finally:
        torch.use_deterministic_algorithms(False)


# one trunk, several cooldowns


def test_two_cooldowns_from_one_trunk_equal_two_full_runs(capsys, cache, tmp_path):
    trunk = ["--schedule", "constant", "--max-steps", 8]
    assert run(capsys, cache, tmp_path / "trunk", *trunk)[0] == 0
    for name, steps, cooldown in (("a", 12, 4), ("b", 16, 8)):
        decay = ["--schedule", "wsd", "--max-steps", steps, "--cooldown", cooldown]
        more = [*decay, "--branch", tmp_path / "trunk"]
        status, stdout, _ = run(capsys, cache, tmp_path / name, *more)
        assert status == 0 and "trunk at step 8" in stdout
        run(capsys, cache, tmp_path / f"full-{name}", *decay)
        wanted, tensors = numbers_of(tmp_path / f"full-{name}")
        metrics, branched = numbers_of(tmp_path / name)
        assert metrics == wanted[len(wanted) - len(metrics) :] and metrics[0]["step"] == 8
        assert all(torch.equal(branched[x], tensors[x]) for x in tensors)
    on = ["--schedule", "constant", "--max-steps", 12]  # the trunk itself goes on
    assert run(capsys, cache, tmp_path / "on", *on, "--branch", tmp_path / "trunk")[0] == 0
    run(capsys, cache, tmp_path / "full", *on)
    tensors = numbers_of(tmp_path / "full")[1]
    assert all(torch.equal(numbers_of(tmp_path / "on")[1][x], tensors[x]) for x in tensors)


def test_branch_in_the_middle_of_its_cooldown_is_refused(capsys, cache, tmp_path):
    run(capsys, cache, tmp_path / "trunk", "--max-steps", 10, "--schedule", "constant")
    more = ["--branch", tmp_path / "trunk", "--schedule", "wsd", "--max-steps", 16]
    status, _, stderr = run(capsys, cache, tmp_path / "out", *more, "--cooldown", 9)
    assert status == 2 and "has to begin at or after step 10" in stderr
    assert run(capsys, cache, tmp_path / "out", *more, "--cooldown", 6)[0] == 0


def test_branch_that_only_spikes_keeps_where_it_was_left(monkeypatch, capsys, cache, tmp_path):
    run(capsys, cache, tmp_path / "trunk", "--max-steps", 24, "--schedule", "constant")
    corrupt(monkeypatch, range(24, 1000))
    more = ["--branch", tmp_path / "trunk", "--checkpoint-every", 100, "--eval-every", 100]
    status, _, stderr = run(capsys, cache, tmp_path / "out", *more)
    assert status == 2 and "does not spike where it is left" in stderr, stderr
    assert [train.step_of(p) for p in train.checkpoint_files(tmp_path / "out")] == [24]


def test_branch_takes_the_settings_of_its_trunk(capsys, cache, tmp_path):
    trunk, out = tmp_path / "trunk", tmp_path / "out"
    run(capsys, cache, trunk, "--max-steps", 8, "--schedule", "constant")
    decay = ["--schedule", "wsd", "--cooldown", 4]
    argv = ["--branch", trunk, "--out", out, "--max-steps", 12, *decay]
    assert train.main([str(x) for x in argv]) == 0
    assert train.stored_config(out)["seq_len"] == 64
    assert train.main([str(x) for x in argv] + ["--resume"]) == 0
    for more, wanted in (
        (["--branch", tmp_path / "none"], "the --out folder of a run"),
        (["--branch", trunk, "--seed", 3], "wanted 0, as in the run"),
        (["--branch", trunk, "--max-steps", 7], "more than the 8 steps"),
    ):
        status, _, stderr = run(capsys, cache, tmp_path / "new", *more)
        assert status == 2 and wanted in stderr and stderr.count("\n") == 1, stderr


# several processes


def torchrun(tmp_path, cache, out, *more) -> subprocess.Popen:
    """The small run in two processes, as the command starts them."""
    script = tmp_path / "small.py"
    script.write_text(
        f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\nimport faults\n"
        "faults.make_small()\nsys.exit(faults.train.main(sys.argv[1:]))\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.Popen([*launch, str(script), *flags(cache, out, *more)])


def start_pair(broken, out, *more):
    """The same two processes without the command, which takes ten seconds; where they print."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # free now
    processes, printed = [], []
    for rank in "01":
        environ = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        environ["MASTER_PORT"] = str(port)
        processes.append(broken.start(out, *more, name=out.name + rank, environ=environ))
        printed.append(broken.errors.with_suffix(".out"))
    return processes, printed


def pair(broken, out, *more, wanted=0, meanwhile=lambda processes: None) -> str:
    """What two processes print until they have ended."""
    processes, printed = start_pair(broken, out, *more)
    meanwhile(processes)
    for process in processes:
        process.join(200)
        assert process.exitcode == wanted
    return "".join(path.read_text() for path in printed)


def workers_of(process: subprocess.Popen) -> list[int]:
    """Process ids of those that torchrun has started, first rank first."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            environ = dict(
                line.split("=", 1)
                for line in (folder / "environ").read_text().split("\0")
                if "=" in line
            )
        except (OSError, ValueError):
            continue  # it has ended meanwhile, or belongs to somebody else
        if parent == process.pid and "RANK" in environ:
            found[int(environ["RANK"])] = int(folder.name)
    return [found[rank] for rank in sorted(found)]


PARTS = """
import importlib, math, sys
import torch
from torch.distributed.fsdp import FSDPModule
sys.path.insert(0, {root!r})
train = importlib.import_module("06_train")
device = torch.device("cpu")
config = train.Config(shard=True)
vocabulary = train.bpe.train(["abc abd abe"] * 9, 260)
with train.Team(device) as team:
    run = train.Run(config, vocabulary, device, torch.float32, team)
    # each gathers its own weights only, when it is computed
    assert all(isinstance(block, FSDPModule) for block in run.model.blocks)
    x = torch.arange(8).reshape(2, 4)
    run.backward(x, x, 16)
    for optimizer in run.optimizers:
        optimizer.step()
    total = sum(p.numel() for p in run.model.parameters())
    tensors = [*run.model.parameters(), *(p.grad for p in run.model.parameters())]
    tensors += [t for o in run.optimizers for of in o.state.values() for t in of.values()
                if isinstance(t, torch.Tensor) and t.ndim]
    parts = sum(t.to_local().numel() for t in tensors)
    every = sum(t.numel() for t in tensors)
    assert every > 3 * total and abs(parts / every - 0.5) < 0.01, (parts, every)
    held = sum(t.to_local().nbytes for o in run.optimizers for of in o.state.values()
               for t in of.values() if isinstance(t, torch.Tensor) and t.ndim)
    planned = train.memory_parts(config, run.model, "cpu", torch.float32)["moments"]
    assert abs(planned / held - 1) < 0.01, (planned, held)
    named = list(run.model.named_parameters())
    if not team.first:
        named[0][1].grad.to_local()[-1, -1] = math.nan
    assert [n for n, p in named if not train.whole(p.grad.isfinite().all())] == [named[0][0]]
    norm = train.whole(train.stability.clip_grad_norm_(named, 1.0))
    assert math.isnan(norm.item())
    run.restore(None)  # and the first weights are as built
    for name, value in train.build(config, vocabulary).state_dict().items():
        assert torch.equal(run.whole_model().state_dict()[name], value), name
    print(f"process {{team.rank}}: ok")
"""


@pytest.fixture(scope="module", params=[[], ["--shard"]], ids=["whole", "parts"])
def shared(broken, request):
    """Folder of the small run in two processes that nothing disturbed, what it printed, flags."""
    out = broken.new()
    return out, pair(broken, out, *request.param), request.param


def test_two_processes_train_like_one(reference, shared):
    """The same batches; sums of float32 in another order are all that differs, and it grows."""
    out, printed, _ = shared
    metrics, wanted_metrics = numbers_of(out)[0], reference[0]
    assert [m["step"] for m in metrics] == [m["step"] for m in wanted_metrics]
    for ours, wanted in zip(metrics, wanted_metrics):
        for name in ours.keys() & {"loss", "val_nats"}:
            rel = 1e-6 if ours["step"] <= 5 else 1e-3
            assert ours[name] == pytest.approx(wanted[name], rel=rel), ours["step"]
    assert printed.count("machine  ") == 1 and printed.count("val_nats: ") == 1  # by one of them


def wait_for_step_12(out):
    deadline, metrics = time.time() + 200, out / "metrics.jsonl"
    while not metrics.exists() or '"step": 12' not in metrics.read_text():
        assert time.time() < deadline
        time.sleep(0.02)


def test_a_signal_to_one_process_stops_all_after_the_same_step(shared, broken):
    out, (whole, _, more) = broken.new(), shared

    def terminate_second(processes):
        wait_for_step_12(out)
        os.kill(processes[1].pid, signal.SIGTERM)

    printed = pair(broken, out, *more, wanted=130, meanwhile=terminate_second)
    assert printed.count("stopped  ") == 1 and 12 < train.load_checkpoint(out)["step"] < 40
    pair(broken, out, "--resume", *more)
    assert_same(out, numbers_of(whole))


def test_a_killed_process_ends_all_and_the_run_goes_on(shared, broken, tmp_path):
    out, (whole, _, more) = broken.new(), shared
    process = torchrun(tmp_path, broken.cache, out, *more)
    wait_for_step_12(out)
    os.kill(workers_of(process)[1], signal.SIGKILL)
    assert process.wait(timeout=100) != 0
    assert 0 < train.load_checkpoint(out)["step"] < 40
    assert "resume   at step" in pair(broken, out, "--resume", *more)
    assert_same(out, numbers_of(whole))


def test_a_run_goes_on_with_another_number_of_processes(shared, broken):
    """Checkpoints hold whole tensors, also those of a model in parts: alone, then the two again."""
    whole, _, more = shared
    out = broken.new()
    shutil.copytree(whole, out)
    for together in (False, True):
        newest, *others = train.checkpoint_files(out)
        assert train.step_of(newest) == 40 and others
        newest.unlink()
        if together:
            pair(broken, out, "--resume", *more)
        else:
            assert broken.run(out, "--resume", "--no-shard") == 0, broken.errors.read_text()
        metrics, wanted = numbers_of(out)[0][-1], numbers_of(whole)[0][-1]
        assert metrics["step"] == wanted["step"] == 40
        assert metrics["val_nats"] == pytest.approx(wanted["val_nats"], rel=1e-3)


def test_each_of_two_processes_holds_half_of_everything(tmp_path):
    """And a number that is not finite in the other's half is seen by both."""
    program = tmp_path / "parts.py"
    program.write_text(PARTS.format(root=str(ROOT)))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)]
    done = subprocess.run([sys.executable, *launch], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "process 0: ok" in done.stdout and "process 1: ok" in done.stdout


def test_batch_that_two_processes_cannot_share_is_one_line(monkeypatch, capsys, cache, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "3")
    team, config = train.Team(torch.device("cpu")), train.Config(batch_size=4)
    with pytest.raises(train.RunError, match="--batch-size 4: wanted a multiple of .* 3 processes"):
        train.train_together(config, torch.device("cpu"), team, None)


# the plan


def saved_bytes(objective, x, y) -> int:
    """Bytes of all storages, but the weights', that autograd keeps for the backward pass."""
    weights = {p.untyped_storage().data_ptr() for p in objective.parameters()}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address returns
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        objective(x, y)
    return sum(size for pointer, (size, _) in seen.items() if pointer not in weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["0.5m", "8m", "27m"])
def test_plan_knows_what_autograd_saves(name, dtype):
    config = train.Config(model=name, vocab_size=4096, seq_len=32, batch_size=2)
    model = gpt.GPT(train.shape_of(config, config.vocab_size))
    parts = train.memory_parts(config, model, "cpu", dtype)
    ids = torch.randint(4096, (2, 33))
    measured = saved_bytes(train.Objective(model, dtype, "torch"), ids[:, :-1], ids[:, 1:])
    known = parts["activations"] + parts["gradients at the head"]
    assert known == pytest.approx(measured, rel=0.02)


MEASURE = """
import importlib, re, sys, torch
sys.path[:0] = [{root!r}]
train = importlib.import_module("06_train")
torch.set_num_threads(1)
def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
config = train.Config(model="8m", vocab_size=4096, seq_len=512, batch_size=3)
model = train.gpt.GPT(train.shape_of(config, 4096))
parts = train.memory_parts(config, model, "cpu", torch.float32)
objective = train.Objective(model, torch.float32, "torch")
ids = torch.randint(4096, (3, 513))
objective(ids[:1, :8], ids[:1, 1:9]).backward()
model.zero_grad()
program = status("VmRSS") - parts["weights"]
objective(ids[:, :-1], ids[:, 1:]).backward()
for optimizer in train.make_optimizers(config, model):
    optimizer.step()
model.zero_grad()
objective(ids[:, :-1], ids[:, 1:]).backward()  # the height, now that there are moments
print(status("VmHWM"), program + sum(parts.values()))
"""


def test_plan_knows_the_memory_of_a_step():
    script = MEASURE.format(root=str(ROOT))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured, planned = map(int, done.stdout.split())
    assert planned == pytest.approx(measured, rel=0.15)


LOADED = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import faults
faults.make_small()
assert faults.train.main({flags!r}) == 0
print(*({{"triton", "sympy", "torch._dynamo", "torch.distributed.fsdp"}} & {{*sys.modules}}))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels are loaded")
def test_training_on_a_cpu_loads_nothing_for_gpus_or_compilers(cache, tmp_path):
    """150 MB and a second at each start."""
    script = LOADED.format(root=str(ROOT), flags=flags(cache, tmp_path / "run"))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ""


def test_plan_says_what_a_card_costs_and_begins_nothing(capsys, tmp_path):
    out = tmp_path / "run"
    flags = ["--preset", "tinystories", "--no-compile", "--model", "0.5m", "--vocab-size", "1024"]
    flags += ["--seq-len", "64", "--batch-size", "4", "--out", str(out), "--plan"]
    assert train.main([*flags, "--cache", str(tmp_path / "cache")]) == 0
    stdout = capsys.readouterr().out
    tokens = 7630 * 4 * 64
    shape = gpt.GPTConfig(**{**vars(gpt.PRESETS["0.5m"]), "seq_len": 64})
    hours = tokens * gpt.flops_per_token(shape) / (0.4 * 989e12) / 3600
    assert f"{tokens:,} positions" in stdout
    h100 = re.search(r"H100 +(\S+) h +(\S+) dollars at 3.49/h", stdout)
    assert float(h100[1]) == pytest.approx(hours, abs=0.005)
    assert re.search(r"here +CPU with . threads: 5 steps", stdout)
    assert not out.exists() and not (tmp_path / "cache").exists()


def test_plan_for_several_processes_divides_rows_and_with_shard_the_model(monkeypatch, capsys):
    alone = train.Config(model="27m", vocab_size=4096, seq_len=512, batch_size=32)
    apart = train.replace(alone, shard=True)
    with torch.device("meta"):
        model = gpt.GPT(gpt.PRESETS["27m"])
    whole = train.memory_parts(alone, model, "cuda", torch.bfloat16)
    monkeypatch.setenv("WORLD_SIZE", "4")
    shared = train.memory_parts(alone, model, "cuda", torch.bfloat16)
    parts = train.memory_parts(apart, model, "cuda", torch.bfloat16)
    assert shared["backward of an MLP"] * 4 == whole["backward of an MLP"]
    assert (shared["weights"], shared["moments"]) == (whole["weights"], whole["moments"])
    assert parts["moments"] * 4 == whole["moments"]
    layer = sum(p.numel() for p in model.blocks[0].parameters())
    table = model.embedding.weight.numel()
    assert parts["weights"] * 4 == whole["weights"] + 4 * 4 * (2 * layer + table)
    for size, hours in (("1", 1.0), ("4", 0.25)):
        monkeypatch.setenv("WORLD_SIZE", size)
        monkeypatch.setattr(train, "trial", lambda *of: (0.0, 0.0))
        flags = ["--preset", "tinystories", "--no-compile", "--model", "27m", "--max-steps", "7630"]
        assert train.main([*flags, "--device", "cpu", "--plan"]) == 0
        row = re.search(r"L4 +(\S+) h +(\S+) dollars", capsys.readouterr().out)
        assert float(row[1]) == pytest.approx(1.08 * hours, abs=0.006)  # 1.89e17 / 48.4e12 s
        assert float(row[2]) == pytest.approx(0.76, abs=0.006)


@pytest.mark.parametrize(
    "size, more, wanted",
    [
        ("eight", ["--plan"], "WORLD_SIZE=eight: wanted"),
        ("0", ["--plan"], "WORLD_SIZE=0: wanted"),
        ("3", ["--plan"], "3 processes"),
        ("1", ["--plan", "--shard"], "--shard True: wanted torchrun"),
        ("2", [], "WORLD_SIZE=2: wanted torchrun, or --plan"),
    ],
)
def test_wrong_number_of_processes_is_one_line(
    size, more, wanted, monkeypatch, capsys, cache, tmp_path
):
    monkeypatch.setenv("WORLD_SIZE", size)
    status, stdout, stderr = run(capsys, cache, tmp_path / "run", *more)
    assert status == 2 and wanted in stderr and stderr.count("\n") == 1, stderr
    assert "memory " not in stdout and "plan  " not in stdout


# figures


@pytest.mark.parametrize("processes", [1, 3])
def test_evaluation_scores_every_row_once_in_batches_of_one_size(processes):
    """Ten rows, four at a time: three processes have work once, and the third no row of its own."""
    ids = np.arange(1, 61, dtype=np.uint16)
    val = batches.Batches(ids, batches.block_rows(len(ids), 6), 4, 6, seed=0)
    token_bytes = torch.arange(100)
    sizes = []

    def loss_sum(x, y):
        sizes.append(len(x))
        return (x * (y != batches.IGNORE)).sum().float()

    class Process:  # sums up its own part and those of the processes before it
        def __init__(self, rank):
            self.rank, self.size = rank, processes

        def sum(self, sums):
            found.append(sums.clone())
            return sum(found)

    found = []
    for rank in range(processes):
        nats, bits = train.evaluate(loss_sum, val, token_bytes, 10**9, Process(rank))
    assert set(sizes) == {4} and len(sizes) == 3
    targets = np.concatenate([np.arange(a, a + n) for a, n in zip(val.starts, val.lengths)])
    assert nats == pytest.approx(ids[targets].mean())
    text_bytes = ids[targets + 1].sum()
    assert bits == pytest.approx(ids[targets].sum() / np.log(2) / text_bytes)


def test_report_sees_every_evaluation_and_may_end_the_run(cache, tmp_path):
    seen = []
    config = train.resolve(train.read_flags(flags(cache, tmp_path / "whole", "--max-steps", 20)))
    results = train.train(config, lambda step, nats: seen.append((step, nats)))
    metrics, _ = numbers_of(tmp_path / "whole")
    assert seen == [(m["step"], m["val_nats"]) for m in metrics if "val_nats" in m]
    assert seen[-1] == (20, results["val_nats"]) and len(seen) == 3

    def enough(step, nats):
        if step == 8:
            raise KeyboardInterrupt

    config = train.resolve(train.read_flags(flags(cache, tmp_path / "short")))
    with pytest.raises(KeyboardInterrupt):
        train.train(config, enough)
    assert train.load_checkpoint(tmp_path / "short")["step"] == 7


def test_track_mlflow_holds_the_lines_of_metrics(monkeypatch, capsys, cache, tmp_path):
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    more = ["--track", "mlflow", "--max-steps", 9]
    assert run(capsys, cache, tmp_path / "run", *more)[0] == 0
    metrics, _ = numbers_of(tmp_path / "run")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("06_train")
    (theirs,) = client.search_runs([experiment.experiment_id])
    assert theirs.info.status == "FINISHED" and theirs.data.params["max_steps"] == "9"
    for name in ("loss", "val_nats"):
        history = client.get_metric_history(theirs.info.run_id, name)
        wanted = [(m["step"], m[name]) for m in metrics if name in m]
        assert sorted((h.step, h.value) for h in history) == wanted


def test_track_wandb_leaves_offline_files(capsys, cache, tmp_path):
    more = ["--track", "wandb", "--max-steps", 9]
    assert run(capsys, cache, tmp_path / "run", *more)[0] == 0
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    content = file.read_bytes()
    assert all(name in content for name in (b"val_nats", b"gnorm", b"learning_rate"))


def test_track_without_the_package_is_one_line(monkeypatch, capsys, cache, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    status, _, stderr = run(capsys, cache, tmp_path / "run", "--track", "wandb")
    assert status == 2 and "pip install wandb" in stderr and stderr.count("\n") == 1


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", None),
        ("Tesla T4", None),
    ],
)
def test_card_is_found_by_its_name(name, tflops, monkeypatch):
    monkeypatch.setattr(train, "device_name", lambda device: name)
    assert train.card(torch.device("cuda"))[0] == tflops


def test_dollars_are_price_times_time(capsys, cache, tmp_path):
    more = ["--dollars-per-hour", 7.2, "--max-steps", 5]
    _, stdout, _ = run(capsys, cache, tmp_path / "run", *more)
    figures = dict(re.findall(r"^(\w+): (\S+)$", stdout, flags=re.MULTILINE))
    assert float(figures["dollars"]) == pytest.approx(float(figures["seconds"]) * 0.002)


def test_results_add_up(finished):
    stdout = finished.with_name("stdout").read_text()
    figures = dict(re.findall(r"^(\w+): (\S+)$", stdout, flags=re.MULTILINE))
    assert list(figures) == [
        "val_nats", "floor_nats", "val_bpb", "tokens", "seconds", "tokens_per_second",
        "peak_memory_gb", "parameters",
    ]  # fmt: skip
    losses = [float(loss) for loss in re.findall(r"\| loss (\S+) nats", stdout)]
    assert losses[0] == pytest.approx(math.log(300), abs=0.2) and losses[-1] < losses[0] - 1

    # the same three figures from the checkpoint, torch's loss, and one story at a time
    vocabulary = bpe.Vocabulary.load(finished / "vocabulary.json")
    config = gpt.GPTConfig(**{**vars(gpt.PRESETS["tiny"]), "vocab_size": 300, "seq_len": 64})
    model = gpt.GPT(config)
    model.load_state_dict(train.load_checkpoint(finished)["model"])
    drawn = list(stories.corpus(20, seed=1))
    ids = [vocabulary.end]
    for text, _ in drawn:
        ids += [*vocabulary.encoding().encode_ordinary(text), vocabulary.end]
    ids = np.array(ids)
    total = 0.0
    starts, lengths = batches.story_rows(ids.astype(np.uint16), vocabulary.end, 64)
    with torch.no_grad():
        for first, n in zip(starts, lengths):
            row = torch.from_numpy(ids[first : first + n + 1].astype(np.int64))
            total += F.cross_entropy(model(row[None, :-1])[0], row[1:], reduction="sum").item()
    assert float(figures["val_nats"]) == pytest.approx(total / (len(ids) - 1), abs=1e-4)
    text_bytes = sum(len(text.encode()) for text, _ in drawn)
    assert float(figures["val_bpb"]) == pytest.approx(total / math.log(2) / text_bytes, abs=1e-4)
    floor = -sum(log_probability for _, log_probability in drawn) / (len(ids) - 1)
    assert float(figures["floor_nats"]) == pytest.approx(floor, abs=1e-9)


def test_sample_continues_the_prompt(capsys, cache, finished):
    status, stdout, _ = run(capsys, cache, finished, "--sample", "Once upon a time,")
    assert status == 0 and stdout.startswith("Once upon a time,") and len(stdout) > 30
    assert run(capsys, cache, finished, "--sample", "Once upon a time,")[1] == stdout
    assert run(capsys, cache, finished, "--sample", "Once upon a time,", "--seed", 0)[1] == stdout


def test_export_goes_on_in_transformers_like_sample_here(capsys, cache, finished, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "exported"
    status, stdout, _ = run(capsys, cache, finished, "--export", folder)
    assert status == 0 and str(folder) in stdout
    _, ours, _ = run(capsys, cache, finished, "--sample", "Once upon", "--temperature", 0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer("Once upon", return_tensors="pt")
    ids = model.generate(**prompt, max_length=64, do_sample=False)[0]
    assert tokenizer.decode(ids, skip_special_tokens=True) == ours.strip("\n")


def test_sample_with_another_model_or_a_damaged_vocabulary_is_one_line(capsys, cache, tmp_path):
    out = tmp_path / "run"
    run(capsys, cache, out, "--max-steps", 5)
    status, _, stderr = run(capsys, cache, out, "--sample", "Once", "--model", "8m")
    assert status == 2 and "wanted tiny, as the run" in stderr and stderr.count("\n") == 1
    (out / "vocabulary.json").write_text("{}")
    status, _, stderr = run(capsys, cache, out, "--sample", "Once", "--max-steps", 5)
    assert status == 2 and "vocabulary.json is damaged" in stderr and stderr.count("\n") == 1


def test_train_on_a_file(capsys, cache, tmp_path):
    text = "\n<|endoftext|>\n".join(story for story, _ in stories.corpus(300, seed=7))
    path = tmp_path / "mine.txt"
    path.write_text(text)
    status, stdout, _ = run(capsys, cache, tmp_path / "run", "--data", path, "--max-steps", 5)
    assert status == 0 and "floor_nats" not in stdout and "mine.txt" in stdout


def test_resume_after_the_text_has_changed_is_one_line(capsys, cache, tmp_path):
    path, out = tmp_path / "mine.txt", tmp_path / "run"
    texts = [story for story, _ in stories.corpus(300, seed=7)]
    path.write_text("\n<|endoftext|>\n".join(texts))
    run(capsys, cache, out, "--data", path, "--max-steps", 4)
    path.write_text("\n<|endoftext|>\n".join(text.swapcase() for text in texts))
    status, _, stderr = run(capsys, cache, out, "--data", path, "--max-steps", 4, "--resume")
    assert status == 2 and "has changed since" in stderr and stderr.count("\n") == 1


@pytest.mark.parametrize("rows", ["stories", "blocks"])
def test_train_counts_tokens(rows, capsys, cache, tmp_path):
    _, stdout, _ = run(capsys, cache, tmp_path / "run", "--rows", rows, "--max-steps", 5)
    tokens = int(re.search(r"^tokens: (\d+)$", stdout, flags=re.MULTILINE)[1])
    assert tokens == 5 * 4 * 64 if rows == "blocks" else 0 < tokens <= 5 * 4 * 64


# errors: one line, exit status 2, nothing lost


@pytest.mark.parametrize(
    "more, wanted",
    [
        (["--learning-rat", "1"], "did you mean --learning-rate?"),
        (["--l", "1"], "unknown argument --l"),
        (["--frobnicate"], "--help lists the flags"),
        (["--max-steps", "many"], "--max-steps"),
        (["--max-steps"], "--max-steps"),
        (["--max-steps", 0], "--max-steps 0: wanted at least 1"),
        (["--seq-len", 1], "at least 2"),
        (["--batch-size", 3, "--accumulate", 2], "a multiple of accumulate=2"),
        (["--warmup-steps", 41], "at most max_steps=40"),
        (["--learning-rate", "nan"], "--learning-rate nan"),
        (["--learning-rate", "inf"], "below inf"),
        (["--seed", 10**30], "below 9223372036854775808"),
        (["--beta2", 1], "--beta2 1"),
        (["--temperature", -1], "--temperature -1"),
        (["--model", "9b"], "one of 27m, 8m, 0.5m, tiny"),
        (["--preset", "large"], "one of stories, tinystories"),
        (["--schedule", "magic"], "wsd"),
        (["--cooldown", 50], "at most max_steps=40"),
        (["--cooldown", 5, "--schedule", "step"], "no cooldown to set"),
        (["--guard", "maybe"], "one of on, off"),
        (["--vocab-size", 100_000], "257 to 65536"),
        (["--device", "quantum"], "try --device cpu"),
        (["--device", "meta"], "--device meta: wanted cpu, cuda, cuda:N or auto"),
        (["--data", "no/such/file.txt"], "no such file"),
        (["--sample", "x"], "train first"),
    ],
)
def test_wrong_flags_are_one_line(more, wanted, capsys, cache, tmp_path):
    status, _, stderr = run(capsys, cache, tmp_path / "run", *more)
    assert status == 2
    assert wanted in stderr and stderr.count("\n") == 1, stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content, wanted",
    [
        (b"", "mine.txt"),
        (b"   \n", "mine.txt"),
        (b"A file without separators. " * 50, "<|endoftext|>"),
        (b"One.\n<|endoftext|>\n\xff\xfe\n<|endoftext|>\nTwo.", "UTF-8"),
        (b"One.\n<|endoftext|>\nTwo.\n", "validat"),
    ],
    ids=["empty", "blank", "no separator", "not UTF-8", "two stories"],
)
def test_wrong_files_are_one_line(content, wanted, capsys, cache, tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes(content)
    status, _, stderr = run(capsys, cache, tmp_path / "run", "--data", path)
    assert status == 2
    assert wanted in stderr and "mine.txt" in stderr and stderr.count("\n") == 1, stderr
    assert not list(cache.glob("*.part"))


@pytest.mark.parametrize("damage", ["cut", "other vocabulary", "json", "missing", "vocabulary"])
def test_damaged_token_files_are_one_line(damage, capsys, tmp_path):
    cache = tmp_path / "cache"
    run(capsys, cache, tmp_path / "run", "--max-steps", 4)
    (folder,) = cache.glob("tokens-*")
    binary, described = folder / "train.bin", folder / "train.json"
    if damage == "cut":
        binary.write_bytes(binary.read_bytes()[:-10])
    elif damage == "other vocabulary":
        about = json.loads(described.read_text())
        described.write_text(json.dumps(about | {"vocabulary": "0" * 64}))
    elif damage == "json":
        described.write_text(described.read_text()[:20])
    elif damage == "missing":
        binary.unlink()
    else:
        (folder / "vocabulary.json").write_text("{")
    before = sorted((tmp_path / "run").iterdir())
    status, _, stderr = run(capsys, cache, tmp_path / "run", "--max-steps", 4, "--resume")
    assert status == 2
    assert "delete" in stderr and stderr.count("\n") == 1, stderr
    assert sorted((tmp_path / "run").iterdir()) == before


def test_out_of_another_run_is_refused(capsys, cache, tmp_path):
    out = tmp_path / "run"
    run(capsys, cache, out, "--max-steps", 4)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for more, wanted in (
        ([], "--resume"),
        (["--seed", 5], "seed=0, not 5"),
        (["--seed", 5, "--resume"], "seed=0, not 5"),
    ):
        status, _, stderr = run(capsys, cache, out, "--max-steps", 4, *more)
        assert status == 2 and wanted in stderr and stderr.count("\n") == 1, stderr
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("")
    status, _, stderr = run(capsys, cache, tmp_path / "photos")
    assert status == 2 and "not empty and not a run" in stderr
    (tmp_path / "file").write_text("")
    status, _, stderr = run(capsys, cache, tmp_path / "file")
    assert status == 2 and "choose another folder" in stderr


def test_diverging_loss_is_one_line(capsys, cache, tmp_path):
    more = ["--learning-rate", "1e30", "--warmup-steps", 0, "--grad-clip", 0]
    status, _, stderr = run(capsys, cache, tmp_path / "run", *more)
    assert status == 2 and "lower --learning-rate" in stderr


def test_damaged_config_is_one_line(capsys, cache, tmp_path):
    out = tmp_path / "run"
    run(capsys, cache, out, "--max-steps", 4)
    stored = json.loads((out / "config.json").read_text())
    for damaged in ("{", "[]", '{"newfield": 1}', json.dumps(stored | {"beta1": "x"})):
        (out / "config.json").write_text(damaged)
        status = train.main(["--out", str(out), "--resume"])
        stderr = capsys.readouterr().err
        assert status == 2 and "config.json" in stderr and stderr.count("\n") == 1, stderr


def test_help_lists_every_field(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    for name in train.Config.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in text
    assert "folder of this run (default: runs/stories)" in " ".join(text.split())
