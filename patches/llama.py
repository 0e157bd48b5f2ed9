"""Llama and every family with the same block: RMSNorm, rotary grouped-query attention (optionally with normalized
queries and keys), SwiGLU. Their forward passes stay transformers' own, so what a family does between the layers (its
activation, scaled residuals, biases) need not be Llama's; only the tested classes' layers are run by ours."""

from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

from hf_fastpath.patches.decoder_layers import FUSED_LAYERS
from hf_fastpath.patches.heads import EMBEDDING, HEAD, LAST_NORM
from hf_fastpath.patches.recipe import Block, Recipe
from hf_fastpath.patches.rotary import ROTARY

RECIPE = Recipe(
    family="llama",
    model_classes=(LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM),
    linears=(
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ),
    modules=FUSED_LAYERS,
    single_modules={
        "model.embed_tokens": EMBEDDING,
        "model.rotary_emb": ROTARY,
        "model.norm": LAST_NORM,
        "lm_head": HEAD,
    },
    capturable=True,
    block=Block(
        norms=("input_layernorm", "post_attention_layernorm"), head_norms=("self_attn.q_norm", "self_attn.k_norm")
    ),
)
