"""Advantages, ratios, clipping and corrections of the critic-free family, against numbers worked by hand and identities."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.algorithms.support import make_batch
from trl.algorithms.advantages import advantages, combine_rewards, has_no_variance
from trl.algorithms.entropy_control import EntropyBonus
from trl.algorithms.grpo import GRPO, quantile
from trl.algorithms.importance import Correction, mismatch
from trl.algorithms.rloo import RLOO, Reinforce, ReinforcePlusPlus
from trl.algorithms.surrogates import CISPO, GMPO, SAPO, VESPO, Clip
from trl.errors import ConfigError
from trl.types import Experience, Scores

NAN = float("nan")
REWARDS = torch.tensor([1.0, 2.0, 3.0, 0.0, 0.0, 6.0])
GROUP = torch.tensor([0, 0, 0, 7, 7, 7])


def scores_of(logprobs, entropy=0.0):
    logprobs = torch.as_tensor(logprobs)
    return Scores(logprobs=logprobs, entropy=torch.full(logprobs.shape, entropy))


# ---- advantages ----


def test_group_advantages_by_hand():
    # groups (1, 2, 3): mean 2, std 1; (0, 0, 6): mean 2, std √12
    found = advantages(REWARDS, GROUP, baseline="group", scale="group")
    other = math.sqrt(12)
    torch.testing.assert_close(found, torch.tensor([-1, 0, 1, -2 / other, -2 / other, 4 / other]), atol=2e-4, rtol=0)
    unscaled = advantages(REWARDS, GROUP, baseline="group", scale="none")
    assert unscaled.tolist() == [-1, 0, 1, -2, -2, 4]


def test_leave_one_out_by_hand():
    found = advantages(REWARDS, GROUP, baseline="leave_one_out", scale="none")
    assert found.tolist() == [1 - 2.5, 0.0, 3 - 1.5, -3.0, -3.0, 6.0]


def test_leave_one_out_is_centred_rewards_times_g_over_g_minus_one():
    centred = advantages(REWARDS, GROUP, baseline="group", scale="none")
    found = advantages(REWARDS, GROUP, baseline="leave_one_out", scale="none")
    torch.testing.assert_close(found, centred * 3 / 2)


def test_batch_scale_by_hand():
    # all six: mean 2, squares 1 0 1 4 4 16, variance 26 / 5
    found = advantages(REWARDS, GROUP, baseline="batch", scale="batch")
    torch.testing.assert_close(found, (REWARDS - 2) / (math.sqrt(26 / 5) + 1e-4))


def test_maximum_likelihood_divides_by_the_success_rate():
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0])
    found = advantages(rewards, torch.arange(12) // 4, baseline="group", scale="mean")
    assert found.tolist() == [3, -1, -1, -1, 1, 1, -1, -1, 0, 0, 0, 0]


@pytest.mark.parametrize("baseline", ["group", "leave_one_out"])
def test_rewards_that_do_not_apply_take_no_part(baseline):
    whole = advantages(torch.tensor([1.0, 3.0]), torch.zeros(2), baseline=baseline, scale="group")
    found = advantages(torch.tensor([1.0, NAN, 3.0]), torch.zeros(3), baseline=baseline, scale="group")
    assert found[1] == 0
    torch.testing.assert_close(found[[0, 2]], whole)


def test_groups_without_variance():
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.2, 0.1, NAN, NAN])
    group = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    assert has_no_variance(rewards, group).tolist() == [True] * 3 + [False] * 3 + [True] * 2
    assert advantages(rewards, group, baseline="group", scale="group")[:3].abs().max() < 1e-3


def test_several_rewards_are_summed_with_weights():
    rewards = torch.tensor([[1.0, 10.0], [2.0, NAN], [NAN, NAN]])
    found = combine_rewards(rewards, torch.tensor([1.0, 0.5]), torch.zeros(3), aggregation="sum_then_normalize")
    assert found[:2].tolist() == [6.0, 2.0]
    assert found[2].isnan()


def test_decoupled_normalisation_gives_every_reward_the_same_say():
    rewards = torch.tensor([[0.0, 300.0], [1.0, 100.0]])
    weights, group = torch.ones(2), torch.zeros(2)
    found = combine_rewards(rewards, weights, group, aggregation="normalize_then_sum")
    torch.testing.assert_close(found, torch.zeros(2), atol=1e-3, rtol=0)


# ---- ratios and bounds ----

MASK = [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]
OLD = [[-1.0, -2.0, -1.0], [-1.0, -1.0, 0.0]]
NEW = [[-0.5, -2.5, -1.0], [-2.0, -0.5, 0.0]]


def loss_of(algorithm, advantages=(1.0, -1.0), new=NEW, **signals):
    batch = make_batch(MASK, old_logprobs=OLD, advantages=list(advantages), **signals)
    return algorithm.loss(scores_of(new), batch)


def test_clipped_tokens_by_hand():
    loss, metrics = loss_of(GRPO(surrogate=Clip(low=0.2, high=0.28)))
    up, down = math.exp(0.5), math.exp(-0.5)
    expected = [[-1.28, -down, -1.0], [max(math.exp(-1), 0.8), up, 1.0]]
    torch.testing.assert_close(loss, torch.tensor(expected))
    assert metrics["clip_ratio/high_mean"].tolist() == [[1, 0, 0], [0, 0, 0]]
    assert metrics["clip_ratio/low_mean"].tolist() == [[0, 0, 0], [1, 0, 0]]
    assert metrics["clip_ratio/region_mean"].tolist() == [[1, 0, 0], [1, 0, 0]]


def test_second_bound_by_hand():
    """δ bounds what a negative advantage can cost."""
    loss, _ = loss_of(GRPO(surrogate=Clip(delta=1.5)), advantages=(-1.0, -1.0))
    torch.testing.assert_close(loss[0], torch.tensor([1.5, 0.8, 1.0]))


def test_sequence_ratio_is_the_geometric_mean():
    """GSPO, arXiv:2507.18071, Eq. 7: row 0 moved by (0.5, −0.5, 0), row 1 by (−1, 0.5)."""
    loss, _ = loss_of(GRPO(ratio_level="sequence", surrogate=Clip(low=0.5, high=0.5)))
    torch.testing.assert_close(loss, torch.tensor([[-1.0] * 3, [math.exp(-0.25)] * 3]))


def test_whole_ratio_is_the_product():
    loss, _ = loss_of(GRPO(ratio_level="whole", surrogate=Clip(low=0.5, high=0.5)))
    torch.testing.assert_close(loss, torch.tensor([[-1.0] * 3, [math.exp(-0.5)] * 3]))


@pytest.mark.parametrize("level", ["sequence", "whole"])
def test_of_one_token_all_ratios_are_the_same(level):
    batch = make_batch([[1.0], [1.0]], old_logprobs=[[-1.0], [-2.0]], advantages=[1.0, -1.0])
    scores = scores_of([[-0.5], [-1.9]])
    expected, _ = GRPO().loss(scores, batch)
    found, _ = GRPO(ratio_level=level).loss(scores, batch)
    torch.testing.assert_close(found, expected)


def test_cispo_by_hand():
    loss, _ = loss_of(GRPO(surrogate=CISPO(high=1.5)))
    expected = [[1.5 * 0.5, math.exp(-0.5) * 2.5, 1.0], [-math.exp(-1) * 2.0, -1.5 * 0.5, 0.0]]
    torch.testing.assert_close(loss, torch.tensor(expected))


def test_a_bounded_weight_is_counted_where_the_advantage_is_positive():
    """Ratios beyond 1.5 are the first of row 0 and the second of row 1, whose advantage is negative."""
    _, metrics = loss_of(GRPO(surrogate=CISPO(high=1.5)))
    assert metrics["cispo_clip_ratio"].tolist() == [[1, 0, 0], [0, 0, 0]]
    _, both = loss_of(GRPO(surrogate=CISPO(high=1.5)), advantages=(1.0, 1.0))
    assert both["cispo_clip_ratio"].tolist() == [[1, 0, 0], [0, 1, 0]]


def test_sapo_by_hand():
    loss, _ = loss_of(GRPO(surrogate=SAPO(positive=1.0, negative=2.0)))
    gate = 4 / (1 + math.exp(-(math.exp(0.5) - 1)))
    other = 2 / (1 + math.exp(-2 * (math.exp(-1) - 1)))
    assert loss[0, 0].item() == pytest.approx(-gate, rel=1e-5)
    assert loss[1, 0].item() == pytest.approx(other, rel=1e-5)


def test_vespo_by_hand():
    """W = 1 in row 0, so its weight is 1; W = e^−½ in row 1, with k = 3 and λ = 2 for a negative advantage."""
    loss, metrics = loss_of(GRPO(surrogate=VESPO()))
    torch.testing.assert_close(loss[0], -torch.tensor(NEW[0]))
    weight = math.exp(3 * -0.5 + 2 * (1 - math.exp(-0.5)))
    torch.testing.assert_close(loss[1], weight * torch.tensor(NEW[1]))
    torch.testing.assert_close(metrics["vespo/phi_seq_mean"], torch.tensor([1.0, weight]))


def test_vespo_of_a_positive_advantage_by_hand():
    """W = e^−½ in row 1, with k = 2 and λ = 3."""
    loss, _ = loss_of(GRPO(surrogate=VESPO()), advantages=(-1.0, 0.5))
    weight = math.exp(2 * -0.5 + 3 * (1 - math.exp(-0.5)))
    torch.testing.assert_close(loss[1], -0.5 * weight * torch.tensor(NEW[1]))


def test_geometric_mean_of_clipped_ratios_by_hand():
    """Row 0 moved by (0.5, −0.5, 0): 0.5 is cut to 0.4. Row 1 by (−1, 0.5): −1 is cut to −0.4 where A < 0."""
    loss, _ = loss_of(GRPO(surrogate=GMPO(low=0.4, high=0.4)))
    torch.testing.assert_close(loss[:, 0], torch.tensor([-math.exp(-0.1 / 3), math.exp(0.1 / 2)]))


@pytest.mark.parametrize(("low", "high", "cut"), [(0.4, 0.4, (1, 1)), (1.1, 0.4, (0, 1)), (0.4, 0.6, (1, 0))])
def test_what_the_geometric_mean_cuts_is_counted(low, high, cut):
    """Of row 0 a rise by 0.5 where A > 0, of row 1 a fall by 1 where A < 0."""
    _, metrics = loss_of(GRPO(surrogate=GMPO(low=low, high=high)))
    assert metrics["clip_ratio/low_mean"].tolist() == [[0, 0, 0], [cut[0], 0, 0]]
    assert metrics["clip_ratio/high_mean"].tolist() == [[cut[1], 0, 0], [0, 0, 0]]
    torch.testing.assert_close(metrics["clip_ratio/low_min"], torch.tensor([0, cut[0] / 2]))
    torch.testing.assert_close(metrics["clip_ratio/high_max"], torch.tensor([cut[1] / 3, 0]))


SURROGATES = [Clip(), Clip(delta=2.0), CISPO(), SAPO(), SAPO(2.0, 0.5), VESPO(), GMPO()]


@pytest.mark.parametrize("surrogate", SURROGATES, ids=repr)
def test_on_its_own_samples_every_surrogate_is_reinforce(surrogate):
    """The gradient of a completion's mean at ρ = 1 is that of −A · mean log π."""
    logprobs = torch.tensor(OLD, requires_grad=True)
    batch = make_batch(MASK, old_logprobs=OLD, advantages=[0.7, -1.3])
    loss, _ = GRPO(surrogate=surrogate).loss(scores_of(logprobs), batch)
    weight = batch.mask / batch.mask.sum(-1, keepdim=True)
    (found,) = torch.autograd.grad((loss * weight).sum(), logprobs)
    torch.testing.assert_close(found, -torch.tensor([[0.7], [-1.3]]) * weight)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_on_its_own_samples_the_level_of_the_ratio_makes_no_difference(level):
    logprobs = torch.tensor(OLD, requires_grad=True)
    batch = make_batch(MASK, old_logprobs=OLD, advantages=[0.7, -1.3])
    loss, _ = GRPO(ratio_level=level).loss(scores_of(logprobs), batch)
    weight = batch.mask / batch.mask.sum(-1, keepdim=True)
    (found,) = torch.autograd.grad((loss * weight).sum(), logprobs)
    torch.testing.assert_close(found, -torch.tensor([[0.7], [-1.3]]) * weight)


