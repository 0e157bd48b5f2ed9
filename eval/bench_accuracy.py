"""What each way of choosing int4 scales costs: ``python -m hf_fastpath.eval.bench_accuracy --out FILE``.

Columns of the CSV, one row a configuration of the demo's model (or ``--model``):

model, scale_search, group_size, zero_points   how its weights were quantized; the KV cache is int8
                     scale_search "hqq": not ours, the weights that the package hqq keeps in 4 bits (peers.py)
calibration          the text given with --calibration, for scale_search="output"; empty: the model wrote its own
bits_per_weight      of the quantized layers, scales and zero points included
patch_s              seconds patch_model took
ppl, ppl_change, ppl_change_se   perplexity, its relative change from stock and that change's standard error
kl                   divergence of its predictions from stock's, nats a token
top1                 share of tokens with stock's most likely next token
tokens, dtype, device, torch, transformers, commit
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from hf_fastpath import FastpathConfig, info, patch_model
from hf_fastpath.config import ScaleSearch
from hf_fastpath.eval import compare, demo
from hf_fastpath.eval.bench_ops import commit_of
from hf_fastpath.eval.loading import Loaded
from hf_fastpath.eval.peers import round_with_hqq
from hf_fastpath.eval.perplexity import Divergence, Perplexity
from hf_fastpath.modules import W4A16Linear
from hf_fastpath.modules.packed_experts import PackedStack

COLUMNS = (
    *("model", "scale_search", "calibration", "group_size", "zero_points", "bits_per_weight", "patch_s"),
    *("ppl", "ppl_change", "ppl_change_se", "kl", "top1"),
    *("tokens", "dtype", "device", "torch", "transformers", "commit"),
)
SEARCHES = ("absmax", "mse", "activation", "output")
HQQ = "hqq"
GROUPS = (128, 64)

Row = dict[str, Any]


def bits_per_weight(model: Any) -> float:
    """Bits stored for each weight of the layers that were quantized, in the documented layout."""
    stored = count = 0
    for layer in model.modules():
        if isinstance(layer, W4A16Linear):
            count += layer.in_features * layer.out_features
        elif isinstance(layer, PackedStack):
            count += layer.count * layer.shape[0] * layer.shape[1]
        else:
            continue
        stored += sum(8 * tensor.nbytes for name, tensor in layer.state_dict().items() if name != "bias")
    return stored / count


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to quantize, and the text it is calibrated on, if any; or HQQ's."""

    config: FastpathConfig
    calibration: Path | None = None
    hqq: bool = False


def variants(base: FastpathConfig, calibration: Path | None, only: str | None = None) -> Iterator[Variant | None]:
    """None for the stock model, then every search at every size, and ``base`` on the calibration text; or only one
    search, or ``"hqq"``, which nothing else brings."""
    yield None
    if only == HQQ:
        yield from (Variant(dataclasses.replace(base, group_size=group), hqq=True) for group in GROUPS)
        return
    for search, group, zeros in itertools.product([only] if only else SEARCHES, GROUPS, (False, True)):
        yield Variant(dataclasses.replace(base, scale_search=search, group_size=group, zero_points=zeros))  # type: ignore[arg-type]
    if calibration:
        yield Variant(base.with_search(ScaleSearch.OUTPUT), calibration)


def quantize(loaded: Loaded, variant: Variant) -> Row:
    """Patches the model; the columns that say how."""
    config = variant.config
    tokens = demo.read_calibration(loaded, config, variant.calibration)
    start = time.perf_counter()
    if variant.hqq:
        bits = round_with_hqq(loaded.model, config.group_size)
        patch_model(loaded.model, dataclasses.replace(config, weights=None))
    else:
        patch_model(loaded.model, config, calibration=tokens)
        bits = bits_per_weight(loaded.model)
    return {
        "scale_search": HQQ if variant.hqq else config.scale_search.value,
        "calibration": variant.calibration.name if variant.calibration else None,
        "group_size": config.group_size,
        "zero_points": config.zero_points,
        "patch_s": round(time.perf_counter() - start, 1),
        "bits_per_weight": round(bits, 3),
    }


def rows(request: demo.Request, console: Console, only: str | None = None) -> Iterator[Row]:
    """One row a configuration, without the machine's columns."""
    stock: Perplexity | None = None
    divergence = Divergence()
    for variant in variants(request.config, request.calibration, only):
        loaded = demo.load_with_status(request.model, request.device, request.dtype, console)
        settings = demo.perplexity_settings(loaded, request)
        row = {"model": loaded.name} | (quantize(loaded, variant) if variant else {})
        config, see = (variant.config, divergence.compare) if variant else (None, divergence.remember)
        result = compare.measure(loaded.model, config, settings, console, on_logits=see).perplexity
        stock = stock or result
        change, error = result.change_from(stock)
        yield row | {
            "ppl": round(result.ppl, 4),
            "ppl_change": round(change, 5),
            "ppl_change_se": round(error, 5),
            "kl": round(divergence.take(), 4),
            "top1": round(result.top1_agreement(stock), 4),
            "tokens": result.tokens,
            "dtype": "float32" if settings.float32_perplexity else request.dtype,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy of int4 scale searches; see the top of the file.")
    parser.add_argument("--out", type=Path, required=True, help="the CSV file to write")
    parser.add_argument("--model", help="a local folder or a hub id (default: the demo's model)")
    parser.add_argument("--calibration", type=Path, help="a UTF-8 text; adds a row calibrated on it")
    parser.add_argument(
        "--only", choices=(*SEARCHES, HQQ), help='one search (default: all of ours); "hqq" needs that package'
    )
    parser.add_argument("--commit", help="the commit to name in every row (default: asked of git)")
    arguments = parser.parse_args()
    console = Console()
    config = FastpathConfig(progress=False)
    request = demo.Request(config, model=arguments.model, device="cpu", new_tokens=0, calibration=arguments.calibration)
    versions = info.versions()
    machine = {
        "device": info.cpu_name(),
        "torch": versions["torch"],
        "transformers": versions["transformers"],
        "commit": arguments.commit or commit_of(Path(__file__).parent),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in rows(request, console, arguments.only):
            writer.writerow(row | machine)
            file.flush()
            console.print({name: row.get(name) for name in COLUMNS[1:12]})


if __name__ == "__main__":
    main()
