"""Attention of variable length: the runs that a layout comes to, and the numbers of models that attend by them."""

import pytest
import torch

from trl.data.layout import lay_out, spans_of
from trl.errors import ModelError
from trl.models import layouts, varlen
from trl.models.checkpointing import checkpoint_activations
from trl.models.layouts import choose_layout
from trl.models.score import prepare_scoring, score
from trl.models.varlen import VARLEN, attend, by_runs, no_mask, switch
from trl.types import Completion, Example, Spans

EXAMPLES = (
    Example([5, 6, 7, 8, 9, 10, 11, 12, 13, 14], (Completion([20, 21, 22]), Completion([23]), Completion([24, 25]))),
    Example([], (Completion([30, 31, 32, 33, 34]),)),
    Example([40, 41], (Completion([42, 43, 44, 45]), Completion([46, 47]))),
)


def plain_varlen(query, key, value, query_starts, key_starts, max_q, max_k, *, scale, window_size, enable_gqa=None):
    """What the documentation of PyTorch's kernel says of the same call, query by query, in float64.

    `enable_gqa` is there from torch 2.12 on.
    """
    assert query_starts.dtype == key_starts.dtype == torch.int32
    assert (query_starts.diff() <= max_q).all()
    assert (key_starts.diff() <= max_k).all()
    assert enable_gqa in (None, query.shape[1] != key.shape[1])
    left, right = window_size
    group, out = query.shape[1] // key.shape[1], []
    for run in range(len(query_starts) - 1):
        (q0, q1), (k0, k1) = (x[run : run + 2].tolist() for x in (query_starts, key_starts))
        for q in range(q0, q1):
            last = k1 - (q1 - q) + right
            first = k0 if left < 0 else max(k0, k1 - (q1 - q) - left)
            k, v = (x[first : last + 1].double().repeat_interleave(group, 1) for x in (key, value))
            weights = torch.einsum("hd,khd->hk", query[q].double(), k).mul(scale).softmax(-1)
            out.append(torch.einsum("hk,khd->hd", weights, v))
    return torch.stack(out).to(query.dtype)


@pytest.fixture
def by_plain_kernel(monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", plain_varlen)
    monkeypatch.setattr(varlen, "_has_kernel", lambda query, value: True)


def test_runs_of_a_shared_row_by_hand():
    # A prompt of two tokens with branches of one and two; then a sequence without a prompt; then padding.
    sequence = torch.tensor([[0, 0, 0, 0, 0, 1, 1, -1]]).numpy()
    branch = torch.tensor([[0, 0, 1, 2, 2, 1, 1, 0]]).numpy()
    spans = spans_of(sequence, branch)
    assert spans.query_starts.tolist() == [0, 2, 3, 5, 7, 8]
    assert spans.key_starts.tolist() == [0, 2, 5, 9, 11, 12]
    assert spans.keys.tolist() == [0, 1, 0, 1, 2, 0, 1, 3, 4, 5, 6, 7]
    assert (spans.longest_query, spans.longest_key) == (2, 4)


def test_runs_of_packed_rows_are_their_sequences():
    spans = lay_out(EXAMPLES, "packed", capacity=20, spans=True).spans
    assert spans.keys is None
    assert torch.equal(spans.query_starts, spans.key_starts)
    assert lay_out(EXAMPLES, "padded", spans=True).spans is None
    assert lay_out(EXAMPLES, "packed").spans is None


@pytest.mark.parametrize("kernel", [True, False], ids=["the kernel's call", "run by run"])
@pytest.mark.parametrize("layout", ["packed", "shared"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma3"])
def test_numbers_and_gradients_are_those_of_padded_rows(request, make_model, name, layout, kernel):
    """Gemma 3 has windows of 8 tokens."""
    model = make_model(name)
    prepare_scoring(model)
    expected = score(model, lay_out(EXAMPLES), want=["entropy"])
    (expected.logprobs.sum() + expected.entropy.sum()).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    if kernel:
        request.getfixturevalue("by_plain_kernel")
    switch(model, VARLEN)
    found = score(model, lay_out(EXAMPLES, layout, capacity=23, spans=True), want=["entropy"])
    (found.logprobs.sum() + found.entropy.sum()).backward()
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=2e-5, rtol=1e-5)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[n], atol=1e-4, rtol=1e-3)


def test_a_switched_model_without_spans_attends_as_sdpa(make_model):
    model = make_model("llama")
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    expected = model(input_ids=ids, attention_mask=mask).logits
    shared = score(model, batch := lay_out(EXAMPLES, "shared", capacity=23)).logprobs
    switch(model, VARLEN)
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, expected)
    torch.testing.assert_close(score(model, batch).logprobs, shared)


