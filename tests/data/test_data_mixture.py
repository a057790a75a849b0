"""Datasets from folders and files, their splits and columns, and mixtures of them."""

import gzip
import json

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import HfArgumentParser

from trl.data.mixtures import DatasetConfig, DatasetMixtureConfig, get_dataset
from trl.data.sources import ScriptArguments, load_dataset_argument, load_rows
from trl.errors import ConfigError, DataError

ROWS = [{"text": f"row {i}", "number": i} for i in range(10)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def write(path, rows=ROWS) -> str:
    path.parent.mkdir(exist_ok=True, parents=True)
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        separator = "\t" if path.suffix == ".tsv" else ","
        lines = [separator.join(map(str, row.values())) for row in rows]
        path.write_text("\n".join([separator.join(rows[0]), *lines]))
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz"])
def test_files(tmp_path, name):
    rows = load_rows(write(tmp_path / name))
    assert rows["text"][3] == "row 3"
    assert rows["number"][:] == list(range(10))


def test_a_parser_of_transformers_reads_them():
    (arguments,) = HfArgumentParser(ScriptArguments).parse_args_into_dataclasses(["--dataset_name", "imdb"])
    assert arguments == ScriptArguments(dataset_name="imdb")


def test_several_files_are_one_dataset(tmp_path):
    paths = [write(tmp_path / "a.jsonl", ROWS[:4]), write(tmp_path / "b.jsonl", ROWS[4:])]
    assert load_rows(paths)["number"][:] == list(range(10))
    assert load_rows(str(tmp_path / "*.jsonl"))["number"][:] == list(range(10))


def test_folder_of_files_has_splits_by_their_names(tmp_path):
    write(tmp_path / "rows" / "train.jsonl", ROWS[:8])
    write(tmp_path / "rows" / "test.jsonl", ROWS[8:])
    splits = load_dataset_argument(ScriptArguments(dataset_name=str(tmp_path / "rows")))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 8, "test": 2}


