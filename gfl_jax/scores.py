"""Scores of classes in the two forms that losses take: logits, or the pair (log s, log(1 - s))."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Scores(NamedTuple):
    """Scores s between 0 and 1 that are not the sigmoid of one logit, by their logarithms.

    Products and geometric means of probabilities are exact in this form, and a probability cannot
    be taken for a logit. For s = sigmoid(x) the pair is (log_sigmoid(x), log_sigmoid(-x)).

    Attributes:
        log_score: log(s).
        log_complement: log(1 - s).
    """

    log_score: Float[Array, "*shape"]
    log_complement: Float[Array, "*shape"]


Logits = Float[Array, "*shape"] | Scores
"""What a score is computed from: a logit x, whose score is sigmoid(x), or `Scores` as such."""


def as_scores(logits: Logits) -> Scores:
    """The pair (log s, log(1 - s)), float32."""
    if isinstance(logits, Scores):
        return Scores(*(jnp.asarray(part, jnp.float32) for part in logits))
    x = jnp.asarray(logits, jnp.float32)
    return Scores(jax.nn.log_sigmoid(x), jax.nn.log_sigmoid(-x))


def as_logits(logits: Logits) -> Float[Array, "*shape"]:
    """The logits x = log s - log(1 - s), float32."""
    if isinstance(logits, Scores):
        log_score, log_complement = as_scores(logits)
        return log_score - log_complement
    return jnp.asarray(logits, jnp.float32)


def probability(logits: Logits) -> Float[Array, "*shape"]:
    """The score s itself, float32."""
    if isinstance(logits, Scores):
        return jnp.exp(as_scores(logits).log_score)
    return jax.nn.sigmoid(jnp.asarray(logits, jnp.float32))
