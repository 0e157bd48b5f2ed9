"""LFM2: gated short convolutions and grouped-query attention with normalized queries and keys, SwiGLU."""

from transformers import Lfm2ForCausalLM
from transformers.models.lfm2.modeling_lfm2 import (
    Lfm2Attention,
    Lfm2DecoderLayer,
    Lfm2MLP,
    Lfm2RMSNorm,
    Lfm2ShortConv,
)

from hf_fastpath.modules import ShortConv
from hf_fastpath.patches.heads import EMBEDDING, HEAD, LAST_NORM
from hf_fastpath.patches.lfm2_layers import FusedLfm2Layer, Lfm2Kinds
from hf_fastpath.patches.recipe import Recipe
from hf_fastpath.patches.rotary import ROTARY

ATTENTION_AND_CONVOLUTION = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.out_proj",
    "conv.in_proj",
    "conv.out_proj",
)
FEED_FORWARD = ("feed_forward.w1", "feed_forward.w3", "feed_forward.w2")


class FastLfm2ShortConv(ShortConv, Lfm2ShortConv):
    """What an ``Lfm2ShortConv`` becomes."""


class FusedLfm2DecoderLayer(FusedLfm2Layer, Lfm2DecoderLayer):
    """What an ``Lfm2DecoderLayer`` becomes."""

    lfm2_kinds = Lfm2Kinds(Lfm2Attention, (Lfm2ShortConv, FastLfm2ShortConv), Lfm2MLP, Lfm2RMSNorm)


RECIPE = Recipe(
    family="lfm2",
    model_classes=(Lfm2ForCausalLM,),
    linears=(*ATTENTION_AND_CONVOLUTION, *FEED_FORWARD),
    modules={Lfm2ShortConv: FastLfm2ShortConv, Lfm2DecoderLayer: FusedLfm2DecoderLayer},
    single_modules={
        "model.embed_tokens": EMBEDDING,
        "model.rotary_emb": ROTARY,
        "model.embedding_norm": LAST_NORM,
        "lm_head": HEAD,
    },
    capturable=True,
)
