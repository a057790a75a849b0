"""Options of scripts written for TRL 1.16: each is taken, or refused with words."""

from __future__ import annotations

import pytest

from trl.errors import ConfigError
from trl.rollouts.nccl_transfer import NCCLTransfer
from trl.trainers.grpo import GRPOConfig, GRPOTrainer
from trl.trainers.online_dpo import OnlineDPOConfig
from trl.trainers.ppo.config import PPOConfig
from trl.trainers.rloo import RLOOConfig

SAMPLING = {
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 50,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "generation_kwargs": {"stop": "\n"},
    "cache_implementation": "static",
    "model_init_kwargs": {"dtype": "float32"},
    "trust_remote_code": True,
    "disable_dropout": True,
    "reward_weights": [1.0, 0.5],
    "ds3_gather_for_generation": False,
}
VLLM = {
    "vllm_mode": "server",
    "vllm_model_impl": "vllm",
    "vllm_enable_sleep_mode": True,
    "vllm_structured_outputs_regex": ".*",
    "vllm_server_base_url": "http://localhost:8000",
    "vllm_server_host": "0.0.0.0",
    "vllm_server_port": 8000,
    "vllm_server_timeout": 240.0,
    "vllm_group_port": 51216,
    "vllm_gpu_memory_utilization": 0.3,
    "vllm_tensor_parallel_size": 1,
}
"""Without use_vllm, they say nothing there either."""
ROUNDS = {
    "num_generations": 4,
    "num_generations_eval": 2,
    "max_completion_length": 64,
    "shuffle_dataset": False,
    "pad_to_multiple_of": 8,
    "generation_batch_size": 16,
    "steps_per_generation": 2,
    "chat_template_kwargs": {"enable_thinking": False},
    "vllm_max_model_length": 1024,
    "beta": 0.01,
    "num_iterations": 2,
    "epsilon": 0.1,
    "epsilon_high": 0.28,
    "mask_truncated_completions": True,
    "sync_ref_model": True,
    "ref_model_mixup_alpha": 0.5,
    "ref_model_sync_steps": 64,
    "log_completions": True,
    "log_multimodal": False,
    "num_completions_to_print": 2,
    "log_unique_prompts": True,
    "use_transformers_continuous_batching": True,
    "transformers_continuous_batching_config": {},
    "use_transformers_paged": True,
    "router_aux_loss_coef": 0.01,
    "stop_strings": ["\n\n"],
}
TAKEN = {
    GRPOConfig: {
        **SAMPLING,
        **VLLM,
        **ROUNDS,
        "cast_lm_head_to_fp32": False,
        "delta": 2.0,
        "sapo_temperature_neg": 1.1,
        "sapo_temperature_pos": 0.9,
        "vespo_k_pos": 2.0,
        "vespo_lambda_pos": 3.0,
        "vespo_k_neg": 3.0,
        "vespo_lambda_neg": 2.0,
        "importance_sampling_level": "sequence",
        "multi_objective_aggregation": "normalize_then_sum",
        "scale_rewards": "batch",
        "loss_type": "dr_grpo",
        "top_entropy_quantile": 0.2,
        "entropy_coef": 0.01,
        "use_adaptive_entropy": True,
        "entropy_coef_min": 0.001,
        "entropy_coef_max": 0.5,
        "entropy_coef_delta": 0.001,
        "entropy_target": 0.3,
        "max_tool_calling_iterations": None,
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": "token_truncate",
        "vllm_importance_sampling_clip_max": 2.0,
        "vllm_importance_sampling_clip_min": 0.5,
        "off_policy_mask_threshold": 0.5,
        "use_bias_correction_kl": False,
        "log_completions_hub_repo": None,
    },
    RLOOConfig: {**SAMPLING, **VLLM, **ROUNDS, "normalize_advantages": True, "reward_clip_range": (-1.0, 1.0)},
    OnlineDPOConfig: {
        **SAMPLING,
        **VLLM,
        "reward_model_path": "org/reward-model",
        "max_new_tokens": 32,
        "max_length": 512,
        "missing_eos_penalty": 1.0,
        "beta": [0.2, 0.1],
        "loss_type": "ipo",
    },
}
REFUSED = {
    GRPOConfig: {
        "max_tool_calling_iterations": 3,
        "cast_lm_head_to_fp32": True,
        "log_completions_hub_repo": "me/completions",
    },
}
OLDER = {"vllm_importance_sampling_cap": "importance_sampling_clip_max", "max_new_tokens": "max_completion_length"}


