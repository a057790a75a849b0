"""Options of `trl chat`; those in `Generation` can also be changed with `set` during the conversation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from trl.option_bounds import check_bounds


@dataclass
class Generation:
    """How answers are generated; `set` changes these options during the conversation."""

    system_prompt: str | None = None
    """System prompt at the start of the conversation."""

    max_new_tokens: int = 512
    """Maximum number of tokens per answer."""

    do_sample: bool = True
    """Sample tokens at random. False: greedy decoding."""

    temperature: float | None = None
    """Divides the logits; 0 is greedy decoding. None: the value in the model's generation config, or 1."""

    top_k: int | None = None
    """Sample from this many most likely tokens; 0 for all. None: the value in the model's generation config."""

    top_p: float | None = None
    """Sample from the smallest set of most likely tokens whose probabilities reach this sum. None: the value in the
    model's generation config."""

    min_p: float | None = None
    """Sample only tokens at least this fraction as likely as the most likely one. None: the value in the model's
    generation config."""

    repetition_penalty: float | None = None
    """Values above 1 lower the logits of tokens that already occurred. None: the value in the model's generation
    config."""

    stop: list[str] | None = None
    """Texts that end an answer; they are not shown."""

    seed: int | None = None
    """Random seed: the same seed and messages give the same answers. None: a different answer every time."""

    def __post_init__(self) -> None:
        check_bounds(self)

    @property
    def greedy(self) -> bool:
        return not self.do_sample or self.temperature == 0


@dataclass
class ChatArguments(Generation):
    """Options of `trl chat`, except those that choose the model."""

    ALIASES: ClassVar[dict[str, str]] = {"adapter": "adapter_name_or_path", "eos_tokens": "stop"}

    server: str | None = None
    """Talk to the OpenAI-compatible server at this URL instead of loading a model. `model_name_or_path` is then the
    name of one of its models (by default the first), and the API key is read from OPENAI_API_KEY."""

    server_timeout: float = 300.0
    """Seconds to wait for a response of the server."""

    device: str = "auto"
    """"cpu", "cuda", "cuda:1", …; "auto": all available accelerators, else the CPU."""

    chat_template_kwargs: dict[str, Any] | None = None
    """Arguments for the chat template besides the messages, such as {"enable_thinking": false}."""

    user: str | None = None
    """Your name in the prompt. None: your user name on this machine."""

    examples_path: str | None = None
    """YAML file of messages by name, for the command `example NAME`."""

    save_folder: str = "chat_history"
    """Folder in which `save` writes conversations."""


def generation_of(arguments: ChatArguments) -> Generation:
    """The generation options among all options of `trl chat`."""
    return Generation(**{field.name: getattr(arguments, field.name) for field in fields(Generation)})


EXAMPLES: Mapping[str, str] = {
    "explain": "Explain to a curious twelve-year-old why the sky is blue by day and red at sunset.",
    "code": "Write a Python function that merges two sorted lists into one sorted list, and say how fast it is.",
    "maths": "A train covers 180 km in 2 hours 15 minutes. What is its mean speed in km/h? Show each step.",
    "story": "Tell a story of five sentences about a lighthouse keeper who collects sounds.",
    "plan": "Plan a dinner for four in one hour, with a shopping list. One guest eats no meat.",
    "translate": "Say “The early bird catches the worm” in German, Spanish and Japanese, and what each says literally.",
}
"""Built-in example messages by name."""
