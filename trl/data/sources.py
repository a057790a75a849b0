"""Load datasets from the hub, a folder or files.

`load_dataset_argument` loads the dataset of `--dataset_name`; mixtures of several are in `trl.data.mixtures`.
This file imports no heavy library at its top, since the command line reads its dataclasses at startup.
"""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from trl.counts import counted
from trl.data.file_checks import check_letters, check_table, where_json_breaks
from trl.data.renaming import pairs_of, renamed
from trl.errors import ConfigError, DataError, listed, suggest
from trl.option_names import Options

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

    Rows = Dataset | IterableDataset
    Splits = DatasetDict | IterableDatasetDict

logger = logging.getLogger(__name__)

BUILDERS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
"""Extension of a data file → the builder of `datasets` that reads it."""

COLUMNS = {"prompt", "completion", "messages", "conversations", "text", "chosen", "instruction", "question", "query"}
"""Columns by which rows are recognised that are nested in a list inside of another row."""

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Files in folders of images or audio that hold their other columns, which `datasets` reads."""

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


@dataclass
class ScriptArguments(Options):
    """The dataset of a run."""

    ALIASES: ClassVar[dict[str, str]] = {"ignore_bias_buffers": ""}
    ignore_bias_buffers: ClassVar[bool] = False
    """For scripts that read it: DDP does not synchronise buffers of boolean masks here."""

    dataset_name: list[str] | str | None = None
    """Hub name, folder (of data files, or written by `save_to_disk`), or files: .jsonl .json .csv .tsv .parquet .arrow .txt."""

    dataset_config: str | None = None
    """Configuration of a hub dataset."""

    dataset_train_split: str = "train"
    """Split to train on; slices such as train[:1000] work."""

    dataset_test_split: str = "test"
    """Split to evaluate on, or a slice of one, used if `eval_strategy` is not "no". Unless it is "test", it has to exist."""

    dataset_streaming: bool = False
    """Stream rows during training, instead of loading them beforehand."""

    dataset_columns: list[str] | None = None
    """Keep only these columns."""

    dataset_rename: list[str] | None = None
    """Rename columns, old=new: question=prompt answer=completion."""

    def __post_init__(self) -> None:
        for name in _listed(self.dataset_name):
            check_place(name, "dataset_name")
        pairs_of(self.dataset_rename)


# ---- places ----

LONGEST = 300
"""Most characters of another library's error message that are quoted."""

WORDS_STAY = {"keep_default_na": False, "na_values": [""]}
"""Options for reading tables: "None", "NA" and "null" are kept as text; only empty cells become None."""

FILES_NAMED = 5
"""Most files that a warning lists."""


