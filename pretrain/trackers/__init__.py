"""Experiment trackers: a run's curves, pictures and config in Weights & Biases and MLflow."""
