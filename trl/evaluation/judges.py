"""Judge which of two completions is better: by rewards, or by a chat model on an OpenAI-compatible server.

The server is asked twice, with the completions in both orders. If it prefers the same position both times, and so not
the same text, the result is a tie. "Judging LLM-as-a-judge", arXiv:2306.05685.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import Any

from trl.data.messages import said, under_roles
from trl.errors import ConfigError
from trl.evaluation.statistics import outcome
from trl.hub import outside_the_hub
from trl.rewards.call import call_rewards
from trl.rewards.reward import Samples, make_rewards

Content = Any
Judge = Callable[[Sequence[Content], Sequence[Content], Sequence[Content]], list[float]]
"""`judge(prompts, ours, theirs)`: for each row, 1 if ours is better, ½ for a tie, 0 if theirs is better."""

QUESTION = (
    "Which answer to the request is more helpful, correct and harmless? Reply with A or B alone.\n\n"
    "[Request]\n{prompt}\n\n[Answer A]\n{first}\n\n[Answer B]\n{second}"
)


class RewardJudge:
    """The completion with the higher sum of rewards wins."""

    def __init__(self, reward_funcs: Sequence[Any]) -> None:
        self.rewards = make_rewards(list(reward_funcs))

    def __call__(
        self,
        prompts: Sequence[Content],
        ours: Sequence[Content],
        theirs: Sequence[Content],
        **columns: Sequence[Any],
    ) -> list[float]:
        scores = [self.score(prompts, completions, **columns) for completions in (ours, theirs)]
        return [outcome(a, b) for a, b in zip(*scores, strict=True)]

    def score(
        self, prompts: Sequence[Content], completions: Sequence[Content], **columns: Sequence[Any]
    ) -> list[float]:
        """The sum of the rewards of each completion. A function that does not apply to a completion counts 0."""
        values = call_rewards(self.rewards, Samples(prompts, completions, columns)).values
        return values.nan_to_num(0.0).sum(1).tolist()


class ServerJudge:
    """A chat model on an OpenAI-compatible server judges. The API key is read from OPENAI_API_KEY, if set."""

    def __init__(self, url: str, model: str | None = None) -> None:
        from huggingface_hub import InferenceClient

        self.client = InferenceClient(base_url=url.rstrip("/"), api_key=os.environ.get("OPENAI_API_KEY") or "none")
        self.model = model

    def __call__(self, prompts: Sequence[Content], ours: Sequence[Content], theirs: Sequence[Content]) -> list[float]:
        with outside_the_hub():
            return [self._compare(*row) for row in zip(prompts, ours, theirs, strict=True)]

    def _compare(self, prompt: Content, ours: Content, theirs: Content) -> float:
        straight, turned = self._picks_first(prompt, ours, theirs), self._picks_first(prompt, theirs, ours)
        return 0.5 if straight == turned else float(straight)

    def _picks_first(self, prompt: Content, first: Content, second: Content) -> bool:
        """True if the judge prefers `first`. Raises ConfigError if it answers neither A nor B."""
        text = QUESTION.format(prompt=plain(prompt), first=plain(first), second=plain(second))
        told = self.client.chat_completion(
            [{"role": "user", "content": text}], model=self.model, max_tokens=8, temperature=0.0
        )
        answer = told.choices[0].message.content or ""
        word = re.match(r"\W*([AB])\b", answer)
        if word is None:
            raise ConfigError(f"The judge answered {answer!r:.80} instead of A or B: use another judge_model.")
        return word[1] == "A"


def plain(content: Content) -> str:
    """A text as it is; the content of a single message; several messages, each below its role."""
    return said(content[0]) if not isinstance(content, str) and len(content) == 1 else under_roles(content)
