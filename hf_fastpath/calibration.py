"""Token sequences on which the error of a layer's output is measured: from a text, or written by the model itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

# 8,192 tokens. Half as many left 1 to 4% more error in a layer, on other text (SmolLM2-135M).
_SEQUENCES, _LENGTH, _SEED = 64, 128, 20260
_TEXT_SEQUENCES, _TEXT_LENGTH = 64, 256
_CHARACTERS_PER_TOKEN = 16  # read generously: most tokens are shorter


def calibration_tokens(
    tokenizer: Any, source: Any, *, sequences: int = _TEXT_SEQUENCES, length: int = _TEXT_LENGTH
) -> torch.Tensor:
    """Token ids ``(sequences, length)``, int64, for ``patch_model(model, calibration=...)``.

    The sequences are spread evenly over the text, because neighbouring ones are about the same thing. Of a long text
    only what is needed is tokenized.

    Args:
        tokenizer: the model's.
        source: the path of a UTF-8 text file, a list of strings, or a data set of the ``datasets`` library (or
            anything with ``column_names`` that can be indexed by one) with a column ``"text"``.

    Raises:
        ValueError: the source cannot be read, or holds too few tokens; the message says how many are needed.
    """
    if sequences < 1 or length < 2:
        raise ValueError(f"sequences={sequences}, length={length}: allowed are sequences >= 1 and length >= 2")
    text = _text_of(source)
    pieces = _excerpts(text, sequences, length * _CHARACTERS_PER_TOKEN)
    ids = [torch.tensor(tokenizer(piece, add_special_tokens=False).input_ids, dtype=torch.long) for piece in pieces]
    tokens = torch.cat(ids)
    if tokens.numel() < sequences * length:
        raise ValueError(
            f"the calibration text holds {tokens.numel():,} tokens, and {sequences} sequences of {length} need "
            f"{sequences * length:,}: give a longer text, or ask for fewer or shorter sequences"
        )
    starts = torch.linspace(0, tokens.numel() - length, sequences, dtype=torch.float64).long()
    return torch.stack([tokens[start : start + length] for start in starts])


def _text_of(source: Any) -> str:
    if isinstance(source, (str, Path)):
        try:
            return Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read the calibration text {str(source)!r}: {error}") from error
    columns = getattr(source, "column_names", None)
    if columns is not None:
        if "text" not in columns:
            raise ValueError(f"the calibration data set has no column 'text', only {', '.join(map(repr, columns))}")
        source = source["text"]
    rows = list(source) if isinstance(source, Iterable) else [source]
    if not all(isinstance(row, str) for row in rows):
        wrong = next(type(row).__name__ for row in rows if not isinstance(row, str))
        raise ValueError(f"calibration text must be a file's path, strings or a data set of them, got {wrong}")
    return "\n\n".join(rows)


def _excerpts(text: str, count: int, characters: int) -> list[str]:
    """``count`` pieces spread evenly over a long text; a short one whole."""
    if len(text) <= count * characters:
        return [text]
    gap = (len(text) - characters) / max(count - 1, 1)
    return [text[int(i * gap) : int(i * gap) + characters] for i in range(count)]


def check_tokens(calibration: Any, vocab_size: int) -> torch.Tensor:
    """``calibration`` as an int64 tensor ``(n, T)`` on the CPU.

    Raises:
        ValueError: it is anything but n sequences of one length T >= 2 of token ids below ``vocab_size``.
    """
    if not isinstance(calibration, torch.Tensor):
        try:
            calibration = torch.stack([torch.as_tensor(row) for row in calibration])
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                "calibration must be token ids, a tensor (n, T) or n sequences of one length (see "
                f"hf_fastpath.calibration.calibration_tokens): {error}"
            ) from error
    shape = tuple(calibration.shape)
    if calibration.dtype not in (torch.int64, torch.int32) or len(shape) != 2 or shape[0] < 1 or shape[1] < 2:
        raise ValueError(f"calibration must be integers (n, T) with T >= 2, got {calibration.dtype} of shape {shape}")
    low, high = int(calibration.min()), int(calibration.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"calibration holds token ids from {low} to {high}: the model has 0 to {vocab_size - 1}")
    return calibration.long().cpu()


@torch.no_grad()
def self_written_tokens(
    model: Any, *, sequences: int = _SEQUENCES, length: int = _LENGTH, progress: bool = False
) -> torch.Tensor:
    """Token ids ``(sequences, length)`` that the model samples from its own distribution, always the same ones.

    This needs no data, and is close enough to text: channels are correlated as they are when reading, which random
    tokens do not show. (Liu et al., 2023, "LLM-QAT", train on data made like this.) Sequences start with the model's
    first token, where it has one, else with random ones, and do not stop at an end token.

    A model with fewer positions than ``length`` writes that many.

    Raises:
        ValueError: the model's logits are not finite.
    """
    length = min(length, getattr(model.config, "max_position_embeddings", None) or length)
    generator = torch.Generator(model.device).manual_seed(_SEED)
    first = model.config.bos_token_id
    shape, options = (sequences, 1), {"dtype": torch.long, "device": model.device}
    if isinstance(first, int):
        tokens = torch.full(shape, first, **options)
    else:
        tokens = torch.randint(model.config.vocab_size, shape, generator=generator, **options)
    written, cache = [tokens], None
    with evaluating(model):
        for _ in tqdm(range(length - 1), desc="Writing text to calibrate on", disable=not progress, leave=False):
            out = model(input_ids=written[-1], past_key_values=cache, use_cache=True)
            cache, likelihood = out.past_key_values, out.logits[:, -1].float().softmax(-1)
            if not bool(likelihood.isfinite().all()):
                raise ValueError(
                    f"the model's logits are not finite in {model.dtype}, so it cannot write a text to calibrate on; "
                    "scale_search='mse' does not look at activations"
                )
            written.append(_sample(likelihood, generator))
    return torch.cat(written, dim=1).cpu()


def _sample(likelihood: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One token a row, ``(n, 1)``, of the distributions ``(n, vocabulary)``, which need not sum to 1.

    By inversion: torch.multinomial draws a random number for each token of the vocabulary, which on the CPU takes a
    third of the time of the whole.
    """
    cumulated = likelihood.cumsum(-1)
    drawn = torch.rand((len(likelihood), 1), generator=generator, device=likelihood.device) * cumulated[:, -1:]
    # The first token whose cumulated likelihood is above what was drawn, so one of likelihood 0 is never chosen.
    return torch.searchsorted(cumulated, drawn, right=True).clamp_(max=likelihood.shape[-1] - 1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within it; afterwards every module is in the mode it was in."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag
