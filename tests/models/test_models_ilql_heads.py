"""The heads of ILQL: what they give, and on disk."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

from trl.data.layout import lay_out, lay_out_encoder_decoder
from trl.errors import ConfigError, ModelError
from trl.models.score import score
from trl.models.value_heads.auto_models import with_value_head
from trl.models.value_heads.ilql import (
    AutoModelForCausalLMWithILQLHeads,
    AutoModelForSeq2SeqLMWithILQLHeads,
    load_with_ilql_heads,
    with_ilql_heads,
)
from trl.types import Completion, Example

EXAMPLES = [
    Example([5, 6, 7], (Completion([8, 9, 10]), Completion([11, 12]))),
    Example([20], (Completion([21, 22, 23, 24], mask=[1, 0, 0, 1]),)),
]
WANT = {"value", "q"}


def test_scores_are_what_the_heads_find_of_the_predicting_states(make_model):
    """Against the heads' own layers, over whole `[B,T,V]` Q-values."""
    wrapped = with_ilql_heads(make_model("gpt2"))
    batch = lay_out(EXAMPLES)
    found = score(wrapped, batch, want=WANT)
    with wrapped.v_head.states(wrapped.pretrained_model, {}) as states:
        wrapped.pretrained_model(**batch.inputs)
        hidden = states().flatten(0, 1)[batch.predictor.flatten()].view(*batch.mask.shape, -1)
    heads = wrapped.v_head
    torch.testing.assert_close(found.value, heads(hidden) * batch.mask)
    target = []
    for i, (q, target_q) in enumerate(zip(heads.qs, heads.target_qs, strict=True)):
        values = q(hidden)
        taken = values.gather(-1, batch.target[..., None])[..., 0]
        torch.testing.assert_close(found.extras[f"q_{i}"], taken * batch.mask, rtol=1e-4, atol=1e-6)
        logprobs = values.log_softmax(-1).gather(-1, batch.target[..., None])[..., 0]
        torch.testing.assert_close(found.extras[f"q_logprobs_{i}"], logprobs * batch.mask, rtol=1e-4, atol=1e-6)
        target.append(target_q(hidden).gather(-1, batch.target[..., None])[..., 0])
    least = torch.minimum(*target) * batch.mask
    torch.testing.assert_close(found.extras["target_q"], least, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_layouts_agree(make_model, layout):
    wrapped = with_ilql_heads(make_model("llama"))
    expected, found = (score(wrapped, lay_out(EXAMPLES, each), want=WANT) for each in ("padded", layout))
    for name in expected.extras:
        torch.testing.assert_close(found.extras[name], expected.extras[name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.value, expected.value, rtol=1e-4, atol=1e-5)


def test_an_encoder_decoder_has_them_on_its_decoder(make_model):
    wrapped = with_ilql_heads(make_model("t5"))
    assert isinstance(wrapped, AutoModelForSeq2SeqLMWithILQLHeads)
    batch = lay_out_encoder_decoder(EXAMPLES, pad_token_id=0, decoder_start_token_id=0)
    found = score(wrapped, batch, want=WANT)
    assert set(found.extras) == {"q_0", "q_1", "q_logprobs_0", "q_logprobs_1", "target_q"}
    assert found.value.shape == batch.mask.shape


def test_target_heads_start_as_copies_and_are_never_trained(make_model):
    wrapped = with_ilql_heads(make_model("gpt2"))
    found = score(wrapped, lay_out(EXAMPLES), want=WANT)
    least = torch.minimum(found.extras["q_0"], found.extras["q_1"])
    torch.testing.assert_close(found.extras["target_q"], least)
    assert not found.extras["target_q"].requires_grad
    assert not any(parameter.requires_grad for parameter in wrapped.v_head.target_qs.parameters())


def test_targets_move_by_alpha(make_model):
    wrapped = with_ilql_heads(make_model("gpt2"))
    q, target = wrapped.v_head.qs[0].actions.weight, wrapped.v_head.target_qs[0].actions.weight
    before = target.clone()
    with torch.no_grad():
        q.add_(1.0)
    wrapped.sync_targets(0.25)
    torch.testing.assert_close(target, before + 0.25)
    wrapped.sync_targets(1.0)
    assert torch.equal(target, q)


@pytest.mark.parametrize("two_qs", [True, False])
def test_saved_and_loaded_again(make_model, tmp_path, two_qs):
    wrapped = with_ilql_heads(make_model("gpt2"), two_qs=two_qs)
    with torch.no_grad():
        for parameter in wrapped.v_head.target_qs.parameters():
            parameter.add_(1.0)
    wrapped.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLMWithILQLHeads.from_pretrained(tmp_path, dtype="float32")
    assert loaded.state_dict().keys() == wrapped.state_dict().keys()
    assert len(loaded.v_head.qs) == (2 if two_qs else 1)
    for name, tensor in wrapped.v_head.state_dict().items():
        assert torch.equal(loaded.v_head.state_dict()[name], tensor), name


def test_adapters_are_saved_with_the_heads(make_model, tmp_path):
    base = make_model("gpt2")
    base.save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    wrapped = AutoModelForCausalLMWithILQLHeads.from_pretrained(tmp_path / "base", peft_config=lora, dtype="float32")
    assert wrapped.is_peft_model
    wrapped.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLMWithILQLHeads.from_pretrained(tmp_path / "adapter", dtype="float32")
    assert loaded.is_peft_model
    assert load_with_ilql_heads(str(tmp_path / "adapter"), dtype="float32").is_peft_model
    batch = lay_out(EXAMPLES)
    expected, found = (score(each.eval(), batch, want=WANT) for each in (wrapped, loaded))
    torch.testing.assert_close(found.extras["target_q"], expected.extras["target_q"])


def test_the_head_of_another_method_is_not_taken(make_model, tmp_path):
    with_value_head(make_model("gpt2")).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="saved with a value head but without Q heads"):
        AutoModelForCausalLMWithILQLHeads.from_pretrained(tmp_path)


def test_the_heads_have_no_layers_of_their_own(make_model):
    with pytest.raises(ConfigError, match="num_value_layers=1: ILQL does not support separate value layers"):
        with_ilql_heads(make_model("gpt2")).branch(1)
