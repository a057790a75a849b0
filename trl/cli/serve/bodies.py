"""Check the bodies of requests, and convert them to `SamplingParams`.

Fields that are unknown, or that this engine does not support, are refused by name. Only the fields in `WITHOUT_EFFECT`,
which do not change the samples, are accepted and ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jsonschema import Draft202012Validator

from trl.cli.chat.arguments import Generation
from trl.errors import ConfigError
from trl.rollouts.connection import BANNED
from trl.rollouts.sampling import SamplingParams
from trl.vision.images import PixelLimits, from_base64, image_size

DATA_URL = re.compile("data:image/[a-z0-9.+-]+;base64,")
NUMBER, WHOLE, SWITCH, TEXT = ({"type": [name, "null"]} for name in ("number", "integer", "boolean", "string"))
IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
MANY_TEXTS = {"type": "array", "items": {"type": "string"}}

SAMPLING = {
    "n": {"type": ["integer", "null"], "minimum": 1},
    "temperature": NUMBER,
    "top_p": NUMBER,
    "top_k": WHOLE,
    "min_p": NUMBER,
    "repetition_penalty": NUMBER,
    "seed": WHOLE,
    "stop": {"anyOf": [{"type": ["string", "null"]}, MANY_TEXTS]},
    "logit_bias": {
        "type": ["object", "null"],
        "propertyNames": {"pattern": "^[0-9]+$"},
        "additionalProperties": {"type": "number", "minimum": BANNED, "maximum": BANNED},
    },
    "stop_token_ids": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"type": "integer"}}]},
    "ignore_eos": SWITCH,
    "max_tokens": {"type": ["integer", "null"], "minimum": 1},
    "min_tokens": {"type": ["integer", "null"], "minimum": 0},
    "include_stop_str_in_output": SWITCH,
    "skip_special_tokens": SWITCH,
}
FRACTIONS = ("temperature", "top_p", "min_p", "repetition_penalty")
NEUTRAL = {
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "best_of": (1, None),
    "echo": (False, None),
    "suffix": ("", None),
    "prompt_logprobs": (None,),
    "tools": ([], None),
    "tool_choice": ("none", "auto", None),
    "parallel_tool_calls": (True, False, None),
    "functions": ([], None),
    "function_call": ("none", "auto", None),
    "modalities": (["text"], None),
    "reasoning_effort": ("none", None),
    "service_tier": ("auto", "default", None),
    "response_format": ({"type": "text"}, None),
    "output_mode": ("tokens", None),
    "output_kind": (2, None),
    "detokenize": (True, False, None),
    "flat_logprobs": (False, None),
}
"""Fields that this engine does not support, and their neutral values, which are accepted."""

WITHOUT_EFFECT = (
    *("model", "user", "metadata", "store", "request_id", "cache_salt", "priority", "return_token_ids"),
    *("safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
)
COMMON = {**SAMPLING, **dict.fromkeys((*NEUTRAL, *WITHOUT_EFFECT), True)}
STREAM = {"stream": SWITCH, "stream_options": {"type": ["object", "null"]}}


def _schema(required: str, **properties: Any) -> Draft202012Validator:
    return Draft202012Validator(
        {"type": "object", "required": [required], "properties": properties, "additionalProperties": False}
    )


COMPLETION = _schema(
    "prompt",
    **COMMON,
    **STREAM,
    prompt={"anyOf": [{"type": "string"}, IDS, MANY_TEXTS, {"type": "array", "items": IDS}]},
    logprobs=WHOLE,
    return_tokens_as_token_ids=SWITCH,
)
CHAT = _schema(
    "messages",
    **COMMON,
    **STREAM,
    messages={
        "type": "array",
        "minItems": 1,
        "items": {
            "type": "object",
            "required": ["role", "content"],
            "properties": {"role": {"type": "string"}, "content": {"type": ["string", "array"]}},
        },
    },
    max_completion_tokens={"type": ["integer", "null"], "minimum": 1},
    logprobs=SWITCH,
    top_logprobs=WHOLE,
    chat_template_kwargs={"type": ["object", "null"]},
)
GENERATE = _schema(
    "token_ids",
    **dict.fromkeys((*NEUTRAL, *WITHOUT_EFFECT), True),
    token_ids=IDS,
    content_parts={
        "type": ["array", "null"],
        "items": {
            "type": "object",
            "required": ["type", "url"],
            "properties": {"type": {"enum": ["image_url"]}, "url": {"type": "string"}},
        },
    },
    sampling_params={
        "type": ["object", "null"],
        "properties": {**COMMON, "logprobs": WHOLE},
        "additionalProperties": False,
    },
    stream=SWITCH,
)


def check(body: Any, schema: Draft202012Validator) -> None:
    """Raises ConfigError for a body that violates the schema, or uses a field that this engine does not support."""
    for error in sorted(schema.iter_errors(body), key=lambda error: len(error.path)):
        where = ".".join(map(str, error.path)) or "The body"
        raise ConfigError(f"{where}: {error.message}")
    for given in (body, body.get("sampling_params") or {}):
        for name, allowed in NEUTRAL.items():
            if name in given and given[name] not in allowed:
                raise ConfigError(f"{name}={given[name]!r} is not available on this server: leave it out.")


def sampling_params(given: Mapping[str, Any], *, max_tokens: int) -> SamplingParams:
    """The sampling parameters in a body; `max_tokens` is the default limit. A `top_k` of −1 means all tokens, as in
    vLLM."""
    said = {name: value for name, value in given.items() if value is not None}
    return SamplingParams(
        **{name: float(said[name]) for name in FRACTIONS if name in said},
        **{name: said[name] for name in ("stop", "stop_token_ids", "ignore_eos", "seed") if name in said},
        top_k=0 if said.get("top_k") == -1 else said.get("top_k", 0),
        max_new_tokens=said.get("max_completion_tokens", said.get("max_tokens", max_tokens)),
        min_new_tokens=said.get("min_tokens", 0),
        banned_tokens=tuple(map(int, said.get("logit_bias", {}))),
    )


def generation_of(params: SamplingParams) -> Generation:
    """Convert the parameters to those of `trl chat`, whose code streams answers."""
    alike = (*FRACTIONS, "top_k", "max_new_tokens", "seed")
    return Generation(**{name: getattr(params, name) for name in alike}, stop=list(params.stop) or None)


def chat_messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of a body, with text, or parts with text and image bytes, as content. Raises ConfigError for other
    parts."""
    return [{"role": m["role"], "content": _content(m["content"], i)} for i, m in enumerate(body["messages"])]


