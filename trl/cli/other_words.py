"""Names that other tools use for these options: common words of training scripts, and configuration keys of other tools.

trl: error: Unknown option --lr. Did you mean '--learning_rate'?
trl: error: llama.yaml is a configuration of LLaMA-Factory. …
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from trl.compat.options import advice_on
from trl.errors import suggest

_COMMON = {
    "learning_rate": "lr learningrate",
    "per_device_train_batch_size": "batch_size bs train_batch_size micro_batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "gradient_accumulation_steps": "grad_accum gradient_accumulation accumulation_steps",
    "model_name_or_path": "model model_name model_path model_id base_model tokenizer",
    "adapter_name_or_path": "adapter adapter_path",
    "use_peft": "peft lora use_lora",
    "load_in_4bit": "qlora load_4bit quantize",
    "lora_r": "rank lora_rank",
    "lora_target_modules": "lora_target target_modules",
    "dataset_name": "dataset data data_path data_files train_file train_data",
    "dataset_train_split": "dataset_split split",
    "num_train_epochs": "epochs epoch num_epochs",
    "max_steps": "steps train_steps total_steps",
    "max_length": "max_len seq_len seq_length sequence_len context_length cutoff_len model_max_length",
    "max_completion_length": "max_new_tokens",
    "output_dir": "output out out_dir output_path save_dir",
    "lr_scheduler_type": "scheduler lr_scheduler",
    "warmup_steps": "warmup warmup_ratio",
    "optim": "optimizer",
    "weight_decay": "wd",
    "max_grad_norm": "grad_clip clip_grad_norm",
    "logging_steps": "log_every",
    "save_steps": "save_every",
    "eval_steps": "eval_every",
    "report_to": "wandb logger",
    "num_processes": "gpus num_gpus nproc_per_node",
    "dtype": "precision",
    "gradient_checkpointing": "checkpointing",
    "attn_implementation": "flash_attention flash_attn",
    "chat_template_path": "chat_template template",
    "reward_funcs": "reward reward_fn reward_function reward_model",
    "beta": "kl_coef",
    "use_cpu": "cpu",
    "hub_model_id": "hub_id",
    "dataset_num_proc": "workers",
    "dataloader_num_workers": "num_workers",
}
COMMON: Mapping[str, str] = {word: option for option, words in _COMMON.items() for word in words.split()}
"""Names of an option in most training scripts that are too different from its name to be found by similar spelling."""

_BOTH = {
    "val_size": "test_split_size",
    "val_set_size": "test_split_size",
    "flash_attn": "attn_implementation: flash_attention_2",
    "flash_attention": "attn_implementation: flash_attention_2",
    "warmup_ratio": "warmup_steps, a share below 1",
}

_AXOLOTL_ALONE = """
    base_model_config model_type tokenizer_type tokenizer_config is_llama_derived_model strict pad_to_sequence_len
    dataset_prepared_path wandb_run_id wandb_watch wandb_log_model xformers_attention s2_attention early_stopping_patience
    local_rank group_by_length
"""
AXOLOTL: Mapping[str, str] = {
    **_BOTH,
    "sample_packing": "packing",
    "eval_sample_packing": "eval_packing",
    "adapter": "use_peft: true (qlora: load_in_4bit: true as well)",
    "lora_model_dir": "adapter_name_or_path",
    "lora_target_linear": "lora_target_modules: all-linear",
    "train_on_inputs": "completion_only_loss: false, or assistant_only_loss for chats",
    "evals_per_epoch": "eval_strategy and eval_steps",
    "saves_per_epoch": "save_strategy and save_steps",
    "wandb_project": "project",
    "wandb_name": "run_name",
    "wandb_entity": "env: {WANDB_ENTITY: …}",
    "special_tokens": "pad_token and eos_token",
    "shuffle_merged_datasets": "shuffle_dataset",
    "rl": "another command: trl dpo, kto, orpo or grpo",
    "rl_beta": "beta",
    "dpo_beta": "beta",
    **dict.fromkeys(_AXOLOTL_ALONE.split(), ""),
}
"""Keys of axolotl's files → what to write instead, where `COMMON` is not right; "" if there is no counterpart."""

