"""The learning: the step, the optimizer, the loop."""
