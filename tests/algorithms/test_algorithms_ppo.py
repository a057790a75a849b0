"""PPO's quantities by hand: token rewards, GAE, whitening, both clipped losses, controllers, running moments."""

from __future__ import annotations

import math

import pytest
import torch

from trl.algorithms.gae import gae
from trl.algorithms.kl_control import AdaptiveKL, FixedKL
from trl.algorithms.moments import RunningMoments
from trl.algorithms.ppo import PPO, clip_values, full_kl, token_rewards, value_loss
from trl.data.layout import lay_out
from trl.errors import ConfigError, DataError
from trl.types import Completion, Example, Experience, Scores

MASK = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])


def experience(**signals):
    signals = {
        "old_logprobs": torch.tensor([[-1.0, -2.0, -0.5], [-1.5, -0.1, 0.0]]),
        "ref_logprobs": torch.tensor([[-1.2, -1.0, -0.5], [-1.0, -0.3, 0.0]]),
        "values": torch.tensor([[0.5, 0.0, 1.0], [0.2, -0.4, 0.0]]),
        **signals,
    }
    return Experience(rewards=torch.tensor([1.0, -2.0]), group=torch.tensor([0, 1]), mask=MASK, signals=signals)


ROUND = Experience(torch.tensor([4.0, 2.0, math.nan]), torch.arange(3), torch.ones(3, 1), {"kl": torch.ones(3, 1)})


def scored(experience: Experience) -> Experience:
    return PPO().with_scores(experience)


# ---- rewards ----


def test_token_rewards_by_hand():
    """β = 0.5; log-ratios 0.2, −1, 0 and −0.5, 0.2: the score is on the last token that counts."""
    found = PPO(controller=FixedKL(0.5)).with_token_rewards(scored(experience())).signals
    torch.testing.assert_close(found["kl"], torch.tensor([[0.2, -1.0, 0.0], [-0.5, 0.2, 0.0]]))
    torch.testing.assert_close(found["token_rewards"], torch.tensor([[-0.1, 0.5, 1.0], [0.25, -2.1, 0.0]]))


@pytest.mark.parametrize(
    ("penalty", "kl"),
    [
        ("abs", [[0.2, 1.0, 0.0], [0.5, 0.2, 0.0]]),
        ("mse", [[0.02, 0.5, 0.0], [0.125, 0.02, 0.0]]),
        ("full", [[0.1, 0.2, 0.3], [0.4, 0.5, 0.0]]),
    ],
)
def test_other_penalties_by_hand(penalty, kl):
    full = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    found = PPO(kl_penalty=penalty).with_token_rewards(scored(experience(full_kl=full))).signals["kl"]
    torch.testing.assert_close(found, torch.tensor(kl))


@pytest.mark.parametrize(
    ("options", "scores"),
    [
        ({}, [4, 2, 0]),
        ({"score_clip": 3.0}, [3, 2, 0]),
        ({"use_score_scaling": True}, [2, 1, 0]),
        ({"use_score_scaling": True, "use_score_norm": True}, [1, 0, -1]),
        ({"use_score_scaling": True, "use_score_norm": True, "score_clip": 0.75}, [0.75, 0, -0.75]),
    ],
)
def test_scores_by_hand(options, scores):
    """Rewards 4, 2 and none, which counts as 0: their mean is 2, and their standard deviation."""
    assert PPO(**options).with_scores(ROUND).signals["scores"].tolist() == pytest.approx(scores)


def test_rewards_of_tokens_stand_in_place_of_the_score():
    """β = 0.5, log-ratios as above; a token outside the mask has no reward."""
    dense = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    algorithm = PPO(controller=FixedKL(0.5))
    found = algorithm.with_token_rewards(algorithm.with_scores(experience(dense_rewards=dense))).signals[
        "token_rewards"
    ]
    torch.testing.assert_close(found, torch.tensor([[0.9, 2.5, 3.0], [4.25, 4.9, 0.0]]))


