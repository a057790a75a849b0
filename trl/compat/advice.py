"""What to use instead of names, options and methods of other releases: sentences that several of them share."""

from __future__ import annotations

OBJECTIVE = "an algorithm of your own is a class with `advantages` and `loss`: see examples/own_algorithm.py."
PADDING = "trainers pad and mask by themselves: leave `data_collator` out."
REPORT = "`log_completions` logs completions, and every run writes a report with samples: see `trl report`."
BY_REWARD = (
    "`OnlineDPOTrainer` ranks completions by reward functions, or by `judge=`: a function of prompts and completions that "
    "returns the index of each prompt's best."
)
LOSS = "Override `loss(model, batch) -> (loss, metrics)`."
METRICS = "Return them from `loss`, or override `log(logs, start_time)`."
ROWS = "Change the rows of the dataset, or override `encode(rows, split, name)`."
SAMPLES = "Give an `engine`: see `trl.rollouts.engine`."
SCORES = "`score(model, batch)` computes log-probabilities: override `loss(model, batch) -> (loss, metrics)`."
SIX_LINES = "write it as a `transformers.TrainerCallback` of a few lines; `SyncRefModelCallback` does exist here."

SWEEP = "`trl sweep` searches hyperparameters, and makes a new model for each trial: see docs/coming_from_trl.md."
TOOLS = "tool calls are not supported yet; every online trainer takes an `engine` of your own."


def sentence(text: str) -> str:
    """`text` with a capital letter at its beginning."""
    return text[0].upper() + text[1:]
