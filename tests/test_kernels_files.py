"""Tests of all files of kernels/ as files: what they print where there is no GPU, and no Triton.

Run: python -m pytest tests/test_kernels_files.py
"""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FILES = ["adamw", "attention", "cross_entropy", "linear_cross_entropy", "rmsnorm", "rope", "swiglu"]


def without_errors(line):
    """The rounding errors in it are the machine's own."""
    return re.sub(r"\b\d(\.\d)?e[-+]\d\d", "~", line.strip())


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure for a while")
@pytest.mark.parametrize("name", FILES)
def test_file_runs_without_a_gpu_and_prints_what_its_docstring_says(name, run_file):
    path = ROOT / "kernels" / f"{name}.py"
    done = run_file(path)
    assert done.returncode == 0, done.stderr
    docstring = path.read_text().split('"""')[1]
    documented = re.split(r"prints(?:, from\s+seed 0,)?\n\n", docstring)[1].strip().splitlines()
    printed = done.stdout.strip().splitlines()
    assert [*map(without_errors, printed)] == [*map(without_errors, documented)]


CALLS = """
import sys
sys.path.append({root!r})
if {block}: sys.modules["triton"] = None
import torch
from kernels import adamw, attention, cross_entropy, linear_cross_entropy, rmsnorm, rope, swiglu
x, y = torch.ones(4, 4), torch.arange(4)
heads = x[None, :, None]
for f, *arguments in (
    (adamw.grad_norm, [x]),
    (adamw.adamw_step, [x], [x], [x], [x]),
    (attention.attention, heads, heads, heads),
    (cross_entropy.cross_entropy, x, y),
    (linear_cross_entropy.linear_cross_entropy, x, x, y),
    (rmsnorm.rmsnorm, x, x[0], 1e-6),
    (rope.rope, heads, heads, x[:, :2], x[:, :2]),
    (rope.rope_qkv, heads.expand(1, 4, 3, 4), x[:, :2], x[:, :2], 1, 1),
    (swiglu.swiglu, x),
):
    options = {{"lr": 0.1, "step": 1}} if f is adamw.adamw_step else {{}}
    f(*arguments, **options)  # the reference needs nothing
    try:
        f(*arguments, **options, implementation="triton")
    except Exception as error:
        print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    "block, message",
    [
        (True, "ImportError implementation='triton' needs Triton: pip install triton"),
        (False, r"ValueError .*\bdevice='?cpu'? must be a GPU[,;] .* TRITON_INTERPRET=1"),
    ],
    ids=["no triton", "no GPU"],
)
def test_all_files_say_what_is_missing(block, message, run_file, tmp_path):
    program = tmp_path / "calls.py"
    program.write_text(CALLS.format(root=str(ROOT), block=block))
    done = run_file(program)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 9
    for line in lines:
        assert re.match(message, line), line


@pytest.mark.parametrize("command", ["bench.py", "aot.py"])
def test_json_into_no_folder_is_one_line_before_anything_is_measured(command, run_file):
    done = run_file(ROOT / "kernels" / command, "--json", "/no/such/a.json")
    assert done.returncode == 2 and "no folder /no/such" in done.stderr and done.stdout == ""


@pytest.mark.parametrize("content", ["", "{", '{"3.9.0": ['], ids=["empty", "cut", "cut later"])
def test_json_that_is_damaged_is_told_before_anything_is_compiled(content, run_file, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(content)
    done = run_file(ROOT / "kernels" / "aot.py", "--json", path)
    assert done.returncode == 2 and f"{path} is damaged" in done.stderr and done.stdout == ""
    assert path.read_text() == content
