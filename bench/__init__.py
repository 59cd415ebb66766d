"""Benchmarks: each module measures one thing and says beside what. ``python -m bench [--only NAME]``."""
