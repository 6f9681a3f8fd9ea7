"""Flax NNX modules: backbones, feature pyramid and heads, with the reference's attribute names."""
