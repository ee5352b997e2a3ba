"""What outlives a process: training state that any number of ranks can take up, and encoders that others can load."""
