"""How much GPU memory loading takes while it quantizes."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from tiny_models import make_llama
from transformers import AutoModelForCausalLM

import hf_fastpath
from hf_fastpath import FastpathConfig

pytestmark = pytest.mark.gpu


def test_one_weight_at_a_time_is_unpacked(tmp_path: Path) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 16}
    model = make_llama(torch.bfloat16, num_key_value_heads=4, head_dim=64, vocab_size=512, **sizes)
    model.save_pretrained(tmp_path, max_shard_size="50MB")
    source = sum(parameter.nbytes for parameter in model.parameters())
    sizes_of = {name: parameter.to("meta") for name, parameter in model.named_parameters()}
    del model
    hf_fastpath.register()
    torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")  # cuBLAS takes memory of its own at its first use
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=FastpathConfig(progress=False), device_map="cuda", dtype=torch.bfloat16
    )
    gc.collect()
    final = torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before
    assert isinstance(loaded.get_submodule("model.layers.0.mlp.up_proj"), hf_fastpath.modules.W4A16Linear)
    assert final < 0.35 * source
    # A decoder layer in the model's dtype, and of one weight what the search over scales holds in float32: itself, what
    # is tried, its error, and the best so far.
    layer = 2 * sum(weight.numel() for name, weight in sizes_of.items() if name.startswith("model.layers.0."))
    bound = layer + 6 * 4 * 1024 * 4096
    assert peak - final < bound
    assert bound < 0.4 * source  # else the whole model would fit into that bound
