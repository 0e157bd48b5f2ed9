"""Times generate() on real shapes with random weights: ``python -m hf_fastpath.eval.bench_generate --out FILE``.

Columns of the CSV, one row a variant and batch size:

model, variant      a shape of SHAPES; stock, or the patch of VARIANTS
batch, prompt, new  rows, prompt tokens, new tokens a row
tok_s               greedy decode tokens a second of the whole batch, the prompt's own pass left out (median of runs)
first_token_ms      one new token after the prompt (median)
patch_s             seconds patch_model took
weight_gb, peak_gb  bytes of all parameters and buffers; the most memory allocated while generating
gpu, torch, transformers, commit
"""

from __future__ import annotations

import argparse
import csv
import gc
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from hf_fastpath import patch_model
from hf_fastpath.eval.bench_ops import commit_of
from hf_fastpath.eval.measure import decode_rate, weight_bytes

COLUMNS = (
    *("model", "variant", "batch", "prompt", "new", "tok_s", "first_token_ms", "patch_s", "weight_gb", "peak_gb"),
    *("gpu", "torch", "transformers", "commit"),
)
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
    "lfm2.5-8b-a1b": {
        "model_type": "lfm2_moe",
        "vocab_size": 128000,
        "num_hidden_layers": 24,
        "layer_types": ["full_attention" if i in (2, 6, 10, 14, 18, 21) else "conv" for i in range(24)],
    },
}
VARIANTS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "lossless": {"weights": None, "kv_cache": "static"},
    "int8 kv": {"weights": None, "kv_cache": "int8"},
    "w4a16 + int8 kv": {},
    "w4a16 + int8 kv, int8 head": {"lm_head": "int8"},
    "w4a16 + int4 kv": {"kv_cache": "int4"},
}


def random_model(shape: str, device: str) -> Any:
    """A bf16 model of a real shape; its weights are as the config initializes them."""
    torch.manual_seed(0)
    settings = dict(SHAPES[shape], bos_token_id=None, eos_token_id=None, pad_token_id=None)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


@torch.inference_mode()
def first_token_seconds(model: Any, inputs: dict[str, torch.Tensor], runs: int) -> float:
    """The median time of generate() with one new token."""
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        model.generate(**inputs, do_sample=False, max_new_tokens=1)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def measure(model: Any, batch: int, prompt: int, new: int, runs: int) -> dict[str, Any]:
    """One row's numbers for the model as it stands."""
    ids = torch.randint(0, model.config.vocab_size, (batch, prompt), device=model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return {
        "batch": batch,
        "prompt": prompt,
        "new": new,
        "first_token_ms": round(1000 * first_token_seconds(model, inputs, runs), 1),
        "tok_s": round(batch * decode_rate(model, inputs, new, runs), 1),
        "weight_gb": round(weight_bytes(model) / 1e9, 3),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Times generate(); see the top of the file for the columns.")
    parser.add_argument("--out", type=Path, required=True, help="the CSV file to write")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--variant", choices=VARIANTS, nargs="+", default=list(VARIANTS))
    parser.add_argument("--scale-search", default="auto", help="of int4 weights; takes time, and changes no speed")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--commit", help="the commit to name in every row (default: asked of git)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_generate: torch sees no CUDA GPU")
    machine = {
        "model": arguments.shape,
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": arguments.commit or commit_of(Path(__file__).parent),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in rows(arguments):
            writer.writerow(machine | row)
            file.flush()
            print(row, flush=True)


def rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The numbers of every variant and batch size, each variant with a model of its own, one in memory at a time."""
    for variant in arguments.variant:
        overrides = VARIANTS[variant]
        model = random_model(arguments.shape, "cuda")
        torch.cuda.synchronize()
        start = time.perf_counter()
        if overrides is not None:
            patch_model(model, scale_search=arguments.scale_search, progress=False, **overrides)
        torch.cuda.synchronize()
        patched = {"variant": variant, "patch_s": round(time.perf_counter() - start, 1)}
        for batch in arguments.batch:
            yield patched | measure(model, batch, arguments.prompt, arguments.new, arguments.runs)
        del model
        gc.collect()  # modules refer to each other
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
