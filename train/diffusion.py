"""READ 3. The diffusion half of the method: pure functions of tensors.

Nothing is drawn here. train/batches.py draws for every picture a latent x0 from the cached posterior (a mean and a
standard deviation of each number, which the VAE's encoder gave), noise eps from a standard normal, and a timestep t
uniformly from 0 … T - 1. xt is the noisy latent, and alpha_bar (T,) is ᾱ, the cumulative signal share: how much of its
variance is x0's. B pictures in a batch, C h w latent channels, height and width.
"""

import torch


def noise_schedule(config):
    """alpha_bar, ᾱ_t = Π_{s ≤ t} (1 - β_s), fp32 (T,), from a model's scheduler config. β_s is the noise of one step.

    SDXL's is "scaled_linear", β from 0.00085 to 0.012 over T = 1000; "linear" is the only other one that
    data/models/schema.py lets in.
    """
    T, first, last = config["num_train_timesteps"], config["beta_start"], config["beta_end"]
    if config["beta_schedule"] == "scaled_linear":
        betas = torch.linspace(first**0.5, last**0.5, T) ** 2
    else:
        betas = torch.linspace(first, last, T)
    alpha_bar = torch.cumprod(1 - betas, dim=0)
    if config["rescale_betas_zero_snr"]:
        # Lin et al. 2023, algorithm 1: shift and scale √ᾱ so that the last timestep is pure noise and the first stays
        root = alpha_bar.sqrt()
        alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return alpha_bar


def sample_posterior(mean, std, noise, scaling_factor):
    """x0 (B, C, h, w), a draw from the VAE's posterior: another latent of the same picture each time.

    scaling_factor is the model's, and brings latents to about the standard deviation of 1 that the UNet knows.
    """
    return (mean + std * noise) * scaling_factor


def add_noise(x0, eps, t, alpha_bar):
    """xt = √ᾱ_t x0 + √(1 - ᾱ_t) eps          DDPM, Ho et al. 2020, eq. 4.  t (B,) integers -> (B, C, h, w)"""
    a = alpha_bar[t].view(-1, 1, 1, 1)
    return a.sqrt() * x0 + (1 - a).sqrt() * eps


def target(x0, eps, t, alpha_bar, prediction_type):
    """What the UNet is to predict: eps, or v = √ᾱ_t eps - √(1 - ᾱ_t) x0 (Salimans & Ho 2022, appendix D)."""
    if prediction_type == "epsilon":
        return eps
    a = alpha_bar[t].view(-1, 1, 1, 1)
    return a.sqrt() * eps - (1 - a).sqrt() * x0


def loss_weight(t, alpha_bar, prediction_type, snr_gamma):
    """Weight (B,) of each sample's loss: 1, or with a gamma min-SNR's (Hang et al. 2023, eq. 9).

    With the signal-to-noise ratio snr = ᾱ_t / (1 - ᾱ_t), the paper weighs the squared error of x0 by min(snr, gamma).
    What is compared here is eps or v, and for the same xt |x0' - x0|² = |eps' - eps|² / snr = |v' - v|² / (snr + 1).
    """
    snr = alpha_bar[t] / (1 - alpha_bar[t])
    if snr_gamma is None:
        return torch.ones_like(snr)
    if prediction_type == "epsilon":
        return (snr_gamma / snr).clamp(max=1)  # min(snr, gamma) / snr, also where snr is 0
    return snr.clamp(max=snr_gamma) / (snr + 1)


def squared_error(prediction, wanted):
    """Mean squared error (B,) of each sample over its elements, fp32."""
    return (prediction.float() - wanted.float()).square().mean(dim=(1, 2, 3))
