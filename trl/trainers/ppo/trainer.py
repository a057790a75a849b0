"""Proximal policy optimisation: from (query, response, score) triplets, or as a whole loop over prompts.

    rollout        the model continues a query
    evaluation     a function, a model or a person gives one number per query and response
    optimisation   credit per token, and several epochs of clipped losses; see `trl.algorithms.ppo`

trainer = PPOTrainer(config, model, ref_model, tokenizer);  trainer.step([query], [response], [score])
PPOTrainer(args=config, model=model, reward_funcs=positive, train_dataset=prompts).train()
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from trl.algorithms.moments import RunningMoments
from trl.errors import ConfigError
from trl.models.layouts import why_not
from trl.models.load import load_model, with_adapters
from trl.models.patching import evaluating
from trl.models.reference import (
    Reference,
    SnapshotReference,
    create_reference_model,
    frozen_reference,
    make_reference,
)
from trl.models.score import score, unwrap
from trl.models.sharding import prepare_frozen
from trl.models.value_heads.auto_models import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    WithValueHead,
    with_value_head,
)
from trl.models.value_heads.heads import ValueBranch, ValueModel
from trl.models.value_heads.storage import VALUE_MODEL, stored_head, without_copies
from trl.ops.reduce import masked_mean
from trl.rewards.adapter import AdapterReward
from trl.rollouts.experience import Group, with_signals
from trl.trainers.ppo.config import PPOConfig
from trl.trainers.ppo.steps import TripletSteps
from trl.trainers.preference import SyncRefModelCallback
from trl.training.state import StateFunctions
from trl.types import Batch, Example, Experience, Metrics

__all__ = ["PPOConfig", "PPOTrainer"]

logger = logging.getLogger(__name__)


def no_rewards(**_: Any) -> list[float]:
    """Stands for the reward functions of a trainer that is given scores by hand."""
    raise ConfigError("This PPOTrainer has no reward_funcs: give scores to step(), or reward_funcs to the trainer.")


class PPOTrainer(TripletSteps):
    """Train a language model by PPO, a batch of triplets at a time with `step`, or on prompts with `train`.

    config             a `PPOConfig`; `args` is the same
    model              a model with a value head, or any language model, or its name: a head is put on
    ref_model          the policy to stay near. None: the model as it is now (with a new adapter: without it)
    tokenizer          `processing_class` is the same
    dataset            rows for `dataloader`, which gives shuffled batches of `batch_size`, collated by `data_collator`
    optimizer          Adam by default; `lr_scheduler` is stepped once per `step`
    num_shared_layers  layers that policy and reference have in common, frozen
    reward_funcs       for `train`, as in `OnlineTrainer`; `reward_model` is one of them. None: the model's reward adapter
    train_dataset      rows with `prompt`, for `train`
    value_model        a network of the value's own, trained with the policy, in place of a head on it: a sequence
                       classifier with one label, any model of the same tokenizer, or the name of one

    The other arguments are those of `OnlineTrainer`.
    """

    config_class = PPOConfig

    def __init__(
        self,
        config: PPOConfig | None = None,
        model: str | PreTrainedModel | WithValueHead | nn.Module | None = None,
        ref_model: str | nn.Module | None = None,
        tokenizer: Any = None,
        dataset: Dataset | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        data_collator: Callable | None = None,
        num_shared_layers: int | None = None,
        lr_scheduler: Any = None,
        *,
        args: PPOConfig | None = None,
        reward_funcs: Any = None,
        reward_model: Any = None,
        value_model: str | nn.Module | None = None,
        optimizers: tuple = (None, None),
        **more: Any,
    ) -> None:
        _check_arguments(config, args, model, ref_model, reward_funcs, reward_model, value_model)
        self.ref_model, self.num_shared_layers, self.value_model = ref_model, num_shared_layers, value_model
        rewards = reward_model if reward_funcs is None else reward_funcs
        if rewards is None and isinstance(model, WithValueHead) and model.reward_adapter_name is not None:
            rewards = AdapterReward(model)
        self.has_rewards = rewards is not None
        super().__init__(
            model,
            rewards if self.has_rewards else no_rewards,
            args if config is None else config,
            tokenizer=tokenizer,
            optimizers=optimizers if optimizer is None else (optimizer, lr_scheduler),
            **more,
        )
        self.config = self.args
        if isinstance(rewards, AdapterReward):
            rewards.read_with(self.tokenizer)
        if self.optimizer is not None:
            self._train_new_head(self.optimizer)
        self.prepare_steps(dataset, data_collator)
        self.states.register("kl_and_rewards", StateFunctions(self._running_state, self._load_running))
        if self.train_dataset is None and self.optimizer is None:
            self.optimizer = torch.optim.Adam(self._trained(), lr=self.args.learning_rate)

    # ---- model and reference ----

    def _resolve_model(self, model: Any, quantization_config: Any, peft_config: Any) -> nn.Module:
        if isinstance(model, str):
            model = self._load(model, quantization_config)
        given_head = model.v_head if isinstance(model, WithValueHead) else None
        if isinstance(model, WithValueHead):
            model.pretrained_model = with_adapters(model.pretrained_model, peft_config)
        else:
            model = with_value_head(with_adapters(model, peft_config))
            if self.value_model is None:
                logger.warning(f"This {type(unwrap(model)).__name__} has no value head: a new one is put on.")
        if self.value_model is not None:
            model.v_head = self._value_head(self.value_model)
        elif self.args.num_value_layers and not isinstance(model.v_head, ValueBranch):
            model.branch(self.args.num_value_layers)
        self._has_new_head = model.v_head is not given_head
        model.has_new_adapter = model.has_new_adapter or peft_config is not None
        return super()._resolve_model(model, None, None)

    def _train_new_head(self, optimizer: torch.optim.Optimizer) -> None:
        """Give an optimizer that was made beforehand what the trainer has put on the model since."""
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if self._has_new_head:
            optimizer.param_groups[0]["params"] += [p for p in self.model.v_head.parameters() if id(p) not in known]

    def _value_head(self, given: str | nn.Module) -> ValueModel:
        """A value head on the network of its own that was given."""
        if isinstance(given, WithValueHead):
            return ValueModel(ValueModel.of(given.pretrained_model).model, given.head_options, given.v_head.summary)
        if isinstance(given, str):
            whole = AutoConfig.from_pretrained(given, **self.args.loading()).is_encoder_decoder
            kind = {} if whole else {"auto_class": AutoModelForSequenceClassification, "num_labels": 1}
            given = load_model(given, **self.args.loading(), **kind)
        return ValueModel.of(given)

    def prepare_model(self) -> None:
        super().prepare_model()
        if isinstance(self.model.v_head, ValueModel) and not self.model.config.is_encoder_decoder:
            self._check_layout(self.model.v_head.model)

    def _check_layout(self, network: PreTrainedModel) -> None:
        """Take the padded layout where the value's network cannot be run in the policy's."""
        attention = network.config._attn_implementation
        if self.layout == "shared" and attention != (own := unwrap(self.model).config._attn_implementation):
            reason = f"its attention implementation is {attention!r}, the policy's {own!r}"
        else:
            with evaluating(self.model):
                reason = why_not(network, self.layout, measure=lambda _, batch: self._value_of(self.model, batch))
        if not reason:
            return
        if self.args.layout != "auto":
            raise ConfigError(f"layout={self.layout!r} does not work with this value_model: {reason}.")
        logger.warning(f"Layout 'padded' (the value model does not work with {self.layout!r}: {reason}).")
        self.layout = "padded"

    @staticmethod
    def _value_of(model: nn.Module, batch: Batch) -> Tensor:
        return score(model, batch, want={"value"}).value

    def _load(self, name: str, quantization_config: Any) -> WithValueHead:
        args = self.args
        kwargs = args.loading(args.model_init_kwargs)
        if quantization_config is not None:
            kwargs["quantization_config"] = quantization_config
        args.model_init_kwargs = None
        config = AutoConfig.from_pretrained(name, trust_remote_code=kwargs["trust_remote_code"])
        kinds = {False: AutoModelForCausalLMWithValueHead, True: AutoModelForSeq2SeqLMWithValueHead}
        return kinds[config.is_encoder_decoder].from_pretrained(name, **kwargs)

    def _make_reference(self) -> Reference:
        inner = self.model.pretrained_model
        if self.num_shared_layers is not None and (self.ref_model is not None or isinstance(inner, PeftModel)):
            raise ConfigError(
                f"num_shared_layers={self.num_shared_layers} is for a reference that the trainer makes by copying: with "
                "a ref_model, make that with create_reference_model(model, num_shared_layers); with an adapter, the "
                "reference shares all layers already."
            )
        if self.ref_model is None and isinstance(inner, PeftModel):
            if self.args.sync_ref_model:
                raise ConfigError(
                    "sync_ref_model moves the weights of a reference that has its own, but with an adapter it shares "
                    "the model's: give a ref_model, or set sync_ref_model=False."
                )
            reference = make_reference(inner, has_new_adapter=self.model.has_new_adapter)
            return SnapshotReference.of(self.model) if isinstance(reference, SnapshotReference) else reference
        self.ref_model = prepare_frozen(self.accelerator, self._frozen_model(inner))
        if self.args.sync_ref_model:
            self.add_callback(SyncRefModelCallback(self.ref_model))
        return frozen_reference(inner, self.ref_model)

    def _frozen_model(self, policy: PreTrainedModel) -> nn.Module:
        """The reference model: the one that was given, or a copy of the policy."""
        if self.ref_model is None:
            model = create_reference_model(policy, self.num_shared_layers)
        elif isinstance(self.ref_model, str):
            model = load_model(self.ref_model, **self.args.loading())
        else:
            model = self.ref_model
        return model.requires_grad_(False).eval()

    @property
    def current_device(self) -> torch.device:
        return self.accelerator.device

    # ---- the whole loop ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Sample, reward, learn, as `args` say; see `transformers.Trainer.train`."""
        missing = [
            name
            for name, there in (("reward_funcs", self.has_rewards), ("train_dataset", self.train_dataset))
            if not there
        ]
        if missing:
            raise ConfigError(
                f"train() needs {' and '.join(missing)}: PPOTrainer(args=..., model=..., reward_funcs=..., "
                "train_dataset=...). To sample and score by yourself, call step(queries, responses, scores)."
            )
        self.args.max_grad_norm = self.args.max_grad_norm or 0.0  # what `transformers` reads as no limit
        return super().train(*args, **kwargs)

    def compute_advantages(self, groups: Sequence[Group], mode: str) -> tuple[list[Example], Experience]:
        moments = self.moments
        examples, experience = super().compute_advantages(self._with_full_kl(groups), mode)
        if mode != "train":
            self.moments = moments
            return examples, experience
        kl = (experience.signals["kl"] * experience.mask).sum(1)
        self.meters[mode].add({"kl": kl})
        self._count("kl_coef", self.algorithm.controller.coefficient, 1)
        self.algorithm = self.algorithm.after(self._gather(kl.to(self.args.device)).mean().item(), self._round_size(kl))
        return examples, experience

    def _round_size(self, completions: Tensor) -> int:
        return len(completions) * self.accelerator.num_processes

    def _with_full_kl(self, groups: Sequence[Group]) -> Sequence[Group]:
        """The groups with the signal `full_kl`, where the penalty is that."""
        if self.args.kl_penalty != "full":
            return groups
        examples = [group.example for group in groups]
        found = with_signals(examples, self.score_rollouts(examples, self._divergence))
        return [replace(group, example=example) for group, example in zip(groups, found, strict=True)]

    def _divergence(self, batch: Batch) -> dict[str, Tensor]:
        return {"full_kl": self.full_kl(self.model_wrapped, batch)}

    def _with_advantages(self, local: Experience) -> Experience:
        """Credit from the rewards as they are scaled and clipped; 0 where no reward function applied."""
        shaped = self._shape(local.rewards.nan_to_num(0.0)).to(local.rewards)
        return replace(super()._with_advantages(replace(local, rewards=shaped)), rewards=local.rewards)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        loss, metrics = super().loss(model, batch)
        kept = masked_mean(metrics["policy/ratio"], batch.mask) <= self.args.ratio_threshold
        if batch.weight is not None:
            self._moved += (metrics["policy/policykl"] * batch.weight).sum()
        return loss * kept, metrics

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[list[Batch]], int]:
        self._moved = torch.zeros((), device=self.args.device)
        return super().get_batch_samples(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.args.early_stopping and self.buffer.is_between_epochs:
            stops = self.has_moved(self._moved)
            self._count("early_stop", stops)
            if stops:
                self.buffer.skip_remaining_epochs()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    # ---- checkpoints ----

    def _running_state(self) -> dict[str, Any]:
        return {"kl_coef": self.algorithm.controller.coefficient, "moments": asdict(self.moments)}

    def _load_running(self, state: Mapping[str, Any]) -> None:
        self.moments = RunningMoments(**state["moments"])
        self.algorithm = self.algorithm.with_coefficient(state["kl_coef"])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, self.model.pretrained_model)
        if isinstance(self.model.v_head, ValueModel):
            super()._load_from_checkpoint(str(Path(resume_from_checkpoint) / VALUE_MODEL), self.model.v_head.model)
        head = stored_head(resume_from_checkpoint, {})
        assert head is not None, "checkpoints are written by save_pretrained, with the head"
        self.model.v_head.take(head)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    # ---- saving ----

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save the model with its value head, and the tokenizer."""
        self.accelerator.unwrap_model(self.model).save_pretrained(save_directory, **kwargs)
        self.processing_class.save_pretrained(save_directory)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            state = None if state_dict is None else without_copies(unwrap(self.model), state_dict)
            self.save_pretrained(output_dir or self.args.output_dir, state_dict=state)

    def push_to_hub(self, repo_id: str | None = None, **kwargs: Any) -> Any:
        """Upload model, value head and tokenizer to `repo_id`; without it, as `transformers.Trainer` does."""
        if repo_id is None:
            return super().push_to_hub(**kwargs)
        self.processing_class.push_to_hub(repo_id, **kwargs)
        return self.accelerator.unwrap_model(self.model).push_to_hub(repo_id, **kwargs)


def _check_arguments(
    config: Any, args: Any, model: Any, ref_model: Any, reward_funcs: Any, reward_model: Any, value_model: Any
) -> None:
    if isinstance(config, str | nn.Module):
        raise ConfigError("The first argument of PPOTrainer is its configuration: PPOTrainer(config, model, ...).")
    if model is None:
        raise ConfigError("model is missing: PPOTrainer(config, model, ...) trains a model, or the name of one.")
    if ref_model is not None and ref_model is model and not isinstance(model, str):
        raise ConfigError("model and ref_model are the same object, so both would be trained: leave ref_model out.")
    others = {"model": model, "ref_model": ref_model, "reward_funcs": reward_funcs, "reward_model": reward_model}
    for name, other in others.items():
        if value_model is other and isinstance(other, nn.Module):
            raise ConfigError(f"value_model and {name} are the same object, but the value is trained: give it a copy.")
    for name, other, both in (
        ("config", "args", (config, args)),
        ("reward_funcs", "reward_model", (reward_funcs, reward_model)),
    ):
        if None not in both:
            raise ConfigError(f"{name} and {other} are two names of one argument: give one of them.")
