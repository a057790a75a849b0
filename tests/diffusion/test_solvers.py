"""Solvers: equal to the schedulers of diffusers, and to the formulas of the papers."""

import math

import diffusers
import pytest
import torch

from trl.diffusion.schedulers import add_ddim_noise, add_flow_noise, as_ddim, check_flow, ddim_schedule, flow_schedule
from trl.diffusion.solvers import flow_cps, flow_sde, within
from trl.errors import ConfigError, ShapeError

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
ROUNDING = 2e-5
"""Of float32 in a scheduler's step, whose factors are up to 15 near pure noise."""


def latents(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, 4, 8, 8, generator=generator) for _ in range(3)]


def column(values):
    return values.view(-1, 1, 1, 1)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_is_that_of_diffusers(prediction, clip, spacing, eta):
    scheduler = diffusers.DDIMScheduler(
        **SD, clip_sample=clip, set_alpha_to_one=False, prediction_type=prediction, timestep_spacing=spacing
    )
    schedule = ddim_schedule(scheduler, 7, eta=eta)
    x, output, noise = latents(7)
    mean, sd = schedule.transition(x, output, torch.arange(7))
    for i, t in enumerate(scheduler.timesteps):
        row = slice(i, i + 1)
        expected = scheduler.step(output[row], t, x[row], eta=eta, variance_noise=noise[row]).prev_sample
        assert torch.allclose((mean + column(sd) * noise)[row], expected, atol=ROUNDING)


@pytest.mark.parametrize("solver", ["sde", "cps"])
def test_without_noise_flow_is_the_scheduler_s_own_step(solver):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    schedule = flow_schedule(scheduler, 8, eta=0.0, solver=solver, length=64, spaced=False)
    x, output, _ = latents(8)
    mean, sd = schedule.transition(x, output, torch.arange(8))
    steps = [scheduler.step(output[i : i + 1], t, x[i : i + 1]).prev_sample for i, t in enumerate(scheduler.timesteps)]
    assert torch.allclose(mean, torch.cat(steps), atol=1e-6)
    assert not sd.any()


def test_flow_sde_is_the_paper_s_formula():
    """μ = x (1 + g² dt/2σ) + v (1 + g² (1 − σ)/2σ) dt,  s = g √−dt, in float64."""
    sigmas = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0], dtype=torch.float64)
    schedule = flow_sde(sigmas, sigmas[:-1] * 1000, eta=0.7)
    x, v, _ = latents(4)
    mean, sd = schedule.transition(x, v, torch.arange(4))
    for i in range(4):
        sigma, dt = sigmas[i].item(), (sigmas[i + 1] - sigmas[i]).item()
        inside = 0.8 if i == 0 else sigma
        g = 0.7 * math.sqrt(inside / (1 - inside))
        expected = x[i] * (1 + g**2 * dt / (2 * sigma)) + v[i] * (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt
        assert torch.allclose(mean[i], expected, atol=1e-6)
        assert sd[i].item() == pytest.approx(g * math.sqrt(-dt), rel=1e-6)


@pytest.mark.parametrize("solver", [flow_sde, flow_cps])
def test_the_noise_level_of_a_perfect_model_is_kept(solver):
    """With v = ε − x₀ known, x' has the clean part 1 − σ'; its noise is σ' for CPS, and for small steps of the SDE."""
    sigmas = torch.tensor([0.9, 0.6 if solver is flow_cps else 0.88])
    schedule = solver(sigmas, sigmas[:-1] * 1000, eta=0.2)
    clean, noise, _ = latents(1)
    x = 0.1 * clean + 0.9 * noise
    mean, sd = schedule.transition(x, noise - clean, torch.tensor([0]))
    rest = mean - (1 - sigmas[1]) * clean
    level = math.sqrt((rest / noise).median().item() ** 2 + sd.item() ** 2)
    assert level == pytest.approx(sigmas[1].item(), abs=1e-5 if solver is flow_cps else 1e-3)


def test_a_window_of_noise():
    sigmas = torch.linspace(1, 0, 6)
    noisy, quiet = (flow_sde(sigmas, sigmas[:-1] * 1000, eta=eta) for eta in (0.7, 0.0))
    inside = torch.tensor([False, True, True, False, False])
    mixed = within(noisy, quiet, inside)
    assert mixed.is_stochastic.tolist() == inside.tolist()
    x, output, _ = latents(5)
    for schedule, rows in ((noisy, inside), (quiet, ~inside)):
        found, expected = (each.transition(x, output, torch.arange(5))[0] for each in (mixed, schedule))
        assert torch.equal(found[rows], expected[rows])


def test_the_last_step_is_no_draw_where_nothing_is_left_to_add():
    scheduler = diffusers.DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=True)
    assert ddim_schedule(scheduler, 5, eta=1.0).is_stochastic.tolist() == [True] * 4 + [False]


