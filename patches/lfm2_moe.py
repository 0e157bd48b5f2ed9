"""LFM2 with mixtures of experts: the first layers' feed-forwards are dense, the others have a sigmoid router."""

from transformers import Lfm2MoeForCausalLM
from transformers.models.lfm2_moe.modeling_lfm2_moe import Lfm2MoeShortConv

from hf_fastpath.modules import ShortConv
from hf_fastpath.patches.lfm2 import ATTENTION_AND_CONVOLUTION, FEED_FORWARD
from hf_fastpath.patches.recipe import Recipe


class FastLfm2MoeShortConv(ShortConv, Lfm2MoeShortConv):
    """What an ``Lfm2MoeShortConv`` becomes."""


RECIPE = Recipe(
    family="lfm2_moe",
    model_classes=(Lfm2MoeForCausalLM,),
    linears=(*ATTENTION_AND_CONVOLUTION, *FEED_FORWARD),
    modules={Lfm2MoeShortConv: FastLfm2MoeShortConv},
)
