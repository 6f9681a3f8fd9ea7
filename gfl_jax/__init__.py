"""Generalized Focal Loss detectors in JAX."""
