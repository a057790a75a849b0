"""`trl eval`: numbers by hand, judges, and the command from end to end."""

from __future__ import annotations

import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from datasets import Dataset

from tests.conftest import MODELS, make_tokenizer
from tests.serve.images import asked
from tests.vision.support import llava, picture
from trl.cli.main import main
from trl.errors import ConfigError
from trl.evaluation.benchmarks import estimates, run_benchmarks
from trl.evaluation.judges import RewardJudge, ServerJudge
from trl.evaluation.samples import sample
from trl.evaluation.statistics import Estimate, estimate, outcome
from trl.imports import is_available
from trl.rollouts.local import LocalEngine
from trl.rollouts.sampling import SamplingParams


def short(completions, **columns):
    return [-float(len(text)) for text in completions]


# ---- numbers ----


def test_a_mean_and_how_sure_it_is():
    # 1, 0, 1, 0: mean ½, s = √(4 · ¼ / 3) = 0.5774, 1.96 · s / 2 = 0.5658
    found = estimate([1.0, 0.0, 1.0, 0.0])
    assert (found.mean, found.n) == (0.5, 4)
    assert found.half_width == pytest.approx(0.5658, abs=1e-4)
    assert estimate([3.0]).half_width == 0
    assert [outcome(2, 1), outcome(1, 2), outcome(1, 1)] == [1.0, 0.0, 0.5]
    with pytest.raises(ValueError, match="values is empty"):
        estimate([])


# ---- judges ----


def test_the_higher_reward_wins():
    assert RewardJudge([short])(["p"] * 3, ["a", "aaa", "b"], ["aa", "b", "a"]) == [1.0, 0.0, 0.5]


@pytest.fixture
def server():
    """`server(answer)`: the address of a chat server that replies `answer(question)`; what it was asked is kept."""
    made = []

    def start(answer):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                text = answer(asked["messages"][0]["content"])
                choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
                told = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
                told["usage"] = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
                body = json.dumps(told).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        serving = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        made.append((serving, thread))
        return f"http://127.0.0.1:{serving.server_port}/v1"

    yield start
    for serving, thread in made:
        serving.shutdown()
        serving.server_close()
        thread.join()


def longer(question):
    first, second = question.split("[Answer A]")[1].split("[Answer B]")
    return "A" if len(first.strip()) > len(second.strip()) else "B"


def test_a_server_judges_texts_and_not_places(server):
    judge = ServerJudge(server(longer), "m")
    assert judge(["p", "p"], ["long enough", "no"], ["no", "long enough"]) == [1.0, 0.0]
    assert ServerJudge(server(lambda question: "A"), "m")(["p"], ["x"], ["y"]) == [0.5]


def test_a_server_reads_who_said_what(server):
    asked = []
    judge = ServerJudge(server(lambda question: asked.append(question) or "A"), "m")
    call = {"function": {"name": "look", "arguments": {"at": "sky"}}}
    prompt = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]},
        {"role": "assistant", "tool_calls": [call]},
    ]
    judge([prompt], [[{"role": "assistant", "content": "So."}]], ["No."])
    request = 'system: Be kind.\nuser: [image]Why?\nassistant: {"tool_calls": [' + json.dumps(call) + "]}"
    assert f"[Request]\n{request}\n\n[Answer A]\nSo.\n\n[Answer B]\nNo." in asked[0]


def test_a_server_that_does_not_judge(server):
    with pytest.raises(ConfigError, match="answered 'Both are fine' instead of A or B"):
        ServerJudge(server(lambda question: "Both are fine"), "m")(["p"], ["x"], ["y"])


# ---- samples ----


def rows_of(prompts) -> Dataset:
    return Dataset.from_dict({"prompt": prompts})


def test_the_likeliest_tokens_do_not_depend_on_the_batch(make_model):
    model, tokenizer = make_model("llama"), make_tokenizer()
    options = {"max_new_tokens": 4, "temperature": 0.0, "seed": 0}
    prompts = ["a", "a much longer prompt", "b"]
    alone = [sample(model, tokenizer, rows_of([prompt]), batch_size=1, **options)[0] for prompt in prompts]
    assert sample(model, tokenizer, rows_of(prompts), batch_size=3, **options) == alone


def test_a_seed_gives_the_same_samples_and_chats_get_messages(make_model):
    model, tokenizer = make_model("llama"), make_tokenizer()
    options = {"max_new_tokens": 4, "temperature": 1.0, "batch_size": 2}
    chats = [[{"role": "user", "content": "Hi"}]] * 2
    first = sample(model, tokenizer, rows_of(chats), seed=1, **options)
    assert first == sample(model, tokenizer, rows_of(chats), seed=1, **options)
    assert first != sample(model, tokenizer, rows_of(chats), seed=2, **options)
    assert first[0][0]["role"] == "assistant"


# ---- benchmarks ----


def test_results_of_a_harness_become_estimates():
    results = {
        "sums": {"alias": "sums", "acc,none": 0.5, "acc_stderr,none": 0.1, "em,strict": 0.25, "em_stderr,strict": "N/A"}
    }
    found = estimates(results, {"sums": {"original": 9, "effective": 4}})
    assert found == {"sums acc": Estimate(0.5, 0.196, 4), "sums em (strict)": Estimate(0.25, 0.0, 4)}


