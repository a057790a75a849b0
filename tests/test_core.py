"""Names of `trl.core`: lengths, samples of a fixed number of tokens, and functions of tensors by hand."""

from __future__ import annotations

import pytest
import torch

from trl import core
from trl.errors import ConfigError
from trl.models.value_heads.auto_models import with_value_head


def test_lengths_exclude_the_maximum():
    sample = core.LengthSampler(3, 6)
    assert {sample() for _ in range(200)} == {3, 4, 5}
    with pytest.raises(ConfigError, match=r"LengthSampler\(4, 4\): max_value is exclusive"):
        core.LengthSampler(4, 4)


def test_lengths_follow_the_seed():
    sample = core.LengthSampler(3, 600)
    core.set_seed(5)
    first = [sample() for _ in range(5)]
    core.set_seed(5)
    assert [sample() for _ in range(5)] == first


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_a_response_has_as_many_tokens_as_asked_for(make_model, name):
    model = with_value_head(make_model(name))
    queries = torch.tensor([[5, 6, 7], [8, 9, 10]])
    assert core.respond_to_batch(model, queries).shape == (2, 20)
    assert core.respond_to_batch(model.pretrained_model, queries[:1], txt_len=7, top_k=3).shape == (1, 7)


def test_the_most_likely_token_is_all_that_top_k_one_leaves(make_model):
    model = make_model("llama")
    expected = model.generate(torch.tensor([[5, 6]]), max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(core.respond_to_batch(model, torch.tensor([[5, 6]]), txt_len=5, top_k=1), expected[:, 2:])


def test_functions_of_tensors():
    x, mask = torch.tensor([1.0, 2.0, 3.0, 100.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert core.masked_mean(x, mask) == 2
    assert core.masked_mean(x, mask) == 2
    assert core.masked_mean(x[None], mask[None], axis=1).tolist() == [2]
    assert core.masked_var(x, mask) == 1
    assert core.masked_var(x, mask, unbiased=False).item() == pytest.approx(2 / 3)
    assert core.masked_whiten(x, mask).tolist() == pytest.approx([-1, 0, 1, 0])
    assert core.masked_whiten(x, mask, shift_mean=False).tolist() == pytest.approx([1, 2, 3, 0])
    assert core.whiten(x[:3]).tolist() == pytest.approx([-1, 0, 1])
    assert core.clip_by_value(x, torch.tensor([2.0, 2.0, 2.0, 2.0]), 3.0).tolist() == [2, 2, 3, 3]
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25]]))
    assert core.entropy_from_logits(logits).item() == pytest.approx(1.5 * 0.6931472)
    assert core.logprobs_from_logits(logits, torch.tensor([1])).exp().item() == pytest.approx(0.25)
    assert core.logprobs_from_logits(logits, torch.tensor([1]), gather=False).shape == (1, 3)


def test_dicts():
    assert core.flatten_dict({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a/b": 1, "a/c/d": 2, "e": 3}
    stacked = core.stack_dicts([{"x": torch.tensor([1.0, 2.0])}, {"x": torch.tensor([3.0])}])["x"]
    assert stacked.nan_to_num(-1).tolist() == [[1, 2], [3, -1]]
