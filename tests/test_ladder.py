"""Tests of results/ladder.py: each change does what its arm says, arms reach 06, runs are not done
twice, the table's figures by hand.

Run: python -m pytest tests/test_ladder.py
"""

import importlib
import json
import math
import statistics
import sys
from dataclasses import replace

import pytest
import torch

ladder = importlib.import_module("results.ladder")
train, gpt = ladder.train, ladder.gpt

SMALL = gpt.GPTConfig(
    vocab_size=32, seq_len=12, n_layer=2, n_head=2, n_kv_head=2, d_model=16, d_mlp=32
)


def small(**changed):
    """A small model whose layers do something from the start, and ids (4, 12) for it."""
    torch.manual_seed(0)
    model = ladder.with_random_projections(gpt.GPT(replace(SMALL, **changed)))
    return model, torch.randint(32, (4, 12))


# Changes of the model


def test_dropout_is_active_in_training_only():
    model, ids = small()
    with torch.no_grad():
        plain = model(ids)
        model = ladder.with_dropout(model)
        assert torch.equal(model(ids), plain)
    first, second = model(ids), model(ids)
    assert not torch.equal(first, second) and not torch.equal(first, plain)


def test_dropout_drops_a_fifth_of_each_branch_and_keeps_its_mean():
    branches = []
    model, ids = small(d_model=256)
    for block in model.blocks:  # hooks run in the order in which they were added
        for part in (block.attention, block.mlp):
            part.register_forward_hook(lambda module, args, y: branches.append([y]))
    model = ladder.with_dropout(model)
    for block in model.blocks:
        for part in (block.attention, block.mlp):
            part.register_forward_hook(lambda module, args, y: branches[-1].append(y))
    model(ids)
    assert len(branches) == 4
    for before, after in branches:
        kept = after != 0
        assert abs(kept.float().mean() - 0.8) < 0.02  # 12,288 values: 5 standard errors
        assert torch.allclose(after[kept], before[kept] / 0.8)


def test_learned_positions_are_the_only_ones():
    """Of one layer the last output does not change when what is before it changes places."""
    model, ids = small(n_layer=1)
    moved = torch.cat((ids[:, torch.randperm(11)], ids[:, -1:]), dim=1)

    def last_moves():
        with torch.no_grad():
            return not torch.allclose(model(ids)[:, -1], model(moved)[:, -1], atol=1e-6)

    assert last_moves()  # by rotation
    model = ladder.with_learned_positions(model)
    assert model.wpe.shape == (12, 16) and last_moves()  # by the table
    model.wpe.data.zero_()
    assert not last_moves()


def test_learned_positions_are_trained_by_adamw():
    model, ids = small()
    model = ladder.with_learned_positions(model)
    model(ids[:, :7]).square().mean().backward()
    assert model.wpe.grad[:7].abs().min() > 0 and model.wpe.grad[7:].abs().max() == 0
    hidden, rest = train.muon.split_parameters(model.named_parameters())
    assert "wpe" in dict(rest) and "wpe" not in dict(hidden)


def test_without_qk_norm_the_length_of_queries_counts():
    model, ids = small()
    without = ladder.without_qk_norm(model)
    assert not any("q_norm" in name or "k_norm" in name for name, _ in without.named_parameters())
    state = model.state_dict()
    assert all(torch.equal(p, state[name]) for name, p in without.state_dict().items())
    before = [m(ids).detach() for m in (model, without)]
    for m in (model, without):
        for block in m.blocks:
            block.attention.qkv.weight.data[:16] *= 3  # the queries
    after = [m(ids).detach() for m in (model, without)]
    assert torch.allclose(before[0], after[0], atol=1e-4)
    assert not torch.allclose(before[1], after[1], atol=1e-2)


def test_random_projections_are_not_zero():
    model = gpt.GPT(replace(SMALL, d_model=256))
    wanted = 0.5 / math.sqrt(256) / math.sqrt(2 * 2)  # as other matrices, over sqrt(2 layers)
    for block in model.blocks:
        assert not block.attention.out.weight.any() and not block.mlp.down.weight.any()
    for block in ladder.with_random_projections(model).blocks:
        for weight in (block.attention.out.weight, block.mlp.down.weight):
            assert abs(weight.std() / wanted - 1) < 0.05


# Arms


def test_none_of_them_is_all_of_them_taken_back():
    settings = ladder.settings_of("none of them", {})
    assert settings == {
        "optimizer": "adamw", "learning_rate": 6e-4, "schedule": "cosine_with_min_lr"
    }  # fmt: skip
    model, ids = gpt.GPT(SMALL), torch.randint(32, (4, 12))
    model = ladder.ARMS["none of them"].change(model)
    assert not model.config.qk_norm
    assert hasattr(model, "wpe") and not model.sin.any()
    assert all(block.attention.out.weight.any() for block in model.blocks)
    assert not torch.equal(model(ids), model(ids))


