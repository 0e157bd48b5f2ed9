"""Whether a patched model in full precision is as exact as the stock model: their errors against the same weights in
float32. For shapes that a test can afford on a CPU, and for whole models on a GPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from hf_fastpath.eval.measure import float32_parameters

# How a model is patched that keeps its weights: with transformers' own layers, and with ours.
LOSSLESS: dict[str, dict[str, Any]] = {
    "as they are": {"weights": None, "kv_cache": "static"},
    "w16a16": {"weights": "w16a16", "kv_cache": "static"},
}

# Both models round the same values to the same 16 bits, if not at the same places, so their errors are alike in size:
# stock's own attention functions differ by 5% in this. Single logits are not compared: where the scores of two experts
# differ by less than the rounding, the models choose different ones, and that token's logits jump, in stock as in ours.
# That is most of the error of a mixture with random weights, 5% where a rounding is 0.4%, so it needs many tokens to
# average out, and a fault shows from about the size of that error on.
MOST = 1.5
# And an error of one rounding of the logits themselves is none, should stock happen to have less.
FLOOR = 2.0**-9


@dataclasses.dataclass(frozen=True)
class Logits:
    """float32 logits of a prompt ``(B, T, V)`` and of the tokens behind it ``(B, n, V)``."""

    prompt: torch.Tensor
    steps: torch.Tensor


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, prompt: int) -> Logits:
    """Of ``ids`` ``(B, T)``, the first ``prompt`` tokens of each row at once and then one by one, as it decodes."""
    out = model(ids[:, :prompt], use_cache=True)
    first, steps = out.logits.float(), []
    for i in range(prompt, ids.shape[1]):
        out = model(ids[:, i : i + 1], past_key_values=out.past_key_values)
        steps.append(out.logits.float())
    return Logits(first, torch.cat(steps, 1))


@torch.no_grad()
def greedy_text(model: Any, rows: int, prompt: int, steps: int, seed: int = 0) -> torch.Tensor:
    """A random prompt and what the model says to it, int64 ``(rows, prompt + steps)``."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, model.config.vocab_size, (rows, prompt), generator=rng).to(model.device)
    options = {"do_sample": False, "max_new_tokens": steps, "attention_mask": torch.ones_like(ids)}
    return model.generate(ids, **options, disable_compile=True)


def oracle(model: Any, ids: torch.Tensor, prompt: int) -> Logits:
    """:func:`logits` of the stock model's weights in float32."""
    with float32_parameters(model):
        return logits(model, ids, prompt)


def relative_errors(got: Logits, exact: Logits) -> dict[str, float]:
    """The error over all logits of the prompt, and of the steps, relative to their size."""
    errors = {}
    for name in ("prompt", "steps"):
        mine, truth = getattr(got, name), getattr(exact, name)
        errors[name] = float((mine - truth).norm() / truth.norm())
    return errors


def check_as_exact_as_stock(got: Logits, stock: Logits, exact: Logits) -> None:
    """The errors of ``got`` are of the size of stock's."""
    mine, theirs = relative_errors(got, exact), relative_errors(stock, exact)
    for name, error in mine.items():
        assert error <= MOST * theirs[name] + FLOOR, f"{name}: {error:.5f}, stock {theirs[name]:.5f}"
