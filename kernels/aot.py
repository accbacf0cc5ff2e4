"""What the compilers make of every kernel: registers, shared memory, spills, without a GPU.

Triton compiles for a chip that is not there just as well. What it cannot tell is the time; what it
can tell is most of what makes a kernel slow:

    spills           values that found no register and go to memory and back: none are allowed
    shared memory    what one program claims; a kernel that wants more than the chip has fails at
                     its first launch, not at compilation
    tensor cores     on sm_90 a matrix product has to be wgmma; a tile too small for it falls back
                     to mma.sync at half the rate, silently
    16-byte accesses the widest load or store of one thread; a size or stride that is not known to
                     be a multiple of 16 turns each of them into up to eight
    registers        255 is the most a thread can have; 65,536 on a multiprocessor of sm_80 and
                     sm_90: 128 a thread let 512 threads run there, 64 let 1024

What is compiled stands in aot_cases.py.

Sources: limits of shared memory: CUDA C++ Programming Guide, table of compute capabilities (163 and
227 KiB for one block); AMD CDNA3 ISA, section 3.1 (64 KiB of LDS).

Run: `python kernels/aot.py` (31 s on 2 cores of an AMD EPYC (Zen 5), nothing cached) prints a line
for each kernel and target, and ends with status 1 if a limit or an expectation is not met. `--json
FILE` also writes the table there, under the version of Triton, beside those of other versions.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

try:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
except ImportError:
    sys.exit("kernels/aot.py needs Triton: pip install triton")

# name -> (back end, architecture, threads in a warp, bytes of shared memory for one program)
TARGETS = {
    "sm_80": ("cuda", 80, 32, 163 * 1024),
    "sm_90": ("cuda", 90, 32, 227 * 1024),
    "gfx942": ("hip", "gfx942", 64, 64 * 1024),
}
MATRIX = {"sm_80": "mma.sync", "sm_90": "wgmma", "gfx942": "mfma"}


def compile_case(case: dict, target: str):
    kernel, constants = case["kernel"], dict(case["launch"])
    options = {k: constants.pop(k) for k in ("num_warps", "num_stages") if k in constants}
    given = [name for name in kernel.arg_names if name not in constants]
    signature = dict(zip(given, case["types"].split(), strict=True))
    loose = case.get("any", ())
    multiples = [name for name, kind in signature.items() if kind[0] in "*i" and name not in loose]
    place = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        kernel,
        signature | dict.fromkeys(constants, "constexpr"),
        constexprs={place[name]: value for name, value in constants.items()},
        attrs={place[name]: [["tt.divisibility", 16]] for name in multiples},
    )
    backend, chip, threads, _ = TARGETS[target]
    return triton.compile(source, target=GPUTarget(backend, chip, threads), options=options)


def nvidia_figures(assembly: dict) -> dict:
    """Registers of a thread and bytes of spills, from the machine code; the rest from the PTX."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(assembly["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (
        int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK", "LOCAL")
    )
    ptx = assembly["ptx"]
    matrix = [name for name in ("wgmma.mma_async", "mma.sync") if name in ptx.replace("wmma.", "")]
    vectors = re.findall(r"\b(?:ld|st)\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\s", ptx)
    widths = [int(count or 1) * int(bits) // 8 for count, bits in vectors]
    widths += [int(x, 0) for x in re.findall(r"\bcp\.async\.c[ag]\S* [^;]*?\], (0x\w+|\d+)", ptx)]
    widths += [16] * ptx.count("cp.async.bulk.tensor")  # whole tiles by the copy engine
    return {
        "registers": registers,
        "spills": stack + local,
        "matrix": " ".join(name.split(".mma_")[0] for name in matrix),
        "accesses": len(widths),
        "vector16": sum(width >= 16 for width in widths),
    }


def amd_figures(assembly: dict) -> dict:
    code = assembly["amdgcn"]

    def count(field):
        return int(re.search(rf"\.{field}:\s*(\d+)", code)[1])

    accesses = re.findall(r"\b(?:global|buffer)_(?:load|store)_(\w+)", code)
    return {
        "registers": count("vgpr_count") + count("agpr_count"),
        # scratch memory; scalar registers spill into lanes of vector registers, not into memory
        "spills": count("private_segment_fixed_size"),
        "matrix": "mfma" if "v_mfma" in code else "",
        "accesses": len(accesses),
        "vector16": sum(name.startswith("dwordx4") for name in accesses),
    }


def compile_target(target: str) -> None:
    """Prints, as a line of json each, the name of every case and then what came of it."""
    for case in importlib.import_module("aot_cases").aot_cases():
        if target not in case.get("targets", TARGETS):
            continue
        print(json.dumps(case["name"]), flush=True)
        kernel = case["kernel"]
        function = f"{kernel.__module__}.{kernel.__name__}"
        row = {"kernel": case["name"], "function": function, "target": target}
        row["expect"] = sorted(case.get("expect", {"vector16"}))
        try:
            compiled = compile_case(case, target)
        except Exception as error:  # one kernel's failure is a line of the table
            row["error"] = str(error).strip().splitlines()[-1]
        else:
            figures = nvidia_figures if TARGETS[target][0] == "cuda" else amd_figures
            row |= figures(compiled.asm) | {"shared": compiled.metadata.shared}
        print(json.dumps(row), flush=True)


def start(target: str) -> subprocess.Popen:
    """A process of its own: a compiler that aborts takes the others' lines with it otherwise."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"  # off by default from Triton 3.10 on
    command = [sys.executable, __file__, "--target", target]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def faults(row: dict) -> list[str]:
    """What is wrong with a line of the table, each with the value wanted."""
    if "error" in row:
        return [f"does not compile: {row['error']}"]
    found, target, limit = [], row["target"], TARGETS[row["target"]][3]
    if row["spills"]:
        found.append(f"{row['spills']} bytes of spills, wanted 0")
    if row["shared"] > limit:
        found.append(f"{row['shared']} bytes of shared memory, the chip has {limit}")
    if "wgmma" in row["expect"] and row["matrix"] != MATRIX[target]:
        found.append(f"tensor cores by {row['matrix'] or 'nothing'}, wanted {MATRIX[target]} alone")
    # gfx942's warps have 64 threads: a tile with 16 bytes for each of 32 has 8 for each of them
    if "vector16" in row["expect"] and not row["vector16"] and target != "gfx942":
        found.append(f"none of {row['accesses']} global accesses has 16 bytes")
    return found


def report(rows: list[dict]) -> None:
    version = f"Triton {triton.__version__}"
    print(f"{version:45}target  registers  shared  spills  tensor cores  16-byte")
    for row in rows:
        if "error" not in row:
            wide = f"{row['vector16']}/{row['accesses']}"
            print(
                f"{row['kernel']:45}{row['target']:6}{row['registers']:11}{row['shared']:8}"
                f"{row['spills']:8}  {row['matrix'] or '-':>12}{wide:>9}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description="compiles all kernels for absent chips")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there as well")
    parser.add_argument("--target", choices=TARGETS, help="print this one's lines as json and stop")
    arguments = parser.parse_args()
    if arguments.json is not None and not arguments.json.parent.is_dir():
        parser.error(f"--json {arguments.json}: no folder {arguments.json.parent}; make it first")
    known = {}
    if arguments.json is not None and arguments.json.exists():
        try:
            known = json.loads(arguments.json.read_text())
        except ValueError as error:
            parser.error(f"--json {arguments.json} is damaged ({error}); delete it or name another")
    if arguments.target:
        compile_target(arguments.target)
        return

    rows, failures = [], []
    for target, process in [(target, start(target)) for target in TARGETS]:
        lines = [json.loads(line) for line in process.communicate()[0].splitlines()]
        rows += [line for line in lines if isinstance(line, dict)]
        if process.returncode:
            last = lines[-1] if lines and isinstance(lines[-1], str) else "an import"
            failures.append(f"{last} on {target}: the compiler ended with {process.returncode}")
    rows.sort(key=lambda row: row["kernel"])
    failures += [f"{r['kernel']} on {r['target']}: {fault}" for r in rows for fault in faults(r)]
    report(rows)
    if arguments.json:
        known[triton.__version__] = rows
        text = json.dumps(known).replace('": [{"', '": [\n{"').replace('}, {"', '},\n{"')
        arguments.json.write_text(text + "\n")  # a line for each row
    if failures:
        sys.exit("\n".join(f"FAILED {line}" for line in failures))
    print(f"checked: {len(rows)} compilations, no spills, within the chips' limits")


if __name__ == "__main__":
    main()
