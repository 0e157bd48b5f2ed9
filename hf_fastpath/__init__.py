"""Fast generation inside transformers: ``patch_model(model)``, then ``model.generate()`` as before."""

from hf_fastpath.caches import Fp8KVCache, H2OKVCache, Int4KIVICache, Int8KVCache, StaticKVCache
from hf_fastpath.config import FastpathConfig
from hf_fastpath.errors import Unsupported
from hf_fastpath.patching import fastpath_report, patch_model, unpatch_model
from hf_fastpath.registration import register

__version__ = "0.1.0"

__all__ = [
    "FastpathConfig",
    "Fp8KVCache",
    "H2OKVCache",
    "Int4KIVICache",
    "Int8KVCache",
    "StaticKVCache",
    "Unsupported",
    "fastpath_report",
    "patch_model",
    "register",
    "unpatch_model",
]
