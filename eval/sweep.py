"""The configurations that an evaluation compares with the stock model, and what is done already of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from hf_fastpath import FastpathConfig
from hf_fastpath.eval.compare import describe

DEFAULT = "default"


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A row of the report: its name, and what the model is patched with (None: the model as it came)."""

    name: str
    config: FastpathConfig | None


STOCK = Candidate("stock", None)


def single(config: FastpathConfig) -> list[Candidate]:
    """The stock model and one configuration."""
    return [STOCK, _candidate(config)]


def default_sweep(base: FastpathConfig) -> list[Candidate]:
    """Stock, every KV format on the weights as they are, and int4 weights without and with every one of them.

    ``"static"`` is full precision on our code: what it differs from stock by is the noise of 16-bit arithmetic.
    """
    formats = ("static", "int8", "fp8", "int4", "h2o")
    bare = dataclasses.replace(base, weights=None, lm_head=None)
    packed = dataclasses.replace(base, weights="w4a16", kv_cache=None)  # type: ignore[arg-type]
    caches = [dataclasses.replace(bare, kv_cache=name) for name in formats]  # type: ignore[arg-type]
    both = [dataclasses.replace(packed, kv_cache=name) for name in formats[1:]]  # type: ignore[arg-type]
    return [STOCK, *map(_candidate, [*caches, packed, *both])]


def read_sweep(path: Path, base: FastpathConfig) -> list[Candidate]:
    """The configurations of a JSON or YAML file: a list of mappings of :class:`FastpathConfig`'s fields (over those of
    ``base``), each with a ``name`` of its own if it likes. The stock model is added.

    Raises:
        ValueError: the file cannot be read, or holds something else, or two configurations have one name.
    """
    import yaml

    try:
        rows = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the sweep {path}: {error}") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(
            f"the sweep {path} must be a list of configurations, such as "
            '[{"weights": null, "kv_cache": "int4"}, {"name": "small groups", "group_size": 32}]'
        )
    found = [STOCK]
    for number, row in enumerate(rows, 1):
        fields = dict(row)
        name = fields.pop("name", None)
        try:
            candidate = _candidate(FastpathConfig.build(base, fields))
        except ValueError as error:
            raise ValueError(f"{path}, configuration {number}: {error}") from error
        found.append(dataclasses.replace(candidate, name=str(name)) if name else candidate)
    names = [candidate.name for candidate in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{path}: {', '.join(map(repr, twice))} is there twice; give each a name of its own")
    return found


def _candidate(config: FastpathConfig) -> Candidate:
    name = describe(config)
    return Candidate(f"{name}, {config.kv_budget} tokens" if config.cache_options else name, config)


class Parts:
    """Results by what they are results of, a JSON file each: an interrupted evaluation goes on where it was.

    Args:
        folder: made when something is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: dict[str, Any]) -> Any:
        """The result of this key, or None."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))["result"]
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path} is no result of an evaluation ({error}): delete it") from error

    def put(self, key: dict[str, Any], result: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(key)
        scratch = path.with_suffix(f".{os.getpid()}.tmp")
        scratch.write_text(json.dumps({"key": key, "result": result}), encoding="utf-8")
        scratch.replace(path)  # whole or not at all

    def _path(self, key: dict[str, Any]) -> Path:
        text = json.dumps(key, sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