@pytest.mark.parametrize("config", TAKEN)
def test_options_are_taken(tmp_path, config):
    made = config(str(tmp_path), use_cpu=True, per_device_train_batch_size=8, **TAKEN[config])
    for name, value in TAKEN[config].items():
        today = name.removeprefix("vllm_") if name.startswith("vllm_importance") else OLDER.get(name, name)
        if today in vars(made) and name not in ("generation_kwargs",):
            assert getattr(made, today) == value
        else:
            assert config.ALIASES.get(name) == "" or name == "generation_kwargs"


def test_options_reach_the_algorithm(tmp_path):
    made = GRPOConfig(str(tmp_path), use_cpu=True, per_device_train_batch_size=8, **TAKEN[GRPOConfig]).make_algorithm()
    assert (made.ratio_level, made.scale, made.beta, made.unbiased_kl) == ("sequence", "batch", 0.01, False)
    assert (made.surrogate.low, made.surrogate.high, made.surrogate.delta) == (0.1, 0.28, 2.0)
    assert (made.top_entropy, made.off_policy_threshold) == (0.2, 0.5)
    control = made.entropy_bonus
    assert (control.coefficient, control.target, control.step) == (0.01, 0.3, 0.001)
    assert (control.low, control.high) == (0.001, 0.5)
    assert (made.correction.mode, made.correction.low, made.correction.high) == ("token_truncate", 0.5, 2.0)


@pytest.mark.parametrize(("config", "name"), [(config, name) for config in REFUSED for name in REFUSED[config]])
def test_options_are_refused_with_words(tmp_path, config, name):
    value = REFUSED[config][name]
    with pytest.raises(ConfigError, match=f"{name}={value!r} is not available in this version"):
        config(str(tmp_path), use_cpu=True, **{name: value})


@pytest.mark.parametrize("config", [GRPOConfig, RLOOConfig, OnlineDPOConfig, PPOConfig])
def test_texts_that_stop_have_the_name_of_transformers(tmp_path, config):
    for options in ({"stop_strings": ["END"]}, {"generation_kwargs": {"stop_strings": ["END"]}}):
        made = config(str(tmp_path), use_cpu=True, per_device_train_batch_size=8, **options)
        params = made.sampling_params(max_new_tokens=4, seed=0)
        assert params.stop == ("END",)
        assert params.generation_config is None


@pytest.mark.parametrize("config", [GRPOConfig, RLOOConfig, OnlineDPOConfig, PPOConfig])
def test_options_of_vllm(tmp_path, config):
    """Each mode reads its own; one that it does not read is said, and one that cannot be kept is refused."""

    def made(**options):
        return config(output_dir=str(tmp_path), use_cpu=True, use_vllm=True, **options)

    assert made(vllm_mode="server").server_urls == ["http://127.0.0.1:8000"]
    assert made(vllm_mode="server", vllm_server_host="a", vllm_server_port=9).server_urls == ["http://a:9"]
    several = ["http://a:1", "http://b:1"]
    shared = made(vllm_mode="server", vllm_server_base_url=several, rollout_sync_dir=str(tmp_path / "w"))
    engine = shared.make_engine(None, None, progress=False)
    assert [server.url for server in engine.servers] == several
    assert (engine.start_timeout, engine.servers[0].timeout) == (240.0, 600.0)
    over_nccl = made(vllm_mode="server", rollout_sync="nccl").make_engine(None, None, progress=False)
    assert isinstance(over_nccl.transfer, NCCLTransfer)
    with pytest.warns(UserWarning, match="vllm_gpu_memory_utilization=0.5 has no effect with vllm_mode='server'"):
        made(vllm_mode="server", vllm_gpu_memory_utilization=0.5)
    with pytest.warns(UserWarning, match="vllm_server_port=9 has no effect with vllm_mode='colocate'"):
        made(vllm_server_port=9)
    with pytest.warns(UserWarning, match="vllm_group_port=9 has no effect .*NCCL chooses one itself"):
        made(vllm_mode="server", vllm_group_port=9)
    with pytest.raises(ConfigError, match="vllm_structured_outputs_regex='.*' is not available"):
        made(vllm_structured_outputs_regex="a+")
    with pytest.raises(ConfigError, match="vllm_tensor_parallel_size=0"):
        made(vllm_tensor_parallel_size=0)