def _listed(names: str | Sequence[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or [])


def _builder(path: str) -> str | None:
    """The builder that reads the file `path`, by its extension; None if it is not that of a data file."""
    return BUILDERS.get(_ending(path))


def _ending(path: str) -> str:
    """The extension of a file, for a compressed file the one before the compression's."""
    stem, ending = os.path.splitext(path.lower())
    return os.path.splitext(stem)[1] if ending in COMPRESSED else ending


def is_local(name: str) -> bool:
    """True if a name can only be a path on this machine: it exists, or looks like a path or a data file."""
    return Path(name).expanduser().exists() or name.startswith(("/", "./", "../", "~")) or _builder(name) is not None


def check_place(name: str, argument: str) -> None:
    """Raise DataError if `name` is a local path that does not exist, or a file with an unknown extension."""
    path = Path(name).expanduser()
    if not is_local(name):
        return
    if path.is_file() and _builder(name) is None:
        raise DataError(f"{argument}={name!r} is not a data file: known extensions are {', '.join(BUILDERS)}.")
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
    """The rows of one split of a hub dataset, a folder or files; with `columns` only those, and renamed by `rename`.

    Raises DataError if there are no rows, or the split or a column does not exist.
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
    from datasets import Dataset, DatasetDict, IterableDatasetDict, load_dataset, load_from_disk

    places = _listed(path)
    for place in places:
        check_place(place, "dataset")
    local = [str(Path(place).expanduser()) for place in places if is_local(place)]
    builders = {_builder(place) for place in local}
    if len(local) == len(places) and None not in builders:
        return _load_files(local, streaming=streaming)
    if len(places) > 1:
        raise DataError(f"Dataset {places}: several names have to be data files; to mix datasets, use `datasets`.")
    if local and _is_saved(local[0]):
        saved = load_from_disk(local[0])
        splits = DatasetDict({"train": saved}) if isinstance(saved, Dataset) else saved
        if not streaming:
            return splits
        return IterableDatasetDict({name: rows.to_iterable_dataset() for name, rows in splits.items()})
    with _reading_errors(places, lambda: _where_folder_breaks(local)):
        rows = load_dataset(*(local or places), name, data_dir=data_dir, data_files=data_files, streaming=streaming)
    if local and data_files is None:
        _say_unread_files(Path(local[0], data_dir or ""), rows)
    return rows


def _where_folder_breaks(places: Sequence[str]) -> str | None:
    """Place and reason of the first invalid line in the `.jsonl` files of folders; None if there is none."""
    files = [str(path) for place in places for path in sorted(Path(place).rglob("*")) if path.is_file()]
    return next(filter(None, map(where_json_breaks, files)), None)


@contextmanager
def _reading_errors(places: Sequence[str], where: Callable[[], str | None]) -> Iterator[None]:
    """Within it, errors of reading local files are raised as DataError; `where` finds the place in a file, if it can."""
    from datasets.exceptions import DataFilesNotFoundError, DatasetGenerationError

    named = repr(places[0] if len(places) == 1 else list(places))
    try:
        yield
    except DataFilesNotFoundError as error:
        raise DataError(f"Dataset {named} has no data files: known extensions are {', '.join(BUILDERS)}.") from error
    except (DatasetGenerationError, OSError, StopIteration, ValueError) as error:
        if not all(map(is_local, places)):
            raise
        holds_model = len(places) == 1 and Path(places[0]).expanduser().joinpath("config.json").is_file()
        model = " The folder holds a model: is it the model_name_or_path?" if holds_model else ""
        told = where() or _known_failure(error) or _shortened(error)
        raise DataError(f"Dataset {named} cannot be read as rows: {told}{model}") from error


def _known_failure(error: Exception) -> str | None:
    """A clearer message for an error of another library whose own message does not help; None for other errors."""
    from datasets.table import CastError

    if isinstance(error, StopIteration) or "corresponds to no data" in str(error):
        return "it has no rows."
    causes = (error.__cause__, error.__context__)  # datasets 4 raises another error from None
    if (cast := next((each for each in causes if isinstance(each, CastError)), None)) is not None:
        some = sorted({*cast.requested_column_names} ^ {*cast.table_column_names})
        return f"some of its files have the columns {some}, and others do not. Give files with the same columns."
    if "Compression type zstd" in str(error):
        return "files that end with .zst need the package zstandard: pip install zstandard."
    return None


def _say_unread_files(folder: Path, splits: Splits) -> None:
    """Warn about data files of a folder that are not read, because the folder has files of another kind too."""
    if not folder.is_dir():
        return
    rows = next(iter(splits.values()))
    read = rows.info.builder_name
    described = METADATA if read.endswith("folder") else ()
    files = [path.name for path in sorted(folder.rglob("*")) if path.name not in described]
    others = [name for name in files if _builder(name) not in (None, read, "text")]
    if others:
        logger.warning(
            f"In {str(folder)!r} only the {read} files are read, but not {listed(others, FILES_NAMED)}: to read those, give "
            "their names."
        )


def _shortened(error: Exception) -> str:
    """The message of another library's error, or of its cause, shortened to one line."""
    told = " ".join(str(error.__cause__ or error).split())
    return told if len(told) <= LONGEST else f"{told[:LONGEST]}…"


def files_of(path: str | Sequence[str], split: str) -> list[str]:
    """The local files from which `load_splits(path)` reads a split; empty for hub datasets and those of `save_to_disk`."""
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
    """True if a folder was written by `save_to_disk`."""
    return any(Path(place, name).expanduser().exists() for name in ("state.json", "dataset_dict.json"))


def _load_files(paths: list[str], *, streaming: bool) -> Splits:
    from datasets import load_dataset

    readers = {(_builder(path), _ending(path) == ".tsv") for path in paths}
    if len(readers) > 1:
        raise DataError(f"Dataset {paths}: files of different kinds cannot be read as one.")
    ((builder, has_tabs),) = readers
    options: dict[str, Any] = {"sep": "\t"} if has_tabs else {}
    options |= WORDS_STAY if builder == "csv" else {}
    for path in paths:
        check_letters(path)
        check_table(path)
    with _reading_errors(paths, lambda: next(filter(None, map(where_json_breaks, paths)), None)):
        splits = load_dataset(builder, data_files=paths, streaming=streaming, **options)
    if builder == "json" and not streaming:
        _check_rows(splits, paths)
    return splits


def _check_rows(splits: Splits, paths: Sequence[str]) -> None:
    """Raise DataError for a file with a single row that holds a list of the actual rows: `{"version": 1, "data": [{…}, …]}`."""
    for rows in splits.values():
        lists = [name for name, feature in rows.features.items() if name not in COLUMNS and _holds_rows(feature)]
        if len(rows) == len(paths) and lists:
            raise DataError(
                f"Dataset {paths[0]!r} has a single row, with a list of rows in {lists[0]!r}: write only that list to the file, or "
                "its rows one per line (.jsonl)."
            )


def _holds_rows(feature: Any) -> bool:
    """True if a column holds lists of dicts whose keys are columns of rows."""
    inside = getattr(feature, "feature", None)
    return isinstance(inside, Mapping) and not COLUMNS.isdisjoint(inside)


def take_split(splits: Splits, split: str, path: Any) -> Rows:
    """One split, or a slice of one: `train`, `train[:1000]`, `train[10%:20%]`.

    Raises DataError that lists the existing splits.
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
        kept = range(len(rows))[slice_of(split, len(rows))]
        if not kept:
            raise DataError(f"Dataset {path!r}: {split} selects none of its {counted(len(rows), 'row')}.")
        return rows.select(kept)
    part = slice_of(split, None)
    rows = rows.skip(part.start or 0)
    return rows if part.stop is None else rows.take(part.stop - (part.start or 0))


def slice_of(split: str, count: int | None) -> slice:
    """The slice of rows that `train[10:20]` or `train[10%:]` selects; `count` is the number of rows, None for a stream.

    Raises DataError for an invalid slice, and for one that counts from the end of a stream.
    """
    _, bracket, inside = split.partition("[")
    start, colon, end = inside.removesuffix("]").partition(":")
    if "%" in inside and count is None:
        raise DataError(
            f"split={split!r}: the size of a streaming dataset is unknown. Give numbers of rows instead of %."
        )
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
    """The rows with only these columns. Raises DataError, which lists the existing columns, if one does not exist."""
    if columns is None:
        return rows
    there = rows.column_names or list(next(iter(rows)))
    for column in columns:
        if column not in there:
            near = suggest(column, there)
            raise DataError(f"Dataset {path!r} has no column {column!r}.{near} Its columns: {', '.join(there)}.")
    return rows.select_columns(list(columns))


def load_dataset_argument(arguments: ScriptArguments) -> Splits:
    """Load the splits of a run: `dataset_train_split`, and `dataset_test_split` if it was named or the dataset has it.

    They keep their names. Raises ConfigError without a dataset, and DataError if a split that was named does not exist.
    """
    if not arguments.dataset_name:
        raise ConfigError("dataset_name is missing: give the hub name, folder or files of a dataset.")
    path = arguments.dataset_name
    splits = load_splits(path, name=arguments.dataset_config, streaming=arguments.dataset_streaming)
    wanted = [arguments.dataset_train_split]
    test = arguments.dataset_test_split
    if test in splits or test != ScriptArguments.dataset_test_split:
        wanted.append(test)
    columns, rename = arguments.dataset_columns, arguments.dataset_rename
    taken = {split: take_columns(take_split(splits, split, path), columns, path) for split in wanted}
    return type(splits)({split: renamed(rows, rename, path) for split, rows in taken.items()})
