"""State, step, schedule, device mapping, checkpoints and the loop."""
