"""Fused, padding-aware sigmoid attention for JAX."""

from sigjax.attention import sigmoid_attention as sigmoid_attention
from sigjax.attention_slot import attention_fn as attention_fn
from sigjax.buckets import LengthBuckets as LengthBuckets
from sigjax.modules import SigmoidAttention as SigmoidAttention
