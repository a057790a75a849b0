"""Words and files against options: what wins, and the words of every refusal."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import pytest

from trl.cli.parser import TrlParser
from trl.errors import ConfigError


@dataclass
class Data:
    ALIASES: ClassVar[dict[str, str]] = {"rows_file": "path", "gone": ""}

    path: str | None = None
    columns: list[str] | None = None
    seed: int = 1


@dataclass
class Training:
    learning_rate: float = 1e-4
    packing: bool = False
    no_cache: bool = False
    schedule: Literal["linear", "cosine"] = "linear"
    report_to: str | list[str] | None = "none"
    kwargs: dict | None = None
    steps: int | None = 10
    bf16: bool | None = None
    seed: int = 2
    tags: list[str] = field(default_factory=list)


def parse(*words: str):
    return TrlParser((Data, Training)).parse_args_and_config(words)


def test_defaults_are_those_of_the_dataclasses():
    assert parse() == (Data(), Training())


def test_one_class_alone():
    assert TrlParser(Data).parse_args_and_config(["--path", "a"]) == (Data(path="a"),)


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--learning_rate", "3"], "learning_rate", 3.0),
        (["--learning-rate=1e-3"], "learning_rate", 1e-3),
        (["--learning_rate", "1", "--learning_rate", "2"], "learning_rate", 2.0),
        (["--steps", "-1"], "steps", -1),
        (["--steps", "none"], "steps", None),
        (["--packing"], "packing", True),
        (["--packing", "true"], "packing", True),
        (["--packing", "false"], "packing", False),
        (["--packing=False"], "packing", False),
        (["--no_packing"], "packing", False),
        (["--no-packing"], "packing", False),
        (["--packing", "--steps", "3"], "packing", True),
        (["--no_cache"], "no_cache", True),
        (["--no_no_cache"], "no_cache", False),
        (["--bf16", "none"], "bf16", None),
        (["--bf16"], "bf16", True),
        (["--schedule", "cosine"], "schedule", "cosine"),
        (["--kwargs", '{"a": 1}'], "kwargs", {"a": 1}),
        (["--report_to", "none"], "report_to", "none"),
        (["--report_to", "wandb", "trackio"], "report_to", ["wandb", "trackio"]),
        (["--tags", "a", "b", "--steps", "3"], "tags", ["a", "b"]),
    ],
)
def test_words(words, name, value):
    _, training = parse(*words)
    assert getattr(training, name) == value
    assert type(getattr(training, name)) is type(value)


def test_older_names():
    assert parse("--rows_file", "a.jsonl", "--gone", "x", "y", "--seed", "5")[0] == Data(path="a.jsonl", seed=5)


def test_a_name_that_several_classes_have_sets_all():
    data, training = parse("--seed", "7")
    assert (data.seed, training.seed) == (7, 7)


def test_files_are_merged_and_the_command_line_wins(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_PARSER_TEST", "before")
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(
        "env:\n  TRL_PARSER_TEST: 5\nlearning-rate: 1e-3\nsteps: 4\nkwargs: {a: 1}\nrows_file: x\npacking: yes\n"
    )
    second.write_text("steps: 5\nreport_to: [a, b]\nbf16: null\ncolumns:\n  - c\n")
    import os

    for words in (["--config", str(first), str(second)], ["--config", str(first), f"--config={second}"]):
        data, training = parse(*words, "--learning_rate", "2")
        assert data == Data(path="x", columns=["c"])
        assert training == Training(2.0, packing=True, steps=5, kwargs={"a": 1}, report_to=["a", "b"])
    assert os.environ["TRL_PARSER_TEST"] == "5"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lerning_rate", "3"], r"Unknown option --lerning_rate. Did you mean '--learning_rate'\?"),
        (["--packin"], "Did you mean '--packing'"),
        (["--no_steps"], "Unknown option --no_steps"),
        (["--learning_rate", "fast"], "--learning_rate was given 'fast', but takes a float."),
        (["--steps", "1.5"], "--steps was given '1.5', but takes an int or none."),
        (["--steps"], "--steps was given nothing, but takes an int or none."),
        (["--steps", "--packing"], "--steps was given nothing"),
        (["--schedule", "cosin"], r"takes one of 'linear', 'cosine'. Did you mean 'cosine'\?"),
        (["--kwargs", "{a: 1}"], "takes a JSON object or none, and this is not JSON"),
        (["--packing=maybe"], "--packing was given 'maybe', but takes true or false."),
        (["--packing", "maybe"], "Unexpected 'maybe' after --packing, which takes true or false."),
        (
            ["learning_rate", "3"],
            r"Unexpected 'learning_rate': options start with two dashes. Did you mean '--learning_",
        ),
        (["-learning_rate", "3"], "Did you mean '--learning_rate'"),
        (
            ["--config", "nowhere/to.yaml"],
            "--config nowhere/to.yaml: there is no such file. There is no folder 'nowhere'",
        ),
        (["--config"], "--config was given nothing, but takes a YAML file."),
    ],
)
def test_refused_words(words, message):
    with pytest.raises(ConfigError, match=message):
        parse(*words)


def test_all_mistakes_of_a_command_line_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        parse("--lerning_rate", "3", "--steps", "1.5", "--packing", "--schedule", "cosin", "--epoch", "2", "3")
    count, *mistakes = str(caught.value).splitlines()
    assert count == "4 mistakes:"
    named = ("--lerning_rate", "--steps was given '1.5'", "--schedule was given 'cosin'", "--epoch")
    assert [name in told for name, told in zip(named, mistakes, strict=True)] == [True] * 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learnin_rate: 1", r"c.yaml: unknown key 'learnin_rate'. Did you mean 'learning_rate'\?"),
        ("vllm_device: cuda:3", "c.yaml: unknown key 'vllm_device'. Set `vllm_mode`"),
        ("steps: many", "c.yaml: steps was given 'many', but takes an int or none."),
        ("path: 5", r"c.yaml: path was given 5, but takes text or none. Put it in quotes."),
        ("columns: [1]", "c.yaml: columns was given .1., but takes text"),
        ("schedule: cosin", "Did you mean 'cosine'"),
        ("- a\n- b", "a configuration is a list of `option: value` lines, not a list"),
        ("a: [", "c.yaml is not YAML"),
        ("env: [a]", "env takes names of environment variables"),
    ],
)
def test_refused_files(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        parse("--config", "c.yaml")


def test_keys_of_other_releases_may_ask_for_nothing(tmp_path):
    (tmp_path / "c.yaml").write_text("vllm_device: auto\ngenerate_during_eval: false\n")
    assert parse("--config", str(tmp_path / "c.yaml")) == (Data(), Training())
    (tmp_path / "c.yaml").write_text("vllm_device: cuda:3\n")
    with pytest.raises(ConfigError, match="unknown key 'vllm_device'. Set `vllm_mode`"):
        parse("--config", str(tmp_path / "c.yaml"))


def test_missing_file_names_its_neighbour(tmp_path):
    (tmp_path / "sft.yaml").write_text("")
    with pytest.raises(ConfigError, match="there is no such file. Did you mean 'sft.yaml'"):
        parse("--config", str(tmp_path / "stf.yaml"))


def test_missing_value_of_a_required_field():
    @dataclass
    class Needs:
        path: str

    with pytest.raises(ConfigError, match="--path is missing: it takes text."):
        TrlParser(Needs).parse_args_and_config([])


def test_commas_between_the_items_of_a_list():
    from trl import ModelConfig

    (made,) = TrlParser(ModelConfig).parse_args_and_config(["--lora_target_modules", "q_proj,", "v_proj"])
    assert made.lora_target_modules == ["q_proj", "v_proj"]
    assert TrlParser(Data).parse_args_and_config(["--columns", ",", "a"])[0].columns == [",", "a"]


@pytest.mark.parametrize(("spelled", "value"), [("true", True), ("false", False), ("last", "last"), ("'true'", True)])
def test_a_run_is_resumed_from_its_newest_checkpoint(spelled, value, tmp_path):
    @dataclass
    class Resumed:
        resume_from_checkpoint: str | None = None

    (tmp_path / "run.yaml").write_text(f"resume_from_checkpoint: {spelled}")
    for words in (["--config", str(tmp_path / "run.yaml")], ["--resume_from_checkpoint", spelled.strip("'")]):
        (made,) = TrlParser(Resumed).parse_args_and_config(words)
        assert made.resume_from_checkpoint == value


def test_rest_is_handed_back():
    data, _, rest = TrlParser((Data, Training)).parse_args_and_config(
        ["--path", "a", "--mine", "3"], return_remaining_strings=True
    )
    assert (data.path, rest) == ("a", ["--mine", "3"])


def test_unknown_keys_of_files_are_handed_back_if_asked_for(tmp_path, caplog):
    """As scripts want it that are started by `accelerate launch` with the file that configures both."""
    (tmp_path / "sft.yaml").write_text("path: a\nnum_processes: 2")
    parser, words = TrlParser((Data, Training), prog="trl sft"), ["--config", str(tmp_path / "sft.yaml"), "--mine", "3"]
    unknown, rest = ["--num_processes", "2"], ["--mine", "3"]
    assert parser.parse_args_and_config(words, return_remaining_strings=True)[2:] == (unknown + rest,)
    apart = parser.parse_args_and_config(words, return_remaining_strings=True, separate_remaining_strings=True)
    assert apart[2:] == (unknown, rest)
    data, _ = parser.parse_args_and_config(words[:2], fail_with_unknown_args=False)
    assert data.path == "a"
    assert "--num_processes 2" in caplog.text
    with pytest.raises(ConfigError, match="Unknown option --mine"):
        parser.parse_args_and_config(words, fail_with_unknown_args=False)
    with pytest.raises(ConfigError, match="unknown key 'num_processes'"):
        parser.parse_args_and_config(words[:2])


def test_a_process_ends_with_a_message(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["/somewhere/script.py", "--reprot_to", "3"])
    with pytest.raises(SystemExit) as ended:
        TrlParser(Training).parse_args_and_config()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "script.py: error: Unknown option --reprot_to. Did you mean '--report_to'?\n"


def test_help_of_a_script(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["script.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        TrlParser(Training).parse_args_and_config()
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "script.py [--config" in shown
    assert "--learning_rate" in shown
