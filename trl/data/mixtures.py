"""Mixtures of datasets: the list `datasets` of a YAML file, concatenated or interleaved.

This file imports no heavy library at its top, since the command line reads its dataclasses at startup.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from trl.data.renaming import names_of, pairs_of
from trl.data.sources import check_place, load_rows
from trl.errors import ConfigError, DataError, suggest, unknown
from trl.option_names import Options

if TYPE_CHECKING:
    from datasets import Dataset

    from trl.data.sources import Rows, Splits

logger = logging.getLogger(__name__)

Stopping = Literal["first_exhausted", "all_exhausted", "all_exhausted_without_replacement"]


@dataclass
class DatasetConfig(Options):
    """One dataset of a mixture."""

    path: str
    """Hub name, folder or file."""

    name: str | None = None
    """Configuration of a hub dataset."""

    data_dir: str | None = None
    """Folder inside the dataset."""

    data_files: str | list[str] | dict[str, str] | None = None
    """Files of the dataset."""

    split: str = "train"
    """Split to read; slices such as train[:1000] work."""

    columns: list[str] | dict[str, str] | None = None
    """Keep only these columns; or, as in LLaMA-Factory, a mapping of roles to names of columns: {prompt: question}."""

    rename: dict[str, str] | list[str] | None = None
    """Rename columns, old name to new name: {question: prompt, answer: completion}."""

    fraction: float | None = None
    """Share of this dataset in the mixture: give it for every dataset, or for none."""

    def __post_init__(self) -> None:
        check_place(self.path, "path")
        if isinstance(self.columns, Mapping):
            if self.rename:
                raise ConfigError(
                    f"dataset {self.path!r}: columns as a mapping and rename do the same; give one of them."
                )
            self.columns, self.rename = None, names_of(self.columns)
        pairs_of(self.rename)
        if self.fraction is not None and not self.fraction > 0:
            raise ConfigError(
                f"fraction={self.fraction} of dataset {self.path!r} takes no rows: give a positive number."
            )


@dataclass
class DatasetMixtureConfig(Options):
    """Several datasets, concatenated or interleaved."""

    datasets: list[DatasetConfig] = field(default_factory=list)
    """Datasets to mix, each with `path` and optionally name, data_dir, data_files, split, columns, rename, fraction."""

    streaming: bool = False
    """Stream the rows of the mixture during training, instead of loading them beforehand."""

    test_split_size: float | None = None
    """Number of rows of the mixture (below 1: share of them) to set aside for evaluation."""

    probabilities: list[float] | None = None
    """Interleave: draw each row from one of the datasets with these probabilities. None: concatenate the datasets."""

    stopping_strategy: Stopping = "first_exhausted"
    """Interleaving stops at the end of the first dataset ("first_exhausted"), or repeats datasets until "all_exhausted"."""

    seed: int = 42
    """Seed of interleaving and of the test split."""

    def __post_init__(self) -> None:
        self.datasets = [_dataset_config(i, each) for i, each in enumerate(self.datasets)]
        if self.stopping_strategy not in get_args(Stopping):
            raise ConfigError(unknown("stopping_strategy", self.stopping_strategy, get_args(Stopping)))
        self._check_shares()
        size = self.test_split_size
        if self.streaming and size is not None:
            raise ConfigError(
                "test_split_size does not work with streaming=True: the number of rows is unknown beforehand."
            )
        if size is not None and (size <= 0 or (size > 1 and size != int(size))):
            raise ConfigError(f"test_split_size={size}: give a share below 1, or a number of rows.")

    def _check_shares(self) -> None:
        fractions = [each.fraction for each in self.datasets]
        with_fraction = len(fractions) - fractions.count(None)
        if with_fraction not in (0, len(fractions)):
            raise ConfigError(
                f"{with_fraction} of {len(fractions)} datasets have a fraction: give it for all, or none."
            )
        if with_fraction and self.streaming:
            raise ConfigError("fraction does not work with streaming=True: use probabilities.")
        if self.probabilities is None:
            return
        if with_fraction:
            raise ConfigError("fraction and probabilities are two ways to mix datasets: give one of them.")
        if len(self.probabilities) != len(self.datasets):
            raise ConfigError(
                f"{len(self.probabilities)} probabilities for {len(self.datasets)} datasets: give one for each dataset."
            )
        if min(self.probabilities) < 0 or not sum(self.probabilities) > 0:
            raise ConfigError(f"probabilities={self.probabilities}: none may be negative, and one must be positive.")


def _dataset_config(index: int, given: DatasetConfig | Mapping[str, Any]) -> DatasetConfig:
    """One entry of `datasets`, which a YAML file gives as a mapping."""
    if isinstance(given, DatasetConfig):
        return given
    known = [f.name for f in fields(DatasetConfig)]
    for key in given:
        if key not in known:
            raise ConfigError(
                f"datasets, entry {index + 1}: unknown key {key!r}.{suggest(key, known)} Known: {', '.join(known)}."
            )
    if "path" not in given:
        raise ConfigError(f"datasets, entry {index + 1}: path is missing, the dataset's hub name, folder or file.")
    return DatasetConfig(**given)


# ---- loading a mixture ----


def get_dataset(mixture_config: DatasetMixtureConfig) -> Splits:
    """Load the mixture: split "train", and "test" with `test_split_size`.

    Without probabilities the datasets are concatenated. With `fraction`, the first rows of each are used, such that their
    shares of the mixture are proportional to the fractions and the mixture is as large as possible. With `probabilities`,
    rows are interleaved.
    """
    if not mixture_config.datasets:
        raise ConfigError("datasets is empty: list at least one dataset, with its path.")
    parts = parts_of(mixture_config)
    _check_columns(parts, [each.path for each in mixture_config.datasets])
    return splits_of(parts, mixture_config)


def parts_of(mixture: DatasetMixtureConfig) -> list[Rows]:
    """The rows of each dataset of a mixture."""
    parts = []
    for each in mixture.datasets:
        options = {name: value for name, value in vars(each).items() if name not in ("path", "fraction")}
        parts.append(load_rows(each.path, streaming=mixture.streaming, **options))
    return [_of_usual_size(part) for part in parts]


def _of_usual_size(rows: Rows) -> Rows:
    """The rows with Arrow types `large_string` and `large_list`, which some readers give, cast to `string` and `list`."""
    from datasets import Features

    usual = {name: _usual(feature) for name, feature in (rows.features or {}).items()}
    return rows if usual == (rows.features or {}) else rows.cast(Features(usual))


def _usual(feature: Any) -> Any:
    from datasets import LargeList, List, Value

    if isinstance(feature, Mapping):
        return {name: _usual(inside) for name, inside in feature.items()}
    if isinstance(feature, LargeList | List):
        return List(_usual(feature.feature))
    return Value("string") if feature == Value("large_string") else feature


def splits_of(parts: Sequence[Rows], mixture: DatasetMixtureConfig) -> Splits:
    """The splits of a mixture, from the rows of its datasets."""
    from datasets import DatasetDict, IterableDatasetDict

    rows = _mixed(list(parts), mixture)
    if mixture.test_split_size is not None:
        size = mixture.test_split_size
        return rows.train_test_split(size if size < 1 else int(size), seed=mixture.seed)
    return (IterableDatasetDict if mixture.streaming else DatasetDict)({"train": rows})


def _check_columns(parts: Sequence[Rows], paths: Sequence[str]) -> None:
    """Raise DataError for a column with different types in two datasets, and for datasets without a common column.

    Warns about datasets that lack a column of the others.
    """
    from datasets import Value

    empty = Value("null")
    known: dict[str, tuple[str, Any]] = {}
    for part, path in zip(parts, paths, strict=True):
        for column, kind in (part.features or {}).items():
            home, first = known.setdefault(column, (path, kind))
            if kind != first and empty not in (kind, first):
                raise DataError(
                    f"Column {column!r} of the mixture is {first} in {home!r} and {kind} in {path!r}: convert it to one type, "
                    "or leave it out by listing the columns to keep (columns)."
                )
    of = [(path, list(part.features)) for part, path in zip(parts, paths, strict=True) if part.features]
    for path, columns in of[1:]:
        if not {*columns} & {*of[0][1]}:
            raise DataError(
                f"The datasets of the mixture have no column in common: {of[0][0]!r} has {of[0][1]}, and {path!r} {columns}. Write "
                "all rows in one form: rename columns (rename), or use 'messages', or 'prompt' and 'completion', everywhere."
            )
    for part, path in zip(parts, paths, strict=True):
        lacking = [column for column in known if part.features and column not in part.features]
        if lacking:
            logger.warning(
                f"Dataset {path!r} of the mixture has no column {' or '.join(map(repr, lacking))}: its rows have None there."
            )


def _mixed(parts: list[Rows], mixture: DatasetMixtureConfig) -> Rows:
    from datasets import concatenate_datasets, interleave_datasets

    if mixture.probabilities is not None:
        whole = sum(mixture.probabilities)
        probabilities = [probability / whole for probability in mixture.probabilities]
        return interleave_datasets(parts, probabilities, seed=mixture.seed, stopping_strategy=mixture.stopping_strategy)
    if all(each.fraction is not None for each in mixture.datasets):
        parts = _shares(parts, [each.fraction for each in mixture.datasets])
    return concatenate_datasets(parts)


def _shares(parts: list[Dataset], fractions: list[float]) -> list[Dataset]:
    """The first rows of each part, such that part i has the share fᵢ/Σf of N = min_i nᵢ·Σf/fᵢ rows in total."""
    whole = sum(fractions)
    rows = min(len(part) * whole / fraction for part, fraction in zip(parts, fractions, strict=True))
    return [part.select(range(round(rows * fraction / whole))) for part, fraction in zip(parts, fractions, strict=True)]
