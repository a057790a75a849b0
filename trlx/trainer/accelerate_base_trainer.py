"""Common base of the trainers: loads model and tokenizer, evaluates by sampling, and keeps the best checkpoint.

Each wraps a trainer of `trl`, `self.trainer`, which is made on first use, when all data was added. `trlx.trainer.options`
translates the options, `trlx.trainer.scoring` the arguments of reward and metric functions.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
)

from trl.errors import ConfigError, unknown
from trl.models.files import follow_umask
from trl.models.layer_sharing import depth, layers_of
from trl.models.load import explain_missing_tokenizer, load_config, load_model
from trl.rewards.reward import Reward
from trl.rollouts.engine import Prompt
from trl.rollouts.evaluation import SampledEvaluation, SampledMetrics, swept
from trl.rollouts.local import LocalEngine
from trl.training.collectives import all_gather_object
from trlx.data.configs import ModelConfig, TRLConfig
from trlx.data.method_configs import MethodConfig
from trlx.trainer import BaseRLTrainer
from trlx.trainer.evaluation import EvaluationCallback, print_samples
from trlx.trainer.options import common_arguments, optimizer_class, sampling_params
from trlx.trainer.scoring import SEPARATOR, ScriptReward, Texts, script_metrics
from trlx.utils import logging
from trlx.utils.loading import get_pipeline

logger = logging.get_logger(__name__)

ARCHITECTURES = {"causal": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM}


class AccelerateRLTrainer(BaseRLTrainer):
    """Wrapper of a trainer of `trl`. Arguments: see `BaseRLTrainer`.

    logit_mask   [V,V] of bool: after token u, tokens v with `logit_mask[u, v]` are never sampled
    """

    method_class: ClassVar[type[MethodConfig]] = MethodConfig
    """Class of the method's configuration."""

    has_value_head = False
    """True if the model has value or Q heads, which must be saved with it."""

    with_extras = True
    """True if the reward function gets the tokenizer and the prompts' columns."""

    def __init__(
        self,
        config: TRLConfig,
        reward_fn: Callable | None = None,
        metric_fn: Callable | None = None,
        stop_sequences: Sequence[str] | None = None,
        *,
        logit_mask: Any = None,
    ) -> None:
        super().__init__(config, reward_fn, metric_fn, stop_sequences)
        if not isinstance(config.method, self.method_class):
            raise ConfigError(
                f"train.trainer={config.train.trainer!r} takes method.name={self.method_class.__name__!r}, and the "
                f"configuration has {type(config.method).__name__!r}."
            )
        self.optimizer_cls_and_kwargs = optimizer_class(config.optimizer)
        self.logit_mask = None if logit_mask is None else torch.as_tensor(logit_mask).bool()
        self.tokenizer = load_tokenizer(config)
        self.seq2seq = config.model.model_arch_type == "seq2seq"
        self.given_model = load_given_model(config.model)
        separator = (self.tokenizer.sep_token or SEPARATOR) if self.seq2seq else ""
        self.texts = Texts(self.tokenizer, self.stop_sequences, separator)
        self.eval_rows: list[dict[str, Any]] = []
        self._trainer: Any = None
        self.evaluation: EvaluationCallback | None = None

    # ---- implemented by each method ----

    @abstractmethod
    def make_trainer(self) -> Any:
        """Make the trainer of `trl` that the configuration describes."""

    @property
    def trainer(self) -> Any:
        """The trainer of `trl`, made on first use."""
        if self._trainer is None:
            self._trainer = self.make_trainer()
            self._trainer.remove_callback(PrinterCallback)
            self.evaluation = EvaluationCallback(self)
            self._trainer.add_callback(self.evaluation)
            self._trainer.states.register("evaluation", self.evaluation, optional=True)
        return self._trainer

    # ---- data ----

    def add_eval_prompts(self, prompts: Sequence[Any], max_prompt_length: int) -> None:
        self.eval_rows = self.prompt_rows(prompts, max_prompt_length).to_list()

    def prompt_rows(self, prompts: Sequence[Any], max_prompt_length: int) -> Dataset:
        """Rows with `prompt`, `prompt_ids` and the prompts' other columns."""
        pipeline = get_pipeline(self.config.train.pipeline)(
            prompts, max_prompt_length, self.tokenizer, add_special_tokens=self.seq2seq
        )
        rows = [dict(pipeline[i]) for i in range(len(pipeline))]
        for row in rows:
            row.pop("attention_mask", None)
            row["prompt_ids"] = list(row.pop("input_ids"))
            row["prompt"] = self.tokenizer.decode(row["prompt_ids"], skip_special_tokens=True)
        return Dataset.from_list(rows)

    # ---- arguments of the trl trainer ----

    def common_options(self) -> dict[str, Any]:
        """Arguments of the configuration that all methods set."""
        return common_arguments(self.config.train, self.config.optimizer.kwargs.get("weight_decay", 0.0))

    def common_keywords(self) -> dict[str, Any]:
        """Keyword arguments of the trainer that all methods set."""
        return {"processing_class": self.tokenizer, "optimizer_cls_and_kwargs": self.optimizer_cls_and_kwargs}

    def script_reward(self, **options: Any) -> ScriptReward:
        """The script's reward function, wrapped for `trl`."""
        return ScriptReward(self.reward_fn, self.texts, with_extras=self.with_extras, **options)

    def freeze(self) -> None:
        """Freeze layers by `num_layers_unfrozen`. With an adapter, do nothing: peft freezes the base model."""
        if self.config.model.peft_config is None:
            freeze_lower_layers(self.given_model, self.config.model.num_layers_unfrozen)

    # ---- the run ----

    def learn(self) -> Mapping[str, float]:
        """Train, resuming if the configuration names a checkpoint, and return the metrics of the last evaluation."""
        self.trainer.train(resume_from_checkpoint=resumable(self.config.train.resume_from_checkpoint))
        return self.evaluation.last

    def evaluate(self) -> dict[str, float]:
        """Sample from the evaluation prompts, once per swept sampling option, and return `reward/mean` and `metrics/…`.

        Metrics of swept options have a suffix, as in `reward/mean@beta=1`.
        """
        if not self.eval_rows:
            raise ConfigError("There are no evaluation prompts: give eval_prompts.")
        found = self._sampled()
        print_samples(found, self.trainer.state.global_step, logger)
        return {_in_script_words(name): value for name, value in found.metrics.items()}

    def _sampled(self) -> SampledMetrics:
        trainer = self.trainer
        judged = SampledEvaluation(
            self.eval_rows,
            self.eval_params(),
            [] if self.reward_fn is None else [Reward("reward_fn", self.script_reward())],
            None if self.metric_fn is None else script_metrics(self.metric_fn, self.texts),
        )
        return judged(
            LocalEngine(trainer.model_wrapped, self.tokenizer, progress=False),
            self.tokenizer,
            rank=trainer.args.process_index,
            world=trainer.args.world_size,
            gather=lambda own: all_gather_object(own, trainer.accelerator),
        )

    def train_params(self) -> Any:
        """Sampling parameters for training; an option that is a list has its first value."""
        return self._params_of(self._experience_options())

    def _experience_options(self) -> Mapping[str, Any]:
        method = self.config.method
        return getattr(method, "gen_experience_kwargs", None) or method.gen_kwargs

    def _params_of(self, options: Mapping[str, Any]) -> Any:
        first = next(iter(swept(options).values()))
        return sampling_params(first, stop=self.stop_sequences, logit_mask=self.logit_mask)

    @property
    def rollout_folder(self) -> Path | None:
        """Folder that rollouts are written to, or None."""
        folder = self.config.train.rollout_logging_dir
        return None if folder is None else Path(folder)

    def eval_params(self) -> dict[str, Any]:
        """Sampling parameters of each evaluation, by the suffix of its metrics."""
        options = {"stop": self.stop_sequences, "seed": self.config.train.seed, "logit_mask": self.logit_mask}
        return {
            suffix: sampling_params(each, **options) for suffix, each in swept(self.config.method.gen_kwargs).items()
        }

    # ---- for scripts, after training ----

    @property
    def model(self) -> Any:
        """The model in training, with its heads."""
        return self.trainer.model

    @property
    def accelerator(self) -> Any:
        return self.trainer.accelerator

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Sample completions of prompts `[B,T]`; return prompts and completions `[B,T+C]`, padded on the right.

        Sampling options are `gen_experience_kwargs`, or else `gen_kwargs`, updated by `kwargs`; an option that is a list has
        its first value. For an encoder-decoder, return the decoder's tokens `[B,1+C]`.
        """
        return self._generated({**self._experience_options(), **kwargs}, input_ids, attention_mask)

    def generate_eval(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Like `generate`, with the sampling options of evaluation, `gen_kwargs`."""
        return self._generated({**self.config.method.gen_kwargs, **kwargs}, input_ids, attention_mask)

    def _generated(self, options: Mapping[str, Any], ids: Tensor, mask: Tensor | None) -> Tensor:
        params = self._params_of(options)
        mask = torch.ones_like(ids) if mask is None else mask
        prompts = [Prompt(row[keep.bool()].tolist()) for row, keep in zip(ids, mask, strict=True)]
        sampled = LocalEngine(self.trainer.model_wrapped, self.tokenizer, progress=False).generate(prompts, params, 1)
        outputs = [torch.tensor(rollout.ids, dtype=torch.long) for (rollout,) in sampled]
        pad = self.tokenizer.pad_token_id
        padded = torch.nn.utils.rnn.pad_sequence(outputs, batch_first=True, padding_value=pad).to(ids.device)
        start = self.trainer.model.config.decoder_start_token_id if self.seq2seq else None
        before = ids if start is None else torch.full_like(ids[:, :1], start)
        return torch.cat([before, padded], 1)

    def save_pretrained(self, directory: str | Path | None = None, **kwargs: Any) -> None:
        """Save model, heads and tokenizer, by default to `hf_model` in the checkpoint folder."""
        folder = Path(directory or Path(self.config.train.checkpoint_dir) / "hf_model")
        if self.has_value_head:
            self.trainer.save_pretrained(folder, **kwargs)
        else:
            self.accelerator.unwrap_model(self.trainer.model).save_pretrained(folder, **kwargs)
            follow_umask(folder)
            self.tokenizer.save_pretrained(folder)

    def save(self, directory: str | Path | None = None, **kwargs: Any) -> None:
        """Save the model to `directory`, by default the checkpoint folder."""
        self.save_pretrained(directory or self.config.train.checkpoint_dir, **kwargs)

    def load(self, directory: str | Path | None = None, **_: Any) -> None:
        """Load the weights of a model that a trainer of this class saved."""
        folder = Path(directory or self.config.train.checkpoint_dir)
        self.trainer._load_from_checkpoint(str(folder / "hf_model" if (folder / "hf_model").exists() else folder))


