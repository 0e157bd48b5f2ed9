"""How much GPU memory loading takes while it quantizes."""

from __future__ import annotations

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
    del model
    hf_fastpath.register()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=FastpathConfig(progress=False), device_map="cuda", dtype=torch.bfloat16
    )
    final = torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before
    assert isinstance(loaded.get_submodule("model.layers.0.mlp.up_proj"), hf_fastpath.modules.W4A16Linear)
    assert final < 0.35 * source
    # The search over scales holds a weight in float32 three times: itself, what is tried, and its error.
    largest = 4 * 1024 * 4096
    assert peak - final < 4 * largest
    assert 4 * largest < 0.3 * source  # else the whole model would fit into that bound
