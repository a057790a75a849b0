"""Online DPO: DPO on pairs that the model samples and a reward function or judge ranks (arXiv:2402.04792).

    loss = −log σ(β [h(y⁺) − h(y⁻)]),   h(y) = log π(y|x) − log π_ref(y|x);      see `trl.algorithms.online_dpo`

OnlineDPOTrainer(model="Qwen/Qwen2.5-0.5B-Instruct", reward_funcs=short, train_dataset=prompts).train()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Unpack

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl.algorithms.dpo import DPO, DPOLoss
from trl.algorithms.online_dpo import OnlineDPO
from trl.errors import ConfigError, DataError
from trl.models.score import score
from trl.rollouts.buffer import Minibatch
from trl.rollouts.experience import Group, deal_minibatches
from trl.trainers.arguments import EvalRows, OnlineDPOKeywords, Rows
from trl.trainers.online import OnlineTrainer
from trl.trainers.online_config import OnlineConfig
from trl.types import Batch, Completion, Example, Experience, Metrics

Judge = Callable[[Sequence[Any], Sequence[Sequence[Any]]], Sequence[int]]
"""`judge(prompts, completions)`: returns for each prompt the index of its best completion, or −1 for none."""


@dataclass
class OnlineDPOConfig(OnlineConfig):
    """Options of `OnlineDPOTrainer`. per_device_train_batch_size counts prompts."""

    ALIASES: ClassVar[dict[str, str]] = {
        **OnlineConfig.ALIASES,
        "max_length": "",
    }

    learning_rate: float = 5e-7

    num_generations: int = 2
    """Completions of each prompt; the best and the worst of them form a pair."""

    max_completion_length: int | None = 64

    temperature: float = 0.9

    beta: float | list[float] | str = field(default_factory=lambda: 0.1)  # as HfArgumentParser reads several
    """β: strength of the KL regularisation towards the reference policy. A list gives one value per epoch; the last applies
    to all later epochs."""

    loss_type: DPOLoss = "sigmoid"
    """Loss of a pair, as in `DPOConfig`; "aot" and "aot_unpaired", which compare the pairs of a batch, are not available."""

    loss_aggregation: Literal["sequence"] = "sequence"
    """Always "sequence": every pair has the same weight."""

    disable_dropout: bool = True

    reward_model_path: str | None = None
    """Hub name or folder of a reward model, to use instead of reward_funcs or a judge."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse("recompute_old_logprobs")
        if self.num_generations < 2:
            raise ConfigError(f"num_generations={self.num_generations}: a pair needs at least 2 completions.")
        if self.beta == []:
            raise ConfigError("beta is an empty list: give a number, or one for each epoch.")
        self.make_algorithm()

    def make_algorithm(self) -> OnlineDPO:
        """The algorithm that these options describe."""
        dpo = DPO(beta=self.beta_in(0), loss_types=self.loss_type)
        if dpo.needs_full_batch:
            raise ConfigError(f"loss_type={self.loss_type!r} compares the pairs of a batch: choose another.")
        return OnlineDPO(dpo)

    def beta_in(self, epoch: float) -> float:
        """`beta` in this epoch."""
        betas = self.beta if isinstance(self.beta, list) else [self.beta]
        return betas[min(int(epoch), len(betas) - 1)]

    @property
    def prompts_per_rollout_batch(self) -> int:
        """Prompts of a rollout batch, on each process."""
        return self.per_device_train_batch_size * self.minibatches_per_rollout_batch

    def check_batches(self) -> None:
        """Nothing to check: batch sizes count prompts, so groups are always whole."""


