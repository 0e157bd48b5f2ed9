"""FastpathConfig: strings in, enums inside, every bad value refused with what is allowed."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from hf_fastpath import FastpathConfig
from hf_fastpath.config import KVFormat, ScaleSearch, WeightFormat


def test_strings_and_enums_are_the_same() -> None:
    config = FastpathConfig(weights="W4A16", kv_cache="static", scale_search="mse", skip_modules=["lm_head"])
    assert config.weights is WeightFormat.W4A16
    assert config.kv_cache is KVFormat.STATIC
    assert config.scale_search is ScaleSearch.MSE
    assert config.skip_modules == ("lm_head",)
    assert FastpathConfig(kv_cache="INT4_KIVI") == FastpathConfig(kv_cache="int4")


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("weights", "int3", "'w4a16', 'w16a16', None"),
        ("kv_cache", "int2", "'static', 'int8', 'fp8', 'int4', 'h2o', None"),
        ("kv_cache", 8, "'static', 'int8', 'fp8', 'int4', 'h2o', None"),
        ("scale_search", None, "'absmax', 'mse', 'activation', 'output'"),
        ("group_size", 16, "128, 64, 32"),
        ("group_size", "128", "128, 64, 32"),
        ("group_size", True, "128, 64, 32"),
        ("zero_points", 1, "True, False"),
        ("keep_original", "yes", "True, False"),
        ("lm_head", "int2", "'int4'"),
        ("skip_modules", "lm_head", "list or tuple"),
        ("skip_modules", [1], "list or tuple"),
        ("skip_modules", None, "list or tuple"),
    ],
)
def test_bad_values_say_what_is_allowed(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(ValueError, match=field) as error:
        FastpathConfig(**{field: value})
    assert allowed in str(error.value)
    assert repr(value) in str(error.value)


def test_overrides_and_unknown_names() -> None:
    base = FastpathConfig(group_size=64)
    assert FastpathConfig.build(base, {"kv_cache": None}) == FastpathConfig(group_size=64, kv_cache=None)
    assert FastpathConfig.build({"group_size": 32}, {}).group_size == 32
    with pytest.raises(ValueError, match=r"no 'kv_cash': allowed are weights, group_size.*kv_cache"):
        FastpathConfig.build(None, {"kv_cash": "int8"})
    with pytest.raises(ValueError, match="must be a FastpathConfig, a dict or None"):
        FastpathConfig.build("int8", {})  # type: ignore[arg-type]


def test_frozen_and_json() -> None:
    config = FastpathConfig(skip_modules=("a", "b"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.group_size = 64  # type: ignore[misc]
    assert FastpathConfig(**json.loads(json.dumps(config.to_dict()))) == config
