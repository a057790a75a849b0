"""PPO on triplets: the classic listing, a step against a plain computation, invariances, options, errors."""

from __future__ import annotations

import copy
import logging
import math

import numpy as np
import pytest
import torch
from accelerate.tracking import GeneralTracker
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from trl.core import LengthSampler, respond_to_batch
from trl.errors import ConfigError, DataError
from trl.models.heads import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    with_value_head,
)
from trl.models.reference import AdapterOff, EarlierWeights, create_reference_model
from trl.trainers.ppo import PPOConfig, PPOTrainer

QUERIES = [[5, 6, 7, 8], [9, 10], [11, 12, 13], [14]]
RESPONSES = [[20, 21, 22], [30, 31, 32, 33, 34], [40], [50, 51, 52, 53]]
SCORES = [1.0, -0.5, 2.0, 0.25]

STATISTICS = {
    "objective": "kl kl_dist logprobs ref_logprobs kl_coef entropy",
    "ppo": "mean_non_score_reward mean_scores std_scores learning_rate",
    "tokens": "queries_len_mean queries_len_std queries_dist responses_len_mean responses_len_std responses_dist",
    "ppo/loss": "policy value total",
    "ppo/policy": "entropy approxkl policykl clipfrac advantages advantages_mean ratio",
    "ppo/returns": "mean var",
    "ppo/val": "vpred error clipfrac mean var var_explained",
    "time/ppo": "forward_pass compute_rewards compute_advantages optimize_step calc_stats total",
}
"""Names of statistics, by what they begin with."""


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def tensors(rows):
    return [torch.tensor(row) for row in rows]


TRIPLETS = (tensors(QUERIES), tensors(RESPONSES), tensors(SCORES))


@pytest.fixture
def make_trainer(make_model, tokenizer):
    """`make_trainer("llama", optimizer=..., **config)`: on one batch of four triplets, by plain gradient descent."""

    def make(model="llama", *, rate=0.1, ref_model="another", epochs=1, keywords=None, **config):
        if isinstance(model, str):
            torch.manual_seed(7)
            model = with_value_head(make_model(model))
        if ref_model == "another":
            name = "t5" if model.config.is_encoder_decoder else "llama"
            ref_model = make_model(name, seed=1) if model.config.model_type == name else None
        trained = [p for p in model.parameters() if p.requires_grad]
        options = {"batch_size": 4, "ppo_epochs": epochs, **config}
        optimizer = torch.optim.SGD(trained, lr=rate)
        return PPOTrainer(PPOConfig(**options), model, ref_model, tokenizer, optimizer=optimizer, **(keywords or {}))

    return make