def _content(content: str | list[Any], index: int) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    parts = [_part(part, f"messages[{index}]") for part in content]
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


def _part(part: Any, where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind == "text":
        return {"type": "text", "text": str(part.get("text", ""))}
    if kind != "image_url":
        raise ConfigError(f"{where} has a part of type {kind!r}: this server reads text and image_url.")
    held = part.get("image_url")
    return {"type": "image", "image": image_bytes(held.get("url") if isinstance(held, dict) else held, where)}


def image_bytes(url: Any, where: str) -> bytes:
    """The bytes of the image in a data URL. Raises ConfigError for other URLs, DataError for invalid base64."""
    if not isinstance(url, str) or DATA_URL.match(url) is None:
        raise ConfigError(
            f"{where}: give the image_url as a data URL (data:image/png;base64,…); this server neither downloads images "
            "nor reads files."
        )
    return from_base64(url.partition(",")[2])


def images_in(messages: Sequence[Mapping[str, Any]]) -> list[bytes]:
    """The bytes of all images in a conversation."""
    parts = (part for message in messages if isinstance(message["content"], list) for part in message["content"])
    return [part["image"] for part in parts if part["type"] == "image"]


def check_pixels(images: Sequence[bytes], most: int) -> None:
    """Raises ConfigError for images with more than `most` pixels in total, DataError for invalid ones. Reads only
    headers."""
    pixels = sum(height * width for height, width in (image_size(image, PixelLimits()) for image in images))
    if pixels > most:
        raise ConfigError(
            f"The images of the request have {pixels:,} pixels, but this server's max_request_pixels is {most:,}: make them "
            "smaller, or send fewer per request."
        )
