"""Weights that exist already, brought into timm's names and shapes: strictly, or not at all."""