def test_every_arm_differs_from_the_full_recipe():
    full = ladder.settings_of("full recipe", {})
    for name, arm in ladder.ARMS.items():
        changed = arm.change(gpt.GPT(SMALL))
        model = gpt.GPT(SMALL)
        same_model = changed.config == model.config and not any(
            module._forward_hooks for module in changed.modules()
        )
        same_model &= not changed.blocks[0].mlp.down.weight.any()
        assert (ladder.settings_of(name, {}) != full or not same_model) == (name != "full recipe")


def test_equal_time_has_more_steps_and_is_the_same_otherwise():
    short, long = (
        ladder.describe(name, "stories", 0, 200, {})
        for name in ("without Muon", "without Muon, equal time")
    )
    assert (short["steps"], long["steps"]) == (200, 224)
    assert short["settings"] == long["settings"]


def test_building_ends_with_its_block():
    plain = train.build
    with ladder.building("without QK-norm"):
        assert train.build is not plain
    assert train.build is plain


@pytest.fixture
def text(tmp_path):
    """A text of 200 short stories in a file."""
    words = "the cat saw a dog and ran home to eat fish with mum".split()
    told = [" ".join(words[i % 7 :]) + f" on day {i}." for i in range(200)]
    path = tmp_path / "text.txt"
    path.write_text("\n<|endoftext|>\n".join(told))
    return path


def test_arms_are_trained_as_06_trains(text, tmp_path):
    size = {"seq_len": 40, "vocab_size": 300, "batch_size": 2, "warmup_steps": 2}
    runs = {}
    for name in ("full recipe", "without dropout 0", "without Muon", "without RoPE"):
        run = ladder.describe(name, str(text), seed=3, steps=6, rates=size)
        runs[name] = ladder.run_arm(run, str(text), str(tmp_path / "cache"))
    wanted = train.train(
        train.Config(data=str(text), out=str(tmp_path / "run"), cache=str(tmp_path / "cache"),
                     seed=3, max_steps=6, **ladder.FULL, **size)
    )  # fmt: skip
    for name in ("val_nats", "val_bpb", "tokens"):
        assert runs["full recipe"][name] == wanted[name]
    assert len({run["val_nats"] for run in runs.values()}) == 4
    assert {run["tokens"] for run in runs.values()} == {wanted["tokens"]}


def test_speed_is_in_steps_of_the_full_recipe(text, tmp_path, monkeypatch):
    names = ("full recipe", "without Muon", "none of them")
    monkeypatch.setattr(ladder, "ARMS", {name: ladder.ARMS[name] for name in names})
    speed = ladder.measure_speed(str(text), str(tmp_path / "cache"), turns=1)
    assert list(speed) == list(ladder.ARMS) and speed["full recipe"] == 1
    assert all(0.1 < ratio < 10 for ratio in speed.values())


# The json


@pytest.fixture
def trained(monkeypatch):
    """What would have been trained; the score is the number of the run."""
    done = []

    def run_arm(run, data, cache):
        done.append(run)
        return run | {"val_nats": 1.0, "val_bpb": float(len(done)), "cpu_seconds": 0.0}

    monkeypatch.setattr(ladder, "run_arm", run_arm)
    return done


def test_arms_already_there_are_skipped(trained, tmp_path):
    path = tmp_path / "kept.json"
    flags = ["--data", "text.txt", "--json", str(path)]
    ladder.main([*flags, "--seeds", "0"])
    assert [run["arm"] for run in trained] == list(ladder.ARMS)
    ladder.main([*flags, "--seeds", "0"])
    assert len(trained) == len(ladder.ARMS)
    kept = json.loads(path.read_text())
    assert len(kept["runs"]) == len(ladder.ARMS)
    del kept["runs"][2]
    path.write_text(json.dumps(kept))
    ladder.main([*flags, "--seeds", "0", "1"])
    again = trained[len(ladder.ARMS) :]
    assert again[0]["arm"] == list(ladder.ARMS)[2] and again[0]["seed"] == 0
    assert [run["seed"] for run in again[1:]] == [1] * len(ladder.ARMS)
    ladder.main([*flags, "--seeds", "0", "--steps", "99"])
    assert len(trained) == 3 * len(ladder.ARMS) + 1


