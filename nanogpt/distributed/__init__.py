"""Data-parallel training in several processes, launched by torchrun."""
