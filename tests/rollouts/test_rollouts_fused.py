"""Kernels of a decoding step against the architectures' own norms and rotations, and a whole model that runs on them."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

from trl.models.half_weights import linears_of, rounded
from trl.rollouts import fused_layers, triton_decode
from trl.rollouts.fused import NORM_KINDS, norm, norm_kind
from trl.rollouts.fusions import Fusions
from trl.rollouts.local import unwrap
from trl.rollouts.paged_decoder import PagedDecoder
from trl.rollouts.shared_decoder import attention_windows, matches_plain_forward

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_norms_are_those_of_the_architectures(dtype):
    made = {
        modeling_llama.LlamaRMSNorm(24): NORM_KINDS[0],
        modeling_gemma3.Gemma3RMSNorm(24): NORM_KINDS[1],
        torch.nn.LayerNorm(24): None,
    }
    for module, kind in made.items():
        torch.nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(1))
        assert norm_kind(module.to(DEVICE, dtype)) == kind


def test_a_norm_of_mixed_precision_has_the_type_of_the_product():
    module = modeling_llama.LlamaRMSNorm(24).to(DEVICE)
    x = torch.randn(2, 1, 24, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.float16)
    found = norm(x, weight=module.weight, epsilon=module.variance_epsilon, kind=NORM_KINDS[0])
    torch.testing.assert_close(found, module(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "norms"), [("llama", 5), ("qwen3", 9), ("gemma3", 13), ("gpt2", 0)])
def test_norms_are_found(make_model, name, norms):
    assert len(Fusions(make_model(name).to(DEVICE), DEVICE).norms) == norms


def test_layers_are_replaced_that_compute_the_same(make_model):
    """Granite weighs what is added, Gemma 3 has four norms, Cohere adds both branches at once, GPT-2 has no gate."""
    found = {}
    for name in ("llama", "qwen3", "granite", "gemma3", "cohere", "gpt2"):
        options = {"residual_multiplier": 0.5} if name == "granite" else {}
        fusions = Fusions(make_model(name, **options).to(DEVICE), DEVICE)
        found[name] = len(fusions.layers), len(fusions.products)
    one_product = {"granite": (0, 2), "gemma3": (0, 2), "cohere": (0, 2)}
    assert found == {"llama": (2, 2), "qwen3": (2, 2), "gpt2": (0, 0)} | one_product


def test_layers_with_adapters_on_their_products_are_left(make_model):
    model = make_model("llama").to(DEVICE)
    get_peft_model(model, LoraConfig(target_modules=["q_proj", "up_proj"]))
    fusions = Fusions(model, DEVICE)
    assert (fusions.layers, fusions.products) == ([], [])


def test_large_weights_are_not_copied(make_model, monkeypatch):
    monkeypatch.setattr(fused_layers, "MERGED_BYTES", 1)
    assert Fusions(make_model("llama").to(DEVICE), DEVICE).products == []


def test_rounded_weights_below_wider_norms_are_replaced_too(make_model):
    """As under autocast: linear layers in half precision, norms and the residual stream in float32."""
    model = make_model("llama").to(DEVICE)
    with rounded(linears_of(model), torch.bfloat16):
        fusions = Fusions(model, DEVICE)
        assert (len(fusions.layers), fusions.dtype) == (2, torch.bfloat16)
        x = torch.randn(3, 1, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        (_, parts), *_ = fusions.layers
        parts.attention.forward = lambda hidden_states: (hidden_states, None)
        assert parts.step(x.clone()).dtype == torch.float32
        torch.testing.assert_close(parts.step(x.clone()), plain_layer(x, parts), rtol=2e-2, atol=2e-2)


def plain_layer(x, parts):
    """What stands at the top of fused_layers.py, an attention apart that gives back what it is given."""
    wide = {part: module.weight.float() for part, module in vars_of(parts)}
    x = x + F.linear(F.rms_norm(x, x.shape[-1:], wide["before"], parts.before.variance_epsilon), wide["out"])
    inner = F.rms_norm(x, x.shape[-1:], wide["between"], parts.between.variance_epsilon)
    return x + F.linear(F.silu(F.linear(inner, wide["gate"])) * F.linear(inner, wide["up"]), wide["down"])


def vars_of(parts):
    names = ("before", "between", "gate", "up", "down", "out")
    return [(name, getattr(parts, name)) for name in names]


def test_a_model_runs_on_kernels_and_is_left_as_it_was(make_model, monkeypatch):
    """Paged attention, norms, rotations and whole layers together: two samples' logits against a plain forward."""
    monkeypatch.setattr(triton_decode, "PROMPT_PARTS", 1)
    monkeypatch.setattr(triton_decode, "PROGRAMS", 1)
    model = make_model("qwen3").to(DEVICE)
    policy, function = unwrap(model), modeling_qwen3.apply_rotary_pos_emb

    def make(rows):
        windows = attention_windows(model)
        return PagedDecoder(policy, windows, len(rows), rows, budget=2**10, page=16, kernels=True)

    with torch.no_grad():
        assert matches_plain_forward(policy, make)
    assert modeling_qwen3.apply_rotary_pos_emb is function
    assert not any("forward" in vars(module) for module in model.modules())
