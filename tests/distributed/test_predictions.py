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
from trl import DPOTrainer, KTOTrainer, SFTConfig, SFTTrainer
from trl.errors import ConfigError

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

    common = {"output_dir": f"{FOLDER}/{name}", "use_cpu": True, "html_report": False, "per_device_eval_batch_size": 2}
    args = trainer_class.config_class(**common | options)
    own = {"compute_metrics": keep} | ({"preprocess_logits_for_metrics": preprocess} if preprocess else {"ref_model": REFERENCE})
    torch.manual_seed(0)
    trainer = trainer_class(MODELS["llama"](), args=args, eval_dataset=rows, processing_class=make_tokenizer(), **own)
    trainer.evaluate()
    predicted = trainer.predict(trainer.eval_dataset).predictions
    tell(FOLDER, name, [*seen, predicted.tolist()])


evaluate("pairs", DPOTrainer, PAIRS)
evaluate("streamed", DPOTrainer, PAIRS.to_iterable_dataset())
evaluate("split", DPOTrainer, PAIRS, per_device_eval_batch_size=6, accelerator_config={"split_batches": True})
evaluate("rated", KTOTrainer, RATED, loss_type="apo_zero_unpaired")
evaluate("texts", SFTTrainer, TEXTS, first_and_count)
evaluate("packed", SFTTrainer, TEXTS, first_and_count, packing=True, max_length=24)
try:
    SFTConfig(f"{FOLDER}/uneven", use_cpu=True, accelerator_config={"even_batches": False})
except ConfigError as error:
    tell(FOLDER, "uneven", str(error))
"""
NAMES = ("pairs", "streamed", "split", "rated", "texts", "packed")


def test_two_processes_predict_as_one(tmp_path):
    run_well(ALONE, PROGRAM, tmp_path / "one")
    run_well(TOGETHER, PROGRAM, tmp_path / "two")
    one, two = told(tmp_path / "one"), told(tmp_path / "two")
    for name in NAMES:
        expected, labels, predicted = one[0, name]
        assert len(expected) == 5
        assert predicted == expected
        for rank in range(2):
            assert two[rank, name][0] == [pytest.approx(row, abs=1e-5) for row in expected], (name, rank)
            assert two[rank, name][1] == labels
            assert two[rank, name][2] == two[rank, name][0]
    assert (0, "uneven") not in one
    assert "even_batches=False would give some processes fewer batches" in two[1, "uneven"]