def _in_script_words(name: str) -> str:
    """Rename metrics as trlX does: `reward@beta=1` becomes `reward/mean@beta=1`."""
    head, at, suffix = name.partition("@")
    return ("reward/mean" if head == "reward" else head) + at + suffix


# ---- model and tokenizer ----


def load_tokenizer(config: TRLConfig) -> PreTrainedTokenizerBase:
    """Load the configuration's tokenizer; EOS becomes its padding token if it has none."""
    section = config.tokenizer
    with explain_missing_tokenizer(str(section.tokenizer_path)):
        tokenizer = AutoTokenizer.from_pretrained(section.tokenizer_path, **section.tokenizer_extra_configs)
    tokenizer.padding_side, tokenizer.truncation_side = section.padding_side, section.truncation_side
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_given_model(section: ModelConfig) -> str | PreTrainedModel:
    """Load the model that the section names, on the CPU."""
    if section.model_arch_type not in ARCHITECTURES:
        raise ConfigError(unknown("model.model_arch_type", str(section.model_arch_type), ARCHITECTURES))
    auto_class = ARCHITECTURES[section.model_arch_type]
    if isinstance(section.model_path, PreTrainedConfig):
        model = auto_class.from_config(section.model_path)
    else:
        trust = section.model_extra_configs.get("trust_remote_code", False)
        config = load_config(str(section.model_path), trust_remote_code=trust)
        if config.is_encoder_decoder != (section.model_arch_type == "seq2seq"):
            kind = "seq2seq" if config.is_encoder_decoder else "causal"
            raise ConfigError(
                f"model.model_arch_type={section.model_arch_type!r}, but {section.model_path!r} is {kind!r}."
            )
        model = load_model(str(section.model_path), auto_class=auto_class, **section.model_extra_configs)
    return model


def freeze_lower_layers(model: PreTrainedModel, unfrozen: int) -> None:
    """Freeze all but the upper `unfrozen` layers, the final norm and the head. −1: freeze nothing. 0: freeze everything."""
    if unfrozen < 0:
        return
    if unfrozen == 0:
        model.requires_grad_(False)
        return
    layers = layers_of(model)
    kept = {id(p) for layer in layers[max(0, depth(model) - unfrozen) :] for p in layer.parameters()}
    lower = [*layers[: max(0, depth(model) - unfrozen)], model.get_input_embeddings()]
    lower += [model.get_encoder()] if model.config.is_encoder_decoder else []
    for module in lower:
        for parameter in module.parameters():
            parameter.requires_grad_(id(parameter) in kept)


def resumable(path: str | None) -> str | None:
    """The checkpoint to resume from: `checkpoint_0100` is resolved to `checkpoint-100`, which its symlink names."""
    if path is None:
        return None
    folder = Path(path)
    inside = folder / "hf_model"
    return os.path.realpath(inside) if inside.is_symlink() else str(folder)
