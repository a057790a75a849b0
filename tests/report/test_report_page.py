"""Folders of runs, whole and in parts, and the pages made of them."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from html.parser import HTMLParser

import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from datasets import Dataset

from tests.conftest import make_tokenizer
from trl.callbacks.report import ReportCallback
from trl.cli.commands import methods
from trl.cli.main import main
from trl.errors import DataError
from trl.models.value_heads.auto_models import AutoModelForCausalLMWithValueHead
from trl.report.page import breakable, duration, render_comparison, short_names, shown, write_report
from trl.report.record import read_run
from trl.trainers.ppo.config import PPOConfig
from trl.trainers.ppo.trainer import PPOTrainer
from trl.trainers.sft import SFTConfig, SFTTrainer

VOID = {"meta", "input", "br", "hr", "img", "link", "wbr"}


class Page(HTMLParser):
    """Checks that what is opened is closed; keeps the text of a page and what it would load."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.loads = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href") and not value.startswith("#")]
        self.loads += [tag] if tag in ("link", "iframe") else []

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def log(*losses, step=0):
    return [{"step": step + i, "loss": loss, "epoch": 0.0} for i, loss in enumerate(losses, start=1)]


def write(file, data):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data))


def page_of(folder):
    text = write_report(folder).read_text()
    assert "url(" not in text
    assert "@import" not in text
    page = Page(text)
    assert page.loads == []
    return page


# ---- what is read ----


def test_the_newest_checkpoint_tells_the_log(tmp_path):
    for step in (9, 10):
        write(
            tmp_path / f"checkpoint-{step}" / "trainer_state.json", {"log_history": log(*range(step)), "max_steps": 20}
        )
    run = read_run(tmp_path)
    assert (len(run.log), run.step, run.max_steps) == (10, 10, 20)
    assert "The log ends at step 10 of 20" in page_of(tmp_path).text


def test_a_checkpoint_that_is_newer_than_run_json_wins(tmp_path):
    write(tmp_path / "run.json", {"log_history": log(3.0), "method": "DPO", "options": {"beta": 0.1}, "max_steps": 2})
    write(tmp_path / "checkpoint-2" / "trainer_state.json", {"log_history": log(3.0, 2.0)})
    run = read_run(tmp_path)
    assert (run.step, run.method, run.options) == (2, "DPO", {"beta": 0.1})


