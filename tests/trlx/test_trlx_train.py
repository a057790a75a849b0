"""`trlx.train` in its modes, with scripts as they are written: what they are given, what they get back, what is refused."""

from __future__ import annotations

import datasets
import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

import trlx
from tests.conftest import MODELS, make_tokenizer
from trl.algorithms.ppo import PPO
from trl.errors import ConfigError, DataError
from trl.models.value_heads.ilql import AutoModelForCausalLMWithILQLHeads
from trl.rewards.call import RewardError
from trl.types import Experience
from trlx.data.configs import TRLConfig
from trlx.data.default_configs import default_ilql_config, default_ppo_config, default_sft_config
from trlx.models.modeling_ppo import PPOConfig
from trlx.trainer.accelerate_ppo_trainer import ScaledPPO, scaled
from trlx.trainer.accelerate_rft_trainer import RFTConfig


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(autouse=True)
def quiet():
    trlx.logging.set_verbosity(trlx.logging.ERROR)
    trlx.logging.disable_progress_bar()
    yield
    trlx.logging.enable_progress_bar()
    trlx.logging.disable_default_handler()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Folders of tiny models with their tokenizer."""
    made = {}
    for name in ("gpt2", "t5"):
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        model = MODELS[name](n_layer=3) if name == "gpt2" else MODELS[name]()
        model.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        made[name] = str(folder)
    return made


@pytest.fixture
def config_of(folders, tmp_path):
    """`config_of(default_ppo_config, {...})`: a default, made tiny."""

    def make(default, changes=None, name="gpt2"):
        tiny = {
            "model": {"model_path": folders[name], "num_layers_unfrozen": -1},
            "tokenizer.tokenizer_path": folders[name],
            "optimizer.kwargs.lr": 1e-3,
            "scheduler.kwargs.eta_min": 1e-3,
            "train": {
                "seq_length": 24,
                "batch_size": 4,
                "total_steps": 2,
                "eval_interval": 2,
                "checkpoint_interval": 2,
                "checkpoint_dir": str(tmp_path / "ckpts"),
                "tracker": None,
            },
            "method.gen_kwargs.max_new_tokens": 4,
        }
        if name == "t5":
            tiny["model"]["model_arch_type"] = "seq2seq"
        config = TRLConfig.update(default(), tiny)
        if default is default_ppo_config:
            config = config.evolve(method={"num_rollouts": 8, "chunk_size": 4, "ppo_epochs": 1})
        return TRLConfig.update(config, changes or {})

    return make


def default_rft_config() -> TRLConfig:
    config = default_ppo_config().to_dict()
    method = RFTConfig(n_generations_per_prompt=4, start_percentile=0.5, end_percentile=0.5, n_improve_steps=2)
    return TRLConfig.from_dict({**config, "method": method.to_dict()}).evolve(train={"trainer": "AccelerateRFTTrainer"})


PROMPTS = ["one ", "two ", "three ", "four "]


def longer(samples, prompts, outputs, **kwargs):
    return [float(len(output)) for output in outputs]


# ---- the modes ----


def test_online(config_of, tmp_path):
    seen = []

    def reward_fn(samples, prompts, outputs, tokenizer, label, **kwargs):
        seen.append((samples, prompts, outputs, label))
        assert tokenizer.eos_token == "</s>"
        return longer(samples, prompts, outputs)

    rows = [{"prompt": prompt, "label": i} for i, prompt in enumerate(PROMPTS)]
    trainer = trlx.train(
        reward_fn=reward_fn,
        prompts=rows,
        eval_prompts=rows[:2],
        metric_fn=lambda samples, outputs, label, **kwargs: {"first": [float(x) for x in label]},
        config=config_of(default_ppo_config, {"train.rollout_logging_dir": str(tmp_path / "rollouts")}),
        stop_sequences=["x"],
    )
    samples, prompts, outputs, labels = seen[0]
    assert prompts == PROMPTS[:2]
    assert labels == [0, 1]
    assert [p + o for p, o in zip(prompts, outputs, strict=True)] == samples
    assert not any("x" in output for output in outputs)
    assert trainer.trainer.state.global_step == 2
    logged = [log for log in trainer.trainer.state.log_history if "reward/mean" in log]
    assert [log["step"] for log in logged] == [0, 2]
    assert logged[0]["metrics/first"] == 0.5
    assert len(list((tmp_path / "rollouts").glob("*/epoch_*.json"))) == 1


def test_what_is_left_behind(config_of, tmp_path):
    trainer = trlx.train(reward_fn=longer, prompts=PROMPTS, config=config_of(default_ppo_config))
    folder = tmp_path / "ckpts"
    for each in ("checkpoint_2", "best_checkpoint"):
        AutoModelForCausalLM.from_pretrained(folder / each / "hf_model")
        AutoTokenizer.from_pretrained(folder / each / "hf_model")
    trainer.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "value_head.safetensors").is_file()
    assert set(trainer.evaluate()) == {"reward/mean"}
    assert trainer.config.train.total_steps == 2
    assert trainer.accelerator.num_processes == 1
    assert trainer.model.pretrained_model.config.model_type == "gpt2"
    ids = trainer.tokenizer(PROMPTS[:2], padding=True, return_tensors="pt")
    made = trainer.generate(ids["input_ids"], ids["attention_mask"], max_new_tokens=3)
    assert made.shape[0] == 2
    assert made.shape[1] <= ids["input_ids"].shape[1] + 3
    assert torch.equal(made[:, : ids["input_ids"].shape[1]], ids["input_ids"])
    assert trainer.generate_eval(ids["input_ids"], do_sample=False).shape[0] == 2


def test_a_run_goes_on_from_its_checkpoint(config_of, tmp_path):
    rows, options = PROMPTS * 2, {"reward_fn": longer, "eval_prompts": PROMPTS}
    whole = trlx.train(prompts=rows, config=config_of(default_ppo_config, {"train.total_steps": 4}), **options)
    expected = {name: tensor.clone() for name, tensor in whole.model.state_dict().items()}
    checkpoint = tmp_path / "ckpts" / "checkpoint_2"
    changes = {"train": {"total_steps": 4, "resume_from_checkpoint": str(checkpoint)}}
    found = trlx.train(prompts=rows, config=config_of(default_ppo_config, changes), **options)
    assert found.trainer.state.global_step == 4
    for name, tensor in found.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_rewards_of_tokens(config_of):
    """Lists of one number per token; the sum is what is logged."""
    trainer = trlx.train(
        reward_fn=lambda outputs, **kwargs: [[0.5] * len(output) for output in outputs],
        prompts=PROMPTS,
        config=config_of(default_ppo_config),
    )
    logged = [log["reward/mean"] for log in trainer.trainer.state.log_history if "reward/mean" in log]
    assert 0 < logged[-1] <= 2.0


@pytest.mark.parametrize("scale", ["running", "ref"])
def test_scores_are_scaled(config_of, scale):
    """By the standard deviation of all 16 scores of two rollouts, or of the 8 of the first."""
    changes = {"method.scale_reward": scale, "train.total_steps": 4}
    trainer = trlx.train(reward_fn=longer, prompts=PROMPTS, config=config_of(default_ppo_config, changes))
    algorithm = trainer.trainer.algorithm
    assert algorithm.moments.count == (16 if scale == "running" else 8)


def test_a_standard_deviation_that_is_given():
    algorithm = ScaledPPO(scaling="ref", ref_std=4.0)
    experience = Experience(torch.tensor([2.0, 6.0]), torch.arange(2), torch.ones(2, 1))
    assert algorithm.with_scores(experience).signals["scores"].tolist() == [0.5, 1.5]
    dense = experience.with_signals(dense_rewards=torch.tensor([[2.0], [6.0]]))
    assert algorithm.with_scores(dense).signals["dense_rewards"].tolist() == [[0.5], [1.5]]


def test_moments_that_nothing_reads_are_said(caplog):
    trlx.logging.set_verbosity(trlx.logging.WARNING)
    assert scaled(PPO(), PPOConfig(scale_reward="ref", ref_std=4.0)).ref_std == 4.0
    assert not caplog.text
    assert scaled(PPO(), PPOConfig(scale_reward=False)).scaling is None  # as YAML files of trlX have it
    scaled(PPO(), PPOConfig(scale_reward="running", ref_mean=1.0, ref_std=4.0))
    assert "method.ref_mean=1.0 has no effect" in caplog.text
    assert "method.ref_std=4.0 has no effect with scale_reward='running'" in caplog.text


@pytest.mark.parametrize(
    ("model", "method", "shared"),
    [
        ({"num_layers_unfrozen": 1}, {}, True),
        ({"num_layers_unfrozen": 1}, {"num_value_layers_unfrozen": 1}, True),
        ({"num_layers_unfrozen": -1}, {}, False),
        (
            {"num_layers_unfrozen": 2, "peft_config": LoraConfig(r=2, fan_in_fan_out=True, task_type="CAUSAL_LM")},
            {},
            False,
        ),
        ({"num_layers_unfrozen": 0}, {}, False),
    ],
)
def test_what_of_the_model_trains(config_of, model, method, shared):
    config = config_of(default_ppo_config, {"method": method})
    config.model.num_layers_unfrozen = model["num_layers_unfrozen"]
    config.model.peft_config = model.get("peft_config")
    trainer = trlx.train(reward_fn=longer, prompts=PROMPTS, config=config)
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert any(name.startswith("v_head") for name in trained)
    layers = {name.split(".h.")[1][0] for name in trained if "pretrained_model" in name and ".h." in name}
    expected = {-1: {"0", "1", "2"}, 0: set(), 1: {"2"}, 2: {"0", "1", "2"}}
    assert layers == expected[config.model.num_layers_unfrozen]
    assert (type(trainer.trainer.reference).__name__ == "SharedTrunk") == shared
    assert any(name.startswith("v_head.layers") for name in trained) == bool(method)


def test_offline(config_of, tmp_path):
    samples = [["say ", "a"], ["say ", "b", "again ", "c"], "text"] * 4
    trainer = trlx.train(
        samples=samples,
        rewards=[1.0, 0.5, 0.0] * 4,
        eval_prompts=PROMPTS[:2],
        metric_fn=lambda samples, **kwargs: {"length": [float(len(s)) for s in samples]},
        config=config_of(default_ilql_config, {"method.gen_kwargs.beta": [0, 2]}),
    )
    (last, *_) = [log for log in trainer.trainer.state.log_history[::-1] if "metrics/length@beta=2" in log]
    assert {"metrics/length@beta=0", "metrics/length@beta=2"} <= set(last)
    trainer.save_pretrained(tmp_path / "saved")
    AutoModelForCausalLMWithILQLHeads.from_pretrained(tmp_path / "saved")
    ids = torch.tensor([[5, 6]])
    assert trainer.generate(ids, beta=1).shape[0] == 1


def test_offline_of_an_encoder_decoder(config_of):
    trainer = trlx.train(
        samples=[["say ", "a"], ["say ", "b"]] * 4,
        rewards=[1.0, 0.0] * 4,
        eval_prompts=PROMPTS[:2],
        config=config_of(default_ilql_config, name="t5"),
    )
    assert trainer.generate(torch.tensor([[5, 6, 2]]), max_new_tokens=3).shape[1] <= 4


def test_online_of_an_encoder_decoder(config_of):
    seen = []

    def reward_fn(samples, **kwargs):
        seen.extend(samples)
        return [1.0] * len(samples)

    trlx.train(reward_fn=reward_fn, prompts=PROMPTS, config=config_of(default_ppo_config, name="t5"))
    assert all("<sep>" in sample for sample in seen)


@pytest.mark.parametrize("samples", [["some text", "more"] * 4, [["ask ", "answer"], ["a ", "b", " c ", "d"]] * 4])
def test_imitation(config_of, samples):
    trainer = trlx.train(samples=samples, eval_prompts=PROMPTS[:2], config=config_of(default_sft_config))
    assert trainer.trainer.state.global_step == 2
    example = trainer.trainer.to_examples(list(trainer.trainer.train_dataset))[0]
    trained = [t for t, keep in zip(example.completions[0].ids, example.completions[0].mask, strict=True) if keep]
    assert trainer.tokenizer.decode(trained) == ("some text</s>" if isinstance(samples[0], str) else "answer</s>")


def test_rejection_sampling(config_of):
    trainer = trlx.train(
        reward_fn=lambda samples, prompts, outputs: longer(samples, prompts, outputs),
        prompts=PROMPTS,
        config=config_of(default_rft_config),
    )
    assert trainer.trainer.state.global_step == 2
    assert "reward/mean" in trainer.evaluation.last


def test_a_model_from_a_configuration(config_of):
    config = config_of(default_sft_config)
    made = MODELS["gpt2"]().config
    trainer = trlx.train(made, samples=["a", "b"] * 4, eval_prompts=["a"], config=config)
    assert trainer.model.config.n_layer == made.n_layer


# ---- what is refused ----


def samples_and(**arguments):
    return {"samples": [["a", "b"]] * 4, "rewards": [1.0] * 4, **arguments}


@pytest.mark.parametrize(
    ("default", "arguments", "error", "words"),
    [
        (
            default_ilql_config,
            samples_and(rewards=[1.0]),
            DataError,
            "4 samples and 1 rewards were given: give one reward",
        ),
        (
            default_ilql_config,
            samples_and(samples=[["a"]] * 4),
            DataError,
            r"samples\[0\]: In a dialogue, prompts and outputs alternate",
        ),
        (default_ilql_config, samples_and(reward_fn=longer), ConfigError, "reward_fn and rewards are both given"),
        (default_ilql_config, {"rewards": [1.0]}, ConfigError, "rewards are given without samples"),
        (
            default_sft_config,
            {"samples": ["a"], "reward_fn": longer},
            ConfigError,
            "reward_fn and samples are both given",
        ),
        (default_sft_config, {}, ConfigError, "Neither reward_fn nor samples is given"),
        (default_ppo_config, {"samples": ["a"]}, ConfigError, "'AcceleratePPOTrainer' samples by itself: give prompts"),
        (
            default_sft_config,
            {"reward_fn": longer},
            ConfigError,
            "'AccelerateSFTTrainer' learns from samples: give samples",
        ),
        (default_ppo_config, {"reward_fn": longer, "prompts": []}, DataError, "prompts is empty"),
        (
            default_ppo_config,
            {"reward_fn": longer, "prompts": "a b"},
            DataError,
            "prompts is one text, 'a b': give a list",
        ),
        (default_sft_config, {"samples": "a b"}, DataError, "samples is one text, 'a b': give a list"),
        (default_ppo_config, {"reward_fn": "longer"}, ConfigError, "reward_fn is a str: give a function"),
        (default_ilql_config, samples_and(rewards=["x"] * 4), DataError, r"rewards\[0\] is 'x': give a number"),
        (
            default_ppo_config,
            {"reward_fn": lambda samples, **kwargs: [1.0], "prompts": PROMPTS},
            RewardError,
            "Reward function 'reward_fn' gave .* rewards? for .* samples: it has to give one each",
        ),
        (
            default_ppo_config,
            {"reward_fn": longer, "prompts": PROMPTS, "metric_fn": lambda samples, **kwargs: {"m": [1.0]}},
            DataError,
            "metric_fn returned 1 values of 'metrics/m' for 4 samples",
        ),
        (
            default_ppo_config,
            {"reward_fn": longer, "prompts": PROMPTS, "metric_fn": lambda xs: {"m": [1.0] * len(xs)}},
            ConfigError,
            "metric_fn has the argument 'xs', .* samples, prompts, outputs",
        ),
    ],
)
def test_arguments_that_do_not_go_together(config_of, default, arguments, error, words):
    with pytest.raises(error, match=words) as refused:
        trlx.train(config=config_of(default), **arguments)
    assert isinstance(refused.value, ValueError)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train.seq_length": 4}, "train.seq_length=4 leaves no token for a prompt, with .*max_new_tokens=4"),
        ({"model.model_arch_type": "seq2seq"}, "model_arch_type='seq2seq', but .* is 'causal'"),
        ({"model.model_arch_type": "encoder"}, "Unknown model.model_arch_type 'encoder'"),
        ({"method.scale_reward": "sometimes"}, "Unknown method.scale_reward 'sometimes'"),
        (
            {"train.trainer": "AccelerateILQLTrainer"},
            "takes method.name='ILQLConfig', and the configuration has 'PPOConfig'",
        ),
        ({"train.minibatch_size": 3}, "train.batch_size=4 has to be a multiple of train.minibatch_size=3"),
        ({"train.tracker": "mlflow"}, "Unknown train.tracker 'mlflow'"),
        ({"optimizer.name": "lion"}, "Unknown optimizer.name 'lion'"),
        ({"optimizer.kwargs.beta": 1}, "optimizer.kwargs.beta is no argument of adamw. Did you mean 'betas'"),
    ],
)
def test_options_that_do_not_go_together(config_of, changes, words):
    with pytest.raises(ConfigError, match=words):
        trlx.train(reward_fn=longer, prompts=PROMPTS, config=config_of(default_ppo_config, changes))


def test_a_tracker_that_is_not_there_is_none(config_of, monkeypatch, caplog):
    monkeypatch.setattr("trlx.trainer.options.is_available", lambda module: False)
    trlx.logging.set_verbosity(trlx.logging.WARNING)
    trainer = trlx.train(
        samples=["a", "b"] * 4, eval_prompts=["a"], config=config_of(default_sft_config, {"train.tracker": "wandb"})
    )
    assert trainer.trainer.args.report_to == []
    assert "wandb is not installed, or not logged in: nothing is sent" in caplog.text


def test_older_and_default_arguments(config_of, monkeypatch):
    with pytest.warns(FutureWarning, match="dataset=.samples, rewards. is deprecated"):
        trlx.train(dataset=([["a", "b"]] * 4, [1.0] * 4), config=config_of(default_ilql_config))
    monkeypatch.setattr("trlx.trlx.default_sft_config", lambda: config_of(default_sft_config))
    monkeypatch.setattr("trlx.trlx.default_sft_config.__name__", "default_sft_config", raising=False)
    with pytest.warns(UserWarning, match="config is not given"):
        trlx.train(samples=["a", "b"] * 4)


def test_minibatches_change_nothing(config_of, tmp_path, monkeypatch):
    """Steps in one forward pass, or in four, by plain gradient descent in float32."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)

    def trained(size):
        train = {"minibatch_size": size, "checkpoint_dir": str(tmp_path / str(size))}
        config = config_of(default_sft_config, {"train": train})
        config.optimizer.name, config.optimizer.kwargs = "sgd", {"lr": 1e-2}
        return trlx.train(
            samples=["some text", "more", "a", "b c"], eval_prompts=["a"], config=config
        ).model.state_dict()

    whole, parts = trained(None), trained(1)
    for name, tensor in parts.items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-4, atol=1e-6)
