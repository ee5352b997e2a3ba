"""Training: configuration, encoders, schedules, optimizers, the engine and what watches it."""
