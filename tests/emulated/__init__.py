"""The ops of :mod:`hf_fastpath.ops`, computed on CPU tensors by the CUDA kernels in the emulator: a file a family."""

from __future__ import annotations

from emulated.attention import EmulatedAttention
from emulated.choice import EmulatedChoice
from emulated.kv import EmulatedKV
from emulated.layer import EmulatedLayer
from emulated.linear16 import EmulatedLinear16
from emulated.moe import EmulatedMoE
from emulated.short_conv import EmulatedShortConv
from emulated.w4a16 import EmulatedW4A16
from emulated.w8a16 import EmulatedW8A16


class EmulatedOps(
    EmulatedW4A16,
    EmulatedW8A16,
    EmulatedLinear16,
    EmulatedLayer,
    EmulatedKV,
    EmulatedAttention,
    EmulatedShortConv,
    EmulatedMoE,
    EmulatedChoice,
):
    """Each op under its name, with its arguments; see :class:`emulator.KernelFault` for what they raise."""
