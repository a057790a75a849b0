"""Losses of labelled completions: values by hand, the statistics that couple a batch, recommended weights."""

import math

import pytest
import torch

from tests.algorithms.support import make_batch
from trl.algorithms import dpo
from trl.algorithms.kto import (
    KTO,
    LOSSES,
    RewardShift,
    apo_zero_unpaired,
    bco,
    kl_estimate,
    kto,
    recommended_weights,
    with_margin,
)
from trl.errors import ConfigError, DataError
from trl.types import Scores

H = torch.tensor([0.6, -0.3, 1.0, -2.0], dtype=torch.float64)
GOOD = torch.tensor([True, False, False, True])


def sigma(x):
    return 1 / (1 + math.exp(-x))


def softplus(x):
    return math.log(1 + math.exp(x))


def test_kto():
    loss = kto(H, GOOD, torch.tensor(0.2), beta=0.5)
    expected = [1 - sigma(0.5 * 0.4), 1 - sigma(0.5 * 0.5), 1 - sigma(0.5 * -0.8), 1 - sigma(0.5 * -2.2)]
    assert loss.tolist() == pytest.approx(expected, rel=1e-6)


def test_apo_zero_unpaired():
    expected = [1 - sigma(0.3), sigma(-0.15), sigma(0.5), 1 - sigma(-1.0)]
    assert apo_zero_unpaired(H, GOOD, beta=0.5).tolist() == pytest.approx(expected)


def test_bco():
    loss = bco(H, GOOD, torch.tensor(0.2, dtype=torch.float64), beta=0.5)
    assert loss.tolist() == pytest.approx([softplus(-0.1), softplus(-0.35), softplus(0.3), softplus(1.2)])


def test_kto_with_kl_of_zero_is_apo_zero():
    torch.testing.assert_close(kto(H, GOOD, torch.tensor(0.0), beta=0.5), apo_zero_unpaired(H, GOOD, beta=0.5))


def test_pairs_are_the_sum_of_their_completions():
    good, bad = torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)
    other, zero = H.flip(0), torch.tensor(0.0)
    torch.testing.assert_close(
        bco(H, good, zero, beta=0.5) + bco(other, bad, zero, beta=0.5), dpo.bco_pair(H, other, beta=0.5)
    )
    torch.testing.assert_close(
        apo_zero_unpaired(H, good, beta=0.5) + apo_zero_unpaired(other, bad, beta=0.5),
        dpo.apo_zero(H, other, beta=0.5),
    )


def test_swapping_labels_and_signs_changes_nothing():
    torch.testing.assert_close(kto(-H, ~GOOD, torch.tensor(-0.2), beta=0.5), kto(H, GOOD, torch.tensor(0.2), beta=0.5))


def test_kto_gradient_is_largest_at_the_reference_point():
    h = torch.tensor([0.2, 3.0, -3.0], dtype=torch.float64, requires_grad=True)
    kto(h, torch.ones(3, dtype=torch.bool), torch.tensor(0.2, dtype=torch.float64), beta=2.0).sum().backward()
    assert h.grad[0].item() == pytest.approx(-0.5)  # −β/4
    assert (h.grad[1:].abs() < 0.05).all()


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name):
    statistic = () if LOSSES[name].signal is None else (torch.full((4,), 0.2, dtype=torch.float64),)
    h = H.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: LOSSES[name].formula(x, GOOD, *statistic, beta=0.5), h)


def test_kl_estimate_is_the_mean_and_never_negative():
    logratio = torch.tensor([0.5, -0.1, 0.2], requires_grad=True)
    estimate = kl_estimate(logratio)
    assert estimate.item() == pytest.approx(0.2)
    assert not estimate.requires_grad
    assert kl_estimate(-logratio).item() == 0.0


def test_reward_shift_lies_halfway_between_the_averages():
    shift = RewardShift.start()
    assert shift.delta.item() == 0.0
    shift = shift.update(torch.tensor([1.0, 2.0, -1.0]), torch.tensor([True, True, False]))
    assert shift.delta.item() == pytest.approx((1.5 - 1.0) / 2)
    shift = shift.update(torch.tensor([-2.0, -3.0]), torch.tensor([False, False]))
    assert shift.delta.item() == pytest.approx((1.5 - 2.0) / 2)
    one_of_each = RewardShift.start().update(torch.tensor([3.0, -1.0]), torch.tensor([True, False]))
    assert one_of_each.delta.item() == pytest.approx(1.0)


def test_reward_shift_does_not_depend_on_how_batches_were_split():
    rewards, labels = torch.tensor([1.0, 2.0, -1.0, 0.5]), torch.tensor([True, False, False, True])
    whole = RewardShift.start().update(rewards, labels)
    parts = RewardShift.start().update(rewards[:1], labels[:1]).update(rewards[1:], labels[1:])
    assert parts.delta.item() == pytest.approx(whole.delta.item())


def test_reward_shift_leaves_the_old_state_alone():
    start = RewardShift.start()
    start.update(torch.tensor([1.0]), torch.tensor([True]))
    assert start.delta.item() == 0.0


