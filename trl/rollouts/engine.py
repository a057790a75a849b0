"""What a rollout engine is: prompts in, samples with their log-probabilities out, tokens on both sides.

    prompt x ──engine.generate──▶ n samples y ~ π(· | x), each token with log π(y_t | x, y_<t)

An online trainer sees engines through this protocol alone, so that sampling in process, on a server or from a
fixed table are three objects and no branch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from trl.types import Example, prompt_key

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import nn

    from trl.rollouts.sampling import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Unexpanded:
    """A prompt with images as samplers take it that process images themselves.

    ids      with one place for each image, where `Prompt.ids` has all tokens of it
    images   in RGB and within the trainer's limits, in the order of their places
    """

    ids: Sequence[int]
    images: Sequence[Image]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a policy continues: token ids (of the encoder, in an encoder-decoder), never padded.

    `inputs`, `positions` and `next_position` are those of a `trl.types.Example`: what else the model reads with the prompt
    (pixel values, …), and where its tokens stand. `max_new_tokens` is a limit of this prompt's own, below the one of the
    sampling parameters. `unexpanded` is the same prompt for engines that make pixel values of images themselves.
    """

    ids: Sequence[int]
    inputs: Mapping[str, Any] = field(default_factory=dict)
    max_new_tokens: int | None = None
    positions: Any = None
    next_position: int | None = None
    unexpanded: Unexpanded | None = None

    @classmethod
    def of(cls, example: Example) -> Prompt:
        """The prompt of an example."""
        return cls(example.prompt, example.inputs, positions=example.positions, next_position=example.next_position)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def key(self) -> Hashable:
        """Identity of the prompt: equal where token ids and all other inputs are."""
        return prompt_key(self.ids, self.inputs)

    @property
    def shift(self) -> int:
        """What is added to a token's number to get its position, from the first one after the prompt on."""
        return 0 if self.next_position is None else self.next_position - len(self.ids)


@dataclass(frozen=True, slots=True)
class Rollout:
    """A sampled continuation, on the host.

    ids            the sampled tokens, with the stop token (or the tokens of the stop string) where one was reached
    logprobs       one per token: log-softmax of logits / temperature, before any truncation, penalty or ban
    finish_reason  "stop": a stop token or stop string; "length": the limit on new tokens, or the model's context;
                   "abort": ended from outside; "error": the engine failed
    mask           1 for the tokens that the policy sampled, 0 for those that an environment wrote; None: all are sampled
    version        the optimizer step whose weights sampled; None: not known
    info           what else the engine tells of this sample, for reward functions and metrics
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    mask: tuple[int, ...] | None = None
    version: int | None = None
    info: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples completions. One's own derives from it, with `generate` and `sync`.

    is_policy   whether samples come from the model in training itself, in process: any model can then be sampled from,
                and log-probabilities are the trainer's own
    """

    is_policy: bool = False

    @abstractmethod
    def generate(self, prompts: Sequence[Prompt], params: SamplingParams, n: int) -> list[list[Rollout]]:
        """n rollouts of each prompt: `result[p][i]` is sample i of `prompts[p]`."""
        ...

    @abstractmethod
    def sync(self, model: nn.Module, step: int) -> None:
        """Later samples come from the weights of `model` as they are at optimizer step `step`.

        Called before every rollout batch and every evaluation batch, on all processes: an engine that is sent weights
        sends them once per step.
        """
        ...

    def exact_logprobs(self, params: SamplingParams) -> bool:
        """Whether `Rollout.logprobs` are, for these parameters, what it says; else the trainer computes them again."""
        return True

    def take_metrics(self) -> dict[str, float]:
        """What the engine measured since the last call, by name, for the trainer's log."""
        return {}

    def close(self) -> None:
        """Give back what the engine holds: connections, processes, memory."""
        return
