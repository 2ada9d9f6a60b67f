"""How sure a success rate is, and how well simulation predicts reality."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion.

        (p̂ + z²/2n ± z √(p̂(1-p̂)/n + z²/4n²)) / (1 + z²/n)

    Wilson 1927; recommended over the normal approximation by Brown, Cai and DasGupta 2001 (doi:10.1214/ss/1009213286).

    Raises:
        ValueError: not 0 <= successes <= n with n >= 1, or confidence outside (0, 1).
    """
    if not (n >= 1 and 0 <= successes <= n and 0 < confidence < 1):
        raise ValueError(f"{successes} successes of {n} at confidence {confidence}: need 0 <= successes <= n, n >= 1")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    scale = 1 + z * z / n
    # At the ends the exact bound is 0 or 1; rounding would miss it by 1e-17.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return low, high


Numbers = Sequence[float] | NDArray[np.float64]


def pearson(x: Numbers, y: Numbers) -> float:
    """Linear correlation; NaN if either is constant."""
    dx, dy = np.asarray(x, float) - np.mean(x), np.asarray(y, float) - np.mean(y)
    scale = np.sqrt((dx**2).sum() * (dy**2).sum())
    return float((dx * dy).sum() / scale) if scale > 0 else float("nan")


def spearman(x: Numbers, y: Numbers) -> float:
    """Correlation of ranks, ties sharing their mean rank; NaN if either is constant."""
    return pearson(_ranks(np.asarray(x, float)), _ranks(np.asarray(y, float)))


def mean_maximum_rank_violation(real: Numbers, sim: Numbers) -> float:
    """MMRV: by how much real performance is misjudged by the ranking in simulation; 0 is perfect, range [0, 1].

        RankViolation(i, j) = |R_i - R_j| · 1[(S_i < S_j) ≠ (R_i < R_j)]
        MMRV = 1/N Σ_i max_j RankViolation(i, j)

    Li et al. 2024, SIMPLER (arXiv:2405.05941, eq. 1), with the indicator on strict comparisons as written there: a tie
    in simulation between unequal real rates counts as a violation for one order of the pair.
    """
    r, s = np.asarray(real, float), np.asarray(sim, float)
    disagree = (s[:, None] < s[None, :]) != (r[:, None] < r[None, :])
    return float((np.abs(r[:, None] - r[None, :]) * disagree).max(axis=1).mean())


def bootstrap_over_trials(
    statistic: Callable[[NDArray[np.float64], NDArray[np.float64]], float],
    real: tuple[Sequence[int], Sequence[int]],
    sim: tuple[Sequence[int], Sequence[int]],
    *,
    confidence: float,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of ``statistic(real rates, sim rates)`` over resampled trials.

    Args:
        statistic: of two arrays of rates.
        real: successes and trials of each entry.
        sim: likewise in simulation.
        confidence: of the interval.
        draws: resamples; those on which the statistic is undefined (a constant side) are left out.
        seed: of the resampling.

    Returns:
        Low and high; NaN if no draw defines the statistic. The entries themselves are held fixed.
    """
    generator = np.random.default_rng(seed)

    def rates(counts: tuple[Sequence[int], Sequence[int]]) -> NDArray[np.float64]:
        successes, trials = (np.asarray(column) for column in counts)
        return generator.binomial(trials, successes / trials, size=(draws, len(trials))) / trials

    values = np.array([statistic(r, s) for r, s in zip(rates(real), rates(sim), strict=True)])
    values = values[np.isfinite(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    smaller = (values[None, :] < values[:, None]).sum(1)
    equal = (values[None, :] == values[:, None]).sum(1)
    return smaller + (equal + 1) / 2