def test_the_score_lies_on_the_last_token_that_counts():
    mask = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    found = token_rewards(torch.tensor([3.0, 5.0]), torch.ones(2, 4), mask, coefficient=0.1)
    torch.testing.assert_close(found, torch.tensor([[-0.1, 0.0, 2.9, 0.0], [0.0, 4.9, 0.0, 0.0]]))


def test_the_full_divergence_is_the_mean_of_the_sampled_one():
    logits, reference = torch.tensor([[0.3, -1.0, 2.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    policy = logits.softmax(-1)
    expected = (policy * (policy / reference.softmax(-1)).log()).sum()
    torch.testing.assert_close(full_kl(logits, reference)[0], expected)
    assert full_kl(logits, logits).item() == pytest.approx(0, abs=1e-7)


# ---- advantages ----


def test_gae_by_hand():
    """γ = ½, λ = ½. δ = (−0.1 + 0 − 0.5, 0.5 + 0.5 − 0, 1 − 1); A = δ_t + ¼ A_{t+1}, from the end."""
    rewards = torch.tensor([[-0.1, 0.5, 1.0], [0.25, -2.1, 0.0]])
    advantages, returns = gae(rewards, experience().signals["values"], MASK, gamma=0.5, lam=0.5)
    expected = torch.tensor([[-0.6 + 0.25, 1.0, 0.0], [0.25 - 0.2 - 0.2 - 0.25 * 1.7, -1.7, 0.0]])
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, torch.tensor([[0.15, 1.0, 1.0], [-0.375, -2.1, 0.0]]))


def test_lambda_one_is_return_minus_value():
    torch.manual_seed(0)
    rewards, values = torch.randn(3, 5), torch.randn(3, 5)
    advantages, returns = gae(rewards, values, torch.ones(3, 5), gamma=1.0, lam=1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns, to_go)
    torch.testing.assert_close(advantages, to_go - values)


def test_lambda_zero_is_the_one_step_error():
    rewards, values = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]])
    advantages, _ = gae(rewards, values, torch.ones(1, 2), gamma=0.9, lam=0.0)
    torch.testing.assert_close(advantages, torch.tensor([[1 + 4.5 - 3, 2.0 - 5]]))


def test_masked_tokens_are_no_steps():
    """A response with a hole is the response without it."""
    rewards, values = torch.tensor([[1.0, 9.0, 2.0, 9.0]]), torch.tensor([[0.5, 7.0, -1.0, 7.0]])
    mask = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    with_hole = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    without = gae(rewards[:, [0, 2]], values[:, [0, 2]], torch.ones(1, 2), gamma=0.9, lam=0.8)
    for found, expected in zip(with_hole, without, strict=True):
        torch.testing.assert_close(found[:, [0, 2]], expected)
        assert found[:, [1, 3]].abs().sum() == 0


def test_advantages_are_whitened_over_the_mask():
    found = PPO().advantages(experience()).signals["advantages"]
    scored = found[MASK.bool()]
    assert scored.mean().item() == pytest.approx(0, abs=1e-6)
    assert scored.var().item() == pytest.approx(1, abs=1e-5)
    assert found[1, 2] == 0


def test_returns_are_of_rewards_that_were_whitened_without_shifting_their_mean():
    """Rewards −0.1, 0.5, 1, 0.25, −2.1: mean −0.09, Σ (x − x̄)² = 5.692, variance 1.423. γ = λ = 1."""
    algorithm = PPO(lam=1.0, whiten_rewards=True, controller=FixedKL(0.5))
    raw = [[-0.1, 0.5, 1.0], [0.25, -2.1]]
    scale = math.sqrt(5.692 / 4)
    white = [[(x + 0.09) / scale - 0.09 for x in row] for row in raw]
    found = algorithm.advantages(experience()).signals["returns"]
    assert found[0].tolist() == pytest.approx([sum(white[0][t:]) for t in range(3)], abs=1e-5)
    assert found[1].tolist() == pytest.approx([sum(white[1]), white[1][1], 0], abs=1e-5)


# ---- loss ----


def test_values_are_clipped_around_the_old_ones():
    found = clip_values(torch.tensor([1.0, -1.0, 0.1]), torch.zeros(3), cliprange=0.2)
    torch.testing.assert_close(found, torch.tensor([0.2, -0.2, 0.1]))


