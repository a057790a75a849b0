"""What the options of PPO do; adapters; sampling; data, tracking and saving."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from accelerate.tracking import GeneralTracker
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, GenerationConfig

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
from trl.core import LengthSampler
from trl.errors import ConfigError, DataError
from trl.models.reference import AdapterOff, SnapshotReference
from trl.models.value_heads.auto_models import AutoModelForCausalLMWithValueHead, with_value_head
from trl.trainers.ppo.generate import sampling_params
from trl.trainers.ppo.trainer import PPOConfig, PPOTrainer

pytestmark = pytest.mark.usefixtures("own_folder")


# ---- options ----


def test_scores_are_scaled_centred_and_clipped(make_ppo):
    trainer = make_ppo(use_score_scaling=True, use_score_norm=True, score_clip=0.5)
    scores = np.array(SCORES)
    scaled = (scores - scores.mean()) / scores.std(ddof=1)
    assert trainer.step(*TRIPLETS)["ppo/mean_scores"] == pytest.approx(scaled.clip(-0.5, 0.5).mean())
    both = np.concatenate([scores, scores + 10])
    scaled = (scores + 10 - both.mean()) / both.std(ddof=1)
    found = trainer.step(*TRIPLETS[:2], tensors(SCORES + np.float32(10)))["ppo/mean_scores"]
    assert found == pytest.approx(scaled.clip(-0.5, 0.5).mean())


@pytest.mark.parametrize("penalty", ["kl", "abs", "mse", "full"])
def test_penalties_start_at_zero_and_differ(make_ppo, penalty):
    same = make_ppo("gpt2", ref_model=None, kl_penalty=penalty)
    assert same.step(*TRIPLETS)["objective/kl"] == pytest.approx(0, abs=1e-5)
    found = make_ppo(kl_penalty=penalty).step(*TRIPLETS)
    log_ratios = found["objective/logprobs"] - found["objective/ref_logprobs"]
    if penalty == "full":
        assert found["objective/kl"] > 0
        return
    per_token = {"kl": log_ratios, "abs": np.abs(log_ratios), "mse": log_ratios**2 / 2}[penalty]
    assert found["objective/kl"] == pytest.approx(per_token.sum(1).mean(), rel=1e-5)


def test_the_full_penalty_is_the_divergence_of_whole_distributions(make_ppo):
    trainer = make_ppo(kl_penalty="full")
    model, reference = copy.deepcopy(trainer.model).eval(), with_value_head(trainer.ref_model).eval()
    found = trainer.step(*TRIPLETS)["objective/kl_dist"]
    for i, (query, response) in enumerate(zip(QUERIES, RESPONSES, strict=True)):
        with torch.no_grad():
            p, q = (plain_logprobs(m, query, response)[0] for m in (model, reference))
        assert found[i] == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-4)


def test_whitened_rewards_change_the_returns(make_ppo):
    plain = make_ppo(gamma=1, lam=1).step(*TRIPLETS)
    white = make_ppo(gamma=1, lam=1, whiten_rewards=True).step(*TRIPLETS)
    assert white["ppo/returns/var"] != pytest.approx(plain["ppo/returns/var"], rel=0.1)


def test_a_fixed_coefficient_stays(make_ppo):
    trainer = make_ppo(adap_kl_ctrl=False, init_kl_coef=0.7)
    for _ in range(2):
        assert trainer.step(*TRIPLETS)["objective/kl_coef"] == 0.7


def test_early_stopping_ends_the_epochs(make_ppo):
    trainer = make_ppo(epochs=4, rate=0.5, early_stopping=True, target_kl=-10)
    assert len(trainer.step(*TRIPLETS)["ppo/policy/ratio"]) == 13
    trainer = make_ppo(epochs=4, rate=0.0, early_stopping=True, target_kl=1)
    assert len(trainer.step(*TRIPLETS)["ppo/policy/ratio"]) == 4 * 13


def test_a_mini_batch_that_has_moved_too_far_is_skipped(make_ppo):
    trainer = make_ppo(ratio_threshold=0.5)
    before = parameters(trainer)
    with pytest.warns(UserWarning, match="1 of 1 mini-batches were skipped.*ratio_threshold=0.5"):
        trainer.step(*TRIPLETS)
    assert_same(parameters(trainer), before, rtol=0, atol=0)


def test_a_negative_kl_warns(make_ppo, make_model):
    trainer = make_ppo(ref_model=make_model("llama", seed=4))
    logprobs = [plain_logprobs(trainer.model.eval(), q, r)[0] for q, r in zip(QUERIES, RESPONSES, strict=True)]
    unlikely = [logp.argmin(-1)[:1] for logp in logprobs]
    with pytest.warns(UserWarning, match="The mean KL of this batch is -"):
        trainer.step(TRIPLETS[0], unlikely, TRIPLETS[2])


def test_dropout_is_off(make_model, make_ppo):
    dropping = with_value_head(make_model("gpt2", embd_pdrop=0.5, attn_pdrop=0.5, resid_pdrop=0.5))
    found = make_ppo(dropping.train(), ref_model=None).step(*TRIPLETS)
    assert found["objective/kl"] == pytest.approx(0, abs=1e-5)
    np.testing.assert_allclose(found["ppo/policy/ratio"], 1, atol=1e-5)


def test_gradient_checkpointing_changes_nothing(make_ppo):
    plain, checkpointed = make_ppo(), make_ppo(gradient_checkpointing=True)
    plain.step(*TRIPLETS)
    checkpointed.step(*TRIPLETS)
    assert_same(parameters(checkpointed), parameters(plain), rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped(make_ppo):
    trainer = make_ppo(rate=1.0, max_grad_norm=0.01)
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


def test_adam_by_default(make_model, tokenizer, caplog):
    trainer = PPOTrainer(PPOConfig(weight_decay=0.1), with_value_head(make_model("llama")), None, tokenizer)
    assert type(trainer.optimizer) is torch.optim.Adam
    assert trainer.optimizer.param_groups[0]["lr"] == 1.41e-5
    assert [text.split()[0] for text in caplog.messages if "no effect on step()" in text] == ["weight_decay=0.1"]


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
    assert caplog.text.count("This LlamaForCausalLM has no value head") == 1
    trainer.step(*TRIPLETS)


# ---- adapters ----

LORA = {"r": 4, "task_type": "CAUSAL_LM"}


def test_a_new_adapter_is_its_own_reference_when_off(make_model, tokenizer):
    model = AutoModelForCausalLMWithValueHead.from_pretrained(make_model("llama"), peft_config=LoraConfig(**LORA))
    base = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer = PPOTrainer(PPOConfig(batch_size=4, learning_rate=0.05, bf16=False), model, None, tokenizer)
    assert isinstance(trainer.reference, AdapterOff)
    first, second = trainer.step(*TRIPLETS), trainer.step(*TRIPLETS)
    assert first["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert abs(second["objective/kl"]) > 0.01
    np.testing.assert_allclose(first["objective/ref_logprobs"], second["objective/ref_logprobs"], atol=1e-5)
    assert_same(parameters(trainer), base, rtol=0, atol=0)


@pytest.mark.parametrize("penalty", ["kl", "full"])
def test_an_adapter_that_was_trained_before_is_compared_with_itself(make_model, tokenizer, penalty):
    adapted = get_peft_model(make_model("llama"), LoraConfig(**LORA, init_lora_weights=False))
    config = PPOConfig(batch_size=4, learning_rate=0.05, kl_penalty=penalty, bf16=False)
    trainer = PPOTrainer(config, adapted, None, tokenizer)
    assert isinstance(trainer.reference, SnapshotReference)
    first, second = trainer.step(*TRIPLETS), trainer.step(*TRIPLETS)
    assert first["objective/kl"] == pytest.approx(0, abs=1e-5)
    np.testing.assert_allclose(first["objective/ref_logprobs"], second["objective/ref_logprobs"], atol=1e-5)


def test_adapters_are_put_on_by_the_trainer(make_model, tokenizer):
    trainer = PPOTrainer(PPOConfig(batch_size=4), make_model("llama"), None, tokenizer, peft_config=LoraConfig(**LORA))
    assert isinstance(trainer.reference, AdapterOff)
    trainer.step(*TRIPLETS)


# ---- generate ----


@pytest.fixture
def sampling(make_ppo):
    return make_ppo("gpt2", ref_model=None)


def test_greedy_responses_are_those_of_the_model(sampling):
    found = sampling.generate(TRIPLETS[0], max_new_tokens=6, do_sample=False)
    for query, ids in zip(TRIPLETS[0], found, strict=True):
        query = query.to(sampling.current_device)
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
    assert len({tuple(ids.tolist()) for ids in in_pieces}) == 4
    assert max(map(len, [*found, *in_pieces])) <= 8


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


def test_the_reference_responds_too(make_ppo):
    trainer = make_ppo()
    found, reference = trainer.generate(TRIPLETS[0], max_new_tokens=8, do_sample=False, generate_ref_response=True)
    query = TRIPLETS[0][0].to(trainer.current_device)
    expected = trainer.ref_model.generate(query[None], max_new_tokens=8, do_sample=False)[0]
    assert torch.equal(reference[0], expected)
    assert any(not torch.equal(a, b) for a, b in zip(found, reference, strict=True))


def test_an_encoder_decoder_responds_with_its_start_token(make_ppo):
    trainer = make_ppo("t5")
    found = trainer.generate(TRIPLETS[0], max_new_tokens=6, do_sample=False)
    query = TRIPLETS[0][0].to(trainer.current_device)
    expected = trainer.model.generate(query[None], max_new_tokens=6, do_sample=False)[0]
    assert torch.equal(found[0], expected)


def test_options_in_a_generation_config(sampling):
    config = GenerationConfig(max_new_tokens=3, do_sample=True, eos_token_id=7)
    params = sampling_params(
        GenerationConfig(top_k=5, eos_token_id=2), {"generation_config": config, "do_sample": False}
    )
    assert (params.max_new_tokens, params.stop_token_ids, params.temperature) == (3, (7,), 0.0)
    assert all(len(ids) <= 3 for ids in sampling.generate(TRIPLETS[0], generation_config=config, return_prompt=False))


def test_options_that_do_not_exist(sampling):
    with pytest.raises(ConfigError, match=r"generate\(\) has no option 'max_new_tokns'. Did you mean 'max_new_tokens'"):
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


def test_statistics_reach_the_tracker(make_ppo):
    tracker = ListTracker()
    trainer = make_ppo(log_with=tracker)
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


def test_without_a_tracker_statistics_need_no_texts(make_ppo):
    trainer = make_ppo()
    stats = trainer.step(*TRIPLETS)
    assert trainer.log_stats(stats, {}, TRIPLETS[2])["env/reward_mean"] == pytest.approx(np.mean(SCORES))


def test_the_kl_coefficient_is_read_and_set_by_its_older_name(make_ppo):
    trainer = make_ppo(init_kl_coef=0.5, target=6.0, horizon=100)
    trainer.kl_ctl.value = 0.25
    assert trainer.step(*TRIPLETS)["objective/kl_coef"] == 0.25
    before = trainer.kl_ctl.value
    trainer.kl_ctl.update(current=60.0, n_steps=10)
    assert trainer.kl_ctl.value == pytest.approx(before * (1 + 0.2 * 10 / 100))
    with pytest.raises(AttributeError, match="horizon"):
        trainer.kl_ctl.horizon = 7


def test_attributes_of_other_releases(make_ppo, tmp_path):
    trainer = make_ppo()
    assert (trainer.is_encoder_decoder, trainer.is_peft_model) == (False, False)
    trainer.is_peft_model = False
    with pytest.raises(ConfigError, match=r"PPOTrainer\.is_peft_model is False and cannot be set to True"):
        trainer.is_peft_model = True
    with pytest.raises(ConfigError, match=r"PPOTrainer\.kl_ctl is .* Set `kl_ctl\.value`"):
        trainer.kl_ctl = 0.5
    trainer._save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()


def test_a_tracker_that_is_not_installed(make_ppo):
    with pytest.raises(ConfigError, match="log_with='aim', but that tracker is not installed"):
        make_ppo(log_with="aim")


def test_what_was_saved_comes_back(make_ppo, tmp_path):
    trainer = make_ppo()
    trainer.step(*TRIPLETS)
    trainer.save_pretrained(tmp_path / "saved")
    trainer.save_model(tmp_path / "model")
    for folder in ("saved", "model"):
        loaded = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / folder)
        assert_same(dict(loaded.named_parameters()), parameters(trainer))
        assert AutoTokenizer.from_pretrained(tmp_path / folder).eos_token == "</s>"
