"""The data types of the library, from rows to loss.

    row ──encode──▶ Example ──lay out──▶ Batch ──score──▶ Scores ──algorithm──▶ loss per token

One glossary everywhere: B rows, T positions of a row, N completions, C tokens of the longest completion,
K completions of one prompt, V vocabulary, H hidden size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NoReturn, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from trl.errors import ConfigError
from trl.transfer import sent

Signal = float | Sequence[float]
Metrics = dict[str, Tensor]
"""Metrics of one batch by name. `[N,C]` is averaged over the mask, `[N]` over completions; NaN is left out of the average."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A completion of a prompt, on the host.

    `mask[t]` is 1 where token t is scored (tool output, user turns and cut-off tokens are not); None scores all tokens.
    `signals` are named numbers, one per completion or one per token (reward, advantages, sampler log-probabilities, …).
    """

    ids: Sequence[int]
    mask: Sequence[int] | None = None
    signals: Mapping[str, Signal] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Concatenated:
    """A model input that is concatenated along `dim` over the prompts of a batch, in their order in the grid, and once for each
    time that a prompt occurs in it. Other dimensions are padded with `fill` to the largest size."""

    dim: int = 0
    fill: int = 0


@dataclass(frozen=True, slots=True)
class PerToken:
    """A model input with one value per token, placed in the grid at the positions of the tokens, `[…,L] -> [B,T]`.

    L is the length of the prompt; if it has a single completion, the values may cover tokens of the completion too. The value
    `completion` fills completion tokens that are not covered, and `padding` fills padding. `sees_ahead` is true if the values
    mark tokens that attend to later tokens (as those of an image do): rows of several sequences then need explicit attention
    masks.
    """

    completion: int = 0
    padding: int = 0
    sees_ahead: bool = False


Join = Concatenated | PerToken


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt and its K ≥ 1 completions.

    A text for language modelling (plain, or a whole conversation) is one completion of an empty prompt.

    inputs          further model inputs for the prompt (pixel values, …): tensors by the name of the forward's argument. The
                    layout's `joins` say how those of several prompts are joined.
    positions       position ids `[L]`, or `[3,L]` (time, height, width), of the first L tokens of the prompt (or of prompt and
                    completion, if there is one completion); None if they are 0, 1, 2, …
    next_position   position id of the next token; those of later tokens count on from it. None: L
    """

    prompt: Sequence[int]
    completions: tuple[Completion, ...]
    inputs: Mapping[str, Any] = field(default_factory=dict)
    positions: Any = None
    next_position: int | None = None

    @property
    def key(self) -> Hashable:
        """Identity of the prompt: equal for two prompts if their token ids and all other inputs are equal."""
        return prompt_key(self.prompt, self.inputs)

    @property
    def tokens(self) -> int:
        """Number of tokens, with the prompt counted once."""
        return len(self.prompt) + sum(map(len, self.completions))

    @property
    def length(self) -> int:
        """Number of tokens of the prompt with its longest completion."""
        return len(self.prompt) + max(map(len, self.completions))