class OnlineDPOTrainer(OnlineTrainer):
    """Sample completions, rank them, and train with DPO on the best and the worst of each prompt.

    judge       instead of reward functions: `judge(prompts, completions)` returns the index of each prompt's best
                completion, or −1 for none
    ref_model   another name of `reference`

    The other arguments are those of `OnlineTrainer`.
    """

    config_class = OnlineDPOConfig
    args: OnlineDPOConfig

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module | None = None,
        reward_funcs: Any = None,
        args: OnlineDPOConfig | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: EvalRows = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        *,
        judge: Judge | None = None,
        ref_model: str | nn.Module | None = None,
        **keywords: Unpack[OnlineDPOKeywords],
    ) -> None:
        if judge is not None:
            if reward_funcs is not None:
                raise ConfigError("judge and reward_funcs both rank completions: give one of them.")
            if not callable(judge):
                raise ConfigError(f"judge is a {type(judge).__name__}: give a function, judge(prompts, completions).")
            reward_funcs = JudgeReward(judge)
        if ref_model is not None:
            if keywords.get("reference") is not None:
                raise ConfigError("ref_model and reference are two names of one argument: give one of them.")
            keywords["reference"] = ref_model
        super().__init__(
            model,
            reward_funcs,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            reward_processing_classes,
            **keywords,
        )

    def _given_rewards(self) -> Any:
        if self._reward_funcs is not None and self.args.reward_model_path is not None:
            raise ConfigError(
                f"reward_model_path={self.args.reward_model_path!r} and reward_funcs (or judge) both rank completions: give one "
                "of them."
            )
        return self.args.reward_model_path if self._reward_funcs is None else self._reward_funcs

    @property
    def beta(self) -> float:
        """β of the current epoch."""
        return self.args.beta_in(self.state.epoch or 0)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[list[Batch]], int]:
        if isinstance(self.args.beta, list):
            self.algorithm = replace(self.algorithm, dpo=replace(self.algorithm.dpo, beta=self.beta))
        return super().get_batch_samples(*args, **kwargs)

    def minibatches(
        self, examples: Sequence[Example], groups: Sequence[Group], experience: Experience, count: int
    ) -> list[Minibatch]:
        """The pairs of a rollout batch."""
        keep = iter(self.kept(groups, experience))
        pairs = []
        for example in examples:
            known = [c for c in example.completions if next(keep)]
            pair = tuple(c for sign in (1, -1) for c in known if c.signals["preferred"] == sign)
            pairs += [replace(example, completions=pair)] if len(pair) == 2 else []
        return deal_minibatches(pairs, _first_two(examples[0]), count)

    def _log_rollouts(self, groups: Sequence[Group], experience: Experience, mode: str) -> None:
        super()._log_rollouts(groups, experience, mode)
        self._count("pairs", (experience.signals["preferred"] > 0).sum().item(), len(groups), mode)

    def weights(self, batch: Batch) -> Tensor:
        """Weight 1 for every pair, `[P]`; 0 for those that are masked out."""
        return batch.mask.amax(-1)[0::2]

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        scores = score(model, batch, temperature=self._temperature, want={"entropy"})
        loss, metrics = self.algorithm.loss(scores, batch)
        nothing = self.weights(batch) == 0
        metrics = {name: values.masked_fill(nothing, torch.nan) for name, values in metrics.items()}
        return loss, {**metrics, "entropy": scores.entropy}


def _first_two(example: Example) -> Example:
    first: tuple[Completion, ...] = example.completions[:2]
    return replace(example, completions=first)


class JudgeReward:
    """A judge as a reward function: 1 for the best completion of a prompt, 0 for its others."""

    __name__ = "judge"

    def __init__(self, judge: Judge) -> None:
        self.judge = judge

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float | None]:
        starts = [i for i in range(len(prompts)) if i == 0 or prompts[i] is not prompts[i - 1]]
        ends = [*starts[1:], len(prompts)]
        groups = [list(completions[a:b]) for a, b in zip(starts, ends, strict=True)]
        best = self.judge([prompts[i] for i in starts], groups)
        if len(best) != len(groups):
            raise DataError(
                f"judge returned {len(best)} verdicts for {len(groups)} prompts: it has to return one each."
            )
        for winner, group in zip(best, groups, strict=True):
            if winner not in range(-1, len(group)):
                raise DataError(
                    f"judge returned {winner!r} for a prompt with {len(group)} completions: it has to return the index of the "
                    f"best one, 0 to {len(group) - 1}, or -1 for none."
                )
        return [
            None if winner < 0 else float(i == winner)
            for winner, group in zip(best, groups, strict=True)
            for i in range(len(group))
        ]
