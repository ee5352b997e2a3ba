"""A training state between an engine and a checkpoint: parameters by name, whatever ranks and ZeRO stage hold them."""
