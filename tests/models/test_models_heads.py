"""Value heads: what forward gives, where the value is read, and what comes back from disk."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification

from trl.data.layout import lay_out, lay_out_encoder_decoder
from trl.errors import ConfigError, ModelError
from trl.imports import is_available
from trl.models.reference import create_reference_model
from trl.models.score import score
from trl.models.value_heads.auto_models import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    with_value_head,
)
from trl.rollouts.local import unwrap
from trl.types import Completion, Example

CAUSAL = AutoModelForCausalLMWithValueHead
EXAMPLES = (
    Example([5, 6, 7], (Completion([8, 9, 10, 11]), Completion([12, 13]))),
    Example([14], (Completion([15, 16, 17], mask=[1, 0, 1]),)),
)
LORA = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}


@pytest.fixture
def wrapped(make_model):
    torch.manual_seed(3)
    return CAUSAL.from_pretrained(make_model("llama"), v_head_init_strategy="normal").eval()


def batch_of(model, layout="padded"):
    if model.config.is_encoder_decoder:
        return lay_out_encoder_decoder(EXAMPLES, pad_token_id=0, decoder_start_token_id=0)
    return lay_out(EXAMPLES, layout)


def same_head(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.v_head.parameters(), other.v_head.parameters(), strict=True))


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "bloom"])
def test_forward_gives_logits_loss_and_values(make_model, name):
    model = make_model(name)
    wrapped = CAUSAL.from_pretrained(model).eval()
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    logits, loss, values = wrapped(ids, attention_mask=torch.ones_like(ids))
    expected = model(ids, output_hidden_states=True, labels=ids)
    torch.testing.assert_close(logits, expected.logits)
    assert logits.dtype == torch.float32
    assert loss is None
    head = wrapped.v_head.summary
    torch.testing.assert_close(values, (expected.hidden_states[-1] @ head.weight.T + head.bias).squeeze(-1))
    assert values.shape == (2, 4)
    torch.testing.assert_close(wrapped(ids, labels=ids)[1], expected.loss)


def test_forward_of_an_encoder_decoder(make_model):
    model = with_value_head(make_model("t5")).eval()
    assert type(model) is AutoModelForSeq2SeqLMWithValueHead
    ids, decoder = torch.tensor([[5, 6, 7]]), torch.tensor([[0, 9, 10, 11]])
    logits, loss, values = model(input_ids=ids, decoder_input_ids=decoder)
    assert logits.shape == (1, 4, 99)
    assert values.shape == (1, 4)
    assert loss is None


def test_the_cache_comes_with_the_outputs_where_asked_for(wrapped):
    ids = torch.tensor([[5, 6, 7, 8]])
    *_, values = wrapped(ids)
    _, _, before, cache = wrapped(ids[:, :3], use_cache=True, return_past_key_values=True)
    name = unwrap(wrapped).cache_name  # by the release of transformers
    *_, after = wrapped(ids[:, 3:], **{name: cache})
    torch.testing.assert_close(torch.cat([before, after], 1), values)


@pytest.mark.parametrize(("dtype", "head"), [("bfloat16", "float32"), ("float16", "float32"), ("float64", "float64")])
@pytest.mark.parametrize("layers", [0, 1])
def test_a_head_is_as_precise_as_its_model_and_at_least_float32(make_model, tmp_path, dtype, head, layers):
    make_model("llama").to(dtype := getattr(torch, dtype)).save_pretrained(tmp_path)
    for options in ({"dtype": "auto"}, {"torch_dtype": dtype}):
        model = CAUSAL.from_pretrained(tmp_path, num_value_layers=layers, **options).eval()
        model.save_pretrained(tmp_path / "again")
        again = CAUSAL.from_pretrained(tmp_path / "again", **options).eval()
        for made in (model, again):
            assert (made.dtype, made.v_head.summary.weight.dtype) == (dtype, getattr(torch, head))
            logits, _, values = made(torch.tensor([[5, 6]]))
            assert (logits.dtype, values.dtype) == (torch.float32, getattr(torch, head))
        torch.testing.assert_close(again(torch.tensor([[5, 6]]))[2], model(torch.tensor([[5, 6]]))[2])
    assert CAUSAL.from_pretrained(tmp_path).dtype == torch.float32


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom", "t5", "bart"])
def test_the_value_of_a_token_is_that_of_the_state_before_it(make_model, name):
    model = with_value_head(make_model(name)).eval()
    batch = batch_of(model)
    found = score(model, batch, want={"value"})
    inputs = dict(batch.inputs)
    if model.config.is_encoder_decoder:
        for key in ("input_ids", "attention_mask"):
            inputs[key] = inputs[key][batch.example]
    grid = model(**inputs)[2].flatten()
    torch.testing.assert_close(found.value, grid[batch.predictor] * batch.mask, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(found.logprobs, score(model.pretrained_model, batch).logprobs)


def test_values_do_not_depend_on_the_layout(wrapped):
    padded, packed, shared = (
        score(wrapped, batch_of(wrapped, layout), want={"value"}).value for layout in ("padded", "packed", "shared")
    )
    torch.testing.assert_close(packed, padded)
    torch.testing.assert_close(shared, padded)


def test_gradients_reach_head_and_trunk(wrapped):
    batch = batch_of(wrapped)
    score(wrapped, batch, want={"value"}).value.sum().backward()
    scored = batch.mask.sum()
    torch.testing.assert_close(wrapped.v_head.summary.bias.grad, scored[None])
    assert wrapped.get_input_embeddings().weight.grad.abs().sum() > 0


def test_values_of_a_model_that_is_scored_from_plain_logits(make_model):
    class Shifted(type(make_model("llama"))):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits.cumsum(-1)
            return output

    model = CAUSAL.from_pretrained(Shifted(make_model("llama").config)).eval()
    batch = batch_of(model)
    with pytest.warns(UserWarning, match="changes its logits"):
        found = score(model, batch, want={"value"}).value
    torch.testing.assert_close(found, model(**batch.inputs)[2].flatten()[batch.predictor] * batch.mask)


def test_a_value_is_asked_of_a_model_without_a_head(make_model):
    model = make_model("llama")
    with pytest.raises(ModelError, match="This LlamaForCausalLM has no value head"):
        score(model, batch_of(model), want={"value"})


def test_initialisation(make_model):
    model = make_model("llama")
    head = CAUSAL.from_pretrained(model, v_head_init_strategy="normal", v_head_initializer_range=5.0).v_head
    assert head.summary.bias.item() == 0
    assert 2 < head.summary.weight.std().item() < 9
    assert CAUSAL.from_pretrained(model, summary_dropout_prob=0.3).v_head.dropout.p == 0.3
    assert CAUSAL.from_pretrained(model).v_head.dropout.p == 0.1
    with pytest.raises(ConfigError, match="Unknown v_head_init_strategy 'norml'. Did you mean 'normal'"):
        CAUSAL.from_pretrained(model, v_head_init_strategy="norml")


def test_everything_else_is_the_models(wrapped):
    assert wrapped.config is wrapped.pretrained_model.config
    torch.manual_seed(0)
    found = wrapped.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=True)
    torch.manual_seed(0)
    expected = wrapped.pretrained_model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=True)
    assert torch.equal(found, expected)
    with pytest.raises(AttributeError, match="nonsense"):
        wrapped.nonsense  # noqa: B018


def test_a_deep_copy_is_a_model_of_its_own(wrapped):
    batch = batch_of(wrapped)
    expected = score(wrapped, batch, want={"value"})
    copied = copy.deepcopy(wrapped)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            parameter.zero_()
    found = score(copied, batch, want={"value"})
    assert torch.equal(found.logprobs, expected.logprobs)
    assert torch.equal(found.value, expected.value)


def test_a_reference_of_a_wrapped_model(wrapped):
    reference = create_reference_model(wrapped, num_shared_layers=1)
    assert not any(p.requires_grad for p in reference.parameters())
    assert reference.get_input_embeddings().weight is wrapped.get_input_embeddings().weight
    assert reference.get_output_embeddings().weight is not wrapped.get_output_embeddings().weight


# ---- on disk ----


@pytest.mark.parametrize("size", ["5GB", "20KB"], ids=["whole", "sharded"])
def test_what_was_saved_comes_back(wrapped, tmp_path, size):
    wrapped.save_pretrained(tmp_path, max_shard_size=size)
    assert (len(list(tmp_path.glob("model*.safetensors"))) > 1) == (size == "20KB")
    with safe_open(tmp_path / "value_head.safetensors", framework="pt") as stored:
        assert sorted(stored.keys()) == ["v_head.summary.bias", "v_head.summary.weight"]
    loaded = CAUSAL.from_pretrained(tmp_path)
    assert same_head(loaded, wrapped)
    torch.testing.assert_close(loaded.eval()(torch.tensor([[5, 6]])), wrapped(torch.tensor([[5, 6]])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_an_encoder_decoder_comes_back(make_model, tmp_path):
    model = with_value_head(make_model("t5"))
    model.save_pretrained(tmp_path)
    assert same_head(AutoModelForSeq2SeqLMWithValueHead.from_pretrained(str(tmp_path)), model)


def test_a_gathered_state_is_what_is_saved(wrapped, tmp_path):
    state = {name: torch.full_like(value, 0.5) for name, value in wrapped.state_dict().items()}
    wrapped.save_pretrained(tmp_path, state_dict=state)
    loaded = CAUSAL.from_pretrained(tmp_path)
    assert all((p == 0.5).all() for p in loaded.parameters())


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "sharded"])
def test_heads_among_the_weights_of_older_checkpoints(wrapped, make_model, tmp_path, file):
    make_model("llama").save_pretrained(tmp_path, max_shard_size="20KB" if file == "sharded" else "5GB")
    (tmp_path / "value_head.safetensors").unlink(missing_ok=True)
    head = {f"v_head.{name}": value for name, value in wrapped.v_head.state_dict().items()}
    if file == "sharded":
        index = tmp_path / "model.safetensors.index.json"
        first = sorted(tmp_path.glob("model-*.safetensors"))[0]
        save_file({**load_file(first), **head}, first, metadata={"format": "pt"})
        entries = "".join(f'"{name}": "{first.name}", ' for name in head)
        index.write_text(index.read_text().replace('"weight_map": {', f'"weight_map": {{{entries}'))
    else:
        weights = load_file(tmp_path / "model.safetensors")
        (tmp_path / "model.safetensors").unlink()
        save = torch.save if file.endswith(".bin") else lambda x, path: save_file(x, path, metadata={"format": "pt"})
        save({**weights, **head}, tmp_path / file)
    assert same_head(CAUSAL.from_pretrained(tmp_path), wrapped)


def test_a_model_without_a_stored_head_gets_a_new_one(make_model, tmp_path):
    make_model("gpt2").save_pretrained(tmp_path)
    assert CAUSAL.from_pretrained(tmp_path).v_head.summary.in_features == 32


def test_options_of_loading_need_a_name(make_model):
    with pytest.raises(ConfigError, match=r"\['dtype'\] are options for loading, but the model is already loaded"):
        CAUSAL.from_pretrained(make_model("gpt2"), dtype="float32")


# ---- adapters ----


@pytest.mark.skipif(is_available("bitsandbytes"), reason="bitsandbytes is installed")
def test_older_ways_to_ask_for_quantised_weights(make_model, tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    assert not CAUSAL.from_pretrained(tmp_path, load_in_8bit=False).is_peft_model
    with pytest.raises(ImportError, match="load_in_8bit needs bitsandbytes: pip install"):
        CAUSAL.from_pretrained(tmp_path, load_in_8bit=True)


def test_whether_a_model_has_adapters_can_be_said_again(make_model):
    model = CAUSAL.from_pretrained(make_model("llama"))
    model.is_peft_model = False
    with pytest.raises(ModelError, match="is_peft_model=True cannot be set"):
        model.is_peft_model = True


def test_adapters_come_back_with_the_head(make_model, tmp_path):
    make_model("llama").save_pretrained(tmp_path / "base")
    model = CAUSAL.from_pretrained(tmp_path / "base", peft_config=LoraConfig(**LORA))
    assert isinstance(model.pretrained_model, PeftModel)
    assert model.has_new_adapter
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.normal_(std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    loaded = CAUSAL.from_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(loaded.eval()(ids), model.eval()(ids))
    trained = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    frozen = CAUSAL.from_pretrained(tmp_path / "adapter", is_trainable=False)
    assert {n for n, p in frozen.named_parameters() if p.requires_grad} == {
        "v_head.summary.weight",
        "v_head.summary.bias",
    }


def test_a_model_with_adapters_is_taken_as_it_is(make_model):
    model = get_peft_model(make_model("llama"), LoraConfig(**LORA))
    wrapped = CAUSAL.from_pretrained(model)
    assert wrapped.pretrained_model is model
    found = score(wrapped.eval(), batch_of(wrapped), want={"value"})
    assert found.value.abs().sum() > 0


def test_a_reward_adapter_on_the_same_base(make_model, tmp_path):
    base = make_model("llama")
    base.save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    judge = LlamaForSequenceClassification(LlamaConfig(**{**base.config.to_dict(), "num_labels": 1}))
    judge.model.load_state_dict(base.model.state_dict())
    judge = get_peft_model(judge, LoraConfig(r=2, task_type="SEQ_CLS", init_lora_weights=False)).eval()
    judge.save_pretrained(tmp_path / "reward")
    model = CAUSAL.from_pretrained(
        tmp_path / "base", peft_config=LoraConfig(**LORA), reward_adapter=str(tmp_path / "reward")
    )
    before = {name: (p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    ids = torch.tensor([[5, 6, 7, 8]])
    rewards = model.compute_reward_score(ids, attention_mask=torch.ones_like(ids))
    assert rewards.shape == (1, 4, 1)
    torch.testing.assert_close(rewards[:, -1], judge(ids, attention_mask=torch.ones_like(ids)).logits)
    assert model.training
    assert model.pretrained_model.active_adapter == "default"
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == before[name][0], name
        assert torch.equal(parameter, before[name][1])


def test_reward_adapters_that_cannot_be(make_model, tmp_path):
    model = CAUSAL.from_pretrained(make_model("llama"), peft_config=LoraConfig(**LORA))
    with pytest.raises(ModelError, match="no reward adapter: load it with from_pretrained"):
        model.compute_reward_score(torch.tensor([[5]]))
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has no .score. head"):
        CAUSAL.from_pretrained(make_model("llama"), peft_config=LoraConfig(**LORA), reward_adapter=str(tmp_path))
    with pytest.raises(ModelError, match="reward_adapter needs a policy with an adapter"):
        CAUSAL.from_pretrained(make_model("llama"), reward_adapter=str(tmp_path))
