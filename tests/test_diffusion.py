"""The formulas of diffusion against diffusers' DDPMScheduler, and each against what it means."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from train import diffusion

SDXL = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
SDXL |= dict(rescale_betas_zero_snr=False)
CONFIGS = {
    "sdxl": SDXL,
    "linear": dict(SDXL, beta_schedule="linear"),
    "zero terminal snr": dict(SDXL, rescale_betas_zero_snr=True),
}


def example(B=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, B, 4, 3, 5, generator=g)
    t = torch.randint(1000, (B,), generator=g)
    t[:2] = torch.tensor([0, 999])
    return x0, eps, t


@pytest.mark.parametrize("name", CONFIGS)
def test_noise_and_targets_equal_diffusers(name):
    """A schedule, a square root or a sign that differs would teach the model another process than its own."""
    theirs = DDPMScheduler(**CONFIGS[name])
    alpha_bar = diffusion.noise_schedule(CONFIGS[name])
    x0, eps, t = example()
    close = dict(rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alpha_bar, theirs.alphas_cumprod, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(diffusion.add_noise(x0, eps, t, alpha_bar), theirs.add_noise(x0, eps, t), **close)
    velocity = diffusion.target(x0, eps, t, alpha_bar, "v_prediction")
    torch.testing.assert_close(velocity, theirs.get_velocity(x0, eps, t), **close)
    assert diffusion.target(x0, eps, t, alpha_bar, "epsilon") is eps


def test_zero_terminal_snr_keeps_the_first_and_ends_in_noise():
    plain, rescaled = diffusion.noise_schedule(SDXL), diffusion.noise_schedule(CONFIGS["zero terminal snr"])
    assert rescaled[-1] == 0 and plain[-1] > 0
    torch.testing.assert_close(rescaled[0], plain[0])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weighs_the_clean_pictures_error_by_min_snr_gamma(prediction_type, gamma):
    """What the paper defines (eq. 7): min(snr, gamma) · |x0 - x̂0|², with x̂0 solved from the prediction, in fp64."""
    alpha_bar = diffusion.noise_schedule(SDXL)
    x0, eps, t = example()
    wanted = diffusion.target(x0, eps, t, alpha_bar, prediction_type)
    guess = wanted + 0.1 * torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    weight = diffusion.loss_weight(t, alpha_bar, prediction_type, gamma)

    a = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)[t.numpy()].reshape(-1, 1, 1, 1)
    clean, noise, output = (p.double().numpy() for p in (x0, eps, guess))
    noisy = a**0.5 * clean + (1 - a) ** 0.5 * noise
    if prediction_type == "epsilon":
        recovered = (noisy - (1 - a) ** 0.5 * output) / a**0.5
    else:
        recovered = a**0.5 * noisy - (1 - a) ** 0.5 * output
    errors = ((clean - recovered) ** 2).mean((1, 2, 3)) * np.minimum(a / (1 - a), gamma).ravel()
    np.testing.assert_allclose(weight * diffusion.squared_error(guess, wanted), errors, rtol=2e-3)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_is_finite_where_nothing_of_the_picture_is_left(prediction_type):
    """At the last timestep of zero terminal SNR the weight would be min(0, gamma) / 0."""
    alpha_bar = diffusion.noise_schedule(CONFIGS["zero terminal snr"])
    weight = diffusion.loss_weight(torch.tensor([999]), alpha_bar, prediction_type, 5.0)
    assert weight == (1 if prediction_type == "epsilon" else 0)


def test_without_gamma_every_sample_weighs_one():
    x0, eps, t = example()
    assert torch.equal(diffusion.loss_weight(t, diffusion.noise_schedule(SDXL), "epsilon", None), torch.ones(len(t)))


def test_the_error_is_each_samples_mean_in_fp32():
    """In fp16 the sum over a picture of 65,536 numbers with an error of 1.5 would overflow."""
    prediction, wanted = torch.full((2, 4, 128, 128), 300.0).half(), torch.zeros(2, 4, 128, 128).half()
    prediction[1] = 2
    assert diffusion.squared_error(prediction, wanted).tolist() == [pytest.approx(300.0**2), 4]


def test_posterior_draws_have_the_posteriors_mean_and_deviation():
    """The mean instead of a draw, or a scaling factor on only one of the two, would show."""
    mean, std = torch.tensor([1.5, -2.0]).view(1, 2, 1, 1), torch.tensor([0.5, 3.0]).view(1, 2, 1, 1)
    noise = torch.randn(100_000, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    draws = diffusion.sample_posterior(mean, std, noise, 0.13025)
    torch.testing.assert_close(draws.mean(0).view(1, 2, 1, 1), 0.13025 * mean, rtol=0.02, atol=0.002)
    torch.testing.assert_close(draws.std(0).view(1, 2, 1, 1), 0.13025 * std, rtol=0.02, atol=0)
