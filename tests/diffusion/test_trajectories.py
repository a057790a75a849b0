"""Trajectories: recomputed as sampled, whatever shares a forward pass, and gradients for any split."""

import math
from collections.abc import Mapping
from dataclasses import fields

import pytest
import torch

from tests.diffusion.pipelines import PIPELINES, PROMPTS, SIZE
from trl.diffusion.differentiable import first_step, sample_with_gradient
from trl.diffusion.families import denoiser_for
from trl.diffusion.forward_process import NoisedPicture, levels, noised_batch
from trl.diffusion.rollouts import seed_of, split_pictures
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


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_steps_add_the_noise_of_their_generator_by_hand(name):
    """x' = μ + s ε, of log-density −ε²/2 − log s − ½ log 2π, averaged over dimensions."""
    run = Run(name)
    found, texts = run.trajectories, run.denoiser.collate(run.texts)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    drawn = torch.stack([torch.randn(*run.denoiser.latent_shape, generator=each) for each in generators])
    assert torch.equal(found.latents[:, 0], drawn)
    for t in (0, 1):
        noise = torch.stack([torch.randn(*run.denoiser.latent_shape, generator=each) for each in generators])
        args = (found.latents[:, t], torch.full((2,), t), texts, run.schedule, run.negative)
        with torch.no_grad():
            mean, sd = step_of(run.denoiser, run.denoiser.module, *args)
        assert torch.allclose(found.latents[:, t + 1], mean + sd[0] * noise, atol=1e-5)
        logprobs = -noise.square().flatten(1).mean(1) / 2 - sd.log() - math.log(2 * math.pi) / 2
        assert torch.allclose(found.logprobs[:, t], logprobs, atol=1e-4)


@pytest.mark.parametrize("recompute", [False, True])
def test_sampling_with_gradient_takes_the_same_steps(recompute):
    """From the same noise; only steps from the first one on have a gradient, and none where none is asked for."""
    run = Run("sd3")
    states, module = run.trajectories.latents, run.denoiser.module
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]

    def noise(like):
        return torch.stack([torch.randn(*like.shape[1:], generator=each) for each in generators])

    args = (run.denoiser, module, run.denoiser.collate(run.texts), run.schedule)
    options = {"negative": run.negative, "noise": noise, "recompute": recompute}
    found = sample_with_gradient(*args, noise(states[:, 0]), first=2, **options)
    for t, state in enumerate(found):
        assert torch.allclose(state, states[:, t], atol=1e-5)
    assert [state.requires_grad for state in found] == [False, False, False, True, True]
    with torch.no_grad():
        found = sample_with_gradient(*args, states[:, 0], first=0, **options)
    assert not any(state.requires_grad for state in found)


def test_the_first_step_with_gradient_is_at_most_the_last():
    assert [first_step(4, fixed=fixed, drawn_between=None) for fixed in (0, 3, 4, 9)] == [0, 3, 3, 3]
    torch.manual_seed(0)
    assert {first_step(4, fixed=0, drawn_between=(1, 9)) for _ in range(99)} == {1, 2, 3}


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


def devices(value) -> set[str]:
    """The devices of all tensors within a field of a batch."""
    if isinstance(value, torch.Tensor):
        return {value.device.type}
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple) else ()
    return set().union(*map(devices, parts))


def pictures(*, learned=(True, False)) -> list[NoisedPicture]:
    """Items of two clean latents each."""
    generator = torch.Generator().manual_seed(0)
    return [
        NoisedPicture(tuple(torch.randn(2, 4, 2, 2, generator=generator)), PROMPTS[i], level, 5 + i, {"x": 1.0}, each)
        for i, (level, each) in enumerate(zip((0.25, 0.75), learned, strict=True))
    ]


def test_batches_move_as_a_whole():
    run = Run("sd")
    batch = run.batch(run.steps(old_logprobs=run.trajectories.logprobs, advantages=torch.tensor([1.0, -1.0])))
    for each in (batch, noised_batch(pictures(), batch.texts)):
        moved = each.to("meta")
        assert moved.tokens == each.tokens
        for field in fields(each):
            found = devices(getattr(moved, field.name))
            assert found <= ({"cpu"} if field.name == "step" else {"meta"}), field.name
    assert batch.signals["old_logprobs"].shape == batch.mask.shape
    assert batch.signals["advantages"].shape == (batch.tokens,)


def test_what_is_masked_out_is_not_trained_on():
    batch = noised_batch(pictures(), {})
    assert (batch.mask.tolist(), batch.tokens) == ([[1.0], [0.0]], 1)
    assert batch.masked_out().mask.tolist() == [[0.0], [0.0]]


# ---- the forward process ----


def test_noised_pairs_by_hand():
    """Both pictures of a pair have its noise, level and text: x = (1 − σ) x₀ + σ ε, whose velocity is ε − x₀."""
    denoiser, items = denoiser_of("sd3"), pictures()
    texts = denoiser.collate(denoiser.encode(PROMPTS))
    found = noised_batch(items, texts).noised(denoiser)
    for place, (side, i) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        clean, level = items[i].latents[side], items[i].level
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(items[i].seed))
        assert torch.allclose(found.latents[place], (1 - level) * clean + level * noise)
        assert torch.allclose(found.target[place], noise - clean)
        assert found.timesteps[place] == 1000 * level
        assert all(torch.equal(found.texts[name][place], texts[name][i]) for name in texts)


def test_levels_are_drawn_one_from_each_part():
    found = [levels(4, seed) for seed in (0, 0, 1)]
    assert all(k / 4 <= level < (k + 1) / 4 for each in found for k, level in enumerate(each))
    assert found[0] == found[1] != found[2]


def test_minibatches_hold_whole_pictures_and_each_once():
    items = [[(n, t) for t in range(n % 3)] for n in range(7)]
    found = split_pictures(items, 3, seed=0)
    assert sorted(item for each in found for item in each) == sorted(item for each in items for item in each)
    plain = split_pictures([[n] for n in range(7)], 3, seed=0)
    assert [len(each) for each in plain] == [2, 2, 3]
    assert (
        plain
        == split_pictures([[n] for n in range(7)], 3, seed=0)
        != split_pictures([[n] for n in range(7)], 3, seed=1)
    )
    where = {n: k for k, each in enumerate(plain) for n in each}
    assert all(where[n] == k for k, each in enumerate(found) for n, _ in each)


# ---- seeds ----


def test_noise_depends_on_run_stream_and_number():
    """Of a large number torch's generator on the CPU reads the low 32 bits alone."""
    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 2**32), (2**32, 0, 0), (7, 0, 2**24 * 300)]
    noise = torch.stack([torch.randn(4, generator=each) for each in generators_for([seed_of(*p) for p in places])])
    assert len(noise.unique(dim=0)) == len(places)
    again = torch.randn(4, generator=generators_for([seed_of(1, 0, 0)])[0])
    assert torch.equal(again, noise[1])
