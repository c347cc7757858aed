"""Training: settings, setup, the training loop, its events and its checkpoints."""
