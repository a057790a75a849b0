"""The routes of `trl serve`: those of OpenAI for any client, and those of `vllm serve` for trainers.

    /v1/completions  /v1/chat/completions  /inference/v1/generate     sample completions
    /health  /v1/models  /version  /server_info  /get_world_size      describe the server and its model
    /pause  /resume  /is_paused  /collective_rpc  /update_weight_version  /weight_info
    /reset_prefix_cache  /reset_encoder_cache  /v1/load_lora_adapter  /v1/unload_lora_adapter     update weights between rollout batches

Log-probabilities are always log-softmax(logits / temperature) of the sampled tokens, before any truncation, penalty or
ban. The routes in the last two lines that change the served weights are open only to this machine, or to requests with
the key.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from trl import __version__
from trl.cli.serve.answers import Texts, chat_choice, completion_choice, head, token_choice, used
from trl.cli.serve.arguments import ServeArguments
from trl.cli.serve.bodies import (
    CHAT,
    COMPLETION,
    GENERATE,
    chat_messages,
    check,
    check_pixels,
    generation_of,
    image_bytes,
    images_in,
    sampling_params,
)
from trl.cli.serve.streaming import streamed
from trl.cli.serve.worker import Busy, Job, ModelWorker
from trl.errors import ConfigError, TrlError
from trl.rollouts.engine import Prompt, Rollout
from trl.rollouts.server_info import SIZES

LOGPROBS_MODE = "policy_logprobs"
"""This server's value for vLLM's option of that name: always log-softmax(logits/τ), whatever the sampling
parameters."""

DEFAULT_TOKENS = 16
"""Maximum new tokens of a completion request without a limit, as in the OpenAI API."""

Handler = Callable[[Request], Awaitable[Response]]


def make_app(worker: ModelWorker, name: str, arguments: ServeArguments) -> Starlette:
    """The application that serves the model of `worker` under `name`."""
    routes = _Routes(worker, name, arguments)
    hosts = ["127.0.0.1", "localhost", "[::1]", "::1"] if arguments.is_private else ["*"]
    return Starlette(
        routes=routes.table(),
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
        exception_handlers={HTTPException: _refused, TrlError: _mistaken},
    )


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "code": status}}, status)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    unknown = error.status_code in (404, 405) and error.detail in ("Not Found", "Method Not Allowed")
    words = f"{request.method} {request.url.path} is not available on this server." if unknown else error.detail
    return _error(error.status_code, words)


async def _mistaken(_: Request, error: Exception) -> Response:
    return _error(503 if isinstance(error, Busy) else 400, str(error))


class _Routes:
    def __init__(self, worker: ModelWorker, name: str, arguments: ServeArguments) -> None:
        self.worker, self.name, self.arguments = worker, name, arguments

    def table(self) -> list[Route]:
        def get(path: str, handler: Handler, guard: Callable[[Handler], Handler] = self._for_users) -> Route:
            return Route(path, guard(handler), methods=["GET"])

        def post(path: str, handler: Handler, guard: Callable[[Handler], Handler] = self._for_trainers) -> Route:
            return Route(path, guard(handler), methods=["POST"])

        return [
            Route("/health", self.health, methods=["GET"]),
            get("/v1/models", self.models),
            get("/v1/models/{name:path}", self.one_model),
            get("/version", self.about),
            get("/server_info", self.server_info),
            get("/get_world_size", self.world_size),
            get("/is_paused", self.is_paused),
            get("/weight_info", self.weight_info),
            post("/v1/completions", self.completions, self._for_users),
            post("/v1/chat/completions", self.chat, self._for_users),
            post("/inference/v1/generate", self.generate, self._for_users),
            post("/pause", self.pause),
            post("/resume", self.resume),
            post("/collective_rpc", self.collective_rpc),
            post("/update_weight_version", self.update_weight_version),
            post("/reset_prefix_cache", self.reset_prefix_cache),
            post("/reset_encoder_cache", self.reset_prefix_cache),
            post("/v1/load_lora_adapter", self.load_adapter),
            post("/v1/unload_lora_adapter", self.unload_adapter),
        ]

    # ---- access control and limits ----

    def _for_users(self, handler: Handler) -> Handler:
        async def guarded(request: Request) -> Response:
            key = self.arguments.api_key
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if key is not None and not hmac.compare_digest(given.encode(), key.encode()):
                raise HTTPException(401, "This server needs an API key: send the header `Authorization: Bearer KEY`.")
            try:
                async with asyncio.timeout(self.arguments.request_timeout):
                    return await handler(request)
            except TimeoutError:
                raise HTTPException(
                    504, f"The request was cancelled after request_timeout={self.arguments.request_timeout:g} seconds."
                ) from None

        return guarded

    def _for_trainers(self, handler: Handler) -> Handler:
        async def guarded(request: Request) -> Response:
            if not self.arguments.is_private and self.arguments.api_key is None:
                raise HTTPException(
                    403,
                    f"{request.url.path} changes what is served: start the server with --api_key, or with --host 127.0.0.1.",
                )
            origin = request.headers.get("origin")
            if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
                raise HTTPException(403, f"{request.url.path} refuses requests from web pages of {origin}.")
            return await handler(request)

        return self._for_users(guarded)

    async def _body(self, request: Request) -> Any:
        limit, parts, size = self.arguments.max_request_megabytes * 2**20, [], 0
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise HTTPException(413, f"The body is larger than {self.arguments.max_request_megabytes:g} MiB.")
            parts.append(part)
        try:
            return json.loads(b"".join(parts))
        except (ValueError, RecursionError) as error:
            raise HTTPException(400, f"The body is not JSON: {error}") from None

    def _adapter(self, body: Mapping[str, Any]) -> str | None:
        """The adapter that the request's `model` names; None for the base model."""
        wanted = body.get("model") or self.name
        if wanted != self.name and wanted not in self.worker.adapters:
            known = ", ".join([self.name, *self.worker.adapters])
            raise HTTPException(404, f"The model {wanted!r} is not served here. Served: {known}.")
        return None if wanted == self.name else wanted

    # ---- samples ----

    async def _sampled(self, job: Job) -> list[list[Rollout]]:
        longest = self.worker.context
        for i, prompt in enumerate(job.prompts):
            if longest is not None and len(prompt) >= longest:
                raise ConfigError(
                    f"Prompt {i + 1} has {len(prompt)} tokens, but the model's context length is {longest}."
                )
            if wrong := [token for token in prompt.ids if token >= self.worker.vocabulary]:
                raise ConfigError(
                    f"Prompt {i + 1} contains token {wrong[0]}, but the vocabulary has {self.worker.vocabulary} tokens."
                )
        asked = sum(len(prompt) + job.n * (prompt.max_new_tokens or 0) for prompt in job.prompts)
        if asked > self.arguments.max_request_tokens:
            raise ConfigError(
                f"The request asks for {asked} tokens, but this server's max_request_tokens is "
                f"{self.arguments.max_request_tokens}: ask for fewer per request."
            )
        return await asyncio.wrap_future(self.worker.submit(job))

    async def completions(self, request: Request) -> Response:
        check(body := await self._body(request), COMPLETION)
        if body.get("stream"):
            raise ConfigError("stream=True is available at /v1/chat/completions.")
        if (body.get("logprobs") or 0) > 1:
            raise ConfigError(
                f"logprobs={body['logprobs']}: this server returns only log-probabilities of sampled tokens; give 0 or 1."
            )
        params, n = sampling_params(body, max_tokens=DEFAULT_TOKENS), body.get("n") or 1
        prompts, limit = self._prompts(body["prompt"]), params.max_new_tokens
        read = [self.worker.prompt(ids, limit=limit) for ids in prompts]
        found = await self._sampled(Job(read, params, n, self._adapter(body)))
        texts = Texts(self.worker.tokenizer, params, body)
        choices = [
            completion_choice(p * n + i, rollout, texts, body)
            | ({"prompt_token_ids": prompts[p]} if body.get("return_token_ids") else {})
            for p, rollouts in enumerate(found)
            for i, rollout in enumerate(rollouts)
        ]
        answer = head("text_completion", body.get("model") or self.name)
        return JSONResponse({**answer, "choices": choices, "usage": used(prompts, found)})

    def _prompts(self, given: str | list[Any]) -> list[list[int]]:
        """Token ids of each prompt, given as one or several texts or lists of token ids."""
        several = [given] if isinstance(given, str) or isinstance(given[0], int) else given
        return [self.worker.tokenizer(each)["input_ids"] if isinstance(each, str) else each for each in several]

    async def chat(self, request: Request) -> Response:
        check(body := await self._body(request), CHAT)
        if body.get("top_logprobs"):
            raise ConfigError(
                "top_logprobs is not available: this server returns only log-probabilities of sampled tokens."
            )
        if body.get("chat_template_kwargs"):
            raise ConfigError(
                "chat_template_kwargs cannot be set per request: start the server with --chat_template_kwargs."
            )
        messages, adapter = chat_messages(body), self._adapter(body)
        self._check_images(images_in(messages))
        prompt = Prompt.of(await asyncio.to_thread(self.worker.speaker.prompt, messages))
        longest = self.worker.speaker.context
        params = sampling_params(body, max_tokens=max(1, longest - len(prompt)) if longest else DEFAULT_TOKENS)
        if body.get("stream"):
            answer = head("chat.completion.chunk", body.get("model") or self.name)
            generation = generation_of(params)
            return await streamed(self.worker, answer, body, messages, generation, adapter, len(prompt))
        prompt = replace(prompt, max_new_tokens=params.max_new_tokens)
        found = await self._sampled(Job([prompt], params, body.get("n") or 1, adapter))
        texts = Texts(self.worker.tokenizer, params, body)
        choices = [chat_choice(i, rollout, texts, body) for i, rollout in enumerate(found[0])]
        answer = head("chat.completion", body.get("model") or self.name)
        return JSONResponse({**answer, "choices": choices, "usage": used([prompt.ids], found)})

    def _check_images(self, images: Sequence[bytes]) -> None:
        """Raises TrlError if the model reads no images, or these are too many, too large, or not images."""
        if not images:
            return
        self.worker.speaker.check_reads_images()
        longest = self.worker.context
        if longest is not None and len(images) > longest:
            raise ConfigError(f"{len(images)} images are more than the model's context of {longest} tokens.")
        check_pixels(images, self.arguments.max_request_pixels)

    async def generate(self, request: Request) -> Response:
        check(body := await self._body(request), GENERATE)
        if body.get("stream"):
            raise ConfigError("stream=True is available at /v1/chat/completions.")
        given = body.get("sampling_params") or {}
        params = sampling_params(given, max_tokens=DEFAULT_TOKENS)
        parts = body.get("content_parts") or []
        images = [image_bytes(part["url"], f"content_parts[{i}]") for i, part in enumerate(parts)]
        self._check_images(images)
        prompt = await asyncio.to_thread(self.worker.prompt, body["token_ids"], images, limit=params.max_new_tokens)
        (found,) = await self._sampled(Job([prompt], params, given.get("n") or 1, self._adapter(body)))
        answer = {
            "request_id": body.get("request_id"),
            "choices": [token_choice(i, rollout) for i, rollout in enumerate(found)],
        }
        return JSONResponse(answer | ({"prompt_token_ids": list(prompt.ids)} if body.get("return_token_ids") else {}))

    # ---- the server and its model ----

    async def health(self, _: Request) -> Response:
        return Response(status_code=200)

    async def models(self, _: Request) -> Response:
        names = [None, *self.worker.adapters]
        return JSONResponse({"object": "list", "data": [self._model(adapter) for adapter in names]})

    async def one_model(self, request: Request) -> Response:
        return JSONResponse(self._model(self._adapter({"model": request.path_params["name"]})))

    def _model(self, adapter: str | None) -> dict[str, Any]:
        """The entry of an adapter in /v1/models; of the base model with None."""
        name, parent = (self.name, None) if adapter is None else (adapter, self.name)
        about = {"id": name, "object": "model", "created": 0, "owned_by": "trl", "parent": parent}
        return {**about, "max_model_len": self.worker.context}

    async def about(self, _: Request) -> Response:
        return JSONResponse({"version": f"trl {__version__}"})

    async def server_info(self, _: Request) -> Response:
        base, config = self.worker.base, self.worker.base.config.get_text_config()
        sizes = {name: getattr(config, name) for name in SIZES if hasattr(config, name)}
        model = {
            "model": self.name,
            "dtype": str(base.dtype),
            "max_model_len": self.worker.context,
            "logprobs_mode": LOGPROBS_MODE,
            "hf_config": {"model_type": base.config.model_type, "vocab_size": self.worker.vocabulary, **sizes},
        }
        lora = {"max_lora_rank": None, "max_loras": None}
        return JSONResponse({"vllm_config": {"model_config": model, "lora_config": lora}, "trl_version": __version__})

    async def world_size(self, _: Request) -> Response:
        return JSONResponse({"world_size": 1})

    # ---- requests of trainers ----

    async def pause(self, request: Request) -> Response:
        mode = request.query_params.get("mode", "abort")
        if mode not in ("abort", "wait", "keep"):
            raise ConfigError(f"mode={mode!r}: give abort, wait or keep. Running samples are finished in each mode.")
        await asyncio.to_thread(self.worker.pause, abort=mode == "abort")
        return JSONResponse({"status": "paused"})

    async def resume(self, _: Request) -> Response:
        self.worker.resume()
        return JSONResponse({"status": "resumed"})

    async def is_paused(self, _: Request) -> Response:
        return JSONResponse({"is_paused": self.worker.paused})

    async def collective_rpc(self, request: Request) -> Response:
        body = await self._fields(request, "method")
        if body["method"] != "reload_weights":
            raise ConfigError(f"method={body['method']!r}: this server has reload_weights.")
        options = body.get("kwargs") or {}
        if not isinstance(options, dict) or not isinstance(options.get("weights_path"), str):
            raise ConfigError("reload_weights takes kwargs.weights_path, a folder that save_pretrained wrote.")
        if options.get("is_checkpoint_format", True) is not True:
            raise ConfigError(
                "is_checkpoint_format must be true: this server reads only folders that save_pretrained wrote."
            )
        await asyncio.to_thread(self.worker.reload, options["weights_path"])
        return JSONResponse({"results": [None]})

    async def update_weight_version(self, request: Request) -> Response:
        self.worker.version = (await self._fields(request, "new_version"))["new_version"]
        return JSONResponse({"success": True})

    async def weight_info(self, _: Request) -> Response:
        return JSONResponse({"weight_version": self.worker.version})

    async def reset_prefix_cache(self, _: Request) -> Response:
        return JSONResponse(
            {"success": True}
        )  # nothing to reset: KV cache and image features are kept only within a batch

    async def load_adapter(self, request: Request) -> Response:
        body = await self._fields(request, "lora_name", "lora_path")
        name, folder = body["lora_name"], body["lora_path"]
        if name == self.name:
            raise ConfigError(f"lora_name={name!r} is the name of the model: give another.")
        in_place = bool(body.get("load_inplace"))
        await asyncio.to_thread(self.worker.load_adapter, name, folder, in_place=in_place)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload_adapter(self, request: Request) -> Response:
        name = (await self._fields(request, "lora_name"))["lora_name"]
        await asyncio.to_thread(self.worker.unload_adapter, name)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    async def _fields(self, request: Request, *names: str) -> dict[str, Any]:
        """The JSON body of a request, which must have these fields with texts. Raises ConfigError."""
        body = await self._body(request)
        for name in names:
            if not isinstance(body, dict) or not isinstance(body.get(name), str):
                raise ConfigError(f"The body of {request.url.path} must be a JSON object with the text field {name!r}.")
        return body
