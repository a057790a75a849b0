"""The estimate of memory: what a trainer's heaviest step holds, as it runs on this device and as it would run on CUDA."""

from __future__ import annotations

import sys
from dataclasses import replace
from math import ceil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers.models.llama import modeling_llama

from tests.conftest import MODELS, make_tokenizer
from trl import SFTConfig, SFTTrainer
from trl.cli.estimate import LIBRARIES, MemoryEstimate, estimate_memory, planned
from trl.cli.preview import without_weights
from trl.data.layout import lay_out
from trl.models.fused import fuse, restoring_rotations
from trl.models.half_weights import round_together
from trl.models.memory import ACTIVATIONS, GRADIENTS, OPTIMIZER, WEIGHTS, take_shape, tracing
from trl.models.score import prepare_scoring, score
from trl.models.varlen import VARLEN, switch
from trl.trainers.activation_plan import FRAGMENTATION
from trl.types import Completion, Example

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from as_on_cuda import as_on_cuda

ROWS = [{"input_ids": [6] * 16}] * 4


def estimated(tmp_path, *, bits=None, peft_config=None, rows=ROWS, **options) -> MemoryEstimate:
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_length=None, **options)
    with torch.device("meta"):
        model = MODELS["llama"]()
    keywords = {"train_dataset": Dataset.from_list(rows), "processing_class": make_tokenizer()}
    trainer = without_weights(SFTTrainer)(model=model, args=args, peft_config=peft_config, **keywords)
    return estimate_memory(trainer, quantised_bits=bits)


def test_the_heaviest_step_has_the_longest_rows_with_all_their_documents(tmp_path):
    """Two packed rows of 16 + 32 tokens are a step of four documents, and heavier than rows of 48 and 16 tokens."""
    documents = [{"input_ids": [6] * n} for n in (16, 32, 16, 32)]
    apart = estimated(tmp_path, rows=documents, per_device_train_batch_size=4, layout="packed")
    light = {"input_ids": [6] * 16, "seq_lengths": [16]}
    packed = {"input_ids": [6] * 48, "seq_lengths": [16, 32]}
    together = estimated(tmp_path, rows=[light, packed, light, packed], per_device_train_batch_size=2, layout="packed")
    assert together.parts == {**apart.parts, "libraries": together.parts["libraries"]}


def test_a_4_bit_model_by_hand(tmp_path):
    """Frozen matrices of two layers of H = 32, I = 48 and 16 for keys and values in half a byte and a scale for every 64; the
    rest, and an adapter of rank 2 on q and v, in float32."""
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    matrices = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48)
    rest, trained = 2 * 99 * 32 + 5 * 32, 2 * 2 * (2 * 32 + 32 + 16)
    rotation = modeling_llama.apply_rotary_pos_emb
    with as_on_cuda():
        parts = estimated(tmp_path, bits=4, peft_config=adapter, bf16=True).parts
    assert modeling_llama.apply_rotary_pos_emb is rotation, "a trial without values left a kernel to all models"
    buffers = parts[WEIGHTS] - matrices * 9 // 16 - 4 * (rest + trained)
    assert 0 <= buffers <= 64  # frequencies of the rotary embedding
    assert parts[OPTIMIZER] == 2 * 4 * trained


def test_where_layers_are_replayed_all_gradients_are_there_at_the_peak(tmp_path):
    """Graphs add to gradients that keep their memory; without them they come while activations go."""
    rows = [{"input_ids": [6] * 200}] * 4
    with as_on_cuda():
        replayed, plain = (estimated(tmp_path, rows=rows, bf16=True, cuda_graphs=on).parts for on in (None, False))
    weights = sum(p.numel() for p in MODELS["llama"]().parameters())
    assert replayed[GRADIENTS] == 4 * weights
    assert plain[GRADIENTS] < 4 * weights
    # Rows of 4 · 200 = 800 tokens are filled up to 832.
    assert 1.02 < replayed[ACTIVATIONS] / plain[ACTIVATIONS] < 1.06


def activations(layers: int, tokens: int) -> int:
    """Bytes kept for backward by a forward under autocast, as on CUDA."""
    with as_on_cuda(), torch.device("meta"):
        model = MODELS["llama"](num_hidden_layers=layers)
    batch = lay_out([Example([5] * (tokens - 4), (Completion([6] * 4),))], "packed", capacity=tokens, spans=True)
    with as_on_cuda(), restoring_rotations(model), tracing(99) as trace:
        take_shape(model, torch.device("cpu"))
        trace.mark(model.parameters(), WEIGHTS)
        fuse(model)
        switch(model, VARLEN)
        round_together(model)
        prepare_scoring(model)
        with torch.autocast("cpu", torch.bfloat16):
            held = score(model, batch.map(lambda x: torch.empty(x.shape, dtype=x.dtype)))
        assert held.logprobs.requires_grad
        return sum(event.size for event in trace.events)


def test_what_a_layer_keeps_of_a_token_on_cuda():
    """H = 32, I = 48, A = 4 heads, KD = 16, in bytes: inputs of two norms in float32 with a factor each, five rounded inputs
    of q, k, v, gate and up; q, k, v, and attention's output with a float32 for each head; gate, its SiLU, up, their product."""
    by_hand = 2 * (4 * 32 + 4) + 5 * 2 * 32 + 2 * (32 + 2 * 16 + 32) + 4 * 4 + 4 * 2 * 48
    layer = [activations(3, tokens) - activations(2, tokens) for tokens in (40, 80)]
    assert layer[1] - layer[0] == 40 * by_hand


def test_the_check_plans_which_layers_are_checkpointed_as_training_will(tmp_path):
    """Between all activations and none, in proportion; what is there anyway (weights) is not what a step takes."""

    def make():
        args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_length=None)
        args.plans_checkpointing = True
        with torch.device("meta"):
            model = MODELS["llama"](num_hidden_layers=4)
        rows = Dataset.from_list([{"input_ids": [6] * 64}] * 4)
        return without_weights(SFTTrainer)(
            model=model, args=args, train_dataset=rows, processing_class=make_tokenizer()
        )

    def with_free(free):
        def estimate(trainer):
            found = estimate_memory(trainer)
            return replace(found, parts=found.parts | {LIBRARIES: 0}, available=free)

        return planned(make(), make, estimate)

    all_kept, plan = with_free(2**40)
    assert plan.what == "kept by all 4 layers"
    there = all_kept.parts[WEIGHTS]
    none_kept, plan = with_free(there)
    assert plan.recomputed == 4
    assert none_kept.parts[ACTIVATIONS] < all_kept.parts[ACTIVATIONS]
    most, least = all_kept.total - there, none_kept.total - there
    between, plan = with_free(there + ceil(FRAGMENTATION * (most + least) / 2))
    assert plan.recomputed == 2
    assert between.parts[ACTIVATIONS] == pytest.approx(
        (all_kept.parts[ACTIVATIONS] + none_kept.parts[ACTIVATIONS]) / 2, abs=1
    )
