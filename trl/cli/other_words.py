"""What others call our options: common words of training scripts, and the keys of two other tools' files.

trl: error: Unknown option --lr. Did you mean '--learning_rate'?
trl: error: llama.yaml is a configuration of LLaMA-Factory. …
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from trl.errors import suggest

COMMON: Mapping[str, str] = {
    "lr": "learning_rate",
    "learningrate": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "bs": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "gradient_accumulation": "gradient_accumulation_steps",
    "accumulation_steps": "gradient_accumulation_steps",
    "model": "model_name_or_path",
    "model_name": "model_name_or_path",
    "model_path": "model_name_or_path",
    "model_id": "model_name_or_path",
    "base_model": "model_name_or_path",
    "adapter": "adapter_name_or_path",
    "adapter_path": "adapter_name_or_path",
    "peft": "use_peft",
    "lora": "use_peft",
    "use_lora": "use_peft",
    "qlora": "load_in_4bit",
    "load_4bit": "load_in_4bit",
    "quantize": "load_in_4bit",
    "rank": "lora_r",
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
    "target_modules": "lora_target_modules",
    "dataset": "dataset_name",
    "data": "dataset_name",
    "data_path": "dataset_name",
    "data_files": "dataset_name",
    "train_file": "dataset_name",
    "train_data": "dataset_name",
    "dataset_split": "dataset_train_split",
    "split": "dataset_train_split",
    "epochs": "num_train_epochs",
    "epoch": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "steps": "max_steps",
    "train_steps": "max_steps",
    "total_steps": "max_steps",
    "max_len": "max_length",
    "seq_len": "max_length",
    "seq_length": "max_length",
    "sequence_len": "max_length",
    "context_length": "max_length",
    "cutoff_len": "max_length",
    "model_max_length": "max_length",
    "max_new_tokens": "max_completion_length",
    "output": "output_dir",
    "out": "output_dir",
    "out_dir": "output_dir",
    "output_path": "output_dir",
    "save_dir": "output_dir",
    "scheduler": "lr_scheduler_type",
    "lr_scheduler": "lr_scheduler_type",
    "warmup": "warmup_steps",
    "warmup_ratio": "warmup_steps",
    "optimizer": "optim",
    "wd": "weight_decay",
    "grad_clip": "max_grad_norm",
    "clip_grad_norm": "max_grad_norm",
    "log_every": "logging_steps",
    "save_every": "save_steps",
    "eval_every": "eval_steps",
    "wandb": "report_to",
    "logger": "report_to",
    "gpus": "num_processes",
    "num_gpus": "num_processes",
    "nproc_per_node": "num_processes",
    "precision": "dtype",
    "checkpointing": "gradient_checkpointing",
    "flash_attention": "attn_implementation",
    "flash_attn": "attn_implementation",
    "tokenizer": "model_name_or_path",
    "chat_template": "chat_template_path",
    "template": "chat_template_path",
    "reward": "reward_funcs",
    "reward_fn": "reward_funcs",
    "reward_function": "reward_funcs",
    "reward_model": "reward_funcs",
    "kl_coef": "beta",
    "cpu": "use_cpu",
    "hub_id": "hub_model_id",
    "workers": "dataset_num_proc",
    "num_workers": "dataloader_num_workers",
}
"""Words that mean an option in most scripts, and are too far from its name to be found by their letters."""

_BOTH = {
    "val_size": "test_split_size",
    "val_set_size": "test_split_size",
    "flash_attn": "attn_implementation: flash_attention_2",
    "flash_attention": "attn_implementation: flash_attention_2",
}

AXOLOTL: Mapping[str, str] = {
    **_BOTH,
    "base_model": "model_name_or_path",
    "base_model_config": "",
    "model_type": "",
    "tokenizer_type": "",
    "tokenizer_config": "",
    "is_llama_derived_model": "",
    "strict": "",
    "sequence_len": "max_length",
    "sample_packing": "packing",
    "eval_sample_packing": "eval_packing",
    "pad_to_sequence_len": "",
    "adapter": "use_peft: true (qlora: load_in_4bit: true as well)",
    "lora_model_dir": "adapter_name_or_path",
    "lora_target_linear": "lora_target_modules: all-linear",
    "micro_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "num_epochs": "num_train_epochs",
    "lr_scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "train_on_inputs": "completion_only_loss: false, or assistant_only_loss for chats",
    "dataset_prepared_path": "",
    "chat_template": "chat_template_path",
    "evals_per_epoch": "eval_strategy and eval_steps",
    "saves_per_epoch": "save_strategy and save_steps",
    "warmup_ratio": "warmup_steps, a share below 1",
    "wandb_project": "project",
    "wandb_name": "run_name",
    "wandb_run_id": "",
    "wandb_entity": "env: {WANDB_ENTITY: …}",
    "wandb_watch": "",
    "wandb_log_model": "",
    "xformers_attention": "",
    "s2_attention": "",
    "early_stopping_patience": "",
    "local_rank": "",
    "special_tokens": "pad_token and eos_token",
    "shuffle_merged_datasets": "shuffle_dataset",
    "rl": "another command: trl dpo, kto, orpo or grpo",
    "rl_beta": "beta",
    "dpo_beta": "beta",
    "group_by_length": "",
}
"""Keys of axolotl's files → what to write here; "" where nothing takes their place."""

