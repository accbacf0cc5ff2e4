"""Tests of kernels/bench.py: what it counts, judges and prints, and its timing with a fake clock.

The timing needs a GPU; here every line of it runs on the CPU, with functions of torch.cuda replaced
by ones that tell a made-up time. Run: python -m pytest tests/test_kernels_bench.py
"""

import importlib
import json
from dataclasses import replace

import pytest
import torch

from kernels import bench

BY_NAME = {kernel.name: kernel for kernel in bench.KERNELS}
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's place is taken by the CPU")


def nbytes(tensors):
    return sum(x.nbytes for x in bench.flat(tensors))


# Work


@pytest.mark.parametrize("B, T, H, G, D", [(1, 1, 1, 1, 32), (2, 7, 4, 2, 64), (3, 33, 2, 1, 128)])
def test_attention_work_counts_visible_pairs(B, T, H, G, D):
    pairs = sum(1 for t in range(T) for s in range(T) if s <= t)
    product = 2 * pairs * D * B * H  # a multiplication and an addition
    work = BY_NAME["attention"].work(B=B, T=T, H=H, G=G, D=D)
    assert work == {"forward": 2 * product, "backward": 5 * product, "both": 7 * product}


@pytest.mark.parametrize("name", ["rmsnorm", "swiglu", "rope"])
def test_bytes_are_those_of_the_tensors(name):
    """Every big tensor read and written once; gains and tables are small and not counted."""
    kernel = BY_NAME[name]
    shape = kernel.small
    inputs = kernel.inputs(torch.bfloat16, "cpu", **shape)
    big = [x for x in bench.leaves_of(inputs) if x.ndim > 1]
    outputs = nbytes(kernel.plain(*inputs))
    work = kernel.work(**shape)
    assert work["forward"] == nbytes(big) + outputs
    # gradients of outputs in, what the formula needs again, gradients of inputs out
    B_T, D = (shape["B"] * shape["T"], shape["D"]) if name == "rope" else (0, 0)
    x = nbytes(big[0])
    again = {
        "rmsnorm": x,  # the sum; both addends have the same gradient, which is written once
        "swiglu": x,
        "rope": 2 * B_T * D * (shape.get("H", 0) + shape.get("G", 0)),  # q and k, for the norm
    }
    assert work["backward"] == outputs + again[name] + x


def test_bytes_of_losses_and_optimiser():
    N, V = 64, 128
    logits, targets = BY_NAME["cross_entropy"].inputs(torch.bfloat16, "cpu", N=N, V=V)
    work = BY_NAME["cross_entropy"].work(N=N, V=V)
    assert work == {"both": 2 * logits.nbytes + targets.nbytes + 4 * N}
    # three products of N x C x V, each a multiplication and an addition
    assert BY_NAME["linear_cross_entropy"].work(N=3, C=5, V=7) == {"both": 3 * 2 * 3 * 5 * 7}
    p, g, m, v, *_ = BY_NAME["adamw"].inputs(torch.float32, "cpu", **bench.TINY)
    read, written = nbytes(p) + nbytes(g) + nbytes(m) + nbytes(v), nbytes(p) + nbytes(m) + nbytes(v)
    assert BY_NAME["adamw"].work(**bench.TINY) == {"step": read + written}
    assert BY_NAME["grad_norm"].work(**bench.TINY) == {"forward": nbytes(g)}


def test_parameters_are_those_of_the_27m_model():
    gpt = importlib.import_module("03_gpt")
    model = gpt.GPT(gpt.PRESETS["27m"])
    theirs = sorted(tuple(p.shape) for p in model.parameters())
    assert sorted(bench.parameter_shapes(**bench.MODEL)) == theirs


# Right


@no_gpu
def test_every_kernel_is_right_in_the_interpreter(run_file, tmp_path):
    """The command as a user runs it."""
    file = tmp_path / "bench.json"
    child = run_file(bench.__file__, "--json", file)
    assert child.returncode == 0, child.stdout + child.stderr
    assert "timings need a GPU" in child.stdout
    result = json.loads(file.read_text())
    assert {row["kernel"] for row in result["checks"]} == set(BY_NAME)
    assert result["wrong"] == [] and "rows" not in result
    assert result["torch"] == torch.__version__
    for row in result["checks"]:  # of each there is a line here, and one in the docstring
        start = f"  {row['kernel']:22}{row['dtype']:10}{bench.label(row['shape'])}"
        assert start in child.stdout and start in bench.__doc__


