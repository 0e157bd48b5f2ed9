"""Modules that replace a model's own."""

from hf_fastpath.modules.w4a16_linear import W4A16Linear

__all__ = ["W4A16Linear"]
