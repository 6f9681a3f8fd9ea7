"""Flax NNX modules: backbones, feature pyramid and heads, with the attribute names of the reference."""