def make(**signals):
    """A desirable completion of two tokens with h = 0.6, an undesirable one of one token with h = −0.3."""
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    signals = {
        "ref_logprobs": torch.tensor([[-0.8, -1.2], [-0.4, 9.0]]),
        "label": torch.tensor([1.0, 0.0]),
        **{k: torch.full((2,), v) for k, v in signals.items()},
    }
    return Scores(torch.tensor([[-0.4, -1.0], [-0.7, 0.0]])), make_batch(mask, **signals)


def test_policy_at_the_reference_costs_half_of_the_weights():
    _, batch = make(kl=0.0)
    algorithm = KTO(desirable_weight=1.5, undesirable_weight=0.5)
    loss, _ = algorithm.loss(Scores(batch.signals["ref_logprobs"]), batch)
    assert loss.tolist() == [0.75, 0.25]


def test_bco_at_the_reference_costs_log_two():
    _, batch = make(delta=0.0)
    loss, _ = KTO(loss_type="bco").loss(Scores(batch.signals["ref_logprobs"]), batch)
    assert loss.tolist() == pytest.approx([math.log(2)] * 2)


def test_the_algorithm_weighs_by_label():
    algorithm = KTO(beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    loss, _ = algorithm.loss(*make(kl=0.2))
    assert loss.tolist() == pytest.approx([2 * (1 - sigma(0.2)), 3 * (1 - sigma(0.25))], rel=1e-5)


def test_a_label_is_a_number_above_one_half():
    scores, batch = make(kl=0.2)
    batch.signals["label"] = torch.tensor([0.6, 0.5])
    loss, _ = KTO(beta=0.5, desirable_weight=2.0, undesirable_weight=0.0).loss(scores, batch)
    assert loss.tolist() == pytest.approx([2 * (1 - sigma(0.2)), 0.0], rel=1e-5)


def test_metrics_keep_no_graph():
    scores, batch = make(kl=0.2)
    scores.logprobs.requires_grad_()
    loss, metrics = KTO().loss(scores, batch)
    assert loss.requires_grad
    assert not [name for name, value in metrics.items() if value.requires_grad]


def test_each_loss_says_what_it_needs():
    assert {name: KTO(loss_type=name).needs_signal for name in LOSSES} == {
        "kto": "kl",
        "apo_zero_unpaired": None,
        "bco": "delta",
    }


def test_metrics_leave_out_the_other_label():
    _, metrics = KTO(beta=0.5).loss(*make(kl=0.2))
    assert metrics["rewards/chosen"].tolist() == [pytest.approx(0.3), pytest.approx(math.nan, nan_ok=True)]
    assert metrics["rewards/rejected"].nanmean().item() == pytest.approx(-0.15)
    assert metrics["logps/chosen"].nanmean().item() == pytest.approx(-1.4)
    assert metrics["logps/rejected"].nanmean().item() == pytest.approx(-0.7)
    assert metrics["kl"].tolist() == pytest.approx([0.2, 0.2])


def test_the_margin_is_a_difference_of_averages():
    averages = {"rewards/chosen": 0.3, "rewards/rejected": -0.2}
    assert with_margin(averages)["rewards/margins"] == pytest.approx(0.5)
    assert with_margin({"rewards/chosen": 0.3}) == {"rewards/chosen": 0.3}


def test_recommended_weights():
    ranges = recommended_weights(100, 400)
    assert ranges.ratio == pytest.approx(0.25)
    assert not ranges.met
    assert ranges.desirable == pytest.approx((4.0, 16 / 3))
    assert ranges.undesirable == pytest.approx((0.1875, 0.25))


@pytest.mark.parametrize("low_or_high", [0, 1])
def test_the_recommended_ranges_meet_the_recommendation(low_or_high):
    ranges = recommended_weights(128, 64, desirable_weight=0.5, undesirable_weight=2.0)
    nudge = (1 + 1e-9, 1 - 1e-9)[low_or_high]
    desirable = ranges.desirable[low_or_high] * nudge
    assert recommended_weights(128, 64, desirable_weight=desirable, undesirable_weight=2.0).met
    undesirable = ranges.undesirable[low_or_high] * nudge
    assert recommended_weights(128, 64, desirable_weight=0.5, undesirable_weight=undesirable).met


def test_balanced_classes_need_no_weights():
    assert recommended_weights(50, 50).met


def test_one_class_alone_is_refused():
    with pytest.raises(DataError, match="'label' has 5 true and 0 false"):
        recommended_weights(5, 0)
    with pytest.raises(DataError, match="'label' has 0 true and 5 false"):
        recommended_weights(0, 5)
    assert recommended_weights(1, 1).ratio == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_type": "kt0"}, "Unknown loss_type 'kt0'. Did you mean 'kto'"),
        ({"beta": -1.0}, "beta must be positive, got -1.0"),
        ({"beta": 0.0}, "beta must be positive, got 0.0"),
        ({"desirable_weight": -1.0}, "desirable_weight=-1.0: give 0 or more"),
    ],
)
def test_options_that_cannot_be(options, words):
    with pytest.raises(ConfigError, match=words):
        KTO(**options)


def test_a_missing_statistic_is_named():
    with pytest.raises(DataError, match="loss_type='kto' needs the signal 'kl'"):
        KTO().loss(*make())
