"""DDPO and GRPO on denoising steps: numbers worked by hand."""

import math
from dataclasses import dataclass

import pytest
import torch

from trl.algorithms.ddpo import DDPO, PromptStatistics, standardized
from trl.algorithms.diffusion_grpo import DiffusionGRPO
from trl.errors import ConfigError
from trl.types import Experience, Scores


@dataclass
class Steps:
    mask: torch.Tensor
    signals: dict


def experience(rewards, group=None, **signals):
    rewards = torch.tensor(rewards)
    group = torch.zeros(len(rewards), dtype=torch.long) if group is None else torch.tensor(group)
    return Experience(rewards, group, torch.ones(len(rewards), 1), signals)


# ---- advantages ----


def test_advantages_are_standardised_over_the_batch():
    # mean 2, deviation of the population √2: (−1, −1, 0, 2) / √1.5
    found = DDPO().advantages(experience([1.0, 1.0, 2.0, 4.0])).signals["advantages"]
    assert torch.allclose(found, torch.tensor([-1.0, -1.0, 0.0, 2.0]) / math.sqrt(1.5), atol=1e-6)


def test_advantages_are_clipped():
    rewards = [0.0] * 99 + [1.0]  # (1 − 0.01) / √(0.01 · 0.99) = 9.95
    assert DDPO().advantages(experience(rewards)).signals["advantages"].max() == 5
    assert DDPO(advantage_clip=20.0).advantages(experience(rewards)).signals["advantages"].max() == pytest.approx(
        0.99 / math.sqrt(0.0099), rel=1e-5
    )


def test_equal_rewards_teach_nothing():
    """In float32 the mean of seven times 0.1 is not 0.1, and the deviation hardly more than its error."""
    rewards = torch.full((7,), 0.1)
    assert not standardized(rewards).any()
    for min_count in (1, 7, 8):
        mean, _ = PromptStatistics(buffer_size=8, min_count=min_count).update(["a"] * 7, rewards)
        assert torch.equal(mean, rewards)


def test_statistics_of_prompts():
    statistics = PromptStatistics(buffer_size=3, min_count=2)
    mean, std = statistics.update(["a", "b"], torch.tensor([1.0, 3.0]))  # little known: the batch's, 2 and 1
    assert mean.tolist() == [2, 2]
    assert std.tolist() == pytest.approx([1, 1], rel=1e-5)
    mean, std = statistics.update(["a", "a"], torch.tensor([3.0, 5.0]))  # 1, 3, 5: mean 3, variance 8/3
    assert mean.tolist() == [3, 3]
    assert std.tolist() == pytest.approx([math.sqrt(8 / 3)] * 2, rel=1e-5)
    mean, _ = statistics.update(["a", "b"], torch.tensor([7.0, 5.0]))  # a: 3, 5, 7, the first is forgotten; b: 3, 5
    assert mean.tolist() == [5, 4]


def test_advantages_by_statistics_of_prompts():
    signals = {"prompt_mean": torch.tensor([1.0, 5.0]), "prompt_std": torch.tensor([2.0, 0.5])}
    found = DDPO().advantages(experience([2.0, 4.0], **signals)).signals["advantages"]
    assert found.tolist() == [0.5, -2.0]


def test_statistics_of_prompts_are_part_of_a_checkpoint():
    first, second = PromptStatistics(4, 1), PromptStatistics(4, 1)
    first.update(["a", "b", "a"], torch.tensor([1.0, 2.0, 3.0]))
    second.load_state_dict(first.state_dict())
    more = (
        ["a", "b", "a", "a"],
        torch.tensor([5.0, 6.0, 7.0, 8.0]),
    )  # the fifth reward of a takes the place of its first
    assert [each.tolist() for each in first.update(*more)] == [each.tolist() for each in second.update(*more)]


# ---- losses ----


def steps(old, advantages):
    old = torch.tensor(old)[:, None]
    return Steps(torch.ones_like(old), {"old_logprobs": old, "advantages": torch.tensor(advantages)})


def test_loss_by_hand():
    """ρ = e^0.1, e^−0.1, e^0.1, e^−0.1, e^0.01 at ε = 0.05; A = 1, 1, −1, −1, 1."""
    batch = steps([0.0] * 5, [1.0, 1.0, -1.0, -1.0, 1.0])
    logprobs = torch.tensor([[0.1], [-0.1], [0.1], [-0.1], [0.01]])
    loss, metrics = DDPO(clip_range=0.05).loss(Scores(logprobs), batch)
    expected = [-1.05, -math.exp(-0.1), math.exp(0.1), 0.95, -math.exp(0.01)]
    assert loss.flatten().tolist() == pytest.approx(expected, rel=1e-6)
    assert metrics["clipfrac"].flatten().tolist() == [1, 0, 0, 1, 0]
    assert metrics["approx_kl"].flatten().tolist() == pytest.approx([0.005] * 4 + [0.00005])


def test_at_the_old_policy_the_gradient_is_that_of_reinforce():
    logprobs = torch.tensor([[-1.0], [-2.0]], requires_grad=True)
    loss, _ = DDPO().loss(Scores(logprobs), steps([-1.0, -2.0], [0.5, -3.0]))
    loss.sum().backward()
    assert logprobs.grad.flatten().tolist() == pytest.approx([-0.5, 3.0])


def test_grpo_adds_the_exact_divergence():
    batch = steps([0.0, 0.0], [1.0, -1.0])
    kl = torch.tensor([[0.5], [2.0]])
    scores = Scores(torch.zeros(2, 1), entropy=torch.zeros(2, 1), extras={"kl": kl})
    plain, _ = DiffusionGRPO().loss(scores, batch)
    held, metrics = DiffusionGRPO(beta=0.1).loss(scores, batch)
    assert plain.flatten().tolist() == [-1, 1]
    assert torch.allclose(held, plain + 0.1 * kl)
    assert torch.equal(metrics["kl"], kl)


def test_grpo_compares_within_groups():
    found = DiffusionGRPO(advantage_clip=0.5).advantages(experience([1.0, 3.0, 10.0, 10.0], [0, 0, 1, 1]))
    assert found.signals["advantages"].tolist() == [-0.5, 0.5, 0, 0]


@pytest.mark.parametrize("options", [{"clip_range": 0.0}, {"advantage_clip": -1.0}])
def test_bounds_have_to_be_above_zero(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        DDPO(**options)
    if "advantage_clip" in options:
        with pytest.raises(ConfigError, match="advantage_clip"):
            DiffusionGRPO(**options)


def test_statistics_that_never_count():
    with pytest.raises(ConfigError, match="min_count=5 and buffer_size=3"):
        PromptStatistics(3, 5)
