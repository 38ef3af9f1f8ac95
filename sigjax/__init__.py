"""Fused, padding-aware sigmoid attention for JAX."""

from sigjax.attention import sigmoid_attention as sigmoid_attention
from sigjax.attention_slot import attention_fn as attention_fn
from sigjax.buckets import LengthBuckets as LengthBuckets
from sigjax.context_parallel import context_parallel_attention as context_parallel_attention
from sigjax.explain import explain as explain
from sigjax.modules import SigmoidAttention as SigmoidAttention
from sigjax.weights import attention_weights as attention_weights
