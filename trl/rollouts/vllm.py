"""The rollout engine that runs vLLM in the trainer's own processes, on the same devices.

    sync       the policy's weights ──▶ a folder ──▶ every process's vLLM reads it, resets its cache, is checked
    generate   prompts of a tensor-parallel group ──▶ its vLLM ──▶ each process's own samples

vLLM and the trainer share one Python environment here, so that both have to work with the same torch and transformers; this
does not hold for `ServerEngine`. Written for vLLM 0.30 and later.
"""

from __future__ import annotations

import os
import time
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed, nn

from trl.errors import ConfigError, DataError, EngineError
from trl.imports import require
from trl.models.gathering import base_of, policy_of
from trl.models.load import tokenizer_of
from trl.rollouts.connection import BANNED, other_tokens, sampling_body
from trl.rollouts.engine import Prompt, Rollout, RolloutEngine
from trl.rollouts.engine_counts import EngineCounts
from trl.rollouts.logprob_modes import tells_policy
from trl.rollouts.sampling import SamplingParams, asked_limit, with_banned, with_limit, with_seed, with_stop_tokens
from trl.rollouts.server import check_parameters
from trl.rollouts.sync_check import PARAMS, check_images, check_weights, probe
from trl.rollouts.weight_folders import WeightFolders, default_root
from trl.rollouts.weight_sync import publish, write_weights
from trl.training.collectives import run_on_main
from trl.vision.families import image_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

BATCHED_TOKENS = 4096
"""vLLM's `max_num_batched_tokens`, with which it profiles its memory: small, since the policy is on the same device."""


Request = tuple[int, Prompt, SamplingParams]
"""The index of a prompt in its process, the prompt, and its sampling parameters."""


