"""References start as the model that was given, whatever happened to it before."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model

from trl.data.layout import lay_out, lay_out_encoder_decoder
from trl.errors import ConfigError, ModelError
from trl.models.layer_sharing import layers_of
from trl.models.reference import (
    AdapterOff,
    FrozenModel,
    NamedAdapter,
    Precomputed,
    SharedTrunk,
    SnapshotReference,
    create_reference_model,
    frozen_reference,
    make_reference,
    score_with_reference,
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


def batch_for(model):
    if model.config.is_encoder_decoder:
        return lay_out_encoder_decoder(EXAMPLES, pad_token_id=0, decoder_start_token_id=0)
    return lay_out(EXAMPLES)


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
        SnapshotReference,
    ),
    "new adapter that takes a part of the base": (
        lambda make: adapted(make("llama"), init_lora_weights="olora"),
        {"has_new_adapter": True},
        SnapshotReference,
    ),
    "trained adapter": (trained_adapter, {}, SnapshotReference),
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


@pytest.mark.parametrize(
    "reference_of",
    [lambda policy: AdapterOff(), SnapshotReference.of, lambda policy: NamedAdapter("default", "ref")],
    ids=["off", "snapshot", "named"],
)
def test_leaves_mode_and_gradients_alone(make_model, reference_of):
    policy = adapted(make_model("llama", attention_dropout=0.5), lora_dropout=0.5)
    policy.add_adapter("ref", LoraConfig(**{**LORA.to_dict(), "lora_dropout": 0.5}))
    policy.train()
    reference = reference_of(policy)
    found = [reference.logprobs(policy, lay_out(EXAMPLES)) for _ in range(2)]
    torch.testing.assert_close(*found, rtol=0, atol=0, msg="dropout is on")
    assert policy.training
    assert not found[0].requires_grad
    assert any(p.requires_grad for p in policy.parameters())
    assert not torch.allclose(logprobs(policy), logprobs(policy)), "which has dropout of its own"


def test_numbers_that_rows_bring_stand_for_the_reference(make_model):
    policy = make_model("llama")
    batch, numbers = lay_out(EXAMPLES), torch.tensor([[-1.0, -2.0]])
    known = replace(batch, signals={"ref_logprobs": numbers})
    assert Precomputed().logprobs(policy, known) is numbers
    other = make_reference(policy)
    expected = other.logprobs(policy, batch, temperature=0.5)
    assert torch.equal(Precomputed(other).logprobs(policy, batch, temperature=0.5), expected)
    with pytest.raises(ConfigError, match="precompute_ref_log_probs"):
        Precomputed().logprobs(policy, batch)
    with pytest.raises(ModelError, match="sample"):
        Precomputed().as_model(policy)


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
    with pytest.raises(
        ModelError, match=r"has no parameters named .* it has 2 layers, of which at least one cannot be shared"
    ):
        create_reference_model(make_model("gpt2"), **{"num_shared_layers": 1, **options})


def test_copy_of_a_copied_model_scores_by_itself(make_model):
    model = make_model("gpt2")
    given = logprobs(model)
    twin = copy.deepcopy(create_reference_model(model))
    disturb(model)
    torch.testing.assert_close(logprobs(twin), given)


# ---- lower layers that run once ----


@contextmanager
def counting_layers(model):
    """How often each layer of the model has really run: its first part counts."""
    runs = [0] * len(layers_of(model))

    def count(i):
        def counted(module, args, output):
            runs[i] += 1

        return counted

    leaves = [next(m for m in layer.modules() if not list(m.children())) for layer in layers_of(model)]
    hooks = [leaf.register_forward_hook(count(i)) for i, leaf in enumerate(leaves)]
    yield runs
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(
    ("name", "sizes", "start"),
    [
        ("gpt2", {"n_layer": 4}, 3),
        ("llama", {"num_hidden_layers": 4}, 1),
        *((name, {}, 1) for name in ("qwen3", "gemma2", "gemma3", "cohere", "opt", "bloom", "t5")),
    ],
)
def test_only_the_upper_layers_of_a_reference_run(make_model, name, sizes, start):
    policy = make_model(name, **sizes)
    batch = batch_for(policy)
    whole = FrozenModel(create_reference_model(policy))
    reference = frozen_reference(policy, create_reference_model(policy, num_shared_layers=start))
    assert isinstance(reference, SharedTrunk)
    assert reference.start == start
    disturb(policy)
    expected = whole.logprobs(policy, batch, temperature=0.7)
    with counting_layers(policy) as own, counting_layers(reference.model) as theirs:
        scores, found = score_with_reference(policy, reference, batch, want={"entropy"}, temperature=0.7)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert own == [1] * len(own)
    assert theirs == [0] * start + [1] * (len(own) - start)
    torch.testing.assert_close(scores.logprobs, score(policy, batch, temperature=0.7).logprobs.detach())
    assert not torch.allclose(scores.logprobs, found, atol=1e-3)
    torch.testing.assert_close(score_with_reference(policy, whole, batch, temperature=0.7)[1], expected)
    torch.testing.assert_close(reference.logprobs(policy, batch, temperature=0.7), expected, atol=1e-6, rtol=1e-6)


def test_layers_in_common_are_tried_in_the_precision_of_training(make_model):
    half = partial(torch.autocast, "cpu", torch.bfloat16)
    policy = make_model("llama")
    reference = create_reference_model(policy, num_shared_layers=1)
    reference.forward = half()(reference.forward)  # as accelerate prepares it
    assert isinstance(frozen_reference(policy, reference, half), SharedTrunk)


class Writes(torch.nn.Module):
    """A layer that hands something to a later one by another way than its output."""

    def __init__(self, layer, store):
        super().__init__()
        self.layer, self.store = layer, store

    def forward(self, hidden, **inputs):
        self.store["mean"] = hidden.mean()
        return self.layer(hidden, **inputs)


class Reads(Writes):
    def forward(self, hidden, **inputs):
        return self.layer(hidden + self.store.pop("mean"), **inputs)


class ReadsIfThere(Writes):
    def forward(self, hidden, **inputs):
        return self.layer(hidden + self.store.pop("mean", 1.0), **inputs)


@pytest.mark.parametrize(
    ("reads", "why"),
    [
        (Reads, "its upper layers cannot run alone (KeyError"),
        (ReadsIfThere, "with its upper layers alone, log-probabilities differ"),
    ],
)
def test_a_reference_runs_whole_where_its_upper_layers_do_not_run_alone(make_model, caplog, reads, why):
    policy, store = make_model("llama"), {}
    policy.model.layers = torch.nn.ModuleList(
        kind(layer, store) for kind, layer in zip((Writes, reads), policy.model.layers, strict=True)
    )
    reference = frozen_reference(policy, create_reference_model(policy, num_shared_layers=1))
    assert type(reference) is FrozenModel
    assert f"the reference has to compute them again: {why}" in caplog.text
    scores, found = score_with_reference(policy, reference, lay_out(EXAMPLES))
    torch.testing.assert_close(found, scores.logprobs)


def test_a_reference_runs_whole_where_something_below_is_not_in_common(make_model, caplog):
    """BART registers the norm of its embeddings behind its layers."""
    policy = make_model("bart")
    reference = frozen_reference(policy, create_reference_model(policy, num_shared_layers=1))
    assert type(reference) is FrozenModel
    assert "'model.decoder.layernorm_embedding' is not shared, and runs before the last of them" in caplog.text


def test_references_that_share_nothing_run_whole(make_model):
    policy = make_model("llama")
    for other in (create_reference_model(policy), make_model("gpt2")):
        assert type(frozen_reference(policy, other)) is FrozenModel
