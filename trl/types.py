"""The nouns of the library: what travels from rows to loss.

    row ──encode──▶ Example ──lay out──▶ Batch ──score──▶ Scores ──algorithm──▶ loss per token

One glossary everywhere: B rows, T positions of a row, N completions, C tokens of the longest completion,
K completions of one prompt, V vocabulary, H hidden size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from trl.errors import ConfigError
from trl.transfer import sent

Signal = float | Sequence[float]
Metrics = dict[str, Tensor]
"""Named measurements of one batch, NaN left out. `[N,C]`: averaged over the mask. `[N]`: averaged over completions."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A continuation of a prompt, on the host.

    `mask[t]` is 1 where token t is scored (tool output, user turns and cut-off tokens are not); None scores all.
    `signals` are named numbers, per sequence or one per token (reward, advantages, sampler log-probabilities, …).
    """

    ids: Sequence[int]
    mask: Sequence[int] | None = None
    signals: Mapping[str, Signal] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Concatenated:
    """How an input of several prompts is joined: along `dim`, in the order in which the prompts lie in the grid, once per
    occurrence of a prompt. Other dimensions are filled up with `fill` to the largest."""

    dim: int = 0
    fill: int = 0


@dataclass(frozen=True, slots=True)
class PerToken:
    """How an input with one value per token is joined: it lies in the grid as the tokens do, `[…,L] -> [B,T]`.

    L is the prompt's length; of a prompt with one completion the values may reach into the completion. `completion` stands
    at the tokens of completions that are not covered, `padding` elsewhere. `sees_ahead` says that the values tell tokens that
    see others behind them, so that models have to be given masks for rows of several sequences.
    """

    completion: int = 0
    padding: int = 0
    sees_ahead: bool = False


Join = Concatenated | PerToken


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt and the K ≥ 1 completions that hang from it.

    A text to model (plain or a whole chat) is one completion on an empty prompt.

    inputs          what else the model reads with the prompt: tensors by the name of the forward's argument (pixel values,
                    …). How those of several prompts are joined is said by the layout's `joins`.
    positions       `[L]`, or `[3,L]` (time, height, width), of the first L tokens of the prompt, or with one completion of
                    prompt and completion, where they are not 0, 1, 2, …
    next_position   the position after those; the tokens that follow count on from it. None: L
    """

    prompt: Sequence[int]
    completions: tuple[Completion, ...]
    inputs: Mapping[str, Any] = field(default_factory=dict)
    positions: Any = None
    next_position: int | None = None

    @property
    def key(self) -> Hashable:
        """Identity of the prompt: equal where token ids and all other inputs are."""
        return prompt_key(self.prompt, self.inputs)

    @property
    def tokens(self) -> int:
        """Tokens with the prompt counted once."""
        return len(self.prompt) + sum(map(len, self.completions))

    @property
    def length(self) -> int:
        """Tokens of the longest prompt-and-completion."""
        return len(self.prompt) + max(map(len, self.completions))


def prompt_key(ids: Sequence[int], inputs: Mapping[str, Any]) -> Hashable:
    """What two prompts have in common that the model cannot tell apart: token ids, and a digest of the other inputs."""
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
    """Which sequence and which of its branches a position of the grid belongs to, `[B,T]` each. Attention is built from it.

    sequence   number of the example; −1 is padding
    branch     0 is the shared prompt, 1 … K are the completions
    offset     number of tokens that come before in the same prompt and branch
    """

    sequence: Tensor
    branch: Tensor
    offset: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Segments:
        """The segments with `function` applied to every tensor."""
        return Segments(function(self.sequence), function(self.branch), function(self.offset))