def test_a_damaged_json_is_one_line_and_stays(tmp_path, capsys):
    path = tmp_path / "ladder.json"
    path.write_text('{"speed": {},')
    assert ladder.main(["--json", str(path), "--plot", str(tmp_path / "a.png")]) == 2
    error = capsys.readouterr().err
    assert f"{path} is damaged" in error and error.count("\n") == 1
    assert path.read_text() == '{"speed": {},'


def test_stopping_keeps_what_has_ended(trained, tmp_path, monkeypatch):
    plain = ladder.run_arm

    def stops(run, data, cache):
        if run["arm"] == "without RoPE":
            raise train.Stopped("SIGINT")
        return plain(run, data, cache)

    monkeypatch.setattr(ladder, "run_arm", stops)
    path = tmp_path / "kept.json"
    assert ladder.main(["--data", "text.txt", "--json", str(path), "--seeds", "0"]) == 130
    names = [run["arm"] for run in json.loads(path.read_text())["runs"]]
    assert names == list(ladder.ARMS)[: list(ladder.ARMS).index("without RoPE")]


def test_tuning_stays_out_of_the_table(trained, tmp_path):
    path = tmp_path / "kept.json"
    ladder.main(["--data", "text.txt", "--json", str(path), "--tune"])
    assert len(trained) == len(ladder.TUNED)
    assert {run["seed"] for run in trained} == {ladder.TUNING_SEED}
    kept = ladder.load(path)
    assert ladder.scores(kept, "text.txt", ladder.STEPS) == {}
    lines = ladder.tuning(kept, "text.txt").splitlines()
    assert len(lines) == len(ladder.TUNED) and ladder.tuning(kept, "other.txt") == ""
    rate = ladder.TUNED[0][1]["learning_rate"]  # the first run, with which the mock scores 1
    what = f"{ladder.STEPS} steps, adamw, learning_rate {rate:g}: 1.000 bits per byte"
    wanted = f"tuning, text.txt, {what}"
    assert wanted in lines


# The table


def entry(arm, seed, bpb):
    return ladder.describe(arm, "text.txt", seed, ladder.STEPS, {}) | {"val_bpb": bpb}


KEPT = {
    "speed": {"full recipe": 1.0, "without Muon": 0.875},
    "runs": [
        *[entry("full recipe", seed, bpb) for seed, bpb in enumerate((1.0, 3.0))],
        *[entry("without Muon", seed, bpb) for seed, bpb in enumerate((2.0, 4.0, 6.0))],
    ],
}


def test_table_by_hand():
    # squares within the arms: 2 + 8, degrees of freedom 1 + 2
    sd = math.sqrt(10 / 3)
    lines = ladder.table(KEPT, "text.txt", ladder.STEPS).splitlines()
    assert f"seeds {sd:.4f}" in lines[0]
    assert lines[-2] == f"| full recipe | 2.000 ± {sd / math.sqrt(2):.3f} |  | x 1.00 | 2 |"
    error = sd * math.sqrt(1 / 3 + 1 / 2)
    shown = f"4.000 ± {sd / math.sqrt(3):.3f} | +2.000 ± {error:.3f}"
    assert lines[-1] == f"| without Muon | {shown} | x 0.88 | 3 |"


def test_pooled_deviation_of_one_group_is_its_own():
    values = [0.3, 0.1, 0.7, 0.4]
    assert math.isclose(ladder.pooled_deviation([values, [9.0]]), statistics.stdev(values))
    assert math.isnan(ladder.pooled_deviation([[1.0], [2.0]]))


def test_score_is_the_gap_where_the_floor_is_known():
    assert math.isclose(ladder.score({"val_nats": 0.5, "val_bpb": 9, "floor_nats": 0.2}), 0.3)
    assert ladder.score({"val_nats": 0.5, "val_bpb": 9}) == 9


def test_plot_draws_or_says_what_is_missing(tmp_path, monkeypatch, capsys):
    path, picture = tmp_path / "kept.json", tmp_path / "ladder.png"
    ladder.save(path, KEPT)
    assert ladder.load(path) == KEPT
    flags = ["--json", str(path), "--plot", str(picture)]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        assert ladder.main(flags) == 2
        assert "pip install matplotlib" in capsys.readouterr().err and not picture.exists()
    pytest.importorskip("matplotlib")
    assert ladder.main([*flags, "--steps", "7"]) == 2 and not picture.exists()
    assert ladder.main(flags) == 0
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_json_is_of_this_version():
    """Every entry was trained with an arm and settings that the script still has."""
    kept = ladder.load(ladder.Path(ladder.__file__).with_suffix(".json"))
    for run in kept["runs"]:
        rates = {k: v for k, v in run["settings"].items() if k.endswith("rate")}
        assert run["settings"] == ladder.settings_of(run["arm"], rates)
