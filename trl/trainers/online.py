"""Online reinforcement learning: one trainer that takes an algorithm, a rollout engine and reward functions.

    prompt ──engine──▶ completions ──reward functions──▶ rewards ──algorithm.advantages──▶ advantages ──▶ optimizer steps

    trainer = OnlineTrainer(model, reward_funcs=short, args=OnlineConfig(...), train_dataset=prompts, algorithm=Mine())

An algorithm is a class with two methods, `advantages` and `loss`: see `trl.types.Algorithm`. The named trainers (GRPO,
RLOO, …) are this trainer with a configuration that creates their algorithm. `trl.trainers.rollout_trainer` has the rest:
rows, prompts, evaluation logs, checkpoints.

The log-probabilities that the engine returns with its samples serve as those of the old policy, which saves a forward
pass. Where a rollout batch is trained on once, in one step, the ratio is exactly 1.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl.algorithms.advantages import has_no_variance
from trl.algorithms.importance import Correction, mismatch
from trl.errors import ConfigError
from trl.models.patching import evaluating
from trl.models.reference import Reference
from trl.models.score import score
from trl.rollouts.buffer import Minibatch
from trl.rollouts.engine import RolloutEngine
from trl.rollouts.experience import (
    Group,
    completions_of,
    empty_group,
    experience_of,
    split_into_minibatches,
    tables_of,
    with_signals,
    without_signals,
)
from trl.trainers.arguments import EvalRows, OnlineKeywords, Rows
from trl.trainers.attributes import OnlineAttributes
from trl.trainers.entropy_bonus import BonusOfSteps, HasEntropyBonus, count_tokens
from trl.trainers.online_config import AVERAGING, OnlineConfig
from trl.trainers.reference import reference_for, score_signals
from trl.trainers.rollout_trainer import RolloutFunction, RolloutTrainer
from trl.training.collectives import advantages_over_ranks
from trl.training.state import StateFunctions
from trl.types import Algorithm, Batch, Example, Experience, Metrics, Scores


class OnlineTrainer(OnlineAttributes, RolloutTrainer):
    """Base of the online trainers: sample completions of prompts, reward them, learn from them.

    reward_funcs                one or several of: a function `(prompts, completions, **columns) -> rewards`, async or
                                not; a reward model, or the name of one
    train_dataset               rows with `prompt`, a text or a conversation; other columns go to the reward functions
    reward_processing_classes   tokenizers of the reward models
    algorithm                   computes advantages and loss; by default the one that the configuration describes
    engine                      generates completions; by default the policy itself, unless the configuration asks for vLLM
    rollout_func                generates completions in place of the engine: see `trl.rollouts.function`
    reference                   the reference policy, a model or its name; by default the initial policy

    The other arguments are those of `BaseTrainer`.
    """

    ref_model: Any = None

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module | None = None,
        reward_funcs: Any = None,
        args: OnlineConfig | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: EvalRows = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        *,
        algorithm: Algorithm | None = None,
        engine: RolloutEngine | None = None,
        reference: str | nn.Module | None = None,
        rollout_func: RolloutFunction | None = None,
        **keywords: Unpack[OnlineKeywords],
    ) -> None:
        self.algorithm = algorithm
        self._given_reference = reference
        self._has_new_adapter = peft_config is not None
        self.entropy_bonus: BonusOfSteps | None = None
        super().__init__(
            model,
            args,
            None,
            train_dataset,
            eval_dataset,
            processing_class,
            reward_funcs=reward_funcs,
            reward_processing_classes=reward_processing_classes,
            engine=engine,
            rollout_func=rollout_func,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            **keywords,
        )

    # ---- a rollout batch ----

    def roll_out(self) -> list[Minibatch]:
        """Sample completions, reward them and compute advantages; return the minibatches of this rollout batch."""
        groups = self.sample_rollout_batch()
        examples, experience = self.compute_advantages(groups, "train")
        self._log_rollouts(groups, experience, "train")
        if self.args.is_on_policy:
            examples = without_signals(examples, ["old_logprobs"])
        return self.minibatches(examples, groups, experience, self.args.minibatches_per_rollout_batch)

    def sample_rollout_batch(self) -> list[Group]:
        """Sample the groups of a rollout batch.

        With zero_variance="resample", groups whose rewards are all equal are replaced by groups of fresh prompts.
        """
        args, sampler = self.args, self.sampler
        self.engine.sync(self.model_wrapped, self.state.global_step)
        groups = sampler.groups(self.prompts.take(args.prompts_per_rollout_batch), args.num_generations, "train")
        if args.zero_variance != "resample":
            return groups
        for _ in range(args.max_resampling):
            missing = torch.tensor([sum(map(sampler.is_flat, groups))], device=args.device)
            everywhere = self._gather(missing).tolist()
            if not any(everywhere):
                break
            groups += sampler.groups(self.prompts.deal(everywhere), args.num_generations, "train")
            groups.sort(key=sampler.is_flat)
            self._count("resampled_groups", missing.item(), len(groups))
            groups = groups[: args.prompts_per_rollout_batch]
        return groups

    def minibatches(
        self, examples: Sequence[Example], groups: Sequence[Group], experience: Experience, count: int
    ) -> list[Minibatch]:
        """Split the completions of a rollout batch that are trained on (see `kept`) into `count` minibatches."""
        return split_into_minibatches(examples, self.kept(groups, experience), count, self.micro_batch_budget())

    # ---- advantages ----

    def compute_advantages(self, groups: Sequence[Group], mode: str) -> tuple[list[Example], Experience]:
        """The groups as examples with all signals that the loss needs (advantages, old log-probabilities, …), and as tables."""
        examples = [group.example for group in groups]
        local = experience_of(examples, self.sampler.combined(groups))
        signals = {"old_logprobs": local.signals["sampler_logprobs"]}
        if wanted := self._wanted(mode):
            signals |= self.score_rollouts(examples, lambda batch: self._score_policy_and_reference(batch, wanted))
        experience = self.with_advantages(local.with_signals(**signals), mode)
        added = {name: values for name, values in experience.signals.items() if name != "sampler_logprobs"}
        return with_signals(examples, added), experience

    def with_advantages(self, local: Experience, mode: str) -> Experience:
        """This process's experience with its advantages, which the algorithm computes from the experience of all processes.

        In training, `after_round` then updates the algorithm's state; an evaluation leaves it unchanged.
        """
        experience, everywhere = advantages_over_ranks(local, self.algorithm.advantages, self.accelerator)
        if mode == "train":
            self.algorithm, before = self.algorithm.after_round(everywhere), self.algorithm
            if not isinstance(self.algorithm, Algorithm):
                raise ConfigError(
                    f"after_round of {type(before).__name__} returned {self.algorithm!r}: it has to return the algorithm "
                    "to continue with, itself or another."
                )
        return experience

    @torch.no_grad()
    def score_rollouts(
        self, examples: Sequence[Example], numbers: Callable[[Batch], Mapping[str, Tensor]], *, count: int = 1
    ) -> dict[str, Tensor]:
        """Run `numbers(batch)` on the examples in at least `count` micro-batches; return its tensors for all, `[N,C]` by name.

        Dropout is off, as it is while sampling.
        """
        groups = self.plan(examples, count)
        groups += groups[-1:] * (self._most(len(groups)) - len(groups))

        def parts() -> Iterator[tuple[list[int], Mapping[str, Tensor]]]:
            for group in groups:
                batch = self.collate([examples[i] for i in group]).to(self.args.device)
                with self.compute_loss_context_manager(), evaluating(self.model_wrapped):
                    yield group, numbers(batch)

        return tables_of(examples, parts())

    def _wanted(self, mode: str) -> set[str]:
        """Names of the signals that need a forward pass: those that the loss reads and the engine does not return."""
        args, algorithm = self.args, self.algorithm
        given = self.engine.exact_logprobs(args.sampling_params(max_new_tokens=sys.maxsize, seed=0))
        doubted = args.recompute_old_logprobs or algorithm.needs_old_logprobs or not given
        needed = {
            "ref_logprobs": self.reference is not None,
            "old_logprobs": mode == "train" and doubted and not args.is_on_policy,
            "values": algorithm.needs_values,
            "entropy": algorithm.needs_entropy,
        }
        return {name for name, is_needed in needed.items() if is_needed}

    def _score_policy_and_reference(self, batch: Batch, wanted: Collection[str]) -> dict[str, Tensor]:
        """The signals `wanted`, from at most one forward pass of the policy and one of the reference."""
        return score_signals(self.model_wrapped, self.reference, batch, wanted, temperature=self._temperature)

    @property
    def _temperature(self) -> float:
        """Greedy samples (0) are scored at temperature 1."""
        return self.args.temperature or 1.0

    def kept(self, groups: Sequence[Group], experience: Experience) -> list[bool]:
        """Which completions are trained on: not failed ones, nor, by the options, truncated or zero-variance ones."""
        keep = ~torch.cat([group.failed for group in groups])
        if self.args.mask_truncated_completions:
            keep &= torch.cat([group.finished for group in groups])
        if self.args.zero_variance == "drop":
            keep &= ~has_no_variance(experience.rewards, experience.group)
        return keep.tolist()

    # ---- loss ----

    def forward_pass(self, model: nn.Module, batch: Batch) -> Scores:
        return score(model, batch, want={"value"} if self.algorithm.needs_values else ())

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        want = {"entropy", "value"} if self.algorithm.needs_values else {"entropy"}
        scores = score(model, batch, temperature=self._temperature, want=want)
        on_policy = "old_logprobs" not in batch.signals
        if on_policy:
            batch = replace(batch, signals={**batch.signals, "old_logprobs": scores.logprobs.detach()})
        loss, metrics = self.algorithm.loss(scores, batch)
        is_new = on_policy or self.buffer is None or self.buffer.step_begins_batch
        if is_new and "sampler_logprobs" in batch.signals:
            sampler_logprobs = batch.signals["sampler_logprobs"]
            metrics = mismatch(scores.logprobs.detach(), sampler_logprobs, batch.mask, Correction()) | metrics
        loss = loss[:, None].expand_as(batch.mask) if loss.dim() == 1 else loss
        loss = loss * self._length_scale(batch)
        if "bonus_tokens" in batch.signals:
            loss = self.entropy_bonus(loss, scores, batch)
        return loss, of_scored(metrics, batch)

    def _length_scale(self, batch: Batch) -> Tensor | float:
        """Factor that turns the mean over a completion's tokens into their sum ("sum"), or their sum over a constant."""
        if self.args.loss_aggregation not in ("constant", "sum"):
            return 1.0
        lengths = batch.mask.sum(-1, keepdim=True)
        return lengths / self.sampler.completion_limit if self.args.loss_aggregation == "constant" else lengths

    # ---- entropy ----

    def statistics(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """The number of completion tokens in the accumulation window, which an entropy bonus is averaged over."""
        if self.entropy_bonus is None:
            return {}
        return {"bonus_tokens": self._sum_over_processes(count_tokens(completions_of(examples))).float()}

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.entropy_bonus is not None:
            for name, value in self.entropy_bonus.end_step(self._sum_over_processes).items():
                self._count(name, value)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    # ---- evaluation ----

    def prediction_step(self, model: nn.Module, inputs: Any, *_: Any, **__: Any) -> tuple[None, None, None]:
        """Sample completions of a batch of prompts, and add their rewards and loss to the evaluation's metrics."""
        rows, batch = self.evaluated(inputs)
        n = self.num_generations_eval
        self.engine.sync(self.model_wrapped, self.state.global_step)
        groups = self.sampler.groups(rows, n, "eval") or [self._empty_group(batch[0], n)]
        examples, experience = self.compute_advantages(groups, "eval")
        if rows:
            self._log_rollouts(groups, experience, "eval")
        else:
            self.rollout_logs["eval"].add(groups, experience, counted=False)
        examples = without_signals(examples, ["old_logprobs"])
        (kept,) = self.minibatches(examples, groups, experience, 1)
        self.evaluate_items(model, kept, {}, filling=examples[:1])
        return None, None, None

    def _empty_group(self, row: Mapping[str, Any], n: int) -> Group:
        return empty_group(row, *self.to_examples([row]), n, functions=len(self.rewards))

    # ---- algorithm and reference ----

    @property
    def averaging(self) -> str:
        return AVERAGING[self.args.loss_aggregation]

    def prepare_model(self) -> None:
        super().prepare_model()
        state = StateFunctions(lambda: self.algorithm.state_dict(), lambda found: self.algorithm.load_state_dict(found))
        self.states.register("algorithm", state, optional=True)
        self._prepare_algorithm()

    def _prepare_algorithm(self) -> None:
        if self.algorithm is None:
            self.algorithm = self.args.make_algorithm()
        if not isinstance(self.algorithm, Algorithm):
            raise ConfigError(
                f"algorithm is a {type(self.algorithm).__name__}, which lacks attributes that the trainer reads: derive "
                "the class from trl.types.Algorithm, and define its methods advantages and loss."
            )
        if self.algorithm.needs_reference:
            self._compare_with(self._make_reference())
        elif self._given_reference is not None:
            raise ConfigError(
                f"reference was given, but {type(self.algorithm).__name__} uses none (beta=0?): leave it out."
            )
        if isinstance(self.algorithm, HasEntropyBonus) and self.algorithm.entropy_bonus is not None:
            self.entropy_bonus = BonusOfSteps(self.algorithm.entropy_bonus)
            self.states.register("entropy", self.entropy_bonus)

    def _make_reference(self) -> Reference:
        new = self._has_new_adapter
        return reference_for(self.model, self._given_reference, self.args, self.accelerator, has_new_adapter=new)


def of_scored(metrics: Metrics, batch: Batch) -> Metrics:
    """The metrics, with NaN in those `[N]` for completions without a scored token: averages leave NaN out."""
    nothing = batch.mask.amax(-1) == 0
    return {
        name: values.masked_fill(nothing, torch.nan) if values.shape == nothing.shape else values
        for name, values in metrics.items()
    }
