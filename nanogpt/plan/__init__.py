"""Estimate the parameters, memory, FLOPs, communication, time and cost of a run."""
