"""Kernels of a decoding step against the architectures' own norms and rotations, and a whole model that runs on them."""

import pytest
import torch
from transformers.models.cohere import modeling_cohere
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

from trl.rollouts import triton_decode
from trl.rollouts.decoders import attention_windows, proves_sharing
from trl.rollouts.fused import NORM_KINDS, Fusions, norm, norm_kind, rotate, rotates_halves
from trl.rollouts.local import unwrap
from trl.rollouts.paged_decoder import PagedDecoder

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


def test_rotations_are_those_of_the_architectures_that_rotate_halves():
    assert rotates_halves(modeling_llama.apply_rotary_pos_emb, DEVICE)
    assert not rotates_halves(modeling_cohere.apply_rotary_pos_emb, DEVICE)  # neighbours, not halves


def test_queries_that_lie_apart_are_rotated_too():
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(3, 6, 1, 8, generator=generator).to(DEVICE)
    cos, sin = torch.randn(2, 1, 1, 8, generator=generator).to(DEVICE)
    query, key = wide[:, :4], wide[:, 4:]
    expected = modeling_llama.apply_rotary_pos_emb(query, key, cos, sin)
    torch.testing.assert_close(rotate(query, key, cos, sin), expected)


@pytest.mark.parametrize(("name", "norms"), [("llama", 5), ("qwen3", 9), ("gemma3", 13), ("gpt2", 0)])
def test_norms_are_found(make_model, name, norms):
    assert len(Fusions(make_model(name).to(DEVICE), DEVICE).norms) == norms


def test_a_model_runs_on_kernels_and_is_left_as_it_was(make_model, monkeypatch):
    """Paged attention, norms and rotations together: two samples' logits against a plain forward."""
    monkeypatch.setattr(triton_decode, "PROMPT_SPLITS", 1)
    monkeypatch.setattr(triton_decode, "PROGRAMS", 1)
    model = make_model("qwen3").to(DEVICE)
    policy, function = unwrap(model), modeling_qwen3.apply_rotary_pos_emb

    def make(rows):
        windows = attention_windows(model)
        return PagedDecoder(policy, windows, len(rows), rows, budget=2**10, page=16, kernels=True)

    with torch.no_grad():
        assert proves_sharing(policy, make)
    assert modeling_qwen3.apply_rotary_pos_emb is function
    assert not any("forward" in vars(module) for module in model.modules())
