"""A single-cell foundation model over sigjax.SigmoidAttention."""
