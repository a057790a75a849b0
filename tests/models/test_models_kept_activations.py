"""What layers keep for backward: less, and outputs and gradients are those of the architectures' code to the bit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.autograd.graph import saved_tensors_hooks
from transformers.models.llama.modeling_llama import LlamaMLP

from trl.models import kept_activations
from trl.models.checkpointing import checkpoint_activations
from trl.models.half_weights import round_together
from trl.models.kept_activations import KERNEL, keep_less
from trl.training.gradients import GradientCheck

IDS = torch.arange(3, 43).view(2, 20)


def learned(model, *, half=False):
    """The loss, and gradients by name."""
    ids = IDS.to(model.train().device)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, plain, **options):
    found, expected = learned(model, **options), learned(plain, **options)
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, gradient in found[1].items():
        assert torch.equal(gradient, expected[1][name]), name


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "qwen3", "granite", "cohere"])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_numbers_are_those_of_the_architecture_to_the_bit(make_model, name, half):
    plain, model = make_model(name), make_model(name)
    assert keep_less(model) == (2, 2)
    assert_same(model, plain, half=half)


def test_with_biases_rounded_weights_and_checkpoints(make_model):
    plain, model = (make_model("llama", mlp_bias=True) for _ in range(2))
    keep_less(model)
    for each in (plain, model):
        round_together(each)
        checkpoint_activations(each)
    assert_same(model, plain, half=True)


@pytest.mark.parametrize(
    ("targets", "attentions"), [("all-linear", 0), (["k_proj"], 0), (["gate_proj"], 2), (["down_proj"], 2)], ids=str
)
def test_adapters_on_what_and_around_what_is_kept(make_model, targets, attentions):
    def adapted():
        torch.manual_seed(0)
        return get_peft_model(make_model("llama"), LoraConfig(r=4, target_modules=targets, init_lora_weights=False))

    plain, model = adapted(), adapted()
    assert keep_less(model) == (2, attentions)
    assert_same(model, plain, half=True)


def kept_bytes(module, *inputs, half=False):
    """Bytes that a module keeps for backward besides its weights and its inputs."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*inputs, *module.parameters())}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=half):
        module(*inputs)
    return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in known)


def test_a_gated_network_keeps_half(make_model):
    network, x = make_model("llama").model.layers[0].mlp, torch.randn(1, 10, 32, requires_grad=True)
    width = 10 * network.gate_proj.out_features * 4
    assert kept_bytes(network, x) == 4 * width
    keep_less(network)
    assert kept_bytes(network, x) == 2 * width


class Products(torch.nn.Module):
    """What an attention makes of its input."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (torch.nn.Linear(32, width, bias=False) for width in (32, 8, 8))

    def forward(self, x):
        return self.q_proj(x).sum() + self.k_proj(x).sum() + self.v_proj(x).sum()


def test_products_keep_one_rounded_input():
    products, x = (
        Products(),
        1 * torch.randn(1, 10, 32, requires_grad=True),
    )  # of leaves, autocast keeps one copy itself
    rounded_weights = sum(p.numel() for p in products.parameters()) * 2
    assert kept_bytes(products, x, half=True) == rounded_weights + 3 * x.numel() * 2
    assert keep_less(products) == (0, 1)
    assert kept_bytes(products, x, half=True) == rounded_weights + x.numel() * 2


class Apart(Products):
    """Reads two inputs, in another order."""

    def forward(self, x):
        return self.v_proj(x).sum() + self.q_proj(x).sum() + self.k_proj(x.tanh()).sum() + self.v_proj(x).sum()


def test_products_of_other_inputs():
    plain = Apart()
    products, x = copy.deepcopy(plain), torch.randn(1, 10, 32)
    keep_less(products)
    gradients = []
    for module in (plain, products):
        with torch.autocast("cpu", torch.bfloat16):
            total = sum(module(x) for _ in range(2))
        total.backward()
        gradients.append([total.detach(), *(p.grad for p in module.parameters())])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_kernels_give_the_same(make_model, monkeypatch, name):
    """Triton's interpreter stands for a device, where there is none."""
    monkeypatch.setattr(kept_activations, "_has_kernel", lambda x: True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain, model = make_model(name).to(device), make_model(name).to(device)
    assert keep_less(model)[0] == 2
    assert all(vars(layer.mlp)[KERNEL] for layer in model.model.layers)
    found, expected = learned(model), learned(plain)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fault", ["raises", "computes something else"])
def test_a_kernel_that_fails_is_done_without(make_model, monkeypatch, caplog, fault):
    def kernel(gate, up, activation):
        if fault == "raises":
            raise RuntimeError("no compiler")
        return gate * up

    monkeypatch.setattr(kept_activations, "_has_kernel", lambda x: True)
    monkeypatch.setattr("trl.ops.triton_gate.gated", kernel)
    plain, model = make_model("llama"), make_model("llama")
    assert keep_less(model)[0] == 2
    assert ("no compiler" in caplog.text) == (fault == "raises")
    assert_same(model, plain)


class Sparse(LlamaMLP):
    """Computes something else with the same parts."""

    def forward(self, x):
        return self.down_proj((self.act_fn(self.gate_proj(x)) * self.up_proj(x)).relu())


def test_other_networks_stay(make_model):
    model = make_model("llama")
    assert keep_less(Sparse(model.config)) == (0, 0)
    assert keep_less(make_model("gpt2")) == (0, 0)
    assert keep_less(model) == (2, 2)
    assert keep_less(model)[0] == 0  # they have a forward of their own by now


def test_a_network_that_stays_keeps_the_forward_that_was_put_on_its_product(make_model):
    """As accelerate puts it there, to move weights."""
    network = Sparse(make_model("llama").config)
    forward = network.down_proj.forward = lambda x, plain=network.down_proj.forward: plain(x)
    assert keep_less(network) == (0, 0)
    assert vars(network.down_proj)["forward"] is forward


def test_hooks_of_the_last_product_see_its_input(make_model):
    network, seen = make_model("llama").model.layers[0].mlp, []
    keep_less(network)
    network.down_proj.register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    network(torch.randn(1, 10, 32))
    assert seen == [(1, 10, network.down_proj.in_features)]


def test_the_first_step_whose_gradients_are_checked_keeps_no_more(make_model):
    network, x = make_model("llama").model.layers[0].mlp, torch.randn(1, 10, 32, requires_grad=True)
    keep_less(network)
    expected = kept_bytes(network, x)
    check = GradientCheck(network)
    assert kept_bytes(network, x) == expected
    assert network.down_proj in check._called


def test_models_are_copied_and_pickled(make_model):
    model = make_model("llama")
    keep_less(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        assert all(layer.mlp.forward.__self__ is layer.mlp for layer in again.model.layers)
