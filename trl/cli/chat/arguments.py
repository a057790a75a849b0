"""Options of `trl chat`, each documented once; what a conversation may change about itself is a part of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from trl.option_bounds import check_bounds


@dataclass
class Generation:
    """How an answer is made: what `set` changes while one talks."""

    system_prompt: str | None = None
    """What the model is told before the conversation."""

    max_new_tokens: int = 512
    """Tokens of an answer, at most."""

    do_sample: bool = True
    """Draw tokens at random. False: take the most likely one."""

    temperature: float | None = None
    """Divides the logits; 0 takes the most likely token. None: as the model's generation config says, or 1."""

    top_k: int | None = None
    """Draw among this many most likely tokens; 0 for all. None: as the model's generation config says."""

    top_p: float | None = None
    """Draw from the smallest set of most likely tokens whose probabilities reach this sum. None: as the model says."""

    min_p: float | None = None
    """Draw only tokens at least this fraction as likely as the most likely one. None: as the model says."""

    repetition_penalty: float | None = None
    """Lowers the logits of tokens that were seen before, if above 1. None: as the model says."""

    stop: list[str] | None = None
    """Texts that end an answer; they are not shown."""

    seed: int | None = None
    """The same seed and the same words give the same answers. None: another answer every time."""

    def __post_init__(self) -> None:
        check_bounds(self)

    @property
    def greedy(self) -> bool:
        return not self.do_sample or self.temperature == 0


@dataclass
class ChatArguments(Generation):
    """All options of the command beside those that say which model."""

    ALIASES: ClassVar[dict[str, str]] = {"adapter": "adapter_name_or_path", "eos_tokens": "stop"}

    server: str | None = None
    """Talk to the OpenAI-compatible server at this URL; nothing is loaded here. `model_name_or_path` is then the name
    of one of its models (its first, if left out), and the key that it may want is read from OPENAI_API_KEY."""

    server_timeout: float = 300.0
    """Seconds to wait for the server to say something."""

    device: str = "auto"
    """"cpu", "cuda", "cuda:1", …; "auto": all accelerators there are, or the processor."""

    chat_template_kwargs: dict[str, Any] | None = None
    """What the chat template is given besides the messages, such as {"enable_thinking": false}."""

    user: str | None = None
    """What to call you. None: the name that the system knows."""

    examples_path: str | None = None
    """YAML file of messages by name, for the command `example NAME`."""

    save_folder: str = "chat_history"
    """Where `save` puts conversations."""


def generation_of(arguments: ChatArguments) -> Generation:
    """The part of the options that makes answers."""
    return Generation(**{field.name: getattr(arguments, field.name) for field in fields(Generation)})


EXAMPLES: Mapping[str, str] = {
    "explain": "Explain to a curious twelve-year-old why the sky is blue by day and red at sunset.",
    "code": "Write a Python function that merges two sorted lists into one sorted list, and say how fast it is.",
    "maths": "A train covers 180 km in 2 hours 15 minutes. What is its mean speed in km/h? Show each step.",
    "story": "Tell a story of five sentences about a lighthouse keeper who collects sounds.",
    "plan": "Plan a dinner for four in one hour, with a shopping list. One guest eats no meat.",
    "translate": "Say “The early bird catches the worm” in German, Spanish and Japanese, and what each says literally.",
}
"""Messages that come along, by name."""
