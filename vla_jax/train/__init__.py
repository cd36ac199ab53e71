"""Training: state, step, optimiser, loop, metrics."""
