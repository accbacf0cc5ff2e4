"""Tests of kernels/aot.py, and by it of every kernel: no spills, tensor cores, wide accesses.

Needs no GPU. Run: python -m pytest tests/test_kernels_aot.py
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from kernels import aot

ROOT = Path(__file__).resolve().parents[1]


def run(*command):
    """In a process of its own, where Triton compiles instead of interpreting."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment
    )


def test_every_kernel_compiles_within_the_limits_of_every_target(tmp_path):
    table = tmp_path / "aot.json"
    table.write_text('{"another version": []}')
    child = run("kernels/aot.py", "--json", table)
    assert child.returncode == 0, child.stderr + child.stdout
    tables = json.loads(table.read_text())
    assert tables.keys() == {"another version", triton.__version__}
    rows = tables[triton.__version__]
    assert {row["target"] for row in rows} == set(aot.TARGETS)
    for row in rows:
        assert aot.faults(row) == []
        wide = f"{row['vector16']}/{row['accesses']}"
        line = rf"^{re.escape(row['kernel'])} +{row['target']} +{row['registers']} .*{wide}$"
        assert re.search(line, child.stdout, re.MULTILINE)
    compiled = {row["function"] for row in rows}
    there = set()
    for path in (ROOT / "kernels").glob("*.py"):
        for function in re.findall(r"^@jit\ndef (.*?)^(?=[@\w])", path.read_text(), re.M | re.S):
            if "tl.program_id" in function:  # the others are part of those that have one
                there.add(f"{path.stem}.{function.split('(')[0]}")
    assert there <= compiled and len(there) >= 10
    assert any("wgmma" in row["expect"] for row in rows)


def good(**other):
    return {
        "kernel": "k", "target": "sm_90", "registers": 99, "shared": 1024, "spills": 0,
        "matrix": "wgmma", "accesses": 9, "vector16": 5, "expect": ["vector16", "wgmma"],
    } | other  # fmt: skip


@pytest.mark.parametrize(
    "row, message",
    [
        (good(), None),
        (good(target="sm_80", matrix="mma.sync"), None),
        (good(target="gfx942", matrix="mfma", vector16=0), None),
        (good(expect=[], matrix="", vector16=0), None),
        (good(spills=8), "8 bytes of spills, wanted 0"),
        (good(shared=232_449), "232449 bytes of shared memory, the chip has 232448"),
        (good(target="sm_80", matrix="mma.sync", shared=166_913), "the chip has 166912"),
        (good(target="gfx942", matrix="mfma", shared=65_537), "the chip has 65536"),
        (good(matrix="wgmma mma.sync"), "tensor cores by wgmma mma.sync, wanted wgmma alone"),
        (good(matrix=""), "tensor cores by nothing, wanted wgmma"),
        (good(vector16=0), "none of 9 global accesses has 16 bytes"),
        ({"kernel": "k", "target": "sm_90", "expect": [], "error": "no"}, "does not compile: no"),
    ],
)
def test_faults_are_found_and_named(row, message):
    found = aot.faults(row)
    assert len(found) == (message is not None)
    assert message is None or message in found[0]


BAD_KERNELS = '''
"""Three kernels that must be found out."""
import triton
import triton.language as tl


@triton.jit
def copy(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < N, other=0.0), mask=i < N)


@triton.jit
def many_sums(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < N, other=0.0)
    y = x / tl.sum(x, 0)
    tl.store(y_ptr + i, x * tl.sum(y * x, 0) + y, mask=i < N)


@triton.jit
def product(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, tl.dot(x, x).to(tl.bfloat16))


def case(name, kernel, type, block, expect, num_warps=4, **other):
    return {
        "name": name,
        "kernel": kernel,
        "types": f"{type} {type} i32",
        "launch": {"BLOCK": block, "num_warps": num_warps, "num_stages": 1},
        "expect": expect,
        "targets": ("sm_90",),
    } | other


def aot_cases():
    return [
        case("copy, wide", copy, "*bf16", 1024, {"vector16"}),
        case("copy, N any number", copy, "*bf16", 1024, {"vector16"}, any=("N",)),
        case("too much for its registers", many_sums, "*fp32", 65536, set(), 8),
        case("product of 16 rows", product, "*bf16", 16, {"wgmma"}),
        case("product of 64 rows", product, "*bf16", 64, {"wgmma"}),
        case("wrong type", product, "*i1", 16, set()),
        case("a type too few", product, "*bf16", 16, set(), types="*bf16 *bf16"),
    ]
'''


def test_bad_kernels_end_with_status_1_and_a_line_each(tmp_path):
    """aot.py beside other cases."""
    (tmp_path / "aot_cases.py").write_text(BAD_KERNELS)
    copy = tmp_path / "aot.py"
    copy.write_text(Path(aot.__file__).read_text())
    child = run(copy)
    assert child.returncode == 1
    lines = child.stderr.strip().splitlines()
    failed = [line for line in lines if line.startswith("FAILED")]
    wanted = [
        "a type too few on sm_90: does not compile: zip() argument 2 is shorter",
        "copy, N any number on sm_90: none of 16 global accesses",
        "product of 16 rows on sm_90: tensor cores by mma.sync, wanted wgmma",
        "too much for its registers on sm_90: ",
        "wrong type on sm_90: does not compile",
    ]
    assert len(failed) == len(wanted), child.stderr
    for line, start in zip(failed, wanted):
        assert line.startswith(f"FAILED {start}")
    assert re.search(r"^copy, wide +sm_90 .* 2/2$", child.stdout, re.MULTILINE)


def test_a_compiler_that_aborts_is_named_with_the_kernel_it_died_of(tmp_path):
    (tmp_path / "aot_cases.py").write_text(
        BAD_KERNELS + "\n\nimport os\ntriton.compile = lambda *a, **k: os.abort()\n"
    )
    copy = tmp_path / "aot.py"
    copy.write_text(Path(aot.__file__).read_text())
    child = run(copy)
    assert child.returncode == 1
    assert "FAILED copy, wide on sm_90: the compiler ended with -6" in child.stderr
