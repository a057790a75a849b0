"""A person as a reward function: what is asked, what the answers are worth, and how a person stops."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from rich.console import Console

from tests.conftest import MODELS, make_tokenizer
from tests.processes import fast_python
from trl.cli.rewards import find_reward
from trl.errors import ConfigError, DataError
from trl.rewards.human import HumanPreference, HumanRating, pairs_in_rings
from trl.trainers.grpo import GRPOConfig, GRPOTrainer
from trl.trainers.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

PATIENCE = 60.0
EXAMPLE = Path(__file__).parents[2] / "examples" / "human_feedback.py"


class Answers:
    """Gives answers one after the other; the questions are kept."""

    def __init__(self, *words):
        self.words, self.questions = list(words), []

    def __call__(self, question):
        self.questions.append(question)
        return self.words.pop(0)


def console():
    return Console(file=io.StringIO(), width=100)


def rating(*words, file=None):
    return HumanRating(file, answer=Answers(*words), console=console())


def preference(*words, file=None, comparisons=None):
    return HumanPreference(file, comparisons=comparisons, answer=Answers(*words), console=console())


def shown(reward):
    return reward.person.console.file.getvalue()


# ---- what answers are worth ----


def test_marks_are_centred_and_skipped_ones_are_none():
    reward = rating("1", "2", "3", "4", "5", "s")
    assert reward(["p"] * 6, list("abcdef")) == [-1.0, -0.5, 0.0, 0.5, 1.0, None]


def test_people_are_shown_no_images():
    assert rating("5")(["p"], ["a"], images=[[]]) == [1.0]
    with pytest.raises(DataError, match="Sample 2 has images"):
        rating()(["p", "p"], ["a", "b"], images=[[], ["an image"]])


def test_a_win_share_by_hand():
    # a beats b, b beats c, a beats c: 2 wins of 2, 1 of 2, 0 of 2
    reward = preference("1", "1", "2")
    assert reward(["p"] * 3, ["a", "b", "c"]) == [1.0, 0.0, -1.0]
    assert len(reward.person.answer.questions) == 3


def test_what_was_not_compared_has_no_reward():
    # pairs (a, b), (b, c), (c, a), of which only the second is judged
    assert preference("s", "2", "s")(["p"] * 3, ["a", "b", "c"]) == [None, -1.0, 1.0]


def test_prompts_are_compared_within_themselves():
    assert preference("1", "2")(["p", "p", "q", "q"], ["a", "b", "c", "d"]) == [1.0, -1.0, -1.0, 1.0]


def test_equal_completions_are_not_asked_about():
    assert preference()(["p", "p"], ["same", "same"]) == [None, None]


def test_rings_meet_everyone_once_and_are_balanced():
    assert pairs_in_rings(2) == [(0, 1)]
    assert pairs_in_rings(4) == [(0, 1), (1, 2), (2, 3), (3, 0), (0, 2), (1, 3)]
    for count in range(2, 9):
        assert sorted(tuple(sorted(pair)) for pair in pairs_in_rings(count)) == [
            (i, j) for i in range(count) for j in range(i + 1, count)
        ]
        first = pairs_in_rings(count, count)
        met = [sum(member in pair for pair in first) for member in range(count)]
        assert max(met) - min(met) <= 1


def test_comparisons_bound_the_questions():
    reward = preference("1", "1", "1", "1", comparisons=4)
    reward(["p"] * 4, list("abcd"))
    assert len(reward.person.answer.questions) == 4


# ---- what is asked ----


def test_prompt_and_completion_are_shown_and_bad_input_is_asked_again():
    reward = rating("[six]", "", " 4 ")
    assert reward(["Is it far?"], [" Two hours [bold]by[/bold] train."]) == [0.5]
    assert "Is it far?" in shown(reward)
    assert "Two hours [bold]by[/bold] train." in shown(reward)
    assert "'[six]' is not one of 1, 2, 3, 4, 5, s, q." in shown(reward)
    assert reward.person.answer.questions[0] == "1 bad … 5 good, s skip, q quit: "


def test_conversations_are_shown_under_their_roles():
    reward = rating("5")
    assert reward([[{"role": "user", "content": "Far?"}]], [[{"role": "assistant", "content": "No."}]]) == [1.0]
    assert "user: Far?" in shown(reward)
    assert "assistant: No." in shown(reward)


# ---- stopping and going on ----


@pytest.fixture
def interrupts():
    """Counts interrupts in place of being ended by one."""
    received = []
    before = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    yield received
    signal.signal(signal.SIGINT, before)


def end_of_input(question):
    raise EOFError


def ctrl_c(question):
    signal.raise_signal(signal.SIGINT)


def test_quitting_interrupts_the_run_and_keeps_what_was_said(interrupts):
    assert rating("5", "q")(["p"] * 3, list("abc")) == [1.0, None, None]
    assert interrupts == [signal.SIGINT]
    assert preference("1", "q")(["p"] * 3, list("abc")) == [1.0, -1.0, None]


@pytest.mark.parametrize("answer", [end_of_input, ctrl_c])
def test_the_end_of_input_and_an_interrupt_quit_as_well(interrupts, answer):
    assert HumanRating(answer=answer, console=console())(["p"], ["a"]) == [None]
    assert interrupts == [signal.SIGINT]


def test_marks_are_kept_and_not_asked_again(tmp_path):
    file = tmp_path / "kept" / "ratings.jsonl"
    assert rating("5", "s", file=file)(["p", "q"], ["a", "b"]) == [1.0, None]
    assert json.loads(file.read_text()) == {"prompt": "p", "completion": "a", "score": 1.0}
    assert rating("2", file=file)(["p", "q"], ["a", "b"]) == [1.0, -0.5]
    assert rating(file=file)(["p", "q"], ["a", "b"]) == [1.0, -0.5]
    assert rating("2", file=file)(["p"], ["one line\u2028another\x85"]) == [-0.5]
    assert rating(file=file)(["p"], ["one line\u2028another\x85"]) == [-0.5]


def test_preferences_are_kept_and_not_asked_again(tmp_path):
    file = tmp_path / "pairs.jsonl"
    assert preference("2", file=file)(["p", "p"], ["a", "b"]) == [-1.0, 1.0]
    assert json.loads(file.read_text()) == {"prompt": "p", "chosen": "b", "rejected": "a"}
    assert preference(file=file)(["p", "p"], ["b", "a"]) == [1.0, -1.0]


# ---- where nobody can be asked ----


def test_without_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("5\n"))
    with pytest.raises(ConfigError, match=r"asked for in the terminal, but this run has none .* HumanRating\(answer="):
        HumanRating()(["p"], ["a"])


def test_with_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"need a run of one process, but this one has 2: start it with one"):
        rating("5")(["p"], ["a"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "p", "comple', r"ratings\.jsonl, line 1 is not JSON \(is it cut off\?\): remove the line"),
        (
            '{"prompt": "p", "chosen": "a", "rejected": "b"}',
            r"ratings\.jsonl, line 1 has no 'completion', so that the file holds",
        ),
    ],
)
def test_a_file_of_something_else(line, message, tmp_path):
    (tmp_path / "ratings.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        rating("5", file=tmp_path / "ratings.jsonl")(["p"], ["a"])


def test_bad_arguments():
    with pytest.raises(ConfigError, match="a prompt has only one: set num_generations to at least 2"):
        preference("1")(["p", "q"], ["a", "b"])
    with pytest.raises(ConfigError, match="comparisons=0 is the number of questions"):
        HumanPreference(comparisons=0)
    with pytest.raises(DataError, match="1 completions were given for 2 prompts"):
        rating("1")(["p", "q"], ["a"])


# ---- in a terminal ----


class Terminal:
    """A pseudo-terminal in which a person is asked; every wait ends after PATIENCE seconds."""

    def __init__(self, *words, folder=None):
        self.screen, terminal = pty.openpty()
        self.text = ""
        streams = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
        self.process = subprocess.Popen([fast_python(), *words], cwd=folder, start_new_session=True, **streams)
        os.close(terminal)

    def wait_for(self, words, count=1):
        deadline = time.monotonic() + PATIENCE
        while self.text.count(words) < count:
            assert time.monotonic() < deadline, self.text
            if select.select([self.screen], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):  # the end of what a terminal shows
                    self.text += os.read(self.screen, 4096).decode(errors="replace")
            assert self.process.poll() is None or self.text.count(words) >= count, self.text

    def type(self, words):
        os.write(self.screen, f"{words}\n".encode())


IN_TERMINAL = """
from rich.progress import Progress
from trl.rewards.human import HumanRating
with Progress(refresh_per_second=50) as progress:
    progress.add_task("training", total=2)
    print("rewards", HumanRating()(["Was it good?"] * 3, ["Very.", "No.", "Yes."]))
