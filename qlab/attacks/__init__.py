"""Attacks: honest robustness of quantized nets."""
