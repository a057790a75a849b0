"""Kernels compiled for cards, which needs none: what Triton's interpreter lets pass, its compiler may not."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from trl.ops import triton_gate, triton_head, triton_rotary
from trl.rollouts import fused, triton_decode

CARDS = {75: 64, 86: 99, 90: 227, 100: 227, 120: 99}  # compute capability → KiB of shared memory of a program
WHOLE, IDS = "*fp32", "*i64"


def compiled(kernel, types, warps=4, **constants):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values)
    found = triton.compile(source, target=GPUTarget("cuda", card, 32), options={"num_warps": warps})
    assert found.metadata.shared <= CARDS[card] * 2**10, (card, kernel.fn.__name__, found.metadata.shared)


for card in CARDS:
    half = "*fp16" if card < 80 else "*bf16"
    every = dict.fromkeys(("gate", "up", "grad", "gate_out", "up_out", "product_out"), half)
    for activation in ("silu", "tanh"):
        options = dict(ACTIVATION=activation, BLOCK=1024)
        compiled(triton_gate._gate_backward_kernel, every, PRODUCT=True, **options)
        compiled(triton_gate._gate_kernel, dict(gate=half, up=half, out=half), **options)
    rotated = dict(query=half, key=half, cos=WHOLE, sin=WHOLE, query_out=half, key_out=half)
    for backward in (False, True):
        options = dict(QUERY_HEADS=14, KEY_HEADS=2, HALF=32, WIDTH=32, BACKWARD=backward)
        compiled(triton_rotary._rotate_kernel, rotated, **options)
    numbers = dict.fromkeys(("scale", "softcap", "inverse_temperature"), "fp32")
    for bias in (None, WHOLE):
        options = dict(HAS_BIAS=bias is not None, CAPPED=bias is not None, BLOCK=4096, warps=8)
        options |= dict(bias=None) if bias is None else {}
        types = dict(logits=WHOLE, bias=bias, target=IDS, state=WHOLE, factors=WHOLE, **numbers)
        compiled(triton_head._accumulate_kernel, types, **options)
        compiled(triton_head._gradient_kernel, types | dict(out="*fp16"), ENTROPY=bias is not None, **options)
    if card < 80:  # decode steps run without kernels
        continue
    normed = dict(x=WHOLE, weight=WHOLE, out=half, epsilon="fp32")
    compiled(fused._norm_kernel, normed, OFFSET=0.0, ROUNDS=True, WIDTH=1024)
    tables = dict(pages=IDS, prefix=IDS, own=IDS, tiles=IDS)
    written = dict(keys=half, values=half, key=half, value=half, **tables)
    compiled(triton_decode._write_kernel, written, HEADS=2, SIZE=64, VALUE_SIZE=64, PAGE=64, WIDTH=64)
    parts = dict(query=half, keys=half, values=half, out=WHOLE, normalizer=WHOLE, scale="fp32", softcap="fp32", **tables)
    for group, size in ((7, 64), (4, 128), (4, 256)):
        compiled(
            triton_decode._parts_kernel, parts,
            TILE=8, GROUP=group, HEADS=2, SIZE=size, VALUE_SIZE=size, WIDTH=size, VALUE_WIDTH=size,
            QUERIES=triton.next_power_of_2(8 * group), PAGE=64, PROMPT_PARTS=8, PARTS=10, WINDOW=0, CAPPED=False,
            PRECISION="tf32",
        )
    merged = dict(parts=WHOLE, normalizer=WHOLE, sinks=half, prefix=IDS, out=half)
    compiled(
        triton_decode._merge_kernel, merged,
        ALL_HEADS=14, VALUE_SIZE=64, VALUE_WIDTH=64, PARTS=10, PARTS_WIDTH=16, PROMPT_PARTS=8, SINK=False,
    )
"""


@pytest.mark.long
def test_kernels_compile_for_cards_from_turing_to_blackwell():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
