"""Row kinds, recognised by a dataset's columns, and conversions between row formats.

Each text of a row is either standard (a string) or conversational (a list of messages, `{"role": …, "content": …}` or, in
the older form, `{"from": …, "value": …}`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, TypeVar

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from trl.data.messages import to_chatml
from trl.data.prepacked import PACKED_COLUMNS
from trl.data.trees import shared_length
from trl.errors import DataError, suggest
from trl.imports import is_available

AnyDataset = TypeVar("AnyDataset", Dataset, DatasetDict, IterableDataset, IterableDatasetDict)
Row = Mapping[str, Any]

KINDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "tokenized_preference": (("input_ids_chosen", "input_ids_rejected"), ("chosen_ids", "rejected_ids")),
    "tokenized": (("input_ids",),),
    "dialogue": (("dialogue",),),
    "stepwise": (("prompt", "completions", "labels"),),
    "unpaired_preference": (("prompt", "completion", "label"),),
    "preference": (("chosen", "rejected"),),
    "prompt_completion": (("prompt", "completion"),),
    "language_modeling": (("text",), ("messages",), ("conversations",)),
    "prompt_only": (("prompt",),),
}
"""Row kind → alternative sets of columns, of which a dataset needs one. The first kind that fits is used, so that more specific
kinds come first."""

TEXT = "text"
"""The default column for texts."""

_CHAT_OPTIONS = ("tools", "functions", "chat_template_kwargs")
_PAIR_OF_MASKS = ("attention_mask_chosen", "attention_mask_rejected")
COLUMNS_READ: dict[str, tuple[str, ...]] = {
    "tokenized_preference": (*chain(*KINDS["tokenized_preference"]), "prompt_ids", *_PAIR_OF_MASKS),
    "tokenized": ("input_ids", "labels", "completion_mask", "assistant_masks", "attention_mask", *PACKED_COLUMNS),
    "dialogue": KINDS["dialogue"][0],
    "stepwise": KINDS["stepwise"][0],
    "unpaired_preference": (*KINDS["unpaired_preference"][0], *_CHAT_OPTIONS),
    "preference": ("prompt", "chosen", "rejected", *_CHAT_OPTIONS),
    "prompt_completion": ("prompt", "completion", *_CHAT_OPTIONS),
    "language_modeling": ("text", "messages", "conversations", *_CHAT_OPTIONS),
    "prompt_only": ("prompt", *_CHAT_OPTIONS),
}
"""Row kind → all columns that are used for it, required or optional."""

TAKEN_BY = {
    **dict.fromkeys(("tokenized", "dialogue", "prompt_completion", "language_modeling"), ("sft",)),
    "tokenized_preference": ("dpo", "cpo", "orpo", "reward"),
    "stepwise": ("reward",),
    "unpaired_preference": ("kto",),
    "preference": ("dpo", "cpo", "orpo", "kto", "reward"),
    "prompt_only": ("grpo", "rloo", "online-dpo", "ppo", "rft"),
}
"""Row kind → the `trl` commands that accept it."""

PICTURES = {"image", "images"}
TEXT_COLUMNS = ("prompt", "completion", "chosen", "rejected", "messages")
_FROM_VALUE_COLUMNS = (*TEXT_COLUMNS, "conversations")


def detect_kind(
    columns: Iterable[str],
    *,
    allowed: Sequence[str] | None = None,
    text_field: str = "text",
    reads_images: bool = False,
) -> str:
    """The row kind of a dataset with these columns, among the kinds `allowed` (None: all).

    `text_field` is the column with the text for language modelling.

    Raises DataError, with the columns found and those that each kind needs, if no kind fits; also for columns with images
    unless `reads_images`.
    """
    present = set(columns)
    if not reads_images and (pictures := sorted(present & PICTURES)):
        hint = "" if is_available("torchvision") else " (AutoProcessor may need torchvision to return it)"
        raise DataError(
            f"The columns {pictures} hold images, which a tokenizer cannot process: pass the model's processor as "
            f"processing_class{hint}. To train on the texts alone: dataset.remove_columns({pictures})."
        )
    kinds = {kind: needs for kind, needs in KINDS.items() if allowed is None or kind in allowed}
    if "language_modeling" in kinds:
        kinds["language_modeling"] = tuple((text_field,) if n == (TEXT,) else n for n in kinds["language_modeling"])
    if "language_modeling" in kinds and present & set(chosen_fields(text_field)) and "input_ids" not in present:
        return "language_modeling"
    for kind, alternatives in kinds.items():
        if any(present.issuperset(needed) for needed in alternatives):
            return kind
    others = (k for k, needs in KINDS.items() if k not in kinds and any(present.issuperset(n) for n in needs))
    raise DataError(_unrecognised(sorted(present), kinds, next(others, None)))


def chosen_fields(text_field: str) -> tuple[str, ...]:
    """The text column if it is not the default one; it then has precedence over all other columns. Else empty."""
    return () if text_field == TEXT else (text_field,)


def _unrecognised(present: list[str], kinds: Mapping[str, tuple[tuple[str, ...], ...]], other: str | None) -> str:
    needs = "\n".join(f"  {kind}: {' | '.join(', '.join(n) for n in needed)}" for kind, needed in kinds.items())
    known = {column for alternatives in kinds.values() for needed in alternatives for column in needed}
    needs += "\n  texts in another column: dataset_text_field='…'" if "language_modeling" in kinds else ""
    hints = "".join(f" For {name!r}:{suggest(name, known)}" for name in present if suggest(name, known - {name}))
    chat = next((name for name in ("messages", "conversations") if name in present), None)
    if chat is not None and "unpaired_preference" in kinds and "label" in present:
        hints += (
            f" {chat!r} has to be split into a prompt and the last message, the completion; this is done if 'label' is called "
            f"'kto_tag' (--dataset_rename label=kto_tag)."
        )
    elsewhere = "" if other is None else f" They fit the kind {other}, which {_commands(TAKEN_BY[other])}."
    return (
        f"The dataset's columns {present} do not fit any row kind that is accepted here.{elsewhere}{hints} Rename columns "
        f"(--dataset_rename old=new) or add some; these kinds need\n{needs}"
    )


def _commands(names: Sequence[str]) -> str:
    """The commands with their verb, such as `trl dpo, trl cpo and trl reward take`."""
    *most, last = [f"trl {name}" for name in names]
    return f"{', '.join(most)} and {last} take" if most else f"{last} takes"


def is_conversational(example: Row) -> bool:
    """True if the texts of a row are lists of messages with roles (`{"role": "user", "content": …}`)."""
    return any(_is_chat(example.get(column), "role") for column in TEXT_COLUMNS)


def is_conversational_from_value(example: Row) -> bool:
    """True if a row has `conversations` in the older form (`{"from": "user", "value": …}`)."""
    return _is_chat(example.get("conversations"), "from")


def _is_chat(value: Any, role_key: str) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return isinstance(value[0], Mapping) and role_key in value[0]


def maybe_convert_to_chatml(example: dict[str, Any]) -> dict[str, Any]:
    """Convert `from`/`value` messages of a row to `role`/`content`, and rename `conversations` to `messages`.

    Everything else is unchanged.
    """
    converted = dict(example)
    for column in _FROM_VALUE_COLUMNS:
        if isinstance(example.get(column), list):
            converted[column] = [to_chatml(message) for message in example[column]]
    if "conversations" in converted:
        converted["messages"] = converted.pop("conversations")
    return converted


def extract_prompt(example: Row) -> dict[str, Any]:
    """Split the prompt that `chosen` and `rejected` have in common off from both.

    The prompt of conversations are their common first messages, that of texts their common first characters. A space at the
    end of the prompt is given to the completions, since tokenizers join a space with the word after it.

    Returns `{"prompt", "chosen", "rejected"}`.
    """
    chosen, rejected = example["chosen"], example["rejected"]
    fork = shared_length(chosen, rejected)
    if isinstance(chosen, str) and chosen[:fork].endswith(" "):
        fork -= 1
    return {"prompt": chosen[:fork], "chosen": chosen[fork:], "rejected": rejected[fork:]}


def maybe_extract_prompt(example: Row) -> Row:
    """`extract_prompt` for a preference row whose prompt is implicit; any other row is returned unchanged.

    A text prompt of conversational completions is implicit if they repeat it; else it becomes a user message.
    """
    if "chosen" not in example or "rejected" not in example:
        return example
    chosen_is_chat = _is_chat(example["chosen"], "role")
    if example.get("prompt") is None:
        return {**example, **extract_prompt(example)}
    if not chosen_is_chat or _is_chat(example["prompt"], "role"):
        return example
    extracted = extract_prompt(example)
    asked = [{"role": "user", "content": example["prompt"]}]
    return {**example, **extracted} if extracted["prompt"] else {**example, "prompt": asked}


def unpair_preference_dataset(dataset: AnyDataset, **map_kwargs: Any) -> AnyDataset:
    """Split every pair into two rows with `completion` and `label`: True for chosen, False for rejected.

    Other columns are repeated. `map_kwargs` are passed to the dataset's `map`.
    """
    return dataset.map(_unpair, batched=True, remove_columns=["chosen", "rejected"], **map_kwargs)


def _unpair(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    chosen, rejected = batch["chosen"], batch["rejected"]
    repeated = {name: [*batch[name], *batch[name]] for name in batch if name not in ("chosen", "rejected")}
    labels = [True] * len(chosen) + [False] * len(rejected)
    return {**repeated, "completion": [*chosen, *rejected], "label": labels}


def maybe_unpair_preference_dataset(
    dataset: AnyDataset, num_proc: int | None = None, desc: str | None = None
) -> AnyDataset:
    """`unpair_preference_dataset` for a dataset with `chosen` and `rejected`; any other dataset is returned unchanged."""
    first = next(iter(dataset.values())) if isinstance(dataset, Mapping) else dataset
    columns = first.column_names if first.column_names is not None else list(next(iter(first)))
    if not {"chosen", "rejected"}.issubset(columns):
        return dataset
    map_kwargs = {} if isinstance(first, IterableDataset) else {"num_proc": num_proc, "desc": desc}
    return unpair_preference_dataset(dataset, **map_kwargs)