def parameters(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same(found, expected, **tolerance):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


# ---- the listing ----


@pytest.fixture(params=["gpt2", "llama", "t5"])
def folder(request, make_model, tokenizer, tmp_path):
    make_model(request.param).save_pretrained(tmp_path / request.param)
    tokenizer.save_pretrained(tmp_path / request.param)
    return str(tmp_path / request.param)


@pytest.mark.parametrize("variant", ["as written", "without a pad token", "with a batch dimension", "by the reference"])
def test_the_listing_runs(folder, variant):
    encoder_decoder = folder.endswith("t5")
    auto = AutoModelForSeq2SeqLMWithValueHead if encoder_decoder else AutoModelForCausalLMWithValueHead
    model = auto.from_pretrained(folder)
    model_ref = create_reference_model(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None if variant == "without a pad token" else tokenizer.eos_token
    ppo_config = PPOConfig(batch_size=1, mini_batch_size=1)
    query_tensor = tokenizer.encode("This morning I went to the ", return_tensors="pt")
    response_tensor = respond_to_batch(model_ref if variant == "by the reference" else model, query_tensor)
    ppo_trainer = PPOTrainer(ppo_config, model, model_ref, tokenizer)
    reward = [torch.tensor(1.0)]
    before = parameters(ppo_trainer)
    if variant == "with a batch dimension":
        train_stats = ppo_trainer.step([query_tensor], [response_tensor], reward)
    else:
        train_stats = ppo_trainer.step([query_tensor[0]], [response_tensor[0]], reward)
    expected = {f"{head}/{name}" for head, names in STATISTICS.items() for name in names.split(" ")}
    assert set(train_stats) == expected
    for name, value in train_stats.items():
        assert np.isfinite(value).all(), name
    moved = [name for name, p in parameters(ppo_trainer).items() if not torch.equal(p, before[name])]
    assert any(name.startswith("v_head") for name in moved)
    assert len(moved) > len(before) / 2
    for name, parameter in model_ref.named_parameters():
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("options", [{}, {"mini_batch_size": 1}, {"forward_batch_size": 1}])
def test_configurations_of_one_triplet(options):
    config = PPOConfig(batch_size=1, **options)
    assert (config.mini_batch_size, config.backward_batch_size) == (1, 1)


def test_a_model_by_name_gets_a_head_and_its_tokenizer(folder, caplog):
    trainer = PPOTrainer(PPOConfig(batch_size=1), folder)
    assert trainer.tokenizer.eos_token == "</s>"
    trainer.step(*(part[:1] for part in TRIPLETS))
    assert "has no value head" not in caplog.text


# ---- a step against a plain computation ----


def plain_logprobs(model, query, response):
    """Logits, log-probabilities and values `[C]` of one response, from an ordinary forward pass."""
    if model.config.is_encoder_decoder:
        start = [model.config.decoder_start_token_id]
        decoder = torch.tensor([start + response[:-1]])
        logits, _, values = model(input_ids=torch.tensor([query]), decoder_input_ids=decoder)
        logits, values = logits[0], values[0]
    else:
        logits, _, values = model(torch.tensor([query + response]))
        logits, values = logits[0, len(query) - 1 : -1], values[0, len(query) - 1 : -1]
    logp = logits.log_softmax(-1)
    return logp, logp[range(len(response)), response], values


def plain_step(model, reference, *, rate, beta, gamma, lam, clip, clip_value, vf_coef):
    """One descent step of PPO on the four triplets, token by token; gives what is reported."""
    rows = list(zip(QUERIES, RESPONSES, SCORES, strict=True))
    old, advantages, returns, kls = [], [], [], []
    with torch.no_grad():
        for query, response, reward in rows:
            _, logp, values = plain_logprobs(model, query, response)
            _, ref, _ = plain_logprobs(reference, query, response)
            kl = (logp - ref).tolist()
            r = [-beta * x for x in kl]
            r[-1] += reward
            v, a = [*values.tolist(), 0.0], [0.0] * (len(r) + 1)
            for t in reversed(range(len(r))):
                a[t] = r[t] + gamma * v[t + 1] - v[t] + gamma * lam * a[t + 1]
            old.append((logp, values))
            kls.append(kl)
            advantages.append(a[:-1])
            returns.append([x + y for x, y in zip(a[:-1], v[:-1], strict=True)])
    flat = [x for a in advantages for x in a]
    mean = sum(flat) / len(flat)
    std = math.sqrt(sum((x - mean) ** 2 for x in flat) / (len(flat) - 1))
    policy = value = 0.0
    for i, (query, response, _) in enumerate(rows):
        _, logp, values = plain_logprobs(model, query, response)
        for t in range(len(response)):
            a = (advantages[i][t] - mean) / std
            ratio = (logp[t] - old[i][0][t]).exp()
            policy = policy + torch.maximum(-a * ratio, -a * ratio.clamp(1 - clip, 1 + clip))
            before = old[i][1][t]
            kept = before + (values[t] - before).clamp(-clip_value, clip_value)
            value = value + 0.5 * torch.maximum((values[t] - returns[i][t]) ** 2, (kept - returns[i][t]) ** 2)
    loss = (policy + vf_coef * value) / len(flat)
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= rate * parameter.grad
    flat_returns = np.array([x for r in returns for x in r])
    return {
        "objective/kl": sum(map(sum, kls)) / 4,
        "objective/entropy": -sum(logp.sum().item() for logp, _ in old) / 4,
        "ppo/mean_non_score_reward": -beta * sum(map(sum, kls)) / len(flat),
        "ppo/loss/policy": policy.item() / len(flat),
        "ppo/loss/value": value.item() / len(flat),
        "ppo/loss/total": loss.item(),
        "ppo/returns/mean": flat_returns.mean(),
        "ppo/returns/var": flat_returns.var(ddof=1),
        "ppo/mean_scores": np.mean(SCORES),
        "ppo/std_scores": np.std(SCORES, ddof=1),
    }


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_step_is_the_plain_computation(make_trainer, name):
    options = {"init_kl_coef": 0.3, "gamma": 0.97, "lam": 0.9, "vf_coef": 0.5}
    trainer = make_trainer(name, **options)
    model = copy.deepcopy(trainer.model)
    reference = with_value_head(trainer.ref_model)
    found = trainer.step(*TRIPLETS)
    expected = plain_step(
        model.eval(), reference, rate=0.1, beta=0.3, gamma=0.97, lam=0.9, clip=0.2, clip_value=0.2, vf_coef=0.5
    )
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=2e-4, abs=2e-6), key
    assert_same(parameters(trainer), dict(model.named_parameters()), rtol=1e-4, atol=1e-5)
    assert found["objective/kl_coef"] == 0.3
    assert trainer.algorithm.controller.coefficient == pytest.approx(
        0.3 * (1 + min(max(expected["objective/kl"] / 6 - 1, -0.2), 0.2) * 4 / 10_000)
    )


def test_the_second_epoch_is_clipped_around_the_first(make_trainer):
    """Two epochs are two optimizer steps on the same old log-probabilities and advantages."""
    trainer = make_trainer(epochs=2, rate=0.5)
    found = trainer.step(*TRIPLETS)
    ratios = found["ppo/policy/ratio"]
    assert len(ratios) == 2 * 13
    np.testing.assert_allclose(ratios[:13], 1, atol=1e-5)
    assert np.abs(ratios[13:] - 1).max() > 0.01
    assert found["ppo/policy/approxkl"] == pytest.approx(np.mean(np.log(ratios) ** 2) / 2, rel=1e-3)
    assert found["ppo/policy/policykl"] == pytest.approx(-np.mean(np.log(ratios)), rel=1e-3)


# ---- invariances ----


@pytest.mark.parametrize("epochs", [1, 2])
def test_splits_of_an_optimizer_step_give_the_same_model(make_trainer, epochs):
    splits = [(4, 1), (2, 2), (1, 4)]
    results = []
    for mini, accumulation in splits:
        trainer = make_trainer(mini_batch_size=mini, gradient_accumulation_steps=accumulation, epochs=epochs)
        found = trainer.step(*TRIPLETS)
        results.append((parameters(trainer), found["ppo/loss/total"]))
    for found, loss in results[1:]:
        assert_same(found, results[0][0], rtol=1e-4, atol=1e-5)
        assert loss == pytest.approx(results[0][1], rel=1e-4)


def test_a_token_budget_changes_nothing(make_trainer):
    whole, split = make_trainer(), make_trainer(max_tokens_per_micro_batch=8)
    whole.step(*TRIPLETS)
    split.step(*TRIPLETS)
    assert_same(parameters(split), parameters(whole), rtol=1e-4, atol=1e-5)


def test_the_order_of_the_batch_changes_nothing(make_trainer):
    first, second = make_trainer(), make_trainer()
    first.step(*TRIPLETS)
    second.step(*([part[i] for i in (2, 0, 3, 1)] for part in TRIPLETS))
    assert_same(parameters(second), parameters(first), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_layouts_give_the_same_model(make_trainer, layout):
    queries = [TRIPLETS[0][0]] * 3 + [TRIPLETS[0][1]]
    results = []
    for name in ("padded", layout):
        trainer = make_trainer(layout=name)
        trainer.step(queries, *TRIPLETS[1:])
        results.append(parameters(trainer))
    assert_same(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_padding_side_of_the_tokenizer_changes_nothing(make_trainer, tokenizer, side):
    found = []
    for chosen in ("right", side):
        trainer = make_trainer()
        trainer.tokenizer.padding_side = chosen
        greedy = trainer.generate(TRIPLETS[0], max_new_tokens=4, do_sample=False, return_prompt=False)
        trainer.step(*TRIPLETS)
        found.append((greedy, parameters(trainer)))
    tokenizer.padding_side = "right"
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))
    assert_same(found[1][1], found[0][1])


def test_masked_tokens_teach_nothing(make_trainer):
    """A token that is masked is read, but neither rewarded nor learned."""
    responses = tensors([[20, 21, 22], [30, 31, 32, 33, 34], [40], [50, 51, 52, 53]])
    masks = tensors([[1, 1, 1], [1, 1, 0, 0, 0], [1], [1, 0, 1, 1]])
    trainer = make_trainer()
    found = trainer.step(TRIPLETS[0], responses, TRIPLETS[2], masks)
    assert len(found["ppo/policy/advantages"]) == 9
    assert (found["objective/logprobs"] != 0).sum() == 9
    cut = make_trainer()
    shorter = [*responses[:1], responses[1][:2], *responses[2:]]
    cut.step(TRIPLETS[0], shorter, TRIPLETS[2], [masks[0], masks[1][:2], *masks[2:]])
    assert_same(parameters(trainer), parameters(cut), rtol=1e-4, atol=1e-5)


def test_a_start_token_of_a_generated_response_is_no_token(make_trainer):
    one, other = make_trainer("t5"), make_trainer("t5")
    one.step(*TRIPLETS)
    found = other.step(TRIPLETS[0], tensors([[0, *row] for row in RESPONSES]), TRIPLETS[2])
    assert found["tokens/responses_len_mean"] == 13 / 4
    assert_same(parameters(other), parameters(one))


# ---- options ----


def test_scores_are_scaled_centred_and_clipped(make_trainer):
    trainer = make_trainer(use_score_scaling=True, use_score_norm=True, score_clip=0.5)
    scores = np.array(SCORES)
    scaled = (scores - scores.mean()) / scores.std(ddof=1)
    assert trainer.step(*TRIPLETS)["ppo/mean_scores"] == pytest.approx(scaled.clip(-0.5, 0.5).mean())
    both = np.concatenate([scores, scores + 10])
    scaled = (scores + 10 - both.mean()) / both.std(ddof=1)
    found = trainer.step(*TRIPLETS[:2], tensors(SCORES + np.float32(10)))["ppo/mean_scores"]
    assert found == pytest.approx(scaled.clip(-0.5, 0.5).mean())


@pytest.mark.parametrize("penalty", ["kl", "abs", "mse", "full"])
def test_penalties_start_at_zero_and_differ(make_trainer, penalty):
    same = make_trainer("gpt2", ref_model=None, kl_penalty=penalty)
    assert same.step(*TRIPLETS)["objective/kl"] == pytest.approx(0, abs=1e-5)
    found = make_trainer(kl_penalty=penalty).step(*TRIPLETS)
    log_ratios = found["objective/logprobs"] - found["objective/ref_logprobs"]
    if penalty == "full":
        assert found["objective/kl"] > 0
        return
    per_token = {"kl": log_ratios, "abs": np.abs(log_ratios), "mse": log_ratios**2 / 2}[penalty]
    assert found["objective/kl"] == pytest.approx(per_token.sum(1).mean(), rel=1e-5)


def test_the_full_penalty_is_the_divergence_of_whole_distributions(make_trainer):
    trainer = make_trainer(kl_penalty="full")
    model, reference = copy.deepcopy(trainer.model).eval(), with_value_head(trainer.ref_model).eval()
    found = trainer.step(*TRIPLETS)["objective/kl_dist"]
    for i, (query, response) in enumerate(zip(QUERIES, RESPONSES, strict=True)):
        with torch.no_grad():
            p, q = (plain_logprobs(m, query, response)[0] for m in (model, reference))
        assert found[i] == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-4)


