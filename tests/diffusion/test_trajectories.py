"""Trajectories: recomputed as sampled, whatever shares a forward pass, and gradients for any split."""

import pytest
import torch

from tests.diffusion.pipelines import PIPELINES, PROMPTS, SIZE
from trl.diffusion.families import denoiser_for
from trl.diffusion.rollouts import seed_of
from trl.diffusion.solvers import within
from trl.diffusion.trajectories import batch_of, generators_for, sample, score_steps, step_of, transitions_of
from trl.ops.gaussian import gaussian_kl

STEPS = 4
SEEDS = [11, 12]


def denoiser_of(name, guidance_scale=1.5):
    options = {"max_sequence_length": 8} if name in ("sd3", "flux", "schnell") else {}
    return denoiser_for(PIPELINES[name](), guidance_scale=guidance_scale, **SIZE, **options)


class Run:
    """Two trajectories of a pipeline, and what their steps are made of."""

    def __init__(self, name, eta=0.8, **options):
        self.denoiser = denoiser_of(name)
        self.schedule = self.denoiser.schedule(STEPS, eta=eta)
        self.texts = self.denoiser.encode(PROMPTS)
        self.negative = self.denoiser.encode_negative() if self.denoiser.is_guided else None
        self.trajectories = self.sample(**options)

    def sample(self, seeds=SEEDS, **options):
        args = (self.denoiser, self.denoiser.module, self.texts, self.schedule, seeds)
        return sample(*args, negative=self.negative, **options)

    def batch(self, steps):
        texts = self.denoiser.collate([self.texts[PROMPTS.index(each.prompt)] for each in steps])
        return batch_of(steps, texts)

    def steps(self, **signals):
        found = transitions_of(self.trajectories, PROMPTS, self.trajectories.mask, signals)
        return [step for steps in found for step in steps]

    def score(self, steps):
        return score_steps(self.denoiser, self.denoiser.module, self.batch(steps), self.schedule, self.negative)[0]


@pytest.mark.parametrize("name", PIPELINES)
def test_recomputed_log_probabilities_are_those_of_sampling(name):
    run = Run(name)
    sampled = run.trajectories.logprobs
    assert sampled.shape == (2, STEPS)
    steps = run.steps(old_logprobs=sampled)
    assert len(steps) == int(run.trajectories.mask.sum())
    order = torch.randperm(len(steps), generator=torch.Generator().manual_seed(0)).tolist()
    steps = [steps[i] for i in order]
    with torch.no_grad():
        scores = run.score(steps)  # all of them in one forward pass, in any order
    expected = torch.tensor([each.signals["old_logprobs"] for each in steps])
    assert torch.allclose(scores.logprobs[:, 0], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["sd", "sd3", "qwen"])
def test_a_sample_does_not_depend_on_those_beside_it(name):
    run = Run(name)
    alone = run.sample(at_once=1)
    assert torch.allclose(alone.latents, run.trajectories.latents, atol=1e-5)


def test_samples_of_a_group_may_begin_alike():
    run = Run("sd", first_noise=[5, 5])
    first, second = run.trajectories.latents
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


def test_a_window_is_all_that_is_drawn_and_trained():
    run = Run("sd3")
    quiet = run.denoiser.schedule(STEPS, eta=0.0)
    inside = torch.tensor([False, True, True, False])
    run.schedule = within(run.schedule, quiet, inside)
    run.trajectories = run.sample()
    assert run.trajectories.mask.tolist() == [inside.float().tolist()] * 2
    assert not run.trajectories.logprobs[:, ~inside].any()
    steps = run.steps(old_logprobs=run.trajectories.logprobs)
    assert [each.step for each in steps] == [1, 2, 1, 2]
    with torch.no_grad():
        found = run.score(steps).logprobs
    assert torch.allclose(found.view(2, 2), run.trajectories.logprobs[:, inside], atol=1e-6)


def gradients(run, groups):
    module = run.denoiser.module
    module.zero_grad()
    total = sum(map(len, groups))
    for group in groups:
        (run.score(group).logprobs.sum() / total).backward()
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_gradients_do_not_depend_on_the_split(name):
    run = Run(name)
    steps = run.steps()
    whole = gradients(run, [steps])
    interleaved = gradients(run, [steps[::3], steps[1::3], steps[2::3]])
    one_by_one = gradients(run, [[step] for step in steps])
    size = whole.norm()
    assert size > 0
    assert (interleaved - whole).norm() < 1e-5 * size
    assert (one_by_one - whole).norm() < 1e-5 * size


def test_the_exact_divergence_is_what_many_draws_say():
    """KL between the policy and one with other weights, as a mean over draws of a step."""
    run = Run("sd3", eta=0.7)
    other = denoiser_of("sd3").module
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    steps = run.steps()[1:2]
    batch = run.batch(steps)
    with torch.no_grad():
        means = [
            step_of(run.denoiser, module, batch.latents, batch.step, batch.texts, run.schedule, run.negative)
            for module in (run.denoiser.module, other)
        ]
    (mean, sd), (other_mean, _) = means
    draws = mean + sd * torch.randn(2000, *mean.shape[1:], generator=torch.Generator().manual_seed(2))
    log_ratio = ((draws - other_mean).square() - (draws - mean).square()) / (2 * sd**2)
    exact = gaussian_kl(mean, other_mean, sd).item()
    assert exact > 1e-4
    assert log_ratio.mean().item() == pytest.approx(exact, rel=0.05)


def test_batches_move_as_a_whole():
    run = Run("sd")
    batch = run.batch(run.steps(old_logprobs=run.trajectories.logprobs, advantages=torch.tensor([1.0, -1.0])))
    moved = batch.to("cpu")
    assert moved.tokens == len(moved.mask) == len(batch.mask)
    assert moved.signals["old_logprobs"].shape == moved.mask.shape
    assert moved.signals["advantages"].shape == (moved.tokens,)


# ---- seeds ----


def test_noise_depends_on_run_stream_and_number():
    """Of a large number torch's generator on the CPU reads the low 32 bits alone."""
    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 2**32), (2**32, 0, 0), (7, 0, 2**24 * 300)]
    noise = torch.stack([torch.randn(4, generator=each) for each in generators_for([seed_of(*p) for p in places])])
    assert len(noise.unique(dim=0)) == len(places)
    again = torch.randn(4, generator=generators_for([seed_of(1, 0, 0)])[0])
    assert torch.equal(again, noise[1])
