"""Fine-tune and align language models: one road from rows to loss. Public names load on first use."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from trl.compat import LegacyImportFinder, refuse

__version__ = "2.0.0.dev0"

_PUBLIC = {
    "algorithms.dpo": ["DPO"],
    "algorithms.entropy_control": ["EntropyBonus"],
    "algorithms.kto": ["KTO"],
    "algorithms.reward": ["PairwiseReward", "ScoreRegression", "StepReward"],
    "cli.parser": ["TrlParser"],
    "core": ["set_seed"],
    "data.chat": ["apply_chat_template", "clone_chat_template", "maybe_apply_chat_template", "setup_chat_format"],
    "data.completion_collator": ["DataCollatorForCompletionOnlyLM"],
    "data.encode": ["EncodeSettings", "EncodingReport", "decode", "encode_dataset"],
    "data.formats": [
        "extract_prompt",
        "is_conversational",
        "is_conversational_from_value",
        "maybe_convert_to_chatml",
        "maybe_extract_prompt",
        "maybe_unpair_preference_dataset",
        "unpair_preference_dataset",
    ],
    "data.layout": ["lay_out"],
    "data.sources": ["DatasetConfig", "DatasetMixtureConfig", "ScriptArguments", "get_dataset"],
    "data.packing": ["pack_dataset"],
    "errors": ["ConfigError", "DataError", "ModelError", "TrlError"],
    "models.config": ["ModelConfig", "get_peft_config", "get_quantization_config"],
    "models.value_heads.auto_models": ["AutoModelForCausalLMWithValueHead", "AutoModelForSeq2SeqLMWithValueHead"],
    "models.value_heads.ilql": ["AutoModelForCausalLMWithILQLHeads", "AutoModelForSeq2SeqLMWithILQLHeads"],
    "models.load": ["get_kbit_device_map"],
    "models.reference": ["create_reference_model"],
    "models.score": ["score"],
    "callbacks.report": ["ReportCallback"],
    "report.page": ["write_report"],
    "rewards.answers": ["accuracy_reward", "reasoning_accuracy_reward"],
    "rewards.functions": ["boxed_format_reward", "think_format_reward", "think_tags_reward"],
    "rewards.classifier": ["ClassifierReward"],
    "rewards.human": ["HumanPreference", "HumanRating"],
    "rewards.model": ["RewardModel"],
    "rollouts.engine": ["Prompt", "Rollout", "RolloutEngine"],
    "rollouts.local": ["LocalEngine"],
    "rollouts.respond": ["LengthSampler", "respond_to_batch"],
    "rollouts.sampling": ["SamplingParams"],
    "trainers.base": ["BaseTrainer"],
    "trainers.config": ["TrainerConfig"],
    "trainers.cpo": ["CPOConfig", "CPOTrainer", "ORPOConfig", "ORPOTrainer"],
    "trainers.dpo": ["DPOConfig", "DPOTrainer"],
    "trainers.grpo": ["GRPOConfig", "GRPOTrainer"],
    "trainers.ilql": ["ILQLConfig", "ILQLTrainer"],
    "trainers.kto": ["BCOConfig", "BCOTrainer", "KTOConfig", "KTOTrainer"],
    "trainers.online": ["OnlineTrainer"],
    "trainers.online_config": ["OnlineConfig"],
    "trainers.online_dpo": ["OnlineDPOConfig", "OnlineDPOTrainer"],
    "trainers.ppo.trainer": ["PPOTrainer"],
    "trainers.ppo.config": ["PPOConfig"],
    "callbacks.progress": ["RichProgressCallback"],
    "trainers.reward": ["RewardConfig", "RewardTrainer"],
    "trainers.rloo": ["RLOOConfig", "RLOOTrainer"],
    "trainers.sft": ["SFTConfig", "SFTTrainer"],
    "trainers.reference": ["SyncRefModelCallback"],
    "callbacks.stop": ["StopOnSignal", "exit_on_signal", "stop_on_signal"],
    "types": ["Algorithm", "Batch", "Completion", "Example", "Experience", "Scores"],
}

_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = sorted(_MODULE_OF)
sys.meta_path.append(LegacyImportFinder())


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        from trl.errors import suggest

        refuse(name)
        raise AttributeError(f"module 'trl' has no attribute {name!r}.{suggest(name, _MODULE_OF)}")
    value = getattr(importlib.import_module(f"trl.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