def prompt_key(ids: Sequence[int], inputs: Mapping[str, Any]) -> Hashable:
    """A hashable key that is equal for prompts with the same model inputs: the token ids, and a digest of the other inputs."""
    if not inputs:
        return tuple(ids)
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(inputs):
        value = inputs[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return tuple(ids), digest.digest()


@dataclass(frozen=True, slots=True)
class Segments:
    """Which sequence, and which branch of it, each position of the grid belongs to; `[B,T]` each. Attention masks are made of it.

    sequence   index of the example; −1 is padding
    branch     0 is the shared prompt, 1 … K are the completions
    offset     number of preceding tokens in the prompt and the position's own branch
    """

    sequence: Tensor
    branch: Tensor
    offset: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Segments:
        """The segments with `function` applied to every tensor."""
        return Segments(function(self.sequence), function(self.branch), function(self.offset))


@dataclass(frozen=True, slots=True)
class Spans:
    """Arguments of variable-length attention kernels for a grid: runs of queries, and the keys that each run attends to.

    A run is a sequence, a prompt or a branch; query i of the q queries of a run attends to the first k − q + i + 1 of its k
    keys. The queries are the positions of the flattened grid `[B·T]`, run after run.

    query_starts, key_starts   [R+1] int32: first query and first key of every run (cumulative sequence lengths)
    keys                       [K] int64: index into the flattened grid of every key; None if keys and queries are the same
    longest_query, longest_key upper bounds of the number of queries and keys of a run, powers of two, on the host
    """

    query_starts: Tensor
    key_starts: Tensor
    keys: Tensor | None
    longest_query: int
    longest_key: int

    def map(self, function: Callable[[Tensor], Tensor]) -> Spans:
        """The spans with `function` applied to every tensor."""
        keys = None if self.keys is None else function(self.keys)
        return replace(self, query_starts=function(self.query_starts), key_starts=function(self.key_starts), keys=keys)


class RefusesKeys:
    """Raises ConfigError in code that takes an object for a dict of tensors, as the data loaders of `transformers` return."""

    __slots__ = ()
    no_dict: ClassVar[str]
    """What the object is, and what to do instead."""

    def refuse_keys(self, *_: Any, **__: Any) -> NoReturn:
        raise ConfigError(self.no_dict)

    get = items = keys = setdefault = update = values = refuse_keys


class ListNotDict(RefusesKeys, list):
    """A list in place of the dict that the data loaders of `transformers` return."""

    def __getitem__(self, index: Any) -> Any:
        return self.refuse_keys() if isinstance(index, str) else super().__getitem__(index)

    def pop(self, *index: Any) -> Any:
        return self.refuse_keys() if isinstance(next(iter(index), 0), str) else super().pop(*index)


@dataclass(frozen=True, slots=True)
class Batch(RefusesKeys):
    """The tensors of one forward pass and its losses. Those that algorithms read do not depend on the layout.

    inputs      keyword arguments of the model's forward: `input_ids [B,T]`, `position_ids`, pixel values, …
    predictor   [N,C] flat index into the B·T grid of the position whose hidden state predicts token t
    position    [N,C] flat index of token t itself
    target      [N,C] token ids
    mask        [N,C] float, 1 where the token is scored
    scored      [M] flat indices into N·C of the scored tokens (where `mask` is 1, computed on the host)
    last        [N] flat index into the B·T grid of a completion's last token
    example     [N] index of the example that a completion belongs to
    signals     `[N]` or `[N,C]` float tensors
    weight      [N,C] or None: weights that sum to 1 over the accumulation window and all processes
    segments    sequence and branch of each position, if attention masks are to be built from them; else None
    spans       arguments for variable-length attention, if the model uses it; else None
    copies      [B,T] how many rows of the padded layout each position stands for, 0 for padding; None unless requested
    tokens      number of tokens without padding and repetitions, on the host
    """

    no_dict: ClassVar[str] = (
        "This is a `trl.Batch`, not a dict of input_ids and labels: a row may hold several sequences. For a loss of your own "
        "override `loss(model, batch) -> (loss, metrics)`: `score(model, batch)` returns log-probabilities [N,C], and "
        "`batch.inputs` are the arguments of the model's forward."
    )
    inputs: dict[str, Tensor]
    predictor: Tensor
    position: Tensor
    target: Tensor
    mask: Tensor
    scored: Tensor
    last: Tensor
    example: Tensor
    signals: dict[str, Tensor] = field(default_factory=dict)
    weight: Tensor | None = None
    segments: Segments | None = None
    spans: Spans | None = None
    copies: Tensor | None = None
    tokens: int = 0

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with `function` applied to every tensor in it."""
        return replace(
            self,
            inputs={k: function(v) for k, v in self.inputs.items()},
            signals={k: function(v) for k, v in self.signals.items()},
            weight=None if self.weight is None else function(self.weight),
            segments=None if self.segments is None else self.segments.map(function),
            spans=None if self.spans is None else self.spans.map(function),
            copies=None if self.copies is None else function(self.copies),
            **{name: function(getattr(self, name)) for name in _INDEX_FIELDS},
        )

    def to(self, device: Any) -> Batch:
        """The batch on `device`, by one asynchronous copy of all its tensors."""
        tensors: list[Tensor] = []

        def collect(tensor: Tensor) -> Tensor:
            tensors.append(tensor)
            return tensor

        self.map(collect)
        arrived = iter(sent(tensors, torch.device(device)))
        return self.map(lambda _: next(arrived))

    @property
    def positions(self) -> int:
        """Number of positions of the grid, padding included; for encoder-decoders, of encoder and decoder together."""
        return sum(self.inputs[name].numel() for name in ("input_ids", "decoder_input_ids") if name in self.inputs)

    def masked_out(self) -> Batch:
        """The batch with no token scored."""
        return replace(self, mask=self.mask * 0, scored=self.scored[:0])

    __contains__ = __delitem__ = __getitem__ = __iter__ = __setitem__ = pop = RefusesKeys.refuse_keys


@dataclass(frozen=True, slots=True)
class Experience:
    """A rollout batch as tensors, from which an algorithm computes advantages before training on it.

    rewards   [N] float32, NaN where no reward function applied
    group     [N] index of the prompt of each completion. A group is all samples of a prompt; it is never split over processes
    mask      [N,C] float, 1 for the tokens that were sampled
    signals   `[N]` or `[N,C]`: `old_logprobs` (of the sampler), `ref_logprobs`, `values`, …; an algorithm adds
              `advantages`, `returns`, …
    """

    rewards: Tensor
    group: Tensor
    mask: Tensor
    signals: dict[str, Tensor] = field(default_factory=dict)

    def with_signals(self, **signals: Tensor) -> Experience:
        return replace(self, signals={**self.signals, **signals})


class Learnable(Protocol):
    """The part of a batch that an algorithm's loss reads: nothing of prompts, rows or padding.

    C counts the actions of a completion: its tokens, or the denoising steps of an image.
    """

    @property
    def mask(self) -> Tensor:
        """`[N,C]` float, 1 where the action counts."""
        ...

    @property
    def signals(self) -> Mapping[str, Tensor]:
        """Named numbers, `[N]` or `[N,C]`: the signals of the experience, with those that `advantages` added."""
        ...


class StepBatch(Learnable, Protocol):
    """The batch protocol of `trl.training.step_trainer`; the batch has to be a dataclass.

    weight      in the shape of the losses, or None: weights that sum to 1 over the accumulation window and all processes
    example     [N] index of the item of the micro-batch that a completion belongs to
    tokens      number of tokens that count for throughput, on the host
    positions   number of positions that the forward pass computes, padding included
    """

    weight: Tensor | None
    example: Tensor
    tokens: int

    @property
    def positions(self) -> int: ...

    def masked_out(self) -> Self: ...

    def to(self, device: Any) -> Self: ...


@runtime_checkable
class Algorithm(Protocol):
    """An online algorithm: advantages from rewards, and a loss from advantages. Derive from it to write one.

    Only `advantages` and `loss` have to be defined. Neither may change the algorithm: `after_round` returns the algorithm to
    continue with, and `state_dict` what a checkpoint stores of it.

    needs_reference      the experience needs `ref_logprobs` `[N,C]`, of the reference policy
    needs_values         the experience needs `values` `[N,C]`, and scores need `value`
    needs_entropy        the experience needs `entropy` `[N,C]`, of the policy that samples
    needs_old_logprobs   the experience needs `old_logprobs` `[N,C]` recomputed by the policy in training, instead of the
                         sampler's
    """

    needs_reference: bool = False
    needs_values: bool = False
    needs_entropy: bool = False
    needs_old_logprobs: bool = False

    def advantages(self, experience: Experience) -> Experience:
        """The experience with added signals that say how good each action or completion was."""
        ...

    def loss(self, scores: Scores, batch: Learnable) -> tuple[Tensor, Metrics]:
        """Loss `[N,C]` (or `[N]`) and metrics; `batch.signals` are those of the experience with advantages."""
        ...

    def after_round(self, experience: Experience) -> Self:
        """The algorithm to continue with, called once the advantages of a rollout batch are known.

        `experience` is the rollout batch of all processes, with its advantages.
        """
        return self

    def state_dict(self) -> dict[str, Any]:
        """The state that changes during training: tensors, numbers, texts, lists and dicts."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `state_dict` returned."""
        return


_INDEX_FIELDS = ("predictor", "position", "target", "mask", "scored", "last", "example")


@dataclass(frozen=True, slots=True)
class Scores:
    """The model's log-probabilities and other statistics of a batch's completions; `[N,C]` float32, 0 where the mask is 0.

    logprobs       log π(token t | everything before it), at the requested temperature
    entropy        −Σ_v p_v log p_v of the distribution that predicts token t
    mean_logprob   Σ_v log p_v / V (label smoothing)
    mean_logit     Σ_v z_v / V of the logits z, without gradient
    collision      Σ_v p_v² (WPO), without gradient
    greedy         1 where the token is the most likely one, without gradient
    value          value of the state before token t
    extras         further statistics that a method requests, by name (Q-values, …); `[N,C]` or `[N,C,V]`
    """

    logprobs: Tensor
    entropy: Tensor | None = None
    mean_logprob: Tensor | None = None
    mean_logit: Tensor | None = None
    collision: Tensor | None = None
    greedy: Tensor | None = None
    value: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)
