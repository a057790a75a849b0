"""What `compute_metrics` and `predict` get from two processes: that of every row once, in the order of the rows."""

from __future__ import annotations

import pytest

from tests.processes import ALONE, TOGETHER, run_well, told

pytestmark = pytest.mark.slow

PROGRAM = """
import sys
import torch
from datasets import Dataset
from tests.conftest import MODELS, make_tokenizer
from tests.processes import tell
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

FOLDER = sys.argv[1]
WORDS = ["a", "a fox", "far away", "it", "no one"]
PAIRS = Dataset.from_dict({"prompt": WORDS, "chosen": [" runs"] * 5, "rejected": [" w" * (i + 1) for i in range(5)]})
RATED = Dataset.from_dict({"prompt": WORDS, "completion": [" runs"] * 5, "label": [True, False, False, True, True]})
TEXTS = Dataset.from_dict({"text": [word * (i + 1) for i, word in enumerate(WORDS)]})
REFERENCE = MODELS["llama"]()


def first_and_count(logits, labels):
    return torch.stack([logits[:, 0].argmax(-1), (labels != -100).sum(1)], 1)


def evaluate(name, trainer_class, rows, preprocess=None, **options):
    seen = []

    def keep(found):
        seen[:] = [found.predictions.tolist(), found.label_ids.tolist() if preprocess is None else []]
        return {}

    args = trainer_class.config_class(
        f"{FOLDER}/{name}", per_device_eval_batch_size=2, use_cpu=True, html_report=False, **options
    )
    own = {"compute_metrics": keep} | ({"preprocess_logits_for_metrics": preprocess} if preprocess else {"ref_model": REFERENCE})
    torch.manual_seed(0)
    trainer = trainer_class(MODELS["llama"](), args=args, eval_dataset=rows, processing_class=make_tokenizer(), **own)
    trainer.evaluate()
    predicted = trainer.predict(trainer.eval_dataset).predictions
    tell(FOLDER, name, [*seen, predicted.tolist()])


evaluate("pairs", DPOTrainer, PAIRS)
evaluate("streamed", DPOTrainer, PAIRS.to_iterable_dataset())
evaluate("rated", KTOTrainer, RATED, loss_type="apo_zero_unpaired")
evaluate("texts", SFTTrainer, TEXTS, first_and_count)
evaluate("packed", SFTTrainer, TEXTS, first_and_count, packing=True, max_length=24)
"""
SHAPES = {"pairs": (5, 2), "streamed": (5, 2), "rated": (5,), "texts": (5, 2), "packed": (5, 2)}


def test_two_processes_predict_as_one(tmp_path):
    run_well(ALONE, PROGRAM, tmp_path / "one")
    run_well(TOGETHER, PROGRAM, tmp_path / "two")
    one, two = told(tmp_path / "one"), told(tmp_path / "two")
    for name, shape in SHAPES.items():
        expected, labels, predicted = one[0, name]
        assert len(expected) == shape[0]
        assert predicted == expected
        for rank in range(2):
            assert two[rank, name][0] == [pytest.approx(row, abs=1e-5) for row in expected], (name, rank)
            assert two[rank, name][1] == labels
            assert two[rank, name][2] == two[rank, name][0]
