"""GPTQ checkpoints (AutoGPTQ, GPTQModel, optimum), 4 bits, ``checkpoint_format`` "gptq" and "gptq_v2".

A layer of ``(N, K)`` in G groups has

* ``qweight`` int32 ``(K/8, N)``: bits 4i..4i+3 of word ``[r, n]`` are the code of column ``8r + i`` of row n,
* ``qzeros`` int32 ``(G, N/8)``: bits 4i..4i+3 of word ``[g, c]`` are the zero point of row ``8c + i``,
* ``scales`` ``(G, N)``, and ``g_idx`` int32 ``(K,)``, the group of each column; with ``desc_act`` in any order,

and the weight ``w[n, k] = (code - zero) * scales[g_idx[k], n]``. "gptq_v2" stores the zero point, "gptq" (version 1)
the zero point minus one.

A version 1 zero point of 0 does not fit, and is stored as 15. In AutoGPTQ the exllama kernels and ``qlinear_cuda_old``
read that as 0, ``qlinear_cuda`` and Triton as 16, and its packer shifts a 32-bit -1 into the word, which fills all zero
points above it with 15. GPTQModel writes version 1 by subtracting 0x11111111 from the whole word, borrowing from the
zero point above, and reads it by adding that back (``convert_gptq_v1_to_v2_format``), which is exact. So a 15 is taken
only in files that GPTQModel wrote, and refused in others.
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

_V1_OFFSETS = 0x11111111  # one in each nibble


@dataclasses.dataclass(frozen=True)
class GPTQFormat(CheckpointFormat):
    """A GPTQ checkpoint; the layout is in this module's docstring.

    desc_act: whether columns are in groups by ``g_idx`` in any order.
    version: 1 ("gptq") or 2 ("gptq_v2"). written_by_gptqmodel: how version 1 zero points of 0 were stored.
    lm_head: whether the output projection is quantized.
    blocks: the module that holds the decoder layers, where the configuration names it.
    modules_in_block: names in a decoder layer; None: all its linear layers are quantized.
    skip_patterns: regular expressions, matched from the start of a layer's name, of layers that are not.
    """

    desc_act: bool = False
    version: int = 1
    written_by_gptqmodel: bool = False
    lm_head: bool = False
    blocks: str | None = None
    modules_in_block: tuple[str, ...] | None = None
    skip_patterns: tuple[str, ...] = ()

    METHOD: ClassVar[str] = "gptq"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> GPTQFormat:
        """Parses ``quantization_config``.

        Raises:
            Unsupported: not 4 bits, a kernel's own layout, or options that change the weights' meaning.
        """
        _check_config(config)
        modules = config.get("modules_in_block_to_quantize")
        return cls(
            group_size=check_group_size(config.get("group_size", -1), "GPTQ"),
            symmetric=config.get("sym"),
            desc_act=bool(config.get("desc_act", False)),
            version=2 if _layout_name(config) == "gptq_v2" else 1,
            written_by_gptqmodel=_written_by_gptqmodel(config),
            lm_head=bool(config.get("lm_head", False)),
            blocks=config.get("block_name_to_quantize"),
            modules_in_block=None if modules is None else _flatten(modules),
            skip_patterns=skip_patterns(config.get("dynamic") or {}, "GPTQ"),
        )

    @property
    def suffixes(self) -> tuple[str, ...]:
        return ("qweight", "qzeros", "scales", "g_idx")

    @property
    def optional_suffixes(self) -> tuple[str, ...]:
        return () if self.desc_act else ("g_idx",)

    def quantizes(self, layer_name: str) -> bool:
        if any(re.match(pattern, layer_name) for pattern in self.skip_patterns):
            return False
        if layer_name.split(".")[-1] == "lm_head":
            return self.lm_head
        in_blocks = has_numbered_part(layer_name) if self.blocks is None else layer_name.startswith(f"{self.blocks}.")
        wanted = self.modules_in_block
        return in_blocks and (wanted is None or any(layer_name.endswith(f".{name}") for name in wanted))

    def shape_of(self, layer_name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        words, out_features = shapes[f"{layer_name}.qweight"]
        return out_features, words * CODES_PER_WORD

    def convert(
        self, layer_name: str, tensors: Mapping[str, torch.Tensor]
    ) -> tuple[GroupQuantized, torch.Tensor | None]:
        layer = LayerTensors(layer_name, tensors)
        qweight = layer.take("qweight", (torch.int32,))
        k, n = qweight.shape[0] * CODES_PER_WORD, qweight.shape[1]
        if n % CODES_PER_WORD:
            layer.refuse("qweight", f"has {n} columns: GPTQ packs zero points of {CODES_PER_WORD} output features")
        groups = group_count(k, self.group_size)
        qzeros = layer.take("qzeros", (torch.int32,), (groups, n // CODES_PER_WORD))
        scale = take_scales(layer, "scales", (groups, n))
        zero = self._zero_points(layer, qzeros)
        q = unpack_words(qweight).permute(1, 0, 2).reshape(n, k)
        return assemble(layer_name, q, scale.T, zero.T, self._column_groups(layer, k).to(q.device))

    def _zero_points(self, layer: LayerTensors, qzeros: torch.Tensor) -> torch.Tensor:
        """uint8 ``(G, N)``."""
        zero = unpack_words(qzeros)
        if self.version == 1:
            if not self.written_by_gptqmodel and bool((zero == 15).any()):
                layer.refuse(
                    "qzeros",
                    'holds zero points of 0, which checkpoint_format "gptq" cannot store and kernels read differently: '
                    'quantize the model again with sym=True or checkpoint_format "gptq_v2"',
                )
            whole_word = qzeros.to(torch.int64) + _V1_OFFSETS  # with carries; those out of bit 31 are dropped
            zero = unpack_words((whole_word & 0xFFFFFFFF).to(torch.int32))
        if self.symmetric and not bool((zero == SYMMETRIC_ZERO).all()):
            layer.refuse(
                "qzeros",
                f"holds zero points other than {SYMMETRIC_ZERO} although the configuration says sym=true: kernels "
                "disagree on what this checkpoint is",
            )
        return zero.reshape(qzeros.shape[0], -1)

    def _column_groups(self, layer: LayerTensors, k: int) -> torch.Tensor:
        sequential = sequential_groups(k, self.group_size)
        if not layer.has("g_idx") and not self.desc_act:
            return sequential
        g_idx = layer.take("g_idx", (torch.int32, torch.int64), (k,)).to("cpu", torch.int64)
        if not self.desc_act:
            if bool(g_idx.any()) and not torch.equal(g_idx, sequential):  # AutoGPTQ takes all zeros for "never set"
                layer.refuse(
                    "g_idx",
                    "reorders columns although the configuration says desc_act=false: kernels disagree on what this "
                    "checkpoint is",
                )
            return sequential
        # Kernels sort the columns and cut them into equal groups, others take g_idx as it is: the same if these fit.
        if not torch.equal(g_idx.sort().values, sequential):
            layer.refuse("g_idx", f"does not put the columns into groups of {self.group_size}, {k} columns in all")
        return g_idx


def _layout_name(config: Mapping[str, Any]) -> str:
    return str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()


def _check_config(config: Mapping[str, Any]) -> None:
    if config.get("bits") != 4:
        raise Unsupported(f"GPTQ checkpoint: bits {config.get('bits')!r} cannot be converted: allowed is 4")
    layout = "marlin" if config.get("is_marlin_format") else _layout_name(config)
    if layout not in ("gptq", "gptq_v2"):
        raise Unsupported(
            f"GPTQ checkpoint: checkpoint_format {layout!r} cannot be converted: allowed are 'gptq' and 'gptq_v2'"
        )
    if config.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
        raise Unsupported(f"GPTQ checkpoint: pack_dtype {config['pack_dtype']!r} cannot be converted: allowed is int32")
    for option in ("rotation", "adapter"):
        if config.get(option):
            raise Unsupported(
                f"GPTQ checkpoint: {option} {config[option]!r} needs more than the quantized weights, and cannot be "
                "converted"
            )


def _written_by_gptqmodel(config: Mapping[str, Any]) -> bool:
    """From ``meta.quantizer``: a string or a list of strings, ``name:version``."""
    quantizers = (config.get("meta") or {}).get("quantizer") or ()
    names = (quantizers,) if isinstance(quantizers, str) else quantizers
    return any(str(name).lower().startswith("gptqmodel") for name in names)


def _flatten(modules: list[Any]) -> tuple[str, ...]:
    return tuple(name for entry in modules for name in ([entry] if isinstance(entry, str) else entry))
