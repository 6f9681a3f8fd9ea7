"""Scores as a pair of logarithms against float64, and the losses that take them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gfl_jax import losses
from gfl_jax.scores import Scores, as_logits, as_scores, probability

LOSSES = {
    "cross entropy": losses.binary_cross_entropy,
    "qfl": losses.quality_focal_loss,
    "focal": losses.sigmoid_focal_loss,
    "varifocal": losses.varifocal_loss,
}
X = np.linspace(-12, 12, 97, dtype=np.float32)
TARGETS = np.resize(np.float32([0, 1, 0.3, 0, 0.8]), X.shape)


def product(x, q):
    """sigmoid(x) sigmoid(q) as a pair: 1 - s = (e^-x + e^-q + e^(-x-q)) s."""
    log_score = jax.nn.log_sigmoid(x) + jax.nn.log_sigmoid(q)
    rest = jnp.logaddexp(jnp.logaddexp(-x, -q), -x - q)
    return Scores(log_score, rest + log_score)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_the_pair_is_that_of_the_logits(name):
    loss, y = LOSSES[name], (TARGETS > 0.5 if name == "focal" else TARGETS)

    @jax.jit
    def run(x):
        (by_logits, pull), (by_pair, pull_pair) = (
            jax.vjp(lambda x, form=form: loss(form(x), y), x) for form in (jnp.asarray, as_scores)
        )
        return by_logits, by_pair, *pull(jnp.ones_like(x)), *pull_pair(jnp.ones_like(x))

    value, of_pair, slope, slope_of_pair = run(X)
    np.testing.assert_allclose(of_pair, value, rtol=3e-6, atol=3e-7)
    np.testing.assert_allclose(slope_of_pair, slope, rtol=3e-6, atol=3e-7)


def test_the_forms_of_a_score_are_one():
    scores = as_scores(X)
    assert as_scores(scores) == scores
    np.testing.assert_array_equal(probability(X), jax.nn.sigmoid(X))
    np.testing.assert_allclose(probability(scores), 1 / (1 + np.exp(-np.float64(X))), rtol=3e-6)
    np.testing.assert_array_equal(as_logits(X), X)
    np.testing.assert_allclose(as_logits(scores), X, rtol=1e-6, atol=1e-6)
    half = Scores(*(x.astype(jnp.bfloat16) for x in scores))
    assert {x.dtype for x in (*as_scores(half), probability(half), as_logits(half))} == {
        jnp.dtype("float32")
    }


def test_qfl_of_a_product_is_its_definition_in_float64():
    rng = np.random.default_rng(0)
    x, q, y = rng.uniform((-30, -30, 0), (30, 30, 1), (500, 3)).astype(np.float32).T
    odds = np.exp(-np.float64(x)) + np.exp(-np.float64(q)) + np.exp(-np.float64(x) - q)
    s, rest = 1 / (1 + odds), odds / (1 + odds)
    expected = np.abs(y - s) ** 2 * -((1 - y) * np.log(rest) + y * np.log(s))
    loss = jax.jit(lambda x, q, y: losses.quality_focal_loss(product(x, q), y))
    np.testing.assert_allclose(loss(x, q, y), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_extreme_products_are_finite_and_so_are_their_gradients(name):
    ends = np.float32([-100, -50, 0, 50, 100])
    x, q, y = (a.ravel() for a in np.meshgrid(ends, ends, np.float32([0, 1])))
    run = jax.jit(jax.value_and_grad(lambda x, q: LOSSES[name](product(x, q), y).sum(), (0, 1)))
    assert all(np.isfinite(array).all() for array in jax.tree.leaves(run(x, q)))
