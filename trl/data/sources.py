"""Datasets by name: from the hub, a folder or files; one, or several mixed.

`load_dataset_argument` reads what `--dataset_name` names, `get_dataset` what a list of `datasets` in a YAML file names.
Importing this file imports nothing heavy: the command line reads its dataclasses before anything is loaded.
"""

from __future__ import annotations

import glob
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from trl.data.renaming import names_of, pairs_of, renamed
from trl.errors import ConfigError, DataError, suggest, unknown

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

    Rows = Dataset | IterableDataset
    Splits = DatasetDict | IterableDatasetDict

logger = logging.getLogger(__name__)

BUILDERS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
"""Data files by their ending, and what `datasets` reads them with."""

PACKED = (".gz", ".bz2", ".xz", ".zst")
Stopping = Literal["first_exhausted", "all_exhausted", "all_exhausted_without_replacement"]


@dataclass
class ScriptArguments:
    """The dataset of a run."""

    dataset_name: list[str] | str | None = None
    """Hub name, folder (of data files, or made by `save_to_disk`), or files: .jsonl .json .csv .tsv .parquet .arrow .txt."""

    dataset_config: str | None = None
    """Configuration of a hub dataset."""

    dataset_train_split: str = "train"
    """Split to train on; slices such as train[:1000] work."""

    dataset_test_split: str = "test"
    """Split to evaluate on, used if `eval_strategy` is not "no"."""

    dataset_streaming: bool = False
    """Read rows while training and not before."""

    dataset_columns: list[str] | None = None
    """Keep only these columns."""

    dataset_rename: list[str] | None = None
    """Read columns under other names: question=prompt answer=completion."""

    def __post_init__(self) -> None:
        for name in _listed(self.dataset_name):
            check_place(name, "dataset_name")
        pairs_of(self.dataset_rename)


@dataclass
class DatasetConfig:
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
    """Keep only these columns; or, as LLaMA-Factory writes it, a mapping of what a column holds to its name."""

    rename: dict[str, str] | list[str] | None = None
    """Read columns under other names: {question: prompt, answer: completion}."""

    fraction: float | None = None
    """Share of this dataset in the mixture: every dataset has one, or none has."""

    def __post_init__(self) -> None:
        check_place(self.path, "path")
        if isinstance(self.columns, Mapping):
            if self.rename:
                raise ConfigError(f"dataset {self.path!r}: columns as a mapping and rename do the same: keep one.")
            self.columns, self.rename = None, names_of(self.columns)
        pairs_of(self.rename)
        if self.fraction is not None and not self.fraction > 0:
            raise ConfigError(
                f"fraction={self.fraction} of dataset {self.path!r} takes no rows: give a positive number."
            )


