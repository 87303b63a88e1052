"""How long a chain remembers: integrated autocorrelation times.

Shape letters: M members, T steps, C quantities.
"""

import torch
from torch import Tensor


def autocorrelation_time(chain: Tensor) -> Tensor:
    """Steps per independent draw of each quantity, 1 or more.

    τ = 1 + 2 Σ ρ_t, summed over pairs of neighbouring lags as long as the pairs are positive, each at most the one
    before it.

    Args:
        chain: `[M, T, C]`, T of 4 or more.

    Returns:
        `[M, C]` float64; T where a quantity never moved.

    Source:
        Geyer (1992), Statistical Science 7(4), Section 3.3, initial monotone sequence.
    """
    num_steps = chain.shape[1]
    centred = chain.double() - chain.double().mean(1, keepdim=True)
    size = 1 << (2 * num_steps - 1).bit_length()
    spectrum = torch.fft.rfft(centred, n=size, dim=1)
    covariance = torch.fft.irfft(spectrum.abs().square(), n=size, dim=1)[:, :num_steps]
    variance = covariance[:, :1]
    rho = covariance / torch.where(variance > 0, variance, 1)
    pairs = rho[:, 0 : num_steps // 2 * 2 : 2] + rho[:, 1 : num_steps // 2 * 2 : 2]
    positive = (pairs > 0).double().cumprod(1)
    total = (pairs.cummin(1).values * positive).sum(1)
    tau = (2 * total - 1).clamp(min=1.0, max=float(num_steps))
    return torch.where(variance[:, 0] > 0, tau, float(num_steps))
