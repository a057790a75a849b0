import copy
import pickle
import warnings

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from tests.conftest import MODELS
from trl.data.layout import lay_out, lay_out_encoder_decoder
from trl.errors import ConfigError
from trl.models.layouts import choose_layout, why_not
from trl.models.score import prepare_scoring, score, score_logits, unwrap
from trl.types import Completion, Example

ENCODER_DECODERS = ("t5", "bart")
LAYOUTS = {
    "llama": {"padded", "packed", "shared"},
    "gpt2": {"padded", "packed", "shared"},
    "qwen3": {"padded", "packed", "shared"},
    "cohere": {"padded", "packed", "shared"},
    "granite": {"padded", "packed", "shared"},
    "gemma2": {"padded", "packed", "shared"},
    "gemma3": {"padded", "packed", "shared"},
    "opt": {"padded", "shared"},
    "bloom": {"padded"},
    "mamba": {"padded"},
}


def examples(prompts: bool = False) -> list[Example]:
    generator = torch.Generator().manual_seed(1)

    def ids(n: int) -> list[int]:
        return torch.randint(3, 99, (n,), generator=generator).tolist()

    pair = Example(ids(17), (Completion(ids(5)), Completion(ids(9), mask=[1, 0, 1, 1, 1, 1, 0, 1, 1])))
    text = Example(ids(4) if prompts else [], (Completion(ids(12)),))
    triple = Example(ids(6), (Completion(ids(3)), Completion(ids(2)), Completion(ids(11))))
    return [pair, text, triple]


def plain_logprobs(model, example: Example, completion: Completion) -> torch.Tensor:
    """Log-probabilities of a completion's tokens from the model's own logits, without padding; NaN: no predictor."""
    ids = torch.tensor([[*example.prompt, *completion.ids]])
    target = torch.tensor(completion.ids)
    if model.config.is_encoder_decoder:
        start = model.config.decoder_start_token_id
        decoder = torch.tensor([[start, *completion.ids[:-1]]])
        logits = model(input_ids=torch.tensor([example.prompt]), decoder_input_ids=decoder).logits[0]
        return logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
    before = len(example.prompt)
    logp = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return logp[before - 1 :] if before else torch.cat([torch.full((1,), torch.nan), logp])


def lay(model, rows: list[Example], layout: str):
    if model.config.is_encoder_decoder:
        start = model.config.decoder_start_token_id
        return lay_out_encoder_decoder(rows, pad_token_id=0, decoder_start_token_id=start)
    return lay_out(rows, layout, capacity=40)


CASES = [(name, layout) for name, layouts in LAYOUTS.items() for layout in sorted(layouts)]
CASES += [(name, "padded") for name in ENCODER_DECODERS]


@torch.no_grad()
@pytest.mark.parametrize(("name", "layout"), CASES)
def test_equals_the_models_own_logits(make_model, name, layout):
    model = make_model(name)
    rows = examples(prompts=name in ENCODER_DECODERS)
    batch = lay(model, rows, layout)
    found = score(model, batch).logprobs
    n = 0
    for example in rows:
        for completion in example.completions:
            here = batch.mask[n].bool()
            expected = plain_logprobs(model, example, completion)[here[: len(completion)]]
            torch.testing.assert_close(found[n][here], expected, rtol=1e-4, atol=2e-5)
            assert (found[n][~here] == 0).all()
            n += 1


@pytest.mark.parametrize("name", LAYOUTS)
def test_only_layouts_with_the_same_numbers_are_allowed(make_model, name):
    model = make_model(name)
    assert {layout for layout in ("padded", "packed", "shared") if not why_not(model, layout)} == LAYOUTS[name]


def test_the_named_layout_is_refused_with_its_reason(make_model):
    with pytest.raises(ConfigError, match="'shared' does not work with BloomForCausalLM: its forward fails"):
        choose_layout(make_model("bloom"), "shared")
    with pytest.raises(ConfigError, match="'packed' does not work with MambaForCausalLM: its results differ"):
        choose_layout(make_model("mamba"), "packed")
    with pytest.raises(ConfigError, match="Unknown layout 'pakced'. Did you mean 'packed'"):
        choose_layout(make_model("llama"), "pakced")