@dataclass
class DatasetMixtureConfig:
    """Several datasets, one after the other or interleaved."""

    datasets: list[DatasetConfig] = field(default_factory=list)
    """Datasets to mix, each with `path` and, where wanted, name, data_dir, data_files, split, columns, fraction."""

    streaming: bool = False
    """Read the rows of the mixture while training and not before."""

    test_split_size: float | None = None
    """Set so many rows of the mixture (below 1: such a share) aside for evaluation."""

    probabilities: list[float] | None = None
    """Interleave: draw each row from one of the datasets with these probabilities. None: one dataset after the other."""

    stopping_strategy: Stopping = "first_exhausted"
    """Interleaving stops when the "first_exhausted" dataset ends, or repeats until "all_exhausted"."""

    seed: int = 42
    """Seed of interleaving and of the test split."""

    def __post_init__(self) -> None:
        self.datasets = [_dataset_config(i, each) for i, each in enumerate(self.datasets)]
        if self.stopping_strategy not in get_args(Stopping):
            raise ConfigError(unknown("stopping_strategy", self.stopping_strategy, get_args(Stopping)))
        self._check_shares()
        size = self.test_split_size
        if self.streaming and size is not None:
            raise ConfigError("test_split_size does not work with streaming=True: rows are not counted beforehand.")
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
            raise ConfigError("fraction and probabilities are two ways to mix: keep one.")
        if len(self.probabilities) != len(self.datasets):
            raise ConfigError(
                f"{len(self.probabilities)} probabilities for {len(self.datasets)} datasets: give one each."
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


# ---- places ----

LONGEST = 300
"""Characters of what another library raised."""

TEXTS = (".jsonl", ".json", ".csv", ".tsv", ".txt")
"""Endings of files with letters in UTF-8."""


def _listed(names: str | Sequence[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or [])


def _builder(path: str) -> str | None:
    """What reads the file `path`, by its ending; None if that is not one of a data file."""
    return BUILDERS.get(_ending(path))


def _ending(path: str) -> str:
    """The ending of a file's name, that of a compressed one before it was."""
    stem, ending = os.path.splitext(path)
    return os.path.splitext(stem)[1] if ending in PACKED else ending


def is_local(name: str) -> bool:
    """Whether a name can only be one of this machine: it exists, or is written like a path or a data file."""
    return Path(name).expanduser().exists() or name.startswith(("/", "./", "../", "~")) or _builder(name) is not None


def check_place(name: str, argument: str) -> None:
    """Raises DataError if `name` is one of this machine and nothing is there, or a file that cannot be read as rows."""
    path = Path(name).expanduser()
    if not is_local(name):
        return
    if path.is_file() and _builder(name) is None:
        raise DataError(f"{argument}={name!r} is no data file: known endings are {', '.join(BUILDERS)}.")
    if path.exists() or glob.glob(str(path)):
        return
    if not path.parent.exists():
        raise DataError(f"{argument}={name!r}: there is no folder {str(path.parent)!r}.")
    beside = [each.name for each in path.parent.iterdir()]
    raise DataError(f"{argument}={name!r}: there is no such file or folder.{suggest(path.name, beside)}")


# ---- loading ----


def load_rows(
    path: str | Sequence[str],
    *,
    name: str | None = None,
    data_dir: str | None = None,
    data_files: Any = None,
    split: str = "train",
    columns: Sequence[str] | None = None,
    rename: Mapping[str, str] | Sequence[str] | None = None,
    streaming: bool = False,
) -> Rows:
    """The rows of one split, from a hub name, a folder or files, some `columns` of them, and those under other names.

    Raises DataError if the place is empty, or does not have the split or a column.
    """
    splits = load_splits(path, name=name, data_dir=data_dir, data_files=data_files, streaming=streaming)
    return renamed(take_columns(take_split(splits, split, path), columns, path), rename, path)


def load_splits(
    path: str | Sequence[str],
    *,
    name: str | None = None,
    data_dir: str | None = None,
    data_files: Any = None,
    streaming: bool = False,
) -> Splits:
    """All splits of a dataset."""
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DataFilesNotFoundError, DatasetGenerationError

    places = _listed(path)
    for place in places:
        check_place(place, "dataset")
    local = [str(Path(place).expanduser()) for place in places if is_local(place)]
    builders = {_builder(place) for place in local}
    if len(local) == len(places) and None not in builders:
        return _load_files(local, streaming=streaming)
    if len(places) > 1:
        raise DataError(f"Dataset {places}: several names have to be data files; mix datasets with `datasets`.")
    if local and _is_saved(local[0]):
        saved = load_from_disk(local[0])
        splits = DatasetDict({"train": saved}) if isinstance(saved, Dataset) else saved
        return _streamed(splits) if streaming else splits
    try:
        return load_dataset(*(local or places), name, data_dir=data_dir, data_files=data_files, streaming=streaming)
    except DataFilesNotFoundError as error:
        raise DataError(
            f"Dataset {places[0]!r} holds no data files: known endings are {', '.join(BUILDERS)}."
        ) from error
    except DatasetGenerationError as error:
        model = (
            " It holds a model: is it the model_name_or_path?"
            if local and Path(local[0], "config.json").is_file()
            else ""
        )
        raise DataError(f"Dataset {places[0]!r} cannot be read as rows: {_briefly(error)}.{model}") from error


def _briefly(error: Exception) -> str:
    """What a library raised, or its cause, in a line that can be read."""
    told = " ".join(str(error.__cause__ or error).split())
    return told if len(told) <= LONGEST else f"{told[:LONGEST]}…"


def files_of(path: str | Sequence[str], split: str) -> list[str]:
    """The files on this machine that `load_splits(path)` reads a split from; none of a saved dataset, or a hub's."""
    from datasets import load_dataset_builder

    places = _listed(path)
    if not all(map(is_local, places)) or any(
        Path(place).expanduser().suffix == "" and _is_saved(place) for place in places
    ):
        return []
    local = [str(Path(place).expanduser()) for place in places]
    builder = _builder(local[0])
    made = load_dataset_builder(local[0]) if builder is None else load_dataset_builder(builder, data_files=local)
    return [str(file) for file in made.config.data_files.get(split, [])]


def _is_saved(place: str) -> bool:
    """Whether a folder was made by `save_to_disk`."""
    return any(Path(place, name).expanduser().exists() for name in ("state.json", "dataset_dict.json"))


def _load_files(paths: list[str], *, streaming: bool) -> Splits:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    readers = {(_builder(path), _ending(path) == ".tsv") for path in paths}
    if len(readers) > 1:
        raise DataError(f"Dataset {paths}: files of different kinds cannot be read as one.")
    ((builder, has_tabs),) = readers
    separator = {"sep": "\t"} if has_tabs else {}
    for path in paths:
        _check_letters(path)
    try:
        return load_dataset(builder, data_files=paths, streaming=streaming, **separator)
    except DatasetGenerationError as error:
        told = next(filter(None, map(_where_json_breaks, paths)), None) or _briefly(error)
        raise DataError(f"Dataset {paths} cannot be read as {builder}: {told}") from error


def _check_letters(path: str) -> None:
    """Raises DataError for a text file that is not UTF-8: readers take its bytes, and fail at the first row that is looked at."""
    if not Path(path).is_file() or not path.endswith(TEXTS):
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, line {number}, column {error.start + 1}: the byte {line[error.start]:#04x} is not UTF-8. "
                    f"Convert the file, for instance from Latin-1: iconv -f latin1 -t utf-8 {path}"
                ) from error


def _where_json_breaks(path: str) -> str | None:
    """The first line of a `.jsonl` file that is not JSON; None where there is none, or of other files."""
    if not path.endswith(".jsonl"):
        return None
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                json.loads(line.strip() or "null")
            except json.JSONDecodeError as error:
                return f"{path}, line {number}, column {error.colno}: {error.msg}"
    return None


def _streamed(splits: DatasetDict) -> IterableDatasetDict:
    from datasets import IterableDatasetDict

    return IterableDatasetDict({name: rows.to_iterable_dataset() for name, rows in splits.items()})


def take_split(splits: Splits, split: str, path: Any) -> Rows:
    """One split, or a slice of one: `train`, `train[:1000]`, `train[10%:20%]`.

    Raises DataError, with the splits that there are.
    """
    from datasets import Dataset

    name = split.partition("[")[0]
    if name not in splits:
        raise DataError(
            f"Dataset {path!r} has no split {name!r}.{suggest(name, splits)} Its splits: {', '.join(splits)}."
        )
    rows = splits[name]
    if name == split:
        return rows
    if isinstance(rows, Dataset):
        return rows.select(range(len(rows))[slice_of(split, len(rows))])
    part = slice_of(split, None)
    rows = rows.skip(part.start or 0)
    return rows if part.stop is None else rows.take(part.stop - (part.start or 0))


def slice_of(split: str, count: int | None) -> slice:
    """What of a split's rows `train[10:20]` or `train[10%:]` stands for; `count` is None of a stream.

    Raises DataError for what is not a slice, or is counted from an end that a stream has not.
    """
    _, bracket, inside = split.partition("[")
    start, colon, end = inside.removesuffix("]").partition(":")
    if "%" in inside and count is None:
        raise DataError(f"split={split!r}: a streaming dataset is not counted beforehand. Give numbers of rows.")
    try:
        first, last = (int(bound.strip().removesuffix("%")) if bound.strip() else None for bound in (start, end))
    except ValueError:
        colon = ""
    if bracket and not colon:
        raise DataError(f"split={split!r} is not a slice: write name[start:end], in rows or with %.")
    if count is None and min(first or 0, last or 0) < 0:
        raise DataError(f"split={split!r}: a streaming dataset has no end to count from. Give numbers from its start.")
    if "%" in inside:
        first, last = (None if bound is None else round(count * bound / 100) for bound in (first, last))
    return slice(first, last)


def take_columns(rows: Rows, columns: Sequence[str] | None, path: Any) -> Rows:
    """Rows with these columns alone. Raises DataError, with the columns that there are."""
    if columns is None:
        return rows
    there = rows.column_names or list(next(iter(rows)))
    for column in columns:
        if column not in there:
            near = suggest(column, there)
            raise DataError(f"Dataset {path!r} has no column {column!r}.{near} Its columns: {', '.join(there)}.")
    return rows.select_columns(list(columns))


def load_dataset_argument(arguments: ScriptArguments) -> Splits:
    """The splits that a run reads: `dataset_train_split`, and `dataset_test_split` where the dataset has it.

    They keep their names. Raises ConfigError without a dataset, DataError if the training split is not there.
    """
    if not arguments.dataset_name:
        raise ConfigError("dataset_name is missing: give the hub name, folder or files of a dataset.")
    path = arguments.dataset_name
    splits = load_splits(path, name=arguments.dataset_config, streaming=arguments.dataset_streaming)
    wanted = [arguments.dataset_train_split]
    if arguments.dataset_test_split.partition("[")[0] in splits:
        wanted.append(arguments.dataset_test_split)
    columns, rename = arguments.dataset_columns, arguments.dataset_rename
    taken = {split: take_columns(take_split(splits, split, path), columns, path) for split in wanted}
    return type(splits)({split: renamed(rows, rename, path) for split, rows in taken.items()})


# ---- mixtures ----


def get_dataset(mixture_config: DatasetMixtureConfig) -> Splits:
    """The mixture: split "train", and "test" if rows are set aside for it.

    Without probabilities the datasets follow one another. With `fraction`, each gives its first rows so that the shares
    of the mixture are as the fractions, and the mixture is as large as that allows. With `probabilities`, rows are
    interleaved.
    """
    if not mixture_config.datasets:
        raise ConfigError("datasets is empty: list one dataset or more, each with its path.")
    parts = parts_of(mixture_config)
    _check_columns(parts, [each.path for each in mixture_config.datasets])
    return splits_of(parts, mixture_config)


def parts_of(mixture: DatasetMixtureConfig) -> list[Rows]:
    """The rows of each dataset of a mixture."""
    return [
        load_rows(
            each.path,
            name=each.name,
            data_dir=each.data_dir,
            data_files=each.data_files,
            split=each.split,
            columns=each.columns,
            rename=each.rename,
            streaming=mixture.streaming,
        )
        for each in mixture.datasets
    ]


def splits_of(parts: Sequence[Rows], mixture: DatasetMixtureConfig) -> Splits:
    """What a mixture makes of the rows of its datasets."""
    from datasets import DatasetDict, IterableDatasetDict

    rows = _mixed(list(parts), mixture)
    if mixture.test_split_size is not None:
        size = mixture.test_split_size
        return rows.train_test_split(size if size < 1 else int(size), seed=mixture.seed)
    return (IterableDatasetDict if mixture.streaming else DatasetDict)({"train": rows})


def _check_columns(parts: Sequence[Rows], paths: Sequence[str]) -> None:
    """Raises DataError for a column that has different types in two of the datasets; says which ones lack a column."""
    from datasets import Value

    empty = Value("null")
    known: dict[str, tuple[str, Any]] = {}
    for part, path in zip(parts, paths, strict=True):
        for column, kind in (part.features or {}).items():
            home, first = known.setdefault(column, (path, kind))
            if kind != first and empty not in (kind, first):
                raise DataError(
                    f"Column {column!r} of the mixture is {first} in {home!r} and {kind} in {path!r}: bring it to one form, "
                    "or leave it out by naming the columns to keep (columns)."
                )
    for part, path in zip(parts, paths, strict=True):
        lacking = [column for column in known if part.features and column not in part.features]
        if lacking:
            logger.warning(
                f"Dataset {path!r} of the mixture has no column {' or '.join(map(repr, lacking))}: None there."
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
    """The first rows of each part, such that part i has the share fᵢ/Σf of all: N = min_i nᵢ·Σf/fᵢ rows together."""
    whole = sum(fractions)
    rows = min(len(part) * whole / fraction for part, fraction in zip(parts, fractions, strict=True))
    return [part.select(range(round(rows * fraction / whole))) for part, fraction in zip(parts, fractions, strict=True)]
