"""The model behind a server: requests wait in a queue, and the engine samples them batch by batch.

    requests ──▶ queue ──those that can share a batch──▶ LocalEngine.generate ──▶ one response each
                   ▲ pause: the running batch is finished, the rest waits    ▲ weights and adapters change between batches

Requests with the same sampling parameters and no seed share a batch, so that many clients with one prompt each are
sampled as fast as one client with many prompts.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from trl.cli.chat.arguments import Generation
from trl.cli.chat.local import LocalSpeaker
from trl.cli.chat.talk import Message, Say
from trl.errors import ConfigError, ModelError
from trl.rollouts.engine import Prompt, Rollout
from trl.rollouts.local import LocalEngine
from trl.rollouts.sampling import SamplingParams
from trl.types import Example
from trl.vision.places import expanded_ids

_LOADING = threading.Lock()
"""Held while a model is loaded: transformers patches its classes meanwhile, so only one thread may load at a time."""


class Busy(ConfigError):
    """The queue of waiting requests is full."""


@dataclass(frozen=True)
class Job:
    """A request for n samples per prompt, with the adapter of that name (None: the base model)."""

    prompts: Sequence[Prompt]
    params: SamplingParams
    n: int
    adapter: str | None = None
    result: Future[list[list[Rollout]]] = field(default_factory=Future, compare=False)

    def goes_with(self, other: Job) -> bool:
        """True if both can share a batch: same parameters, n and adapter, and no seed that fixes the samples."""
        alike = self.params == other.params and (self.n, self.adapter) == (other.n, other.adapter)
        return alike and self.params.seed is None


class ModelWorker:
    """Owns `model`, and runs one batch or update on it at a time, in a thread. `close` ends the thread."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        *,
        max_tokens_alive: int = 65_536,
        max_waiting: int = 1024,
        template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.model: PreTrainedModel | PeftModel = model.eval()
        self.speaker = LocalSpeaker(model, processor, template_kwargs)
        self.tokenizer, self.max_waiting = self.speaker.tokenizer, max_waiting
        self.engine = LocalEngine(model, self.tokenizer, max_tokens_alive=max_tokens_alive, progress=False)
        self.adapters: dict[str, str] = {}
        self.version = "default"
        self.paused = False
        self._jobs: deque[Job] = deque()
        self._busy = self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="trl-serve-model", daemon=True)
        self._thread.start()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        self._abort()

    @property
    def vocabulary(self) -> int:
        return self.base.get_input_embeddings().weight.shape[0]

    @property
    def context(self) -> int | None:
        """Maximum tokens of prompt and completion: the model's limit, not the tokenizer's, as in sampling without a
        server."""
        return getattr(self.base.config.get_text_config(), "max_position_embeddings", None)

    @property
    def base(self) -> PreTrainedModel:
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    # ---- samples ----

    def prompt(self, ids: Sequence[int], images: Sequence[bytes] = (), *, limit: int) -> Prompt:
        """The engine's prompt for token ids with one placeholder per image. Raises DataError if their numbers
        differ."""
        reader = self.speaker.images
        if reader is None:
            return Prompt(ids, max_new_tokens=limit)
        whole = expanded_ids(reader, ids, images) if images else ids
        return replace(Prompt.of(reader.with_images(Example(whole, ()), images)), max_new_tokens=limit)

    def submit(self, job: Job) -> Future[list[list[Rollout]]]:
        """Add `job` to the queue; return a future of its samples. Raises Busy if the queue is full."""
        with self._changed:
            if len(self._jobs) >= self.max_waiting:
                raise Busy(f"{len(self._jobs)} requests are already waiting: try again later.")
            self._jobs.append(job)
            self._changed.notify_all()
        return job.result

    def stream(self, messages: Sequence[Message], generation: Generation, say: Say, adapter: str | None) -> int:
        """Answer a conversation piece by piece. Return the number of sampled tokens."""
        with self._alone(paused=False), self._adapted(adapter) as model:
            self.speaker.model = model
            return self.speaker.answer(messages, generation, say)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or (self._jobs and not self.paused and not self._busy))
                if self._closed:
                    return
                batch, self._busy = self._take(), True
            try:
                self._sample(batch)
            finally:
                self._leave()

    def _take(self) -> list[Job]:
        """Take the first request from the queue, and all others that can share its batch."""
        first = self._jobs.popleft()
        others = [job for job in self._jobs if job.goes_with(first)]
        self._jobs = deque(job for job in self._jobs if not job.goes_with(first))
        return [job for job in (first, *others) if job.result.set_running_or_notify_cancel()]

    def _sample(self, batch: list[Job]) -> None:
        if not batch:
            return
        prompts = [prompt for job in batch for prompt in job.prompts]
        try:
            with self._adapted(batch[0].adapter) as model:
                self.engine.sync(model, 0)
                found = iter(self.engine.generate(prompts, batch[0].params, batch[0].n))
        except Exception as error:  # every error is returned to the clients of this batch
            for job in batch:
                job.result.set_exception(error)
            return
        for job in batch:
            job.result.set_result([replaced(next(found), self.version) for _ in job.prompts])

    # ---- between samples ----

    @contextmanager
    def _alone(self, *, paused: bool = True) -> Iterator[None]:
        """Reserve the model for the calling thread. With `paused=False`, also wait until sampling is resumed."""
        with self._changed:
            self._changed.wait_for(lambda: not self._busy and (paused or not self.paused))
            self._busy = True
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        with self._changed:
            self._busy = False
            self._changed.notify_all()

    @contextmanager
    def _adapted(self, adapter: str | None) -> Iterator[torch.nn.Module]:
        """Yield the model with the given adapter active, or none."""
        if not isinstance(self.model, PeftModel):
            yield self.model
        elif adapter is None:
            with self.model.disable_adapter():
                yield self.model
        else:
            self.model.set_adapter(adapter)
            yield self.model

    def pause(self, *, abort: bool) -> None:
        """Stop sampling; return when the running batch has ended. `abort` also ends waiting requests, with empty
        samples."""
        with self._changed:
            self.paused = True
        with self._alone():
            if abort:
                self._abort()

    def resume(self) -> None:
        with self._changed:
            self.paused = False
            self._changed.notify_all()

    def _abort(self) -> None:
        jobs, self._jobs = self._jobs, deque()
        for job in jobs:
            if job.result.set_running_or_notify_cancel():
                job.result.set_result([[Rollout((), (), "abort")] * job.n for _ in job.prompts])

    def reload(self, folder: str) -> None:
        """Load weights from a folder that `save_pretrained` wrote; adapters stay loaded.

        Raises ConfigError for a folder that does not exist or does not fit; the weights are then unchanged.
        """
        if not Path(folder, "config.json").is_file():
            raise ConfigError(f"weights_path={folder!r} contains no config.json.")
        try:
            with _LOADING:
                new = type(self.base).from_pretrained(folder, dtype=self.base.dtype, use_safetensors=True)
        except Exception as error:  # which errors broken files cause is not documented
            raise ConfigError(f"weights_path={folder!r} cannot be read: {error}") from error
        with self._alone(), torch.no_grad():
            own, given = _without_adapters(self.base.state_dict()), new.state_dict()
            wrong = [name for name, value in own.items() if given.get(name, value[:0]).shape != value.shape]
            if wrong or given.keys() - own.keys():
                name = next(iter(wrong or given.keys() - own.keys()))
                raise ConfigError(f"weights_path={folder!r} does not fit the model that is served: {name}.")
            for name, value in own.items():
                value.copy_(given[name])

    def load_adapter(self, name: str, folder: str, *, in_place: bool) -> None:
        """Load the adapter in `folder`; requests for the model `name` then use it."""
        if name in self.adapters and not in_place:
            raise ConfigError(f"The adapter {name!r} is already loaded: give another name, or set load_inplace.")
        if not Path(folder, "adapter_config.json").is_file():
            raise ConfigError(f"lora_path={folder!r} contains no adapter_config.json.")
        with self._alone():
            self._drop_adapter(name)
            try:
                if isinstance(self.model, PeftModel):
                    self.model.load_adapter(folder, adapter_name=name)
                else:
                    self.model = PeftModel.from_pretrained(self.model, folder, adapter_name=name)
            except (ValueError, RuntimeError, KeyError, OSError) as error:
                raise ModelError(f"lora_path={folder!r} does not fit the model: {error}") from error
            self.model.eval()
            self.adapters[name] = folder

    def unload_adapter(self, name: str) -> None:
        if name not in self.adapters:
            raise ConfigError(f"There is no adapter {name!r}.")
        with self._alone():
            self._drop_adapter(name)

    def _drop_adapter(self, name: str) -> None:
        if self.adapters.pop(name, None) is None:
            return
        if len(self.model.peft_config) == 1:
            self.model = self.model.unload()
        else:
            self.model.delete_adapter(name)


def replaced(rollouts: Sequence[Rollout], version: str) -> list[Rollout]:
    """The rollouts, with the version of the weights that generated them in `info`."""
    return [replace(rollout, info={**rollout.info, "weight_version": version}) for rollout in rollouts]


def _without_adapters(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of the base model, under the names that they have without adapters."""
    return {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}
