"""The engine: attention under a pattern."""
