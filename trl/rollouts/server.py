"""The rollout engine that samples on servers (`vllm serve` or `trl serve`, any number of them), with token ids over HTTP.

    sync       the policy's weights ──▶ a folder that trainer and servers see ──▶ each server reads it, resets its cache
    generate   prompts of all processes ──▶ main process ──▶ servers ──▶ samples back to the processes

    engine = ServerEngine(["http://localhost:8000"])
    GRPOTrainer(..., engine=engine)                      # or GRPOConfig(use_vllm=True, vllm_mode="server")

Unless weights are sent over NCCL, trainer and servers form no process group: servers may run other releases, on other
machines, start later, and fail. All processes call the engine; only the main process talks to servers, and its errors are
raised on all processes.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from torch import nn

from trl.errors import ConfigError, DataError, EngineError, ModelError
from trl.models.gathering import base_of, policy_of
from trl.rollouts.connection import CONNECT, CONNECTIONS, SentPrompt, Server, Unreachable
from trl.rollouts.dispatch import Dispatch, Retries
from trl.rollouts.engine import Prompt, Rollout, RolloutEngine
from trl.rollouts.engine_counts import EngineCounts
from trl.rollouts.nccl_transfer import NCCLTransfer
from trl.rollouts.sampler import GENERATE_ONLY, PROCESSED, options_set
from trl.rollouts.sampling import SamplingParams, asked_limit, with_banned, with_limit, with_seed, with_stop_tokens
from trl.rollouts.server_info import ServerInfo
from trl.rollouts.sync_check import PARAMS, check_images, check_weights, probe
from trl.rollouts.waits import SAY_EVERY, logging_waits
from trl.rollouts.weight_sync import needs_merged_weights
from trl.rollouts.weight_transfer import ADAPTER, FolderTransfer, WeightTransfer, for_all
from trl.training.collectives import gather_on_main, is_main, run_on_main
from trl.vision.families import image_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

KEY = "VLLM_API_KEY"
LOCAL = ("127.0.0.1", "localhost", "0.0.0.0", "::1")
START = "    trl vllm-serve --model {model} --port {port}        (vLLM)\n    trl serve {model} --port {port}        (without vLLM)"


@dataclass(frozen=True)
class Chunk:
    """One request: n samples of each of these prompts."""

    prompts: Sequence[SentPrompt]
    params: SamplingParams
    n: int


class ServerEngine(RolloutEngine):
    """A `RolloutEngine` that samples on the servers at `urls`.

    tokenizer       its end-of-sequence token ends completions, as those of the model do
    sync_by         "folder": servers read weights from a folder; "nccl": weights, adapters merged, are broadcast to vLLM workers
    sync_dir        folder for weights, which this machine and all servers see. None: shared memory, for servers on this machine
    timeout         seconds that a server may take to answer a request or to read weights
    start_timeout   seconds to wait for servers at the start
    retries         how often in a row a server may fail, and the waits between retries
    api_key         the servers' API key; None: the environment variable VLLM_API_KEY
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        sync_by: Literal["folder", "nccl"] = "folder",
        sync_dir: str | Path | None = None,
        timeout: float = 600.0,
        start_timeout: float = 240.0,
        retries: Retries | None = None,
        api_key: str | None = None,
    ) -> None:
        urls = [urls] if isinstance(urls, str) else list(urls)
        key = api_key or os.environ.get(KEY)
        for url in urls:
            if not url.startswith(("http://", "https://")):
                raise ConfigError(f"{url!r} is not the URL of a server: give one such as http://localhost:8000.")
        if not urls or len(set(urls)) < len(urls):
            raise ConfigError(f"The server URLs are {urls}: give at least one, and none of them twice.")
        self.servers = [Server(url, timeout=timeout, api_key=key) for url in urls]
        self.tokenizer, self.retries, self.start_timeout = tokenizer, retries or Retries(), start_timeout
        self.sync_dir = None if sync_dir is None else Path(sync_dir)
        far = [url for url in urls if urlsplit(url).hostname not in LOCAL]
        if far and self.sync_dir is None and sync_by == "folder":
            raise ConfigError(
                f"{far[0]} is on another machine: give rollout_sync_dir (sync_dir of ServerEngine), a folder on a file system "
                "that this machine and the servers share, through which weights are sent; or rollout_sync='nccl'."
            )
        self.folder = FolderTransfer(self.sync_dir, self.retries)
        self.transfer: WeightTransfer = self.folder if sync_by == "folder" else NCCLTransfer(timeout)
        self.infos: dict[str, ServerInfo] = {}
        self._synced: tuple[int, weakref.ref[nn.Module]] | None = None
        self._model_name = ""
        self._stops_of: Any = None
        self._image_tokens: list[int] = []
        self._saw_images = False
        self._said: set[str] = set()
        self.counts = EngineCounts()

    # ---- weights ----

    def sync(self, model: nn.Module, step: int) -> None:
        """Send the policy's weights to all servers, once per step.

        Raises EngineError if servers cannot be reached, serve another model, or do not load the weights.
        """
        if self._synced is not None and self._synced[0] == step and self._synced[1]() is model:
            return
        start = time.monotonic()
        with logging_waits(self.servers):
            self._sync(model, step)
        self._synced = step, weakref.ref(model)
        self.counts.add("sync_seconds", time.monotonic() - start)

    def _sync(self, model: nn.Module, step: int) -> None:
        policy = policy_of(model)
        if not self.infos:
            self.infos = run_on_main(lambda: self._connect(base_of(policy)))
            self._stops_of = base_of(policy)
            self._image_tokens = image_token_ids(self._stops_of.config)
            for server in self.servers:
                server.reads_images = bool(self._image_tokens)
        over_nccl = isinstance(self.transfer, NCCLTransfer)
        reason = "NCCL sends whole weights" if over_nccl else needs_merged_weights(policy, [*self.infos.values()])
        if reason and policy is not base_of(policy):
            self._say(f"The adapter is merged into the weights before they are sent to servers, since {reason}.")
        if reason:
            self.transfer.send(self.servers, model, step)
        else:
            self.folder.send_adapter(self.servers, model, step)
        self._model_name = "" if reason else ADAPTER
        self._check(model)

    def _check(self, model: nn.Module) -> None:
        """Compare each server's log-probabilities with the model's own, if the server returns those of the policy."""
        vocabulary = base_of(policy_of(model)).get_input_embeddings().num_embeddings
        for url, info in self.infos.items():
            if not info.tells_policy(PARAMS):
                continue
            prompt = probe(min(vocabulary, info.vocabulary or vocabulary), info.context, self._image_tokens)
            rollout = run_on_main(lambda url=url, prompt=prompt: self._probe(url, prompt))
            if rollout is not None:
                difference = check_weights(model, prompt, rollout, info.dtype, engine=f"The server {url}")
                self.counts.largest("sync_logp_difference", difference)

    def _probe(self, url: str, prompt: Prompt) -> Rollout | None:
        """A few tokens sampled after `prompt`; None for a server that does not have the current weights."""
        server = next(server for server in self.servers if server.url == url)
        if server.version is None:
            return None
        return self._ask(server, Chunk([SentPrompt.of(prompt)], PARAMS, 1))[0][0]

    # ---- the start ----

    def _connect(self, base: Any) -> dict[str, ServerInfo]:
        """The description of every server. Raises EngineError for one that does not answer in time or serves another model."""
        if base.config.is_encoder_decoder:
            raise ModelError(
                f"{type(base).__name__} is an encoder-decoder, which servers do not support: sample in process."
            )
        self._wait_for_servers(base.config.name_or_path or "MODEL")
        infos = {server.url: server.info(self.start_timeout) for server in self.servers}
        for url, info in infos.items():
            self._check_fit(url, info, base)
        return infos

    def _wait_for_servers(self, model: str) -> None:
        start = said = time.monotonic()
        limit = min(CONNECT, self.start_timeout)
        while errors := [*for_all(self.servers, lambda server: server.get("/health", timeout=limit)).values()]:
            waited = time.monotonic() - start
            if waited > self.start_timeout or not all(isinstance(error, Unreachable) for error in errors):
                port = urlsplit(self.servers[0].url).port or 8000
                raise EngineError(
                    f"{errors[0]} Waited {waited:.0f} seconds. To start one:\n\n{START.format(model=model, port=port)}"
                ) from errors[0]
            if time.monotonic() - said > SAY_EVERY:
                said = time.monotonic()
                logger.warning("Waiting for servers for %.0f s: %s", waited, errors[0])
            time.sleep(min(1.0, self.start_timeout / 10))

    def _check_fit(self, url: str, info: ServerInfo, base: Any) -> None:
        config = base.config.get_text_config()
        if info.vocabulary not in (None, config.vocab_size):
            raise EngineError(
                f"{url} serves {info.model!r}, whose vocabulary has {info.vocabulary} tokens; the trainer's model has "
                f"{config.vocab_size}: start the server with the same model."
            )
        for name, size in info.sizes.items():
            if (wanted := getattr(config, name, size)) != size:
                raise EngineError(
                    f"{url} serves {info.model!r}, whose {name} is {size}; that of the trainer's model is {wanted}: start the "
                    "server with the same model."
                )
        own = str(base.dtype).removeprefix("torch.")
        if info.dtype not in (None, own):
            self._say(
                f"{url} computes in {info.dtype}, the trainer's model in {own}: log-probabilities differ by rounding. "
                "importance_sampling_correction reweights samples for this."
            )
        context = getattr(config, "max_position_embeddings", None)
        if info.context is not None and context is not None and info.context < context:
            self._say(
                f"{url} takes {info.context} tokens of prompt and completion, the model {context}: completions are cut at "
                f"{info.context}."
            )

    # ---- samples ----

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams, n: int = 1) -> list[list[Rollout]]:
        """n rollouts of each prompt: `result[p][i]` is sample i of `prompts[p]`.

        Prompts with images are sent before image tokens are expanded, together with the images; image tokens are never
        sampled. Raises ConfigError for parameters that servers do not support, DataError for a prompt that fills their
        context, and EngineError if servers fail or expand the images of a prompt to other tokens than the trainer.
        """
        if self._synced is None:
            raise EngineError("No weights have been sent to the servers yet: call sync(model, step) first.")
        check_parameters(params)
        start, params = time.monotonic(), with_seed(with_stop_tokens(params, self._stops_of, self.tokenizer))
        asked = (list(map(SentPrompt.of, prompts)), with_banned(params, self._image_tokens), n)
        everywhere = gather_on_main(asked)
        found, place = run_on_main(lambda: self._sample(everywhere)), _rank()
        if not self._saw_images and all(info.tells_policy(params) for info in self.infos.values()):
            dtypes = [info.dtype for info in self.infos.values()]
            off = check_images(self._synced[1](), prompts, found[place], params, dtypes, engine="The server")
            self._saw_images = off is not None
        self.counts.add("generate_seconds", time.monotonic() - start)
        self.counts.add("generated_tokens", sum(len(rollout) for rollouts in chain(*found) for rollout in rollouts))
        return found[place]

    def _sample(self, everywhere: Sequence[tuple]) -> list[list[list[Rollout]]]:
        """Sample for all processes; the rollouts are indexed by process, prompt and sample."""
        plan = [self._chunks(*asked) for asked in everywhere]
        requests = [chunk for chunks in plan for chunk in chunks]
        servers = [server for server in self.servers if server.version == str(self._synced[0])]
        if not requests:
            return [[] for _ in plan]
        connections = 1 if self._is_own else CONNECTIONS
        work = Dispatch(servers, self._ask, requests, retries=self.retries, connections=connections)
        answers = iter(work.run())
        self.counts.add("retried_requests", work.retried)
        return [[rollouts for _ in chunks for rollouts in next(answers)] for chunks in plan]

    @property
    def _is_own(self) -> bool:
        return all(info.is_own for info in self.infos.values())

    def _chunks(self, prompts: Sequence[SentPrompt], params: SamplingParams, n: int) -> list[Chunk]:
        """Split prompts into requests, independently of which server will answer which.

        For vLLM, and for prompts with images, each request has one prompt and its own seed. For `trl serve`, text prompts are
        split into as many requests as there are servers: the first request has the samples of the engine in process, and with
        a single server all have.
        """
        limits = [self._limit(i, prompt, params) for i, prompt in enumerate(prompts)]
        is_grouped = self._is_own and len(set(limits)) == 1 and not any(prompt.images for prompt in prompts)
        size = -(-len(prompts) // len(self.servers)) if is_grouped else 1
        chunks = []
        for start in range(0, len(prompts), size):
            own = replace(with_limit(params, limits[start]), seed=_seed(params.seed, start))
            chunks.append(Chunk(prompts[start : start + size], own, n))
        return chunks

    def _limit(self, index: int, prompt: SentPrompt, params: SamplingParams) -> int:
        ids = prompt.ids
        if prompt.has_inputs:
            raise DataError(
                f"prompts[{index}] has model inputs besides its token ids, which cannot be sent to servers: they take token ids "
                "and images (`Prompt.unexpanded`), which trainers fill in for rows with an image column."
            )
        limit = asked_limit(params, prompt.ids, prompt.max_new_tokens, index)
        contexts = [info.context for info in self.infos.values() if info.context is not None]
        if not contexts:
            return limit
        if len(ids) >= min(contexts):
            raise DataError(
                f"prompts[{index}] has {len(ids)} tokens, but the context of the servers is {min(contexts)}: shorten the prompt, "
                "or start the servers with a larger --max-model-len."
            )
        return limit if self._is_own else min(limit, min(contexts) - len(ids))

    def _ask(self, server: Server, chunk: Chunk) -> list[list[Rollout]]:
        info = self.infos[server.url]
        vocabulary, model = info.vocabulary or 2**31, self._model_name or info.model
        if chunk.prompts[0].images:
            return [server.complete_after_images(chunk.prompts[0], chunk.params, chunk.n, model, vocabulary)]
        return server.complete([prompt.ids for prompt in chunk.prompts], chunk.params, chunk.n, model, vocabulary)

    def exact_logprobs(self, params: SamplingParams) -> bool:
        """True if all servers return the policy's log-probabilities with these parameters; if not, warns once."""
        params = with_banned(params, self._image_tokens)
        wrong = [url for url, info in self.infos.items() if not info.tells_policy(params)]
        if wrong:
            mode = self.infos[wrong[0]].logprobs_mode
            self._say(
                f"{wrong[0]} returns {mode}, which are not the policy's log-probabilities with these sampling options: the "
                "trainer recomputes them."
            )
        return not wrong

    # ---- metrics and warnings ----

    def take_metrics(self) -> dict[str, float]:
        """Seconds in sync and in sampling, tokens per second and retried requests, since the last call."""
        return self.counts.take()

    def _say(self, sentence: str) -> None:
        if sentence not in self._said and is_main():
            self._said.add(sentence)
            warnings.warn(sentence, stacklevel=3)

    def close(self) -> None:
        """Delete the folders of weights, and close all connections. The servers keep running."""
        self.folder.close()
        self.transfer.close()
        for server in self.servers:
            server.close()
        self._synced = None


def _rank() -> int:
    from torch import distributed

    return distributed.get_rank() if distributed.is_initialized() else 0


def _seed(seed: int, start: int) -> int:
    """The seed of the request that begins with prompt `start`; for the first request the given seed."""
    return seed if start == 0 else (seed * 0x9E3779B97F4A7C15 + start * 0xBF58476D1CE4E5B9) % 2**62


def check_parameters(params: SamplingParams) -> None:
    """Raise ConfigError for parameters that vLLM and servers do not support."""
    if params.beta or params.logit_mask is not None:
        raise ConfigError("beta and logit_mask need the model's Q heads and logits: sample in process (LocalEngine).")
    if options := options_set(params, {**GENERATE_ONLY, **PROCESSED}):
        raise ConfigError(
            f"Servers do not support {options[0]} of the generation config: sample in process (LocalEngine)."
        )
