"""AWQ checkpoints (AutoAWQ, GPTQModel), 4 bits, version "gemm".

A layer of ``(N, K)`` in G groups has

* ``qweight`` int32 ``(K, N/8)``: bits 4i..4i+3 of word ``[k, c]`` are the code of row ``8c + o[i]``, where o is
  0, 2, 4, 6, 1, 3, 5, 7,
* ``qzeros`` int32 ``(G, N/8)``: zero points in the same order, as they are,
* ``scales`` ``(G, N)``,

and the weight ``w[n, k] = (code - zero) * scales[k // group_size, n]`` (``WQLinear_GEMM.from_linear`` and
``dequantize_gemm`` in AutoAWQ). The scaling of activations that AWQ searches for is folded into the model's other
weights, so a layer needs nothing else. The versions "gemv", "gemv_fast", "marlin" and "llm-awq" are other layouts;
"exllama" and "ipex" name kernels that read "gemm" files, and no tool writes them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from hf_fastpath.checkpoints.base import (
    CODES_PER_WORD,
    CheckpointFormat,
    LayerTensors,
    assemble,
    check_group_size,
    group_count,
    has_numbered_part,
    sequential_groups,
    skip_patterns,
    take_scales,
    unpack_words,
)
from hf_fastpath.errors import Unsupported
from hf_fastpath.packing import SYMMETRIC_ZERO
from hf_fastpath.quantize import GroupQuantized

# Where in a word, lowest bits first, the codes of eight consecutive rows are: the inverse of 0 2 4 6 1 3 5 7.
_POSITIONS = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclasses.dataclass(frozen=True)
class AWQFormat(CheckpointFormat):
    """An AWQ checkpoint; the layout is in this module's docstring.

    modules_to_not_convert: layers whose name contains one of these are not quantized, as in AutoAWQ.
    skip_patterns: regular expressions, matched from the start of a layer's name, of more such layers (GPTQModel).
    """

    modules_to_not_convert: tuple[str, ...] = ()
    skip_patterns: tuple[str, ...] = ()

    METHOD: ClassVar[str] = "awq"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> AWQFormat:
        """Parses ``quantization_config``.

        Raises:
            Unsupported: not 4 bits, another version than "gemm", or layers that are stored differently.
        """
        bits = config.get("bits", config.get("w_bit"))
        if bits != 4:
            raise Unsupported(f"AWQ checkpoint: bits {bits!r} cannot be converted: allowed is 4")
        version = str(config.get("version") or config.get("format") or "gemm").lower()
        if version != "gemm":
            raise Unsupported(f"AWQ checkpoint: version {version!r} cannot be converted: allowed is 'gemm'")
        return cls(
            group_size=check_group_size(config.get("group_size", config.get("q_group_size", 128)), "AWQ"),
            symmetric=not config.get("zero_point", True),
            modules_to_not_convert=tuple(config.get("modules_to_not_convert") or ()),
            skip_patterns=skip_patterns(config.get("dynamic") or {}, "AWQ"),
        )

    @property
    def suffixes(self) -> tuple[str, ...]:
        return ("qweight", "qzeros", "scales")

    def quantizes(self, layer_name: str) -> bool:
        skipped = any(part in layer_name for part in self.modules_to_not_convert)
        skipped = skipped or any(re.match(pattern, layer_name) for pattern in self.skip_patterns)
        return has_numbered_part(layer_name) and not skipped

    def shape_of(self, layer_name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        in_features, words = shapes[f"{layer_name}.qweight"]
        return words * CODES_PER_WORD, in_features

    def convert(
        self, layer_name: str, tensors: Mapping[str, torch.Tensor]
    ) -> tuple[GroupQuantized, torch.Tensor | None]:
        layer = LayerTensors(layer_name, tensors)
        qweight = layer.take("qweight", (torch.int32,))
        k, n = qweight.shape[0], qweight.shape[1] * CODES_PER_WORD
        groups = group_count(k, self.group_size)
        qzeros = layer.take("qzeros", (torch.int32,), (groups, qweight.shape[1]))
        scale = take_scales(layer, "scales", (groups, n))
        zero = _unpack(qzeros)
        if self.symmetric and not bool((zero == SYMMETRIC_ZERO).all()):
            layer.refuse(
                "qzeros",
                f"holds zero points other than {SYMMETRIC_ZERO} although the configuration says zero_point=false: "
                "kernels disagree on what this checkpoint is",
            )
        column_group = sequential_groups(k, self.group_size).to(qweight.device)
        return assemble(layer_name, _unpack(qweight), scale.T, zero, column_group)


def _unpack(words: torch.Tensor) -> torch.Tensor:
    """int32 ``(R, N/8)`` to uint8 ``(N, R)``."""
    codes = unpack_words(words)[..., list(_POSITIONS)]
    return codes.permute(1, 2, 0).reshape(-1, words.shape[0])
