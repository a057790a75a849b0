"""Proximal policy optimisation: from (query, response, score) triplets, or as a whole loop over prompts.

    rollout        the model samples a response to a query
    evaluation     a function, a model or a person gives one number per query and response
    optimisation   advantages per token, and several epochs of clipped losses; see `trl.algorithms.ppo`

trainer = PPOTrainer(config, model, ref_model, tokenizer);  trainer.step([query], [response], [score])
PPOTrainer(args=config, model=model, reward_funcs=positive, train_dataset=prompts).train()

Both ways share their code: the samples of `train` and the triplets given to `step` become an experience, from which the
algorithm computes advantages, and minibatches, on which `optimizer_step` or the loop of `transformers` trains.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import ceil
from typing import Any, Unpack

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from trl.algorithms.ppo import PPO, full_kl
from trl.errors import ConfigError
from trl.models.checkpointing import checkpoint_activations
from trl.models.load import load_config
from trl.models.reference import Reference, SnapshotReference, create_reference_model
from trl.models.saved_adapters import hub_options
from trl.models.score import score_logits, unwrap
from trl.models.value_heads.auto_models import WithValueHead, value_head_class, with_value_head
from trl.models.value_heads.heads import ValueBranch, ValueModel
from trl.rewards.adapter import AdapterReward
from trl.rollouts.engine import RolloutEngine
from trl.rollouts.experience import Group, experience_of, with_signals
from trl.rollouts.local import LocalEngine
from trl.trainers.arguments import PPOKeywords
from trl.trainers.online import OnlineTrainer
from trl.trainers.ppo.attributes import PPOAttributes
from trl.trainers.ppo.config import PPOConfig
from trl.trainers.ppo.generate import prompts_of, sample, sampling_params
from trl.trainers.ppo.model import check_arguments, layout_with_value_model, value_network
from trl.trainers.ppo.statistics import Stopwatch, environment, step_statistics, warn_of_skipped
from trl.trainers.ppo.triplets import (
    adjacent_by_prompt,
    merge_neighbours,
    prompt_numbers,
    read_scores,
    read_triplets,
)
from trl.trainers.reference import reference_for, sync_callbacks
from trl.trainers.tracking import log_table, start_tracker
from trl.trainers.value_head import ValueHeadTrainer
from trl.training.nonfinite import NonFiniteError
from trl.training.optimizers import check_unscaled
from trl.types import Batch, Example, Experience, Metrics

__all__ = ["PPOConfig", "PPOTrainer"]

logger = logging.getLogger(__name__)

READ_BY_TRAIN = (
    "optim",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "lr_scheduler_type",
    "warmup_steps",
)
"""Options of the optimizer that `train` makes."""

LOWEST_KL = -1.0
"""Mean KL of a batch below which its responses were most likely not sampled from the current policy."""


def no_rewards(**_: Any) -> list[float]:
    """Placeholder for the reward functions of a trainer without any, which gets its scores by `step`."""
    raise ConfigError("This PPOTrainer has no reward_funcs: give scores to step(), or reward_funcs to the trainer.")


class PPOTrainer(ValueHeadTrainer, PPOAttributes, OnlineTrainer):
    """Train a language model by PPO, a batch of triplets at a time with `step`, or on prompts with `train`.

    config             a `PPOConfig`; `args` is another name of it
    model              a model with a value head, or any language model or its name, to which a value head is added
    ref_model          the reference policy. None: the initial model (with a new adapter: the model without it)
    tokenizer          `processing_class` is another name of it
    dataset            rows for `dataloader`, which yields shuffled batches of `batch_size`, collated by `data_collator`
    optimizer          Adam by default; `lr_scheduler` is stepped once per `step`
    num_shared_layers  number of lower layers that are frozen and shared by policy and reference
    reward_funcs       for `train`, as in `OnlineTrainer`; `reward_model` is another name. None: the model's reward adapter
    train_dataset      rows with `prompt`, for `train`
    value_model        a separate value network, trained with the policy, instead of a value head on it: a sequence
                       classifier with one label, any model with the same tokenizer, or the name of one

    The other arguments are those of `OnlineTrainer`.
    """

    config_class = PPOConfig
    args: PPOConfig
    algorithm: PPO
    engine: RolloutEngine
    reference: Reference

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
        **keywords: Unpack[PPOKeywords],
    ) -> None:
        check_arguments(config, args, model, ref_model, reward_funcs, reward_model, value_model)
        if lr_scheduler is not None and optimizer is None:
            raise ConfigError("lr_scheduler was given without the optimizer that it schedules: give both.")
        self.ref_model, self.num_shared_layers, self.value_model = ref_model, num_shared_layers, value_model
        rewards = reward_model if reward_funcs is None else reward_funcs
        if rewards is None and isinstance(model, WithValueHead) and model.reward_adapter_name is not None:
            rewards = AdapterReward(model)
        self.has_rewards = rewards is not None
        tokenizer = tokenizer if tokenizer is not None else keywords.pop("processing_class", None)
        if isinstance(reward_model, PreTrainedModel) and not reward_model.config._name_or_path:
            keywords.setdefault("reward_processing_classes", tokenizer)
        super().__init__(
            model,
            rewards if self.has_rewards else no_rewards,
            args if config is None else config,
            tokenizer=tokenizer,
            optimizers=optimizers if optimizer is None else (optimizer, lr_scheduler),
            **keywords,
        )
        self.config = self.args
        if isinstance(rewards, AdapterReward):
            rewards.read_with(self.tokenizer)
        if self.optimizer is not None:
            self._train_new_head(self.optimizer)
        elif self.train_dataset is None:
            self.optimizer = self._adam()
        self.best_score = float("-inf")
        self.dataset, self.dataloader = dataset, self._make_loader(dataset, data_collator)
        self._is_prepared = False
        self._ratios: list[tuple[Tensor, Tensor]] = []
        self._triplets: Sequence[int] = ()
        start_tracker(self.args, self.accelerator)

    def _make_loader(self, dataset: Dataset | None, data_collator: Callable | None) -> Any:
        if dataset is None:
            return None
        size = self.args.batch_size
        loader = DataLoader(dataset, batch_size=size, collate_fn=data_collator, shuffle=True, drop_last=True)
        return self.accelerator.prepare_data_loader(loader)

    # ---- model and reference ----

    def _load(self, name: str, options: Mapping[str, Any]) -> WithValueHead:
        config = load_config(name, trust_remote_code=options["trust_remote_code"], **hub_options(options))
        return value_head_class(config).from_pretrained(name, **options)

    def _with_head(self, model: nn.Module) -> WithValueHead:
        if self.value_model is None:
            logger.warning(f"This {type(unwrap(model)).__name__} has no value head: a new one is added.")
        return with_value_head(model)

    def _with_adapters(self, model: nn.Module, peft_config: Any) -> WithValueHead:
        given_head = model.v_head if isinstance(model, WithValueHead) else None
        model = super()._with_adapters(model, peft_config)
        if self.value_model is not None:
            model.v_head = value_network(self.value_model, self.args)
        elif self.args.num_value_layers and not isinstance(model.v_head, ValueBranch):
            model.branch(self.args.num_value_layers)
        model.has_new_adapter = model.has_new_adapter or peft_config is not None
        self._has_new_head = model.v_head is not given_head
        return model

    def _train_new_head(self, optimizer: torch.optim.Optimizer) -> None:
        """Add the parameters of a value head that the trainer has added to the user's optimizer."""
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if self._has_new_head:
            optimizer.param_groups[0]["params"] += [p for p in self.model.v_head.parameters() if id(p) not in known]

    def _adam(self) -> torch.optim.Adam:
        """The optimizer of `step`, unless one is given. Warns of options that only `train` reads."""
        for name in READ_BY_TRAIN:
            if (value := getattr(self.args, name)) != PPOConfig.__dataclass_fields__[name].default:
                logger.warning(
                    f"{name}={value!r} has no effect on step(), which uses Adam at a constant learning_rate: give an "
                    "optimizer (and lr_scheduler) to PPOTrainer."
                )
        return torch.optim.Adam((p for p in self.model.parameters() if p.requires_grad), lr=self.args.learning_rate)

    def _choose_layout(self, inner: PreTrainedModel, **options: Any) -> str:
        layout = super()._choose_layout(inner, **options)
        is_separate = isinstance(self.model.v_head, ValueModel)
        return layout_with_value_model(self.model, layout, self.args) if is_separate else layout

    def _make_reference(self) -> Reference:
        inner, new = self.model.pretrained_model, self.model.has_new_adapter
        if self.num_shared_layers is not None and (self.ref_model is not None or isinstance(inner, PeftModel)):
            raise ConfigError(
                f"num_shared_layers={self.num_shared_layers} is for a reference that the trainer copies from the model. For a "
                "ref_model, call create_reference_model(model, num_shared_layers); with an adapter leave it out, since the "
                "reference shares all layers already."
            )
        copy = partial(create_reference_model, num_shared_layers=self.num_shared_layers)
        reference = reference_for(inner, self.ref_model, self.args, self.accelerator, has_new_adapter=new, copy=copy)
        return SnapshotReference.of(self.model) if isinstance(reference, SnapshotReference) else reference

    # ---- rollout ----

    @torch.no_grad()
    def generate(
        self,
        query_tensor: Tensor | Sequence[Tensor],
        length_sampler: Callable[[], int] | None = None,
        batch_size: int | None = None,
        return_prompt: bool = True,
        generate_ref_response: bool = False,
        query_inputs: Sequence[Mapping[str, Tensor]] | None = None,
        **generation_kwargs: Any,
    ) -> Any:
        """Sample a response to every query, as `model.generate` would with these options.

        For a list of 1-D queries it returns a list of 1-D tensors, each cut after its first end-of-sequence token; for one
        1-D query a tensor `[1,L]`. Responses begin with their query unless `return_prompt` is false; those of an
        encoder-decoder begin with the decoder's start token. `length_sampler` draws the number of new tokens of each.
        `batch_size` is how many are sampled at a time (None: as many as fit). `query_inputs` are the model's other inputs
        for each query, as in `step`. With `generate_ref_response` it returns two results: the model's and the reference's.
        """
        queries = [query_tensor] if isinstance(query_tensor, Tensor) else list(query_tensor)
        prompts = prompts_of(queries, length_sampler, query_inputs)
        defaults, drawn = unwrap(self.model).generation_config, length_sampler is not None
        params = sampling_params(defaults, generation_kwargs, sampled_length=drawn)
        if (start := self._start_token()) is not None:
            starts = [[start] for _ in queries]
        else:
            starts = [query.tolist() if return_prompt else [] for query in queries]

        end = None if isinstance(query_tensor, Tensor) else self.tokenizer.eos_token_id

        def respond(engine: RolloutEngine, model: nn.Module) -> Any:
            with self.compute_loss_context_manager():
                ids = sample(engine, model, prompts, params, batch_size, step=self.state.global_step, end=end)
            rows = ([*start, *response] for start, response in zip(starts, ids, strict=True))
            found = [torch.tensor(row, device=self.current_device) for row in rows]
            return found[0][None] if isinstance(query_tensor, Tensor) else found

        responses = respond(self.engine, self.model_wrapped)
        if not generate_ref_response:
            return responses
        with self.reference.as_model(self.model_wrapped) as reference:
            engine = self.engine if self.engine.is_policy else LocalEngine(reference, self.tokenizer)
            return responses, respond(engine, reference)

    def _start_token(self) -> int | None:
        """The token that a decoder's sequence starts with in an encoder-decoder; None for other models."""
        config = unwrap(self.model).config
        return config.decoder_start_token_id if config.is_encoder_decoder else None

    # ---- the loop over prompts ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Sample from `train_dataset`, reward and train, by the options `args`; see `transformers.Trainer.train`."""
        needed = {"reward_funcs": self.has_rewards, "train_dataset": self.train_dataset}
        missing = [name for name, there in needed.items() if not there]
        if missing:
            raise ConfigError(
                f"train() needs {' and '.join(missing)}: PPOTrainer(args=..., model=..., reward_funcs=..., "
                "train_dataset=...). To sample and score by yourself, call step(queries, responses, scores)."
            )
        self.args.max_grad_norm = self.args.max_grad_norm or 0.0  # what `transformers` reads as no limit
        return super().train(*args, **kwargs)

    def compute_advantages(self, groups: Sequence[Group], mode: str) -> tuple[list[Example], Experience]:
        coefficient = self.algorithm.controller.coefficient
        examples, experience = super().compute_advantages(groups, mode)
        if mode == "train":
            self.meters[mode].add({"kl": (experience.signals["kl"] * experience.mask).sum(1)})
            self._count("kl_coef", coefficient, 1)
        return examples, experience

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.args.early_stopping and self.buffer.is_between_epochs:
            stops = self._has_left_target()
            self._count("early_stop", stops)
            if stops:
                self.buffer.skip_remaining_epochs()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    # ---- the loop over triplets ----

    def step(
        self,
        queries: Sequence[Tensor],
        responses: Sequence[Tensor],
        scores: Sequence[Tensor | float],
        response_masks: Sequence[Tensor] | None = None,
        query_inputs: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> dict[str, Any]:
        """Train on `batch_size` triplets; return statistics: floats, and arrays of distributions.

        queries, responses   token ids, `[L]` or `[1,L]`
        scores               one number per response: higher is better
        response_masks       1 for the response tokens to train on; all of them by default
        query_inputs         the model's other inputs for each query (pixel values, …): a dict of tensors each

        A call counts as one step: for `lr_scheduler`, and for ref_model_sync_steps with sync_ref_model=True.

        Raises DataError, with the argument and the index, for triplets that cannot be trained on.
        """
        watch, size = Stopwatch(), self.args.batch_size
        masks, start = response_masks, self._start_token()
        known = {"start_token": start, "vocabulary": self._rows_of_embedding(), "inputs": query_inputs}
        examples = read_triplets(queries, responses, masks, batch_size=size, **known)
        rewards = read_scores(scores, batch_size=size)
        self._triplets = range(size)
        self._prepare()
        signals = self.score_rollouts(examples, self._step_signals, count=ceil(size / self.args.mini_batch_size))
        watch.lap("forward_pass")
        group = torch.tensor(prompt_numbers(examples))
        local = replace(experience_of(examples, rewards), group=group, signals=signals)
        watch.lap("compute_rewards")
        coefficient = self.algorithm.controller.coefficient
        experience = self.with_advantages(local, "train")
        watch.lap("compute_advantages")
        ratios = self._optimize(with_signals(examples, experience.signals))
        watch.lap("optimize_step")
        warn_of_skipped(ratios, self.args.ratio_threshold)
        trained = self.meters["train"].read(self._gather, self.current_device)
        statistics = step_statistics(examples, experience, coefficient, ratios, trained, self._gather)
        statistics["ppo/learning_rate"] = self.optimizer.param_groups[0]["lr"]
        if self.steps.skipped:
            statistics["ppo/skipped_steps"] = self.steps.skipped
        watch.lap("calc_stats")
        self._finish(statistics)
        return {**statistics, **watch.total()}

    def _prepare(self) -> None:
        """Set the model to training mode; at the first step, also wrap model and optimizer for distributed training."""
        self.model.train()
        if self._is_prepared:
            return
        if self.args.gradient_checkpointing:
            given = (
                vars(self.args).get("activation_checkpointing_kwargs") or self.args.gradient_checkpointing_kwargs or {}
            )
            checkpoint_activations(self.model, {"use_reentrant": False, **given})
        if self.accelerator.scaler is not None:
            check_unscaled(self.model)
        if self.optimizer is None:
            self.optimizer = self._adam()
        if self.is_deepspeed_enabled:  # DeepSpeed clips gradients itself
            self.accelerator.deepspeed_plugin.deepspeed_config["gradient_clipping"] = self.args.max_grad_norm or 0.0
        self.model_wrapped, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.deepspeed = self.model_wrapped if self.is_deepspeed_enabled else None  # read by `save_model`
        self._is_prepared = True

    def _step_signals(self, batch: Batch) -> dict[str, Tensor]:
        return self._score_policy_and_reference(batch, {"old_logprobs", "values", "ref_logprobs"})

    def _optimize(self, examples: Sequence[Example]) -> list[Tensor]:
        """Run the epochs of optimizer steps over random permutations of the batch; return each minibatch's ratios."""
        args, ratios = self.args, []
        for _ in range(args.ppo_epochs):
            order = torch.randperm(len(examples)).tolist()
            for start in range(0, len(order), args.backward_batch_size):
                self._triplets = order[start:][: args.backward_batch_size]
                count = ceil(len(self._triplets) / args.mini_batch_size)
                self.optimizer_step([examples[i] for i in self._triplets], count=count)
                ratios += self._ratios_of_tokens()
            if args.early_stopping and self._has_left_target():
                break
        self._triplets = ()
        return ratios

    def _finish(self, statistics: Mapping[str, Any]) -> None:
        """Step the learning rate scheduler, count the step, sync the reference, and upload the model if it is the best so far."""
        if (kl := statistics["objective/kl"]) < LOWEST_KL:
            warnings.warn(
                f"The mean KL of this batch is {kl:.2f}, but it is positive on average for responses that the policy sampled: "
                "sample with top_k=0, top_p=1.0, temperature 1 and min_length=-1, and from the current weights.",
                stacklevel=3,
            )
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        self.state.global_step += 1
        for callback in sync_callbacks(self.reference, self.args):
            callback.on_step_end(self.args, self.state, self.control, self.model_wrapped)
        if self.args.optimize_device_cache and torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._push_if_best(statistics["ppo/mean_scores"])

    def _push_if_best(self, mean_score: float) -> None:
        options = self.args.push_to_hub_if_best_kwargs
        if options and self.state.global_step % self.args.compare_steps == 0 and mean_score > self.best_score:
            self.best_score = mean_score
            self.push_to_hub(**options)

    # ---- shared by both loops ----

    def plan(self, items: Sequence[Example], count: int) -> list[list[int]]:
        """Group the examples into micro-batches; triplets with the same query become neighbours, for `collate`."""
        groups = super().plan(items, count)
        return [adjacent_by_prompt(items, group) for group in groups] if self._triplets else groups

    def collate(self, items: Sequence[Example]) -> Batch:
        """Collate, after merging neighbouring triplets with the same query, so that it is computed once.

        The samples of `train` are already grouped by their prompt.
        """
        return super().collate(merge_neighbours(items) if self._triplets else items)

    def micro_batches(self, items: Sequence[Example], *, slots: int = 1) -> list[list[Batch]]:
        self._ratios = []
        return super().micro_batches(items, slots=slots)

    def _score_policy_and_reference(self, batch: Batch, wanted: Collection[str]) -> dict[str, Tensor]:
        found = super()._score_policy_and_reference(batch, wanted)
        return found | {"full_kl": self.full_kl(batch)} if self.args.kl_penalty == "full" else found

    def full_kl(self, batch: Batch) -> Tensor:
        """The full KL divergence from the reference `[N,C]`, summed over the vocabulary, at each of the batch's tokens."""
        logits = score_logits(self.model_wrapped, batch)
        with self.reference.as_model(self.model_wrapped) as model:
            divergence = full_kl(logits, score_logits(model, batch))
        return divergence.new_zeros(batch.mask.numel()).index_copy(0, batch.scored, divergence).view_as(batch.mask)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        """The loss of `OnlineTrainer`; also keeps the ratios of the accumulation window's tokens."""
        loss, metrics = super().loss(model, batch)
        if batch.weight is not None and batch.tokens:
            self._ratios.append((metrics["policy/ratio"], batch.mask.bool()))
        return loss, metrics

    def _ratios_of_tokens(self) -> list[Tensor]:
        """Ratios of the trained tokens in the last optimizer step: one vector for each micro-batch."""
        return [ratio[mask] for ratio, mask in self._ratios]

    def _has_left_target(self) -> bool:
        """Whether the policy has moved too far from the old policy for another epoch over the batch.

        The distance is the mean of −log ratio over the tokens of the last optimizer step, on all processes.
        """
        ratios = torch.cat(self._ratios_of_tokens())
        sums = torch.stack([-ratios.log().sum(), ratios.new_tensor(len(ratios))])
        total, tokens = self._gather(sums[None]).sum(0).tolist()
        return total > 1.5 * self.args.target_kl * tokens

    def nonfinite_error(self) -> NonFiniteError:
        if not self._triplets:
            return super().nonfinite_error()
        return NonFiniteError(
            f"The loss or its gradient was not finite in {self.steps.in_a_row} optimizer steps in a row, and "
            f"max_skipped_steps={self.args.max_skipped_steps}. The last of them was on the triplets "
            f"{', '.join(map(str, self._triplets))} of this batch: look at their scores, and at the learning rate. Nothing "
            "was learned from these steps."
        )

    # ---- tracking ----

    def log_stats(
        self,
        stats: Mapping[str, Any],
        batch: Mapping[str, Sequence],
        rewards: Sequence[Tensor | float],
        columns_to_log: Sequence[str] = ("query", "response"),
    ) -> dict[str, Any]:
        """Log the statistics of a step to the trackers, with mean, standard deviation and distribution of `rewards`.

        `batch` holds the texts of the step in `columns_to_log`, which go to a table if the tracker supports tables.
        Returns what was logged.
        """
        found = read_scores(list(rewards), batch_size=len(rewards)).to(self.current_device)
        logs = {**stats, **environment(self._gather(found))}
        step = self.state.global_step
        if self.args.log_with is not None:
            for column in columns_to_log:
                if column not in batch:
                    raise ConfigError(f"columns_to_log names {column!r}, but the batch has {sorted(batch)}.")
            self.accelerator.log(logs, step=step)
            log_table(self.accelerator, batch, columns_to_log, rewards, step)
        self.log({name: value for name, value in logs.items() if isinstance(value, float)})
        return logs