_LLAMA_FACTORY_ALONE = """
    dataset_dir overwrite_cache quantization_method plot_loss mask_history export_size use_unsloth infer_backend
"""
LLAMA_FACTORY: Mapping[str, str] = {
    **_BOTH,
    "stage": "another command: trl sft, reward (rm), dpo, kto or ppo",
    "finetuning_type": "use_peft: true (full: leave it out)",
    "lora_target": "lora_target_modules (all: all-linear)",
    "dataset": "dataset_name (files, folders or names on the hub)",
    "eval_dataset": "dataset_test_split",
    "template": "chat_template_path, if the tokenizer has no template",
    "max_samples": "dataset_train_split: train[:N]",
    "preprocessing_num_workers": "dataset_num_proc",
    "pref_beta": "beta",
    "pref_loss": "loss_type",
    "quantization_bit": "load_in_4bit: true or load_in_8bit: true",
    "neat_packing": "packing",
    "train_on_prompt": "completion_only_loss: false",
    "export_dir": "output_dir of trl merge",
    "double_quantization": "use_bnb_nested_quant",
    "additional_target": "lora_modules_to_save",
    **dict.fromkeys(_LLAMA_FACTORY_ALONE.split(), ""),
}
"""Keys of LLaMA-Factory's files → what to write instead; "" if there is no counterpart."""


RECIPES: Mapping[str, str] = {
    "dataset_mixture": "datasets: a list of path (id), name (config), columns, and split (weight: 0.5 is train[:50%])",
    "dataset_mixer": "datasets: a list of path and split (0.5 is train[:50%]), or dataset_name for one alone",
    "dataset_splits": "dataset_train_split and dataset_test_split",
    "dataset_configs": "dataset_config",
    "dataset_prompt_column": "dataset_rename: [COLUMN=prompt]",
    "system_prompt": "rows whose prompt or messages begin with the role system",
    "chat_template": "chat_template_path: a .jinja file with the template",
    "preprocessing_num_workers": "dataset_num_proc",
    "auto_insert_empty_system_msg": "",
    "benchmarks": "",
    "callbacks": "",
}
"""Keys of the recipes of alignment-handbook and open-r1 that are options of their own scripts → what to write instead."""


@dataclass(frozen=True)
class Tool:
    """Another training tool: the keys of its configuration files, and `marks`, keys that identify its files."""

    name: str
    keys: Mapping[str, str]
    marks: Collection[str]


TOOLS = (
    Tool("axolotl", AXOLOTL, ("base_model", "micro_batch_size", "sequence_len", "sample_packing")),
    Tool(
        "alignment-handbook or open-r1",
        RECIPES,
        ("dataset_mixture", "dataset_mixer", "dataset_configs", "dataset_prompt_column", "system_prompt"),
    ),
    Tool("LLaMA-Factory", LLAMA_FACTORY, ("finetuning_type", "cutoff_len", "stage", "lora_target", "pref_beta")),
)


def suggest_option(name: str, options: Collection[str], others: Iterable[str] = (), *, dashes: str = "") -> str:
    """` Did you mean '--learning_rate'?`: what to use instead of an option of other releases, or a suggestion by the meaning of
    a word, else by similar spelling."""
    name = name.replace("-", "_")
    if advice := advice_on(name):
        return advice
    meant = COMMON.get(name.lower())
    if meant in options:
        return f" Did you mean '{dashes}{meant}'?"
    return suggest(f"{dashes}{name}", [f"{dashes}{each}" for each in (*options, *others)])


def tool_of(unknown: Collection[str]) -> Tool | None:
    """The tool whose configuration files use one of these unknown keys; None if there is none."""
    return next((tool for tool in TOOLS if set(tool.marks) & set(unknown)), None)


def counterparts(tool: Tool, unknown: Iterable[str], options: Collection[str]) -> list[str]:
    """One line per unknown key that says what to write instead."""
    width = max(map(len, unknown := list(unknown)))
    known = {word: option for word, option in COMMON.items() if option in options} | dict(tool.keys)
    lines = []
    for key in unknown:
        told = known.get(key, f"is unknown.{suggest_option(key, options)}")
        lines.append(f"    {key.ljust(width)}  →  {told or 'leave it out'}")
    return lines
