"""The benchmark's rows are what its documentation says, and its arithmetic is right."""

from __future__ import annotations

import json
import random
import statistics
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import releases
import report
import synthetic
import vision
from gpu_workloads import GPU_WORKLOADS
from workloads import COMMON, WARMUP, WORKLOADS

import trl


@pytest.fixture(scope="module")
def tokenizer():
    return synthetic.tokenizer()


def test_tokenizer_has_the_size_of_the_model_and_padding_first(tokenizer):
    assert len(tokenizer) == 32_000
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)


@pytest.mark.parametrize("text", ["Ein Rätsel, 42 €!", "two\n\nlines", " leading and trailing ", "bade gofu"])
def test_tokenizer_gives_any_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("continues", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 12, 13, 500])
def test_prose_has_exactly_the_tokens_asked_for(tokenizer, tokens, continues):
    text = synthetic.prose(random.Random(7), tokens, continues=continues)
    assert len(tokenizer(text)["input_ids"]) == tokens
    assert text.startswith(" ") == continues


def test_template_marks_what_the_assistant_generates(tokenizer):
    chat = [{"role": "user", "content": "bade"}, {"role": "assistant", "content": "gofu kiko"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == (
        "<|user|>\nbade<|end|>\n<|assistant|>\ngofu kiko<|end|>\n"
    )
    assert tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True).endswith(
        "<|end|>\n<|assistant|>\n"
    )
    encoded = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    marked = [t for t, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(marked) == "gofu kiko<|end|>"


def test_chats_are_log_normal_around_180_tokens(tokenizer):
    rows = synthetic.chat_rows(1_000, seed=0)
    chats = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    lengths = list(map(len, tokenizer(chats, add_special_tokens=False)["input_ids"]))
    assert min(lengths) >= 32
    assert max(lengths) <= 1_024
    assert statistics.mean(lengths) == pytest.approx(180, rel=0.05)
    assert statistics.median(lengths) == pytest.approx(141, rel=0.05)  # 180 · exp(−0.7² / 2)


def test_prompts_and_completions_stay_in_their_bounds(tokenizer):
    for row in synthetic.completion_rows(50, seed=0):
        assert 400 <= len(tokenizer(row["prompt"])["input_ids"]) <= 800
        assert 40 <= len(tokenizer(row["completion"])["input_ids"]) <= 80
    for row in synthetic.preference_rows(50, seed=0, prompt=(20, 60)):
        assert 20 <= len(tokenizer(row["prompt"])["input_ids"]) <= 60
        assert row["chosen"] != row["rejected"]
        for side in ("chosen", "rejected"):
            assert 60 <= len(tokenizer(row[side])["input_ids"]) <= 100
    for row in synthetic.prompt_rows(10, seed=0, prompt=(400, 400)):
        assert len(tokenizer(row["prompt"])["input_ids"]) == 400
    assert [row["label"] for row in synthetic.unpaired_rows(4, seed=0)] == [True, False, True, False]


EVERY = WORKLOADS | GPU_WORKLOADS | vision.WORKLOADS


@pytest.mark.parametrize("workload", EVERY.values(), ids=EVERY)
def test_our_configuration_takes_the_options(workload, tmp_path):
    config = getattr(trl, workload.config_class)(output_dir=tmp_path, **COMMON | workload.config)
    assert config.per_device_train_batch_size == workload.config["per_device_train_batch_size"]


def test_an_image_of_the_benchmark_takes_256_tokens():
    """16 × 16 patches of 14 × 14 pixels, one colour each."""
    processor = vision.make_processor()
    picture = vision.picture(3)
    assert picture.tobytes() == vision.picture(3).tobytes() != vision.picture(4).tobytes()
    assert len(picture.getcolors(maxcolors=256 + 1)) > 250
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "bade"}]}]
    text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = processor(images=[picture], text=text)["input_ids"][0]
    assert ids.count(processor.tokenizer.convert_tokens_to_ids(vision.IMAGE)) == 256


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)
def test_rows_are_the_same_for_the_same_seed_and_reach_to_the_last_step(workload, tmp_path):
    workload.write_rows(tmp_path, steps=2, seed=3)
    first = workload.rows_path(tmp_path).read_bytes()
    workload.write_rows(tmp_path, steps=2, seed=3)
    assert workload.rows_path(tmp_path).read_bytes() == first
    rows = workload.read_rows(tmp_path)
    assert rows == workload.rows(len(rows), seed=3)
    assert rows != workload.rows(len(rows), seed=4)
    assert len(rows) >= workload.config["per_device_train_batch_size"] * (WARMUP + 2)


