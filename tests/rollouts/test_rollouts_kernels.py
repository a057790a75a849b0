"""Kernels of decoding compiled for a card, which needs none: what Triton's interpreter lets pass, its compiler may not."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from trl.ops import triton_gate, triton_rotary
from trl.rollouts import fused, triton_decode

HALF, WHOLE, IDS = "*bf16", "*fp32", "*i64"


def compiled(kernel, types, **constants):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32)).metadata.shared


every = dict.fromkeys(("gate", "up", "grad", "gate_out", "up_out", "product_out"), HALF)
for activation in ("silu", "tanh"):
    options = dict(ACTIVATION=activation, PRODUCT=True, BLOCK=1024)
    compiled(triton_gate._gate_backward_kernel, every, **options)
    compiled(triton_gate._gate_kernel, dict(gate=HALF, up=HALF, out=HALF), ACTIVATION=activation, BLOCK=1024)
compiled(fused._norm_kernel, dict(x=WHOLE, weight=WHOLE, out=HALF, epsilon="fp32"), OFFSET=0.0, ROUNDS=True, WIDTH=1024)
rotated = dict(query=HALF, key=HALF, cos=WHOLE, sin=WHOLE, query_out=HALF, key_out=HALF)
compiled(triton_rotary._rotate_kernel, rotated, QUERY_HEADS=14, KEY_HEADS=2, HALF=32, WIDTH=32)
tables = dict(pages=IDS, prefix=IDS, own=IDS, tiles=IDS)
written = dict(keys=HALF, values=HALF, key=HALF, value=HALF, **tables)
compiled(triton_decode._write_kernel, written, HEADS=2, SIZE=64, VALUE_SIZE=64, PAGE=64, WIDTH=64)
parts = dict(out=WHOLE, normalizer=WHOLE, scale="fp32", softcap="fp32", **tables)
for group, size in ((7, 64), (4, 128)):
    shared = compiled(
        triton_decode._parts_kernel, parts | dict(query=HALF, keys=HALF, values=HALF),
        TILE=8, GROUP=group, HEADS=2, SIZE=size, VALUE_SIZE=size, WIDTH=size, VALUE_WIDTH=size,
        QUERIES=triton.next_power_of_2(8 * group), PAGE=64, PROMPT_PARTS=8, PARTS=10, WINDOW=0, CAPPED=False,
        PRECISION="tf32",
    )
    assert shared < 99 * 2**10, shared  # what a program may have on the smallest of today's cards
merged = dict(parts=WHOLE, normalizer=WHOLE, sinks=HALF, prefix=IDS, out=HALF)
compiled(
    triton_decode._merge_kernel, merged,
    ALL_HEADS=14, VALUE_SIZE=64, VALUE_WIDTH=64, PARTS=10, PARTS_WIDTH=16, PROMPT_PARTS=8, SINK=False,
)
"""


@pytest.mark.long
def test_kernels_compile_for_a_card():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
