"""The nouns of the library: what travels from rows to loss.

    row ──encode──▶ Example ──lay out──▶ Batch ──score──▶ Scores ──algorithm──▶ loss per token

One glossary everywhere: B rows, T positions of a row, N completions, C tokens of the longest completion,
K completions of one prompt, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, Self, runtime_checkable

from trl.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

Signal = float | Sequence[float]
Metrics = dict[str, "Tensor"]
"""Named measurements of one batch. `[N,C]`: averaged over the mask. `[N]`: averaged over completions, NaN left out."""


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
class Example:
    """One prompt and the K ≥ 1 completions that hang from it.

    A text to model (plain or a whole chat) is one completion on an empty prompt. `inputs` holds what else the model
    reads with the prompt (pixel values, …).
    """

    prompt: Sequence[int]
    completions: tuple[Completion, ...]
    inputs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> Hashable:
        """Equal for examples whose prompts are the same to the model."""
        return tuple(self.prompt)

    @property
    def tokens(self) -> int:
        """Tokens with the prompt counted once."""
        return len(self.prompt) + sum(map(len, self.completions))

    @property
    def length(self) -> int:
        """Tokens of the longest prompt-and-completion."""
        return len(self.prompt) + max(map(len, self.completions))


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
    tree        (tree [B,T], branch [B,T]) or None: which example and which of its branches a position belongs to
                (branch 0 is the shared prompt; tree −1 is padding). Attention is built from it.
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
    tree: tuple[Tensor, Tensor] | None = None
    tokens: int = 0

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with `function` applied to every tensor in it."""
        return replace(
            self,
            inputs={k: function(v) for k, v in self.inputs.items()},
            signals={k: function(v) for k, v in self.signals.items()},
            weight=None if self.weight is None else function(self.weight),
            tree=None if self.tree is None else (function(self.tree[0]), function(self.tree[1])),
            **{name: function(getattr(self, name)) for name in _INDEX_FIELDS},
        )

    def to(self, device: Any) -> Batch:
        return self.map(lambda t: t.to(device, non_blocking=True))

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
    collision      Σ_v p_v² (WPO), without gradient
    greedy         1 where the token is the most likely one, without gradient
    value          value of the state before token t
    extras         what else a method asks for, by name (Q-values, …); `[N,C]` or `[N,C,V]`
    """

    logprobs: Tensor
    entropy: Tensor | None = None
    mean_logprob: Tensor | None = None
    collision: Tensor | None = None
    greedy: Tensor | None = None
    value: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)
