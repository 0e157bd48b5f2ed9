"""What patching did to a model: one row a module, and a table that a person reads at a glance."""

from __future__ import annotations

import dataclasses
import re

from torch import nn

from hf_fastpath.modules import PackedExperts, PackedLinear

LEFT = "left"


@dataclasses.dataclass(frozen=True)
class ReportRow:
    """One module. ``bytes_before`` and ``bytes_after`` count its own parameters and buffers, tied ones once."""

    name: str
    kind: str
    action: str
    reason: str
    bytes_before: int
    bytes_after: int


@dataclasses.dataclass(frozen=True)
class FastpathReport:
    """Rows for every module with weights, then notes on attention, cache and what runs where. ``str()`` is a table."""

    model: str
    rows: tuple[ReportRow, ...]
    notes: tuple[str, ...]

    @property
    def bytes_before(self) -> int:
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.rows)

    def grouped(self) -> list[tuple[str, int, ReportRow]]:
        """Rows that differ only in the layer number, merged: (name with ``*`` for the number, how many, their sum)."""
        groups: dict[tuple[str, ...], list[ReportRow]] = {}
        for row in self.rows:
            name = re.sub(r"\.\d+(?=\.|$)", ".*", row.name)
            groups.setdefault((name, row.kind, row.action, row.reason), []).append(row)
        merged = []
        for (name, kind, action, reason), rows in groups.items():
            before, after = sum(r.bytes_before for r in rows), sum(r.bytes_after for r in rows)
            merged.append((name, len(rows), ReportRow(name, kind, action, reason, before, after)))
        return merged

    def __str__(self) -> str:
        header = ("module", "count", "kind", "action", "MB before", "MB after", "why")
        lines = [
            (
                name,
                str(count),
                row.kind,
                row.action,
                _megabytes(row.bytes_before),
                _megabytes(row.bytes_after),
                row.reason,
            )
            for name, count, row in self.grouped()
        ]
        total = ("total", str(len(self.rows)), "", "", _megabytes(self.bytes_before), _megabytes(self.bytes_after), "")
        table = _format_table(header, [*lines, total])
        return "\n".join([self.model, *table, *self.notes])


def module_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of each module's own parameters and buffers; a tied tensor counts where it is met first."""
    seen: set[int] = set()
    sizes: dict[str, int] = {}
    inside: set[nn.Module] = set()  # packed experts
    for name, module in model.named_modules():
        if isinstance(module, (PackedLinear, PackedExperts)):
            sizes[name] = module.nbytes
            inside.update(module.children())
            continue
        if module in inside:
            continue
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if own:
            sizes[name] = sum(tensor.nbytes for tensor in own if id(tensor) not in seen)
            seen.update(id(tensor) for tensor in own)
    return sizes


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f}"


def _format_table(header: tuple[str, ...], lines: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    numeric = {i for i, name in enumerate(header) if name == "count" or name.startswith("MB")}

    def row(cells: tuple[str, ...]) -> str:
        padded = [
            c.rjust(w) if i in numeric else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return [row(header), "  ".join("-" * w for w in widths), *(row(line) for line in lines)]
