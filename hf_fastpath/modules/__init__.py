"""Modules that replace a model's own."""

from hf_fastpath.modules.decode_embedding import DecodeEmbedding
from hf_fastpath.modules.decode_head import DecodeHead, DecodeNorm
from hf_fastpath.modules.experts16 import Experts16
from hf_fastpath.modules.moe_router import MoERouter
from hf_fastpath.modules.packed_experts import PackedExperts
from hf_fastpath.modules.packed_linear import PackedLinear
from hf_fastpath.modules.rotary import RotaryAngles
from hf_fastpath.modules.short_conv import ShortConv
from hf_fastpath.modules.w4a16_linear import W4A16Linear
from hf_fastpath.modules.w8a16_linear import W8A16Linear

__all__ = [
    "DecodeEmbedding",
    "DecodeHead",
    "DecodeNorm",
    "Experts16",
    "MoERouter",
    "PackedExperts",
    "PackedLinear",
    "RotaryAngles",
    "ShortConv",
    "W4A16Linear",
    "W8A16Linear",
]
