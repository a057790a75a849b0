"""Memory by tracing: sizes counted by hand, and the process's own size."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from trl.models.memory import (
    ACTIVATIONS,
    GRADIENTS,
    OPTIMIZER,
    WEIGHTS,
    cache_bytes,
    peak_parts,
    take_shape,
    trace_step,
    tracing,
)


def test_two_matrices_by_hand():
    """y = W₂ relu(W₁ x), x [100,8], W₁ [32,8], W₂ [4,32]: float32, no biases.

    Backward keeps relu's output (which W₂ reads, and which tells where relu passed): 100·32. The most is alive in
    backward when the gradient of relu's input is made from that of its output: two more of 100·32, with W₂'s gradient.
    """
    model = nn.Sequential(nn.Linear(8, 32, bias=False), nn.ReLU(), nn.Linear(32, 4, bias=False))
    inputs = torch.zeros(100, 8)
    with tracing(vocabulary=99) as trace:
        take_shape(model, torch.device("cpu"))
        trace.mark(model.parameters(), WEIGHTS)
        step = lambda: model(inputs).sum().backward()  # noqa: E731
        trace_step(trace, model, step, state_sizes=lambda p: [p.nbytes, p.nbytes])
    parts = peak_parts(trace.events, trace.part)
    weights = 4 * (32 * 8 + 4 * 32)
    assert parts[WEIGHTS] == weights
    assert parts[OPTIMIZER] == 2 * weights
    assert parts[GRADIENTS] == 4 * 4 * 32
    assert 4 * 100 * 32 * 3 <= parts[ACTIVATIONS] <= 4 * 100 * (32 * 3 + 8 + 4 + 1) + 64


def test_an_update_that_asks_for_more_than_backward_is_the_peak():
    """Weights, gradients and Adam's two moments of 8 · 8 numbers, and the roots of one of them."""
    model, inputs = nn.Linear(8, 8, bias=False), torch.zeros(1, 8)
    with tracing(vocabulary=99) as trace:
        take_shape(model, torch.device("cpu"))
        trace.mark(model.parameters(), WEIGHTS)
        step = lambda: model(inputs).sum().backward()  # noqa: E731
        trace_step(trace, model, step, state_sizes=lambda p: [p.nbytes, p.nbytes], scratch=4 * 64)
    parts = peak_parts(trace.events, trace.part)
    assert (parts[WEIGHTS], parts[GRADIENTS], parts[OPTIMIZER]) == (256, 256, 3 * 256)


def test_tied_weights_count_once():
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    sizes = {}
    for tied in (True, False):
        config.tie_word_embeddings = tied
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        with tracing(50) as trace:
            take_shape(model, torch.device("cpu"))
            trace.mark(model.parameters(), WEIGHTS)
        sizes[tied] = peak_parts(trace.events, trace.part)[WEIGHTS]
    assert sizes[False] - sizes[True] == 4 * 50 * 16


def test_activations_of_a_llama_grow_with_layers_and_tokens():
    """One more layer of H = 16, I = 32 and S = 40 tokens keeps at least 4H + 2H + H + 2KD + H + 4I numbers per token."""

    def activations(layers: int, tokens: int) -> int:
        widths = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=layers, **widths))
        with tracing(50) as trace:
            take_shape(model, torch.device("cpu"))
            trace.mark(model.parameters(), WEIGHTS)
            ids = torch.zeros(1, tokens, dtype=torch.long)
            before = sum(event.size for event in trace.events)
            hidden = model.model(ids).last_hidden_state
            assert hidden.shape == (1, tokens, 16)
            return sum(event.size for event in trace.events) - before

    layer = activations(3, 40) - activations(2, 40)
    by_hand = 4 * 40 * (4 * 16 + 2 * 16 + 16 + 2 * 16 + 16 + 4 * 32)
    assert by_hand <= layer <= 1.3 * by_hand
    assert activations(3, 80) - activations(2, 80) == pytest.approx(2 * layer, rel=0.01)


def test_cache_by_hand():
    """2 (keys, values) · 2 bytes · 3 layers · 2 heads of 8 · 5 sequences of 7 tokens."""
    widths = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(num_hidden_layers=3, **widths)
    assert cache_bytes(config, sequences=5, tokens=7, bytes_per_number=2) == 2 * 2 * 3 * 16 * 35


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="the size of a process is read from /proc")
def test_a_model_of_15m_parameters_takes_what_was_estimated_or_up_to_twice_that(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from memory import compare

    found = compare("llama-15m", "sft", tmp_path)
    assert 0.5 <= found.ratio <= 1.2, found
