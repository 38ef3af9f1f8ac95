"""Fused, padding-aware sigmoid attention for JAX."""
