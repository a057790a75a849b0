"""PPO on triplets: the classic listing, a step against a plain computation, invariances, learning."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from tests.trainers.ppo_support import (
    QUERIES,
    RESPONSES,
    SCORES,
    TRIPLETS,
    assert_same,
    parameters,
    plain_logprobs,
    tensors,
)
from trl.core import respond_to_batch
from trl.models.reference import create_reference_model
from trl.models.value_heads.auto_models import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    with_value_head,
)
from trl.trainers.ppo.trainer import PPOConfig, PPOTrainer

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


pytestmark = pytest.mark.usefixtures("own_folder")


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
def test_a_step_is_the_plain_computation(make_ppo, name):
    options = {"init_kl_coef": 0.3, "gamma": 0.97, "lam": 0.9, "vf_coef": 0.5}
    trainer = make_ppo(name, **options)
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


def test_the_second_epoch_is_clipped_around_the_first(make_ppo):
    """Two epochs are two optimizer steps on the same old log-probabilities and advantages."""
    trainer = make_ppo(epochs=2, rate=0.5)
    found = trainer.step(*TRIPLETS)
    ratios = found["ppo/policy/ratio"]
    assert len(ratios) == 2 * 13
    np.testing.assert_allclose(ratios[:13], 1, atol=1e-5)
    assert np.abs(ratios[13:] - 1).max() > 0.01
    assert found["ppo/policy/approxkl"] == pytest.approx(np.mean(np.log(ratios) ** 2) / 2, rel=1e-3)
    assert found["ppo/policy/policykl"] == pytest.approx(-np.mean(np.log(ratios)), rel=1e-3)


# ---- invariances ----


@pytest.mark.parametrize("epochs", [1, 2])
def test_splits_of_an_optimizer_step_give_the_same_model(make_ppo, epochs):
    splits = [(4, 1), (2, 2), (1, 4)]
    results = []
    for mini, accumulation in splits:
        trainer = make_ppo(mini_batch_size=mini, gradient_accumulation_steps=accumulation, epochs=epochs)
        found = trainer.step(*TRIPLETS)
        results.append((parameters(trainer), found["ppo/loss/total"]))
    for found, loss in results[1:]:
        assert_same(found, results[0][0], rtol=1e-4, atol=1e-5)
        assert loss == pytest.approx(results[0][1], rel=1e-4)


def test_a_token_budget_changes_nothing(make_ppo):
    whole, split = make_ppo(), make_ppo(max_tokens_per_micro_batch=8)
    whole.step(*TRIPLETS)
    split.step(*TRIPLETS)
    assert_same(parameters(split), parameters(whole), rtol=1e-4, atol=1e-5)


def test_the_order_of_the_batch_changes_nothing(make_ppo):
    first, second = make_ppo(), make_ppo()
    first.step(*TRIPLETS)
    second.step(*([part[i] for i in (2, 0, 3, 1)] for part in TRIPLETS))
    assert_same(parameters(second), parameters(first), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_layouts_give_the_same_model(make_ppo, layout):
    queries = [TRIPLETS[0][0]] * 3 + [TRIPLETS[0][1]]
    results = []
    for name in ("padded", layout):
        trainer = make_ppo(layout=name)
        trainer.step(queries, *TRIPLETS[1:])
        results.append(parameters(trainer))
    assert_same(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_padding_side_of_the_tokenizer_changes_nothing(make_ppo, tokenizer, side):
    found = []
    for chosen in ("right", side):
        trainer = make_ppo()
        trainer.tokenizer.padding_side = chosen
        greedy = trainer.generate(TRIPLETS[0], max_new_tokens=4, do_sample=False, return_prompt=False)
        trainer.step(*TRIPLETS)
        found.append((greedy, parameters(trainer)))
    tokenizer.padding_side = "right"
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))
    assert_same(found[1][1], found[0][1])


def test_masked_tokens_teach_nothing(make_ppo):
    """A token that is masked is read, but neither rewarded nor learned."""
    responses = tensors([[20, 21, 22], [30, 31, 32, 33, 34], [40], [50, 51, 52, 53]])
    masks = tensors([[1, 1, 1], [1, 1, 0, 0, 0], [1], [1, 0, 1, 1]])
    trainer = make_ppo()
    found = trainer.step(TRIPLETS[0], responses, TRIPLETS[2], masks)
    assert len(found["ppo/policy/advantages"]) == 9
    assert (found["objective/logprobs"] != 0).sum() == 9
    cut = make_ppo()
    shorter = [*responses[:1], responses[1][:2], *responses[2:]]
    cut.step(TRIPLETS[0], shorter, TRIPLETS[2], [masks[0], masks[1][:2], *masks[2:]])
    assert_same(parameters(trainer), parameters(cut), rtol=1e-4, atol=1e-5)


def test_a_start_token_of_a_generated_response_is_no_token(make_ppo):
    one, other = make_ppo("t5"), make_ppo("t5")
    one.step(*TRIPLETS)
    found = other.step(TRIPLETS[0], tensors([[0, *row] for row in RESPONSES]), TRIPLETS[2])
    assert found["tokens/responses_len_mean"] == 13 / 4
    assert_same(parameters(other), parameters(one))


# ---- learning ----


def test_steps_move_the_reference(make_ppo):
    trainer = make_ppo(sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=1.0)
    policy, reference = trainer.model.pretrained_model.lm_head.weight, trainer.ref_model.lm_head.weight
    for moves in (False, True):
        trainer.step(*TRIPLETS)
        assert torch.equal(reference, policy) == moves


def test_the_reward_rises(make_model, tokenizer):
    """The reward counts one token of eight: PPO has to make it the usual one."""
    torch.manual_seed(0)
    model = with_value_head(make_model("llama"))
    config = PPOConfig(batch_size=32, mini_batch_size=16, learning_rate=5e-3, init_kl_coef=0.05, ppo_epochs=4)
    trainer = PPOTrainer(config, model, None, tokenizer)
    queries = [torch.tensor([5 + i % 8, 20]) for i in range(32)]
    means = []
    for _ in range(20):
        responses = trainer.generate(queries, max_new_tokens=8, do_sample=True, eos_token_id=-1, return_prompt=False)
        rewards = [(response == 42).float().sum() for response in responses]
        means.append(trainer.step(queries, responses, rewards)["ppo/mean_scores"])
    assert np.mean(means[:2]) < 1
    assert np.mean(means[-3:]) > 4
