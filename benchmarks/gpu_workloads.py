"""The workloads of a GPU: models as people train them, in bfloat16 by autocast over float32 weights, with random weights.

Names of shapes: 0.5B is Qwen2.5-0.5B's, 1B is Llama-3.2-1B's; `tiny` runs the same jobs anywhere, to see that they run.
Models are made on the device from their configuration and the seed, so that nothing of their size lies on a disk.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import synthetic
from workloads import Target, Workload, remainder

SHAPES: dict[str, dict[str, Any]] = {
    "0.5B": {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
    | {"num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151_936},
    "1B": {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256},
    "tiny": {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": synthetic.VOCABULARY},
}

OPTIONS = {
    "cuda": {"use_cpu": False, "bf16": True, "optim": "adamw_torch_fused"},
    "cpu": {"use_cpu": True, "bf16": False, "optim": "adamw_torch"},
}
"""What the device changes of the options that all workloads share."""


def _gpu(name: str, about: str, trainer: str, rows: Any, *, aim: float, shape: str = "0.5B", **fields: Any) -> Workload:
    rows_per_step = fields.pop("rows_per_step", fields["config"]["per_device_train_batch_size"])
    return Workload(
        name=name,
        about=f"{shape}: {about}",
        trainer=f"{trainer}Trainer",
        config_class=f"{trainer}Config",
        rows=rows,
        rows_per_step=rows_per_step,
        targets={"trl": Target(time=aim, memory=1.0)},
        material=shape,
        **{"per_token": True} | fields,
    )


def adapter() -> dict[str, Any]:
    """LoRA as its users set it."""
    from peft import LoraConfig

    return {"peft_config": LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear")}


SHORT, LONG = (20, 60), (350, 450)

GPU_WORKLOADS = {
    workload.name: workload
    for workload in (
        _gpu(
            "gpu-sft-padded",
            "chats, 16 a step, 350 tokens in the mean",
            "SFT",
            partial(synthetic.chat_rows, mean=350),
            aim=0.5,
            config={"per_device_train_batch_size": 16, "max_length": 1024},
        ),
        _gpu(
            "gpu-sft-packed",
            "chats packed into rows of 4,096 tokens, 4 a step",
            "SFT",
            partial(synthetic.chat_rows, mean=350),
            aim=0.35,
            shape="1B",
            rows_per_step=64,
            same_batches=False,
            config={"per_device_train_batch_size": 4, "max_length": 4096, "packing": True, "packing_strategy": "bfd"},
        ),
        _gpu(
            "gpu-sft-long-prompt",
            "prompts of 400 to 800 tokens, completions of 40 to 80, 16 a step, completions trained",
            "SFT",
            synthetic.completion_rows,
            aim=0.5,
            config={"per_device_train_batch_size": 16, "max_length": 1024, "completion_only_loss": True},
        ),
        _gpu(
            "gpu-sft-lora",
            "chats, 16 a step, 350 tokens in the mean, LoRA of rank 16 on all products, dropout 0.05",
            "SFT",
            partial(synthetic.chat_rows, mean=350),
            aim=0.5,
            arguments=adapter,
            config={"per_device_train_batch_size": 16, "max_length": 1024},
        ),
        _gpu(
            "gpu-dpo-long-prompt",
            "pairs on prompts of 350 to 450 tokens, 8 pairs a step",
            "DPO",
            synthetic.preference_rows,
            aim=0.4,
            per_token=False,
            config={"per_device_train_batch_size": 8, "max_length": 1024, "beta": 0.1},
        ),
        _gpu(
            "gpu-dpo-short-prompt",
            "pairs on prompts of 20 to 60 tokens, 16 pairs a step",
            "DPO",
            partial(synthetic.preference_rows, prompt=SHORT),
            aim=0.6,
            per_token=False,
            config={"per_device_train_batch_size": 16, "max_length": 1024, "beta": 0.1},
        ),
        _gpu(
            "gpu-kto",
            "labelled completions of 60 to 100 tokens, 16 a step",
            "KTO",
            synthetic.unpaired_rows,
            aim=0.33,
            per_token=False,
            config={"per_device_train_batch_size": 16, "max_length": 1024, "beta": 0.1},
        ),
        _gpu(
            "gpu-reward",
            "pairs on prompts of 20 to 60 tokens, 16 pairs a step, by a model with one output",
            "Reward",
            partial(synthetic.preference_rows, prompt=SHORT),
            aim=0.6,
            per_token=False,
            config={"per_device_train_batch_size": 16, "max_length": 1024},
        ),
        _gpu(
            "gpu-grpo",
            "8 prompts of 256 tokens × 8 completions of 128, sampled in process",
            "GRPO",
            partial(synthetic.prompt_rows, prompt=(256, 256)),
            aim=0.3,
            rows_per_step=8,
            per_token=False,
            same_batches=False,
            arguments=lambda: {"reward_funcs": remainder},
            config={"per_device_train_batch_size": 64, "num_generations": 8, "max_completion_length": 128}
            | {"learning_rate": 1e-6, "shuffle_dataset": False, "train_sampling_strategy": "random"},
        ),
    )
}


def tiny(workload: Workload) -> Workload:
    """The same job on the smallest model."""
    return replace(workload, material="tiny")


def model(
    shape: str | dict[str, Any], *, seed: int, device: str, classifies: bool = False, dtype: str = "float32"
) -> Any:
    """A language model of the shape with random weights, on the device; `classifies`: with one output in the head's place."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    fields = {"tie_word_embeddings": True, "max_position_embeddings": 8192}
    fields |= SHAPES[shape] if isinstance(shape, str) else shape
    fields |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    kind = AutoModelForCausalLM
    if classifies:
        kind, fields = AutoModelForSequenceClassification, fields | {"num_labels": 1}
    torch.manual_seed(seed)
    with torch.device(device):
        made = kind.from_config(AutoConfig.for_model(**fields), dtype=getattr(torch, dtype))
    if not classifies:
        made.generation_config.eos_token_id = 1
    return made