class VLLMEngine(RolloutEngine):
    """A `RolloutEngine` that samples with vLLM in process.

    tokenizer              the trainer's tokenizer, or the processor of a model that takes images
    temperature            sampling temperature, which decides what vLLM returns: at 1 (or 0) raw log-probabilities, which are the
                           policy's even with truncation; else processed ones, which are the policy's only without truncation
    tensor_parallel_size   number of processes, with consecutive ranks, that share one copy of the weights
    enable_sleep_mode      free vLLM's memory during training: weights move to the host (sleep level 1), the KV cache is dropped
    options                further options of `vllm.LLM`
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
        *,
        sync_dir: str | Path | None = None,
        temperature: float = 1.0,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.3,
        max_model_len: int | None = None,
        model_impl: str = "vllm",
        enable_sleep_mode: bool = False,
        **options: Any,
    ) -> None:
        self.world, self.rank = _place()
        if self.world % tensor_parallel_size:
            raise ConfigError(
                f"vllm_tensor_parallel_size={tensor_parallel_size} does not divide the number of processes, {self.world}: give a "
                "divisor of it."
            )
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        self.vllm = require("vllm", to='vllm_mode="colocate"')
        self.processor, self.tokenizer, self.sleeps = tokenizer, tokenizer_of(tokenizer), enable_sleep_mode
        self.sync_dir = default_root() if sync_dir is None else Path(sync_dir)
        self.group_size = tensor_parallel_size
        self.mode = "raw_logprobs" if temperature in (0, 1) else "processed_logprobs"
        self.options = {
            "tensor_parallel_size": tensor_parallel_size,
            "distributed_executor_backend": "external_launcher" if self.world > 1 else "uni",
            "seed": self.rank // tensor_parallel_size,
            "gpu_memory_utilization": gpu_memory_utilization,
            "max_model_len": max_model_len,
            "max_num_batched_tokens": BATCHED_TOKENS,
            "model_impl": model_impl,
            "enable_sleep_mode": enable_sleep_mode,
            "logprobs_mode": self.mode,
            "generation_config": "vllm",
            "disable_log_stats": True,
            **options,
        }
        self.llm: Any = None
        self.folders: WeightFolders | None = None
        self._groups: list[Any] = []
        self._stops_of: Any = None
        self._synced: tuple[int, weakref.ref[nn.Module]] | None = None
        self._asleep = self._said = self._saw_images = False
        self._image_tokens: list[int] = []
        self.counts = EngineCounts()

    # ---- weights ----

    def sync(self, model: nn.Module, step: int) -> None:
        """Have vLLM read the policy's weights, once per step. The first call starts vLLM with them."""
        if self._synced is not None and self._synced[0] == step and self._synced[1]() is model:
            return
        start = time.monotonic()
        self.folders = self.folders or WeightFolders(self.sync_dir) if self.rank == 0 else None
        folder = run_on_main(lambda: str(self.folders.folder / str(step)))
        publish(self.folders, model, step, write_weights)
        if self.llm is None or self._image_tokens:  # vLLM loads its processor from the folder of the last weights
            run_on_main(lambda: self.processor.save_pretrained(folder))
        if self.llm is None:
            self._start(model, folder)
        else:
            self._wake()
            self._reload(folder)
        self._check(model)
        run_on_main(lambda: self.folders.keep_only(Path(folder)))
        self._synced = step, weakref.ref(model)
        self.counts.add("sync_seconds", time.monotonic() - start)

    def _start(self, model: nn.Module, folder: str) -> None:
        base = base_of(policy_of(model))
        self._stops_of, self._image_tokens = base, image_token_ids(base.config)
        dtype = str(base.dtype).removeprefix("torch.")
        self._groups = [
            distributed.new_group(list(range(first, first + self.group_size)))
            for first in range(0, self.world, self.group_size)
            if self.group_size > 1
        ]
        self.llm = self.vllm.LLM(model=folder, dtype=dtype, **self.options)

    def _reload(self, folder: str) -> None:
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": folder, "is_checkpoint_format": True})
        if self.llm.reset_prefix_cache() is False:
            raise EngineError("vLLM did not reset its prefix cache, which belongs to earlier weights.")
        if self._image_tokens:
            self.llm.llm_engine.reset_encoder_cache()

    def _check(self, model: nn.Module) -> None:
        base = base_of(policy_of(model))
        prompt = probe(base.get_input_embeddings().num_embeddings, self._context, self._image_tokens)
        ((rollout,),) = self._run(_requests([prompt], PARAMS), 1)
        dtype = str(base.dtype).removeprefix("torch.")
        self.counts.largest("sync_logp_difference", check_weights(model, prompt, rollout, dtype, engine="vLLM"))

    def _wake(self) -> None:
        if self._asleep:
            torch.cuda.empty_cache()  # vLLM maps memory past torch's allocator, and not all releases do this first
            self.llm.wake_up()
            self._asleep = False

    @property
    def device_bytes(self) -> int:
        """Bytes of the current device that vLLM takes while it is awake."""
        return int(self.options["gpu_memory_utilization"] * torch.cuda.mem_get_info()[1])

    @property
    def _context(self) -> int:
        return self.llm.llm_engine.model_config.max_model_len

    # ---- samples ----

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams, n: int = 1) -> list[list[Rollout]]:
        """n rollouts of each prompt: `result[p][i]` is sample i of `prompts[p]`. See `ServerEngine.generate`."""
        if self.llm is None:
            raise EngineError("vLLM has no weights yet: call sync(model, step) first.")
        check_parameters(params)
        start, params = time.monotonic(), with_seed(with_stop_tokens(params, self._stops_of, self.tokenizer))
        self._wake()
        asked = with_banned(params, self._image_tokens)
        found = self._shared(prompts, asked, n) if self.group_size > 1 else self._run(_requests(prompts, asked), n)
        if self.sleeps:
            self.llm.sleep(level=1)
            self._asleep = True
        if not self._saw_images and tells_policy(self.mode, params):
            off = check_images(self._synced[1](), prompts, found, params, [], engine="vLLM")
            self._saw_images = off is not None
        self.counts.add("generate_seconds", time.monotonic() - start)
        self.counts.add("generated_tokens", sum(len(rollout) for rollouts in found for rollout in rollouts))
        return found

    def _shared(self, prompts: Sequence[Prompt], params: SamplingParams, n: int) -> list[list[Rollout]]:
        """Sample the prompts of the whole tensor-parallel group together, and return those of this process."""
        group, place = self._groups[self.rank // self.group_size], self.rank % self.group_size
        everywhere: list[Any] = [None] * self.group_size
        given = [prompt if prompt.unexpanded is None else replace(prompt, inputs={}) for prompt in prompts]
        distributed.all_gather_object(everywhere, _requests(given, params), group=group)
        found, start = self._run(list(chain(*everywhere)), n), sum(map(len, everywhere[:place]))
        return found[start : start + len(prompts)]

    def _run(self, requests: Sequence[Request], n: int) -> list[list[Rollout]]:
        if not requests:
            return []
        options = [self._options(*request, n) for request in requests]
        outputs = self.llm.generate([_given(prompt) for _, prompt, _ in requests], options, use_tqdm=False)
        for (i, prompt, _), out in zip(requests, outputs, strict=True):
            if prompt.unexpanded is not None and list(out.prompt_token_ids) != list(prompt.ids):
                raise EngineError(f"vLLM, prompts[{i}]: {other_tokens(out.prompt_token_ids, prompt.ids)}")
        return [[self._rollout(each) for each in sorted(out.outputs, key=lambda each: each.index)] for out in outputs]

    def _options(self, index: int, prompt: Prompt, params: SamplingParams, n: int) -> Any:
        if prompt.inputs and prompt.unexpanded is None:
            raise DataError(
                f"prompts[{index}] has model inputs besides its token ids, which cannot be passed to vLLM: it takes token ids and "
                "images (`Prompt.unexpanded`), which trainers fill in for rows with an image column."
            )
        limit = min(asked_limit(params, prompt.ids, prompt.max_new_tokens, index), self._context - len(prompt))
        if limit < 1:
            raise DataError(
                f"prompts[{index}] has {len(prompt)} tokens, but vLLM's context is {self._context}: shorten the prompt."
            )
        own = replace(with_limit(params, limit), seed=(params.seed + index * 0x9E3779B97F4A7C15) % 2**62)
        bias = dict.fromkeys(params.banned_tokens, BANNED) or None
        options = {**sampling_body(own, n), "logit_bias": bias, "logprobs": 0, "detokenize": bool(params.stop)}
        return self.vllm.SamplingParams(**options)

    def _rollout(self, completion: Any) -> Rollout:
        if completion.finish_reason not in ("stop", "length"):
            raise EngineError(f"vLLM returned a completion with the finish reason {completion.finish_reason!r}.")
        ids = tuple(completion.token_ids)
        logprobs = tuple(each[token].logprob for each, token in zip(completion.logprobs, ids, strict=True))
        return Rollout(ids, logprobs, completion.finish_reason, version=self._synced[0] if self._synced else None)

    def exact_logprobs(self, params: SamplingParams) -> bool:
        exact = tells_policy(self.mode, with_banned(params, self._image_tokens))
        if not exact and not self._said:
            self._said = True
            warnings.warn(
                f"vLLM returns {self.mode}, which are not the policy's log-probabilities with these sampling options: the trainer "
                "recomputes them.",
                stacklevel=2,
            )
        return exact

    # ---- metrics ----

    def take_metrics(self) -> dict[str, float]:
        """Seconds in sync and in sampling, and tokens per second of this process, since the last call."""
        return self.counts.take()

    def close(self) -> None:
        """Release vLLM's memory, and delete the folders of weights."""
        self.llm = self._synced = None
        if self.folders is not None:
            self.folders.close()
            self.folders = None


def _requests(prompts: Sequence[Prompt], params: SamplingParams) -> list[Request]:
    return [(i, prompt, params) for i, prompt in enumerate(prompts)]


def _given(prompt: Prompt) -> dict[str, Any]:
    """The prompt in the format of `vllm.LLM`."""
    if prompt.unexpanded is None:
        return {"prompt_token_ids": list(prompt.ids)}
    own = prompt.unexpanded
    return {"prompt_token_ids": list(own.ids), "multi_modal_data": {"image": list(own.images)}}


def _place() -> tuple[int, int]:
    """World size and rank of this process."""
    return (distributed.get_world_size(), distributed.get_rank()) if distributed.is_initialized() else (1, 0)