def doubled(x):
    return 2 * bench.swiglu_plain(x)


def wrong_gradient(x):
    return bench.swiglu_plain(x.detach()) + 0 * x.sum()


def one_wrong_number(x):
    y = bench.swiglu_plain(x)
    return y + 0.1 * (torch.arange(y.numel()).view(y.shape) == 5) * y.detach().abs().max()


def one_nan(x):
    return bench.swiglu_plain(x) + torch.where(torch.arange(x.shape[1] // 2) == 7, torch.nan, 0.0)


def one_nan_in_the_gradient(x):
    return bench.swiglu_plain(x) + (0 * x[:, 7:8]).abs().sqrt()  # 0, with the slope 0 / 0


def another_shape(x):
    return bench.swiglu_plain(x)[:1]


def raises(x):
    raise RuntimeError("no such\nluck")


WRONG = [doubled, wrong_gradient, one_wrong_number, one_nan, one_nan_in_the_gradient]


@pytest.mark.parametrize("program", [*WRONG, another_shape, raises])
def test_a_wrong_kernel_is_named(program, monkeypatch, capsys):
    kernels = BY_NAME["rmsnorm"], replace(BY_NAME["swiglu"], ours=program)
    monkeypatch.setattr(bench, "KERNELS", kernels)
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: False)
    assert bench.main([]) == 1
    printed = capsys.readouterr().out
    assert printed.count("WRONG, and not timed: swiglu") == 1
    assert "not timed: rmsnorm" not in printed
    if program is raises:
        assert "raised RuntimeError: no such\n" in printed


@pytest.mark.parametrize("name", BY_NAME)
def test_the_formula_in_float32_is_within_the_bound(name):
    """So a kernel that is not has an error of its own."""
    kernel = BY_NAME[name]
    same = replace(kernel, ours=kernel.plain)
    assert bench.largest_error(same, kernel.small, torch.float32, "cpu") < 2e-5


# the two others do not run on the meta device: autocast and .item() are unknown there
@pytest.mark.parametrize("name", sorted(BY_NAME.keys() - {"linear_cross_entropy", "adamw"}))
def test_programs_agree_on_shapes_at_every_timed_shape(name):
    """On torch's meta device, whose tensors have no data: any size costs nothing."""
    kernel = BY_NAME[name]
    for shape in [*kernel.timed, *(s | kernel.few for s in kernel.timed)]:
        assert kernel.work(**shape)
        results = []
        for program in (kernel.ours, kernel.plain):
            inputs = kernel.inputs(kernel.dtypes[-1], "meta", **shape)
            outputs = bench.flat(program(*inputs))
            leaves, upstream = bench.leaves_of(inputs), bench.upstream_of(outputs)
            gradients = torch.autograd.grad(outputs, leaves, upstream) if leaves else []
            results.append([x.shape for x in [*outputs, *gradients]])
        assert results[0] == results[1]


def test_fresh_inputs_each_time():
    numbers = [bench.KERNELS[3].inputs(torch.float32, "cpu", **bench.KERNELS[3].small)[0]]
    torch.seed()
    numbers.append(bench.KERNELS[3].inputs(torch.float32, "cpu", **bench.KERNELS[3].small)[0])
    assert not torch.equal(*numbers)


# Fast, with a fake clock


class FakeGpu:
    """Takes the place of torch.cuda's clock and memory; a program says what it takes."""

    def __init__(self, monkeypatch):
        self.now, self.allocated, self.peak, self.calls = 0.0, 100 * 2**20, 0, []
        for name in ("synchronize", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, lambda: None)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: self.allocated)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: self.peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "made-up GPU")
        gpu = self

        class Event:
            def __init__(self, enable_timing=False):
                assert enable_timing  # torch raises in elapsed_time without it

            def record(self):
                gpu.now += 0.5
                self.time = gpu.now

            def elapsed_time(self, end):
                return end.time - self.time

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(bench, "DEVICE", "cpu")
        monkeypatch.setattr(bench, "BUFFER", 64)
        monkeypatch.setattr(bench, "MATRIX", 8)
        monkeypatch.setattr(bench, "COMPILE", {"dynamic": False, "backend": "eager"})

    def reset(self):
        self.peak = self.allocated

    def program(self, name, times, mib=0):
        """One that takes the next of `times` (ms), the last for ever; None: it raises."""
        times = list(times)

        def call(x):
            self.calls.append(name)
            ms = times.pop(0) if len(times) > 1 else times[0]
            if ms is None:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate")
            self.now += ms - 0.5
            self.peak = max(self.peak, self.allocated + mib * 2**20)
            return x * 1

        return call


