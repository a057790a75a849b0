"""Weights that a layer rounds together are those that autocast rounds one by one, and so are their gradients."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model

from trl.models.checkpointing import checkpoint_activations
from trl.models.compiled import compile_layers
from trl.models.half_weights import CastTogether, round_together

IDS = torch.arange(3, 43).view(2, 20)


def learned(model):
    """The loss of two passes under autocast, and gradients by name."""
    model.train()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    assert all(torch.equal(grad, expected[1][name]) for name, grad in found[1].items())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_numbers_are_those_of_autocast_to_the_bit(make_model, name, checkpointing):
    plain, model = make_model(name), make_model(name)
    assert round_together(model) == 2
    for each in (plain, model) if checkpointing else ():
        checkpoint_activations(each)
    assert_same(learned(model), learned(plain))
    assert all(p.dtype == torch.float32 and p.is_leaf for p in model.parameters())


def adapted(make_model, **options):
    torch.manual_seed(0)
    config = LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **options)
    return get_peft_model(make_model("llama"), config)


def test_adapters_and_frozen_weights(make_model):
    plain, model = adapted(make_model), adapted(make_model)
    round_together(model.get_base_model())
    assert_same(learned(model), learned(plain))


def test_checkpointed_adapters_with_dropout(make_model):
    """An adapter casts its input to the type of its weights, in what is computed again too: torch compares what is saved."""
    model = adapted(make_model, lora_dropout=0.1)
    round_together(model.get_base_model())
    checkpoint_activations(model.get_base_model())
    model.enable_input_require_grads()
    assert all(grad.any() for grad in learned(model)[1].values())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
def test_compiled_layers(make_model):
    torch._dynamo.reset()
    plain, model = make_model("llama"), make_model("llama")
    compile_layers(model, backend="eager")
    round_together(model)
    assert_same(learned(model), learned(plain))


def test_one_kernel_each_way(make_model):
    model = make_model("llama", num_hidden_layers=1)
    round_together(model)
    calls = []
    original = CastTogether.apply
    try:
        CastTogether.apply = lambda dtype, *tensors: calls.append(len(tensors)) or original(dtype, *tensors)
        learned(model)
    finally:
        del CastTogether.apply
    assert calls == [7, 7]  # four products of attention and three of the network behind it, in each of two passes


def test_what_is_computed_again_reads_rounded_weights(make_model):
    model = make_model("llama", num_hidden_layers=1)
    round_together(model)
    checkpoint_activations(model)
    seen = []
    model.model.layers[0].mlp.up_proj.register_forward_pre_hook(lambda module, _: seen.append(module.weight.dtype))
    learned(model)
    assert seen == [torch.bfloat16] * 4  # forward and again, in each of two passes


def test_without_autocast_nothing_is_rounded(make_model):
    plain, model = make_model("llama"), make_model("llama")
    round_together(model)
    assert torch.equal(model(IDS).logits, plain(IDS).logits)


def test_models_are_copied_and_pickled(make_model):
    model = make_model("llama")
    round_together(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(again(IDS).logits, model(IDS).logits)
