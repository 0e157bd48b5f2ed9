"""GPT-2: LayerNorm, learned positions, GELU, linear layers whose weights are stored transposed (Conv1D)."""

from transformers import GPT2LMHeadModel

from hf_fastpath.patches.heads import EMBEDDING, HEAD
from hf_fastpath.patches.recipe import Recipe

RECIPE = Recipe(
    family="gpt2",
    model_classes=(GPT2LMHeadModel,),
    linears=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    decoder_layers="transformer.h",
    single_modules={"transformer.wte": EMBEDDING, "transformer.wpe": EMBEDDING, "lm_head": HEAD},
    capturable=True,
)
