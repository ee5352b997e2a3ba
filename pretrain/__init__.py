"""Training: configuration, encoders, schedules, optimizers, the engine and what watches it."""

if __name__ != "prelude.pretrain":  # under a second name every module would exist twice
    raise ImportError("pretrain is imported as prelude.pretrain")
