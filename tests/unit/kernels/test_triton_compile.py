"""The Triton kernels, compiled for a GPU that need not be there.

Triton's interpreter runs a program's threads as one, so it cannot see a compile error nor a missing barrier.
"""

import importlib.util
import os
import re

import pytest

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 replaces the compiler"
    ),
]

HOPPER = 90
TYPES = {"bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}
REVERSE_KL_ONLY = ("g_logprob", "g_forward_kl", "g_entropy", "g_jsd", "mixture_kl", "entropy")
CASES = [
    ("statistics", ()),
    ("statistics", ("teacher",)),
    ("mixture", ()),
    ("gradient", ()),
    ("gradient", REVERSE_KL_ONLY),
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def ptx(name, logits, out, *, absent=(), temperature=0.6):
    """The assembly of a kernel for contiguous logits and sizes that are multiples of 16."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_scope.kernels import triton_kernels, triton_tiles

    kernel = getattr(triton_kernels, name)
    wide = "fp64" if logits == "float64" else "fp32"
    constants = {
        "TEMPERATURE": temperature,
        "TEACHER_WEIGHT": 0.3,
        "WIDE": getattr(tl, logits if wide == "fp64" else "float32"),
        "LANES": triton_tiles.LANES,
        "LANE_COLUMNS": triton_tiles.LANE_COLUMNS,
        "COLUMNS": triton_tiles.TILE_COLUMNS,
        **{argument: 1 for argument in kernel.arg_names if argument.endswith("_column")},
        **dict.fromkeys(absent),
    }
    pointers = {"student": logits, "teacher": logits, "out": out}
    types = {argument: f"*{TYPES[dtype]}" for argument, dtype in pointers.items()} | {"targets": "*i64"}
    signature = {
        argument: "constexpr"
        if argument in constants
        else types.get(argument, "i32" if argument.endswith(("start", "num_columns", "_row")) else f"*{wide}")
        for argument in kernel.arg_names
    }
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, argument in enumerate(kernel.arg_names)
        if signature[argument] != "constexpr" and argument != "start"
    }
    constants = {argument: value for argument, value in constants.items() if argument in kernel.arg_names}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", HOPPER, 32),
        options={"num_warps": triton_tiles.NUM_WARPS},
    )
    assert compiled.asm["cubin"]
    return compiled.asm["ptx"]


@pytest.mark.parametrize(("name", "absent"), CASES, ids=str)
@pytest.mark.parametrize("logits", ["bfloat16", "float32"])
def test_every_kernel_compiles_and_reads_contiguous_logits_in_vectors(name, absent, logits):
    code = ptx(name, logits, logits if name == "gradient" else "float32", absent=absent)
    assert "ld.global.v4.b32" in code and "ld.local" not in code


def test_float64_keeps_its_precision():
    """No single-precision arithmetic, which a constant of the wrong type would bring in."""
    code = ptx("gradient", "float64", "float64")
    assert not re.search(r"\b(?:add|mul|div|fma)[.\w]*\.f32\b", code)


@pytest.mark.parametrize("logits", ["float32", "bfloat16"])
def test_the_gradient_reads_a_tile_before_any_thread_writes_it(logits):
    """It may be written over the student's row, where other threads have yet to read."""
    code = ptx("gradient", logits, "bfloat16", absent=REVERSE_KL_ONLY)
    order = re.findall(r"ld\.global\.v4|bar\.sync|st\.global", code)
    assert order.count("bar.sync") == 1 and order[0] == "ld.global.v4" and order[-1] == "st.global"
    barrier = order.index("bar.sync")
    assert set(order[:barrier]) == {"ld.global.v4"} and set(order[barrier + 1 :]) == {"st.global"}


def test_a_lane_of_the_statistics_talks_to_no_other_before_the_rows_end():
    """Each exchange in the loop would be one for every 2048 columns."""
    code = ptx("statistics", "bfloat16", "float32")
    loop_end = max(match.start() for match in re.finditer(r"\bbra\b", code))
    assert "shfl" not in code[:loop_end] and "shfl" in code[loop_end:]
