"""Single kernels for norms and rotations: the architectures' own numbers and gradients, and where they are not used."""

import copy
import pickle

import pytest
import torch
from transformers.models.cohere import modeling_cohere
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

from trl.data.layout import lay_out
from trl.models import fused
from trl.models.fused import fuse, fuse_as, gradients_of, is_fused, offset_rms_norm, on_cuda, rms_norm, rotates_halves
from trl.models.score import prepare_scoring, score
from trl.ops.triton_rotary import Rotated, rotate
from trl.rollouts.fusions import Fusions
from trl.types import Completion, Example

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EXAMPLES = (Example([5, 6, 7], (Completion([20, 21]), Completion([23]))), Example([], (Completion([30, 31, 32]),)))


@pytest.fixture(autouse=True)
def files_as_they_were(monkeypatch):
    """`fuse` changes files of transformers for the whole process."""
    for file in (modeling_llama, modeling_qwen3, modeling_gemma3):
        monkeypatch.setattr(file, fused.ROTATION, getattr(file, fused.ROTATION))


@pytest.fixture
def kernels_anywhere(monkeypatch):
    """Where there is no CUDA, the kernel of rotations runs in Triton's interpreter, which is too slow to be of use otherwise."""
    monkeypatch.setattr(
        fused, "on_cuda", lambda plain: marked(lambda q, k, c, s: Rotated.apply(q, k, c, s, None), plain)
    )


def marked(function, plain):
    function._trl_plain = plain
    return function


def rotation_inputs(*, lengths=1, dtype=torch.float32):
    """Queries and keys that lie in one tensor, and angles whose halves are not alike."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(2, 3, 6, 8, generator=generator).to(DEVICE, dtype).transpose(1, 2)
    cos, sin = torch.randn(2, lengths, 3, 8, generator=generator).to(DEVICE)
    return wide[:, :4], wide[:, 4:], cos, sin


@pytest.mark.parametrize("lengths", [1, 2], ids=["one table of positions", "one for each row"])
def test_rotations_and_their_gradients_are_those_of_the_architecture(lengths):
    query, key, cos, sin = rotation_inputs(lengths=lengths)
    plain = modeling_llama.apply_rotary_pos_emb
    expected = gradients_of(lambda q, k: plain(q, k, cos, sin), query, key)
    found = gradients_of(lambda q, k: Rotated.apply(q, k, cos, sin, None), query, key)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_turning_back_by_the_same_angle_gives_what_was_turned():
    query, key, *_ = rotation_inputs()
    angle = torch.linspace(-2, 2, 12, device=DEVICE).view(1, 3, 4).repeat(1, 1, 2)
    there = rotate(query, key, angle.cos(), angle.sin())
    back = rotate(*there, angle.cos(), angle.sin(), backward=True)
    torch.testing.assert_close(back, (query, key), rtol=1e-5, atol=1e-6)


def test_gradients_have_the_type_of_what_was_turned_and_results_the_one_asked_for():
    query, key, cos, sin = rotation_inputs(dtype=torch.float16)
    query.requires_grad_()
    turned, _ = Rotated.apply(query, key, cos, sin, torch.float16)
    turned.float().sum().backward()
    assert turned.dtype == query.grad.dtype == torch.float16
    wide, _ = modeling_llama.apply_rotary_pos_emb(query.float(), key.float(), cos, sin)
    torch.testing.assert_close(turned, wide.to(torch.float16), rtol=0, atol=0)  # rounded once


def test_files_that_rotate_neighbours_are_left():
    assert rotates_halves(modeling_llama.apply_rotary_pos_emb, DEVICE)
    assert not rotates_halves(modeling_cohere.apply_rotary_pos_emb, DEVICE)


def test_a_fused_file_rotates_tensors_of_the_host_as_before():
    plain = modeling_llama.apply_rotary_pos_emb
    query, key, cos, sin = (x.cpu() for x in rotation_inputs())
    torch.testing.assert_close(on_cuda(plain)(query, key, cos, sin), plain(query, key, cos, sin), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "norm"), [(modeling_llama.LlamaRMSNorm, rms_norm), (modeling_gemma3.Gemma3RMSNorm, offset_rms_norm)]
)
def test_norms_are_told_apart(kind, norm):
    module = kind(24).to(DEVICE)
    torch.nn.init.normal_(module.weight, generator=torch.Generator(DEVICE).manual_seed(1))
    assert fused.computes(module, norm)
    assert not any(fused.computes(module, other) for other in fused.NORMS if other is not norm)


@pytest.mark.parametrize(
    ("name", "norms", "files"), [("llama", 5, 1), ("qwen3", 9, 1), ("gemma3", 13, 1), ("gpt2", 0, 0)]
)
def test_scores_and_gradients_stay(make_model, kernels_anywhere, name, norms, files):
    model = make_model(name).to(DEVICE)
    prepare_scoring(model)
    found = []
    for step in (lambda: None, lambda: found.append(fuse(model))):
        step()
        model.zero_grad()
        scores = score(model, lay_out(EXAMPLES).to(DEVICE), want=["entropy"])
        (scores.logprobs.sum() + scores.entropy.sum()).backward()
        found.append([scores.logprobs.detach(), *(p.grad.clone() for p in model.parameters())])
    before, count, after = found
    assert count[0] == norms
    assert count[1] >= files
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_copies_are_fused_and_pickles_are_as_loaded(make_model, kernels_anywhere):
    model = make_model("llama").to(DEVICE)
    fuse(model)
    twin, again = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert is_fused(twin.model.norm)
    assert twin.model.norm.forward.__self__ is twin.model.norm
    assert not is_fused(again.model.norm)
    other = make_model("llama").to(DEVICE)
    fuse_as(other, again)
    assert not is_fused(other.model.norm)
    fuse_as(other, model)
    assert is_fused(other.model.norm)


def test_a_fused_model_decodes_by_kernels_too_and_is_fused_afterwards(make_model, kernels_anywhere):
    model = make_model("llama").to(DEVICE)
    fuse(model)
    fusions = Fusions(model, DEVICE)
    assert len(fusions.norms) == 5
    with fusions.active():
        assert not is_fused(model.model.norm)
    assert is_fused(model.model.norm)
