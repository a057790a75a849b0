"""Which samples RFT keeps, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from trl.algorithms.rft import RFT, RFTOptions, first_of_each, reached, thresholds
from trl.errors import ConfigError
from trl.types import Experience, Scores


def selected(rewards, group, names, p):
    """What is kept at `p`, each of a prompt's samples once."""
    pairs = list(zip(group.tolist(), names, strict=True))
    return torch.tensor(first_of_each(pairs, reached(rewards, group, p).tolist()))


GROUP = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
REWARDS = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 10.0, 10.0, 20.0, 30.0, 40.0])
NAMES = ["a", "b", "c", "d", "e", "f", "f", "g", "h", "i"]


def test_the_percentile_rises_from_start_to_end_and_begins_again():
    options = RFTOptions(start_percentile=0.6, end_percentile=0.9, n_improve_steps=4)
    assert [options.percentile(k) for k in range(6)] == pytest.approx([0.6, 0.7, 0.8, 0.9, 0.6, 0.7])
    assert RFTOptions(start_percentile=0.5, end_percentile=0.9, n_improve_steps=1).percentile(0) == 0.5


def test_bars_are_quantiles_of_each_prompt():
    """Five samples: the quantile 0.75 is the fourth. Of two prompts one has the lowest threshold, the other the highest."""
    bars = thresholds(REWARDS, GROUP, 0.75)
    assert bars.tolist() == pytest.approx([3.0 + 1e-3, 30.0 - 1e-3])
    middle = thresholds(
        torch.cat([REWARDS, torch.tensor([5.0, 6.0, 7.0])]), torch.cat([GROUP, torch.full((3,), 2)]), 0.5
    )
    assert middle.tolist() == pytest.approx([2.0 + 1e-3, 20.0 - 1e-3, 6.0])


def test_those_at_the_bar_or_above_are_kept():
    kept = selected(REWARDS, GROUP, NAMES, 0.5)
    assert [name for name, keep in zip(NAMES, kept.tolist(), strict=True) if keep] == ["d", "e", "g", "h", "i"]


def test_equal_samples_of_a_prompt_are_kept_once():
    rewards = torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert selected(rewards, torch.tensor([0, 0, 1, 1]), ["x", "x", "x", "y"], 0.5).tolist() == [
        True,
        False,
        True,
        False,
    ]


def test_prompts_that_are_all_bad_give_nothing_and_those_that_are_all_good_give_all():
    """Rewards of two values: the threshold of the bad prompt is above its samples, that of the good one below them."""
    rewards, group = torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1])
    assert selected(rewards, group, list("abcd"), 0.9).tolist() == [False, False, True, True]


def test_one_prompt_keeps_its_best():
    assert selected(torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3, dtype=torch.long), list("abc"), 1.0).tolist() == [
        False,
        False,
        True,
    ]


def test_samples_without_a_reward_are_never_kept():
    rewards, group = torch.tensor([torch.nan, 2.0, torch.nan, torch.nan]), torch.tensor([0, 0, 1, 1])
    assert selected(rewards, group, list("abcd"), 0.5).tolist() == [False, True, False, False]
    assert not reached(torch.full((4,), torch.nan), group, 0.5).any()


def test_a_higher_percentile_keeps_a_part_of_what_a_lower_one_keeps():
    rewards = torch.rand(60, generator=torch.Generator().manual_seed(3))
    group = torch.arange(60) // 10
    kept = [selected(rewards, group, range(60), p) for p in (0.2, 0.5, 0.8)]
    assert [int(each.sum()) for each in kept] == sorted((int(each.sum()) for each in kept), reverse=True)
    assert torch.equal(kept[1] & kept[0], kept[1])
    assert torch.equal(kept[2] & kept[1], kept[2])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"start_percentile": 70}, "start_percentile=70"),
        ({"start_percentile": 0.9, "end_percentile": 0.5}, "start_percentile=0.9 is above end_percentile=0.5"),
        ({"n_improve_steps": 0}, "n_improve_steps=0"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(ConfigError, match=words):
        RFTOptions(**options).check_options()


def test_the_algorithm_selects_at_the_percentile_of_its_step():
    mask = torch.ones(len(REWARDS), 2)
    algorithm = RFT(start_percentile=0.0, end_percentile=1.0, n_improve_steps=2)
    every, best = (replace(algorithm, step=k).advantages(Experience(REWARDS, GROUP, mask)) for k in (0, 1))
    assert every.signals["reached"].tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 1, 1]  # the lowest threshold is raised by ε
    assert best.signals["reached"].tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 0, 1]


def test_the_step_rises_with_every_selection_and_is_part_of_a_checkpoint():
    given = Experience(REWARDS, GROUP, torch.ones(len(REWARDS), 1))
    later, resumed = RFT().after_round(given).after_round(given), RFT()
    resumed.load_state_dict(later.state_dict())
    assert (RFT().step, later.step, resumed.step) == (0, 2, 2)
    with pytest.raises(ConfigError, match="n_improve_steps=0"):
        RFT(n_improve_steps=0)


def test_the_loss_is_that_of_fine_tuning():
    scores = Scores(torch.tensor([[-0.5, -1.0]]), entropy=torch.zeros(1, 2), greedy=torch.ones(1, 2))
    assert RFT().loss(scores, None)[0].tolist() == [[0.5, 1.0]]