def test_saved_datasets(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    DatasetDict({"fit": Dataset.from_list(ROWS[:7]), "check": Dataset.from_list(ROWS[7:])}).save_to_disk(
        tmp_path / "two"
    )
    assert len(load_rows(str(tmp_path / "one"))) == 10
    arguments = ScriptArguments("./two", dataset_train_split="fit", dataset_test_split="check")
    assert {name: len(rows) for name, rows in load_dataset_argument(arguments).items()} == {"fit": 7, "check": 3}
    streamed = load_rows("./one", streaming=True)
    assert isinstance(streamed, IterableDataset)


@pytest.mark.parametrize(
    ("split", "numbers"),
    [
        ("train[:3]", [0, 1, 2]),
        ("train[8:]", [8, 9]),
        ("train[-2:]", [8, 9]),
        ("train[20%:50%]", [2, 3, 4]),
        ("train[3:5]", [3, 4]),
    ],
)
def test_slices(tmp_path, split, numbers):
    path = write(tmp_path / "a.jsonl")
    assert load_rows(path, split=split)["number"][:] == numbers


def test_streaming_and_columns(tmp_path):
    rows = load_rows(write(tmp_path / "a.jsonl"), split="train[2:4]", columns=["number"], streaming=True)
    assert isinstance(rows, IterableDataset)
    assert list(rows) == [{"number": 2}, {"number": 3}]


def test_evaluation_split_is_optional(tmp_path):
    path = write(tmp_path / "a.jsonl")
    assert list(load_dataset_argument(ScriptArguments(path))) == ["train"]
    both = load_dataset_argument(ScriptArguments(path, dataset_train_split="train[:8]", dataset_test_split="train[8:]"))
    assert {name: len(rows) for name, rows in both.items()} == {"train[:8]": 8, "train[8:]": 2}


def mixture(tmp_path, **options) -> DatasetMixtureConfig:
    """40 rows numbered 0–39 and 10 numbered 100–109, as a YAML file would name them."""
    large = write(tmp_path / "large.jsonl", [{"text": "l", "number": i} for i in range(40)])
    small = write(tmp_path / "small.jsonl", [{"text": "s", "number": 100 + i} for i in range(10)])
    first, second = options.pop("fractions", (None, None))
    return DatasetMixtureConfig(
        [
            {"path": large, "fraction": first, "columns": ["number"]},
            DatasetConfig(small, fraction=second, columns=["number"]),
        ],
        **options,
    )


def test_datasets_follow_one_another(tmp_path):
    rows = get_dataset(mixture(tmp_path))["train"]
    assert rows["number"][:] == [*range(40), *range(100, 110)]


def test_fractions_are_shares_of_the_mixture(tmp_path):
    # 75 % and 25 % with 40 and 10 rows: the small one gives all of its 10, so the large one gives 30.
    rows = get_dataset(mixture(tmp_path, fractions=(0.75, 0.25)))["train"]
    assert rows["number"][:] == [*range(30), *range(100, 110)]
    # The same shares, not normalised.
    assert len(get_dataset(mixture(tmp_path, fractions=(3, 1)))["train"]) == 40


def test_interleaved_until_the_first_ends_or_all_have(tmp_path):
    first = get_dataset(mixture(tmp_path, probabilities=[0.5, 0.5]))["train"]["number"][:]
    small = [number for number in first if number >= 100]
    assert small == list(range(100, 110))
    assert [number for number in first if number < 100] == list(range(len(first) - 10))
    every = get_dataset(mixture(tmp_path, probabilities=[1, 1], stopping_strategy="all_exhausted"))["train"]
    assert set(range(40)) <= set(every["number"])
    only = get_dataset(mixture(tmp_path, probabilities=[0, 2]))["train"]["number"][:]
    assert only == list(range(100, 110))


def test_seed_of_interleaving(tmp_path):
    def drawn(seed):
        return get_dataset(mixture(tmp_path, probabilities=[0.5, 0.5], seed=seed))["train"]["number"][:]

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


def test_streaming_mixture(tmp_path):
    rows = get_dataset(mixture(tmp_path, streaming=True))["train"]
    assert [row["number"] for row in rows] == [*range(40), *range(100, 110)]


@pytest.mark.parametrize(("size", "expected"), [(0.2, 10), (5, 5)])
def test_rows_set_aside(tmp_path, size, expected):
    splits = get_dataset(mixture(tmp_path, test_split_size=size))
    assert len(splits["test"]) == expected
    assert sorted([*splits["train"]["number"], *splits["test"]["number"]]) == [*range(40), *range(100, 110)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"dataset_name": "trian.jsonl"},
            r"dataset_name='trian.jsonl': there is no such file or folder. Did you mean 'train",
        ),
        ({"dataset_name": "./nowhere/rows"}, "there is no folder 'nowhere'"),
        (
            {"dataset_name": "notes.md"},
            "dataset_name='notes.md' is not a data file: known extensions are .jsonl, .ndjson, .json, .csv",
        ),
        ({"dataset_name": ["train.jsonl", "b.csv"]}, "files of different kinds"),
        ({"dataset_name": ["b.csv", "c.tsv"]}, "files of different kinds"),
        (
            {"dataset_name": "semicolons.csv"},
            "line 1: its columns are separated by ';'.* a .csv file has to have ','. Write it with",
        ),
        ({"dataset_name": "tabs.csv"}, r"separated by '\\t'.* Name it .tsv"),
        ({"dataset_name": "commas.tsv"}, r"separated by ','.* a .tsv file has to have '\\t'"),
        ({"dataset_name": ["train.jsonl", "imdb"]}, "to mix datasets, use `datasets`"),
        ({"dataset_name": None}, "dataset_name is missing"),
        ({"dataset_name": "broken.jsonl"}, "Dataset 'broken.jsonl' cannot be read as rows: "),
        ({"dataset_name": ["train.jsonl", "others.jsonl"]}, "some of its files have the columns .*, and others do not"),
        ({"dataset_train_split": "tran"}, r"has no split 'tran'. Did you mean 'train'\? Its splits: train."),
        ({"dataset_test_split": "dev"}, "has no split 'dev'. Its splits: train."),
        ({"dataset_train_split": "train[2]"}, r"split='train\[2\]' is not a slice: write name\[start:end\]"),
        ({"dataset_train_split": "train[a:]"}, "is not a slice"),
        ({"dataset_train_split": "train[:50%]", "dataset_streaming": True}, "Give numbers of rows"),
        ({"dataset_train_split": "train[-3:]", "dataset_streaming": True}, "has no end to count from"),
        ({"dataset_columns": ["txt"]}, r"has no column 'txt'. Did you mean 'text'\? Its columns: text, number."),
    ],
)
def test_refused_datasets(tmp_path, arguments, message):
    write(tmp_path / "train.jsonl")
    write(tmp_path / "b.csv")
    for name, separator in {"semicolons.csv": ";", "tabs.csv": "\t", "commas.tsv": ","}.items():
        (tmp_path / name).write_text(separator.join("pq") + "\n" + separator.join("ab") + "\n")
    write(tmp_path / "c.tsv")
    (tmp_path / "notes.md").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"text": [')
    (tmp_path / "others.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    with pytest.raises((DataError, ConfigError), match=message):
        load_dataset_argument(ScriptArguments(**{"dataset_name": "train.jsonl", **arguments}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"datasets": [{"path": "a.b/c", "fracton": 1}]},
            r"datasets, entry 1: unknown key 'fracton'. Did you mean 'fraction'",
        ),
        ({"datasets": [{"name": "x"}]}, r"datasets, entry 1: path is missing"),
        ({"datasets": [{"path": "imdb"}, {"path": "./none.jsonl"}]}, "path='./none.jsonl': there is no such file"),
        ({"datasets": [{"path": "imdb", "fraction": 0}]}, "fraction=0 of dataset 'imdb' takes no rows"),
        ({"datasets": [{"path": "imdb", "fraction": 1}, {"path": "c4"}]}, "1 of 2 datasets have a fraction"),
        ({"datasets": [{"path": "imdb", "fraction": 1}], "streaming": True}, "use probabilities"),
        ({"datasets": [{"path": "imdb", "fraction": 1}], "probabilities": [1]}, "two ways to mix"),
        ({"datasets": [{"path": "imdb"}], "probabilities": [0.5, 0.5]}, "2 probabilities for 1 datasets"),
        ({"datasets": [{"path": "imdb"}], "probabilities": [-1]}, "none may be negative"),
        ({"stopping_strategy": "first_exausted"}, "Did you mean 'first_exhausted'"),
        ({"streaming": True, "test_split_size": 0.1}, "number of rows is unknown"),
        ({"test_split_size": 1.5}, "test_split_size=1.5: give a share below 1, or a number of rows"),
        ({"test_split_size": 0}, "test_split_size=0: give a share below 1"),
    ],
)
def test_refused_mixtures(options, message):
    with pytest.raises((ConfigError, DataError), match=message):
        DatasetMixtureConfig(**options)