def test_a_model_that_is_not_switched_reads_no_spans(make_model):
    model = make_model("llama")
    batch = lay_out(EXAMPLES, "shared", capacity=23, spans=True)
    torch.testing.assert_close(score(model, batch).logprobs, score(model, lay_out(EXAMPLES)).logprobs)


def test_checkpointing_finds_the_spans_again(make_model, by_plain_kernel):
    model = make_model("llama")
    switch(model, VARLEN)
    batch = lay_out(EXAMPLES, "shared", capacity=23, spans=True)
    score(model, batch).logprobs.sum().backward()
    plain = model.lm_head.weight.grad.clone(), model.model.layers[0].mlp.up_proj.weight.grad.clone()
    model.zero_grad()
    model.train()
    checkpoint_activations(model)
    score(model, batch).logprobs.sum().backward()
    torch.testing.assert_close((model.lm_head.weight.grad, model.model.layers[0].mlp.up_proj.weight.grad), plain)


def test_the_layout_choice_switches_models_over(make_model, monkeypatch, by_plain_kernel):
    monkeypatch.setattr(layouts, "has_varlen", lambda model: True)
    model = make_model("llama")
    assert choose_layout(model, multiple_completions=True) == "shared"
    assert model.config._attn_implementation == "sdpa"
    assert choose_layout(model, multiple_completions=True, half=True) == "shared"
    assert model.config._attn_implementation == VARLEN
    assert "varlen" not in model.config.to_json_string()


def test_a_model_whose_numbers_differ_is_left_as_it_was(make_model, monkeypatch, caplog):
    monkeypatch.setattr(layouts, "has_varlen", lambda model: True)
    monkeypatch.setattr(varlen, "by_runs", lambda query, *rest, **kw: query * 0)
    model = make_model("llama")
    assert choose_layout(model, half=True) == "packed"
    assert model.config._attn_implementation == "sdpa"
    assert "Variable-length attention is not used for LlamaForCausalLM: its results differ" in caplog.text


def test_what_the_call_cannot_do_is_an_error():
    one = torch.zeros(1, 2, 3, 8)
    spans = Spans(torch.tensor([0, 3], dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32), None, 3, 3)
    asked = {"softcap": 5.0, "dropout": 0.1, "s_aux": torch.zeros(2), "position_bias": torch.zeros(1, 2, 3, 3)}
    for (name, value), words in zip(asked.items(), ("soft-cap", "dropout", "sinks", "position bias"), strict=True):
        with pytest.raises(ModelError, match=words):
            attend(torch.nn.Identity(), one, one, one, None, spans=spans, **{name: value})
    with pytest.raises(ModelError, match="keyword spans.*attn_implementation"):
        attend(torch.nn.Identity(), one, one, one, no_mask(one.device))


def test_runs_in_float64_are_the_kernels_call():
    generator = torch.Generator().manual_seed(0)
    spans = lay_out(EXAMPLES, "shared", capacity=23, spans=True).spans
    queries, keys = int(spans.query_starts[-1]), int(spans.key_starts[-1])
    query, key, value = (
        torch.randn(n, h, 8, generator=generator, dtype=torch.double) for n, h in ((queries, 4), (keys, 2), (keys, 2))
    )
    for window in (None, 3):
        ours = by_runs(query, key, value, spans, scale=0.3, window=window)
        bounds = spans.query_starts, spans.key_starts, spans.longest_query, spans.longest_key
        left = -1 if window is None else window - 1
        plain = plain_varlen(query, key, value, *bounds, scale=0.3, window_size=(left, 0), enable_gqa=True)
        torch.testing.assert_close(ours, plain)
