"""What outlives a process: training state that any number of ranks can take up, and encoders that others can load."""

if __name__ != "prelude.checkpoints":  # under a second name every module would exist twice
    raise ImportError("checkpoints is imported as prelude.checkpoints")
