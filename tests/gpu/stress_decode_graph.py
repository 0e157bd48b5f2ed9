"""Looks for tokens that differ from run to run, while other processes keep the GPU busy and its memory short.

    PYTHONPATH=build/package:tests:tests/gpu python3 -P tests/gpu/stress_decode_graph.py --minutes 3 --copies 20

Each round is a model, a cache, a padding and a way to choose tokens. Its tokens, logits and random numbers are computed
several times without a graph and by graphs. What differs, and any exception, goes to the file in full: whether runs
without a graph differ as well, from which token on, by how much, and how much memory there was.
"""

from __future__ import annotations

import argparse
import itertools
import random
import subprocess
import sys
import time
import traceback
import warnings
from typing import Any

import torch
from test_gpu_decode_graph import GREEDY, SAMPLE, new_patched, on_gpu
from tiny_models import long_batch

MODELS = [("int8", "qwen2"), ("int8", "qwen3"), ("int4", ""), ("int8", "mistral"), ("fp8", ""), ("int8", "lfm2_moe")]
PADDINGS = [(0,), (0, 7, 30), (0, 0, 0)]
WAYS = {
    "plain sampling": {"do_sample": True, "top_k": 0, "max_new_tokens": 90},
    "sampling": SAMPLE,
    "sampling with an end": {**SAMPLE, "eos_token_id": 5},
    "greedy": GREEDY,
}


def run(model: Any, inputs: dict[str, Any], way: dict[str, Any], **options: Any) -> Any:
    torch.manual_seed(1)
    out = model.generate(**inputs, **way, return_dict_in_generate=True, **options)
    return out.sequences, out.logits, torch.cuda.get_rng_state()


def difference(a: Any, b: Any) -> str:
    """What differs between two runs; "" when nothing does."""
    found = []
    if not torch.equal(a[2], b[2]):
        found.append("the random numbers' state afterwards")
    if a[0].shape != b[0].shape:
        found.append(f"lengths {tuple(a[0].shape)} and {tuple(b[0].shape)}")
    elif not torch.equal(a[0], b[0]):
        rows, columns = (a[0] != b[0]).nonzero().unbind(1)
        found.append(f"tokens from column {int(columns.min())} on, rows {sorted(set(rows.tolist()))}")
    for step, (x, y) in enumerate(zip(a[1] or (), b[1] or (), strict=False)):
        if not torch.equal(x, y):
            apart = (x - y).abs()
            rows = (apart > 0).any(1).nonzero().flatten().tolist()
            found.append(
                f"logits of step {step}, rows {rows}, {int((apart > 0).sum())} of them, by {float(apart.max())}"
            )
            break
    return "; ".join(found)


def check(model: Any, inputs: dict[str, Any], way: dict[str, Any]) -> list[str]:
    """The differences of a round. With logits tokens are chosen call by call, without them in a graph."""
    want = run(model, inputs, way, output_logits=True, disable_compile=True)
    runs = {
        "again without a graph": run(model, inputs, way, output_logits=True, disable_compile=True),
        "steps by a graph": run(model, inputs, way, output_logits=True),
        "all by graphs": run(model, inputs, way),
        "all by graphs, again": run(model, inputs, way),
        "at last without a graph": run(model, inputs, way, output_logits=True, disable_compile=True),
    }
    found = {name: difference(want, got) for name, got in runs.items()}
    return [f"{name}: {text}" for name, text in found.items() if text]


def one_process(minutes: float, seed: int, file: str) -> int:
    warnings.simplefilter("always")
    models: dict[tuple[str, str], Any] = {}
    deadline, failures, rounds = time.monotonic() + 60 * minutes, 0, 0
    order = random.Random(seed)
    while time.monotonic() < deadline:
        cases = list(itertools.product(MODELS, PADDINGS, WAYS))
        order.shuffle(cases)
        for kind, padding, way in cases:
            if time.monotonic() >= deadline:
                break
            rounds += 1
            try:
                with warnings.catch_warnings(record=True) as caught:
                    if kind not in models or order.random() < 0.2:  # new models, slots, graphs
                        models[kind] = new_patched(*kind)
                    found = check(models[kind], on_gpu(long_batch(padding)), WAYS[way])
                found += [f"warned: {warning.message}" for warning in caught if "graph" in str(warning.message)]
            except Exception:
                found = [traceback.format_exc()]
                models.clear()
            if found:
                failures += 1
                free, total = torch.cuda.mem_get_info()
                memory = f"{free >> 20} of {total >> 20} MiB free, {torch.cuda.memory_reserved() >> 20} reserved"
                with open(file, "a", encoding="utf-8") as out:
                    out.write(
                        f"process {seed}, {kind}, padding {padding}, {way} ({memory}):\n" + "\n".join(found) + "\n"
                    )
    print(f"process {seed}: {rounds} rounds, {failures} with something to tell", flush=True)
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--copies", type=int, default=1, help="processes at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--file", default="stress_failures.txt")
    parser.add_argument("--leave-mib", type=int, default=0, help="occupy GPU memory until so much is free; 0: none")
    args = parser.parse_args()
    if args.copies == 1:
        return min(one_process(args.minutes, args.seed, args.file), 1)
    options = ["--minutes", str(args.minutes), "--file", args.file]
    copies = [
        subprocess.Popen([sys.executable, "-P", __file__, *options, "--seed", str(args.seed + i)])
        for i in range(args.copies)
    ]
    occupied = []
    while args.leave_mib and any(copy.poll() is None for copy in copies):
        time.sleep(1)
        free, _ = torch.cuda.mem_get_info()
        more = (free >> 20) - args.leave_mib
        if more > 64:
            occupied.append(torch.empty(min(more, 1024) << 20, dtype=torch.uint8, device="cuda"))
    return max(copy.wait() for copy in copies)


if __name__ == "__main__":
    sys.exit(main())