@pytest.fixture
def gpu(monkeypatch):
    return FakeGpu(monkeypatch)


def test_measure_takes_turns_and_reports_medians(gpu, monkeypatch):
    monkeypatch.setattr(bench, "REPEATS", 2)
    programs = {
        "a": gpu.program("a", [9, 9, 1, 7, 2, 3, 40, 4], mib=3),
        "b": gpu.program("b", [5], mib=1),
        "dies at once": gpu.program("dies at once", [None]),
        "dies later": gpu.program("dies later", [1, 1, 1, None]),
    }
    zeros = torch.ones(4, dtype=torch.uint8)
    found = bench.measure(programs, lambda: [torch.ones(3)], "forward", zeros, rounds=3)
    assert zeros.sum() == 0  # the cache was emptied
    # of 1, 7, 2, 3, 40, 4
    assert found["a"]["ms"] == pytest.approx(3.5) and found["a"]["peak_mib"] == 3
    assert found["b"] == {"ms": 5, "quartiles": [5, 5], "peak_mib": 1}
    message = "OutOfMemoryError: CUDA out of memory. Tried"
    assert found["dies at once"] == found["dies later"] == {"failed": message}
    first = ["a", "a", "b", "b", "dies at once", "dies later", "dies later"]
    turn = ["a", "a", "b", "b"]
    assert gpu.calls == [*first, *turn, "dies later", "dies later", *turn, *turn]


def test_what_the_clock_sees(gpu):
    """forward: the program; backward: gradients alone; both: all of it."""

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            gpu.now += 10
            return x * 1

        @staticmethod
        def backward(ctx, dy):
            gpu.now += 200
            return dy

    for which, ms in (("forward", 10.5), ("step", 10.5), ("backward", 200.5), ("both", 210.5)):
        run = bench.stages(Slow.apply, [torch.ones(3, requires_grad=True), 7, None][:1], which)
        assert bench.milliseconds(*run, torch.ones(2), repeats=2) == [ms, ms]


def test_outputs_of_one_measurement_are_gone_before_the_next(gpu):
    """Else two sets of activations would have to fit."""
    alive, before = [], []

    class Outputs:
        def __init__(self):
            before.append(len(alive))
            alive.append(None)

        def __del__(self):
            alive.pop()

    bench.milliseconds(Outputs, lambda _: None, torch.ones(2), repeats=3)
    assert before == [0, 0, 0]


def test_a_loss_is_differentiated_from_one_and_other_outputs_from_anything():
    one, many = bench.upstream_of([torch.zeros(()), torch.zeros(4, 3).T])
    assert one == 1 and many.is_contiguous() and many.shape == (3, 4) and many.unique().numel() > 1


def small_table(kernels, timed=2):
    """Timed, so often, at a shape that costs nothing; all targets counted, as on a GPU."""

    def small(kernel):
        shape = {x: n if x in "HGD" else min(n, 3) for x, n in kernel.small.items()}
        shape.pop("ignored", None)
        return replace(kernel, small=shape, timed=timed * (shape,), few={}, quick=1)

    return tuple(map(small, kernels))


