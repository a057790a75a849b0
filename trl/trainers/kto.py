"""Learning from single completions that are labelled good or bad: KTO, APO-zero, BCO.

    loss = λ (1 − σ(β s [h(y) − z₀])),   h(y) = log π(y|x) − log π_ref(y|x),   s = ±1;   see `trl.algorithms.kto`

z₀ and BCO's δ are statistics of the whole accumulation window, over all processes; they are computed before the window
is trained on, so that the loss does not depend on how it is split.

KTOTrainer(model=model, tokenizer=tokenizer, train_dataset=dataset).train()
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn

from trl.algorithms.kto import KTO, KTOOptions, RewardShift, kl_estimate, recommended_weights, with_margin
from trl.algorithms.pairs import by_preference
from trl.counts import counted
from trl.data.examples import columns_of
from trl.data.formats import maybe_extract_prompt, maybe_unpair_preference_dataset
from trl.data.places import renumbering_rows
from trl.errors import ConfigError
from trl.models.patching import evaluating
from trl.models.score import score
from trl.trainers.arguments import Rows
from trl.trainers.preference import PreferenceConfig, PreferenceTrainer
from trl.training.state import StateFunctions
from trl.training.window import plan_micro_batches
from trl.types import Batch, Completion, Example, Metrics

logger = logging.getLogger(__name__)


@dataclass
class KTOConfig(KTOOptions, PreferenceConfig):
    """Options of `KTOTrainer`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rows = self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size
        if self.make_algorithm().needs_signal == "kl" and rows < 2:
            raise ConfigError(
                "loss_type='kto' estimates a KL divergence by pairing prompts with completions of other rows, but a step "
                "has only one row: set per_device_train_batch_size or gradient_accumulation_steps to 2 or more."
            )

    def make_algorithm(self) -> KTO:
        """The loss that these options describe. Raises ConfigError for those that are out of range."""
        return KTO(**{name: getattr(self, name) for name in KTO.__dataclass_fields__})


