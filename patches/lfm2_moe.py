"""LFM2 with mixtures of experts: the first layers' feed-forwards are dense, the others have a sigmoid router."""

from transformers import Lfm2MoeForCausalLM
from transformers.models.lfm2_moe.modeling_lfm2_moe import (
    Lfm2MoeAttention,
    Lfm2MoeDecoderLayer,
    Lfm2MoeExperts,
    Lfm2MoeMLP,
    Lfm2MoeRMSNorm,
    Lfm2MoeShortConv,
    Lfm2MoeSparseMoeBlock,
    Lfm2MoeTopKRouter,
)

from hf_fastpath.modules import Experts16, MoERouter, ShortConv
from hf_fastpath.patches.heads import EMBEDDING, HEAD, LAST_NORM
from hf_fastpath.patches.lfm2 import ATTENTION_AND_CONVOLUTION, FEED_FORWARD
from hf_fastpath.patches.lfm2_layers import FusedLfm2Layer, Lfm2Kinds
from hf_fastpath.patches.recipe import Recipe
from hf_fastpath.patches.rotary import ROTARY


class FastLfm2MoeShortConv(ShortConv, Lfm2MoeShortConv):
    """What an ``Lfm2MoeShortConv`` becomes."""


class FusedLfm2MoeDecoderLayer(FusedLfm2Layer, Lfm2MoeDecoderLayer):
    """What an ``Lfm2MoeDecoderLayer`` becomes."""

    lfm2_kinds = Lfm2Kinds(
        Lfm2MoeAttention,
        (Lfm2MoeShortConv, FastLfm2MoeShortConv),
        Lfm2MoeMLP,
        Lfm2MoeRMSNorm,
        Lfm2MoeSparseMoeBlock,
    )


class FastLfm2MoeTopKRouter(MoERouter, Lfm2MoeTopKRouter):
    """What an ``Lfm2MoeTopKRouter`` becomes beside layers in full precision: the bits stay stock's."""


class QuantizedLfm2MoeTopKRouter(FastLfm2MoeTopKRouter):
    """What it becomes beside packed layers."""

    on_kernel = True


class FastLfm2MoeExperts(Experts16, Lfm2MoeExperts):
    """What ``Lfm2MoeExperts`` in 16 bits become where the rest of the model runs on kernels."""


RECIPE = Recipe(
    family="lfm2_moe",
    model_classes=(Lfm2MoeForCausalLM,),
    linears=(*ATTENTION_AND_CONVOLUTION, *FEED_FORWARD),
    experts={"feed_forward.experts": Lfm2MoeExperts},
    modules={
        Lfm2MoeShortConv: FastLfm2MoeShortConv,
        Lfm2MoeTopKRouter: FastLfm2MoeTopKRouter,
        Lfm2MoeDecoderLayer: FusedLfm2MoeDecoderLayer,
    },
    quantized_modules={Lfm2MoeTopKRouter: QuantizedLfm2MoeTopKRouter, Lfm2MoeExperts: FastLfm2MoeExperts},
    single_modules={
        "model.embed_tokens": EMBEDDING,
        "model.pos_emb": ROTARY,
        "model.embedding_norm": LAST_NORM,
        "lm_head": HEAD,
    },
    capturable=True,
)
