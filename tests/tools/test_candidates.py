import numpy as np
import pytest

from gfl_jax.tools.candidates import rank_correlation


def test_rank_correlation_sees_order_alone():
    rng = np.random.default_rng(0)
    x = rng.normal(size=200)
    assert rank_correlation(x, np.exp(x)) == pytest.approx(1)
    assert rank_correlation(x, -(x**3)) == pytest.approx(-1)
    assert abs(rank_correlation(x, rng.normal(size=200))) < 0.2
    assert np.isnan(rank_correlation(x, np.ones(200)))
    assert np.isnan(rank_correlation(x[:1], x[:1]))


def test_equal_values_share_their_rank():
    # By the textbook formula 1 - 6 sum d^2 / (n (n^2 - 1)) without ties, and by hand with one.
    a, b = np.array([3.0, 1.0, 4.0, 2.0, 5.0]), np.array([2.0, 1.0, 5.0, 3.0, 4.0])
    assert rank_correlation(a, b) == pytest.approx(1 - 6 * 4 / (5 * 24))
    tied = np.array([1.0, 2.0, 2.0, 3.0])
    ranks = np.array([1.0, 2.5, 2.5, 4.0])
    expected = np.corrcoef(ranks, [1, 3, 2, 4])[0, 1]
    assert rank_correlation(tied, np.array([0.1, 0.3, 0.2, 0.4])) == pytest.approx(expected)
