"""The rollout engine that has servers sample: any number of `vllm serve` or `trl serve`, tokens in and tokens out over HTTP.

    sync       the policy's weights ──▶ a folder that trainer and servers see ──▶ each server reads it, forgets its cache
    generate   prompts of all processes ──▶ main process ──▶ servers ──▶ samples back to the processes

    engine = ServerEngine(["http://localhost:8000"])
    GRPOTrainer(..., engine=engine)                      # or GRPOConfig(use_vllm=True, vllm_mode="server")

No process group joins trainer and servers, unless weights travel over NCCL: they may be of other releases, on other machines, come
later, and go. Every process calls, the main one talks, and an error is raised on all.
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
from trl.rollouts.waits import SAY_EVERY, spoken_of
from trl.rollouts.weight_sync import needs_merged_weights
from trl.rollouts.weight_transfer import ADAPTER, FolderTransfer, WeightTransfer, together
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
    """What one request asks for: n samples of each of these prompts."""

    prompts: Sequence[SentPrompt]
    params: SamplingParams
    n: int


class ServerEngine(RolloutEngine):
    """Samples on the servers at `urls`: a `RolloutEngine`.

    tokenizer       names an end-of-sequence token besides the model's own
    sync_by         "folder": servers read weights from a folder; "nccl": they are broadcast to vLLM's workers, adapters merged
    sync_dir        folder for weights that this machine and all servers see. None: shared memory, for servers on this machine
    timeout         seconds that a server may take for a request, and for reading weights
    start_timeout   seconds that are waited for servers at the start
    retries         how often in a row a server may fail
    api_key         the servers' key; None: as the environment variable VLLM_API_KEY says
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
            raise ConfigError(f"The servers are {urls}: give at least one URL, and each of them once.")
        self.servers = [Server(url, timeout=timeout, api_key=key) for url in urls]
        self.tokenizer, self.retries, self.start_timeout = tokenizer, retries or Retries(), start_timeout
        self.sync_dir = None if sync_dir is None else Path(sync_dir)
        far = [url for url in urls if urlsplit(url).hostname not in LOCAL]
        if far and self.sync_dir is None and sync_by == "folder":
            raise ConfigError(
                f"{far[0]} is on another machine: give rollout_sync_dir (sync_dir of ServerEngine), a folder of a file system "
                "that this machine and the servers share. Weights travel through it. Or rollout_sync='nccl'."
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
        """Send the policy's weights to all servers, once for every step.

        Raises EngineError for servers that are not there, do not fit, or do not take the weights.
        """
        if self._synced is not None and self._synced[0] == step and self._synced[1]() is model:
            return
        start = time.monotonic()
        with spoken_of(self.servers):
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
        reason = "NCCL carries whole weights" if over_nccl else needs_merged_weights(policy, [*self.infos.values()])
        if reason and policy is not base_of(policy):
            self._say(f"The adapter is merged into the weights that are sent, since {reason}.")
        if reason:
            self.transfer.send(self.servers, model, step)
        else:
            self.folder.send_adapter(self.servers, model, step)
        self._model_name = "" if reason else ADAPTER
        self._check(model)

    def _check(self, model: nn.Module) -> None:
        """Compare log-probabilities of a server of each precision with the model's own."""
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
        """A few sampled tokens; None of a server that is not there now."""
        server = next(server for server in self.servers if server.url == url)
        if server.version is None:
            return None
        return self._ask(server, Chunk([SentPrompt.of(prompt)], PARAMS, 1))[0][0]

    # ---- the start ----

    def _connect(self, base: Any) -> dict[str, ServerInfo]:
        """What every server says of itself. Raises EngineError for one that does not answer in time, or does not fit."""
        if base.config.is_encoder_decoder:
            raise ModelError(f"{type(base).__name__} is an encoder-decoder, which servers do not sample from.")
        self._wait_for_servers(base.config.name_or_path or "MODEL")
        infos = {server.url: server.info(self.start_timeout) for server in self.servers}
        for url, info in infos.items():
            self._check_fit(url, info, base)
        return infos

    def _wait_for_servers(self, model: str) -> None:
        start = said = time.monotonic()
        limit = min(CONNECT, self.start_timeout)
        while errors := [*together(self.servers, lambda server: server.get("/health", timeout=limit)).values()]:
            waited = time.monotonic() - start
            if waited > self.start_timeout or not all(isinstance(error, Unreachable) for error in errors):
                port = urlsplit(self.servers[0].url).port or 8000
                raise EngineError(
                    f"{errors[0]} Waited {waited:.0f} seconds. To start one:\n\n{START.format(model=model, port=port)}"
                ) from errors[0]
            if time.monotonic() - said > SAY_EVERY:
                said = time.monotonic()
                logger.warning("Waiting for servers since %.0f s: %s", waited, errors[0])
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
                f"{url} computes in {info.dtype}, the trainer's model is {own}: log-probabilities differ by rounding. "
                "importance_sampling_correction weighs samples for that."
            )
        context = getattr(config, "max_position_embeddings", None)
        if info.context is not None and context is not None and info.context < context:
            self._say(
                f"{url} takes {info.context} tokens of prompt and completion, the model {context}: completions end there."
            )

    # ---- samples ----

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams, n: int = 1) -> list[list[Rollout]]:
        """n rollouts of each prompt: `result[p][i]` is sample i of `prompts[p]`.

        Prompts with images are sent as they are before expansion, and the images with them; tokens that stand for images are
        not sampled. Raises ConfigError for parameters that servers do not have, DataError for a prompt that leaves no room in
        their context, and EngineError where servers fail, or expand a prompt to other tokens than the trainer.
        """
        if self._synced is None:
            raise EngineError("The servers have been sent no weights yet: call sync(model, step) first.")
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
        """The samples of all processes, by process and prompt."""
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
        """Requests for these prompts, the same whichever server will answer which.

        vLLM gets one prompt at a time, with a seed of its own, and so does every server where there are images. `trl serve`
        gets as many parts of texts as there are servers: the first one's samples are those of the engine in process, and all
        of them with one server.
        """
        limits = [self._limit(i, prompt, params) for i, prompt in enumerate(prompts)]
        together = self._is_own and len(set(limits)) == 1 and not any(prompt.images for prompt in prompts)
        size = -(-len(prompts) // len(self.servers)) if together else 1
        chunks = []
        for start in range(0, len(prompts), size):
            own = replace(with_limit(params, limits[start]), seed=_seed(params.seed, start))
            chunks.append(Chunk(prompts[start : start + size], own, n))
        return chunks

    def _limit(self, index: int, prompt: SentPrompt, params: SamplingParams) -> int:
        ids = prompt.ids
        if prompt.has_inputs:
            raise DataError(
                f"prompts[{index}] has inputs beside its tokens, which are not sent to servers: they take tokens and images "
                "(`Prompt.unexpanded`), which trainers give them of rows with a column of images."
            )
        limit = asked_limit(params, prompt.ids, prompt.max_new_tokens, index)
        contexts = [info.context for info in self.infos.values() if info.context is not None]
        if not contexts:
            return limit
        if len(ids) >= min(contexts):
            raise DataError(
                f"prompts[{index}] has {len(ids)} tokens, the context of the servers is {min(contexts)}: shorten the prompt, or "
                "start them with a larger --max-model-len."
            )
        return limit if self._is_own else min(limit, min(contexts) - len(ids))

    def _ask(self, server: Server, chunk: Chunk) -> list[list[Rollout]]:
        info = self.infos[server.url]
        vocabulary, model = info.vocabulary or 2**31, self._model_name or info.model
        if chunk.prompts[0].images:
            return [server.complete_after_images(chunk.prompts[0], chunk.params, chunk.n, model, vocabulary)]
        return server.complete([prompt.ids for prompt in chunk.prompts], chunk.params, chunk.n, model, vocabulary)

    def exact_logprobs(self, params: SamplingParams) -> bool:
        """Whether all servers tell the policy's own log-probabilities for these parameters; where not, that is said once."""
        params = with_banned(params, self._image_tokens)
        wrong = [url for url, info in self.infos.items() if not info.tells_policy(params)]
        if wrong:
            mode = self.infos[wrong[0]].logprobs_mode
            self._say(
                f"{wrong[0]} tells {mode}, which are not the policy's log-probabilities with these sampling options: those of "
                "the policy that sampled are computed again by the trainer."
            )
        return not wrong

    # ---- what is told of it ----

    def take_metrics(self) -> dict[str, float]:
        """Seconds in sync and in sampling, tokens per second, requests asked for again; since the last call."""
        return self.counts.take()

    def _say(self, sentence: str) -> None:
        if sentence not in self._said and is_main():
            self._said.add(sentence)
            warnings.warn(sentence, stacklevel=3)

    def close(self) -> None:
        """Delete the folders of weights. The servers run on."""
        self.folder.close()
        self.transfer.close()
        self._synced = None


def _rank() -> int:
    from torch import distributed

    return distributed.get_rank() if distributed.is_initialized() else 0


def _seed(seed: int, start: int) -> int:
    """A seed for the prompts from `start` on; the given one for the first."""
    return seed if start == 0 else (seed * 0x9E3779B97F4A7C15 + start * 0xBF58476D1CE4E5B9) % 2**62


def check_parameters(params: SamplingParams) -> None:
    """Raises ConfigError for parameters that samplers beside the trainer do not have."""
    if params.beta or params.logit_mask is not None:
        raise ConfigError("beta and logit_mask need the model's Q heads and logits: sample in process (LocalEngine).")
    if options := options_set(params, {**GENERATE_ONLY, **PROCESSED}):
        raise ConfigError(f"{options[0]} of the generation config is not an option of servers: sample in process.")
