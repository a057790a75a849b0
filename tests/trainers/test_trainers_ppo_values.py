"""PPO with each source of values and each reference: one step, the loop, checkpoints, adapters for everything."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForSequenceClassification

from tests.trainers.ppo_support import PROMPTS, TRIPLETS, assert_same, classifier, parameters
from trl.errors import ConfigError
from trl.models.reference import AdapterOff, FrozenModel, SharedTrunk, create_reference_model
from trl.models.value_heads.auto_models import AutoModelForCausalLMWithValueHead, with_value_head
from trl.models.value_heads.heads import ValueBranch, ValueModel
from trl.rewards.model import RewardModel
from trl.trainers.ppo.trainer import PPOConfig, PPOTrainer

WIDE = {"r": 4, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
pytestmark = pytest.mark.usefixtures("own_folder")


def headed(make_model, name="llama"):
    torch.manual_seed(7)
    return with_value_head(make_model(name))


# ---- a network of the value's own ----


@pytest.mark.parametrize("vf_coef", [0.0, 0.5])
def test_a_network_like_the_policys_leaves_the_policys_gradient_alone(make_model, make_ppo, vf_coef):
    """Values, hence advantages, are the same; what the value loss would do to the policy, it does to the network."""
    plain = make_ppo(headed(make_model), vf_coef=0.0)
    own = make_ppo(
        headed(make_model), vf_coef=vf_coef, rate=0.1, keywords={"value_model": copy.deepcopy(headed(make_model))}
    )
    assert isinstance(own.model.v_head, ValueModel)
    before = parameters(own)
    first, second = plain.step(*TRIPLETS), own.step(*TRIPLETS)
    assert second["ppo/val/mean"] == pytest.approx(first["ppo/val/mean"], rel=1e-5)
    policy = {name: p for name, p in parameters(plain).items() if name.startswith("pretrained_model.")}
    assert_same(parameters(own), policy, rtol=1e-5, atol=1e-6)
    network = {name: p for name, p in before.items() if name.startswith("v_head.")}
    moved = [name for name, p in network.items() if not torch.equal(parameters(own)[name], p)]
    assert bool(moved) == (vf_coef > 0)


def test_the_networks_gradient_is_that_of_the_value_loss(make_model, make_ppo):
    """With the policy frozen where a head would read it, the head on a network learns what the head alone learns."""
    frozen, own = headed(make_model), headed(make_model)
    frozen.pretrained_model.requires_grad_(False)
    network = copy.deepcopy(frozen)
    one = make_ppo(frozen, vf_coef=0.7)
    other = make_ppo(own, vf_coef=0.7, keywords={"value_model": network})
    one.step(*TRIPLETS)
    other.step(*TRIPLETS)
    expected = one.model.v_head.summary
    torch.testing.assert_close(other.model.v_head.summary.weight, expected.weight)
    torch.testing.assert_close(other.model.v_head.summary.bias, expected.bias)


def test_gradients_of_both_are_clipped_together(make_model, make_ppo):
    trainer = make_ppo(headed(make_model), rate=1.0, max_grad_norm=0.01, keywords={"value_model": classifier()})
    before = parameters(trainer)
    trainer.step(*TRIPLETS)
    moved = sum((p - before[name]).square().sum() for name, p in parameters(trainer).items()) ** 0.5
    assert moved.item() == pytest.approx(0.01, rel=1e-3)


def test_one_optimizer_trains_policy_and_network(make_model, tokenizer):
    trainer = PPOTrainer(
        PPOConfig(batch_size=4, learning_rate=0.01), make_model("llama"), None, tokenizer, value_model=classifier()
    )
    before = parameters(trainer)
    trainer.step(*TRIPLETS)
    moved = {name for name, p in parameters(trainer).items() if not torch.equal(p, before[name])}
    assert {name for name in before if name.startswith("v_head.")} - moved <= {"v_head.model.wpe.weight"}
    assert any(name.startswith("pretrained_model.") for name in moved)
    assert len(trainer.optimizer.param_groups) == 1


@pytest.mark.parametrize("kind", ["classifier", "language model", "encoder-decoder"])
def test_a_network_by_name(make_model, tokenizer, tmp_path, kind):
    network = {
        "classifier": classifier,
        "language model": lambda: make_model("gpt2"),
        "encoder-decoder": lambda: make_model("bart"),
    }[kind]()
    network.save_pretrained(tmp_path / "network")
    policy = make_model("t5" if kind == "encoder-decoder" else "llama")
    trainer = PPOTrainer(PPOConfig(batch_size=4), policy, None, tokenizer, value_model=str(tmp_path / "network"))
    trainer.step(*TRIPLETS)
    embeddings = trainer.model.v_head.model.get_input_embeddings().weight
    torch.testing.assert_close(embeddings.cpu(), network.get_input_embeddings().weight, atol=1e-3, rtol=0)


def test_networks_that_cannot_be(make_model, tokenizer):
    model = make_model("llama")
    with pytest.raises(ConfigError, match="value_model and model are the same object"):
        PPOTrainer(PPOConfig(), model, None, tokenizer, value_model=model)
    judge = classifier()
    with pytest.raises(ConfigError, match="value_model and reward_model are the same object"):
        PPOTrainer(PPOConfig(), model, None, tokenizer, reward_model=judge, value_model=judge)
    with pytest.raises(ConfigError, match="layout='shared' does not work with this value_model: its results differ"):
        PPOTrainer(PPOConfig(layout="shared", bf16=False), model, None, tokenizer, value_model=make_model("gemma3"))


def test_a_layout_that_the_network_cannot_have_is_left(make_model, tokenizer, caplog):
    trainer = PPOTrainer(
        PPOConfig(batch_size=4, bf16=False), make_model("llama"), None, tokenizer, value_model=make_model("gemma2")
    )
    assert trainer.layout == "padded"
    assert "the value model does not work with 'shared': its" in caplog.text
    trainer.step(*TRIPLETS)


# ---- upper layers of the value's own ----


def test_a_branch_learns_and_the_policys_gradient_is_the_policys(make_model, make_ppo):
    plain = make_ppo(headed(make_model), vf_coef=0.0)
    own = make_ppo(headed(make_model), vf_coef=0.0, num_value_layers=1)
    assert isinstance(own.model.v_head, ValueBranch)
    assert own.model.v_head.layers[0].self_attn.config is own.model.pretrained_model.config  # they attend alike
    plain.step(*TRIPLETS)
    own.step(*TRIPLETS)
    policy = {name: p for name, p in parameters(plain).items() if name.startswith("pretrained_model.")}
    assert_same(parameters(own), policy, rtol=1e-5, atol=1e-6)


# ---- lower layers in common with the reference ----


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("by", ["trainer", "hand"])
def test_a_shared_trunk_gives_the_steps_of_a_whole_copy(make_model, tokenizer, name, by):
    def trainer_of(reference, **keywords):
        config = PPOConfig(batch_size=4, ppo_epochs=2, learning_rate=1e-3, bf16=False)
        return PPOTrainer(config, model, reference, tokenizer, **keywords)

    model = headed(make_model, name)
    whole = copy.deepcopy(model.pretrained_model)
    if by == "hand":
        shared = trainer_of(create_reference_model(model, num_shared_layers=1))
    else:
        shared = trainer_of(None, num_shared_layers=1)
    assert isinstance(shared.reference, SharedTrunk)
    model = copy.deepcopy(model)
    apart = trainer_of(whole)
    assert type(apart.reference) is FrozenModel
    for _ in range(2):
        torch.manual_seed(1)
        found = shared.step(*TRIPLETS)
        torch.manual_seed(1)
        expected = apart.step(*TRIPLETS)
        assert found["objective/kl"] == pytest.approx(expected["objective/kl"], abs=1e-5)
    assert found["objective/kl"] != pytest.approx(0, abs=1e-4)
    assert_same(parameters(shared), parameters(apart), rtol=1e-5, atol=1e-6)


def test_layers_in_common_need_a_copy(make_model, tokenizer):
    with pytest.raises(ConfigError, match="num_shared_layers=1 is for a reference that the trainer copies"):
        PPOTrainer(PPOConfig(), make_model("llama"), make_model("llama"), tokenizer, num_shared_layers=1)


# ---- the loop ----


@pytest.mark.parametrize("source", ["network", "branch", "network and shared trunk"])
def test_a_loop_resumes_with_whatever_gives_values(make_model, make_loop, tmp_path, source):
    def make(folder):
        network = {"value_model": classifier()} if source.startswith("network") else {}
        keywords = {**network, **({"num_shared_layers": 1} if source.endswith("trunk") else {})}
        layers = 1 if source == "branch" else 0
        options = {"max_steps": 7, "save_strategy": "steps", "save_steps": 3, "num_value_layers": layers}
        return make_loop(headed(make_model), head=False, folder=folder, keywords=keywords, **options)

    whole, again = make("whole"), make("again")
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_same(parameters(again), parameters(whole), rtol=0, atol=0)
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "whole" / "checkpoint-6")
    assert type(loaded.v_head) is type(whole.model.v_head)


def test_the_best_network_is_loaded(make_model, make_loop):
    keywords = {"value_model": classifier(), "eval_dataset": PROMPTS.select(range(4))}
    trainer = make_loop(
        headed(make_model), head=False, keywords=keywords, save_strategy="steps", save_steps=2,
        eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, metric_for_best_model="reward",
    )  # fmt: skip
    trainer.train()
    best = AutoModelForCausalLMWithValueHead.from_pretrained(trainer.state.best_model_checkpoint)
    assert_same(parameters(trainer), dict(best.named_parameters()), rtol=0, atol=0)


def learned(trainer):
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    return np.mean(rewards[:2]), np.mean(rewards[-3:])


LEARNING = {
    "batch_size": 32, "mini_batch_size": 16, "learning_rate": 5e-3, "init_kl_coef": 0.05, "ppo_epochs": 4,
    "max_steps": 160, "max_completion_length": 8, "lr_scheduler_type": "constant", "logging_steps": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    "source",
    [pytest.param("network", marks=pytest.mark.slow), pytest.param("branch and shared trunk", marks=pytest.mark.long)],
)
def test_the_reward_rises_with_other_values(make_model, make_loop, source):
    network = source == "network"
    keywords = {"value_model": classifier()} if network else {"num_shared_layers": 1}
    trainer = make_loop(
        headed(make_model), head=False, keywords=keywords, num_value_layers=0 if network else 1, **LEARNING
    )
    trainer.train()
    before, after = learned(trainer)
    assert before < 1
    assert after > 4


@pytest.mark.long
def test_an_encoder_decoder_learns(make_loop):
    trainer = make_loop("t5", **LEARNING)
    trainer.train()
    before, after = learned(trainer)
    assert before < 1
    assert after > 4


# ---- everything in one base model ----


@pytest.fixture
def in_one_base(make_model, tmp_path):
    """A model whose policy and reward are adapters of one base."""
    base = make_model("llama")
    base.save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    judge = LlamaForSequenceClassification(LlamaConfig(**{**base.config.to_dict(), "num_labels": 1}))
    judge.model.load_state_dict(base.model.state_dict())
    judge.score.weight.data.mul_(20)
    judge = get_peft_model(judge, LoraConfig(r=2, task_type="SEQ_CLS", init_lora_weights=False))
    judge.save_pretrained(tmp_path / "reward")
    torch.manual_seed(2)
    return AutoModelForCausalLMWithValueHead.from_pretrained(
        tmp_path / "base", peft_config=LoraConfig(**WIDE), reward_adapter=str(tmp_path / "reward")
    ), judge.eval()


def assert_only_policy_and_head_train(trainer, before):
    for name, parameter in trainer.model.named_parameters():
        trained = ".default." in name or name.startswith("v_head.")
        assert trained != torch.equal(parameter, before[name]), name


def test_adapters_for_everything_step_by_step(in_one_base, tokenizer):
    """Policy, reference, values and reward in one base model: the mean reward of all answers of one token rises, and
    nothing else moves than policy and value head."""
    model, judge = in_one_base
    config = PPOConfig(batch_size=64, learning_rate=0.01, init_kl_coef=0.02, ppo_epochs=8, cliprange=0.5, bf16=False)
    trainer = PPOTrainer(config, model, None, tokenizer)
    assert isinstance(trainer.reference, AdapterOff)
    device = trainer.current_device
    before, queries = parameters(trainer), [torch.tensor([5 + i % 4, 20], device=device) for i in range(64)]
    answers = torch.tensor([[5 + i, 20, token] for i in range(4) for token in range(1, 99)])  # 0 is padding
    rewards = model.compute_reward_score(answers.to(device))[:, -1, 0].view(4, 98)
    with torch.no_grad():
        torch.testing.assert_close(rewards.flatten().cpu(), judge(answers).logits[:, 0], atol=1e-4, rtol=1e-4)

    @torch.no_grad()
    def mean_reward():
        return (model(torch.stack(queries[:4]))[0][:, -1].softmax(-1)[:, 1:] * rewards).sum(1).mean().item()

    start = mean_reward()
    for _ in range(3):
        responses = trainer.generate(queries, max_new_tokens=1, do_sample=True, return_prompt=False)
        texts = torch.stack([torch.cat(pair) for pair in zip(queries, responses, strict=True)])
        trainer.step(queries, responses, list(model.compute_reward_score(texts)[:, -1, 0]))
    assert mean_reward() > start + 0.1
    assert_only_policy_and_head_train(trainer, before)


def test_adapters_for_everything_in_the_loop(in_one_base, make_loop, tokenizer):
    """The reward adapter rewards without being asked to, as the reward model that it was would."""
    model, judge = in_one_base
    trainer = make_loop(model, head=False, reward_funcs=None)
    prompts, completions = ["ab", "cb"], ["xyz", "hello"]
    expected = RewardModel(judge, tokenizer)(prompts, completions)
    assert trainer.rewards[0].function(prompts, completions) == pytest.approx(expected, abs=1e-4)
    before = parameters(trainer)
    trainer.train()
    assert_only_policy_and_head_train(trainer, before)
    assert "rewards/reward_adapter/mean" in trainer.state.log_history[0]
