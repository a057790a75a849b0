"""A trained reward model as a reward function.

    reward = RewardModel("path/to/reward-model")
    reward(["What is 2 + 2?"], ["4."])                     one number per completion

Prompts and completions are texts, conversations, or token ids. They are encoded as they were for training, a prompt is
read once for all its completions, and padding plays no role.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trl.data.encode import INPUTS, EncodeSettings, inputs_of
from trl.data.encoders import Columns, Tokenization, prompt_completion
from trl.data.layout import lay_out
from trl.data.trees import Tree, keep_end
from trl.errors import ModelError
from trl.models.layouts import choose_layout
from trl.models.load import load_model
from trl.models.rewards import prepare_rewards, score_rewards
from trl.models.score import unwrap
from trl.rewards.signature import check_pairs
from trl.types import Batch, Completion, Example, prompt_key
from trl.vision.families import joins_of

TOKENS_PER_BATCH = 16_384

Text = str | Sequence[dict[str, Any]] | Sequence[int]
"""A text, a conversation, or token ids."""


class RewardModel:
    """A sequence classifier with one label as a function `(prompts, completions, **columns) -> rewards`.

    model               the classifier, or its name or folder
    tokenizer           its tokenizer; loaded by the model's name if left out
    max_length          tokens of prompt and completion; the beginning of a longer prompt is cut. None: no limit
    tokens_per_batch    tokens in a forward pass, prompts counted once per completion
    """

    runs_in_trainer = True
    """Its weights are on the trainer's device: it is not sent to another process for a time limit."""

    def __init__(
        self,
        model: str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        max_length: int | None = None,
        tokens_per_batch: int = TOKENS_PER_BATCH,
        **model_kwargs: Any,
    ) -> None:
        if isinstance(model, str):
            model = load_model(model, auto_class=AutoModelForSequenceClassification, **model_kwargs)
        elif model_kwargs:
            raise ModelError(f"{sorted(model_kwargs)} are for loading a model by name, and this one is an object.")
        inner = unwrap(model)
        prepare_rewards(inner)
        self.model = model.eval()
        self.tokenizer = AutoTokenizer.from_pretrained(inner.config._name_or_path) if tokenizer is None else tokenizer
        self.max_length = max_length
        self.tokens_per_batch = tokens_per_batch
        self.layout = choose_layout(inner, multiple_completions=True, measure=score_rewards)
        self.tokenization = tokenization_of(self.tokenizer)
        self.__name__ = Path(inner.config._name_or_path or type(inner).__name__).name

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
        """Rewards of `completions`, each under the prompt at its place.

        Of the columns `inputs` is read: what else the model is given with each prompt, see `trl.types.Example`.
        """
        check_pairs(prompts, completions)
        rewards = [0.0] * len(prompts)
        inputs = inputs_of(columns.get(INPUTS), len(prompts))
        for places, examples in self._batches(self._encode(prompts, completions), inputs):
            pad, joins = self.tokenizer.pad_token_id or 0, joins_of(unwrap(self.model).config)
            batch = lay_out(examples, self.layout, pad_token_id=pad, joins=joins)
            found = self._score(batch.to(unwrap(self.model).device))
            for place, reward in zip(places, found.tolist(), strict=True):
                rewards[place] = reward
        return rewards

    def to(self, device: torch.device) -> None:
        """Move the model to `device`."""
        self.model.to(device)

    def _score(self, batch: Batch) -> Tensor:
        """Rewards `[N]` of the batch's completions."""
        return score_rewards(self.model, batch)

    def _encode(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[Tree]:
        if not prompts:
            return []
        if is_ids(completions[0]):
            trees = [Tree(list(p), [list(c)]) for p, c in zip(prompts, completions, strict=True)]
        else:
            columns = Columns({"prompt": list(prompts), "completion": list(completions)}, range(len(prompts)))
            trees = prompt_completion(columns, self.tokenization)
        return trees if self.max_length is None else [keep_end(tree, self.max_length) for tree in trees]

    def _batches(
        self, trees: Sequence[Tree], inputs: Sequence[Mapping[str, Tensor]]
    ) -> Iterator[tuple[list[int], list[Example]]]:
        """Examples for one forward pass each, and the places of their completions; like lengths together."""
        groups: dict[Hashable, list[int]] = {}
        for place, tree in enumerate(trees):
            groups.setdefault(prompt_key(tree.prompt, inputs[place]), []).append(place)
        places: list[int] = []
        examples: list[Example] = []
        room = self.tokens_per_batch
        for members in sorted(groups.values(), key=lambda members: -max(trees[i].tokens for i in members)):
            size = sum(trees[i].tokens for i in members)
            if examples and size > room:
                yield places, examples
                places, examples, room = [], [], self.tokens_per_batch
            places += members
            answers = tuple(Completion(trees[i].completions[0]) for i in members)
            examples.append(Example(trees[members[0]].prompt, answers, inputs[members[0]]))
            room -= size
        if examples:
            yield places, examples


def tokenization_of(tokenizer: PreTrainedTokenizerBase) -> Tokenization:
    """How prompts and completions become token ids, as they did when the reward model was trained."""
    return Tokenization(tokenizer, EncodeSettings(kind="prompt_completion"))


def is_ids(value: Text) -> bool:
    """Whether `value` is token ids."""
    return not isinstance(value, str) and all(isinstance(token, int) for token in value)
