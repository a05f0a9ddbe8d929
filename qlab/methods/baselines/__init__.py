"""Baselines without quantization."""