def test_whole_completions_have_the_gradient_of_their_log_probability():
    logprobs = torch.tensor(OLD, requires_grad=True)
    batch = make_batch(MASK, old_logprobs=OLD, advantages=[0.7, -1.3])
    loss, _ = RLOO(beta=0.0).loss(scores_of(logprobs), batch)
    (found,) = torch.autograd.grad((loss * batch.mask / batch.mask.sum(-1, keepdim=True)).sum(), logprobs)
    torch.testing.assert_close(found, -torch.tensor([[0.7], [-1.3]]) * batch.mask)


# ---- KL, entropy, corrections ----


def test_kl_in_the_loss_by_hand():
    ref = [[-1.0, -2.5, -1.0], [-2.0, -0.5, 0.0]]
    loss, metrics = loss_of(GRPO(beta=0.1, unbiased_kl=False), advantages=(0.0, 0.0), ref_logprobs=ref)
    expected = math.exp(-0.5) - 1 + 0.5
    torch.testing.assert_close(loss, 0.1 * torch.tensor([[expected, 0, 0], [0, 0, 0]]))
    torch.testing.assert_close(metrics["kl"][0, 0], torch.tensor(expected))
    weighted, _ = loss_of(GRPO(beta=0.1), advantages=(0.0, 0.0), ref_logprobs=ref)
    torch.testing.assert_close(weighted[0, 0], torch.tensor(0.1 * expected * math.exp(0.5)))


