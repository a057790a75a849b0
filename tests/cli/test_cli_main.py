"""The command itself: what it prints, what it refuses before loading anything, and that it trains."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.processes import fast_python
from trl.cli import completion
from trl.cli.commands import METHODS, methods
from trl.cli.main import main
from trl.cli.train import library_errors_as_config_errors
from trl.errors import ConfigError

HEAVY = "{'torch', 'transformers', 'datasets', 'peft', 'numpy', 'accelerate'}"


def trl(*words: str, folder: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run([fast_python(), "-m", "trl", *words], cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(autouse=True)
def without_bars(monkeypatch):
    """What the command sets where output is redirected, put back afterwards."""
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a tiny model, its tokenizer, and files of chats."""
    from tests.conftest import MODELS, make_tokenizer

    folder = tmp_path_factory.mktemp("run")
    MODELS["llama"]().save_pretrained(folder / "tiny")
    make_tokenizer().save_pretrained(folder / "tiny")
    chats = [
        [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}."}]
        for i in range(16)
    ]
    (folder / "train.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    (folder / "test.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats[:4]))
    return folder


@pytest.fixture
def inside(folder, monkeypatch):
    """The folder as the current one, with what the command changes in this process put back afterwards."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    return folder


@pytest.mark.parametrize("words", [["--help"], ["sft", "--help"], ["sft", "--help-all"], ["check", "ppo", "-h"]])
def test_help_imports_nothing_heavy(words):
    code = (
        f"import sys; from trl.cli.main import main; main({words}); print({HEAVY} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "set()\n"
    assert "Usage" in done.stdout
    assert "\x1b[" not in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stf"], "Unknown command 'stf'. Did you mean 'sft'?"),
        (["sft", "--lerning_rate", "3"], "Unknown option --lerning_rate. Did you mean '--learning_rate'"),
        (["sft", "--max_steps", "few"], "--max_steps was given 'few', but takes an int."),
        (["sft", "--eval_strategy", "epochs"], "takes one of 'no', 'steps', 'epoch'. Did you mean 'epoch'"),
        (["sft", "--config", "no.yaml"], "--config no.yaml: there is no such file."),
        (
            ["sft", "--loss_type", "nlll"],
            "--loss_type was given 'nlll', but takes one of 'nll', 'chunked_nll', 'dft'. Did you mean",
        ),
        (["dpo", "--loss_type", "sigmod"], "but takes one or several of 'sigmoid', 'sigmoid_norm', "),
        (["dpo", "--loss_type", "ipo", "sigmod"], "Did you mean 'sigmoid'"),
        (["grpo", "--scale_rewards", "grup"], "or true or false. Did you mean 'group'?"),
        (["ppo", "--kl_penalty", "kll"], "takes one of 'kl', 'abs', 'mse', 'full'. Did you mean 'kl'?"),
        (["sft", "--dataset_name", "./no.jsonl", "--model_name_or_path", "gpt2"], "dataset_name='./no.jsonl'"),
        (
            ["sft", "--dataset_name", "imdb", "--model_name_or_path", "./no"],
            "model_name_or_path='./no': there is no such",
        ),
        (["sft", "--dataset_name", "imdb", "--model_name_or_path", "."], "holds no model: config.json is missing."),
        (["sft", "--model_name_or_path", "gpt2"], "--dataset_name is missing"),
        (["sft", "--dataset_name", "imdb"], "--model_name_or_path is missing"),
        (["sft", "--dataset_name", "imdb", "--model_name_or_path", "gpt2", "--dtype", "half"], "Unknown dtype 'half'"),
        (["sft", "--dataset_name", "imdb", "--datasets", '{"path": "c4"}'], "dataset_name and datasets are both given"),
        (["preview", "stf"], "Unknown method 'stf'. Did you mean 'sft'"),
        (["preview", "--row", "3"], "Unknown option --row. Did you mean '--rows'"),
        (
            ["sweep", "a.py", "--config", "a.yaml", "--sequence"],
            "Unknown option --sequence. Did you mean '--sequential'?",
        ),
        (["sweep"], "--config is missing: it takes text. YAML file with `tune_config`"),
        (["completion", "zhs"], "Unknown shell 'zhs'. Did you mean 'zsh'"),
        (["env", "--all"], "trl env takes no options, but was given '--all'."),
    ],
)
def test_refused(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("trl: error: ")
    assert message in captured.err


def test_refused_before_anything_heavy_is_imported(tmp_path):
    (tmp_path / "bad.yaml").write_text("max_lenght: 3\n")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    wrong = [
        ["sft", "--max_lenght", "3"],
        ["sft", "--config", "bad.yaml"],
        ["sft", "--max_steps", "few"],
        ["dpo", "--loss_type", "sigmod"],
        ["sft", "--config", "no.yaml"],
        ["sft", "--dataset_name", "./no.jsonl", "--model_name_or_path", "gpt2"],
        ["sft", "--dataset_name", "imdb", "--model_name_or_path", "bare"],
        ["chat", "--model_name_or_path", "bare"],
        ["grpo", "--dataset_name", "imdb", "--model_name_or_path", "gpt2"],
        ["ppo", "--reward_funcs", "accuracy_reward", "--reward_weights", "1", "2"],
        ["rloo", "--reward_funcs", "accuracy_reward", "--use_vllm"],
        ["dpo", "--dataset_name", "imdb", "--attn_implementation", "flash_attention_3"],
    ]
    code = f"import sys; from trl.cli.main import main; print([main(w) for w in {wrong}], {HEAVY} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == f"{[2] * len(wrong)} set()\n"
    assert done.stderr.count("\n") == done.stderr.count("trl: error: ") == len(wrong)
    assert "bad.yaml: unknown key 'max_lenght'. Did you mean 'max_length'" in done.stderr
    assert done.stderr.count("'bare': the folder holds no weights") == 2


FILES = {
    "flow.yaml": b"model_name_or_path: [1\n",
    "tabs.yaml": b"max_length:\n\t12\n",
    "latin.yaml": b"output_dir: caf\xe9\n",
    "twice.yaml": b"seed: 1\nmax_steps: 2\nseed: 3\n",
    "text.yaml": b"just text\n",
    "empty.jsonl": b"",
}
DATA = ["--dataset_name", "imdb", "--model_name_or_path", "gpt2"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--config", "flow.yaml"],
            "flow.yaml is not YAML: while parsing a flow sequence: expected ',' or ']', but got",
        ),
        (["--config", "tabs.yaml"], "(line 2). YAML is indented with spaces, never with tabs."),
        (["--config", "latin.yaml"], "--config latin.yaml: this is not UTF-8 text"),
        (["--config", "twice.yaml"], "twice.yaml: seed is given twice, in lines 1 and 3: keep one."),
        (["--config", "text.yaml"], "a configuration is a list of `option: value` lines, not a str."),
        (["--config", "."], "--config .: this is a folder, not a file."),
        (["--dataset_name", "empty.jsonl", "--model_name_or_path", "gpt2"], "'empty.jsonl' is empty: it has no rows."),
        (["--dataset_name", "imdb", "--model_name_or_path", "text.yaml"], "='text.yaml' is a file: give the folder of"),
        ([*DATA, "--gradient_accumulation_steps", "0"], "gradient_accumulation_steps=0: give 1 or more."),
        ([*DATA, "--learning_rate", "-1"], "learning_rate=-1.0: give 0 or more."),
        ([*DATA, "--chat_template_path", "no.jinja"], "chat_template_path='no.jinja': there is no such file."),
        ([*DATA, "--fp16", "--bf16"], "bf16 and fp16 are both set"),
        ([*DATA, "--output_dir", "text.yaml"], "output_dir='text.yaml' cannot be created (File exists)."),
    ],
)
def test_files_and_values_that_nothing_can_be_done_with(words, message, capsys, tmp_path, monkeypatch):
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    assert main(["sft", *words, "--use_cpu"]) == 2
    assert message in capsys.readouterr().err


def test_model_folder_with_checkpoints_inside(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "checkpoint-8").mkdir(parents=True)
    assert main(["sft", "--dataset_name", "imdb", "--model_name_or_path", "run"]) == 2
    assert "holds no model: config.json is missing. Did you mean 'run/checkpoint-8'?" in capsys.readouterr().err


def test_overview_lists_what_is_there(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    for name in methods():
        assert f"\n  {name} " in shown
    for method in METHODS:
        if method.name not in methods():
            assert f"\n  {method.name} " not in shown


def test_help_of_a_method(capsys):
    assert main(["help", "sft"]) == 0
    short = capsys.readouterr().out
    assert main(["sft", "--help-all"]) == 0
    whole = capsys.readouterr().out
    positions = [
        short.index(f"\n{theme}\n") for theme in ("Data", "Model", "Adapters", "Method", "Optimisation", "Saving")
    ]
    assert positions == sorted(positions)
    assert "--max_length" in short
    assert "[1024]" in short
    assert "--ddp_timeout" not in short
    assert "--ddp_timeout" in whole
    assert "more options" in short
    assert "more options" not in whole
    for method in methods().values():
        for option in method.options():
            assert f"--{option.name} " in whole or method.name != "sft"


@pytest.mark.parametrize("words", ["sft --help-all", "completion bash"])
def test_a_reader_that_has_read_enough_is_no_error(words):
    script = f"{sys.executable} -m trl {words} | true"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_version(capsys):
    from trl import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"trl {__version__}\n"


def test_environment(capsys):
    assert main(["env"]) == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert {"trl", "python", "platform", "torch", "transformers", "vllm"} <= set(lines)
    import torch

    version, _, build = torch.__version__.partition("+")
    assert lines["torch"] in (version, f"{version}+{build}")


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([""], ["sft", "preview"]),
        (["sf"], ["sft"]),
        (["sft", "--learning"], ["--learning_rate"]),
        (["sft", "--eval_strategy", ""], ["no", "steps", "epoch"]),
        (["sft", "--eval_strategy", "e"], ["epoch"]),
        (["sft", "--dataset_name", ""], []),
        (["preview", "s"], ["sft"]),
        (["preview", "sft", "--lora_a"], ["--lora_alpha"]),
        (["check", "gr"], ["grpo"]),
        (["check", "dpo", "--loss_w"], ["--loss_weights"]),
        (["dpo", "--loss_type", "ipo", "rob"], ["robust"]),
        (["chat", "--system"], ["--system_prompt"]),
        (["report", "run", "--out"], ["--output"]),
        (["sweep", "rates.py", "--num_"], ["--num_cpus", "--num_gpus"]),
        (["completion", "z"], ["zsh"]),
    ],
)
def test_completion(words, found):
    candidates = completion.candidates(words)
    assert set(found) <= set(candidates)
    if words != [""]:
        assert list(candidates) == found


def test_completion_in_bash():
    script = (
        f'trl() {{ {sys.executable} -m trl "$@"; }}; eval "$(trl completion bash)"; '
        "COMP_WORDS=(trl sft --max_st); COMP_CWORD=2; _trl; echo ${COMPREPLY[@]}"
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "--max_steps\n"


IN_ZSH = """
compdef() { :; }; _describe() { print -l -- ${(P)2}; }; _files() { print files; }
eval "$(trl completion zsh)"
words=(trl sft --max_st); CURRENT=3; _trl
words=(trl sft --dataset_name tr); CURRENT=4; _trl
"""
IN_FISH = """
trl completion fish | source
complete -C "trl sft --max_st"
touch train.jsonl
complete -C "trl sft --dataset_name tra"
"""


@pytest.mark.parametrize(
    ("shell", "script", "shown"),
    [
        ("zsh", IN_ZSH, "--max_steps:Overrides `num_train_epochs`.\nfiles\n"),
        ("fish", IN_FISH, "--max_steps\tOverrides `num_train_epochs`.\ntrain.jsonl\n"),
    ],
)
def test_completion_in_other_shells(shell, script, shown, tmp_path):
    """An option with what it is; names of files where only the shell knows."""
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    (tmp_path / "trl").write_text(f'#!/bin/sh\nexec {sys.executable} -m trl "$@"\n')
    (tmp_path / "trl").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    done = subprocess.run(
        [shell, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    )
    assert done.stdout == shown


def test_preview_shows_what_is_trained_and_loads_no_weights(inside, capsys):
    """The model folder has no weights in it."""
    bare = inside / "bare"
    bare.mkdir()
    for file in (inside / "tiny").iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    words = ["--model_name_or_path", "bare", "--dataset_name", "train.jsonl", "--rows", "2", "--assistant_only_loss"]
    assert main(["preview", *words]) == 0
    shown = capsys.readouterr().out
    assert "⟦It is 0.<|im_end|>⟧" in shown
    assert "row 2" in shown
    assert "row 3" not in shown
    assert "16 rows" in shown


def test_flags_train_an_adapter(inside, capsys):
    """Several files' worth of options by flags, in this process."""
    words = "--model_name_or_path tiny --dataset_name train.jsonl --dataset_train_split train[:12] --use_cpu"
    words += (
        " --dataset_test_split train[12:] --eval_strategy epoch --num_train_epochs 1 --output_dir by-flags --use_peft"
    )
    words += " --lora_target_modules q_proj v_proj --lora_r 2 --report_to none --max_seq_length 32 --seed 3"
    assert main(["sft", *words.split()]) == 0
    captured = capsys.readouterr()
    assert "eval_loss" in captured.out
    adapter = json.loads((inside / "by-flags" / "adapter_config.json").read_text())
    assert (adapter["r"], sorted(adapter["target_modules"])) == (2, ["q_proj", "v_proj"])
    card = (inside / "by-flags" / "README.md").read_text()
    assert "12 rows" in card


