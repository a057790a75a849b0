"""Adapters that let `trl` call the reward and metric functions of trlX scripts.

    reward_fn(samples=…, prompts=…, outputs=…, tokenizer=…, **columns)      one number per sample, or one list per sample
    metric_fn(samples=…, prompts=…, outputs=…, **columns)                   {name: one number per sample}

An output is cut before the first stop sequence, and trailing white space is removed; a sample is prompt + output, with the
tokenizer's separator between them for an encoder-decoder. A list per sample has a reward for each token of the output.
"""

from __future__ import annotations

import inspect
import json
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trl.errors import ConfigError, DataError
from trl.rewards.signature import fitting

SEPARATOR = "<sep>"
"""Separator of prompt and output, for encoder-decoders whose tokenizer has no separator token."""


def cut_at(text: str, stop_sequences: Sequence[str]) -> str:
    """Cut the text before the first stop sequence and strip trailing white space; without a match, return it unchanged."""
    places = [place for stop in stop_sequences if (place := text.find(stop)) >= 0]
    return text[: min(places)].rstrip() if places else text


@dataclass
class Texts:
    """Converts prompts and completion ids of `trl` to the arguments of a script's functions."""

    tokenizer: PreTrainedTokenizerBase
    stop_sequences: Sequence[str] = ()
    separator: str = ""

    def arguments(self, prompts: Sequence[str], completion_ids: Sequence[Sequence[int]]) -> dict[str, list[str]]:
        """`samples`, `prompts` and `outputs`."""
        texts = self.tokenizer.batch_decode(list(completion_ids), skip_special_tokens=True)
        outputs = [cut_at(text, self.stop_sequences) for text in texts]
        samples = [prompt + self.separator + output for prompt, output in zip(prompts, outputs, strict=True)]
        return {"samples": samples, "prompts": list(prompts), "outputs": outputs}


@dataclass
class ScriptReward:
    """Wraps a script's `reward_fn` as a reward function of `trl`.

    chunk_size   samples per call of the function
    with_extras  whether it gets the tokenizer and the prompts' other columns
    folder       folder that rollouts are written to
    clip         rewards are clipped to ± this
    """

    reward_fn: Callable
    texts: Texts
    chunk_size: int | None = None
    with_extras: bool = True
    folder: Path | None = None
    clip: float | None = None
    dense: list[list[float]] | None = field(default=None, init=False)
    """Rewards of the tokens of the latest samples, if the function returned lists."""
    run: str = field(default_factory=lambda: uuid.uuid4().hex[:8], init=False)
    calls: int = field(default=0, init=False)

    __name__ = "reward_fn"

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[list[int]], **columns: Any
    ) -> list[float]:
        arguments = {**self.texts.arguments(prompts, completion_ids), **_of_prompts(columns, len(prompts))}
        size = self.chunk_size or len(prompts)
        found: list[Any] = []
        for start in range(0, len(prompts), max(size, 1)):
            found += self._call({name: values[start : start + size] for name, values in arguments.items()})
        self.dense = None
        if found and _is_list(found[0]) and len(found) == len(prompts):
            self.dense = [
                fitted(_numbers(values, i, self.clip), len(ids))
                for i, (values, ids) in enumerate(zip(found, completion_ids, strict=True))
            ]
            found = [sum(values) for values in self.dense]
        elif self.clip is not None:
            found = [max(-self.clip, min(self.clip, float(value))) for value in found]
        self._write(arguments, found)
        return found

    def _call(self, arguments: Mapping[str, list[Any]]) -> list[Any]:
        texts = {name: arguments[name] for name in ("samples", "prompts", "outputs")}
        given = {**arguments, "tokenizer": self.texts.tokenizer} if self.with_extras else texts
        found = self.reward_fn(**passed("reward_fn", self.reward_fn, given))
        if not isinstance(found, Iterable) or isinstance(found, str | Mapping):
            raise DataError(f"reward_fn returned {found!r:.60}: it must return a list with one reward for each sample.")
        return found.tolist() if isinstance(found, Tensor) else list(found)

    def _write(self, arguments: Mapping[str, list[Any]], scores: Sequence[float]) -> None:
        if self.folder is None:
            return
        folder = self.folder / self.run
        folder.mkdir(parents=True, exist_ok=True)
        rows = zip(arguments["prompts"], arguments["outputs"], map(float, scores), strict=True)
        text = json.dumps([{"prompt": p, "response": o, "score": s} for p, o, s in rows], indent=1, ensure_ascii=False)
        (folder / f"epoch_{self.calls}.json").write_text(text, encoding="utf-8")
        self.calls += 1


def script_metrics(metric_fn: Callable, texts: Texts) -> Callable[..., Mapping[str, Sequence[float]]]:
    """Wrap a script's `metric_fn` as a metric function of `trl`."""

    def measure(
        prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[list[int]], **columns: Any
    ) -> Mapping[str, Sequence[float]]:
        arguments = {**texts.arguments(prompts, completion_ids), **_of_prompts(columns, len(prompts))}
        found = metric_fn(**passed("metric_fn", metric_fn, arguments))
        if not isinstance(found, Mapping):
            raise DataError(
                f"metric_fn returned {found!r:.60}: it must return a dict from names to lists with one number per sample."
            )
        return {f"metrics/{name}": values for name, values in found.items()}

    return measure


def passed(name: str, function: Callable, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments in `given` that a script's function takes. Raises ConfigError if it needs one of another name."""
    found = fitting(function, given)
    for parameter in inspect.signature(function).parameters.values():
        named = parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if named and parameter.default is parameter.empty and parameter.name not in found:
            raise ConfigError(
                f"{name} has the argument {parameter.name!r}, but it is passed by name: {', '.join(given)}. Rename it."
            )
    return found


def _of_prompts(columns: Mapping[str, Any], count: int) -> dict[str, list[Any]]:
    """Select the prompts' columns, lists of `count` values, from all arguments that `trl` passes."""
    return {name: values for name, values in columns.items() if isinstance(values, list) and len(values) == count}


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) or (isinstance(value, Tensor) and value.dim() > 0)


def _numbers(values: Any, i: int, clip: float | None) -> list[float]:
    if not _is_list(values):
        raise DataError(
            f"reward_fn returned a list for the first sample and {values!r:.40} for sample {i + 1}: return lists for all."
        )
    numbers = torch.as_tensor(values, dtype=torch.float32)
    return (numbers if clip is None else numbers.clamp(-clip, clip)).tolist()


def fitted(values: Sequence[float], count: int) -> list[float]:
    """Fit rewards to `count` tokens: pad with zeros, or add the excess ones to the last, so that the sum stays the same."""
    if len(values) <= count:
        return [*values, *[0.0] * (count - len(values))]
    return [*values[: count - 1], sum(values[count - 1 :])]
