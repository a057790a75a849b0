"""What requests may say, and what of it becomes `SamplingParams`.

A field that is unknown, or that this engine cannot do, is refused by name: nothing is dropped in silence, but for the fields
of `WITHOUT_EFFECT`, which ask for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jsonschema import Draft202012Validator

from trl.cli.chat.arguments import Generation
from trl.errors import ConfigError
from trl.rollouts.sampling import SamplingParams

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
    "stop_token_ids": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"type": "integer"}}]},
    "ignore_eos": SWITCH,
    "max_tokens": {"type": ["integer", "null"], "minimum": 1},
    "min_tokens": {"type": ["integer", "null"], "minimum": 0},
    "include_stop_str_in_output": SWITCH,
    "skip_special_tokens": SWITCH,
}
NEUTRAL = {
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "logit_bias": ({}, None),
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
"""Fields that this engine does not have, and the values that ask for nothing."""

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
    sampling_params={
        "type": ["object", "null"],
        "properties": {**COMMON, "logprobs": WHOLE},
        "additionalProperties": False,
    },
    stream=SWITCH,
)


def check(body: Any, schema: Draft202012Validator) -> None:
    """Raises ConfigError for a body that does not follow the schema, or asks for what this engine does not have."""
    for error in sorted(schema.iter_errors(body), key=lambda error: len(error.path)):
        where = ".".join(map(str, error.path)) or "The body"
        raise ConfigError(f"{where}: {error.message}")
    for given in (body, body.get("sampling_params") or {}):
        for name, allowed in NEUTRAL.items():
            if name in given and given[name] not in allowed:
                raise ConfigError(f"{name}={given[name]!r} is not available on this server: leave it out.")


def sampling_params(given: Mapping[str, Any], *, max_tokens: int) -> SamplingParams:
    """The parameters of a body; `max_tokens` where it names no limit. A `top_k` of −1 is all tokens, as in vLLM."""
    said = {name: value for name, value in given.items() if value is not None}
    top_k = said.get("top_k", 0)
    return SamplingParams(
        temperature=float(said.get("temperature", 1.0)),
        top_p=float(said.get("top_p", 1.0)),
        top_k=0 if top_k == -1 else top_k,
        min_p=float(said.get("min_p", 0.0)),
        repetition_penalty=float(said.get("repetition_penalty", 1.0)),
        stop=said.get("stop", ()),
        stop_token_ids=said.get("stop_token_ids", ()),
        ignore_eos=said.get("ignore_eos", False),
        max_new_tokens=said.get("max_completion_tokens", said.get("max_tokens", max_tokens)),
        min_new_tokens=said.get("min_tokens", 0),
        seed=said.get("seed"),
    )


def generation_of(params: SamplingParams) -> Generation:
    """The parameters as the chat's speaker takes them."""
    return Generation(
        max_new_tokens=params.max_new_tokens,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        stop=list(params.stop) or None,
        seed=params.seed,
    )


def chat_messages(body: Mapping[str, Any]) -> list[dict[str, str]]:
    """The messages, their contents as texts. Raises ConfigError for parts that are no text."""
    return [{"role": m["role"], "content": _content(m["content"], i)} for i, m in enumerate(body["messages"])]


def _content(content: str | list[Any], index: int) -> str:
    if isinstance(content, str):
        return content
    if wrong := [part for part in content if not isinstance(part, dict) or part.get("type") != "text"]:
        kind = wrong[0].get("type") if isinstance(wrong[0], dict) else type(wrong[0]).__name__
        raise ConfigError(f"messages[{index}] has a part of type {kind!r}: this server reads texts alone.")
    return "".join(str(part.get("text", "")) for part in content)
