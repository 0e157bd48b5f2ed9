"""What the rotary embeddings of a model become beside packed layers: one kernel of a decode step instead of nine."""

from __future__ import annotations

from torch import nn
from transformers.models.lfm2.modeling_lfm2 import Lfm2RotaryEmbedding
from transformers.models.lfm2_moe.modeling_lfm2_moe import Lfm2MoeRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from hf_fastpath.modules import RotaryAngles


class FastLlamaRotaryEmbedding(RotaryAngles, LlamaRotaryEmbedding):
    """What a ``LlamaRotaryEmbedding`` becomes."""


class FastMistralRotaryEmbedding(RotaryAngles, MistralRotaryEmbedding):
    """What a ``MistralRotaryEmbedding`` becomes."""


class FastQwen2RotaryEmbedding(RotaryAngles, Qwen2RotaryEmbedding):
    """What a ``Qwen2RotaryEmbedding`` becomes."""


class FastQwen3RotaryEmbedding(RotaryAngles, Qwen3RotaryEmbedding):
    """What a ``Qwen3RotaryEmbedding`` becomes."""


class FastLfm2RotaryEmbedding(RotaryAngles, Lfm2RotaryEmbedding):
    """What an ``Lfm2RotaryEmbedding`` becomes."""


class FastLfm2MoeRotaryEmbedding(RotaryAngles, Lfm2MoeRotaryEmbedding):
    """What an ``Lfm2MoeRotaryEmbedding`` becomes."""


ROTARY: dict[type[nn.Module], type[nn.Module]] = {
    LlamaRotaryEmbedding: FastLlamaRotaryEmbedding,
    MistralRotaryEmbedding: FastMistralRotaryEmbedding,
    Qwen2RotaryEmbedding: FastQwen2RotaryEmbedding,
    Qwen3RotaryEmbedding: FastQwen3RotaryEmbedding,
    Lfm2RotaryEmbedding: FastLfm2RotaryEmbedding,
    Lfm2MoeRotaryEmbedding: FastLfm2MoeRotaryEmbedding,
}