def test_whitened_rewards_change_the_returns(make_trainer):
    plain = make_trainer(gamma=1, lam=1).step(*TRIPLETS)
    white = make_trainer(gamma=1, lam=1, whiten_rewards=True).step(*TRIPLETS)
    assert white["ppo/returns/var"] != pytest.approx(plain["ppo/returns/var"], rel=0.1)


def test_a_fixed_coefficient_stays(make_trainer):
    trainer = make_trainer(adap_kl_ctrl=False, init_kl_coef=0.7)
    for _ in range(2):
        assert trainer.step(*TRIPLETS)["objective/kl_coef"] == 0.7


def test_early_stopping_ends_the_epochs(make_trainer):
    trainer = make_trainer(epochs=4, rate=0.5, early_stopping=True, target_kl=-10)
    assert len(trainer.step(*TRIPLETS)["ppo/policy/ratio"]) == 13
    trainer = make_trainer(epochs=4, rate=0.0, early_stopping=True, target_kl=1)
    assert len(trainer.step(*TRIPLETS)["ppo/policy/ratio"]) == 4 * 13


def test_a_mini_batch_that_has_moved_too_far_is_skipped(make_trainer):
    trainer = make_trainer(ratio_threshold=0.5)
    before = parameters(trainer)
    with pytest.warns(UserWarning, match="1 of 1 mini-batches were skipped.*ratio_threshold=0.5"):
        trainer.step(*TRIPLETS)
    assert_same(parameters(trainer), before, rtol=0, atol=0)


