"""What each KV cache format costs in perplexity: ``python -m hf_fastpath.eval.bench_kv_accuracy --out FILE``.

Every prediction attends to what the cache holds at that moment of decoding: the text is read through the cache in
chunks that are cut so that this is so for all of their tokens. Weights are float32, so that only the cache differs.

Columns of the CSV, one row a cache:

model, cache, options   the cache's class and what was not left at its default
bytes_of_fp16        what the cache allocates for one sequence of 4,096 tokens of an fp16 model, everything counted,
                     divided by what full precision takes; empty where rounding is only imitated, and for H2O, which
                     takes the same whatever the length
ppl, ppl_change, ppl_change_se   perplexity, its relative change from the full-precision cache, its standard error
rms                  root mean square of the change of a token's log-probability, in nats: half its square is about what
                     the perplexity would rise by in the mean over many texts
kl                   divergence of the predictions from those with the full-precision cache, nats a token
top1                 share of tokens with the same most likely next token
window, tokens, seconds, device, torch, transformers, commit
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hf_fastpath import Fp8KVCache, H2OKVCache, Int4KIVICache, Int8KVCache, StaticKVCache, info, register
from hf_fastpath.caches import CompressedCache
from hf_fastpath.caches.attention import ATTENTION_NAME
from hf_fastpath.caches.static import StaticKVLayer
from hf_fastpath.eval.bench_ops import commit_of
from hf_fastpath.eval.chunks import attention_layer, logits_in_chunks
from hf_fastpath.eval.compare import bar
from hf_fastpath.eval.loading import load
from hf_fastpath.eval.perplexity import SLICE, Divergence, Perplexity, score
from hf_fastpath.ops._rotation import rotate
from hf_fastpath.ops.kv_int4_append import VALUE_CHANNELS, quantize_int4

COLUMNS = (
    *("model", "cache", "options", "bytes_of_fp16", "ppl", "ppl_change", "ppl_change_se", "rms", "kl", "top1"),
    *("window", "tokens", "seconds", "device", "torch", "transformers", "commit"),
)

Row = dict[str, Any]


class NaiveInt4Layer(StaticKVLayer):
    """What int4 keys cost without their treatment: rounded as int4 values are, each token by itself. Values are exact.

    Kept in full precision after rounding: this is for comparison, and saves no memory.
    """

    rotates = False

    def write(self, key: torch.Tensor, value: torch.Tensor) -> None:
        parts = (rotate(key) if self.rotates else key).unflatten(3, (-1, min(VALUE_CHANNELS, key.shape[3])))
        q, scale, low = quantize_int4(parts)
        rounded = (q.float() * scale.float().unsqueeze(-1) + low.float().unsqueeze(-1)).flatten(3).to(key.dtype)
        super().write(rotate(rounded) if self.rotates else rounded, value)

    def read(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.storage[0][:, :, : self.length], self.storage[1][:, :, : self.length]


class RotatedNaiveInt4Layer(NaiveInt4Layer):
    rotates = True


class NaiveInt4Cache(StaticKVCache):
    layer_class = NaiveInt4Layer


class RotatedNaiveInt4Cache(NaiveInt4Cache):
    layer_class = RotatedNaiveInt4Layer


@dataclasses.dataclass(frozen=True)
class Variant:
    """A cache to measure."""

    cache: type[Any]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def make(self, config: Any, tokens: int) -> Any:
        strict = {"fresh_prefill": False} if issubclass(self.cache, CompressedCache) else {}
        return self.cache(config, max_cache_len=tokens, **strict, **self.options)

    def bytes_of_fp16(self, config: Any, tokens: int = 4096) -> float | None:
        if issubclass(self.cache, NaiveInt4Cache | H2OKVCache):  # H2O's is what its budget is, whatever there was
            return None
        sizes = []
        cache: Any
        for cache in (self.make(config, tokens), StaticKVCache(config, max_cache_len=tokens)):
            token = torch.zeros(1, cache.kv_heads, 1, cache.head_dim, dtype=torch.float16)
            index, layer = attention_layer(cache)
            cache.update(token, token, index)
            sizes.append(layer.nbytes)
        return round(sizes[0] / sizes[1], 4)

    def __str__(self) -> str:
        return ", ".join([self.cache.__name__, *(f"{name}={value}" for name, value in self.options.items())])


def variants(window: int) -> list[Variant]:
    """The full-precision cache first: the others are compared with it."""
    quarter = window // 4
    return [
        Variant(StaticKVCache),
        Variant(Int8KVCache),
        Variant(Fp8KVCache),
        Variant(Int4KIVICache),
        Variant(NaiveInt4Cache),
        Variant(RotatedNaiveInt4Cache),
        *(Variant(H2OKVCache, {"kv_budget": budget}) for budget in (window, 2 * quarter, quarter)),
        Variant(H2OKVCache, {"kv_budget": quarter, "kv_window": quarter // 4}),
        Variant(H2OKVCache, {"kv_budget": quarter, "kv_window": quarter - 4}),
        Variant(Int4KIVICache, {"rotate_keys": False}),
        Variant(Int4KIVICache, {"sinks": 0}),
        Variant(Int4KIVICache, {"sinks": 0, "rotate_keys": False}),
        Variant(Int4KIVICache, {"group_tokens": 32}),
    ]


@torch.inference_mode()
def decode_perplexity(
    model: Any,
    windows: torch.Tensor,
    cache: Any,
    on_logits: Callable[[torch.Tensor], None] = lambda logits: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Perplexity:
    """Perplexity of ``windows`` (token ids ``(n, T)``), when each would be decoded token by token through ``cache``.

    Every token of a window but its first is predicted.

    Args:
        cache: an empty one; a compressed one with ``fresh_prefill=False``.
        on_logits: called with the logits of one position ``(n, vocabulary)`` after the other.
    """
    nll, top1, start = [], [], 0
    tokens = windows.shape[1] - 1
    for logits in logits_in_chunks(model, windows[:, :-1], cache):
        size = logits.shape[1]
        part_nll, part_top1 = score(logits.flatten(0, 1), windows[:, start + 1 : start + size + 1].flatten())
        nll.append(part_nll.view(-1, size))
        top1.append(part_top1.view(-1, size))
        for position in logits.unbind(1):
            on_logits(position)
        start += size
        progress(start, tokens)
    return Perplexity.of(torch.cat(nll, 1).flatten(), torch.cat(top1, 1).flatten())


def rows(model: Any, windows: torch.Tensor, todo: list[Variant], console: Console) -> Iterator[Row]:
    """One row a variant, without the columns of the model and the machine."""
    reference: Perplexity | None = None
    divergence = Divergence()
    for variant in todo:
        cache = variant.make(model.config, windows.shape[1])
        see = divergence.compare if reference else divergence.remember
        start = time.perf_counter()
        with bar(console, str(variant)) as step:
            result = decode_perplexity(model, windows, cache, see, step)
        reference = reference or result
        change, error = result.change_from(reference)
        yield {
            "cache": variant.cache.__name__,
            "options": " ".join(f"{name}={value}" for name, value in variant.options.items()),
            "bytes_of_fp16": variant.bytes_of_fp16(model.config),
            "ppl": round(result.ppl, 4),
            "ppl_change": round(change, 6),
            "ppl_change_se": round(error, 6),
            "rms": round(float((result.token_nll - reference.token_nll).double().square().mean().sqrt()), 5),
            "kl": round(divergence.take(), 6),
            "top1": round(result.top1_agreement(reference), 4),
            "window": windows.shape[1],
            "tokens": result.tokens,
            "seconds": round(time.perf_counter() - start),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity by KV cache format; see the top of the file.")
    parser.add_argument("--out", type=Path, required=True, help="the CSV file to write")
    parser.add_argument("--model", help="a local folder or a hub id (default: the demo's model)")
    parser.add_argument("--text", type=Path, default=SLICE, help="a UTF-8 text (default: the shipped one)")
    parser.add_argument("--window", type=int, default=1024, help="tokens that share a cache")
    parser.add_argument("--windows", type=int, default=8, help="so many, from the start of the text")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda; float32 runs on the CPU only")
    parser.add_argument("--commit", help="the commit to name in every row (default: asked of git)")
    arguments = parser.parse_args()
    console = Console()
    register()
    loaded = load(arguments.model, arguments.device, "fp32")
    loaded.model.set_attn_implementation(ATTENTION_NAME)
    ids = torch.tensor(loaded.tokenizer(arguments.text.read_text(encoding="utf-8"), verbose=False).input_ids)
    count = min(arguments.windows, ids.numel() // arguments.window)
    windows = ids[: count * arguments.window].view(count, arguments.window).to(loaded.model.device)
    versions = info.versions()
    machine = {
        "model": loaded.name,
        "device": info.device_name(loaded.model.device),
        "torch": versions["torch"],
        "transformers": versions["transformers"],
        "commit": arguments.commit or commit_of(Path(__file__).parent),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in rows(loaded.model, windows, variants(arguments.window), console):
            writer.writerow(row | machine)
            file.flush()
            console.print({name: row[name] for name in COLUMNS[1:10]})


if __name__ == "__main__":
    main()