class KTOTrainer(PreferenceTrainer):
    """Train a causal or encoder-decoder language model on completions labelled desirable or not.

    Rows have `prompt`, `completion` and `label` (true or false); pairs (`chosen`, `rejected`) become two rows each.
    Arguments: see `BaseTrainer` and `PreferenceTrainer`.
    """

    config_class = KTOConfig
    args: KTOConfig
    kinds: ClassVar[Sequence[str]] = ("unpaired_preference",)
    keep_columns: ClassVar[tuple[str, ...]] = ("label",)

    @cached_property
    def algorithm(self) -> KTO:
        return self.args.make_algorithm()

    @property
    def needs_online_reference(self) -> bool:
        return self.algorithm.needs_signal == "kl"

    def encode(self, rows: Rows, split: str, name: str) -> Rows:
        pairs = len(rows) if isinstance(rows, Dataset) and is_paired(rows) else None
        with renumbering_rows(pairs, maybe_unpair_preference_dataset, "completion"):
            encoded = super().encode(unpaired(rows), split, name)
        if split == "train" and isinstance(encoded, Dataset):
            self._check_labels(np.asarray(encoded["label"][:], dtype=bool))
        return encoded

    def _check_labels(self, labels: np.ndarray) -> None:
        """Warn if one of the two labels is missing, or much rarer than the other."""
        desirable, undesirable = int(labels.sum()), int((~labels).sum())
        if not desirable or not undesirable:
            other = "Add rows with the other label" + (", or train on these with `trl sft`." if desirable else ".")
            logger.warning(
                f"Of {counted(len(labels), 'completion')}, all have the label {bool(desirable)}: KTO learns from the contrast of "
                f"desirable and undesirable completions. {other}"
            )
        elif self.algorithm.needs_signal == "kl":
            self._recommend_weights(desirable, undesirable)

    def _recommend_weights(self, desirable: int, undesirable: int) -> None:
        given = {"desirable_weight": self.args.desirable_weight, "undesirable_weight": self.args.undesirable_weight}
        ranges = recommended_weights(desirable, undesirable, **given)
        if not ranges.met:
            logger.warning(
                f"{desirable:,} completions are desirable and {undesirable:,} are not. With the weights "
                f"{given['desirable_weight']:g} and {given['undesirable_weight']:g} their total weights are {ranges.ratio:.2f} to 1, "
                f"where the paper (arXiv:2402.01306) recommends 1 to 1.33. Set desirable_weight between "
                f"{ranges.desirable[0]:.2f} and {ranges.desirable[1]:.2f}, or undesirable_weight between "
                f"{ranges.undesirable[0]:.2f} and {ranges.undesirable[1]:.2f}."
            )

    # ---- loss ----

    def weights(self, batch: Batch) -> Tensor:
        """Weight 1 for every completion (before λ), `[N]`."""
        return batch.mask.new_ones(len(batch.mask))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        batch = self.with_reference(model, batch)
        scores = score(model, batch, want={"entropy", "mean_logit"})
        loss, metrics = self.algorithm.loss(scores, batch)
        desirable = batch.signals["label"] > 0.5
        if self.algorithm.needs_signal == "delta" and model.training and batch.tokens:
            self._count_rewards(metrics, desirable)
        return loss, {**metrics, **by_preference("logits", scores.mean_logit, desirable), "entropy": scores.entropy}

    def statistics(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """z₀ or δ, over all processes."""
        if self.algorithm.needs_signal == "kl":
            circle = keyed(examples)
            if self.accelerator.num_processes > 1:
                circle = gather_object(circle)
            return {
                "kl": self._divergence(mismatched(examples, circle), filling=[with_nothing(p) for _, p in circle[:1]])
            }
        if self.algorithm.needs_signal == "delta":
            return {"delta": self._shift().delta.float()}
        return {}

    @torch.no_grad()
    def _divergence(self, examples: Sequence[Example], *, filling: Sequence[Example]) -> Tensor:
        """z₀ from prompts with completions of other prompts, averaged over all processes.

        A process with fewer micro-batches than another runs `filling`, uncounted, so that all make as many forward passes.
        """
        args = self.args
        count = max(1, len(examples) // args.per_device_train_batch_size)
        sizes = [example.tokens for example in examples]
        total = torch.zeros(2, device=args.device)
        groups = plan_micro_batches(sizes, count=count, token_budget=self.micro_batch_budget())
        with evaluating(self.model_wrapped), self.compute_loss_context_manager():
            for k in range(self._most(len(groups))):
                items = [examples[i] for i in groups[k]] if k < len(groups) else filling
                logratio = self._logratio(self.collate(items).to(args.device))
                if k < len(groups):
                    total += torch.stack([logratio.sum(), logratio.new_tensor(len(logratio))])
        summed, number = self._gather(total[None]).sum(0)
        return kl_estimate((summed / number.clamp(min=1))[None])

    def _logratio(self, batch: Batch) -> Tensor:
        """h `[N]`, without gradient."""
        reference = self.reference.logprobs(self.model_wrapped, batch)
        return (score(self.model_wrapped, batch).logprobs - reference).sum(-1)

    # ---- BCO's shift: rewards of all steps before this one ----

    @cached_property
    def _totals(self) -> dict[str, RewardShift]:
        """Sums over rewards: `all` seen so far, and `new` ones of this process since the processes last added theirs up."""
        return {"all": RewardShift.start(self.args.device), "new": RewardShift.start(self.args.device)}

    def _count_rewards(self, metrics: Metrics, desirable: Tensor) -> None:
        rewards = torch.where(desirable, metrics["rewards/chosen"], metrics["rewards/rejected"])
        self._totals["new"] = self._totals["new"].update(rewards, desirable)

    def _shift(self) -> RewardShift:
        """Add the new rewards of all processes to the totals, and return the totals."""
        new = torch.stack(astuple(self._totals["new"]))
        total = torch.stack(astuple(self._totals["all"])) + self._gather(new[None]).sum(0)
        self._totals |= {"all": RewardShift(*total.unbind()), "new": RewardShift.start(self.args.device)}
        return self._totals["all"]

    def prepare_model(self) -> None:
        super().prepare_model()
        if self.algorithm.needs_signal == "delta":
            self.states.register("reward_shift", StateFunctions(lambda: asdict(self._shift()), self._load_shift))

    def _load_shift(self, state: Mapping[str, Tensor]) -> None:
        self._totals["all"] = RewardShift(**{name: value.to(self.args.device) for name, value in state.items()})

    def rollback_metrics(self) -> None:
        super().rollback_metrics()
        self._totals["new"] = RewardShift.start(self.args.device)

    # ---- what is reported ----

    def _train_metrics(self) -> dict[str, float]:
        return with_margin(super()._train_metrics())

    def _eval_metrics(self, prefix: str) -> dict[str, float]:
        return with_margin(super()._eval_metrics(prefix))


@dataclass
class BCOConfig(KTOConfig):
    """Options of `BCOTrainer`: those of `KTOTrainer`."""

    loss_type: Literal["bco"] = "bco"
    """Always "bco"."""


class BCOTrainer(KTOTrainer):
    """`KTOTrainer` with the loss of a binary classifier. BCO, arXiv:2404.04656."""

    config_class = BCOConfig
    args: BCOConfig


def unpaired(rows: Rows) -> Rows:
    """Rows with one labelled completion each; pairs become two rows, after their common prompt is extracted."""
    return maybe_unpair_preference_dataset(rows.map(maybe_extract_prompt)) if is_paired(rows) else rows


def is_paired(rows: Rows) -> bool:
    """Whether rows are pairs of completions."""
    return {"chosen", "rejected"} <= set(columns_of(rows))


Keyed = tuple[bytes, Example]
"""An example's digest, and its prompt without completions."""


def mismatched(examples: Sequence[Example], circle: Sequence[Keyed] | None = None) -> list[Example]:
    """Pair every completion with another example's prompt, (x_i, y_j), j ≠ i, if possible with a different one.

    `circle` are the examples to take prompts from, by default `examples`. They are sorted by digest, so the choice does not
    depend on their order. Empty if there is no other example. KTO, arXiv:2402.01306, Section 4.
    """
    circle = sorted(keyed(examples) if circle is None else circle, key=lambda entry: entry[0])
    if len(circle) < 2:
        return []
    places = {key: i for i, (key, _) in enumerate(circle)}
    return [replace(_other_prompt(circle, places[digest(e)]), completions=_bare(e.completions)) for e in examples]


def with_nothing(prompt: Example) -> Example:
    """The prompt with one masked token as completion, which nothing is computed from."""
    return replace(prompt, completions=(Completion([0], mask=[0]),))


def _bare(completions: Sequence[Completion]) -> tuple[Completion, ...]:
    """Completions without their signals, which were computed with their own prompt."""
    return tuple(replace(completion, signals={}) for completion in completions)


def _other_prompt(circle: Sequence[Keyed], i: int) -> Example:
    """The next prompt after place i that differs from the one there, going round the circle."""
    others = [prompt for _, prompt in [*circle[i + 1 :], *circle[:i]]]
    mine = circle[i][1].key
    return next((prompt for prompt in others if prompt.key != mine), others[0])


def keyed(examples: Sequence[Example]) -> list[Keyed]:
    return [(digest(example), replace(example, prompt=list(example.prompt), completions=())) for example in examples]


def digest(example: Example) -> bytes:
    """A hash of an example's tokens and other inputs."""
    _, *others = example.key if example.inputs else (None,)
    ids = [*example.prompt, -1, *example.completions[0].ids]
    tokens = np.asarray(ids, dtype=np.int64).tobytes()
    return hashlib.blake2b(b"".join([tokens, *others]), digest_size=8).digest()