LLAMA_FACTORY: Mapping[str, str] = {
    **_BOTH,
    "stage": "another command: trl sft, reward (rm), dpo, kto or ppo",
    "finetuning_type": "use_peft: true (full: leave it out)",
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules (all: all-linear)",
    "dataset": "dataset_name (files, folders or names on the hub)",
    "dataset_dir": "",
    "eval_dataset": "dataset_test_split",
    "template": "chat_template_path, if the tokenizer has no template",
    "cutoff_len": "max_length",
    "max_samples": "dataset_train_split: train[:N]",
    "overwrite_cache": "",
    "preprocessing_num_workers": "dataset_num_proc",
    "pref_beta": "beta",
    "pref_loss": "loss_type",
    "quantization_bit": "load_in_4bit: true or load_in_8bit: true",
    "quantization_method": "",
    "plot_loss": "",
    "neat_packing": "packing",
    "train_on_prompt": "completion_only_loss: false",
    "mask_history": "",
    "export_dir": "output_dir of trl merge",
    "export_size": "",
    "reward_model": "reward_funcs",
    "use_unsloth": "",
    "warmup_ratio": "warmup_steps, a share below 1",
    "infer_backend": "",
    "double_quantization": "use_bnb_nested_quant",
    "additional_target": "lora_modules_to_save",
}
"""Keys of LLaMA-Factory's files → what to write here."""


@dataclass(frozen=True)
class Tool:
    """Another tool: the keys of its files, and those by one of which it is known."""

    name: str
    keys: Mapping[str, str]
    marks: Collection[str]


TOOLS = (
    Tool("axolotl", AXOLOTL, ("base_model", "micro_batch_size", "sequence_len", "sample_packing")),
    Tool("LLaMA-Factory", LLAMA_FACTORY, ("finetuning_type", "cutoff_len", "stage", "lora_target", "pref_beta")),
)


def suggest_option(name: str, options: Collection[str], others: Iterable[str] = (), *, dashes: str = "") -> str:
    """` Did you mean '--learning_rate'?`, by the meaning of a word, else by its letters."""
    name = name.replace("-", "_")
    meant = COMMON.get(name.lower())
    if meant in options:
        return f" Did you mean '{dashes}{meant}'?"
    return suggest(f"{dashes}{name}", [f"{dashes}{each}" for each in (*options, *others)])


def tool_of(unknown: Collection[str]) -> Tool | None:
    """The tool whose file has these keys that are unknown here; None where they are no tool's."""
    return next((tool for tool in TOOLS if set(tool.marks) & set(unknown)), None)


def counterparts(tool: Tool, unknown: Iterable[str], options: Collection[str]) -> list[str]:
    """A line for every key: what to write in its place."""
    width = max(map(len, unknown := list(unknown)))
    lines = []
    for key in unknown:
        if key in tool.keys:
            told = tool.keys[key] or "leave it out"
        else:
            told = f"is not known here.{suggest_option(key, options)}"
        lines.append(f"    {key.ljust(width)}  →  {told}")
    return lines
