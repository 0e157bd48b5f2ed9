"""The oracle: a patched model against stock transformers in float32, layer by layer, in its predictions, in generate().

What the dtype alone costs stands beside it: the stock model in the same dtype, against the same float32 model.
"""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from hf_fastpath import FastpathConfig, info, patch_model
from hf_fastpath.eval import compare
from hf_fastpath.eval.loading import Loaded, load


@dataclasses.dataclass(frozen=True)
class Trace:
    """What a model made of a text.

    hidden: what the embeddings and each decoder layer put out (the last one after the final normalization), float32
    ``(T, hidden_size)`` each; logits: float32 ``(T, vocabulary)``; greedy: the token ids that it goes on with.
    """

    hidden: list[torch.Tensor]
    logits: torch.Tensor
    greedy: list[int]


@dataclasses.dataclass(frozen=True)
class LayerError:
    """How far a layer's output is off: the smallest cosine of a token's hidden states with the oracle's, the mean one,
    and the largest absolute error, in units of the root mean square of the oracle's."""

    name: str
    least_cosine: float
    mean_cosine: float
    max_error: float


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A model against the oracle.

    kl, max_kl: divergence of its predictions from the oracle's, nats a token, in the mean and of the worst token; top1:
    share of tokens with the same most likely next token; prefix: generated tokens up to the first that differs, of
    ``generated``.
    """

    title: str
    layers: list[LayerError]
    kl: float
    max_kl: float
    top1: float
    prefix: int
    generated: int


@torch.inference_mode()
def trace(model: Any, ids: torch.Tensor, new_tokens: int, make_cache: Callable[[], Any]) -> Trace:
    """Runs a model over ``ids`` ``(T,)`` in one pass through a cache, and lets it go on greedily from the first half.

    Args:
        make_cache: makes an empty cache; what it rounds is in the loop.
    """
    rows = ids[None].to(model.device)
    out = model(input_ids=rows, past_key_values=make_cache(), use_cache=True, output_hidden_states=True)
    prompt = rows[:, : max(1, rows.shape[1] // 2)]
    flags = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    mask = torch.ones_like(prompt)
    greedy = model.generate(prompt, attention_mask=mask, past_key_values=make_cache(), **flags)
    hidden = [states[0].float().cpu() for states in out.hidden_states]
    return Trace(hidden, out.logits[0].float().cpu(), greedy[0, prompt.shape[1] :].tolist())


def judge(title: str, names: list[str], got: Trace, oracle: Trace) -> Verdict:
    """Compares two traces of the same text; names: see :func:`layer_names`."""
    layers = [_layer_error(*each) for each in zip(names, got.hidden, oracle.hidden, strict=True)]
    log_p, log_q = oracle.logits.double().log_softmax(-1), got.logits.double().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    top1 = (got.logits.argmax(-1) == oracle.logits.argmax(-1)).double().mean()
    same = [a == b for a, b in zip(got.greedy, oracle.greedy, strict=True)]
    prefix = same.index(False) if False in same else len(same)
    return Verdict(title, layers, float(kl.mean()), float(kl.max()), float(top1), prefix, len(same))


def _layer_error(name: str, got: torch.Tensor, oracle: torch.Tensor) -> LayerError:
    got, oracle = got.double(), oracle.double()
    cosine = torch.nn.functional.cosine_similarity(got, oracle, dim=-1)
    unit = oracle.square().mean().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    worst = (got - oracle).abs().max() / unit
    return LayerError(name, float(cosine.min()), float(cosine.mean()), float(worst))


def layer_names(config: Any) -> list[str]:
    """One for each entry of :attr:`Trace.hidden`."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    names = {"full_attention": "attention", "conv": "convolution"}
    return ["embeddings", *(f"{index} {names.get(kind, kind)}" for index, kind in enumerate(kinds))]