def test_packed_rows_fill_more_than_the_steps_asked_for():
    workload = WORKLOADS["sft-packed"]
    tokens_needed = workload.config["per_device_train_batch_size"] * workload.config["max_length"]
    assert workload.rows_per_step * 180 > 1.3 * tokens_needed


def test_model_has_about_15_million_parameters_and_weights_from_its_seed():
    first, again, other = (synthetic.model(seed=seed) for seed in (0, 0, 1))
    assert sum(p.numel() for p in first.parameters()) == 14_486_784
    weights = [m.model.layers[0].mlp.up_proj.weight for m in (first, again, other)]
    assert weights[0].equal(weights[1])
    assert not weights[0].equal(weights[2])


def run(*, steps, losses, peak, tokens=(100, 100), cpu=(1.0, 1.0), sampled=(0, 0), sampling=(0, 0)):
    return {
        "step_seconds": steps,
        "cpu_seconds": cpu,
        "losses": losses,
        "tokens": tokens,
        "positions": [2 * n for n in tokens],
        "sampled": sampled,
        "sampling_seconds": sampling,
        "peak_mib": peak,
        "loaded_mib": 512.0,
    }


OURS = [
    run(steps=[1.0, 1.0], losses=[2.0, 1.0], peak=1024.0),
    run(steps=[1.0, 2.0], losses=[2.0, 1.0], peak=1024.0),
    run(steps=[1.0, 4.0], losses=[2.0, 1.0], peak=1024.0),
]
THEIRS = [
    run(steps=[4.0, 4.0], losses=[2.0, 1.0001], peak=4096.0, tokens=(200, 200)),
    run(steps=[3.0, 3.0], losses=[2.0, 1.0001], peak=2048.0, tokens=(200, 200)),
    run(steps=[5.0, 5.0], losses=[2.0, 1.0001], peak=4096.0, tokens=(200, 200)),
]


def test_ratios_are_of_medians_and_ranges_of_neighbours():
    comparison = report.compare(OURS, THEIRS, same_batches=True, per_token=False)
    assert comparison["time"] == pytest.approx(3 / 8)
    assert comparison["time_range"] == pytest.approx([2 / 8, 5 / 10])
    assert comparison["memory"] == pytest.approx(1024 / 4096)
    assert comparison["loss_gap"] == pytest.approx(1e-4, rel=1e-3)


def test_different_batches_are_compared_per_token_and_not_by_their_losses():
    comparison = report.compare(OURS, THEIRS, same_batches=False, per_token=True)
    assert comparison["time"] == pytest.approx((3 / 200) / (8 / 400))
    assert comparison["loss_gap"] is None
    assert comparison["per_sample"] is None


def test_sampled_steps_are_compared_as_they_are_and_per_sampled_token():
    ours = [run(steps=[1.0, 1.0], losses=[], peak=1024.0, sampled=(10, 30), sampling=(0.5, 0.3))]
    theirs = [run(steps=[2.0, 2.0], losses=[], peak=1024.0, sampled=(10, 10), sampling=(1.0, 1.0))]
    comparison = report.compare(ours, theirs, same_batches=False, per_token=False)
    assert comparison["time"] == pytest.approx(2 / 4)
    assert comparison["per_sample"] == pytest.approx((2 / 40) / (4 / 20))
    assert comparison["sampling"] == pytest.approx((0.8 / 40) / (2 / 20))


def test_every_token_of_the_sampling_model_ends_a_text_with_about_the_same_chance():
    torch.manual_seed(0)
    model = synthetic.ending_at_random(synthetic.model(seed=0)).eval()
    ends = model.generation_config.eos_token_id
    with torch.no_grad():
        chances = model(torch.randint(1_000, 32_000, (4, 64))).logits.softmax(-1)[..., ends].sum(-1)
    assert synthetic.tokenizer().eos_token_id in ends
    assert chances.mean().item() == pytest.approx(0.03, rel=0.05)
    assert 0.02 < chances.min() < chances.max() < 0.04


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "met"),
        ({"time": 0.61}, "time missed"),
        ({"time": 0.61, "memory": 0.7}, "time and memory missed"),
        ({"loss_gap": 0.01}, "losses missed"),
        ({"loss_gap": None}, "met"),
    ],
)
def test_verdict_names_what_was_missed(change, words):
    comparison = {"time": 0.6, "memory": 0.5, "loss_gap": 1e-6} | change
    assert report.verdict(comparison, {"time": 0.6, "memory": 0.6}) == words


