from __future__ import annotations

from transformers import AutoModelForCausalLM

from trl.demo.reviews import load_reviews
from trl.demo.run import main
from trl.demo.show import share_grammatical


def test_a_short_run_shows_samples_and_leaves_models(tmp_path, capsys):
    folder = tmp_path / "demo"
    assert main(["--max_steps", "2", "--samples", "1", "--judged", "4", "--output_dir", str(folder)]) == 0
    shown = capsys.readouterr().out
    for words in ("1.4 million parameters", "600 held-out reviews", "held-out pairs", "before PPO", "of 4 samples"):
        assert words in shown
    assert AutoModelForCausalLM.from_pretrained(str(folder / "sft")).config.model_type == "gpt2"
    assert "<svg" in (folder / "ppo" / "report.html").read_text()


def test_grammatical_share_by_hand():
    review = load_reviews("test")[0]["text"]
    assert share_grammatical([review, "Loved every minute almost I."]) == 0.5