@no_gpu
def test_the_whole_program_with_a_fake_clock(gpu, monkeypatch, capsys):
    """Every kernel, every program: each that this machine has runs, the others become lines."""
    kernels = small_table([replace(k, dtypes=k.dtypes[-1:]) for k in bench.KERNELS], timed=1)
    swiglu = [k.name for k in kernels].index("swiglu")
    monkeypatch.setattr(
        bench,
        "KERNELS",
        (*kernels[:swiglu], replace(kernels[swiglu], ours=doubled), *kernels[swiglu + 1 :]),
    )
    monkeypatch.setattr(bench, "ROUNDS", 3)
    monkeypatch.setattr(bench, "REPEATS", 2)
    monkeypatch.setattr(bench, "liger", None)
    # in so few numbers bfloat16 may, once in a while, err by more than the bounds allow
    monkeypatch.setattr(torch, "seed", lambda: torch.manual_seed(0).initial_seed())
    monkeypatch.setattr(bench, "COMPILE", bench.COMPILE | {"backend": "aot_eager"})  # seconds less
    result = bench.run(quick=True, gpu=True)
    printed = capsys.readouterr().out
    json.dumps(result)
    assert result["wrong"] == ["swiglu"] and "WRONG, and not timed: swiglu" in printed
    assert result["device"] == "made-up GPU" and result["driver"] and result["cache"] == "cold"
    assert result["rates"] == {"GB/s": 2 * 64 / 0.5e6, "TFLOP/s": 2 * 8**3 / 0.5e9}
    rows = {(row["kernel"], row["pass"], row["program"]): row for row in result["rows"]}
    assert len(rows) == len(result["rows"])
    every = {k.name: k for k in kernels if k.name != "swiglu"}
    assert {name for name, _, _ in rows} == set(every)
    for name, kernel in every.items():
        passes = kernel.work(**kernel.timed[0])
        names = {"triton", "eager", "torch.compile", *kernel.rivals} - {"Liger"}
        for which, work in passes.items():
            here = {p for k, w, p in rows if (k, w) == (name, which)}
            assert here == names
            for program in ("triton", "eager", "torch.compile"):
                row = rows[name, which, program]
                assert row.get("ms") == 0.5, row
                scale = 0.5e6 if kernel.unit == "GB/s" else 0.5e9
                assert row["rate"] == pytest.approx(work / scale)
                assert row["share"] == row["rate"] / result["rates"][kernel.unit]
            assert rows[name, which, "triton"]["ratio"] == 1
    # of the fused back ends a CPU has flash; the others must have become lines
    assert rows["attention", "both", "SDPA flash"]["ms"] == 0.5
    cudnn = rows["attention", "both", "SDPA cudnn"]["failed"]
    place = f"attention, both: {bench.label(kernels[0].small)}"
    assert f"{place}, SDPA cudnn: {cudnn}" in printed
    assert rows["adamw", "step", "AdamW fused"]["ms"] == 0.5
    assert len(result["targets"]) >= len(bench.TARGETS)
    for row in result["rows"]:
        assert set(bench.lines([row])) <= set(printed.splitlines())
    for verdict in result["targets"]:
        assert bench.verdict_line(verdict) in printed.splitlines()


@no_gpu
def test_a_broken_gpu_is_a_line_for_each_shape(gpu, monkeypatch):
    monkeypatch.setattr(bench, "KERNELS", small_table((BY_NAME["rmsnorm"], BY_NAME["swiglu"])))

    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.compiler, "reset", broken)
    rows = bench.run(quick=False, gpu=True)["rows"]
    assert len(rows) == 4 and all("illegal memory access" in row["failed"] for row in rows)


@no_gpu
def test_without_time_the_rest_is_named(gpu, monkeypatch, capsys):
    monkeypatch.setattr(bench, "KERNELS", small_table((BY_NAME["rmsnorm"], BY_NAME["swiglu"])))
    monkeypatch.setattr(bench, "SECONDS", -1)
    result = bench.run(quick=False, gpu=True)
    assert [row["failed"] for row in result["rows"]] == 4 * ["TimeoutError: -1 s are over"]
    # the first shapes of all kernels come before anybody's second
    assert [row["kernel"] for row in result["rows"]] == 2 * ["rmsnorm", "swiglu"]
    assert "could not run: 4" in capsys.readouterr().out
    assert all(verdict["value"] is None for verdict in result["targets"])


