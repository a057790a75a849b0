"""A text classifier as a reward function: the log-odds of the label to reward.

    r = log p₊ − log (1 − p₊) = z₊ − log Σ_{j ≠ +} exp z_j                from the logits z of a text

So r > 0 if the label is more likely than all others together; unlike p₊, r does not saturate when the classifier is
certain. With two labels r = z₊ − z₋; with one label, and for multi-label classifiers, r = z₊.

    reward = ClassifierReward("lvwerra/distilbert-imdb")
    reward(["This film"], [" was a joy from start to finish."])
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trl.errors import ConfigError, ModelError, unknown
from trl.models.load import explain_missing_tokenizer
from trl.models.not_found import explain_missing
from trl.rewards.signature import check_pairs

NO_LIMIT = 10**9
"""A tokenizer without a maximum length has a `model_max_length` above this."""

Text = str | Sequence[Mapping[str, Any]]
"""A text, or the messages of a conversation."""


class ClassifierReward:
    """A sequence classifier with any labels as a function `(prompts, completions, **columns) -> rewards`.

    model            the classifier, or its name or folder
    tokenizer        its tokenizer; None: loaded by the model's name
    positive_label   the label to reward, by name or number. None: the label that is called positive
    batch_size       texts per forward pass

    For texts, prompt and completion are classified together; for conversations, the contents of the completion alone. The
    classifier has its own tokenizer and vocabulary. Texts longer than its maximum length are cut at the beginning.
    """

    runs_in_trainer = True
    """Keep the function in the trainer's process even with a time limit, since its weights are on the trainer's device."""

    def __init__(
        self,
        model: str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        positive_label: str | int | None = None,
        batch_size: int = 64,
    ) -> None:
        self.places_itself = isinstance(model, str)
        self.model = (load_classifier(model) if isinstance(model, str) else model).eval()
        config = self.model.config
        self.tokenizer = _tokenizer_of(config._name_or_path) if tokenizer is None else tokenizer
        self.tokenizer.truncation_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if config.pad_token_id is None:
            config.pad_token_id = self.tokenizer.pad_token_id
        self.label = find_label(config.id2label, positive_label)
        self.batch_size = batch_size
        self.__name__ = Path(config._name_or_path or type(self.model).__name__).name

    @property
    def label_name(self) -> str:
        return self.model.config.id2label[self.label]

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
        """Log-odds of the label for each completion with its prompt."""
        check_pairs(prompts, completions)
        if self.places_itself:
            self.model.to(PartialState().device)
        texts = [_text(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        batches = [texts[i:][: self.batch_size] for i in range(0, len(texts), self.batch_size)]
        return [reward for batch in batches for reward in self._log_odds(batch).tolist()]

    def _log_odds(self, texts: Sequence[str]) -> Tensor:
        """Log-odds `[N]` float32 of the label for each text."""
        limit = self.tokenizer.model_max_length
        cut = {"truncation": True, "max_length": limit} if limit < NO_LIMIT else {}
        inputs = self.tokenizer(list(texts), padding=True, padding_side="right", return_tensors="pt", **cut)
        logits = self.model(**inputs.to(self.model.device)).logits.float()
        if self.model.config.problem_type == "multi_label_classification":
            return logits[:, self.label]
        return log_odds(logits, self.label)


def log_odds(logits: Tensor, label: int) -> Tensor:
    """log p − log(1 − p) of a label, `[N]` from logits `[N,L]`; with a single label, its logit."""
    if logits.shape[1] == 1:
        return logits[:, 0]
    others = [j for j in range(logits.shape[1]) if j != label]
    return logits[:, label] - logits[:, others].logsumexp(1)


def load_classifier(name: str) -> PreTrainedModel:
    """Load a sequence classifier by hub name or folder. Raises ModelError for a model without a trained head."""
    with explain_missing(name):
        model, report = AutoModelForSequenceClassification.from_pretrained(name, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{name!r} is not a trained classifier: it has no {missing[0]}, so that its rewards would be random. Give a model "
            "that was trained to classify texts."
        )
    return model


def _tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    with explain_missing_tokenizer(name):
        return AutoTokenizer.from_pretrained(name)


def find_label(labels: Mapping[int, str], wanted: str | int | None = None) -> int:
    """The index of the label `wanted` (name or number); if it is None, of the only label that is called positive.

    Raises ConfigError if there is none, or several.
    """
    if wanted is not None:
        known = {str(key).lower(): number for number, name in labels.items() for key in (number, name)}
        if str(wanted).lower() not in known:
            raise ConfigError(unknown("positive_label", str(wanted), labels.values()))
        return known[str(wanted).lower()]
    if len(labels) == 1:
        return next(iter(labels))
    found = [number for number, name in labels.items() if {"positive", "pos"} & set(re.findall("[a-z]+", name.lower()))]
    if len(found) != 1:
        raise ConfigError(
            f"The classifier's labels are {', '.join(map(repr, labels.values()))}, and "
            f"{'several' if found else 'none'} of them are called positive: give positive_label, the one to reward, as in "
            "ClassifierReward(model, positive_label=...)."
        )
    return found[0]


def _text(prompt: Text, completion: Text) -> str:
    if isinstance(completion, str) and isinstance(prompt, str):
        return prompt + completion
    return "\n".join(str(message["content"]) for message in completion)
