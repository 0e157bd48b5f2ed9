"""Loading the model that a command works on, from a path, a hub id, or the demo's package."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_fastpath import FastpathConfig, register
from hf_fastpath.errors import Unsupported
from hf_fastpath.eval import smollm2

DTYPES: dict[str, Any] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "auto": "auto"}


@dataclasses.dataclass
class Loaded:
    """A model in evaluation mode, its tokenizer, and a name for tables."""

    model: Any
    tokenizer: Any
    name: str


def pick_device(device: str) -> torch.device:
    """``"auto"`` is a CUDA GPU when torch sees one, else the CPU."""
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={device!r}: allowed are 'auto', 'cpu', 'cuda'")
    if device == "cuda" and not torch.cuda.is_available():
        raise Unsupported("torch sees no CUDA GPU (`hf-fastpath info` says more): use --device cpu")
    return torch.device("cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu"))


def pick_dtype(dtype: str) -> Any:
    """What ``from_pretrained`` takes; "auto" is the dtype that the checkpoint names."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: allowed are {', '.join(map(repr, DTYPES))}")
    return DTYPES[dtype]


def load(
    model: str | None,
    device: str,
    dtype: str,
    on_convert: Callable[[], None] = lambda: None,
    patch: FastpathConfig | None = None,
) -> Loaded:
    """Loads a causal language model.

    Args:
        model: a folder or a hub id; None for the demo's model.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``; dtype: ``"bf16"``, ``"fp16"``, ``"fp32"`` or ``"auto"``.
        on_convert: called when the demo's model has to be converted first.
        patch: load it patched like this, quantized layer by layer; also what packed, GPTQ, AWQ and compressed-tensors
            checkpoints need.

    Raises:
        Unsupported: the model, its tokenizer or the device is not there, or the model cannot be patched.
    """
    options: dict[str, Any] = {"dtype": pick_dtype(dtype)}
    target = pick_device(device)
    if patch is not None:
        register()
        options |= {"quantization_config": patch, "device_map": target}
    path: str | Path = smollm2.checkpoint(on_convert) if model is None else model
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, **options)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Unsupported:
        raise
    except (OSError, ValueError) as error:  # no such model, or not one that generates text
        raise Unsupported(f"cannot load {str(path)!r}: {str(error).strip().splitlines()[0]}") from error
    if not tokenizer.vocab_size:  # what transformers makes of a folder without one
        raise Unsupported(f"{str(path)!r} has no tokenizer: save the model's there (tokenizer.save_pretrained)")
    name = smollm2.NAME if model is None else Path(model).name
    return Loaded(loaded.to(target).eval(), tokenizer, name)


def encode_prompt(loaded: Loaded, prompt: str) -> dict[str, torch.Tensor]:
    """The prompt's inputs for generate(), through the chat template where the tokenizer has one."""
    tokenizer = loaded.tokenizer
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    return dict(inputs.to(loaded.model.device))