def test_a_file_trains_in_a_process_of_its_own(folder):
    """A mixture, an environment variable, an option of the command line over the file's."""
    (folder / "sft.yaml").write_text(
        """
env: {TRL_TEST_STEPS: 7}
model_name_or_path: ./tiny
datasets:
  - {path: train.jsonl}
  - {path: test.jsonl}
max_steps: 2
logging_steps: 1
learning_rate: 1e-3
save_strategy: no
output_dir: by-file
include_tokens_per_second: true
"""
    )
    done = trl("sft", "--config", "sft.yaml", "--max_steps", "1", folder=folder)
    assert done.returncode == 0, done.stderr
    assert "include_tokens_per_second no longer has an effect: leave it out." in done.stderr
    assert "train: 20 rows" in done.stderr
    assert done.stdout.count("'loss'") == 1
    assert "\r" not in done.stderr
    assert (folder / "by-file" / "model.safetensors").is_file()
    assert not list((folder / "by-file").glob("checkpoint-*"))


def test_a_folder_without_weights_is_refused(inside, capsys):
    bare = inside / "without-weights"
    bare.mkdir()
    (bare / "config.json").write_bytes((inside / "tiny" / "config.json").read_bytes())
    words = ["--model_name_or_path", "without-weights", "--dataset_name", "train.jsonl", "--use_cpu"]
    assert main(["sft", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("trl: error: model_name_or_path='without-weights': the folder holds no weights")


def test_weights_that_were_cut_short_are_refused(inside, capsys):
    shutil.copytree(inside / "tiny", inside / "cut")
    weights = (inside / "cut" / "model.safetensors").read_bytes()
    words = ["--model_name_or_path", "cut", "--dataset_name", "train.jsonl", "--use_cpu"]
    for length in (4, 200, len(weights) - 1):
        (inside / "cut" / "model.safetensors").write_bytes(weights[:length])
        assert main(["sft", *words]) == 2
        assert "model_name_or_path='cut': model.safetensors is cut short." in capsys.readouterr().err


def test_what_libraries_refuse_is_a_message_and_mistakes_of_ours_are_not(inside, capsys):
    words = ["--model_name_or_path", "tiny", "--dataset_name", "train.jsonl", "--use_cpu", "--output_dir", "refused"]
    assert main(["sft", *words, "--use_peft", "--lora_target_modules", "nothing"]) == 2
    assert "target_modules=['nothing']: LlamaForCausalLM has no such layer" in capsys.readouterr().err
    tiny = AutoModelForCausalLM.from_pretrained("tiny")
    with pytest.raises(ConfigError, match="peft refuses: Target modules"), library_errors_as_config_errors():
        get_peft_model(tiny, LoraConfig(target_modules=["nothing"]))
    with pytest.raises(ValueError, match="ours") as caught, library_errors_as_config_errors():
        raise ValueError("ours")
    assert not isinstance(caught.value, ConfigError)


def test_errors_of_data_are_messages(inside, capsys):
    words = ["--model_name_or_path", "tiny", "--dataset_name", "train.jsonl", "--output_dir", "none", "--use_cpu"]
    assert main(["sft", *words, "--eval_strategy", "steps"]) == 2
    assert (
        "eval_strategy='steps' needs rows to evaluate on, but the dataset has no split 'test'"
        in capsys.readouterr().err
    )
    (inside / "ratio.yaml").write_text("warmup_ratio: 3\n")
    for given in (["--warmup-ratio", "3"], ["--config", "ratio.yaml"]):
        assert main(["sft", *words, *given]) == 2
        assert "warmup_ratio=3 has to be a share" in capsys.readouterr().err
    assert main(["sft", *words, "--dataset_train_split", "tran"]) == 2
    assert "no split 'tran'. Did you mean 'train'? Its splits: train." in capsys.readouterr().err
    assert main(["dpo", *words]) == 2
    error = capsys.readouterr().err
    assert "The dataset's columns ['messages'] do not fit" in error
    assert "\n  preference: chosen, rejected\n" in error