def test_benchmarks_say_what_they_need(make_model):
    if is_available("lm_eval"):
        pytest.skip("lm-eval is installed")
    with pytest.raises(ImportError, match=r"A benchmark by name needs lm_eval: pip install \"trl\[benchmarks\]\""):
        run_benchmarks(make_model("llama"), make_tokenizer(), ["gsm8k"], batch_size=1)


TASK = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: sums.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: [" 4", " 5"]
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""


def test_a_task_of_ones_own(home, capsys):
    pytest.importorskip("lm_eval")
    (home / "tasks").mkdir()
    (home / "tasks" / "sums.yaml").write_text(TASK)
    (home / "sums.jsonl").write_text('{"question": "2 + 2 =", "answer": 0}\n{"question": "2 + 3 =", "answer": 1}\n')
    words = ["eval", "--model_name_or_path", "ours", "--benchmarks_folder", "tasks", "--benchmarks"]
    assert main([*words, "sums"]) == 0
    told = json.loads((home / "evaluation" / "eval.json").read_text())
    assert told["sums acc"]["n"] == 2
    assert main([*words, "summs"]) == 2
    assert "Did you mean 'sums'" in capsys.readouterr().err


# ---- the command ----


@pytest.fixture
def home(tmp_path, monkeypatch):
    torch.manual_seed(0)
    for name in ("ours", "theirs"):
        MODELS["llama"]().save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Is it far?"}\n' * 4)
    (tmp_path / "texts.jsonl").write_text('{"text": "Two hours by train."}\n' * 4)
    (tmp_path / "rewards.py").write_text(
        "def short(completions, **columns):\n    return [-len(c) for c in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    return tmp_path


COMMON = ["--max_new_tokens", "4", "--dataset_name", "prompts.jsonl", "--model_name_or_path", "ours"]


def test_rewards_and_wins(home, capsys):
    words = ["eval", *COMMON, "--reward_funcs", "rewards.py:short", "--against", "theirs"]
    assert main(words) == 0
    told = json.loads((home / "evaluation" / "eval.json").read_text())
    rows = [json.loads(line) for line in (home / "evaluation" / "samples.jsonl").read_text().splitlines()]
    assert set(told) == {"characters", "reward", "win rate"}
    assert told["win rate"]["mean"] == sum(row["win"] for row in rows) / 4
    assert [row["win"] for row in rows] == [outcome(-len(r["completion"]), -len(r["other"])) for r in rows]
    assert told["reward"]["mean"] == sum(row["reward"] for row in rows) / 4
    shown = capsys.readouterr().out
    assert "using its rows" in shown
    assert "win rate" in shown


def test_chats_are_asked_for_their_last_answer(home, capsys):
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]
    (home / "chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"messages": turns[:3]}))
    words = [word.replace("prompts.jsonl", "chats.jsonl") for word in COMMON]
    assert main(["eval", *words, "--reward_funcs", "rewards.py:short"]) == 0
    rows = [json.loads(line) for line in (home / "evaluation" / "samples.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [turns[:3]] * 2
    assert "without their last answers" in capsys.readouterr().out
    assert main(["eval", *[word.replace("prompts.jsonl", "texts.jsonl") for word in COMMON]]) == 2
    assert "a column 'prompt', or chats in a column 'messages'" in capsys.readouterr().err


def test_a_model_ties_with_itself(home):
    assert main(["eval", *COMMON, "--reward_funcs", "rewards.py:short", "--against", "ours", "--temperature", "0"]) == 0
    assert json.loads((home / "evaluation" / "eval.json").read_text())["win rate"]["mean"] == 0.5


def test_the_perplexity_of_a_model_that_knows_nothing(home, monkeypatch, capsys):
    monkeypatch.setattr(logging.getLogger("transformers"), "level", logging.ERROR)  # trainers then print their logs
    model = MODELS["llama"]()
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(home / "ours")
    words = ["--model_name_or_path", "ours", "--dataset_name", "texts.jsonl", "--perplexity", "--dtype", "float32"]
    assert main(["eval", *words]) == 0
    told = json.loads((home / "evaluation" / "eval.json").read_text())
    assert told["perplexity"] == pytest.approx(99, rel=1e-4)
    texts = [json.loads(line)["text"] for line in (home / "texts.jsonl").read_text().splitlines()]
    assert told["tokens"] == sum(map(len, texts))  # letters but the first, and what ends a text
    assert "{" not in capsys.readouterr().out


def test_a_split_that_is_named_is_the_one_that_is_measured(home, capsys):
    (home / "parts").mkdir()
    for split, count in (("train", 5), ("validation", 3)):
        (home / "parts" / f"{split}.jsonl").write_text('{"text": "Two hours by train."}\n' * count)
    words = ["eval", "--model_name_or_path", "ours", "--dataset_name", "parts", "--perplexity", "--dataset_split"]
    for split, count in (("validation", 3), ("train[:2]", 2)):
        assert main([*words, split]) == 0
        assert json.loads((home / "evaluation" / "eval.json").read_text())["tokens"] == count * len(
            "Two hours by train."
        )
    assert "using its rows" not in capsys.readouterr().out
    assert main([*words, "dev"]) == 2
    assert "'dev'. Its splits: train, validation." in capsys.readouterr().err


def test_its_own_options_stand_first_in_its_help(capsys):
    assert main(["eval", "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.index("--perplexity  ") < shown.index("--load_in_8bit") < shown.index("--output_dir")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model_name_or_path", "ours"], "--dataset_name is missing"),
        ([*COMMON, "--chat"], "are for benchmarks"),
        ([*COMMON, "--against", "theirs"], "nothing judges the samples: give reward_funcs or judge_server"),
        ([*COMMON, "--judge_server", "http://x"], "give the other model, --against MODEL"),
        ([*COMMON, "--batch_size", "0"], "batch_size=0"),
        (["--model_name_or_path", "ours", "--dataset_name", "texts.jsonl"], "needs a column 'prompt'"),
    ],
)
def test_refused(home, capsys, words, message):
    assert main(["eval", *words]) == 2
    assert message in capsys.readouterr().err


# ---- images ----


@pytest.fixture
def reader(home):
    """A model that reads images, and questions about them. It answers by what it sees: nothing was learned."""
    tiny = llava()
    tiny.model.save_pretrained(home / "reader")
    tiny.processor.save_pretrained(home / "reader")
    for seed in (1, 2):
        picture(seed).save(home / f"{seed}.png")
    rows = [
        {"prompt": "is there a box?", "image": f"{i % 2 + 1}.png", "label": "yes", "objects": ["box"]} for i in range(3)
    ]
    (home / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "names.json").write_text('{"box": ["crate"], "dog": []}')
    return tiny


SEEING = ["eval", "--model_name_or_path", "reader", "--dataset_name", "questions.jsonl"]


def test_samples_after_images_are_those_of_the_engine(home, reader):
    """Every batch has a seed of its own; other images in another order have other answers."""
    question = "user: *is there a box?</s>\nassistant: "
    one, two = (asked(reader, question, [picture(seed)])[1] for seed in (1, 2))

    def sampled(prompts, seed):
        params = SamplingParams(max_new_tokens=16, seed=seed)
        found = LocalEngine(reader.model, reader.processor.tokenizer, progress=False).generate(prompts, params)
        return [reader.processor.tokenizer.decode(r.ids, skip_special_tokens=True) for (r,) in found]

    words = ["--max_new_tokens", "16", "--batch_size", "2", "--dtype", "float32", "--pope", "--chair", "names.json"]
    assert main([*SEEING, *words]) == 0
    told = [json.loads(line)["completion"] for line in (home / "evaluation" / "samples.jsonl").read_text().splitlines()]
    assert told == sampled([one, two], 0) + sampled([one], 1)
    assert told[:2] != sampled([two, one], 0)
    numbers = json.loads((home / "evaluation" / "eval.json").read_text())
    assert {"POPE f1", "POPE yes", "CHAIR_i", "CHAIR_s", "recall", "words", "characters"} <= set(numbers)
    assert numbers["POPE recall"] == numbers["POPE accuracy"] == numbers["POPE yes"]  # all labels are yes


def test_the_perplexity_of_answers_about_images(home, reader):
    row = {"prompt": "is there a box?", "completion": " yes", "image": "1.png"}
    (home / "answers.jsonl").write_text((json.dumps(row) + "\n") * 2)
    words = ["--model_name_or_path", "reader", "--dataset_name", "answers.jsonl", "--perplexity", "--dtype", "float32"]
    assert main(["eval", *words]) == 0
    assert json.loads((home / "evaluation" / "eval.json").read_text())["perplexity"] > 1


def test_rewards_are_given_images_and_columns(home, reader):
    """Of both models' samples."""
    (home / "rewards.py").write_text(
        "def wide(completions, images, label, **columns):\n"
        "    return [own.width + len(truth) for (own,), truth in zip(images, label, strict=True)]\n"
    )
    words = ["--reward_funcs", "rewards.py:wide", "--against", "reader", "--max_new_tokens", "2"]
    assert main([*SEEING, *words]) == 0
    told = json.loads((home / "evaluation" / "eval.json").read_text())
    assert (told["reward"]["mean"], told["win rate"]["mean"]) == (43, 0.5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model_name_or_path", "ours"], "hold images, which a tokenizer cannot process"),
        (["--dataset_name", "prompts.jsonl", "--pope"], "--pope needs a column 'label'"),
        (["--chair", "absent.json"], "chair='absent.json' is not a JSON file"),
        (["--chair", "1.png"], "chair='1.png' is not a JSON file"),
        (["--image_folder", "elsewhere"], "There is no file 'elsewhere/1.png'"),
    ],
)
def test_what_images_are_refused(home, reader, capsys, words, message):
    assert main([*SEEING, *words]) == 2
    assert message in capsys.readouterr().err
