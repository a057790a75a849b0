"""The protocol of rollout engines: prompts in, samples with their log-probabilities out, both as token ids.

    prompt x ──engine.generate──▶ n samples y ~ π(· | x), each token with log π(y_t | x, y_<t)

Online trainers use engines through this protocol alone: an engine may sample in process, on a server, or return
completions from a fixed table.
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
    """A prompt with images before its image tokens are expanded, for samplers that process images themselves.

    ids      token ids with one placeholder per image, where `Prompt.ids` has all tokens of the image
    images   in RGB and within the trainer's size limits, in the order of their placeholders
    """

    ids: Sequence[int]
    images: Sequence[Image]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt to sample completions for: unpadded token ids (those of the encoder, in an encoder-decoder).

    `inputs`, `positions` and `next_position` are as in `trl.types.Example`: further model inputs (pixel values, …) and
    position ids. `max_new_tokens` limits this prompt's completions further than the sampling parameters do. `unexpanded` is
    the same prompt for engines that turn images into pixel values themselves.
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
        """Identity of the prompt: equal for two prompts if their token ids and all other inputs are equal."""
        return prompt_key(self.ids, self.inputs)

    @property
    def shift(self) -> int:
        """What is added to the index of a token after the prompt to get its position id."""
        return 0 if self.next_position is None else self.next_position - len(self.ids)


@dataclass(frozen=True, slots=True)
class Rollout:
    """A sampled completion, on the host.

    ids            the sampled tokens, with the stop token (or the tokens of the stop string) that ended it, if any
    logprobs       one per token: log-softmax of logits / temperature, before any truncation, penalty or ban
    finish_reason  "stop": a stop token or stop string; "length": the limit on new tokens, or the model's context;
                   "abort": ended from outside; "error": the engine failed
    mask           1 for tokens that the policy sampled, 0 for tokens that an environment wrote; None: all are sampled
    version        the optimizer step whose weights were sampled from; None: unknown
    info           further values of this sample, for reward functions and metrics
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
    """Samples completions. To write an engine, derive from this class and define `generate` and `sync`.

    is_policy   True if the engine samples in process from the model in training itself: it then supports every model, and
                its log-probabilities are the trainer's own
    """

    is_policy: bool = False

    @abstractmethod
    def generate(self, prompts: Sequence[Prompt], params: SamplingParams, n: int) -> list[list[Rollout]]:
        """n rollouts of each prompt: `result[p][i]` is sample i of `prompts[p]`."""
        ...

    @abstractmethod
    def sync(self, model: nn.Module, step: int) -> None:
        """Take over the weights that `model` has at optimizer step `step`, for all samples that follow.

        Called before every rollout batch and every evaluation batch, on all processes. An engine that has to transfer weights
        does so once per step.
        """
        ...

    def exact_logprobs(self, params: SamplingParams) -> bool:
        """True if `Rollout.logprobs` are, with these parameters, those that `Rollout` defines; else the trainer recomputes
        them."""
        return True

    def take_metrics(self) -> dict[str, float]:
        """The engine's metrics since the last call, by name, for the trainer's log."""
        return {}

    def close(self) -> None:
        """Release connections, processes and memory of the engine."""
        return
