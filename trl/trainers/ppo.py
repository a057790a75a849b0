"""Proximal policy optimisation from (query, response, score) triplets.

    rollout        the model continues a query
    evaluation     anything (a function, a model, a person) gives one number per query and response
    optimisation   `step`: credit per token, and several epochs of clipped losses; see `trl.algorithms.ppo`

trainer = PPOTrainer(config, model, ref_model, tokenizer)
statistics = trainer.step([query], [response], [score])
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from math import ceil
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import filter_trackers
from accelerate.utils import ProjectConfiguration
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import AutoConfig, PreTrainedModel

from trl.algorithms.moments import RunningMoments
from trl.algorithms.ppo import full_kl
from trl.data.encode import EncodeSettings
from trl.errors import ConfigError
from trl.models.heads import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    WithValueHead,
    with_value_head,
)
from trl.models.load import with_adapters
from trl.models.reference import (
    EarlierWeights,
    FrozenModel,
    Reference,
    create_reference_model,
    evaluating,
    make_reference,
)
from trl.models.score import prepare_scoring, score, score_logits, unwrap
from trl.models.standin import standing_in
from trl.ops.reduce import masked_mean
from trl.rollouts.local import LocalEngine
from trl.trainers.base import BaseTrainer
from trl.trainers.ppo_config import PPOConfig
from trl.trainers.ppo_generate import prompts_of, sample, sampling_params, untrimmed
from trl.trainers.ppo_statistics import (
    Record,
    Stopwatch,
    distributions,
    environment,
    mean_over_processes,
    rollout_means,
    token_counts,
    training_means,
)
from trl.trainers.triplets import (
    Triplet,
    group_by_query,
    group_numbers,
    put_rows,
    read_scores,
    read_triplets,
    with_rows,
)
from trl.trainers.window import plan_micro_batches, weigh
from trl.types import Batch, Experience

__all__ = ["PPOConfig", "PPOTrainer"]

logger = logging.getLogger(__name__)

LOWEST_KL = -1.0
"""Mean KL of a batch below which its responses cannot well have been sampled from the policy as it is."""


class PPOTrainer(BaseTrainer):
    """Train a language model by PPO, a batch of triplets at a time.

    config             a `PPOConfig`
    model              a model with a value head, or any language model, or its name: a head is put on
    ref_model          the policy to stay near. None: the model as it is now (with a new adapter: without it)
    tokenizer          for reading end-of-sequence and padding tokens; neither has to exist
    dataset            rows for `dataloader`, which gives shuffled batches of `batch_size`, collated by `data_collator`
    optimizer          Adam by default; `lr_scheduler` is stepped once per `step`
    num_shared_layers  layers that policy and reference have in common, frozen
    """

    config_class = PPOConfig
    branches = True

    def __init__(
        self,
        config: PPOConfig | None = None,
        model: str | PreTrainedModel | WithValueHead | nn.Module | None = None,
        ref_model: nn.Module | None = None,
        tokenizer: Any = None,
        dataset: Dataset | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        data_collator: Callable | None = None,
        num_shared_layers: int | None = None,
        lr_scheduler: Any = None,
        *,
        args: PPOConfig | None = None,
        **more: Any,
    ) -> None:
        if model is None:
            raise ConfigError("model is missing: PPOTrainer(config, model, ...) trains a model, or the name of one.")
        if ref_model is not None and ref_model is model:
            raise ConfigError("model and ref_model are the same object, so both would be trained: leave ref_model out.")
        if config is not None and args is not None:
            raise ConfigError("config and args are two names of one argument: give one of them.")
        self.ref_model, self.num_shared_layers = ref_model, num_shared_layers
        optimizers = (optimizer, lr_scheduler)
        super().__init__(model, config or args, tokenizer=tokenizer, optimizers=optimizers, **more)
        self.config, self.tokenizer = self.args, self.tokenizer_
        self.algorithm = self.args.algorithm()
        self.engine = LocalEngine(self.model.pretrained_model, self.tokenizer_)
        self.moments = RunningMoments()
        self.best_score, self.policy = float("-inf"), None
        self.dataset, self.dataloader = dataset, self._make_loader(dataset, data_collator)
        if self.optimizer is None:
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            self.optimizer = torch.optim.Adam(trained, lr=self.args.learning_rate)
        self._start_trackers()

    # ---- model and reference ----

    def _resolve_model(self, model: Any, quantization_config: Any, peft_config: Any) -> nn.Module:
        if isinstance(model, str):
            model = self._load(model, quantization_config)
        if isinstance(model, WithValueHead):
            model.pretrained_model = with_adapters(model.pretrained_model, peft_config)
        else:
            model = with_value_head(with_adapters(model, peft_config))
            logger.warning(f"This {type(unwrap(model)).__name__} has no value head: a new one is put on.")
        model.has_new_adapter = model.has_new_adapter or peft_config is not None
        return super()._resolve_model(model, None, None)

    def _load(self, name: str, quantization_config: Any) -> WithValueHead:
        args, kwargs = self.args, dict(self.args.model_init_kwargs or {})
        if quantization_config is not None:
            kwargs["quantization_config"] = quantization_config
        args.model_init_kwargs = None
        config = AutoConfig.from_pretrained(name, trust_remote_code=args.trust_remote_code)
        kinds = {False: AutoModelForCausalLMWithValueHead, True: AutoModelForSeq2SeqLMWithValueHead}
        return kinds[config.is_encoder_decoder].from_pretrained(
            name, trust_remote_code=args.trust_remote_code, **kwargs
        )

    def prepare_model(self) -> None:
        super().prepare_model()
        self.reference = self._make_reference()

    def _make_reference(self) -> Reference:
        inner = self.model.pretrained_model
        if self.ref_model is None and isinstance(inner, PeftModel):
            reference = make_reference(inner, has_new_adapter=self.model.has_new_adapter)
            return EarlierWeights.of(self.model) if isinstance(reference, EarlierWeights) else reference
        if self.ref_model is None:
            self.ref_model = create_reference_model(inner, self.num_shared_layers)
        for parameter in self.ref_model.parameters():
            parameter.requires_grad_(False)
        prepare_scoring(unwrap(self.ref_model))
        self.ref_model = self.accelerator.prepare_model(self.ref_model.eval(), evaluation_mode=True)
        return FrozenModel(self.ref_model)

    def encode_settings(self, split: str) -> EncodeSettings:
        raise ConfigError(
            f"{split}_dataset is for train(), which is not available yet. For step(), give the rows of queries as "
            "dataset=, and read them from trainer.dataloader."
        )

    def _make_loader(self, dataset: Dataset | None, data_collator: Callable | None) -> Any:
        if dataset is None:
            return None
        size = self.args.batch_size
        loader = DataLoader(dataset, batch_size=size, collate_fn=data_collator, shuffle=True, drop_last=True)
        return self.accelerator.prepare_data_loader(loader)

    @property
    def current_device(self) -> torch.device:
        return self.accelerator.device

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Not available yet: use `generate` and `step`."""
        raise ConfigError(
            "PPOTrainer.train() is not available yet: sample with trainer.generate(queries), score the responses, and "
            "call trainer.step(queries, responses, scores) in a loop."
        )

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
            model = model.pretrained_model if isinstance(model, WithValueHead) else model
            with self.compute_loss_context_manager():
                responses = sample(self.engine, model, prompts, params, batch_size)
            if isinstance(query_tensor, Sequence):
                responses = [untrimmed(ids, self.tokenizer_.eos_token_id) for ids in responses]
            starts = self._starts(queries, return_prompt)
            found = [
                torch.tensor([*start, *ids], device=self.current_device)
                for start, ids in zip(starts, responses, strict=True)
            ]
            return found[0][None] if isinstance(query_tensor, Tensor) else found

        responses = respond(self.accelerator.unwrap_model(self.model))
        if not generate_ref_response:
            return responses
        with standing_in(self.reference, self.model) as reference:
            return responses, respond(self.accelerator.unwrap_model(reference))

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
            experience = self._evaluate(triplets, shaped)
            watch.lap("forward_pass")
            coefficient = self.algorithm.controller.coefficient
            experience = self.algorithm.rewarded(experience)
            watch.lap("compute_rewards")
            experience = self.algorithm.credited(experience)
            watch.lap("compute_advantages")
            record = self._optimize(triplets, experience)
            watch.lap("optimize_step")
        statistics = self._report(triplets, experience, shaped, coefficient, record)
        watch.lap("calc_stats")
        self._finish(statistics)
        return {**statistics, **watch.total()}

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
        self.policy, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)

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

    def _plan(self, triplets: Sequence[Triplet], rows: Sequence[int]) -> list[list[int]]:
        """The rows in mini-batches of like lengths."""
        groups = plan_micro_batches(
            [triplets[row].tokens for row in rows],
            count=ceil(len(rows) / self.args.mini_batch_size),
            token_budget=self.args.max_tokens_per_micro_batch,
        )
        return [[rows[i] for i in group] for group in groups]

    def _evaluate(self, triplets: Sequence[Triplet], scores: Tensor) -> Experience:
        """What policy and reference find of the batch, before anything is learned from it."""
        shape = (len(triplets), max(len(triplet.response) for triplet in triplets))
        tables: dict[str, Tensor] = {}
        for rows in self._plan(triplets, range(len(triplets))):
            batch, order = self._micro_batch(triplets, rows)
            for name, values in self._observe(batch.to(self.current_device)).items():
                put_rows(tables.setdefault(name, values.new_zeros(shape)), values, order)
        mask = tables.pop("mask")
        return Experience(rewards=scores, group=group_numbers(triplets), mask=mask, signals=tables)

    @torch.no_grad()
    def _observe(self, batch: Batch) -> dict[str, Tensor]:
        found = score(self.policy, batch, want={"value"})
        reference = self.reference.logprobs(self.policy, batch)
        seen = {"mask": batch.mask, "old_logprobs": found.logprobs, "values": found.value, "ref_logprobs": reference}
        if self.args.kl_penalty == "full":
            logits = score_logits(self.policy, batch)
            with standing_in(self.reference, self.policy) as model:
                divergence = full_kl(logits, score_logits(model, batch))
            flat = divergence.new_zeros(batch.mask.numel()).index_copy(0, batch.scored, divergence)
            seen["full_kl"] = flat.view_as(batch.mask)
        return seen

    def _optimize(self, triplets: Sequence[Triplet], experience: Experience) -> Record:
        """Epochs of optimizer steps over random permutations of the batch."""
        record, args = Record(), self.args
        for _ in range(args.ppo_epochs):
            order = torch.randperm(len(triplets)).tolist()
            for start in range(0, len(order), args.backward_batch_size):
                policykl = self._optimizer_step(triplets, experience, order[start:][: args.backward_batch_size], record)
            if args.early_stopping and self._gather(policykl[None]).sum() > 1.5 * args.target_kl:
                break
        return record

    def _optimizer_step(
        self, triplets: Sequence[Triplet], experience: Experience, rows: Sequence[int], record: Record
    ) -> Tensor:
        """One step on the triplets `rows`; gives this process's part of the mean KL that the policy had moved by."""
        laid_out = [self._micro_batch(triplets, part) for part in self._plan(triplets, rows)]
        batches, _ = weigh([batch for batch, _ in laid_out], self.weights, self._sum_over_processes)
        policykl = torch.zeros((), device=self.current_device)
        for i, (batch, (_, order)) in enumerate(zip(batches, laid_out, strict=True)):
            batch = with_rows(batch.to(self.current_device), experience.signals, order)
            last = i == len(batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.policy):
                policykl += self._backward(batch, record)
        if self.args.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(self.policy.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return policykl

    def _backward(self, batch: Batch, record: Record) -> Tensor:
        """Gradients of a mini-batch; none if the policy has moved too far on it."""
        scores = score(self.policy, batch, want={"value", "entropy"})
        loss, metrics = self.algorithm.loss(scores, batch)
        kept = masked_mean(metrics["policy/ratio"], batch.mask) <= self.args.ratio_threshold
        record.add(metrics, batch, kept)
        self.accelerator.backward((loss * batch.weight).sum() * kept * self.accelerator.num_processes)
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

    # ---- saving ----

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save the model with its value head, and the tokenizer."""
        self.accelerator.unwrap_model(self.model).save_pretrained(save_directory, **kwargs)
        self.processing_class.save_pretrained(save_directory)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        self.save_pretrained(output_dir or self.args.output_dir, state_dict=state_dict)

    def push_to_hub(self, repo_id: str | None = None, **kwargs: Any) -> Any:
        """Upload model, value head and tokenizer to `repo_id`; without it, as `transformers.Trainer` does."""
        if repo_id is None:
            return super().push_to_hub(**kwargs)
        self.processing_class.push_to_hub(repo_id, **kwargs)
        return self.accelerator.unwrap_model(self.model).push_to_hub(repo_id, **kwargs)