def test_unbiased_kl_has_the_gradient_of_the_divergence():
    """Over all tokens of a small vocabulary, E[∇(ρ k3)] = ∇KL(π ‖ π_ref); E[∇k3] is not."""
    logits = torch.tensor([0.3, -0.2, 0.5], dtype=torch.double, requires_grad=True)
    ref = torch.tensor([-0.1, 0.4, 0.0], dtype=torch.double).log_softmax(-1)
    logp = logits.log_softmax(-1)
    (expected,) = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)
    tokens = make_batch(
        [[1.0]] * 3, ref_logprobs=ref[:, None], old_logprobs=logp.detach()[:, None], advantages=[0.0] * 3
    )
    for unbiased in (True, False):
        loss, _ = GRPO(beta=1.0, unbiased_kl=unbiased).loss(scores_of(logp[:, None]), tokens)
        (found,) = torch.autograd.grad((logp.exp().detach() * loss[:, 0]).sum(), logits, retain_graph=True)
        assert torch.allclose(found, expected) is unbiased


def experience(**signals):
    signals = {name: torch.tensor(value) for name, value in signals.items()}
    return Experience(torch.tensor([1.0, 3.0]), torch.tensor([0, 0]), torch.tensor(MASK), signals)


def test_kl_in_the_reward_by_hand():
    given = experience(old_logprobs=OLD, ref_logprobs=[[-2.0, -2.0, -1.0], [-1.0, -1.0, 5.0]])
    # KL of row 0 is 1, of row 1 nothing: rewards 1 − 0.5 and 3
    assert RLOO(beta=0.5).advantages(given).signals["advantages"].tolist() == [-2.5, 2.5]


