"""Which kernels aot.py compiles, with which types and sizes: a dictionary each.

Imported by aot.py alone, which runs as a script, so that the files here are found by their names.

    name        a line of the table
    kernel      the function under @jit
    types       of the arguments that are not in launch, in order: "*bf16 *fp32 i32 fp32 ..."
    launch      what a launch gives by name: constexprs, None for a pointer that is left out,
                num_warps, num_stages
    any         optional: integers that need not be multiples of 16; the others, and all pointers,
                are compiled as such (a launch finds out by itself)
    expect      optional: {"wgmma"}: tensor cores, on sm_90 by wgmma alone; {"vector16"}: 16-byte
                accesses on NVIDIA's chips, which is expected if nothing is said
    targets     optional: the chips that this configuration is for; else all

Sizes are those of the 27M model of 03_gpt.py, and larger ones where the code depends on them.
"""

from __future__ import annotations

import itertools

import adamw
import attention
import cross_entropy
import rmsnorm
import rope
import swiglu
import torch


def swiglu_cases() -> list[dict]:
    return [
        {"name": f"swiglu{kernel.__name__}", "kernel": kernel, "types": types,
         "launch": swiglu.TILE}
        for kernel, types in (
            (swiglu._forward, "*bf16 *bf16 i32 i32"),
            (swiglu._backward, "*bf16 *bf16 *bf16 i32 i32"),
        )
    ]  # fmt: skip


def rmsnorm_cases() -> list[dict]:
    """Of a float32 stream into bfloat16, as in training; with a branch added first; wide rows."""
    cases, wide = [], (8192, "*bf16", 1)
    for C, s, branch in ((512, "*fp32", 0), (512, "*fp32", 1), (512, "*bf16", 1), wide):
        r, name = branch * "*bf16", f", C {C}" + branch * " + residual" + f", {s[1:]}"
        forward = f"{s} {r} *fp32 *bf16 {branch * s} *fp32 i32 i32 i32 i32 fp32"
        backward = f"*bf16 {branch * s} {s} *fp32 *fp32 {s} *fp32 i32 i32 i32"
        absent = ({}, {}) if branch else ({"r_ptr": None, "s_ptr": None}, {"ds_ptr": None})
        kernels = (rmsnorm._forward, forward), (rmsnorm._backward, backward)
        for (kernel, types), missing in zip(kernels, absent):
            case = {"name": f"rmsnorm{kernel.__name__}{name}", "kernel": kernel, "types": types}
            cases.append(case | {"launch": rmsnorm._tile(C) | missing})
    return cases


def rope_cases() -> list[dict]:
    """With QK-norm and without."""
    sizes = "i32 i32 i32 i32 i32 fp32"
    cases = []
    for norm in (False, True):
        gains = "*fp32 *fp32 " if norm else ""
        forward = f"*bf16 *fp32 *fp32 {gains}*bf16 *bf16 *bf16 {sizes}"
        x = "*bf16 " if norm else ""  # which backward reads for the norm alone
        backward = f"*bf16 *bf16 *bf16 {x}*fp32 *fp32 {gains}*bf16 *fp32 {sizes}"
        absent = {} if norm else {"q_gain_ptr": None, "k_gain_ptr": None}
        launch = rope._tile(1, 4, 2, 128)[1] | {"H": 4, "G": 2} | absent
        for kernel, types, more in (
            (rope._forward, forward, {}),
            (rope._backward, backward, {} if norm else {"x_ptr": None}),
        ):
            name = f"rope{kernel.__name__}" + (" + QK-norm" if norm else "")
            case = {"name": name, "kernel": kernel, "types": types, "launch": launch | more}
            cases.append(case)
    return cases


def cross_entropy_cases() -> list[dict]:
    """A row in registers of each size, a long one, all options."""
    cases = []
    for V, options in ((4096, 0), (4096, 1), (8192, 1), (16384, 1), (50304, 0), (128256, 1)):
        e, z, softcap = (0.1, 1e-4, 30.0) if options else (0.0, 0.0, 0.0)
        launch = {"SMOOTHING": e, "SHARE": e / V, "Z_LOSS": z, "SOFTCAP": softcap}
        cases.append(
            {
                "name": f"cross_entropy V {V}" + options * ", all options",
                "kernel": cross_entropy._cross_entropy,
                "types": "*bf16 *i64 *fp32 *fp32 *bf16 i32 i32 i32 i32",
                "launch": launch | {"WITH_GRADIENT": True} | cross_entropy.row_tiles(V),
                "any": ("ignore_index",),
            }
        )
    return [
        *cases,
        {
            "name": "cross_entropy scale_rows",
            "kernel": cross_entropy._scale_rows,
            "types": "*bf16 *fp32 i32 i32",
            "launch": cross_entropy.SCALE_TILE,
            "any": ("factors_stride",),
        },
    ]


def adamw_cases() -> list[dict]:
    """The addresses in the table need no attribute."""
    step = {"name": "adamw step", "kernel": adamw._adamw, "launch": adamw.TILE}
    norm = {"name": "adamw grad_norm", "kernel": adamw._square_sum, "launch": adamw.TILE}
    scalars = {"name": "adamw scalars", "kernel": adamw._scalars, "launch": {"num_warps": 1}}
    return [
        step | {"types": "*i64 *fp32 fp32 fp32 fp32 fp32"},
        norm | {"types": "*i64 *fp32"},
        scalars | {"types": "*fp64 *fp64 *fp32 *fp32 fp32 fp32 fp32 fp32", "expect": set()},
    ]


def attention_cases() -> list[dict]:
    """Causal, D 128 and 64; bfloat16 of each chip, float32."""
    tensors = {"forward": "xxxiixf", "dq": "xxxiixfxfxf", "dkv": "xxxiifxfxx"}
    half, single = (torch.bfloat16, "*bf16"), (torch.float32, "*fp32")
    cases = []
    for targets, hopper, (dtype, x), limits, expect in (
        (("sm_90",), True, half, (False, True), {"wgmma", "vector16"}),
        (("sm_80", "gfx942"), False, half, (False, True), {"wgmma", "vector16"}),
        (("sm_80", "sm_90", "gfx942"), False, single, (True,), {"vector16"}),
    ):
        for (name, letters), D, limit in itertools.product(tensors.items(), (128, 64), limits):
            kinds = {"x": x, "i": "*i32" if limit else "", "f": "*fp32"}
            types = [kinds[letter] for letter in letters]
            launch = attention._constants(name, dtype, D, hopper) | {"CAUSAL": True}
            launch |= {"LIMITS": limit} | ({} if limit else {"start": None, "end": None})
            options = (", limits" if limit else "") + (", fp32" if dtype == torch.float32 else "")
            kernel = attention.KERNELS[name]
            cases.append(
                {
                    "name": f"attention{kernel.__name__}, D {D}{options}",
                    "kernel": kernel,
                    "types": " ".join([*types, *9 * ["i32"], "fp32 i32 i32 i32"]),
                    "launch": launch,
                    "any": ("H", "G"),
                    "expect": expect,
                    "targets": targets,
                }
            )
    return cases


def aot_cases() -> list[dict]:
    return [
        *adamw_cases(),
        *attention_cases(),
        *cross_entropy_cases(),
        *rmsnorm_cases(),
        *rope_cases(),
        *swiglu_cases(),
    ]
