"""Frozen evaluation beside a run: what its encoder is worth while it trains."""
