"""Small training runs of every trainer, by public names alone: what `parity.py` compares before and after a refactor.

A case is a trainer, what it is given, and its options. Models are two layers of random weights, rows are a few words, so
that three optimizer steps take a fraction of a second. Adapters have dropout: how random numbers are drawn is compared too.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

import trl

STEPS = 3
ROWS = 12
BATCH = 4
"""Rows of an optimizer step, over all processes; trainers that sample take twice as many completions."""

TEXT = "the quick brown fox jumps over a lazy dog and then runs far away from the sleepy old farm"
WORDS = TEXT.split()
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "<|end|>")
CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,;:!?'\n-"
TEMPLATE = """\
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}
{%- else -%}{{- message['content'] + '<|end|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""
SIZES = {
    "vocab_size": len(SPECIAL) + len(CHARACTERS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


# ---- what a run reads ----


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, and a chat template that marks what the assistant says."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=list(SPECIAL[4:]),
        chat_template=TEMPLATE,
    )


def _sharpened(model: torch.nn.Module) -> torch.nn.Module:
    """The model with larger weights: fresh ones choose nearly uniformly among tokens, which hides much."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model


def language_model() -> torch.nn.Module:
    return _sharpened(LlamaForCausalLM(LlamaConfig(**SIZES)))


def tied_model() -> torch.nn.Module:
    return _sharpened(LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)))


def classifier() -> torch.nn.Module:
    return _sharpened(LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1)))


def encoder_decoder() -> torch.nn.Module:
    sizes = {"vocab_size": SIZES["vocab_size"], "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0.1))


def valued_model() -> torch.nn.Module:
    return trl.AutoModelForCausalLMWithValueHead.from_pretrained(language_model())


PROMPTS = [" ".join(WORDS[i % 7 : 3 + i % 7 + i % 3]) for i in range(ROWS)]
GOOD = [f" {WORDS[i]} {i}" * (1 + i % 3) for i in range(ROWS)]
BAD = [f" {WORDS[-i - 1]}" * (1 + i % 4) for i in range(ROWS)]


def texts() -> Dataset:
    return Dataset.from_dict({"text": [" ".join(WORDS[i % 5 : 5 + i]) for i in range(ROWS)]})


def chats() -> Dataset:
    turns = [
        [("user", p), ("assistant", a), ("user", b), ("assistant", p)]
        for p, a, b in zip(PROMPTS, GOOD, BAD, strict=True)
    ]
    return Dataset.from_dict({"messages": [[{"role": r, "content": c} for r, c in each] for each in turns]})


def completions() -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS, "completion": GOOD})


def pairs() -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS, "chosen": GOOD, "rejected": BAD})


def chat_pairs() -> Dataset:
    """The pairs as conversations."""
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": text}] for text in PROMPTS],
            "chosen": [[{"role": "assistant", "content": text}] for text in GOOD],
            "rejected": [[{"role": "assistant", "content": text}] for text in BAD],
        }
    )


def margins() -> Dataset:
    return pairs().add_column("margin", [i / 8 for i in range(ROWS)])


def labelled() -> Dataset:
    return completions().add_column("label", [i % 3 > 0 for i in range(ROWS)])


def scored() -> Dataset:
    return completions().add_column("score", [i / 4 for i in range(ROWS)])


def steps() -> Dataset:
    """Solutions in steps, each with a label."""
    return Dataset.from_dict(
        {
            "prompt": PROMPTS,
            "completions": [[GOOD[i], BAD[i]][: 1 + i % 2] for i in range(ROWS)],
            "labels": [[True, False][: 1 + i % 2] for i in range(ROWS)],
        }
    )


def prompts() -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS})


def chat_prompts() -> Dataset:
    return chat_pairs().select_columns(["prompt"])


def variety(completions: Sequence[Any], **_: Any) -> list[float]:
    """Distinct characters of a completion, over 4."""
    return [len(set(str(completion))) / 4 for completion in completions]


def brevity(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float | None]:
    """Low token ids are better; says nothing of completions whose first is even."""
    return [None if ids[0] % 2 == 0 else -sum(ids) / (64 * len(ids)) for ids in completion_ids]


def prefer_longest(prompts: Sequence[Any], completions: Sequence[Sequence[Any]]) -> list[int]:
    """A judge: the index of the longest completion of each prompt, the first of several; −1 for a prompt that begins with a."""
    return [
        -1 if str(prompt).startswith("a") else max(range(len(group)), key=lambda i: len(str(group[i])))
        for prompt, group in zip(prompts, completions, strict=True)
    ]


# ---- cases ----


@dataclass(frozen=True)
class Case:
    """A run of a trainer.

    trainer     its public name; that of its configuration is the same with Config
    model       makes the model
    rows        makes the rows that are trained on; None: `PPOTrainer.step` on triplets
    options     of the configuration
    arguments   makes further arguments of the trainer
    lora        whether an adapter is trained
    world       processes
    """

    trainer: str
    model: Callable[[], torch.nn.Module] = language_model
    rows: Callable[[], Dataset] | None = prompts
    options: Mapping[str, Any] = field(default_factory=dict)
    arguments: Callable[[], dict[str, Any]] = dict
    lora: bool = False
    world: int = 1

    def changed(self, **changes: Any) -> Case:
        """This case with other fields; `options` are added to its own."""
        given = {name: getattr(self, name) for name in self.__dataclass_fields__} | changes
        return Case(**{**given, "options": {**self.options, **changes.get("options", {})}})


def rewarded() -> dict[str, Any]:
    return {"reward_funcs": [variety, brevity]}


def one_reward() -> dict[str, Any]:
    return {"reward_funcs": variety}


LENGTHS = {"max_completion_length": 8}
GROUPS = {"num_generations": 4, "per_device_train_batch_size": 2 * BATCH, **LENGTHS}
TRIPLETS = {"batch_size": 2 * BATCH, "ppo_epochs": 2, "horizon": 50}
LOOP = {**TRIPLETS, "per_device_train_batch_size": 2 * BATCH, **LENGTHS}

MAIN = {
    "sft": Case("SFTTrainer", rows=completions),
    "reward": Case("RewardTrainer", classifier, margins),
    "dpo": Case("DPOTrainer", rows=pairs),
    "cpo": Case("CPOTrainer", rows=pairs),
    "orpo": Case("ORPOTrainer", rows=pairs),
    "kto": Case("KTOTrainer", rows=labelled),
    "bco": Case("BCOTrainer", rows=labelled),
    "ppo": Case("PPOTrainer", valued_model, options=LOOP, arguments=one_reward),
    "ppo-step": Case("PPOTrainer", valued_model, None, TRIPLETS),
    "grpo": Case("GRPOTrainer", options={**GROUPS, "beta": 0.1, "num_iterations": 2}, arguments=rewarded),
    "rloo": Case("RLOOTrainer", options=GROUPS, arguments=rewarded),
    "online-dpo": Case("OnlineDPOTrainer", options=LENGTHS, arguments=one_reward),
}
"""Run in every layout, with all weights and with an adapter."""


def variant(name: str, model: Callable[[], torch.nn.Module] | None = None, **changes: Any) -> Case:
    """A main case with other options, or other fields where a name is that of a field."""
    fields = {key: changes.pop(key) for key in ("rows", "arguments", "lora", "world") if key in changes}
    return MAIN[name].changed(**fields, **({"model": model} if model else {}), options=changes)


VARIANTS = {
    "sft, texts, tied, micro-batches": variant("sft", tied_model, rows=texts, max_tokens_per_micro_batch=60),
    "sft, accumulated": variant("sft", per_device_train_batch_size=BATCH // 2, gradient_accumulation_steps=2),
    "sft, chats": variant("sft", rows=chats, assistant_only_loss=True, average_loss_over="sequence"),
    "sft, packing": variant("sft", rows=texts, packing=True, max_length=64),
    "sft, wrapped": variant("sft", rows=texts, packing=True, packing_strategy="wrapped", max_length=32),
    "sft, dft": variant("sft", loss_type="dft"),
    "sft, encoder-decoder": variant("sft", encoder_decoder),
    "reward, scores": variant("reward", rows=scored),
    "reward, steps": variant("reward", rows=steps),
    "reward, centred": variant("reward", rows=pairs, center_rewards_coefficient=0.1),
    "dpo, chats, several losses": variant(
        "dpo", rows=chat_pairs, loss_type=["sigmoid", "sft", "aot"], loss_weights=[1.0, 0.5, 0.25]
    ),
    "dpo, ahead": variant("dpo", precompute_ref_log_probs=True, gradient_accumulation_steps=2),
    "dpo, moving reference": variant("dpo", sync_ref_model=True, ref_model_sync_steps=1, loss_type="ipo"),
    "dpo, robust": variant("dpo", loss_type="robust", label_smoothing=0.1),
    "dpo, f-divergence": variant("dpo", f_divergence_type="js_divergence", ld_alpha=0.5),
    "dpo, weighted, rpo": variant("dpo", use_weighting=True, rpo_alpha=0.5),
    "dpo, encoder-decoder": variant("dpo", encoder_decoder),
    "cpo, simpo": variant("cpo", loss_type="simpo", simpo_gamma=0.5, cpo_alpha=0.0),
    "cpo, alphapo": variant("cpo", loss_type="alphapo", alphapo_alpha=0.25),
    "kto, apo": variant("kto", loss_type="apo_zero_unpaired", desirable_weight=1.5),
    "kto, pairs, micro-batches": variant("kto", rows=pairs, max_tokens_per_micro_batch=100),
    "ppo, no head": variant("ppo", language_model, early_stopping=True, target_kl=1e-4, whiten_rewards=True),
    "ppo, full kl, scaled": variant(
        "ppo", kl_penalty="full", use_score_scaling=True, use_score_norm=True, score_clip=0.5
    ),
    "ppo, value layers, iterations": variant(
        "ppo", language_model, num_value_layers=1, per_device_train_batch_size=BATCH, gradient_accumulation_steps=2
    ),
    "ppo, value model": variant(
        "ppo", language_model, arguments=lambda: {**one_reward(), "value_model": classifier()}, adap_kl_ctrl=False
    ),
    "ppo, chats, group": variant("ppo", rows=chat_prompts, num_generations=2, missing_eos_penalty=1.0),
    "ppo, encoder-decoder": variant("ppo", encoder_decoder),
    "ppo-step, early stopping": variant(
        "ppo-step", early_stopping=True, target_kl=1e-4, max_grad_norm=0.5, kl_penalty="abs", whiten_rewards=True
    ),
    "ppo-step, full kl, scaled": variant(
        "ppo-step", kl_penalty="full", use_score_scaling=True, use_score_norm=True, score_clip=0.5, ppo_epochs=1
    ),
    "ppo-step, shared layers": variant("ppo-step", arguments=lambda: {"num_shared_layers": 1}),
    "ppo-step, value model": variant(
        "ppo-step", language_model, arguments=lambda: {"value_model": classifier()}, adap_kl_ctrl=False
    ),
    "grpo, on policy": variant("grpo", rows=chat_prompts, beta=0.0, num_iterations=1),
    "grpo, dr_grpo": variant("grpo", loss_type="dr_grpo", scale_rewards=False, gradient_accumulation_steps=2),
    "grpo, sequence ratios": variant("grpo", importance_sampling_level="sequence", loss_type="grpo"),
    "grpo, corrected": variant(
        "grpo", importance_sampling_correction=True, top_k=20, temperature=0.8, recompute_old_logprobs=True
    ),
    "grpo, entropy": variant("grpo", entropy_coef=0.01, use_adaptive_entropy=True, top_entropy_quantile=0.5),
    "grpo, gdpo, resampled": variant(
        "grpo", multi_objective_aggregation="normalize_then_sum", zero_variance="resample", reward_weights=[1.0, 0.5]
    ),
    "grpo, moving reference": variant("grpo", sync_ref_model=True, ref_model_sync_steps=1, kl_in_reward=True),
    "grpo, encoder-decoder": variant("grpo", encoder_decoder, beta=0.1),
    "rloo, normalised": variant("rloo", normalize_advantages=True, reward_clip_range=(-1.0, 1.0), num_iterations=2),
    "online-dpo, judge": variant("online-dpo", arguments=lambda: {"judge": prefer_longest}, num_generations=3),
    "online-dpo, betas, ipo": variant("online-dpo", beta=[0.1, 0.2], loss_type="ipo", missing_eos_penalty=1.0),
}
"""Run in the layout that the trainer chooses."""


def split(name: str, lora: bool) -> Case:
    """A main case in two processes, which share its batch."""
    case = MAIN[name]
    sizes = {
        key: case.options[key] // 2 for key in ("per_device_train_batch_size", "batch_size") if key in case.options
    }
    return case.changed(options={"per_device_train_batch_size": BATCH // 2, **sizes}, lora=lora, world=2)


def all_cases() -> dict[str, Case]:
    """Every case by its name."""
    adapted = {False: "full", True: "lora"}
    return {
        **{
            f"{name}, {kind}, {layout}": case.changed(lora=lora, options={"layout": layout})
            for name, case in MAIN.items()
            for lora, kind in adapted.items()
            for layout in ("padded", "packed", "shared")
        },
        **VARIANTS,
        **{
            f"{name}, {kind}, two processes": split(name, lora)
            for name in ("sft", "dpo", "kto", "grpo", "online-dpo", "ppo", "ppo-step")
            for lora, kind in adapted.items()
        },
    }


# ---- a run ----


def make_trainer(case: Case, folder: Path) -> Any:
    """The case's trainer, made from the same random numbers every time."""
    transformers.logging.set_verbosity_error()
    set_seed(0)
    model = case.model()
    rows = {} if case.rows is None else {"train_dataset": case.rows(), "eval_dataset": case.rows()}
    if case.lora:
        rows["peft_config"] = LoraConfig(r=4, lora_dropout=0.1)
    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": ROWS // 2 // case.world,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "html_report": False,
        "use_cpu": True,
        **case.options,
    }
    trainer, config = getattr(trl, case.trainer), getattr(trl, case.trainer.replace("Trainer", "Config"))
    return trainer(args=config(**options), model=model, processing_class=make_tokenizer(), **rows, **case.arguments())


def triplets(
    count: int, *, first: int = 0, seed: int = 0
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[float]]:
    """Queries, responses and scores for `PPOTrainer.step`; two share each query."""
    rng = random.Random(f"{seed}")

    def drawn(length: int) -> torch.Tensor:
        return torch.tensor([rng.randrange(len(SPECIAL), SIZES["vocab_size"]) for _ in range(length)])

    made = [(drawn(2 + i % 3), drawn(1 + i), rng.gauss(0, 1)) for i in range(2 * BATCH)][first : first + count]
    queries, responses, scores = zip(*made, strict=True)
    return [queries[i - i % 2] for i in range(count)], list(responses), list(scores)
