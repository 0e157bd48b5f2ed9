"""What a model's embedding, last norm and head become beside packed layers: the ends of a decode step."""

from __future__ import annotations

from torch import nn
from transformers.models.lfm2.modeling_lfm2 import Lfm2RMSNorm
from transformers.models.lfm2_moe.modeling_lfm2_moe import Lfm2MoeRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from hf_fastpath.modules import DecodeEmbedding, DecodeHead, DecodeNorm


class FastLlamaRMSNorm(DecodeNorm, LlamaRMSNorm):
    """What a model's last ``LlamaRMSNorm`` becomes."""


class FastMistralRMSNorm(DecodeNorm, MistralRMSNorm):
    """What a model's last ``MistralRMSNorm`` becomes."""


class FastQwen2RMSNorm(DecodeNorm, Qwen2RMSNorm):
    """What a model's last ``Qwen2RMSNorm`` becomes."""


class FastQwen3RMSNorm(DecodeNorm, Qwen3RMSNorm):
    """What a model's last ``Qwen3RMSNorm`` becomes."""


class FastLfm2RMSNorm(DecodeNorm, Lfm2RMSNorm):
    """What a model's last ``Lfm2RMSNorm`` becomes."""


class FastLfm2MoeRMSNorm(DecodeNorm, Lfm2MoeRMSNorm):
    """What a model's last ``Lfm2MoeRMSNorm`` becomes."""


EMBEDDING: dict[type[nn.Module], type[nn.Module]] = {nn.Embedding: DecodeEmbedding}
HEAD: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: DecodeHead}
LAST_NORM: dict[type[nn.Module], type[nn.Module]] = {
    LlamaRMSNorm: FastLlamaRMSNorm,
    MistralRMSNorm: FastMistralRMSNorm,
    Qwen2RMSNorm: FastQwen2RMSNorm,
    Qwen3RMSNorm: FastQwen3RMSNorm,
    Lfm2RMSNorm: FastLfm2RMSNorm,
    Lfm2MoeRMSNorm: FastLfm2MoeRMSNorm,
}
