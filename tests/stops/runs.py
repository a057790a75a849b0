"""Tiny runs of every trainer, and what they end with: shared by the tests of stops, in one process and in several.

Each has dropout, a shuffled dataset, two epochs and a bit, two micro-batches per step, and logs every second step, so that
stopping anywhere is in the middle of something.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import GPT2Config, GPT2ForSequenceClassification, TrainerCallback

from tests.conftest import GPT2, MODELS, make_tokenizer
from tests.vision.support import qwen2_5_vl
from tests.vision.test_vision_training import rows as with_images
from trl.models.value_heads.auto_models import with_value_head
from trl.trainers.cpo import CPOTrainer
from trl.trainers.dpo import DPOTrainer
from trl.trainers.grpo import GRPOTrainer
from trl.trainers.ilql import ILQLTrainer
from trl.trainers.kto import KTOTrainer
from trl.trainers.online_dpo import OnlineDPOTrainer
from trl.trainers.ppo.trainer import PPOTrainer
from trl.trainers.reward import RewardTrainer
from trl.trainers.rft import RFTTrainer
from trl.trainers.rloo import RLOOTrainer
from trl.trainers.sft import SFTTrainer

gc.freeze()  # what was imported: every run collects garbage, which takes longer than the run

STEPS = 7
DROPOUT = {"resid_pdrop": 0.1, "embd_pdrop": 0.1}
OPTIONS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": STEPS,
    "learning_rate": 1e-2,
    "logging_steps": 2,
    "save_strategy": "no",
    "disable_tqdm": True,
    "report_to": "none",
    "use_cpu": True,
    "disable_dropout": False,
    "html_report": False,
}
TIMES = (
    "tokens_per_second",
    "step_time",
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
    "train_loss",
)

Trainer = Any
Make = Callable[..., Trainer]


def words(i: int) -> str:
    return " ".join("abcdefgh"[(i * k) % 8] * (1 + k % 3) for k in range(1, 3 + i % 4))


def table(*columns: str, rows: int = 12) -> Dataset:
    return Dataset.from_dict({name: [words(i + 7 * k) for i in range(rows)] for k, name in enumerate(columns)})


def texts() -> Dataset:
    return table("text")


def pairs() -> Dataset:
    return table("prompt", "chosen", "rejected")


def labelled() -> Dataset:
    return table("prompt", "completion").add_column("label", [i % 3 > 0 for i in range(12)])


def rewarded() -> Dataset:
    return table("prompt", "completion").add_column("reward", [i % 5 / 2 for i in range(12)])


def prompts() -> Dataset:
    """A round of them, so that the epoch ends with it, after four steps."""
    return table("prompt", rows=4)


def noisy(completions: list[str], **_: Any) -> list[float]:
    """A reward that needs the random state of Python, too."""
    return [text.count("a") + random.random() for text in completions]


def language_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return MODELS["gpt2"](**DROPOUT)


def classifier() -> torch.nn.Module:
    torch.manual_seed(0)
    return GPT2ForSequenceClassification(GPT2Config(**{**GPT2, **DROPOUT, "num_labels": 1}))


def made_by(
    trainer: type,
    rows: Callable[[], Any],
    *,
    model: Callable = language_model,
    processor: Callable = make_tokenizer,
    peft: LoraConfig | None = None,
    **options: Any,
) -> Make:
    keywords = {"reward_funcs": noisy} if options.get("max_completion_length") else {}

    def make(folder: Path, callbacks: Any = (), *, evaluation: Any = None, shift: float = 0, **more: Any) -> Trainer:
        random.seed(0)
        begun_with = model()
        if shift:
            begun_with.get_input_embeddings().weight.data.add_(shift)
        return trainer(
            model=begun_with,
            args=trainer.config_class(**{**OPTIONS, **options, **more, "output_dir": str(folder)}),
            train_dataset=rows(),
            eval_dataset=evaluation,
            processing_class=processor(),
            peft_config=peft,
            callbacks=list(callbacks),
            **keywords,
        )

    return make


ONLINE = {"max_completion_length": 4, "num_generations": 2, "steps_per_generation": 4, "num_iterations": 2}
SYNC = {"sync_ref_model": True, "ref_model_sync_steps": 2}
PPO_LOOP = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,
    "num_iterations": 2,
    "max_completion_length": 4,
    "use_score_scaling": True,
    "horizon": 20,
}

READER = {"model": lambda: _with_dropout(qwen2_5_vl().model), "processor": lambda: qwen2_5_vl().processor}
"""A model that reads images, with positions that an image moves."""

LORA = {"r": 2, "lora_dropout": 0.1, "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}

RUNS: dict[str, Make] = {
    "sft": made_by(SFTTrainer, texts),
    "sft, packed": made_by(SFTTrainer, texts, packing=True, max_length=16, model=lambda: _seeded("llama")),
    "sft, grouped by length": made_by(SFTTrainer, texts, train_sampling_strategy="group_by_length"),
    "sft, balanced by length": made_by(SFTTrainer, texts, train_sampling_strategy="batch_rebalance"),
    "sft, a stream": made_by(SFTTrainer, lambda: texts().to_iterable_dataset(3).shuffle(seed=1, buffer_size=5)),
    "sft, an adapter": made_by(SFTTrainer, texts, peft=LoraConfig(**LORA)),
    "reward": made_by(RewardTrainer, pairs, model=classifier),
    "dpo": made_by(DPOTrainer, pairs),
    "dpo, a reference that moves": made_by(DPOTrainer, pairs, **SYNC),
    "dpo, computed beforehand": made_by(DPOTrainer, pairs, precompute_ref_log_probs=True),
    "dpo, an adapter": made_by(DPOTrainer, pairs, peft=LoraConfig(**LORA)),
    "kto": made_by(KTOTrainer, labelled),
    "bco": made_by(KTOTrainer, labelled, loss_type="bco"),
    "ilql": made_by(ILQLTrainer, rewarded, steps_for_target_q_sync=2, alpha=0.1),
    "ilql, an adapter": made_by(ILQLTrainer, rewarded, peft=LoraConfig(**LORA), steps_for_target_q_sync=2, alpha=0.1),
    "cpo": made_by(CPOTrainer, pairs),
    "ppo": made_by(PPOTrainer, prompts, model=lambda: with_value_head(language_model()), **PPO_LOOP),
    "grpo": made_by(GRPOTrainer, prompts, beta=0.1, **SYNC, **ONLINE),
    "grpo, a stream": made_by(GRPOTrainer, lambda: prompts().to_iterable_dataset(), **ONLINE),
    "rloo": made_by(RLOOTrainer, prompts, **ONLINE),
    "rft": made_by(
        RFTTrainer,
        prompts,
        **{**ONLINE, "num_iterations": 1},
        n_improve_steps=2,
        start_percentile=0.4,
        loss_aggregation="sequence",
    ),
    "online dpo": made_by(OnlineDPOTrainer, prompts, **ONLINE),
    "dpo, images": made_by(DPOTrainer, lambda: with_images("pairs"), **READER),
    "grpo, images": made_by(GRPOTrainer, lambda: with_images("prompts"), beta=0.1, **ONLINE, **READER),
    "grpo, images, an adapter": made_by(
        GRPOTrainer,
        lambda: with_images("prompts"),
        **ONLINE,
        **READER,
        peft=LoraConfig(**{**LORA, "fan_in_fan_out": False, "target_modules": ["q_proj", "v_proj"]}),
    ),
}


def _with_dropout(model: torch.nn.Module) -> torch.nn.Module:
    model.config.get_text_config().attention_dropout = 0.1
    for layer in model.get_decoder().layers:
        layer.self_attn.attention_dropout = 0.1
    return model


def _seeded(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return MODELS[name](attention_dropout=0.1)


class StopAt(TrainerCallback):
    """Ends training after a step, with a checkpoint, as a signal does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True
        return control


