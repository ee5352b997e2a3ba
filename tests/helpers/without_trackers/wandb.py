"""Stands before Weights & Biases on the path of what tests launch: timm imports it, and does nothing with it."""

raise ImportError("left out to save time")
