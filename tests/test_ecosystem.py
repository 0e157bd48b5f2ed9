"""What people do with a model beside generate(): torch.compile, inference mode, pipelines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import FAMILIES
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from hf_fastpath import patch_model
from hf_fastpath.eval.story_models import folder


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("use_cache", [False, True], ids=["no cache", "cache"])
@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {}), ("llama", {"weights": "w16a16", "kv_cache": "static"}), ("lfm2", {})],
    ids=["llama", "llama w16a16", "lfm2"],
)
def test_a_patched_model_compiles_in_one_graph(family: str, options: dict[str, Any], use_cache: bool) -> None:
    model = patch_model(FAMILIES[family](torch.bfloat16), scale_search="absmax", progress=False, **options)
    ids = torch.randint(2, 199, (2, 12), generator=torch.Generator().manual_seed(1))
    torch._dynamo.reset()
    with torch.no_grad():
        want = model(ids, use_cache=use_cache).logits
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, use_cache=use_cache).logits
    assert torch.equal(got, want)


def test_inference_mode() -> None:
    model = patch_model(FAMILIES["llama"](torch.bfloat16), scale_search="absmax", progress=False)
    ids = torch.randint(2, 199, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        inside = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), inside)


@pytest.mark.parametrize("family", ["lfm2", "gpt2"])
def test_a_pipeline(family: str) -> None:
    path = folder(family)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = patch_model(AutoModelForCausalLM.from_pretrained(path), scale_search="absmax", progress=False)
    options = {"max_new_tokens": 12, "do_sample": False}
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    want = tokenizer.decode(model.generate(**inputs, **options)[0], skip_special_tokens=True)
    (made,) = pipeline("text-generation", model=model, tokenizer=tokenizer)("Once upon a time", **options)
    assert made["generated_text"] == want
