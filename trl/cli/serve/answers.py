"""Convert rollouts to the JSON responses of OpenAI's and vLLM's routes."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from transformers import PreTrainedTokenizerBase

from trl.rollouts.engine import Rollout
from trl.rollouts.sampling import SamplingParams


def head(kind: str, model: str) -> dict[str, Any]:
    """The fields at the beginning of every response."""
    name = "cmpl" if kind == "text_completion" else "chatcmpl"
    return {"id": f"{name}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def used(prompts: Sequence[Sequence[int]], found: Sequence[Sequence[Rollout]]) -> dict[str, int]:
    """The `usage` field: prompt tokens, each prompt counted once, and completion tokens of all samples."""
    return usage(sum(map(len, prompts)), sum(map(len, chain(*found))))


class Texts:
    """Decodes completions with the options of a request (special tokens, stop strings)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, params: SamplingParams, body: Mapping[str, Any]) -> None:
        self.tokenizer, self.params = tokenizer, params
        self.skip = body.get("skip_special_tokens") is not False
        self.keep_stop = bool(body.get("include_stop_str_in_output"))

    def text(self, rollout: Rollout) -> str:
        """The text up to the stop string that ended it."""
        text = self.tokenizer.decode(rollout.ids, skip_special_tokens=self.skip)
        cut = [text.rfind(stop) + len(stop) * self.keep_stop for stop in self.params.stop if stop in text]
        return text[: max(cut)] if cut and rollout.finish_reason == "stop" else text

    def stop_reason(self, rollout: Rollout) -> int | str | None:
        """The token or string that ended a completion; None for the end-of-sequence token, or the limit."""
        if rollout.finish_reason != "stop":
            return None
        if rollout.ids[-1] in self.params.stop_token_ids:
            return rollout.ids[-1]
        text = self.tokenizer.decode(rollout.ids)
        return max((stop for stop in self.params.stop if stop in text), key=text.rfind, default=None)

    def token(self, token: int) -> str:
        return self.tokenizer.decode([token])


def completion_choice(index: int, rollout: Rollout, texts: Texts, body: Mapping[str, Any]) -> dict[str, Any]:
    logprobs = None
    if body.get("logprobs") is not None:
        as_ids = body.get("return_tokens_as_token_ids")
        tokens = [f"token_id:{token}" if as_ids else texts.token(token) for token in rollout.ids]
        logprobs = {"tokens": tokens, "token_logprobs": list(rollout.logprobs)}
    return {**_choice(index, rollout, texts, body), "text": texts.text(rollout), "logprobs": logprobs}


def chat_choice(index: int, rollout: Rollout, texts: Texts, body: Mapping[str, Any]) -> dict[str, Any]:
    logprobs = None
    if body.get("logprobs"):
        pairs = zip(map(texts.token, rollout.ids), rollout.logprobs, strict=True)
        logprobs = {"content": [{"token": t, "logprob": p, "bytes": [*t.encode()]} for t, p in pairs]}
    message = {"role": "assistant", "content": texts.text(rollout)}
    return {**_choice(index, rollout, texts, body), "message": message, "logprobs": logprobs}


def _choice(index: int, rollout: Rollout, texts: Texts, body: Mapping[str, Any]) -> dict[str, Any]:
    choice = {"index": index, "finish_reason": rollout.finish_reason, "stop_reason": texts.stop_reason(rollout)}
    return choice | ({"token_ids": list(rollout.ids)} if body.get("return_token_ids") else {})


def token_choice(index: int, rollout: Rollout) -> dict[str, Any]:
    """A choice of /inference/v1/generate, whose prompts and completions are token ids."""
    pairs = zip(rollout.ids, rollout.logprobs, strict=True)
    version = {"version": rollout.info["weight_version"], "start": 0, "end": len(rollout)} if rollout.info else None
    return {
        "index": index,
        "token_ids": list(rollout.ids),
        "logprobs": {"content": [{"token_id": token, "logprob": logprob} for token, logprob in pairs]},
        "finish_reason": rollout.finish_reason,
        "weight_versions": [version] if version else [],
    }


def delta(before: Mapping[str, Any], content: Mapping[str, Any], reason: str | None = None) -> dict[str, Any]:
    """One event of a streamed chat completion."""
    return {**before, "choices": [{"index": 0, "delta": dict(content), "finish_reason": reason}]}