def test_rewards_are_clipped_and_advantages_normalised():
    given = experience(old_logprobs=OLD)
    assert RLOO(beta=0.0, reward_clip_range=(0.0, 2.0)).advantages(given).signals["advantages"].tolist() == [-1, 1]
    found = RLOO(beta=0.0, normalize_advantages=True).advantages(given).signals["advantages"]
    torch.testing.assert_close(found, torch.tensor([-1.0, 1.0]) / math.sqrt(2), atol=1e-3, rtol=0)


def test_rewards_that_do_not_apply_take_no_part_in_the_deviation_of_a_round():
    """Advantages are −2 and 2, of standard deviation 2√2; with a third of 0 it would be 2."""
    given = Experience(torch.tensor([1.0, NAN, 3.0]), torch.zeros(3), torch.ones(3, 1))
    found = RLOO(beta=0.0, normalize_advantages=True).advantages(given).signals["advantages"]
    torch.testing.assert_close(found, torch.tensor([-1.0, 0.0, 1.0]) / math.sqrt(2), atol=1e-4, rtol=0)


def test_reinforce_and_its_normalised_form():
    given = experience(old_logprobs=OLD)
    assert Reinforce().advantages(given).signals["advantages"].tolist() == [-1, 1]
    found = ReinforcePlusPlus().advantages(given).signals["advantages"]
    torch.testing.assert_close(found, torch.tensor([-1.0, 1.0]) / (math.sqrt(2) + 1e-4))


def test_the_weight_of_the_bonus_follows_entropy():
    """Nothing until an entropy at or below the target was seen; by steps of 0.1 from there, within [0, 0.25]."""
    control, applied = EntropyBonus(0.05, target=1.0, step=0.1, low=0.0, high=0.25), []
    for entropy in (2.0, 0.9, 1.0, 0.5, 1.1):
        applied.append(control.applied)
        control = control.updated(entropy)
    assert applied == pytest.approx([0, 0, 0.1, 0.2, 0.25])
    assert (control.coefficient, control.applied) == (pytest.approx(0.15), 0)
    assert EntropyBonus(0.1).updated(9.0).updated(0.0).applied == 0.1
    with pytest.raises(ConfigError, match="entropy_coef_min=1.0 is above entropy_coef_max=0.5"):
        EntropyBonus(0.7, low=1.0, high=0.5)


