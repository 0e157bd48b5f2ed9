"""Llama: RMSNorm, rotary grouped-query attention, SwiGLU."""

from transformers import LlamaForCausalLM

from hf_fastpath.patches.recipe import Recipe

RECIPE = Recipe(
    family="llama",
    model_class=LlamaForCausalLM,
    linears=(
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ),
)