def test_windows_that_the_configuration_names_otherwise():
    """A window of 256 is longer than any trial: GPT-Neo says "local" of such layers."""
    widths = {"vocab_size": 99, "hidden_size": 32, "num_layers": 2, "num_heads": 4}
    model = GPTNeoForCausalLM(GPTNeoConfig(**widths, attention_types=[[["global", "local"], 1]]))
    assert why_not(model, "shared") == "it has local layers"
    assert not why_not(model, "packed")
    model = GPTNeoForCausalLM(GPTNeoConfig(**widths, attention_types=[[["global"], 2]]))
    assert not why_not(model, "shared")


def test_trials_leave_every_module_in_its_mode(make_model):
    model = make_model("llama").train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    choose_layout(model)
    assert [module.training for module in model.modules()] == before


def test_auto_takes_the_fastest_and_says_why_not_faster(make_model, caplog):
    assert choose_layout(make_model("llama"), multiple_completions=True) == "shared"
    assert choose_layout(make_model("llama"), multiple_completions=False) == "packed"
    assert not caplog.records
    assert choose_layout(make_model("opt"), multiple_completions=False) == "shared"
    assert "not packed: its results differ" in caplog.text


# T5 does not scale attention scores: with these weights float32 is wrong by 1e-3, and where it rounds otherwise by 1e-5.
PRECISIONS = {"llama": torch.float32, "gpt2": torch.float32, "gemma2": torch.float32, "t5": torch.float64}


@pytest.mark.parametrize("name", PRECISIONS)
def test_gradients_equal_those_of_labels(make_model, name):
    """The mean over scored tokens has the gradient of a plain forward with `labels`, one row at a time."""
    model = make_model(name).to(PRECISIONS[name]).train()
    rows = examples(prompts=True)
    batch = lay(model, rows, "padded")
    (-score(model, batch).logprobs.sum() / batch.mask.sum()).backward()
    found = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total = batch.mask.sum()
    for example in rows:
        for completion in example.completions:
            scored = torch.tensor(completion.mask if completion.mask is not None else [1] * len(completion)).bool()
            labels = torch.where(scored, torch.tensor(completion.ids), -100)
            if model.config.is_encoder_decoder:
                decoder = torch.tensor([[model.config.decoder_start_token_id, *completion.ids[:-1]]])
                prompt = torch.tensor([example.prompt])
                out = model(input_ids=prompt, decoder_input_ids=decoder, labels=labels[None])
            else:
                ids = torch.tensor([[*example.prompt, *completion.ids]])
                out = model(ids, labels=torch.cat([torch.full((len(example.prompt),), -100), labels])[None])
            (out.loss * scored.sum() / total).backward()
    expected = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    assert set(found) == set(expected)
    for key in expected:
        scale = expected[key].abs().max().item()
        torch.testing.assert_close(found[key] / scale, expected[key] / scale, rtol=1e-5, atol=2e-5)


@torch.no_grad()
def test_entropy_and_temperature(make_model):
    model = make_model("llama")
    rows = [Example([5, 6], (Completion([7]),))]
    found = score(model, lay_out(rows), temperature=2.0, want=["entropy", "greedy"])
    logp = (model(torch.tensor([[5, 6]])).logits[0, -1] / 2).log_softmax(-1)
    torch.testing.assert_close(found.logprobs[0, 0], logp[7])
    torch.testing.assert_close(found.entropy[0, 0], -(logp.exp() * logp).sum())
    assert found.greedy[0, 0] == (logp.argmax() == 7)


def test_the_forward_stays_what_it_was(make_model):
    import inspect

    model = make_model("llama")
    before = inspect.signature(model.forward)
    ids = torch.tensor([[4, 5, 6]])
    expected = model(ids).logits
    prepare_scoring(model)
    assert inspect.signature(model.forward) == before
    assert torch.equal(model(ids).logits, expected)
    assert list(model.state_dict()) == list(MODELS["llama"]().state_dict())
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 6)


@torch.no_grad()
def test_a_copy_scores_with_its_own_weights(make_model):
    model = make_model("llama")
    batch = lay_out(examples())
    before = score(model, batch).logprobs
    twin = copy.deepcopy(model)
    model.lm_head.weight.mul_(2)
    torch.testing.assert_close(score(twin, batch).logprobs, before)
    assert (score(model, batch).logprobs - before).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "t5", "gemma2"])