@dataclass(frozen=True, slots=True)
class Spans:
    """The grid as calls of variable-length attention see it: runs of queries, and the keys that each run attends to.

    A run is a sequence, a prompt or a branch; query i of q sees the first k − q + i + 1 of its run's k keys. Positions of
    the flattened grid `[B·T]` are the queries, run after run.

    query_starts, key_starts   [R+1] int32: where runs begin among queries and among keys
    keys                       [K] int64: position in the grid of every key, or None where keys are the queries
    longest_query, longest_key at least the most of a run, a power of two, on the host
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


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward pass needs. Algorithms see no trace of how it was laid out.

    inputs      keyword arguments of the model's forward: `input_ids [B,T]`, `position_ids`, pixel values, …
    predictor   [N,C] flat index into the B·T grid of the position whose hidden state predicts token t
    position    [N,C] flat index of token t itself
    target      [N,C] token ids
    mask        [N,C] float, 1 where the token is scored
    scored      [M] flat indices into N·C of the scored tokens (the ones of `mask`, known on the host)
    last        [N] flat index into the B·T grid of a completion's last token
    example     [N] which example a completion hangs from
    signals     `[N]` or `[N,C]` float tensors
    weight      [N,C] or None: weights that sum to 1 over the accumulation window and all processes
    segments    which sequence and branch a position belongs to, where attention is to be built from it; or None
    spans       the same for attention of variable length, where the model has it; or None
    copies      [B,T] how many rows of the padded layout a position stands for, 0 for padding; where it is asked for, or None
    tokens      tokens that are neither padding nor repeated, on the host
    """

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
        """The batch on `device`, by one copy that the host does not wait for."""
        tensors: list[Tensor] = []

        def collect(tensor: Tensor) -> Tensor:
            tensors.append(tensor)
            return tensor

        self.map(collect)
        arrived = iter(sent(tensors, torch.device(device)))
        return self.map(lambda _: next(arrived))

    @property
    def positions(self) -> int:
        """Positions of the grid, padding included; encoder and decoder together."""
        return sum(self.inputs[name].numel() for name in ("input_ids", "decoder_input_ids") if name in self.inputs)

    def masked_out(self) -> Batch:
        """The batch with no token scored."""
        return replace(self, mask=self.mask * 0, scored=self.scored[:0])

    def __getitem__(self, *_: Any) -> NoReturn:
        """Raises ConfigError: what a loss that was written for batches of `transformers` runs into."""
        raise ConfigError(
            "This is a `trl.Batch`, and not a dict of input_ids and labels: a row may hold several sequences. For a loss of "
            "your own override `loss(model, batch) -> (loss, metrics)`: `score(model, batch)` gives log-probabilities [N,C], "
            "and `batch.inputs` are the arguments of the model's forward."
        )

    keys = get = pop = __getitem__


@dataclass(frozen=True, slots=True)
class Experience:
    """A rollout batch, before anything is learned from it: what an algorithm computes advantages from.

    rewards   [N] float32, NaN where no reward function applied
    group     [N] which prompt a completion belongs to: its group is all samples of that prompt, whole on one process
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
    """What an algorithm reads of the batch that a loss is asked of: nothing of prompts, rows or padding.

    C counts the actions of a completion: its tokens, or the steps by which a picture was denoised.
    """

    @property
    def mask(self) -> Tensor:
        """`[N,C]` float, 1 where the action counts."""
        ...

    @property
    def signals(self) -> Mapping[str, Tensor]:
        """Named numbers, `[N]` or `[N,C]`: what the experience had, and what `advantages` added."""
        ...


class StepBatch(Learnable, Protocol):
    """What the step machine asks of a batch, which is a dataclass: see `trl.training.step_trainer`.

    weight      in the shape of the losses, or None: sums to 1 over the window and all processes
    example     [N] which item of the micro-batch a completion belongs to
    tokens      what the batch counts for in throughput, on the host
    positions   what its forward pass computes, padding included
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
    """An online algorithm: advantages from rewards, and a loss from advantages. One's own derives from it.

    Only `advantages` and `loss` have to be written. Neither changes the algorithm: `after_round` gives the one that goes
    on, and `state_dict` what a checkpoint has to hold of it.

    needs_reference      whether the experience is to have `ref_logprobs` `[N,C]`, of the policy as it was given
    needs_values         … `values` `[N,C]`, and scores their `value`
    needs_entropy        … `entropy` `[N,C]`, of the policy that samples
    needs_old_logprobs   … `old_logprobs` `[N,C]` that the policy in training gives, also where the sampler gave its own
    """

    needs_reference: bool = False
    needs_values: bool = False
    needs_entropy: bool = False
    needs_old_logprobs: bool = False

    def advantages(self, experience: Experience) -> Experience:
        """The experience with signals that say how good each action, or completion, was."""
        ...

    def loss(self, scores: Scores, batch: Learnable) -> tuple[Tensor, Metrics]:
        """Loss `[N,C]` (or `[N]`) and metrics; `batch.signals` are those of the experience."""
        ...

    def after_round(self, experience: Experience) -> Self:
        """The algorithm once this rollout batch, of all processes, with its advantages, is to be learned from."""
        return self

    def state_dict(self) -> dict[str, Any]:
        """What changes while training: tensors, numbers, texts, lists and dicts."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state that `state_dict` gave."""
        return


_INDEX_FIELDS = ("predictor", "position", "target", "mask", "scored", "last", "example")


@dataclass(frozen=True, slots=True)
class Scores:
    """What the model finds of a batch's completions; `[N,C]` float32, zero where the mask is.

    logprobs       log π(token t | everything before it), at the temperature asked for
    entropy        −Σ_v p_v log p_v of the distribution that predicts token t
    mean_logprob   Σ_v log p_v / V (label smoothing)
    mean_logit     Σ_v z_v / V of the logits z, without gradient
    collision      Σ_v p_v² (WPO), without gradient
    greedy         1 where the token is the most likely one, without gradient
    value          value of the state before token t
    extras         what else a method asks for, by name (Q-values, …); `[N,C]` or `[N,C,V]`
    """

    logprobs: Tensor
    entropy: Tensor | None = None
    mean_logprob: Tensor | None = None
    mean_logit: Tensor | None = None
    collision: Tensor | None = None
    greedy: Tensor | None = None
    value: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)