def test_the_value_loss_by_hand():
    """Old value 0, ε = 0.2. Beyond ε the larger error counts, whichever side the return is on."""
    values, returns = torch.tensor([1.0, 1.0, 0.1]), torch.tensor([2.0, -1.0, 1.0])
    found = value_loss(values, torch.zeros(3), returns, cliprange=0.2)
    torch.testing.assert_close(found, torch.tensor([1.8**2 / 2, 2.0**2 / 2, 0.9**2 / 2]))


def test_loss_and_metrics_by_hand():
    """One completion, two tokens: ratios 1.5 (clipped at 1.2) and 0.9; values 1 (old 0.5) and −0.4 (old −0.4)."""
    signals = {
        "old_logprobs": [-1.0, -2.0],
        "advantages": [2.0, -1.0],
        "values": [0.5, -0.4],
        "returns": [0.0, 0.6],
    }
    batch = lay_out([Example([3], (Completion([5, 6], signals=signals),))])
    scores = Scores(
        logprobs=torch.tensor([[-1.0 + math.log(1.5), -2.0 + math.log(0.9)]], requires_grad=True),
        entropy=torch.tensor([[0.7, 0.3]], requires_grad=True),
        value=torch.tensor([[1.0, -0.4]], requires_grad=True),
    )
    loss, metrics = PPO(vf_coef=0.1).loss(scores, batch)
    torch.testing.assert_close(loss, torch.tensor([[-2.4 + 0.1 * 0.5, 0.9 + 0.1 * 0.5]]))
    expected = {
        "loss/policy": [-2.4, 0.9],
        "loss/value": [0.5, 0.5],
        "loss/total": [-2.35, 0.95],
        "policy/approxkl": [math.log(1.5) ** 2 / 2, math.log(0.9) ** 2 / 2],
        "policy/policykl": [-math.log(1.5), -math.log(0.9)],
        "policy/clipfrac": [1, 0],
        "policy/ratio": [1.5, 0.9],
        "policy/skipped": [0, 0],
        "policy/entropy": [0.7, 0.3],
        "policy/advantages_mean": [2, -1],
        "val/vpred": [1.0, -0.4],
        "val/error": [1.0, 1.0],
        "val/clipfrac": [0, 0],
    }
    assert metrics.keys() == expected.keys()
    for name, values in expected.items():
        assert metrics[name][0].tolist() == pytest.approx(values, abs=1e-6), name
        assert not metrics[name].requires_grad, name
    loss.sum().backward()
    assert scores.logprobs.grad[0].tolist() == pytest.approx([0.0, 0.9], abs=1e-6)
    assert scores.value.grad[0].tolist() == pytest.approx([0.1, -0.1], abs=1e-6)


def test_values_that_the_bound_holds_back_are_counted():
    """Old value 0, ε = 0.2, value 1: a return of 0.7 is nearer to 1 than to 0.2, returns of 0.5 and 0.2 are not."""
    zeros = torch.zeros(1, 3)
    signals = {name: zeros[0].tolist() for name in ("old_logprobs", "advantages", "values")}
    completion = Completion([5, 6, 7], signals={**signals, "returns": [0.7, 0.5, 0.2]})
    batch = lay_out([Example([3], (completion,))])
    _, metrics = PPO().loss(Scores(logprobs=zeros, value=torch.ones(1, 3)), batch)
    assert metrics["val/clipfrac"].tolist() == [[1, 0, 0]]
    assert "policy/entropy" not in metrics


def test_nothing_is_learned_of_a_minibatch_that_has_moved_too_far():
    """Ratios 1.5, 0.9 and, outside the mask, 9: their mean is 1.2."""
    zeros = [0.0, 0.0, 0.0]
    signals = {"old_logprobs": zeros, "advantages": [1.0, 1.0, 1.0], "values": zeros, "returns": [1.0, 1.0, 1.0]}
    batch = lay_out([Example([3], (Completion([5, 6, 7], mask=[1, 1, 0], signals=signals),))])
    logprobs = torch.tensor([[1.5, 0.9, 9.0]]).log()
    for threshold, skipped in ((1.19, 1.0), (1.21, 0.0)):
        loss, metrics = PPO(ratio_threshold=threshold).loss(Scores(logprobs=logprobs, value=torch.zeros(1, 3)), batch)
        assert metrics["policy/skipped"].tolist() == [[skipped] * 3]
        assert (loss == 0).all() == bool(skipped)
        assert metrics["loss/total"][0, 0] == pytest.approx(-1.2 + 0.1 / 2)


