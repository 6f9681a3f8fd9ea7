"""Compiles the real step for TPUs without one, and reports memory, time and traffic."""