def test_steps_may_be_mixed():
    schedule = ddim_schedule(diffusers.DDIMScheduler(**SD, clip_sample=False), 5, eta=1.0)
    x, output, _ = latents(4)
    order = torch.tensor([3, 0, 2, 2])
    mean, sd = schedule.transition(x, output, order)
    for i, t in enumerate(order):
        alone, deviation = schedule.transition(x[i : i + 1], output[i : i + 1], t[None])
        assert torch.equal(mean[i], alone[0])
        assert sd[i] == deviation[0]


def test_dynamic_shifting_is_that_of_the_pipelines():
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    flow_schedule(scheduler, 4, eta=0.5, solver="sde", length=1000, spaced=True)
    mu = calculate_shift(1000, 256, 4096, 0.5, 1.15)
    expected = math.exp(mu) / (math.exp(mu) + (1 / 0.75 - 1))
    assert scheduler.sigmas[1].item() == pytest.approx(expected, rel=1e-5)


def test_noise_of_training():
    scheduler = diffusers.DDIMScheduler(**SD, prediction_type="v_prediction")
    clean, noise, _ = latents(2)
    t = torch.tensor([10, 700])
    alpha = column(scheduler.alphas_cumprod[t].sqrt())
    sigma = column((1 - scheduler.alphas_cumprod[t]).sqrt())
    noisy, target = add_ddim_noise(scheduler, clean, noise, t)
    assert torch.allclose(noisy, alpha * clean + sigma * noise, atol=1e-6)
    assert torch.allclose(target, alpha * noise - sigma * clean, atol=1e-6)
    for prediction, expected in (("epsilon", noise), ("sample", clean)):
        other = diffusers.DDIMScheduler(**SD, prediction_type=prediction)
        same, target = add_ddim_noise(other, clean, noise, t)
        assert torch.equal(same, noisy)
        assert torch.equal(target, expected)
    noisy, target = add_flow_noise(clean, noise, torch.tensor([0.0, 0.25]))
    assert torch.equal(noisy[0], clean[0])
    assert torch.allclose(noisy[1], 0.75 * clean[1] + 0.25 * noise[1])
    assert torch.equal(target, noise - clean)


# ---- bad input ----


def test_schedulers_that_cannot_be_followed():
    flow, euler = diffusers.FlowMatchEulerDiscreteScheduler(), diffusers.EulerDiscreteScheduler()
    assert isinstance(as_ddim(euler), diffusers.DDIMScheduler)
    with pytest.raises(ConfigError, match="FlowMatchEulerDiscreteScheduler, which has no betas for DDIM"):
        as_ddim(flow)
    with pytest.raises(ConfigError, match="EulerDiscreteScheduler, but a flow matching model"):
        check_flow(euler)
    with pytest.raises(ConfigError, match="invert_sigmas"):
        check_flow(diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True))
    with pytest.raises(ConfigError, match="thresholding=False"):
        as_ddim(diffusers.DDIMScheduler(thresholding=True))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_numbers_of_steps_that_a_schedule_has(spacing):
    """Stable Diffusion's steps begin one later, so that one is missing at the end."""
    scheduler = diffusers.DDIMScheduler(**SD, timestep_spacing=spacing)
    most = 999 if spacing == "leading" else 1000
    assert [len(ddim_schedule(scheduler, steps, eta=1.0)) for steps in (1, most)] == [1, most]
    for steps in (0, -1, most + 1):
        with pytest.raises(ConfigError, match=f"^{steps} denoising steps: give at least 1, and at most the {most} of"):
            ddim_schedule(scheduler, steps, eta=1.0)


def test_noise_that_a_model_of_noise_cannot_begin_with():
    scheduler = diffusers.DDIMScheduler(
        **SD, rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="sample"
    )
    ddim_schedule(scheduler, 5, eta=1.0)
    scheduler = diffusers.DDIMScheduler.from_config(scheduler.config, prediction_type="epsilon")
    with pytest.raises(ConfigError, match="has to predict v"):
        ddim_schedule(scheduler, 5, eta=1.0)


def test_shapes_have_to_agree():
    schedule = ddim_schedule(diffusers.DDIMScheduler(**SD), 5, eta=1.0)
    with pytest.raises(ShapeError, match="transition: output"):
        schedule.transition(torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(2, dtype=torch.long))