def test_a_pickled_model_is_as_it_was_and_can_be_scored_again(make_model, name):
    model = make_model(name)
    batch = lay(model, examples(prompts=True), "padded")
    before = score(model, batch).logprobs
    ids = dict.fromkeys(
        ["input_ids", "decoder_input_ids"] if name == "t5" else ["input_ids"], torch.tensor([[4, 5, 6]])
    )
    read = pickle.loads(pickle.dumps(model))
    assert torch.equal(read(**ids).logits, model(**ids).logits)
    assert torch.equal(score(read, batch).logprobs, before)
    model.get_output_embeddings().weight.mul_(2)
    assert torch.equal(score(read, batch).logprobs, before)


@torch.no_grad()
def test_a_head_that_is_not_understood_is_scored_from_plain_logits(make_model):
    model = make_model("llama")
    plain = model.forward

    def squared(*args, **kwargs):
        out = plain(*args, **kwargs)
        out.logits = out.logits.square()
        return out

    model.forward = squared
    with pytest.warns(UserWarning, match="LlamaForCausalLM changes its logits after the head"):
        found = score(model, lay_out(examples())).logprobs
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score(model, lay_out(examples()))
    expected = plain_logprobs(model, examples()[2], examples()[2].completions[0])
    torch.testing.assert_close(found[3, :3], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_a_completion_longer_than_its_prompt(make_model, name):
    model, row = make_model(name), Example([5, 6], (Completion([7, 8, 9, 10, 11]),))
    expected = plain_logprobs(model, row, row.completions[0])
    torch.testing.assert_close(score(model, lay(model, [row], "padded")).logprobs[0], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_head_with_a_bias(make_model):
    model = make_model("llama")
    model.set_output_embeddings(torch.nn.Linear(32, 99))
    model.lm_head.bias.normal_()
    rows = examples()
    expected = plain_logprobs(model, rows[0], rows[0].completions[0])
    torch.testing.assert_close(score(model, lay_out(rows)).logprobs[0, :5], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "t5"])
@pytest.mark.parametrize("is_understood", [True, False])
def test_all_logits_are_those_of_the_scores(make_model, name, is_understood):
    model = make_model(name)
    batch = lay(model, examples(prompts=True), "padded")
    expected = score(model, batch).logprobs.flatten()[batch.scored]
    flat = score(model, batch, temperature=2.0).logprobs
    if not is_understood:
        model.get_output_embeddings()._trl_transform = None
    torch.testing.assert_close(score(model, batch, temperature=2.0).logprobs, flat, rtol=1e-5, atol=1e-5)
    found = score_logits(model, batch).log_softmax(-1).gather(1, batch.target.flatten()[batch.scored, None])[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class VocabularyRows(TorchDispatchMode):
    """Rows of the tensors that are as wide as the vocabulary."""

    def __init__(self):
        super().__init__()
        self.rows = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.shape[-1:] == (99,):
            self.rows.add(out.numel() // 99)
        return out


def test_logits_of_what_is_not_scored_are_never_made(make_model):
    model, batch = make_model("llama"), lay_out(examples())
    score(model, batch)
    with VocabularyRows() as made:
        score(model, batch).logprobs.sum().backward()
    assert max(made.rows) == len(batch.scored) < batch.positions / 2


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]], ids=["attention", "head as well"])
def test_adapters(make_model, targets):
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(make_model("llama"), config).eval()
    rows = examples()
    batch = lay_out(rows, "shared")
    found = score(model, batch).logprobs
    expected = plain_logprobs(model, rows[0], rows[0].completions[0])
    torch.testing.assert_close(found[0, :5], expected, rtol=1e-5, atol=2e-5)
    found.sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert all("lora_" in name for name in trained)
    assert {target for target in ("q_proj", "lm_head") if any(target in name for name in trained)} == set(targets)


@torch.no_grad()
def test_virtual_tokens_are_not_part_of_the_grid(make_model):
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)
    model = get_peft_model(make_model("gpt2"), config).eval()
    ids = torch.tensor([[5, 6, 7]])
    expected = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -2].log_softmax(-1)[7]
    batch = lay_out([Example([5, 6], (Completion([7]),))])
    del batch.inputs["position_ids"]
    torch.testing.assert_close(score(model, batch).logprobs[0, 0], expected)
    assert unwrap(model) is model.get_base_model()


def test_bfloat16_gradients_are_finite_and_near(make_model):
    model = make_model("llama").to(torch.bfloat16)
    batch = lay_out(examples())
    found = score(model, batch).logprobs
    assert found.dtype == torch.float32
    found.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