def found(trainer: Trainer) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """What a run ends with: the weights, and all that it logged but for times."""
    log = [{k: v for k, v in entry.items() if k not in TIMES} for entry in trainer.state.log_history]
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}, log


def whole(make: Make, folder: Path, **options: Any) -> tuple:
    """A run that is never stopped."""
    trainer = make(folder / "whole", **options)
    trainer.train()
    return found(trainer)


def in_parts(make: Make, folder: Path, stops: tuple[int, ...], **options: Any) -> tuple:
    """The same run, stopped after each of these steps and gone on with by another trainer."""
    for stop in stops:
        make(folder / "parts", [StopAt(stop)], **options).train(resume_from_checkpoint="last")
    trainer = make(folder / "parts", **options)
    trainer.train(resume_from_checkpoint=True)
    return found(trainer)


def differences(one: tuple, other: tuple) -> list[str]:
    """Which weights and logged numbers differ in any bit."""
    (weights, log), (weights_, log_) = one, other
    differing = [name for name in weights if not torch.equal(weights[name], weights_[name])]
    if len(log) != len(log_):
        differing.append(f"{len(log)} logs and {len(log_)}")
    for a, b in zip(log, log_, strict=False):
        differing += [f"step {a.get('step')}: {k} {a.get(k)} {b.get(k)}" for k in {**a, **b} if a.get(k) != b.get(k)]
    return differing
