"""A training run: configuration to data, network, steps, checkpoints and the run folder."""
