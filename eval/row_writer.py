"""CSV files that a benchmark writes row by row, so that one which is stopped leaves what it measured."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class RowWriter:
    """A CSV file that has every row as soon as it is measured; with ``path=None`` none.

    Args:
        columns: of the file, in this order. command: what writes such files, for messages.
        append: add to the rows that ``path`` holds.

    Raises:
        ValueError: on entering, if it is to append to a file of other columns.
    """

    def __init__(self, path: Path | None, columns: Sequence[str], command: str, append: bool) -> None:
        self.path, self.append = path, append and path is not None and path.is_file()
        self.columns, self.command = tuple(columns), command

    def __enter__(self) -> RowWriter:
        if self.path is None:
            return self
        if self.append:
            with self.path.open(newline="") as file:
                if tuple(csv.DictReader(file).fieldnames or ()) != self.columns:
                    raise ValueError(f"{self.path}: has other columns than `{self.command}` writes")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("a" if self.append else "w", newline="")
        self.csv = csv.DictWriter(self.file, self.columns)
        if not self.append:
            self.csv.writeheader()
        return self

    def write(self, row: dict[str, Any]) -> None:
        if self.path is not None:
            self.csv.writerow(row)
            self.file.flush()

    def __exit__(self, *error: object) -> None:
        if self.path is not None:
            self.file.close()
