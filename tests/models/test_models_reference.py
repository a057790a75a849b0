"""References start as the model that was given, whatever happened to it before."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from trl.data.layout import lay_out
from trl.errors import ModelError
from trl.models.reference import (
    AdapterOff,
    EarlierWeights,
    FrozenModel,
    NamedAdapter,
    create_reference_model,
    make_reference,
)
from trl.models.score import score
from trl.types import Completion, Example

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
EXAMPLES = (
    Example([5, 3, 8], (Completion([4, 9]), Completion([7, 2, 6, 3]))),
    Example([1, 7], (Completion([3, 9, 4]), Completion([8]))),
)


def disturb(model, scale=0.1):
    """Change everything that trains, as training would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))


def logprobs(model):
    with torch.no_grad():
        return score(model, lay_out(EXAMPLES)).logprobs


def adapted(model, **options):
    return get_peft_model(model, LoraConfig(**{**LORA.to_dict(), **options}))


def trained_adapter(make_model):
    model = adapted(make_model("llama"))
    disturb(model)
    return model


def with_two_adapters(make_model):
    model = trained_adapter(make_model)
    model.add_adapter("ref", LORA)
    model.set_adapter("ref")
    disturb(model)
    return model


REFERENCES = {
    "copy": (lambda make: make("llama"), {}, FrozenModel),
    "new adapter": (lambda make: adapted(make("llama")), {"has_new_adapter": True}, AdapterOff),
    "new adapter with biases": (
        lambda make: adapted(make("opt"), bias="all"),
        {"has_new_adapter": True},
        EarlierWeights,
    ),
    "new adapter that takes a part of the base": (
        lambda make: adapted(make("llama"), init_lora_weights="olora"),
        {"has_new_adapter": True},
        EarlierWeights,
    ),
    "trained adapter": (trained_adapter, {}, EarlierWeights),
}


@pytest.mark.parametrize("case", REFERENCES)
def test_stays_the_model_as_given(make_model, case):
    make, options, kind = REFERENCES[case]
    policy = make(make_model)
    given = logprobs(policy)
    reference = make_reference(policy, **options)
    assert isinstance(reference, kind)
    disturb(policy)
    moved = logprobs(policy)
    torch.testing.assert_close(reference.logprobs(policy, lay_out(EXAMPLES)), given)
    assert not torch.allclose(moved, given, atol=1e-3)
    torch.testing.assert_close(logprobs(policy), moved, rtol=0, atol=0, msg="the policy came back changed")


def test_named_adapter(make_model):
    policy = with_two_adapters(make_model)
    expected = logprobs(policy)
    policy.set_adapter("default")
    before = logprobs(policy)
    reference = NamedAdapter("default", "ref")
    torch.testing.assert_close(reference.logprobs(policy, lay_out(EXAMPLES)), expected)
    torch.testing.assert_close(logprobs(policy), before)
    trains = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trains
    assert all(".default." in name for name in trains)


def test_leaves_mode_and_gradients_alone(make_model):
    policy = adapted(make_model("llama"), lora_dropout=0.5).train()
    reference = make_reference(policy, has_new_adapter=True)
    found = [reference.logprobs(policy, lay_out(EXAMPLES)) for _ in range(2)]
    torch.testing.assert_close(*found, rtol=0, atol=0, msg="dropout is on")
    assert policy.training
    assert not found[0].requires_grad
    assert any(p.requires_grad for p in policy.parameters())


def test_temperature(make_model):
    policy = make_model("llama")
    reference = make_reference(policy)
    expected = score(policy, lay_out(EXAMPLES), temperature=0.5).logprobs.detach()
    torch.testing.assert_close(reference.logprobs(policy, lay_out(EXAMPLES), temperature=0.5), expected)


def test_a_copy_shares_nothing(make_model):
    model = make_model("gpt2").train()
    reference = create_reference_model(model)
    assert not reference.training
    assert not any(p.requires_grad for p in reference.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in reference.parameters()}


@pytest.mark.parametrize(
    ("name", "pattern"),
    [("gpt2", "transformer.h.{layer}"), ("llama", "model.layers.{layer}"), ("bart", "decoder.layers.{layer}")],
)
@pytest.mark.parametrize("named", [True, False])
def test_shared_layers_share_storage_and_are_frozen_in_both(make_model, name, pattern, named):
    model = make_model(name)
    reference = create_reference_model(model, num_shared_layers=1, pattern=pattern if named else None)
    lower, upper = pattern.format(layer=0), pattern.format(layer=1)
    theirs = dict(reference.named_parameters())
    for key, parameter in model.named_parameters():
        if lower in key:
            assert parameter.data_ptr() == theirs[key].data_ptr()
            assert not parameter.requires_grad
        if upper in key:
            assert parameter.data_ptr() != theirs[key].data_ptr()
            assert parameter.requires_grad
        assert not theirs[key].requires_grad


def test_shared_layers_of_a_model_scored_before(make_model):
    model = make_model("llama")
    given = logprobs(model)
    reference = create_reference_model(model, num_shared_layers=1)
    disturb(model)
    torch.testing.assert_close(logprobs(reference), given)
    assert not torch.allclose(logprobs(model), given, atol=1e-3)


@pytest.mark.parametrize("options", [{"pattern": "blocks.{layer}"}, {"num_shared_layers": 2}, {"num_shared_layers": 0}])
def test_unmatched_layers(make_model, options):
    with pytest.raises(ModelError, match=r"has no parameters named .* it has 2 layers, of which 1 to 1 can be shared"):
        create_reference_model(make_model("gpt2"), **{"num_shared_layers": 1, **options})


def test_copy_of_a_copied_model_scores_by_itself(make_model):
    model = make_model("gpt2")
    given = logprobs(model)
    twin = copy.deepcopy(create_reference_model(model))
    disturb(model)
    torch.testing.assert_close(logprobs(twin), given)