def test_a_log_of_lines_that_was_cut_off(tmp_path):
    (tmp_path / "log_history.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    assert [row["loss"] for row in read_run(tmp_path).log] == [2.0, 1.0]


def test_a_model_card_alone_makes_a_page(tmp_path):
    card = (
        "# a\n\n`gpt2`, trained with KTO by `KTOTrainer` of trl.\n\n## Data\n\n- train: 8 rows\n\n## Options\n\n"
        "| option | value |\n|---|---|\n| `learning_rate` | 0.003 |\n\n## Versions\n\n- torch 2.13.0\n"
    )
    (tmp_path / "README.md").write_text(card)
    write(tmp_path / "config.json", {"architectures": ["GPT2LMHeadModel"]})
    run = read_run(tmp_path)
    assert (run.method, run.options, run.versions) == ("KTO", {"learning_rate": "0.003"}, {"torch": "2.13.0"})
    assert (run.data, run.model) == (("train: 8 rows",), {"class": "GPT2LMHeadModel"})
    text = page_of(tmp_path).text
    assert "No log was found" in text
    assert "learning_rate 0.003" in text


def test_a_folder_that_holds_no_run(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(DataError, match=r"is not the output_dir of a run: .* Found: notes\.txt\."):
        read_run(tmp_path)
    with pytest.raises(DataError, match="There is no folder .*: give the output_dir of a run"):
        read_run(tmp_path / "no")


def test_samples_of_tables_and_lines(tmp_path):
    folder = tmp_path / "completions"
    folder.mkdir()
    rows = [{"step": 5, "prompt": "Hi", "completion": f"answer {i}", "correct": i / 9, "why": "so"} for i in range(10)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "completions_00005.parquet")
    chat = {"prompt": [{"role": "user", "content": "Ho"}], "completion": "do\u2028ne", "reward": None}
    (folder / "completions_00012.jsonl").write_text(json.dumps(chat, ensure_ascii=False))
    samples = read_run(tmp_path).samples
    assert list(samples) == [5, 12]
    assert [sample.completion for sample in samples[5]] == ["answer 0", "answer 3", "answer 6", "answer 9"]
    assert samples[5][-1].numbers == {"correct": 1.0}
    assert (samples[12][0].prompt, samples[12][0].completion, samples[12][0].numbers) == ("Ho", "do\u2028ne", {})


# ---- the page ----


def test_the_same_prompts_before_and_after(tmp_path):
    sides = {"before": {"completion": "so-so.", "reward": -1.5}, "after": {"completion": "a joy!", "reward": 2.0}}
    write(tmp_path / "before_after.jsonl", {"prompt": "It was ", **sides})
    write(tmp_path / "run.json", {"log_history": log(1.0)})
    ((before, after),) = read_run(tmp_path).comparisons
    assert (before.prompt, before.completion, after.completion) == ("It was ", "so-so.", "a joy!")
    assert (before.numbers, after.numbers) == ({"reward": -1.5}, {"reward": 2.0})
    assert "before It was so-so. reward -1.5 after It was a joy! reward 2" in page_of(tmp_path).text


def test_what_never_changed_is_told_and_not_drawn(tmp_path):
    rows = [{"step": i, "loss": 0.0, "lam": 0.5, "ratio": 1.0 + 1e-7 * i, "reward": float(i)} for i in (1, 2)]
    write(tmp_path / "run.json", {"log_history": rows})
    page = write_report(tmp_path).read_text()
    assert page.count('class="plot"') == 2  # the reward, and the loss: of that a reader wants to see that it stays
    assert "Unchanged: ratio 1 lam 0.5" in page_of(tmp_path).text


def test_long_names_break_behind_their_strokes(tmp_path):
    assert breakable("a/b_c<i>") == "a/<wbr>b_<wbr>c&lt;i&gt;"
    write(tmp_path / "run.json", {"log_history": [{"step": i, "clip/high_max": 0.0} for i in (1, 2)]})
    assert "<span>clip/<wbr>high_<wbr>max " in write_report(tmp_path).read_text()


def test_what_a_model_wrote_cannot_act_on_the_page(tmp_path):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'"
    row = {"step": 1, "prompt": evil, "completion": evil, evil: 1.0}
    (tmp_path / "completions").mkdir()
    (tmp_path / "completions" / "a.jsonl").write_text(json.dumps(row))
    history = [{"step": i, evil: float(i), "loss": 1.0} for i in (1, 2)]
    write(tmp_path / "run.json", {"log_history": history, "options": {evil: evil}, "method": evil})
    page = page_of(tmp_path)
    assert (tmp_path / "report.html").read_text().count("<script>") == 1
    assert evil in " ".join(page.words)


def test_not_a_number_is_told(tmp_path):
    write(tmp_path / "run.json", {"log_history": log(1.0, float("nan"), float("inf"), 0.5)})
    text = page_of(tmp_path).text
    assert "Values that are infinite or not a number, which are not drawn: loss (2)." in text
    assert "loss 0.5 from 1" in text


def test_words():
    assert [duration(s) for s in (1.66, 200, 7500, 7195)] == ["1.66 s", "3 min 20 s", "2 h 5 min", "2 h 0 min"]
    assert [shown(v) for v in (None, True, [1, "a"], {"k": None}, 1e-5)] == ["none", "true", "1, a", "k: none", "1e-05"]


# ---- at the end of a run ----


def trainer(make_model, folder, **options):
    rows = Dataset.from_dict({"text": [f"What is {i}?" for i in range(8)]})
    args = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=4,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    callback = ReportCallback(data=("train: 8 rows",))
    return SFTTrainer(
        make_model("llama"),
        args,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=make_tokenizer(),
        callbacks=[callback],
    )


def test_a_run_writes_its_report(make_model, tmp_path):
    run = trainer(make_model, tmp_path, save_steps=2, learning_rate=1e-3)
    run.train()
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["log_history"] == run.state.log_history
    assert {"learning_rate", "max_steps", "save_steps"} <= set(record["changed"])
    assert not {"seed", "bf16", "max_length", "output_dir"} & set(record["changed"])
    assert record["model"]["parameters"] == sum(p.numel() for p in run.model.parameters())
    text = Page((tmp_path / "report.html").read_text()).text
    for part in ("SFT run", "4 of 4 steps", "learning_rate 0.001", "train: 8 rows", "LlamaForCausalLM"):
        assert part in text
    assert "eval" not in text.split("Numbers")[0]
    run.evaluate()
    assert "loss (eval)" in Page((tmp_path / "report.html").read_text()).text


def test_a_run_tells_its_rows_and_how_to_make_it_again(make_model, tmp_path):
    trainer(make_model, tmp_path / "run", save_strategy="no", learning_rate=1e-3).train()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["rows"][0] == {"prompt": "", "completions": ["What is 0?</s>"]}
    assert set(record["again"]) == {"config.yaml"}
    options = yaml.safe_load(record["again"]["config.yaml"])
    assert (options["learning_rate"], options["max_steps"]) == (1e-3, 4)
    known = {option.name for option in methods()["sft"].options()}
    assert set(options) <= known
    text = page_of(tmp_path / "run").text
    assert "What is 0?</s>" in text
    assert "learning_rate: 0.001" in text


def test_the_log_is_there_while_the_run_goes_on(make_model, tmp_path):
    seen = []

    class Look(ReportCallback):
        def on_step_end(self, args, state, control, **_):
            seen.append(read_run(tmp_path).step if (tmp_path / "run.json").exists() else 0)

    run = trainer(make_model, tmp_path, save_strategy="no")
    run.add_callback(Look())
    run.train()
    assert seen[-1] >= 1


def test_times_survive_a_resume(make_model, tmp_path):
    trainer(make_model, tmp_path, save_steps=2).train()
    record = json.loads((tmp_path / "run.json").read_text())
    write(tmp_path / "run.json", {**record, "started": "2026-01-02 03:04", "seconds": 5000.0})
    again = trainer(make_model, tmp_path, save_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    after = json.loads((tmp_path / "run.json").read_text())
    assert after["started"] == "2026-01-02 03:04"
    assert after["seconds"] > 5000


def test_a_run_that_stops_keeps_its_log(make_model, tmp_path):
    run = trainer(make_model, tmp_path, save_steps=2)

    class Stop(ReportCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 3:
                raise KeyboardInterrupt

    run.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert not (tmp_path / "report.html").exists()
    assert "of 4: the run stopped early" in page_of(tmp_path).text


def test_a_report_that_cannot_be_written_costs_nothing(make_model, tmp_path, caplog):
    (tmp_path / "report.html").mkdir()
    with caplog.at_level(logging.WARNING, "trl.callbacks.report"):
        trainer(make_model, tmp_path, save_strategy="no").train()
    assert "The report could not be written: IsADirectoryError: [Errno 21] Is a directory" in caplog.text
    assert (tmp_path / "run.json").exists()


def test_steps_by_hand_have_a_report(make_model, tmp_path):
    args = PPOConfig(output_dir=str(tmp_path), batch_size=2, mini_batch_size=2, ppo_epochs=1, report_to="none")
    trainer = PPOTrainer(
        args, AutoModelForCausalLMWithValueHead.from_pretrained(make_model("gpt2")), None, make_tokenizer()
    )
    queries = [torch.tensor([7, 8]), torch.tensor([9, 10])]
    for _ in range(2):
        responses = trainer.generate(queries, return_prompt=False, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=3)
        scores = [torch.tensor(1.0), torch.tensor(0.0)]
        stats = trainer.step(queries, responses, scores)
        trainer.log_stats(stats, {"query": ["a", "b"], "response": ["c", "d"]}, scores)
    run = read_run(tmp_path)
    assert (run.step, run.method) == (2, "PPO")
    assert run.seconds < 600
    assert any("objective/kl" in row for row in run.log)
    assert "2 steps" in page_of(tmp_path).text


# ---- the command ----


def test_the_command(tmp_path, capsys):
    write(tmp_path / "run.json", {"log_history": log(2.0, 1.0)})
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "pages" / "a.html")]) == 0
    assert capsys.readouterr().out == f"The report is in {tmp_path / 'pages' / 'a.html'}.\n"
    Page((tmp_path / "pages" / "a.html").read_text())


def test_the_first_number_is_the_first_that_was_logged(tmp_path):
    write(tmp_path / "run.json", {"log_history": log(*(9.0 - i / 10 for i in range(60)))})
    assert "loss 3.1 from 9" in page_of(tmp_path).text


def test_eight_charts_first(tmp_path):
    row = {f"metric_{i}": float(i) for i in range(12)}
    rows = [{"step": step, "loss": step, **{name: value * step for name, value in row.items()}} for step in (1, 2)]
    write(tmp_path / "run.json", {"log_history": rows})
    page = write_report(tmp_path).read_text()
    main, folded = page.split('<details class="group">')[:2]
    assert main.count('class="plot"') == 8
    assert "Other: 4 more" in folded  # metric_0 never changed, and is told


def test_a_comparison(tmp_path, monkeypatch, capsys):
    for name, beta, loss in (("small", 0.1, 1.0), ("large", 0.5, 2.0)):
        options = {"beta": beta, "seed": 0, "output_dir": name}
        write(tmp_path / name / "run.json", {"log_history": log(3.0, loss), "options": options})
    monkeypatch.chdir(tmp_path)
    assert main(["report", "small", "large"]) == 0
    assert capsys.readouterr().out == "The report is in comparison.html.\n"
    text = Page((tmp_path / "comparison.html").read_text()).text
    assert "Comparison of runs small · large" in text
    assert "option small large beta 0.1 0.5" in text
    assert "seed" not in text
    assert "output_dir" not in text


def test_names_of_runs_are_as_short_as_tells_them_apart(tmp_path):
    assert short_names([tmp_path / "a" / "ppo", tmp_path / "b" / "ppo"]) == ["a/ppo", "b/ppo"]
    assert short_names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    with pytest.raises(DataError, match="given twice"):
        short_names([tmp_path, tmp_path])


def test_a_page_that_is_watched_asks_for_itself(tmp_path):
    write(tmp_path / "run.json", {"log_history": log(1.0)})
    refresh = '<meta http-equiv="refresh" content="5">'
    assert refresh in write_report(tmp_path, refresh=5).read_text()
    assert refresh not in write_report(tmp_path).read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "trl report takes the folders of one or more runs: trl report RUN"),
        (["no"], "There is no folder 'no'"),
        (["a", "b"], "There is no folder 'a'"),
        ([".", "--every", "0"], "every=0: give at least 1 second."),
        ([".", "--ouput", "a"], "Unknown option --ouput. Did you mean '--output'"),
    ],
)
def test_refused(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["report", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_report_of_nothing_is_refused(tmp_path, capsys):
    write(tmp_path / "run.json", {"log_history": []})
    assert main(["report", str(tmp_path)]) == 2
    assert "holds neither a log nor samples" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_the_command_imports_nothing_heavy(tmp_path):
    write(tmp_path / "run.json", {"log_history": log(2.0, 1.0)})
    heavy = "{'torch', 'transformers', 'datasets', 'peft', 'numpy', 'accelerate'}"
    words = ["report", str(tmp_path)]
    code = f"import sys; from trl.cli.main import main; main({words}); print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.endswith("set()\n")


def test_a_run_has_one_colour_in_all_charts_of_a_comparison(tmp_path):
    for name, metric in (("one", {}), ("two", {"rewards/margins": 1.0})):
        rows = [{**row, **{key: value * row["step"] for key, value in metric.items()}} for row in log(2.0, 1.0)]
        write(tmp_path / name / "run.json", {"log_history": rows})
    page = render_comparison({name: read_run(tmp_path / name) for name in ("one", "two")})
    colours = set(re.findall(r'<i class="(key-\d)">(\w+)</i>', page))
    assert sorted(name for _, name in colours) == ["one", "two"]
    assert len({key for key, _ in colours}) == 2
