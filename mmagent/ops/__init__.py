"""Operations with one signature, an eager reference and fast paths per device, equal by test."""

from mmagent.ops.attention import varlen_attention, varlen_attention_reference
from mmagent.ops.cross_entropy import TokenLoss, linear_cross_entropy, selected_logprobs
from mmagent.ops.grouped import grouped_linear, grouped_linear_reference
from mmagent.ops.norm import rms_norm
from mmagent.ops.shift import shift

__all__ = [
    "TokenLoss",
    "grouped_linear",
    "grouped_linear_reference",
    "linear_cross_entropy",
    "rms_norm",
    "selected_logprobs",
    "shift",
    "varlen_attention",
    "varlen_attention_reference",
]
