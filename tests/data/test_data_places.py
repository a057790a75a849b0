"""Errors about a row say which row of which dataset it is, and at which line of a file it stands."""

from __future__ import annotations

import json
import pickle

import pytest
from datasets import Dataset

from tests.conftest import make_tokenizer
from trl import KTOConfig, KTOTrainer, SFTConfig, SFTTrainer
from trl.data.mixtures import DatasetMixtureConfig, get_dataset
from trl.data.places import naming_lines, naming_rows
from trl.data.sources import ScriptArguments, load_dataset_argument
from trl.errors import DataError, RowError

OPTIONS = {"report_to": [], "html_report": False, "save_strategy": "no", "max_steps": 1}


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Eight rows on lines 1, 3, 4, 5 and so on: the second line is empty."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [json.dumps({"text": f"row {i}"}) for i in range(1, 9)]
    (tmp_path / "rows.jsonl").write_text("\n".join([rows[0], "", *rows[1:]]))
    (tmp_path / "more.jsonl").write_text("\n".join(["", *rows]))
    return str(tmp_path / "rows.jsonl")


def message(row: int, dataset: str, **script) -> str:
    """What is said of a row of what a command line has read, once its text was compared with the line named."""
    arguments = ScriptArguments(**script)
    splits = load_dataset_argument(arguments)
    with pytest.raises(RowError) as caught, naming_lines(arguments), naming_rows(dataset):
        raise RowError(row, ": no good.")
    name = arguments.dataset_train_split if dataset == "train" else arguments.dataset_test_split
    if caught.value.place:
        _, number, _, file = caught.value.place.split()
        path = next(path for path in arguments.dataset_name if path.endswith(file))
        with open(path) as lines:
            assert json.loads(lines.read().splitlines()[int(number) - 1]) == splits[name][row]
    return str(caught.value)


def test_a_line_is_that_of_the_row(file):
    assert message(0, "train", dataset_name=[file]) == "Row 1 (line 1 of rows.jsonl): no good."
    assert message(2, "train", dataset_name=[file]) == "Row 3 (line 4 of rows.jsonl): no good."


@pytest.mark.parametrize(("split", "line"), [("train[2:]", 5), ("train[-3:]", 8), ("train[25%:75%]", 5)])
def test_slices_begin_later(file, split, line):
    found = message(1, "train", dataset_name=[file], dataset_train_split=split)
    assert found == f"Row 2 (line {line} of rows.jsonl): no good."
    evaluated = message(1, "eval", dataset_name=[file], dataset_test_split=split)
    assert evaluated == f"Row 2 of 'eval' (line {line} of rows.jsonl): no good."


def test_files_follow_one_another(file):
    more = file.replace("rows.jsonl", "more.jsonl")
    assert message(8, "train", dataset_name=[file, more]) == "Row 9 (line 2 of more.jsonl): no good."


def test_rows_of_other_files_have_no_lines(file, tmp_path):
    Dataset.from_dict({"text": ["a", "b"]}).to_parquet(tmp_path / "rows.parquet")
    assert message(1, "train", dataset_name=[str(tmp_path / "rows.parquet")]) == "Row 2: no good."
    Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "saved")
    assert message(1, "train", dataset_name=[str(tmp_path / "saved")]) == "Row 2: no good."


@pytest.mark.parametrize(
    "mixing",
    [{}, {"probabilities": [0.6, 0.4], "stopping_strategy": "all_exhausted"}, {"test_split_size": 5}],
    ids=["joined", "interleaved", "split"],
)
def test_rows_of_a_mixture_are_those_of_its_datasets(file, tmp_path, mixing):
    """Every row that is named is compared with the one of the mixture."""
    saved = Dataset.from_dict({"text": ["a", "b", "c"]})
    saved.save_to_disk(tmp_path / "saved")
    datasets = [{"path": file, "split": "train[1:]"}, {"path": str(tmp_path / "saved")}]
    mixture = DatasetMixtureConfig(datasets, **mixing)
    lines, kinds = (tmp_path / "rows.jsonl").read_text().splitlines(), set()
    for split, rows in get_dataset(mixture).items():
        for i, row in [*enumerate(rows)][::2]:
            with pytest.raises(RowError) as caught, naming_lines(ScriptArguments(), mixture), naming_rows(split):
                raise RowError(i, ": no good.")
            kind, number, _, place = caught.value.place.split()
            kinds.add(kind)
            there = json.loads(lines[int(number) - 1]) if kind == "line" else saved[int(number) - 1]
            assert (there, place) == (row, "rows.jsonl" if kind == "line" else repr(str(tmp_path / "saved")))
    assert kinds == {"line", "row"}


def test_an_error_comes_out_of_another_process_whole():
    error = pickle.loads(pickle.dumps(RowError(2, ", column 'text': no good.", "easy", "line 4 of rows.jsonl")))
    assert str(error) == "Row 3 of 'easy' (line 4 of rows.jsonl), column 'text': no good."


def test_a_shuffled_row_is_that_of_the_user(make_model, tmp_path):
    rows = Dataset.from_dict({"text": [*"abcdefg", None]})
    args = SFTConfig(str(tmp_path), shuffle_dataset=True, **OPTIONS)
    with pytest.raises(DataError, match="Row 8, column 'text'"):
        SFTTrainer(make_model("llama"), args, train_dataset=rows, processing_class=make_tokenizer())


def test_half_of_a_pair_is_the_row_of_the_pair(make_model, tmp_path):
    rows = Dataset.from_dict({"prompt": ["a", "b", "c"], "chosen": ["x"] * 3, "rejected": ["y", "z", None]})
    with pytest.raises(DataError, match="Row 3 of 'easy', column 'completion'"):
        KTOTrainer(
            make_model("llama"),
            args=KTOConfig(str(tmp_path), **OPTIONS),
            eval_dataset={"easy": rows},
            processing_class=make_tokenizer(),
        )