def test_only_tokens_of_high_entropy_are_learned_from():
    """The upper 40 % of the five tokens with entropies 1…5."""
    algorithm = GRPO(top_entropy=0.4, surrogate=Clip(9, 9))
    given = experience(entropy=[[1.0, 5.0, 2.0], [3.0, 4.0, 0.0]])
    high = algorithm.advantages(given).signals["high_entropy"]
    assert high.tolist() == [[0, 1, 0], [0, 1, 0]]
    loss, _ = loss_of(algorithm, high_entropy=high)
    assert (loss != 0).tolist() == [[False, True, False], [False, True, False]]


def test_half_of_five_tokens_are_three():
    """The median itself is of high entropy."""
    given = experience(entropy=[[1.0, 5.0, 2.0], [3.0, 4.0, 0.0]])
    high = GRPO(top_entropy=0.5).advantages(given).signals["high_entropy"]
    assert high.tolist() == [[0, 1, 0], [1, 1, 0]]


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5])
def test_a_share_of_tokens_is_one(share):
    with pytest.raises(ConfigError, match=f"top_entropy={share}: give more than 0, at most 1"):
        GRPO(top_entropy=share)


def test_quantiles():
    values = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0])
    assert [quantile(values, q).item() for q in (0.0, 0.5, 0.875, 1.0)] == [1, 3, 4.5, 5]


def test_completions_that_the_policy_left_are_not_pushed_further():
    """Row 1 has A < 0 and fell by a mean of 0.25; row 0 rose."""
    for threshold, expected in ((0.2, 0.0), (0.25, 1.0), (0.3, 1.0)):
        loss, _ = loss_of(GRPO(off_policy_threshold=threshold, surrogate=Clip(9, 9)), sampler_logprobs=OLD)
        assert (loss[1] != 0).float().tolist() == [expected, expected, expected]
        assert (loss[0] != 0).all()


SAMPLER = [[-1.0, -2.0, -1.0 - math.log(4)], [-1.0, -1.0 + math.log(2), 0.0]]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token_truncate", [[1, 1, 3], [1, 0.5, 1]]),
        ("token_mask", [[1, 1, 0], [1, 0.5, 1]]),
        ("sequence_truncate", [[3], [0.5]]),
        ("sequence_mask", [[0], [0.5]]),
    ],
)
def test_corrections_by_hand(mode, expected):
    """Token 2 of row 0 is 4 times as likely as the sampler thought, token 1 of row 1 half as likely."""
    found = Correction(mode)(torch.tensor(OLD), torch.tensor(SAMPLER), torch.tensor(MASK))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))


def test_mismatch_by_hand():
    given = torch.tensor(OLD), torch.tensor(SAMPLER), torch.tensor(MASK)
    found = mismatch(*given, Correction("sequence_mask"))
    assert found["sampling/masked_share"].tolist() == [[1, 1, 1], [0, 0, 0]]
    tokens = mismatch(*given, Correction("token_truncate", low=0.6))["sampling/masked_share"]
    assert tokens.tolist() == [[0, 0, 1], [0, 1, 0]]
    torch.testing.assert_close(found["sampling/importance_sampling_ratio/max"], torch.tensor([4.0, 1.0]))
    torch.testing.assert_close(found["sampling/importance_sampling_ratio/min"], torch.tensor([1.0, 0.5]))
    torch.testing.assert_close(found["sampling/sampling_logp_difference/max"], torch.tensor([4.0, 2.0]).log())
    torch.testing.assert_close(found["sampling/kl"][0], torch.tensor([0, 0, 3 - math.log(4)]))


def test_correction_takes_part_in_the_loss():
    plain, _ = loss_of(GRPO(), sampler_logprobs=SAMPLER)
    found, _ = loss_of(GRPO(correction=Correction("sequence_mask")), sampler_logprobs=SAMPLER)
    torch.testing.assert_close(found, plain * torch.tensor([[0.0], [0.5]]))
    _, metrics = loss_of(GRPO(correction=Correction("token_mask")), sampler_logprobs=SAMPLER)
    assert metrics["sampling/masked_share"].tolist() == [[0, 0, 1], [0, 0, 0]], "4 is above 3, and 1/4 would not be"


def test_advantages_per_token_are_taken_as_they_are():
    batch = make_batch(MASK, old_logprobs=OLD, advantages=[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    loss, _ = GRPO().loss(scores_of(OLD), batch)
    torch.testing.assert_close(loss, -batch.signals["advantages"])


def test_unknown_names():
    with pytest.raises(ConfigError, match="Unknown ratio_level 'sequnce'. Did you mean 'sequence'"):
        GRPO(ratio_level="sequnce")
    with pytest.raises(ConfigError, match="Unknown importance_sampling_mode 'mask'"):
        Correction("mask")
    assert replace(GRPO(), beta=0.1).needs_reference
    assert not GRPO().needs_reference
