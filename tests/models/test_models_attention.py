"""Models whose layers have windows of attention run in every layout, with windows shorter than the sequences."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.conftest import WIDTHS
from trl.data.layout import lay_out
from trl.models import attention
from trl.models.attention import layer_masks, layer_windows, other_layers, segment_mask
from trl.models.layouts import choose_layout, why_not
from trl.models.score import score
from trl.types import Completion, Example

HEADS = {**WIDTHS, "head_dim": 8, "sliding_window": 5}
TWO = {"layer_types": ["sliding_attention", "full_attention"]}
MODELS = {
    "gemma2": lambda **kw: Gemma2ForCausalLM(Gemma2Config(**HEADS, **kw)),
    "gemma3": lambda **kw: Gemma3ForCausalLM(Gemma3TextConfig(**HEADS, **TWO, **kw)),
    "mistral": lambda **kw: MistralForCausalLM(MistralConfig(**HEADS, **kw)),
    "qwen3": lambda **kw: Qwen3ForCausalLM(Qwen3Config(**HEADS, use_sliding_window=True, **TWO, **kw)),
    "olmo3": lambda **kw: Olmo3ForCausalLM(Olmo3Config(**HEADS, **TWO, **kw)),
    "gpt-oss": lambda **kw: GptOssForCausalLM(
        GptOssConfig(**HEADS, **TWO, num_local_experts=2, num_experts_per_tok=1, **kw)
    ),
}
REFUSED = {("gpt-oss", "packed")}
"""Its masks do not look at positions."""
PAIR = Example([10, 11, 12, 13, 14, 15, 16], (Completion([20, 21, 22]), Completion([30, 31, 32, 33, 34, 35, 36])))
TEXT = Example([], (Completion(list(range(40, 52))),))


def make(name: str, **options):
    torch.manual_seed(0)
    model = MODELS[name](**options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model


@pytest.mark.parametrize(
    ("name", "kernel"), [*((name, "eager") for name in MODELS), ("qwen3", "sdpa"), ("gemma3", "sdpa")]
)
def test_layouts_equal_plain_forwards(name, kernel):
    """Windows of 5 in sequences of up to 14 tokens: log-probabilities and gradients."""
    layouts = [layout for layout in ("padded", "packed", "shared") if (name, layout) not in REFUSED]
    model = make(name, attn_implementation=kernel)
    found = {layout: scored(model, layout) for layout in layouts}
    plain = model(torch.tensor([[*PAIR.prompt, *PAIR.completions[1].ids]])).logits[0].log_softmax(-1)
    expected = torch.stack([plain[6 + t, token] for t, token in enumerate(PAIR.completions[1].ids)])
    for layout, (logprobs, gradients) in found.items():
        torch.testing.assert_close(logprobs[1, :7], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logprobs, found["padded"][0], rtol=1e-4, atol=1e-4)
        for mine, theirs in zip(gradients, found["padded"][1], strict=True):
            scale = theirs.abs().max().item()
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=layout)


def scored(model, layout: str) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Log-probabilities, and the gradients of a weighted sum of them."""
    logprobs = score(model, lay_out([PAIR, TEXT], layout, capacity=30)).logprobs
    weighted = (logprobs * torch.linspace(0, 1, logprobs.shape[1])).sum()
    return logprobs, torch.autograd.grad(weighted, list(model.parameters()))


@pytest.mark.parametrize("name", MODELS)
def test_they_get_the_shared_layout(name):
    model = make(name, attn_implementation="eager")
    assert choose_layout(model, multiple_completions=True) == "shared"
    assert ["differ" in why_not(model, "packed")] == [(name, "packed") in REFUSED]
    assert model.config.sliding_window == 5


def test_a_trial_sees_windows_that_are_longer_than_itself(monkeypatch):
    """With masks that know no windows, a model is found out however long its own are."""
    model = MODELS["gemma2"](attn_implementation="eager")
    model.config.sliding_window = 4096
    assert not why_not(model, "shared")
    monkeypatch.setattr(attention, "layer_windows", lambda config: {"full_attention": None, "sliding_attention": None})
    assert "its results differ" in why_not(model, "shared")
    assert model.config.sliding_window == 4096


def test_windows_by_hand():
    batch = lay_out([PAIR, TEXT], "shared", capacity=30)
    near = segment_mask(batch.segments, 3)[0, 0]
    seen = {i: row.nonzero().flatten().tolist() for i, row in enumerate(near[:17])}
    assert seen[6] == [4, 5, 6]
    assert seen[7] == [5, 6, 7]  # the first token of the first completion
    assert seen[10] == [5, 6, 10]  # that of the second: the same distance to the prompt
    assert seen[12] == [10, 11, 12]
    everything = segment_mask(batch.segments)[0, 0]
    assert (near <= everything).all()
    assert everything[12].nonzero().flatten().tolist() == [*range(7), 10, 11, 12]


def test_one_mask_for_each_kind_of_layer():
    segments = lay_out([PAIR], "shared").segments
    masks = layer_masks(make("gemma3").config, segments, torch.float32)
    assert set(masks) == {"full_attention", "sliding_attention"}
    assert masks["full_attention"].sum() > masks["sliding_attention"].sum()
    assert layer_windows(make("mistral").config) == {"sliding_attention": 5}
    assert layer_masks(make("mistral").config, segments, torch.float32).shape == (1, 1, 17, 17)
    assert layer_windows(MistralConfig(**WIDTHS, sliding_window=None)) == {"full_attention": None}
    assert other_layers(Qwen3Config(**WIDTHS, layer_types=["linear_attention", "full_attention"])) == [
        "linear_attention"
    ]


# ---- blocks of flex attention ----


@pytest.mark.parametrize("window", [None, 1, 130, 400])
def test_blocks_of_flex_attention_are_those_of_the_mask(window):
    """One row of prompts with no, one and several completions; blocks of 128 that are seen in part, and wholly."""
    trees = ((0, [140]), (300, [5, 290, 150]), (1, [1]), (128, [128, 256]), (513, [60]))
    examples = [Example([1] * prompt, tuple(Completion([2] * n) for n in answers)) for prompt, answers in trees]
    segments = lay_out(examples, "shared", capacity=10_000).segments
    mask = segment_mask(segments, window)
    found = attention.SEGMENT_ATTENTION["flex_attention"](segments, window, None, torch.float32)
    length = mask.shape[-1]
    i, j = torch.arange(length)[:, None], torch.arange(length)
    assert torch.equal(found.mask_mod(torch.tensor(0), torch.tensor(0), i, j), mask[0, 0])
    blocks = torch.nn.functional.pad(mask[0, 0], (0, -length % 128) * 2).unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
    some, whole = blocks.any(3).any(1), blocks.all(3).all(1)
    assert whole.any() == (window in (None, 400))
    assert not some.all()
    assert torch.equal(listed(found.kv_num_blocks, found.kv_indices), some & ~whole)
    assert torch.equal(listed(found.full_kv_num_blocks, found.full_kv_indices), whole)
    assert torch.equal(listed(found.q_num_blocks, found.q_indices).T, some & ~whole)


def listed(counts, indices):
    """`[Q,K]`: which blocks are among the first `counts` of `indices`."""
    found = torch.zeros(indices.shape[2:], dtype=torch.bool)
    for row, (count, order) in enumerate(zip(counts[0, 0].tolist(), indices[0, 0].tolist(), strict=True)):
        found[row, order[:count]] = True
    return found
