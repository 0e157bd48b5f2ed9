"""What an evaluation's report says in words: how to read its numbers, and what they come from."""

from __future__ import annotations

from typing import Any

from hf_fastpath.eval.task_data import WIKITEXT2

Row = dict[str, Any]
CHANCE_SE = 2.0  # standard errors within which an accuracy is that of guessing


def reading(report: Row) -> list[str]:
    """What the numbers mean, and what they do not say."""
    settings, rows = report["settings"], report["configurations"]
    stock = rows[0]
    named = {name: found for name, found in stock["benchmarks"].items() if "accuracy" in found}
    lines = []
    if WIKITEXT2 in stock:
        text = stock[WIKITEXT2]
        lines.append(
            f"Perplexity: {text['predictions']:,} tokens in disjoint windows of {settings['window']:,} (the stride), a "
            "token's context being its window; ± is the standard error of the change, windows paired. Stock's is "
            f"{text['word_perplexity']:.3f} a word, {text['bits_per_byte']:.4f} bits a byte."
        )
        if settings["compared"]:
            lines.append(
                "KL (nats a token) and top-1 (the same likeliest token) are against stock's predictions in the first "
                f"{min(settings['compared'], settings['windows'])} windows."
            )
    if named:
        tests = len(named) * (len(rows) - 1)
        lines.append(
            "Accuracy: questions are paired with stock's. p is McNemar's exact test: how likely so uneven a split of "
            "lost and won answers is by chance. The interval is a paired bootstrap's. Of "
            f"{tests} comparisons, {tests * 0.05:.0f} or so have p < 0.05 with no difference behind them."
        )
        lines.append(
            "KL and log-likelihoods (mean absolute change of a choice's, nats) see every question, where accuracy sees "
            "only answers that change sides."
        )
    for name, found in named.items():
        error = found["accuracy_se"] or 0.0
        if abs(found["accuracy"] - found["chance"]) <= CHANCE_SE * error:
            lines.append(
                f"{name}: stock's {found['accuracy']:.1%} ± {error:.1%} is what guessing gives "
                f"({found['chance']:.1%}), so a change of it says little about this model; rest on KL, other answers, "
                "and perplexity."
            )
    if named:
        lengths = ", ".join(f"{name} {found['tokens']:.0f}" for name, found in named.items())
        lines.append(
            f"Mean tokens of a question with one answer: {lengths}. The int4 and fp8 caches keep up to 64 latest "
            "tokens in full precision (int4 also the first 4), and h2o evicts nothing up to its budget: questions not "
            "much longer hardly show what these cost."
        )
    if settings["modes"]:
        lines.append(
            "Questions were read as in decoding, through each configuration's own KV cache, "
            f"{settings['kv_chunk']} tokens at a time."
            if settings["kv_chunk"]
            else "Questions were read in one forward pass each, in which a quantized KV cache is not read."
        )
    if settings["limit"]:
        lines.append(f"The first {settings['limit']:,} questions of each benchmark; a group's tasks share them evenly.")
    return lines


def machine(settings: Row) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in settings["versions"].items())
    data = settings["data"]
    files = data if isinstance(data, str) else f"{len(data)} local files (their hashes are in the JSON)"
    return [
        f"{settings['device']}; {versions}; commit {settings['commit']}; weights {settings['dtype']}, arithmetic "
        f"{settings['arithmetic']}; seed {settings['seed']}; data: {files}; batches of {settings['batch_size']}, "
        f"{settings['kv_chunk']} tokens at a time; processes: {settings['processes']}."
    ]
