import math

import pytest

from gsrl_core.rl.statistics import (
    bootstrap_over_trials,
    mean_maximum_rank_violation,
    pearson,
    spearman,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17:857-872, table I, method 3 (score without continuity correction).
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_agrees_with_published_intervals(successes, n, low, high):
    assert wilson_interval(successes, n, 0.95) == pytest.approx((low, high), abs=5e-5)


def test_wilson_is_symmetric_shrinks_and_solves_its_defining_equation():
    low, high = wilson_interval(30, 40, 0.9)
    assert wilson_interval(10, 40, 0.9) == pytest.approx((1 - high, 1 - low))
    assert wilson_interval(0, 5)[0] == 0.0 and wilson_interval(5, 5)[1] == 1.0
    for bound in (low, high):  # |p̂ - p| = z √(p (1-p) / n) at both ends
        assert abs(0.75 - bound) == pytest.approx(1.6448536 * math.sqrt(bound * (1 - bound) / 40), rel=1e-6)
    with pytest.raises(ValueError):
        wilson_interval(3, 2)
    with pytest.raises(ValueError):
        wilson_interval(0, 0)


def test_correlations_by_hand_and_with_ties():
    # x - 2 = -1, 0, 1; y - 3 = -2, -1, 3 (y = 1, 2, 6): (2 + 0 + 3) / √(2 * 14) = 5 / √28
    assert pearson([1, 2, 3], [1, 2, 6]) == pytest.approx(5 / math.sqrt(28))
    assert spearman([1, 2, 3], [1, 2, 60]) == pytest.approx(1)
    from scipy.stats import spearmanr

    x, y = [0.1, 0.4, 0.4, 0.9, 0.2], [0.3, 0.3, 0.5, 0.8, 0.1]
    assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert math.isnan(pearson([1, 1], [0, 1]))


def test_mmrv_by_hand():
    # Simulation swaps the first two: violations |0.2 - 0.5| = 0.3 for both, 0 for the third: (0.3 + 0.3 + 0) / 3
    assert mean_maximum_rank_violation([0.2, 0.5, 0.9], [0.6, 0.4, 0.8]) == pytest.approx(0.2)
    assert mean_maximum_rank_violation([0.1, 0.2, 0.3], [0.5, 0.6, 0.7]) == 0
    # Complete reversal: each is off by its largest distance: (0.7 + 0.4 + 0.7) / 3
    assert mean_maximum_rank_violation([0.2, 0.5, 0.9], [3, 2, 1]) == pytest.approx(0.6)


def test_the_bootstrap_interval_covers_the_estimate_and_narrows_with_trials():
    widths = []
    for trials in (10, 1000):
        successes = [int(trials * rate) for rate in (0.2, 0.5, 0.6, 0.9)]
        low, high = bootstrap_over_trials(
            pearson, (successes, [trials] * 4), (successes, [trials] * 4), confidence=0.95
        )
        assert low < pearson([0.2, 0.5, 0.6, 0.9], [0.2, 0.5, 0.6, 0.9]) + 1e-9 and low <= high <= 1 + 1e-12
        widths.append(high - low)
    assert widths[1] < widths[0] / 3
