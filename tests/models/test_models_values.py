"""Where values come from: a head on the policy, upper layers of the value's own, a network of the value's own."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2ForSequenceClassification

from trl.data.layout import lay_out, lay_out_encoder_decoder
from trl.errors import ConfigError, ModelError
from trl.models.layer_sharing import layers_of
from trl.models.score import score
from trl.models.value_heads.auto_models import AutoModelForCausalLMWithValueHead, with_value_head
from trl.models.value_heads.heads import ValueModel
from trl.types import Completion, Example

CAUSAL = AutoModelForCausalLMWithValueHead
EXAMPLES = (
    Example([5, 6, 7], (Completion([8, 9, 10, 11]), Completion([12, 13]))),
    Example([14], (Completion([15, 16, 17], mask=[1, 0, 1]),)),
)
DEEPER = {"llama": {"num_hidden_layers": 3}, "gpt2": {"n_layer": 3}, "bloom": {"n_layer": 3}}
ARCHITECTURES = ["gpt2", "llama", "qwen3", "gemma2", "gemma3", "opt", "bloom", "t5", "bart"]


def batch_of(model, layout="padded"):
    if model.config.is_encoder_decoder:
        return lay_out_encoder_decoder(EXAMPLES, pad_token_id=0, decoder_start_token_id=0)
    return lay_out(EXAMPLES, layout)


def values(model, layout="padded"):
    return score(model, batch_of(model, layout), want={"value"}).value


def branched(make_model, name, layers=1):
    torch.manual_seed(3)
    return with_value_head(make_model(name, **DEEPER.get(name, {})), num_value_layers=layers).eval()


def classifier(labels=1):
    torch.manual_seed(5)
    sizes = {"vocab_size": 99, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "pad_token_id": 0}
    return GPT2ForSequenceClassification(GPT2Config(**sizes, num_labels=labels)).eval()


def changed(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


# ---- upper layers of the value's own ----


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_branch_starts_as_the_head_and_goes_its_own_way(make_model, name):
    model = branched(make_model, name)
    plain = with_value_head(model.pretrained_model).eval()
    plain.v_head.summary = model.v_head.summary
    if name == "t5":  # it scales what its tied head reads
        plain.v_head.summary = copy.deepcopy(plain.v_head.summary)
        plain.v_head.summary.weight.data *= 32**0.5
    torch.testing.assert_close(values(model), values(plain), atol=2e-6, rtol=2e-6)
    policy = score(model, batch_of(model)).logprobs
    changed(model.v_head.layers)
    found = score(model, batch_of(model), want={"value"})
    assert not torch.allclose(found.value, values(plain), atol=1e-3)
    assert torch.equal(found.logprobs, policy)


def test_a_branch_of_two_layers_runs_on_what_the_lowest_gives(make_model):
    """Its values are those of a whole model whose upper layers it has."""
    model = branched(make_model, "llama", layers=2)
    changed(model.v_head.layers)
    whole = copy.deepcopy(model.pretrained_model)
    whole.model.layers = torch.nn.ModuleList([whole.model.layers[0], *copy.deepcopy(model.v_head.layers)])
    whole = with_value_head(whole).eval()
    whole.v_head.summary = model.v_head.summary
    for layout in ("padded", "packed", "shared"):
        torch.testing.assert_close(values(model, layout), values(whole), atol=1e-5, rtol=1e-5)
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(model(ids)[2], whole(ids)[2])


def test_gradients_of_a_branch_pass_by_the_policys_upper_layers(make_model):
    model = branched(make_model, "llama", layers=2)
    values(model).sum().backward()
    lower, *upper = layers_of(model.pretrained_model)
    assert all(p.grad.abs().sum() > 0 for p in lower.parameters())
    assert all(p.grad is None for layer in upper for p in layer.parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.v_head.layers.parameters())


def test_checkpointed_activations_change_no_gradient_of_a_branch(make_model):
    grads = []
    for checkpointed in (False, True):
        model = branched(make_model, "llama", layers=1)
        model.v_head.dropout.p = 0.0
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.train()
        values(model).sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


@pytest.mark.parametrize("layers", [2, 5, -1])
def test_branches_that_cannot_be(make_model, layers):
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM has 2 layers, so give 1 to 1"):
        CAUSAL.from_pretrained(make_model("llama"), num_value_layers=layers)


def test_a_branch_has_no_adapters(make_model):
    model = get_peft_model(make_model("llama"), LoraConfig(r=2, task_type="CAUSAL_LM"))
    with pytest.raises(ConfigError, match="num_value_layers=1 copies layers .* this model trains adapters"):
        CAUSAL.from_pretrained(model, num_value_layers=1)


# ---- a network of the value's own ----


def with_network(make_model, name="llama"):
    model = with_value_head(make_model(name)).eval()
    model.v_head = ValueModel.of(classifier()).eval()
    return model


def test_a_network_of_another_architecture_reads_the_same_tokens(make_model):
    model, network = with_network(make_model), classifier()
    batch = batch_of(model)
    hidden = network.transformer(input_ids=batch.inputs["input_ids"]).last_hidden_state
    expected = network.score(hidden).flatten()[batch.predictor] * batch.mask
    for layout in ("padded", "shared"):
        torch.testing.assert_close(values(model, layout), expected, atol=1e-5, rtol=1e-5)
    plain = score(make_model("llama"), batch).logprobs
    torch.testing.assert_close(score(model, batch, want={"value"}).logprobs, plain)
    ids = torch.tensor([[5, 6, 7]])
    _, loss, found = model(ids, labels=ids)
    torch.testing.assert_close(found, network.score(network.transformer(ids).last_hidden_state).squeeze(-1))
    assert loss > 0


def test_gradients_of_a_network_leave_the_policy_alone(make_model):
    model = with_network(make_model)
    values(model).sum().backward()
    assert all(p.grad is None for p in model.pretrained_model.parameters())
    assert all(p.grad is not None for p in model.v_head.parameters())


def test_an_encoder_decoder_has_an_encoder_decoder(make_model):
    model = with_value_head(make_model("t5")).eval()
    own = with_value_head(make_model("t5", seed=4)).eval()
    model.v_head = ValueModel(ValueModel.of(own.pretrained_model).model, own.head_options, own.v_head.summary).eval()
    batch = batch_of(model)
    bias = own.v_head.summary.bias * batch.mask
    # T5 scales what its tied head reads
    torch.testing.assert_close(values(model) - bias, (values(own) - bias) * 32**0.5, atol=1e-5, rtol=1e-5)


def test_networks_that_cannot_be(make_model):
    with pytest.raises(ModelError, match=r"value_model must have one label, but this GPT2ForSequence.* has 3"):
        ValueModel.of(classifier(labels=3))
    with pytest.raises(ConfigError, match="value_model has adapters.*merge_and_unload"):
        ValueModel.of(get_peft_model(make_model("llama"), LoraConfig(r=2)))


# ---- on disk ----


@pytest.mark.parametrize("kind", ["head", "branch", "network", "encoder-decoder network"])
def test_whatever_gives_values_comes_back(make_model, tmp_path, kind):
    model = branched(make_model, "llama", layers=0 if kind == "head" else 2)
    if kind == "network":
        model.v_head = ValueModel.of(classifier()).eval()
    elif kind.startswith("encoder"):
        model = with_value_head(make_model("t5")).eval()
        model.v_head = ValueModel.of(make_model("bart")).eval()
    changed(model.v_head)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert type(loaded.v_head) is type(model.v_head)
    torch.testing.assert_close(values(loaded), values(model))
    gathered = tmp_path / "gathered"
    model.save_pretrained(gathered, state_dict={k: torch.zeros_like(v) for k, v in model.state_dict().items()})
    again = type(model).from_pretrained(gathered)
    assert all((p == 0).all() for p in again.v_head.parameters())


def test_a_branch_starts_from_a_head_that_was_saved(make_model, tmp_path):
    model = branched(make_model, "llama", layers=0)
    model.save_pretrained(tmp_path)
    loaded = CAUSAL.from_pretrained(tmp_path, num_value_layers=1).eval()
    torch.testing.assert_close(values(loaded), values(model))
