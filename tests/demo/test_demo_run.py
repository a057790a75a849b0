from __future__ import annotations

from transformers import AutoModelForCausalLM

from trl.demo.reviews import load_reviews
from trl.demo.run import main, share_grammatical


def test_a_short_run_shows_samples_and_leaves_a_model(tmp_path, capsys):
    assert main(["--max_steps", "3", "--samples", "1", "--judged", "4", "--output_dir", str(tmp_path / "demo")]) == 0
    shown = capsys.readouterr().out
    assert "1.4 million parameters" in shown
    assert "held-out reviews" in shown
    assert "before" in shown
    assert "of 4 samples: 0% before" in shown
    assert AutoModelForCausalLM.from_pretrained(str(tmp_path / "demo")).config.model_type == "gpt2"


def test_grammatical_share_by_hand():
    review = load_reviews("test")[0]["text"]
    assert share_grammatical([review, "Loved every minute almost I."]) == 0.5
