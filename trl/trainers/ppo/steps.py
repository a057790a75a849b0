"""PPO a batch of triplets at a time: what `PPOTrainer` does for those who sample and score by themselves.

    trainer.generate(queries) ──▶ responses ──anything──▶ scores ──▶ trainer.step(queries, responses, scores)

The triplets go the road of all trainers: examples, laid out, scored by policy and reference, given credit, and learned from
in windows whose weights sum to 1, so that how a step was split into mini-batches does not matter.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from math import ceil, inf
from typing import Any

import torch
from accelerate.tracking import filter_trackers
from accelerate.utils import ProjectConfiguration
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from trl.algorithms.moments import RunningMoments
from trl.algorithms.ppo import PPO, full_kl
from trl.errors import ConfigError
from trl.models.patching import evaluating
from trl.models.reference import Reference, score_with_reference
from trl.models.score import score, score_logits, unwrap
from trl.ops.reduce import masked_mean
from trl.rollouts.engine import RolloutEngine
from trl.trainers.online import OnlineTrainer
from trl.trainers.ppo.generate import prompts_of, sample, sampling_params, untrimmed
from trl.trainers.ppo.statistics import (
    Record,
    Stopwatch,
    distributions,
    environment,
    mean_over_processes,
    rollout_means,
    token_counts,
    training_means,
)
from trl.trainers.ppo.triplets import (
    Triplet,
    group_by_query,
    group_numbers,
    put_rows,
    read_scores,
    read_triplets,
    with_rows,
)
from trl.training.nonfinite import accept_triplet_step, propagate_nonfinite
from trl.training.parallel import accumulating, backward
from trl.training.window import dummy_batch, normalize_weights, plan_micro_batches
from trl.types import Batch, Experience

LOWEST_KL = -1.0
"""Mean KL of a batch below which its responses cannot well have been sampled from the policy as it is."""


class TripletSteps(OnlineTrainer):
    """`generate`, `step` and `log_stats`."""

    algorithm: PPO
    engine: RolloutEngine
    reference: Reference

    def prepare_steps(self, dataset: Dataset | None, data_collator: Callable | None) -> None:
        """What steps need beside the model: their loader, optimizer, trackers, and running numbers."""
        self.policy: nn.Module | None = None
        self.moments = RunningMoments()
        self.best_score = float("-inf")
        self.dataset, self.dataloader = dataset, self._make_loader(dataset, data_collator)
        self._start_trackers()

    def _make_loader(self, dataset: Dataset | None, data_collator: Callable | None) -> Any:
        if dataset is None:
            return None
        size = self.args.batch_size
        loader = DataLoader(dataset, batch_size=size, collate_fn=data_collator, shuffle=True, drop_last=True)
        return self.accelerator.prepare_data_loader(loader)

    # ---- rollout ----

    @torch.no_grad()
    def generate(
        self,
        query_tensor: Tensor | Sequence[Tensor],
        length_sampler: Callable[[], int] | None = None,
        batch_size: int | None = None,
        return_prompt: bool = True,
        generate_ref_response: bool = False,
        **generation_kwargs: Any,
    ) -> Any:
        """Sample a response to every query, as `model.generate` would with these options.

        A list of 1-D queries gives a list of 1-D tensors, each cut after its first end-of-sequence token; a 1-D query
        gives `[1,L]`. Responses begin with their query unless `return_prompt` is false, or with the decoder's start
        token in an encoder-decoder. `length_sampler` draws each one's new tokens. `batch_size` bounds how many are
        sampled at a time (None: as many as fit). With `generate_ref_response` a pair: of the model and the reference.
        """
        queries = [query_tensor] if isinstance(query_tensor, Tensor) else list(query_tensor)
        inner = unwrap(self.model)
        prompts = prompts_of(queries, length_sampler)
        params = sampling_params(inner.generation_config, generation_kwargs, sampled_length=length_sampler is not None)

        def respond(model: nn.Module) -> Any:
            with self.compute_loss_context_manager():
                responses = sample(self.engine, model, prompts, params, batch_size)
            if isinstance(query_tensor, Sequence):
                responses = [untrimmed(ids, self.tokenizer.eos_token_id) for ids in responses]
            starts = self._starts(queries, return_prompt)
            found = [
                torch.tensor([*start, *ids], device=self.current_device)
                for start, ids in zip(starts, responses, strict=True)
            ]
            return found[0][None] if isinstance(query_tensor, Tensor) else found

        responses = respond(self.model_wrapped)
        if not generate_ref_response:
            return responses
        with self.reference.as_model(self.model_wrapped) as reference:
            return responses, respond(reference)

    def _starts(self, queries: Sequence[Tensor], return_prompt: bool) -> list[list[int]]:
        """What each returned sequence begins with."""
        config = unwrap(self.model).config
        if config.is_encoder_decoder:
            return [[config.decoder_start_token_id]] * len(queries)
        return [query.tolist() if return_prompt else [] for query in queries]

    # ---- optimisation ----

    def step(
        self,
        queries: Sequence[Tensor],
        responses: Sequence[Tensor],
        scores: Sequence[Tensor | float],
        response_masks: Sequence[Tensor] | None = None,
    ) -> dict[str, Any]:
        """Learn from `batch_size` triplets; gives statistics: floats, and arrays of distributions.

        queries, responses   token ids, `[L]` or `[1,L]`
        scores               one number each: higher is better
        response_masks       1 for the response tokens that the model is responsible for; all of them by default

        Raises DataError, naming the argument and the index, for triplets that cannot be trained on.
        """
        watch, size = Stopwatch(), self.args.batch_size
        triplets = read_triplets(queries, responses, response_masks, batch_size=size, start_token=self._start_token())
        shaped = self._shape(read_scores(scores, batch_size=size))
        self._prepare()
        with self._without_dropout():
            experience = self._score_triplets(triplets, shaped)
            watch.lap("forward_pass")
            coefficient = self.algorithm.controller.coefficient
            experience = self.algorithm.with_token_rewards(experience)
            watch.lap("compute_rewards")
            experience = self._step_advantages(experience)
            watch.lap("compute_advantages")
            record = self._optimize(triplets, experience)
            watch.lap("optimize_step")
        statistics = self._report(triplets, experience, shaped, coefficient, record)
        watch.lap("calc_stats")
        self._finish(statistics)
        return {**statistics, **watch.total()}

    def _step_advantages(self, experience: Experience) -> Experience:
        """Credit as the algorithm gives it to the batches of all processes together."""
        found = super()._with_advantages(experience).signals
        return experience.with_signals(**{name: values.to(self.current_device) for name, values in found.items()})

    def _start_token(self) -> int | None:
        config = unwrap(self.model).config
        return config.decoder_start_token_id if config.is_encoder_decoder else None

    def _shape(self, scores: Tensor) -> Tensor:
        """Scores as they are learned from: scaled and clipped, where asked for."""
        scores = scores.to(self.current_device)
        if self.args.use_score_scaling:
            self.moments = self.moments.updated(self._gather(scores))
            scores = self.moments.scaled(scores, centred=self.args.use_score_norm)
        clip = self.args.score_clip
        return scores if clip is None else scores.clamp(-clip, clip)

    def _prepare(self) -> None:
        """Wrap model and optimizer for the devices, once."""
        if self.policy is not None:
            return
        if self.args.gradient_checkpointing:
            options = {"use_reentrant": False, **(self.args.activation_checkpointing_kwargs or {})}
            self.model.activation_checkpointing_enable(options)
        if self.optimizer is None:
            self.optimizer = torch.optim.Adam(self._trained(), lr=self.args.learning_rate)
        if self.is_deepspeed_enabled:  # which clips by itself
            self.accelerator.deepspeed_plugin.deepspeed_config["gradient_clipping"] = self.args.max_grad_norm or 0.0
        self.policy, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.model_wrapped = self.policy
        self.deepspeed = self.policy if self.is_deepspeed_enabled else None  # what `save_model` asks

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @contextmanager
    def _without_dropout(self) -> Iterator[None]:
        """Evaluation mode; with gradient checkpointing, which that would switch off, training without dropout."""
        if self.args.gradient_checkpointing:
            self.model.train()
            yield
        else:
            with evaluating(self.model):
                yield

    def _micro_batch(self, triplets: Sequence[Triplet], rows: Sequence[int]) -> tuple[Batch, list[int]]:
        examples, order = group_by_query(triplets, rows)
        return self.lay_out(examples), order

    def _mini_batches(self, triplets: Sequence[Triplet], rows: Sequence[int]) -> list[list[int]]:
        """The rows in mini-batches of like lengths."""
        groups = plan_micro_batches(
            [triplets[row].tokens for row in rows],
            count=ceil(len(rows) / self.args.mini_batch_size),
            token_budget=self.token_budget(),
        )
        return [[rows[i] for i in group] for group in groups]

    def _score_triplets(self, triplets: Sequence[Triplet], scores: Tensor) -> Experience:
        """What policy and reference find of the batch, before anything is learned from it."""
        shape = (len(triplets), max(len(triplet.response) for triplet in triplets))
        tables: dict[str, Tensor] = {}
        parts = self._mini_batches(triplets, range(len(triplets)))
        for rows in parts + parts[-1:] * (self._most(len(parts)) - len(parts)):
            batch, order = self._micro_batch(triplets, rows)
            for name, values in self._seen(batch.to(self.current_device)).items():
                put_rows(tables.setdefault(name, values.new_zeros(shape)), values, order)
        mask = tables.pop("mask")
        return Experience(rewards=scores, group=group_numbers(triplets), mask=mask, signals=tables)

    @torch.no_grad()
    def _seen(self, batch: Batch) -> dict[str, Tensor]:
        found, reference = score_with_reference(self.policy, self.reference, batch, want={"value"})
        seen = {"mask": batch.mask, "old_logprobs": found.logprobs, "values": found.value, "ref_logprobs": reference}
        if self.args.kl_penalty == "full":
            seen["full_kl"] = self.full_kl(self.policy, batch)
        return seen

    def full_kl(self, policy: nn.Module, batch: Batch) -> Tensor:
        """Divergence from the reference `[N,C]` of the distributions that predict the batch's tokens."""
        logits = score_logits(policy, batch)
        with self.reference.as_model(policy) as model:
            divergence = full_kl(logits, score_logits(model, batch))
        return divergence.new_zeros(batch.mask.numel()).index_copy(0, batch.scored, divergence).view_as(batch.mask)

    def _optimize(self, triplets: Sequence[Triplet], experience: Experience) -> Record:
        """Epochs of optimizer steps over random permutations of the batch."""
        record, args = Record(), self.args
        for _ in range(args.ppo_epochs):
            order = torch.randperm(len(triplets)).tolist()
            for start in range(0, len(order), args.backward_batch_size):
                policykl = self._optimizer_step(triplets, experience, order[start:][: args.backward_batch_size], record)
            if args.early_stopping and self.has_moved(policykl):
                break
        return record

    def has_moved(self, policykl: Tensor) -> bool:
        """Whether the policy has moved too far from the one that sampled to go through the batch once more.

        policykl   this process's part of the mean of −log ratio over the tokens of the last optimizer step
        """
        return bool(self._gather(policykl.detach()[None]).sum() > 1.5 * self.args.target_kl)

    def _optimizer_step(
        self, triplets: Sequence[Triplet], experience: Experience, rows: Sequence[int], record: Record
    ) -> Tensor:
        """One step on the triplets `rows`; gives this process's part of the mean KL that the policy had moved by."""
        laid_out = [self._micro_batch(triplets, part) for part in self._mini_batches(triplets, rows)]
        batches, _ = normalize_weights([batch for batch, _ in laid_out], self.weights, self._sum_over_processes)
        missing = self._most(len(batches)) - len(batches)
        batches += [dummy_batch(batches[-1])] * missing
        laid_out += laid_out[-1:] * missing
        policykl = torch.zeros((), device=self.current_device)
        for i, (batch, (_, order)) in enumerate(zip(batches, laid_out, strict=True)):
            batch = with_rows(batch.to(self.current_device), experience.signals, order)
            last = i == len(batches) - 1
            with nullcontext() if last else accumulating(self.accelerator, self.policy):
                policykl += self._backward(batch, record)
        norm = self.accelerator.clip_grad_norm_(self.policy.parameters(), self.args.max_grad_norm or inf)
        if accept_triplet_step(self, norm, rows):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return policykl

    def _backward(self, batch: Batch, record: Record) -> Tensor:
        """Gradients of a mini-batch; none if the policy has moved too far on it."""
        scores = score(self.policy, batch, want={"value", "entropy"})
        loss, metrics = self.algorithm.loss(scores, batch)
        kept = masked_mean(metrics["policy/ratio"], batch.mask) <= self.args.ratio_threshold
        if batch.tokens:
            record.add(metrics, batch, kept)
        total = (loss * batch.weight).sum() * kept * self.accelerator.num_processes
        backward(self.accelerator, propagate_nonfinite(total))
        return (metrics["policy/policykl"] * batch.weight).sum()

    # ---- after a step ----

    def _report(
        self, triplets: Sequence[Triplet], experience: Experience, scores: Tensor, coefficient: float, record: Record
    ) -> dict[str, Any]:
        means = mean_over_processes(rollout_means(experience, scores, coefficient), self._gather)
        trained = record.read(self._gather, self.current_device, threshold=self.args.ratio_threshold)
        return {
            **means,
            **training_means(trained, means["ppo/returns/var"]),
            **distributions(experience, record.ratios),
            **token_counts(triplets),
            "objective/kl_coef": coefficient,
            "ppo/learning_rate": self.optimizer.param_groups[0]["lr"],
            **({"ppo/skipped_steps": self.steps.skipped} if self.steps.skipped else {}),
        }

    def _finish(self, statistics: Mapping[str, Any]) -> None:
        """Adapt the KL coefficient, step the schedule, count the step."""
        kl, samples = statistics["objective/kl"], self.args.batch_size * self.accelerator.num_processes
        if kl < LOWEST_KL:
            warnings.warn(
                f"The mean KL of this batch is {kl:.2f}. From responses that the policy sampled it is positive on "
                "average: sample with top_k=0, top_p=1.0, temperature 1 and min_length=-1, and from the current weights.",
                stacklevel=3,
            )
        self.algorithm = self.algorithm.after(kl, samples)
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        self.state.global_step += 1
        if self.args.optimize_device_cache and torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._push_if_best(statistics["ppo/mean_scores"])

    def _push_if_best(self, mean_score: float) -> None:
        options = self.args.push_to_hub_if_best_kwargs
        if options and self.state.global_step % self.args.compare_steps == 0 and mean_score > self.best_score:
            self.best_score = mean_score
            self.push_to_hub(**options)

    # ---- tracking ----

    def _start_trackers(self) -> None:
        if self.args.log_with is None:
            return
        self.accelerator.project_configuration = ProjectConfiguration(
            **{"project_dir": self.args.output_dir, **self.args.project_kwargs}
        )
        self.accelerator.log_with = filter_trackers(self.args.log_with, self.accelerator.logging_dir)
        if not self.accelerator.log_with and self.args.log_with != "all":
            raise ConfigError(
                f"log_with={self.args.log_with!r}, but that tracker is not installed: install it, or leave log_with out."
            )
        options = {k: v for k, v in self.args.to_dict().items() if isinstance(v, bool | int | float | str)}
        self.accelerator.init_trackers(
            self.args.tracker_project_name, config=options, init_kwargs=self.args.tracker_kwargs
        )

    def log_stats(
        self,
        stats: Mapping[str, Any],
        batch: Mapping[str, Sequence],
        rewards: Sequence[Tensor | float],
        columns_to_log: Sequence[str] = ("query", "response"),
    ) -> dict[str, Any]:
        """Send the statistics of a step to the trackers, with mean, spread and distribution of `rewards`.

        `batch` holds the texts of the step in `columns_to_log`, which go to a table where the tracker has them. Gives
        what was sent.
        """
        logs = {
            **stats,
            **environment(self._gather(read_scores(list(rewards), batch_size=len(rewards)).to(self.current_device))),
        }
        for column in columns_to_log:
            if column not in batch:
                raise ConfigError(f"columns_to_log names {column!r}, but the batch has {sorted(batch)}.")
        step = self.state.global_step
        if self.args.log_with is not None:
            self.accelerator.log(logs, step=step)
        self.log({name: value for name, value in logs.items() if isinstance(value, float)})
        for tracker in self.accelerator.trackers:
            if tracker.name == "wandb":
                columns = [*(batch[column] for column in columns_to_log), [float(reward) for reward in rewards]]
                rows = [list(row) for row in zip(*columns, strict=True)]
                tracker.log_table("game_log", columns=[*columns_to_log, "reward"], data=rows, step=step)
        return logs
