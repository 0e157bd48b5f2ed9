"""KV caches, one file a format. Each is a transformers Cache, usable with any full-attention decoder model."""

from hf_fastpath.caches.base import FastCache
from hf_fastpath.caches.compressed import CompressedCache, CompressedLayer
from hf_fastpath.caches.fp8 import Fp8KVCache
from hf_fastpath.caches.h2o import H2OKVCache
from hf_fastpath.caches.int4 import Int4KIVICache
from hf_fastpath.caches.int8 import Int8KVCache
from hf_fastpath.caches.layer import FastLayer
from hf_fastpath.caches.static import StaticKVCache

__all__ = [
    "CompressedCache",
    "CompressedLayer",
    "FastCache",
    "FastLayer",
    "Fp8KVCache",
    "H2OKVCache",
    "Int4KIVICache",
    "Int8KVCache",
    "StaticKVCache",
]