def test_a_negative_kl_warns(make_trainer, make_model):
    trainer = make_trainer(ref_model=make_model("llama", seed=4))
    logprobs = [plain_logprobs(trainer.model.eval(), q, r)[0] for q, r in zip(QUERIES, RESPONSES, strict=True)]
    unlikely = [logp.argmin(-1)[:1] for logp in logprobs]
    with pytest.warns(UserWarning, match="The mean KL of this batch is -"):
        trainer.step(TRIPLETS[0], unlikely, TRIPLETS[2])


def test_dropout_is_off(make_model, make_trainer):
    dropping = with_value_head(make_model("gpt2", embd_pdrop=0.5, attn_pdrop=0.5, resid_pdrop=0.5))
    found = make_trainer(dropping.train(), ref_model=None).step(*TRIPLETS)
    assert found["objective/kl"] == pytest.approx(0, abs=1e-5)
    np.testing.assert_allclose(found["ppo/policy/ratio"], 1, atol=1e-5)


def test_gradient_checkpointing_changes_nothing(make_trainer):
    plain, checkpointed = make_trainer(), make_trainer(gradient_checkpointing=True)
    plain.step(*TRIPLETS)
    checkpointed.step(*TRIPLETS)
    assert_same(parameters(checkpointed), parameters(plain), rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped(make_trainer):
    trainer = make_trainer(rate=1.0, max_grad_norm=0.01)
    before = parameters(trainer)
    trainer.step(*TRIPLETS)
    moved = sum((p - before[name]).square().sum() for name, p in parameters(trainer).items()) ** 0.5
    assert moved.item() == pytest.approx(0.01, rel=1e-3)


def test_the_schedule_steps_once_per_step(make_model, tokenizer):
    model = with_value_head(make_model("llama"))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    config = PPOConfig(batch_size=4, ppo_epochs=2)
    trainer = PPOTrainer(config, model, None, tokenizer, optimizer=optimizer, lr_scheduler=scheduler)
    assert [trainer.step(*TRIPLETS)["ppo/learning_rate"] for _ in range(3)] == [1e-3, 5e-4, 2.5e-4]


def test_adam_by_default(make_model, tokenizer):
    trainer = PPOTrainer(PPOConfig(), with_value_head(make_model("llama")), None, tokenizer)
    assert type(trainer.optimizer) is torch.optim.Adam
    assert trainer.optimizer.param_groups[0]["lr"] == 1.41e-5


def test_layers_in_common_are_frozen(make_model, tokenizer):
    model = with_value_head(make_model("llama"))
    trainer = PPOTrainer(PPOConfig(batch_size=4), model, None, tokenizer, num_shared_layers=1)
    shared = model.get_input_embeddings().weight
    assert trainer.ref_model.get_input_embeddings().weight is shared
    assert not shared.requires_grad
    trainer.step(*TRIPLETS)


def test_a_model_without_a_head_gets_one_and_it_is_said(make_model, tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = PPOTrainer(PPOConfig(batch_size=4), make_model("llama"), None, tokenizer)
    assert caplog.text.count("This LlamaForCausalLM has no value head: a new one is put on.") == 1
    trainer.step(*TRIPLETS)


# ---- adapters ----

LORA = {"r": 4, "task_type": "CAUSAL_LM"}


def test_a_new_adapter_is_its_own_reference_when_off(make_model, tokenizer):
    model = AutoModelForCausalLMWithValueHead.from_pretrained(make_model("llama"), peft_config=LoraConfig(**LORA))
    base = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer = PPOTrainer(PPOConfig(batch_size=4, learning_rate=0.05), model, None, tokenizer)
    assert isinstance(trainer.reference, AdapterOff)
    first, second = trainer.step(*TRIPLETS), trainer.step(*TRIPLETS)
    assert first["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert abs(second["objective/kl"]) > 0.01
    np.testing.assert_allclose(first["objective/ref_logprobs"], second["objective/ref_logprobs"], atol=1e-5)
    assert_same(parameters(trainer), base, rtol=0, atol=0)


@pytest.mark.parametrize("penalty", ["kl", "full"])
def test_an_adapter_that_was_trained_before_is_compared_with_itself(make_model, tokenizer, penalty):
    adapted = get_peft_model(make_model("llama"), LoraConfig(**LORA, init_lora_weights=False))
    config = PPOConfig(batch_size=4, learning_rate=0.05, kl_penalty=penalty)
    trainer = PPOTrainer(config, adapted, None, tokenizer)
    assert isinstance(trainer.reference, EarlierWeights)
    first, second = trainer.step(*TRIPLETS), trainer.step(*TRIPLETS)
    assert first["objective/kl"] == pytest.approx(0, abs=1e-5)
    np.testing.assert_allclose(first["objective/ref_logprobs"], second["objective/ref_logprobs"], atol=1e-5)


def test_adapters_are_put_on_by_the_trainer(make_model, tokenizer):
    trainer = PPOTrainer(PPOConfig(batch_size=4), make_model("llama"), None, tokenizer, peft_config=LoraConfig(**LORA))
    assert isinstance(trainer.reference, AdapterOff)
    trainer.step(*TRIPLETS)


# ---- generate ----


@pytest.fixture
def sampling(make_trainer):
    return make_trainer("gpt2", ref_model=None)


def test_greedy_responses_are_those_of_the_model(sampling):
    found = sampling.generate(TRIPLETS[0], max_new_tokens=6, do_sample=False)
    for query, ids in zip(TRIPLETS[0], found, strict=True):
        expected = sampling.model.generate(query[None], max_new_tokens=6, do_sample=False)[0]
        assert torch.equal(ids, expected)


def test_one_query_gives_a_row(sampling):
    found = sampling.generate(TRIPLETS[0][0], max_new_tokens=5, min_new_tokens=5, do_sample=True)
    assert found.shape == (1, 9)
    assert found[0, :4].tolist() == QUERIES[0]
    alone = sampling.generate(TRIPLETS[0][0], max_new_tokens=5, min_new_tokens=5, return_prompt=False)
    assert alone.shape == (1, 5)


def test_classic_options_sample_from_the_whole_distribution(sampling, tokenizer):
    options = {"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True, "pad_token_id": tokenizer.eos_token_id}
    torch.manual_seed(1)
    found = sampling.generate(TRIPLETS[0], return_prompt=False, max_new_tokens=8, **options)
    assert len({tuple(ids.tolist()) for ids in found}) == 4
    torch.manual_seed(1)
    in_pieces = sampling.generate(TRIPLETS[0], return_prompt=False, batch_size=1, max_new_tokens=8, **options)
    assert [len(ids) for ids in in_pieces] == [min(8, len(ids)) for ids in in_pieces]


def test_responses_end_with_their_first_end_of_sequence(sampling, tokenizer):
    with torch.no_grad():
        sampling.model.get_output_embeddings().weight[tokenizer.eos_token_id] += 3.0
    found = sampling.generate([torch.tensor([5])] * 40, max_new_tokens=10, do_sample=True, return_prompt=False)
    ended = [ids for ids in found if tokenizer.eos_token_id in ids]
    assert ended
    assert all(ids.tolist().index(tokenizer.eos_token_id) == len(ids) - 1 for ids in ended)


def test_lengths_are_drawn(sampling):
    found = sampling.generate(
        TRIPLETS[0] * 5, length_sampler=LengthSampler(2, 5), return_prompt=False, do_sample=True, eos_token_id=-1
    )
    assert {len(ids) for ids in found if 2 not in ids} == {2, 3, 4}


def test_the_reference_responds_too(make_trainer):
    trainer = make_trainer()
    found, reference = trainer.generate(TRIPLETS[0], max_new_tokens=8, do_sample=False, generate_ref_response=True)
    expected = trainer.ref_model.generate(TRIPLETS[0][0][None], max_new_tokens=8, do_sample=False)[0]
    assert torch.equal(reference[0], expected)
    assert any(not torch.equal(a, b) for a, b in zip(found, reference, strict=True))


def test_an_encoder_decoder_responds_with_its_start_token(make_trainer):
    trainer = make_trainer("t5")
    found = trainer.generate(TRIPLETS[0], max_new_tokens=6, do_sample=False)
    expected = trainer.model.generate(TRIPLETS[0][0][None], max_new_tokens=6, do_sample=False)[0]
    assert torch.equal(found[0], expected)


def test_options_that_do_not_exist(sampling):
    with pytest.raises(ConfigError, match=r"generate\(\) has no option 'max_new_tokns'"):
        sampling.generate(TRIPLETS[0], max_new_tokns=3)
    with pytest.raises(DataError, match=r"query_tensor\[1\] has to be .* of shape \[L\], got \(1, 2\)"):
        sampling.generate([TRIPLETS[0][0], torch.tensor([[1, 2]])])


# ---- data, tracking, saving ----


def test_the_loader_gives_batches_of_the_dataset(make_model, tokenizer):
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 10, "query": ["abc"] * 10}).with_format("torch")
    trainer = PPOTrainer(
        PPOConfig(batch_size=4),
        with_value_head(make_model("llama")),
        None,
        tokenizer,
        dataset=rows,
        data_collator=lambda data: {key: [row[key] for row in data] for key in data[0]},
    )
    batches = list(trainer.dataloader)
    assert len(batches) == 2
    assert len(batches[0]["query"]) == 4
    responses = trainer.generate(batches[0]["input_ids"], max_new_tokens=3, do_sample=True, return_prompt=False)
    trainer.step(batches[0]["input_ids"], responses, [1.0, 0.0, 1.0, 0.5])


class ListTracker(GeneralTracker):
    name = "list"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.logged = []

    @property
    def tracker(self):
        return self.logged

    def store_init_configuration(self, values):
        self.options = values

    def log(self, values, step=None, **kwargs):
        self.logged.append((step, values))


def test_statistics_reach_the_tracker(make_trainer):
    tracker = ListTracker()
    trainer = make_trainer(log_with=tracker)
    stats = trainer.step(*TRIPLETS)
    batch = {"query": ["a"] * 4, "response": ["b"] * 4}
    trainer.log_stats(stats, batch, TRIPLETS[2])
    ((step, logs),) = tracker.logged
    assert step == 1
    assert logs["env/reward_mean"] == pytest.approx(np.mean(SCORES))
    assert logs["env/reward_std"] == pytest.approx(np.std(SCORES))
    assert logs["env/reward_dist"].tolist() == SCORES
    assert logs["objective/kl"] == stats["objective/kl"]
    assert tracker.options["batch_size"] == 4
    assert trainer.state.log_history[-1]["env/reward_mean"] == logs["env/reward_mean"]
    with pytest.raises(ConfigError, match=r"columns_to_log names 'text', but the batch has \['query', 'response'\]"):
        trainer.log_stats(stats, batch, TRIPLETS[2], columns_to_log=["text"])


def test_what_was_saved_comes_back(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.step(*TRIPLETS)
    trainer.save_pretrained(tmp_path / "saved")
    trainer.save_model(tmp_path / "model")
    for folder in ("saved", "model"):
        loaded = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / folder)
        assert_same(dict(loaded.named_parameters()), parameters(trainer))
        assert AutoTokenizer.from_pretrained(tmp_path / folder).eos_token == "</s>"


# ---- learning ----


def test_the_reward_rises(make_model, tokenizer):
    """The reward counts one token of eight: PPO has to make it the usual one."""
    torch.manual_seed(0)
    model = with_value_head(make_model("llama"))
    config = PPOConfig(batch_size=32, mini_batch_size=16, learning_rate=5e-3, init_kl_coef=0.05, ppo_epochs=4)
    trainer = PPOTrainer(config, model, None, tokenizer)
    queries = [torch.tensor([5 + i % 8, 20]) for i in range(32)]
    means = []
    for _ in range(25):
        responses = trainer.generate(queries, max_new_tokens=8, do_sample=True, eos_token_id=-1, return_prompt=False)
        rewards = [(response == 42).float().sum() for response in responses]
        means.append(trainer.step(queries, responses, rewards)["ppo/mean_scores"])
    assert np.mean(means[:2]) < 1
    assert np.mean(means[-3:]) > 4


# ---- configuration ----


def test_classic_defaults():
    config = PPOConfig()
    expected = {
        "seed": 0,
        "log_with": None,
        "task_name": None,
        "model_name": "gpt2",
        "query_dataset": "imdb",
        "reward_model": "sentiment-analysis:lvwerra/distilbert-imdb",
        "remove_unused_columns": True,
        "tracker_kwargs": {},
        "accelerator_kwargs": {},
        "project_kwargs": {},
        "tracker_project_name": "trl",
        "push_to_hub_if_best_kwargs": {},
        "compare_steps": 1,
        "steps": 20_000,
        "learning_rate": 1.41e-5,
        "batch_size": 128,
        "mini_batch_size": 128,
        "forward_batch_size": None,
        "gradient_accumulation_steps": 1,
        "ppo_epochs": 4,
        "max_grad_norm": None,
        "optimize_device_cache": False,
        "gradient_checkpointing": False,
        "adap_kl_ctrl": True,
        "init_kl_coef": 0.2,
        "kl_penalty": "kl",
        "target": 6,
        "horizon": 10_000,
        "gamma": 1,
        "lam": 0.95,
        "cliprange": 0.2,
        "cliprange_value": 0.2,
        "vf_coef": 0.1,
        "early_stopping": False,
        "target_kl": 1,
        "ratio_threshold": 10,
        "use_score_scaling": False,
        "use_score_norm": False,
        "score_clip": None,
        "whiten_rewards": False,
    }
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.exp_name


def test_older_and_standard_names():
    config = PPOConfig(optimize_cuda_cache=True, kl_coef=0.1, accelerator_kwargs={"cpu": True}, output_dir="x")
    assert (config.optimize_device_cache, config.init_kl_coef, config.use_cpu) == (True, 0.1, True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 8, "mini_batch_size": 3}, "batch_size=8 must be a multiple of .* = 3 × 1 = 3"),
        ({"batch_size": 8, "mini_batch_size": 4, "gradient_accumulation_steps": 4}, "4 × 4 = 16"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"kl_penalty": "ful"}, "Unknown kl_penalty 'ful'. Did you mean 'full'"),
        ({"use_score_norm": True}, "set use_score_scaling=True as well"),
        ({"push_to_hub_if_best_kwargs": {"private": True}}, 'needs a "repo_id"'),
        ({"accelerator_kwargs": {"mixed": "bf16"}}, "Unknown entry of accelerator_kwargs 'mixed'"),
        ({"horizon": 0}, "horizon must be positive, got 0"),
        ({"batchsize": 8}, "PPOConfig has no option 'batchsize'. Did you mean 'batch_size'"),
    ],
)
def test_options_that_cannot_be(options, words):
    with pytest.raises(ConfigError, match=words):
        PPOConfig(**options)