def tables(verdicts: list[Verdict]) -> tuple[Table, Table]:
    """Errors of the layers, and of what the model says."""
    layers = Table(title="Hidden states against stock in float32", box=box.SIMPLE_HEAD, title_justify="left")
    layers.add_column("after layer")
    for verdict in verdicts:
        for part in ("least cosine", "max error / rms"):
            layers.add_column(f"{verdict.title}: {part}", justify="right")
    for errors in zip(*(verdict.layers for verdict in verdicts), strict=True):
        cells = [cell for error in errors for cell in (f"{error.least_cosine:.6f}", f"{error.max_error:.3g}")]
        layers.add_row(errors[0].name, *cells)
    said = Table(title="Predictions and greedy generate()", box=box.SIMPLE_HEAD, title_justify="left")
    said.add_column("")
    for verdict in verdicts:
        said.add_column(verdict.title, justify="right")
    said.add_row("KL, nats a token", *(f"{verdict.kl:.3g}" for verdict in verdicts))
    said.add_row("KL, worst token", *(f"{verdict.max_kl:.3g}" for verdict in verdicts))
    said.add_row("same likeliest token", *(f"{verdict.top1:.1%}" for verdict in verdicts))
    said.add_row("greedy prefix", *(f"{verdict.prefix} of {verdict.generated}" for verdict in verdicts))
    return layers, said


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command line asked for."""

    config: FastpathConfig
    model: str | None
    text: Path
    device: str = "auto"
    dtype: str = "bf16"
    tokens: int = 256
    new_tokens: int = 64
    json: Path | None = None


def verify(request: Request, step: Callable[[int, int], None] = lambda done, total: None) -> list[Verdict]:
    """The stock model in ``request.dtype``, then the patched one, against the stock model in float32.

    One model is in memory at a time. ``step``: called with (steps done, steps in all).
    """
    loaded = load(request.model, request.device, "fp32")
    ids = read_tokens(loaded, request)
    oracle = trace(loaded.model, ids, request.new_tokens, lambda: compare.empty_cache(loaded.model, None))
    step(1, 3)
    del loaded
    gc.collect()
    loaded = load(request.model, request.device, request.dtype)
    stock = trace(loaded.model, ids, request.new_tokens, lambda: compare.empty_cache(loaded.model, None))
    step(2, 3)
    patch_model(loaded.model, request.config)
    patched = trace(loaded.model, ids, request.new_tokens, lambda: compare.empty_cache(loaded.model, request.config))
    step(3, 3)
    names = layer_names(loaded.model.config)
    return [
        judge(f"stock {request.dtype}", names, stock, oracle),
        judge(compare.describe(request.config), names, patched, oracle),
    ]


def run(request: Request, console: Console) -> list[Verdict]:
    """Measures and prints.

    Raises:
        ValueError: the text holds fewer than two tokens, or a number is too small.
    """
    if request.tokens < 2 or request.new_tokens < 1:
        raise ValueError(
            f"tokens={request.tokens}, new_tokens={request.new_tokens}: allowed are tokens >= 2 and new_tokens >= 1"
        )
    if request.json and not request.json.absolute().parent.is_dir():
        raise ValueError(f"cannot write {request.json}: its folder does not exist")
    shown = dataclasses.replace(request.config, progress=request.config.progress and console.is_terminal)
    with compare.bar(console, "Float32, stock, patched") as step:
        verdicts = verify(dataclasses.replace(request, config=shown), step)
    for table in tables(verdicts):
        console.print(table)
    versions = ", ".join(f"{name} {version}" for name, version in info.versions().items())
    console.print(f"{request.tokens} tokens of {request.text.name} at most; {versions}.", highlight=False)
    if request.json:
        plain = [dataclasses.asdict(verdict) for verdict in verdicts]
        request.json.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    return verdicts


def read_tokens(loaded: Loaded, request: Request) -> torch.Tensor:
    """The first tokens of the text, ``(T,)``, as many as were asked for and the model has positions for."""
    try:
        text = request.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {request.text}: {error}") from error
    limit = getattr(loaded.model.config, "max_position_embeddings", None) or request.tokens
    ids = torch.tensor(loaded.tokenizer(text, verbose=False).input_ids)[: min(request.tokens, limit)]
    if len(ids) < 2:
        raise ValueError(f"{request.text} holds {len(ids)} tokens: at least 2 are needed")
    return ids