# ---- controllers and moments ----


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(6.0, 0.2), (6.6, 0.2 * (1 + 0.1 * 128 / 10_000)), (60.0, 0.2 * (1 + 0.2 * 128 / 10_000)), (0.0, 0.2 * 0.99744)],
)
def test_the_adaptive_controller_by_hand(kl, expected):
    assert AdaptiveKL().updated(kl, 128).coefficient == pytest.approx(expected, abs=1e-12)


def test_the_fixed_controller_stays():
    assert FixedKL(0.3).updated(100.0, 128).coefficient == 0.3


def test_the_algorithm_moves_on_with_its_controller():
    algorithm = PPO(controller=AdaptiveKL(1.0, 1.0, 10))
    mask = torch.tensor([[1.0, 1.0, 0.0]] * 10)
    seen = Experience(torch.zeros(10), torch.arange(10), mask, {"kl": torch.tensor([[1.5, 0.5, 9.0]] * 10)})
    assert algorithm.after_round(seen).controller.coefficient == pytest.approx(1.2)
    assert algorithm.controller.coefficient == 1.0


def test_a_checkpoint_holds_the_coefficient_and_the_moments():
    later = PPO(use_score_scaling=True, controller=AdaptiveKL(1.0, 0.5, 3)).after_round(ROUND)
    assert (later.controller.coefficient, later.moments) == (pytest.approx(1.2), RunningMoments(3, 2.0, 8.0))
    resumed = PPO(use_score_scaling=True)
    resumed.load_state_dict(later.state_dict())
    assert (resumed.controller.coefficient, resumed.moments) == (later.controller.coefficient, later.moments)
    assert PPO().after_round(ROUND).moments == RunningMoments(), "which nothing reads where scores are not scaled"


def test_running_moments_are_those_of_everything_seen():
    moments = RunningMoments().updated(torch.tensor([1.0, 3.0])).updated(torch.tensor([5.0, 7.0, 9.0]))
    assert (moments.count, moments.mean) == (5, 5.0)
    assert moments.std == pytest.approx(math.sqrt(10))
    x = torch.tensor([5.0, 15.0])
    assert moments.scaled(x, centred=True).tolist() == pytest.approx([0, math.sqrt(10)])
    assert moments.scaled(x, centred=False).tolist() == pytest.approx([5 / math.sqrt(10), 15 / math.sqrt(10)])


def test_scores_that_do_not_vary_are_not_scaled():
    assert RunningMoments().updated(torch.tensor([4.0])).std == 1
    assert RunningMoments().updated(torch.tensor([4.0, 4.0])).std == 1
    assert RunningMoments().updated(torch.full((7,), 0.1)).std == 1, "whose mean is not 0.1 in float32"
    assert RunningMoments().updated(torch.tensor([0.0, 0.2])).std == pytest.approx(math.sqrt(0.02))


# ---- errors ----


def test_an_unknown_penalty():
    with pytest.raises(ConfigError, match="Unknown kl_penalty 'abz'. Did you mean 'abs'"):
        PPO(kl_penalty="abz")


def test_a_missing_signal():
    with pytest.raises(DataError, match="kl_penalty='full' needs the signal 'full_kl'"):
        PPO(kl_penalty="full").advantages(experience())


@pytest.mark.parametrize("options", [{"cliprange": -0.2}, {"gamma": 1.5}, {"use_score_norm": True}])
def test_options_out_of_range(options):
    """Also of an algorithm that no configuration has made, as for `OnlineTrainer`."""
    with pytest.raises(ConfigError, match=next(iter(options))):
        PPO(**options)
