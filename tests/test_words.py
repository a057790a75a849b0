"""Names are those of the field: none of the private words that they replaced is left in the package."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "trl"

REPLACED = {
    "with_credit": "advantages_over_ranks",
    "credited": "with_advantages",
    "Rounds": "RolloutBuffer",
    "Slice": "Minibatch",
    "give_up": "skip_remaining_epochs",
    "is_fresh": "is_new",
    "learn_from": "compute_advantages",
    "_observe": "_score_policy_and_reference",
    "EarlierWeights": "SnapshotReference",
    "standing_in": "as_model",
    "poisoned": "propagate_nonfinite",
    "takes_step": "accept_step",
    "forget_window": "rollback_metrics",
    "StepCount": "SkippedSteps",
    "everyones": "all_gather_object",
    "is_taught": "is_patched",
    "take_up": "restore_rng_state",
    "has_ended": "is_finished",
    "share_out": "split_into_slots",
    "nothing_of": "empty_group",
    "_plant": "place",
    "OldPaths": "LegacyImportFinder",
    "NOT_HERE": "REMOVED",
    "refuse_hooks": "reject_unused_overrides",
    "misfits": "invalid_items",
    "asks_beyond_rows": "needs_online_reference",
    "couples_pairs": "needs_full_batch",
    "desensitised_weights": "ld_dpo_weights",
    "Codec": "Tokenization",
    "_spoken": "_assistant_only",
    "cuts_freely": "concatenates",
    "rows_of_its_own": "unduplicated_rows",
    "_rewards_everywhere": "_gather_rewards",
    "refusals_said": "library_errors_as_config_errors",
    "waits_explained": "explain_waits",
    "full_disk_explained": "explain_full_disk",
    "slices_per_round": "minibatches_per_rollout_batch",
    "prompts_per_round": "prompts_per_rollout_batch",
}
"""Private word → what the field says."""

SOURCES = {file: file.read_text(encoding="utf-8") for file in ROOT.rglob("*.py")}


@pytest.mark.parametrize("word", REPLACED)
def test_a_private_word_is_gone(word):
    found = [file.name for file, text in SOURCES.items() if re.search(rf"(?<!\w){word}(?!\w)", text)]
    assert not found, f"{word!r} is {REPLACED[word]!r} now: {found}"