"""


def test_in_a_terminal_bars_stand_aside():
    terminal = Terminal("-c", IN_TERMINAL)
    for count, word in enumerate(("5", "seven", "2", "s"), start=1):
        terminal.wait_for("q quit: ", count)
        time.sleep(0.1)  # a bar would be drawn again now
        assert terminal.text.endswith("q quit: ")
        terminal.type(word)
    terminal.wait_for("rewards [1.0, -0.5, None]")
    assert terminal.process.wait(PATIENCE) == 0
    assert "'seven' is not one of" in terminal.text


def test_the_example_learns_until_its_person_quits(tmp_path):
    torch.manual_seed(0)
    MODELS["gpt2"]().save_pretrained(tmp_path / "tiny")
    make_tokenizer().save_pretrained(tmp_path / "tiny")
    terminal = Terminal(str(EXAMPLE), "tiny", folder=tmp_path)
    for count, word in enumerate("5432q", start=1):
        terminal.wait_for("q quit: ", count)
        terminal.type(word)
    terminal.wait_for("The model is in human-feedback.")
    assert terminal.process.wait(PATIENCE) == 0
    assert "mean reward 0.25, KL from the first model 0.00" in terminal.text
    assert len((tmp_path / "ratings.jsonl").read_text().splitlines()) == 4
    assert (tmp_path / "human-feedback" / "config.json").is_file()


# ---- in a trainer ----

PROMPTS = Dataset.from_dict({"prompt": ["Say a: ", "Say b: "]})
OPTIONS = {"max_completion_length": 4, "max_steps": 2, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}


def test_grpo_learns_from_marks(make_model, tmp_path):
    reward = rating(*"1234s512")
    args = GRPOConfig(str(tmp_path), per_device_train_batch_size=4, num_generations=2, disable_tqdm=True, **OPTIONS)
    trainer = GRPOTrainer(make_model("llama"), reward, args, PROMPTS, processing_class=make_tokenizer())
    trainer.train()
    means = [row["rewards/human_rating/mean"] for row in trainer.state.log_history if "reward" in row]
    # (−1 − ½ + 0 + ½) / 4, and (1 − 1 − ½) / 3 without the one that was skipped
    assert means == pytest.approx([-0.25, -1 / 6])


def test_online_dpo_learns_from_comparisons(make_model, tmp_path):
    args = OnlineDPOConfig(str(tmp_path), per_device_train_batch_size=2, disable_tqdm=True, **OPTIONS)
    reward = preference(*"1221")
    trainer = OnlineDPOTrainer(make_model("llama"), reward, args, PROMPTS, processing_class=make_tokenizer())
    trainer.train()
    assert reward.person.answer.words == []
    assert [row["pairs"] for row in trainer.state.log_history if "pairs" in row] == [1.0, 1.0]


def test_names_on_the_command_line():
    assert find_reward("human_rating").__name__ == "human_rating"
    reward = find_reward("human_preference('pairs.jsonl', comparisons=4)")
    assert (str(reward.file), reward.comparisons) == ("pairs.jsonl", 4)