@no_gpu
def test_liger_runs_where_it_is_installed(gpu, monkeypatch):
    """By a stand-in with Liger's names and arguments; none of its own kernels runs on a CPU."""

    class Stand:
        @staticmethod
        def liger_fused_add_rms_norm(X, R, W, eps, offset=0.0, casting_mode="llama", in_place=True):
            assert not in_place  # it would write into the gradient that it is given
            return bench.rmsnorm_plain(X, W, eps, R)

        @staticmethod
        def liger_rms_norm(X, W, eps, offset=0.0, casting_mode="llama", in_place=True):
            assert not in_place
            return torch.nn.functional.rms_norm(X, W.shape, W, eps)

        @staticmethod
        def liger_rope(q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None):
            assert q.ndim == 4 and cos.shape == (1, q.shape[2], rotary_dim // 2)

            def turned(x):  # (B, heads, T, D)
                a, b = x.chunk(2, -1)
                return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

            return turned(q), turned(k)

    monkeypatch.setattr(bench, "liger", Stand)
    for name in ("rmsnorm", "rope"):
        kernel = BY_NAME[name]
        liger = replace(kernel, ours=kernel.rivals["Liger"])
        assert bench.largest_error(liger, kernel.small, torch.float32, "cpu") < 2e-5
    monkeypatch.setattr(bench, "REPEATS", 2)
    kernel = small_table([BY_NAME["rmsnorm"]])[0]
    rates, zeros = {"GB/s": 1.0}, torch.ones(2)
    rows = bench.time_shape(kernel, kernel.small, rates, zeros, rounds=1)
    assert [r["program"] for r in rows if "ms" in r][3::4] == 2 * ["Liger"]


# Report


def row(program, ms, **other):
    share = {"rate": 3000.0, "unit": "GB/s", "share": 0.8, "peak_mib": 67.0}
    measured = {"failed": "why"} if ms is None else {"ms": ms} | share
    place = {"kernel": "adamw", "shape": {"N": 4}, "pass": "step", "program": program}
    return place | measured | other


def test_lines_of_the_table():
    rows = [
        row("triton", 0.2), row("eager", 1.0), row("torch.compile", None), row("AdamW fused", 0.3),
        row("triton", 0.1, **{"pass": "both"}),
    ]  # fmt: skip
    bench.add_ratio(rows[:4])
    assert rows[0]["best_rival"] == "AdamW fused" and rows[0]["ratio"] == pytest.approx(1.5)
    wanted = """
adamw, step: N 4
    triton              0.200 ms   3000 GB/s      80%       67 MiB    1.50 x AdamW fused
    eager               1.000 ms   3000 GB/s      80%       67 MiB
    torch.compile   did not run: why
    AdamW fused         0.300 ms   3000 GB/s      80%       67 MiB
adamw, both: N 4
    triton              0.100 ms   3000 GB/s      80%       67 MiB"""
    assert bench.lines(rows) == wanted.strip().splitlines()
    failed = [row("triton", None), row("eager", 1.0)]
    bench.add_ratio(failed)
    alone = [row("triton", 1.0), row("eager", None)]
    bench.add_ratio(alone)
    assert "ratio" not in failed[0] | alone[0]


def attention(T, D, which, **ms):
    place = {"kernel": "attention", "shape": bench.heads(2, T, 8, 8, D), "pass": which}
    return [row(name.replace("_", " "), t) | place for name, t in ms.items()]


def test_targets_on_made_up_measurements():
    rows = [
        *attention(512, 64, "forward", triton=9.0, SDPA_flash=1.0),
        *attention(512, 64, "both", triton=2.0, eager=1.0, SDPA_flash=3.0, SDPA_cudnn=2.0),
        *attention(4096, 64, "both", triton=2.0, SDPA_flash=1.69, SDPA_cudnn=None),
        *attention(512, 128, "both", triton=9.0, SDPA_flash=1.0),
        row("triton", 1.0, share=0.84), row("AdamW fused", None),
    ]  # fmt: skip
    for name, (compiled, share) in {"cross_entropy": (1.5, 0.85), "swiglu": (9.0, 0.79)}.items():
        rows += [
            row("triton", 1.0, kernel=name, share=share),
            row("torch.compile", compiled, kernel=name),
        ]
    found = [(v["verdict"], v["target"].split(",")[0], v["value"]) for v in bench.judge(rows)]
    assert found == [
        ("met", "attention", 1.0),
        ("missed", "attention", pytest.approx(0.845)),
        ("met", "cross_entropy", 0.85),
        ("met", "cross_entropy", 1.5),
        ("not measured", "rmsnorm", None),
        ("missed", "swiglu", 0.79),
        ("not measured", "rope", None),
        ("missed", "adamw", 0.84),
        ("not measured", "adamw", None),
    ]
    printed = [bench.verdict_line(v) for v in bench.judge(rows)]
    place = "attention, both: B 2, T 4096, H 8, G 8, D 64"
    assert printed[1] == f"  missed        {place}: 0.845, wanted 0.850 x SDPA"
    assert printed[4] == "  not measured  rmsnorm: wanted 80.0% of the copy rate"


def test_targets_name_kernels_and_rivals_that_exist():
    for name, where, against, _ in bench.TARGETS:
        kernel = BY_NAME[name]
        assert any(where.items() <= (s | {"pass": "both"}).items() for s in kernel.timed)
        rivals = ["share", "torch.compile", *kernel.rivals]
        assert any(rival.startswith(against) for rival in rivals)
        quick = kernel.timed[: kernel.quick]  # --quick answers each target
        assert any(where.items() <= (s | {"pass": "both"}).items() for s in quick)
