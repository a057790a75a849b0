"""LoRA in few kernels: against the forward of `peft`, and against the formula in float64."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import WIDTHS
from trl.models.fused_adapters import LowRank, forward, fuse_adapters
from trl.models.kept_activations import keep_less

IDS = torch.arange(24).view(2, 12) % 30


def adapted(make_model, **options):
    """A model with an adapter that does something, and a copy of it that was fused."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, **options)
    model = get_peft_model(make_model("llama"), config).train()
    return model, copy.deepcopy(model)


def gradients(model, **options):
    """Logits, and the gradients of what is trained, of a pass from the same random state."""
    torch.manual_seed(1)
    logits = model(IDS, **options).logits
    trained = [p for p in model.parameters() if p.requires_grad]
    return [logits.detach(), *torch.autograd.grad(logits.float().sin().sum(), trained)]


def distance(found, exact):
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.5}, {"use_rslora": True}], ids=str)
def test_numbers_are_those_of_peft(make_model, options):
    """In float32; of dropout, the same elements are dropped from the same random state."""
    plain, fused = adapted(make_model, **options)
    assert fuse_adapters(fused) == 14
    for ours, theirs in zip(gradients(fused), gradients(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_numbers_without_gradient_are_those_with_it(make_model):
    """To the bit in half precision: the ratio of a policy to its old self is 1 at first."""
    _, fused = adapted(make_model)
    fuse_adapters(fused)
    with torch.autocast("cpu", torch.bfloat16):
        learning = fused(IDS).logits
        with torch.no_grad():
            assert torch.equal(fused(IDS).logits, learning)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_factors_of_a_gated_network_are_kept_in_place_of_its_product(make_model, dropout):
    plain, fused = adapted(make_model, lora_dropout=dropout)
    fuse_adapters(fused)
    sizes = []
    for _ in range(2):
        for ours, theirs in zip(gradients(fused), gradients(plain), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        sizes.append(kept_and_run(fused)[0])
        assert keep_less(fused)[0] == 2 * (not sizes[1:])
    of_two_layers = 2 * IDS.numel() * WIDTHS["intermediate_size"] * 2  # bytes of bfloat16
    assert sizes[0] - sizes[1] == 2 * of_two_layers  # act(g) and the product


def test_half_precision_rounds_a_sum_once():
    """Where `peft` rounds B A x, its multiple and the sum."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((64, 48), (64, 32), (8, 32), (48, 8))
    y, x, a, b = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    exact = y.double() + 1.7 * x.double() @ a.double().T @ b.double().T
    ours, theirs = LowRank.apply(y, x, a, b, 1.7, 0.0, None), y + x @ a.T @ b.T * 1.7
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert distance(ours, exact) < 0.8 * distance(theirs, exact)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_in_half_precision(make_model, dropout):
    plain, fused = adapted(make_model, lora_dropout=dropout)
    fuse_adapters(fused)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = gradients(fused), gradients(plain)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert distance(a, b) < 0.06


class Kernels(TorchDispatchMode):
    """Counts operations that are no views."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view and function.overloadpacket is not torch.ops.aten.detach
        return function(*args, **(kwargs or {}))


def kept_and_run(model):
    """Bytes that are kept for backward, each memory once, and kernels of forward and backward."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    keeping = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with Kernels() as kernels, keeping, torch.autocast("cpu", torch.bfloat16):
        loss = model(IDS).logits.float().sin().sum()
    with kernels:
        loss.backward()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(x.nbytes for pointer, x in kept.items() if pointer not in weights), kernels.count


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_it_is_fewer_kernels_and_keeps_less(make_model, dropout):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout)
    found = []
    for fuses in (False, True):
        model = get_peft_model(make_model("llama").bfloat16(), config).train()
        if fuses:
            fuse_adapters(model)
        found.append(kept_and_run(model))
    (plain_bytes, plain_kernels), (bytes_, kernels) = found
    assert bytes_ < 0.9 * plain_bytes
    assert kernels < plain_kernels - 14 * 5


def test_what_is_no_plain_adapter_runs_as_before(make_model):
    plain, fused = adapted(make_model)
    fuse_adapters(fused)
    for model in (plain, fused):
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        model.add_adapter("dora", LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, init_lora_weights=False))
    fused.load_state_dict(plain.state_dict())
    for name in ("second", "dora", "default"):
        for model in (plain, fused):
            model.set_adapter(name)
        torch.testing.assert_close(gradients(fused), gradients(plain), rtol=1e-5, atol=1e-5)
    with fused.disable_adapter(), plain.disable_adapter():
        assert torch.equal(fused(IDS).logits, plain(IDS).logits)
    for model in (plain, fused):
        model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(gradients(fused), gradients(plain), rtol=0, atol=0)
    for model in (plain, fused):
        model.merge_adapter()
    assert torch.equal(fused(IDS).logits, plain(IDS).logits)


@pytest.mark.parametrize("autocast", [True, False])
def test_weights_in_half_precision(make_model, autocast):
    """Without autocast W x is of another type than A, and is added to in that of A."""
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    plain = get_peft_model(make_model("llama").bfloat16(), config).train()
    fused = copy.deepcopy(plain)
    fuse_adapters(fused)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        ours, theirs = gradients(fused), gradients(plain)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert distance(a, b) < (0.05 if autocast else 1e-6)


def test_a_layer_that_was_given_a_forward_keeps_it_and_models_are_pickled(make_model):
    model, _ = adapted(make_model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.forward = own = lambda x: x
    assert fuse_adapters(model) == 13
    assert layer.forward is own
    del layer.forward
    restored = pickle.loads(pickle.dumps(model))
    assert torch.equal(restored(IDS).logits, model(IDS).logits)
    assert forward.__name__ == "forward"