def result():
    comparison = report.compare(OURS, THEIRS, same_batches=True, per_token=False)
    workload = {
        "per_token": False,
        "targets": {"trl": {"time": 0.6, "memory": None}},
        "comparisons": {"trl": comparison},
        "runs": {"ours": OURS, "trl": THEIRS},
    }
    settings = {"steps": 2, "warmup": 2, "repeats": 3, "seed": 0, "threads": 2, "cores": 4}
    return {"settings": settings, "versions": {"trl": {"trl": "1.16.0"}}, "workloads": {"sft-padded": workload}}


def test_tables_read_as_written():
    ratios, measured = report.ratio_grid(result()), report.measured_grid(result())
    assert ratios.rows == [
        ["sft-padded", "trl", "0.38 (0.25–0.50)", "≤ 0.60", "–", "–", "1.00", "0.25", "–", "1e-04", "met"],
    ]
    assert measured.rows == [
        ["sft-padded", "ours", "1.50", "0.7", "100", "50%", "0", "1.00", "0.50"],
        ["sft-padded", "trl", "4.00", "0.2", "200", "50%", "0", "4.00", "3.50"],
    ]


def test_a_busy_machine_leaves_out_what_the_clock_says():
    whole = report.without_clock(result())
    assert "step_seconds" not in json.dumps(whole)
    assert whole["workloads"]["sft-padded"]["comparisons"]["trl"].keys() == {"processor", "memory", "loss_gap"}
    (grid,) = report.tables(whole)
    assert grid.rows == [
        ["sft-padded", "ours", "1.0", "1.00", "100", "–"],
        ["sft-padded", "trl", "1.0", "4.00", "200", "1e-04"],
    ]
    assert len(report.tables(result())) == 2


def test_markdown_aligns_its_columns():
    grid = report.Grid("Title", ["a", "long name"], [["wide cell", "b"]])
    assert report.markdown(grid).splitlines() == [
        "**Title**",
        "",
        "| a         | long name |",
        "|-----------|-----------|",
        "| wide cell | b         |",
    ]


def test_a_result_survives_json():
    again = json.loads(json.dumps(result()))
    assert report.ratio_grid(again) == report.ratio_grid(result())
    assert "2 steps after 2, 3 repeats, seed 0, 2 threads of 4 cores" in report.settings_line(again)


def test_encoded_images_are_shown_by_side():
    runs = {"ours": [{"images": [4, 4]}], "trl": [{"images": [16, 16]}]}
    assert vision.image_grid({"workloads": {"dpo-image": {"runs": runs}}}).rows == [["dpo-image", "4", "16"]]


def test_a_table_of_releases_counts_what_pytest_says():
    output = (
        "....\nFAILED tests/a.py::test_b[c] - AssertionError\n=== 1 failed, 9 passed, 2 skipped, 1 error in 3.1s ===\n"
    )
    found = releases.counts(output)
    assert found == {"failed": 1, "passed": 9, "skipped": 2, "error": 1, "not_passed": ["tests/a.py::test_b[c]"]}
    versions = {"transformers": "5.10.1", "peft": "0.18.0", "datasets": "4.0.0", "accelerate": "1.10.0"}
    made = releases.table(
        [{"transformers": "5.10.1", "age": "lowest", "versions": versions, "groups": {"images": found}}]
    )
    assert made.splitlines()[-1] == (
        "| 5.10.1 | 0.18.0 | 4.0.0 | 1.10.0 |  |  | 9, 1 failed, 1 error, 2 skipped |  |  |"
    )


def test_releases_are_pinned_as_the_project_says():
    bounds = releases.lower_bounds()
    assert bounds.keys() > {"torch", "transformers", *releases.NEIGHBOURS}
    assert releases.TRANSFORMERS[0] == bounds["transformers"]
    assert releases.pins("lowest") == [f"{name}=={bounds[name]}" for name in releases.NEIGHBOURS]
    assert releases.pins("newest") == [*releases.NEIGHBOURS]
    assert all((releases.ROOT / test).is_file() for tests in releases.TESTS.values() for test in tests)


def test_what_runs_with_every_commit_is_there():
    for test in (test for tests in releases.EVERY_COMMIT.values() for test in tests):
        file, _, name = test.partition("::")
        assert f"\ndef {name.partition('[')[0]}" in (releases.ROOT / file).read_text()
