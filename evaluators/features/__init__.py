"""Frozen features of labelled images: taken once, kept in a bank, and what their labels are."""
