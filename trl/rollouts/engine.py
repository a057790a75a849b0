"""What a rollout engine is: prompts in, samples with their log-probabilities out, tokens on both sides.

    prompt x ──engine.generate──▶ n samples y ~ π(· | x), each token with log π(y_t | x, y_<t)

An online trainer sees engines through this protocol alone, so that sampling in process, on a server or from a
fixed table are three objects and no branch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import nn

    from trl.rollouts.sampling import SamplingParams

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a policy continues: token ids (of the encoder, in an encoder-decoder), never padded.

    `inputs` holds what else the model reads with the prompt (pixel values, …), each with a batch dimension of one.
    `max_new_tokens` is a limit of this prompt's own, below the one of the sampling parameters.
    """

    ids: Sequence[int]
    inputs: Mapping[str, Any] = field(default_factory=dict)
    max_new_tokens: int | None = None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Rollout:
    """A sampled continuation, on the host.

    ids            the sampled tokens, with the stop token (or the tokens of the stop string) where one was reached
    logprobs       one per token: log-softmax of logits / temperature, before any truncation, penalty or ban
    finish_reason  "stop": a stop token or stop string; "length": the limit on new tokens, or the model's context
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason

    def __len__(self) -> int:
        return len(self.ids)


class RolloutEngine(Protocol):
    """Samples completions. `sync` makes later samples come from the weights of `model` as they are at `step`."""

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams, n: int) -> list[list[Rollout]]:
        """n rollouts of each prompt: `result[p][i]` is sample i of `prompts[p]`."""
        ...

    def sync(self, model: nn.Module, step: int) -> None: ...