# ---- bad input ----


@pytest.fixture(scope="module")
def patient():
    """A trainer that is only ever given what it refuses."""
    from tests.conftest import MODELS, make_tokenizer

    return PPOTrainer(PPOConfig(batch_size=4), with_value_head(MODELS["llama"]()), None, make_tokenizer())


def changed(part, index, value):
    lists = [list(entries) for entries in TRIPLETS]
    lists[part][index] = value
    return lists


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((TRIPLETS[0][:3], *TRIPLETS[1:]), "queries has 3 entries, but batch_size=4.*set batch_size=3 in PPOConfig"),
        ((TRIPLETS[0], TRIPLETS[1][:2], TRIPLETS[2]), "responses has 2 entries, but batch_size=4"),
        ((*TRIPLETS[:2], TRIPLETS[2][:1]), "scores has 1 entries, but batch_size=4"),
        ((torch.zeros(4, 3).long(), *TRIPLETS[1:]), "queries has to be a list with one tensor per sample, got Tensor"),
        (changed(0, 2, torch.tensor([], dtype=torch.long)), r"queries\[2\] is empty"),
        (changed(1, 1, torch.tensor([], dtype=torch.long)), r"responses\[1\] is empty: sample at least one token"),
        (changed(1, 1, [5, 6]), r"responses\[1\] has to be a tensor of token ids, got list"),
        (changed(1, 3, torch.zeros(2, 3).long()), r"responses\[3\] has shape \(2, 3\)"),
        (changed(0, 0, torch.tensor([1.0])), r"queries\[0\] holds torch.float32 numbers: token ids are integers"),
        (changed(2, 2, torch.tensor([1.0, 2.0])), r"scores\[2\] has shape \(2,\): a score is one number per response"),
        (changed(2, 1, torch.tensor(float("nan"))), r"scores\[1\] is nan: give a finite number"),
        (changed(2, 0, float("inf")), r"scores\[0\] is inf"),
    ],
)
def test_triplets_that_cannot_be_learned_from(patient, arguments, words):
    with pytest.raises(DataError, match=words):
        patient.step(*arguments)


@pytest.mark.parametrize(
    ("masks", "words"),
    [
        ([[1, 1, 1], [1] * 5, [1]], "response_masks has 3 entries, but batch_size=4"),
        (
            [[1, 1, 1], [1] * 5, [1, 1], [1] * 4],
            r"response_masks\[2\] has 2 entries for the 1 tokens of responses\[2\]",
        ),
        ([[1, 1, 1], [0] * 5, [1], [1] * 4], r"response_masks\[1\] masks all 5 tokens"),
    ],
)
def test_masks_that_cannot_be(patient, masks, words):
    with pytest.raises(DataError, match=words):
        patient.step(*TRIPLETS, tensors(masks))


def test_trainers_that_cannot_be(make_model, tokenizer):
    model = with_value_head(make_model("llama"))
    with pytest.raises(ConfigError, match="model and ref_model are the same object"):
        PPOTrainer(PPOConfig(), model, model, tokenizer)
    with pytest.raises(ConfigError, match="model is missing"):
        PPOTrainer(PPOConfig())
    with pytest.raises(ConfigError, match="config and args are two names"):
        PPOTrainer(PPOConfig(), model, args=PPOConfig())
