"""Inspection of a trained model: surprisal, attention, neurons, embedding and memorization."""