def test_what_rewards_and_sampler_lack_is_said_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("trl.trainers.sampler_options.is_available", lambda module: False)
    args = {"output_dir": str(tmp_path), "use_cpu": True}
    with pytest.raises(ConfigError, match="reward_weights has 2 values for 1 reward function:"):
        GRPOTrainer("./no-such-model", len, GRPOConfig(**args, reward_weights=[1, 2]))
    with pytest.raises(ConfigError, match='vllm_mode="colocate" needs vllm.*pip install.*use_vllm out.*trl serve'):
        GRPOTrainer("./no-such-model", len, GRPOConfig(**args, use_vllm=True))


def test_samples_of_vllm_are_weighed(tmp_path):
    options = {"output_dir": str(tmp_path), "use_cpu": True, "vllm_mode": "server"}
    assert GRPOConfig(**options, use_vllm=True).make_algorithm().correction is not None
    assert GRPOConfig(**options).make_algorithm().correction is None
    off = GRPOConfig(**options, use_vllm=True, vllm_importance_sampling_correction=False)
    assert off.make_algorithm().correction is None


LOSSES = {
    "grpo": ("Clip", "sequence"),
    "dr_grpo": ("Clip", "constant"),
    "dapo": ("Clip", "token"),
    "bnpo": ("Clip", "token"),
    "luspo": ("Clip", "sum"),
    "cispo": ("CISPO", "token"),
    "sapo": ("SAPO", "sequence"),
    "vespo": ("VESPO", "token"),
}


def test_the_largest_weight_of_cispo_is_not_that_of_clipping(tmp_path):
    made = [GRPOConfig(str(tmp_path), use_cpu=True, loss_type="cispo", epsilon_high=high) for high in (None, 8.0)]
    assert [each.make_algorithm().surrogate.high for each in made] == [5.0, 8.0]


@pytest.mark.parametrize("name", LOSSES)
def test_names_of_losses(tmp_path, name):
    made = GRPOConfig(str(tmp_path), use_cpu=True, loss_type=name)
    assert (type(made.make_algorithm().surrogate).__name__, made.loss_aggregation) == LOSSES[name]


def test_a_beta_for_each_epoch(tmp_path):
    made = OnlineDPOConfig(str(tmp_path), use_cpu=True, beta=[0.3, 0.2])
    assert [made.beta_in(epoch) for epoch in (0, 0.9, 1.0, 5)] == [0.3, 0.3, 0.2, 0.2]
    assert made.make_algorithm().dpo.beta == 0.3


def test_none_is_as_left_out_in_sampling(tmp_path):
    plain = {"output_dir": str(tmp_path), "report_to": [], "temperature": 0.5}
    without = dict.fromkeys(("top_k", "temperature", "min_new_tokens", "stop_strings", "num_beams"))
    args = GRPOConfig(**plain, top_k=None, generation_kwargs=without)
    params = args.sampling_params(max_new_tokens=4, seed=0)
    assert (params.top_k, params.temperature, params.min_new_tokens, params.stop) == (0, 0.5, 0, ())