def test_empty_mixture():
    with pytest.raises(ConfigError, match="datasets is empty"):
        get_dataset(DatasetMixtureConfig())


def test_columns_of_one_name_and_two_types(tmp_path):
    text = write(tmp_path / "text.jsonl", [{"text": "a"}])
    parts = write(tmp_path / "parts.jsonl", [{"text": ["a", "b"]}])
    words = r"Column 'text' of the mixture is Value\('string'\) in '.*text.jsonl' and List\(.*\) in '.*parts.jsonl'"
    with pytest.raises(DataError, match=words):
        get_dataset(DatasetMixtureConfig([{"path": text}, {"path": parts}]))


def test_datasets_without_a_column_in_common(tmp_path):
    chats = write(tmp_path / "sharegpt.jsonl", [{"conversations": [{"from": "human", "value": "Hi"}]}])
    answers = write(tmp_path / "alpaca.jsonl", [{"instruction": "Add 1 and 2.", "output": "3"}])
    with pytest.raises(
        DataError, match=r"no column in common: .*sharegpt.jsonl' has \['conversations'\].*'instruction'"
    ):
        get_dataset(DatasetMixtureConfig(datasets=[{"path": chats}, {"path": answers}]))


def test_columns_that_one_dataset_lacks_are_named(tmp_path, caplog):
    bare = write(tmp_path / "bare.jsonl", [{"text": "a"}])
    scored = write(tmp_path / "scored.jsonl", [{"text": "b", "score": 1.0}])
    rows = get_dataset(DatasetMixtureConfig([{"path": bare}, {"path": scored}]))["train"]
    assert list(rows) == [{"text": "a", "score": None}, {"text": "b", "score": 1.0}]
    assert caplog.messages == [f"Dataset {bare!r} of the mixture has no column 'score': its rows have None there."]


# ---- columns under other names ----


def jsonl(folder, row):
    (folder / "rows.jsonl").write_text(f"{json.dumps(row)}\n")
    return str(folder / "rows.jsonl")


def test_columns_under_other_names(tmp_path):
    path = jsonl(tmp_path, {"question": "a", "answer": "b", "c": "d"})
    named = ScriptArguments(dataset_name=path, dataset_rename=["question=prompt", "answer=completion"])
    assert load_dataset_argument(named)["train"][0] == {"prompt": "a", "completion": "b", "c": "d"}
    for entry in (
        {"rename": {"question": "prompt", "answer": "completion"}, "columns": ["question", "answer"]},
        {"rename": ["question=prompt", "answer=completion"], "columns": ["question", "answer"]},
    ):
        mixture = DatasetMixtureConfig(datasets=[{"path": path, **entry}])
        assert get_dataset(mixture)["train"][0] == {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("columns", "names"),
    [
        ({"prompt": "question", "completion": "answer"}, ["prompt", "completion", "c"]),
        ({"prompt": "question", "response": "answer"}, ["instruction", "output", "c"]),
        ({"prompt": "question", "query": "answer", "system": "c"}, ["instruction", "input", "system"]),
    ],
)
def test_columns_as_llama_factory_names_them(tmp_path, columns, names):
    path = jsonl(tmp_path, {"question": "a", "answer": "b", "c": "d"})
    mixture = DatasetMixtureConfig(datasets=[{"path": path, "columns": columns}])
    assert get_dataset(mixture)["train"].column_names == names


@pytest.mark.parametrize(
    ("rename", "words"),
    [
        (["question"], "'question' is not a pair of names: write old=new"),
        (["question=prompt", "answer=prompt"], "'prompt' occurs twice"),
        (["qestion=prompt"], "no column 'qestion'. Did you mean 'question'"),
        (["question=answer"], "already has a column 'answer'"),
    ],
)
def test_renames_that_cannot_be(tmp_path, rename, words):
    path = jsonl(tmp_path, {"question": "a", "answer": "b"})
    with pytest.raises((ConfigError, DataError), match=words):
        load_dataset_argument(ScriptArguments(dataset_name=path, dataset_rename=rename))


def test_a_mapping_of_columns_that_is_not_understood_is_refused(tmp_path):
    path = jsonl(tmp_path, {"question": "a"})
    with pytest.raises(ConfigError, match="columns: unknown role 'promt'. Did you mean 'prompt'"):
        DatasetMixtureConfig(datasets=[{"path": path, "columns": {"promt": "question"}}])
