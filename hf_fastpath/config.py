"""What a user can choose. Strings are accepted at the door and parsed once."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
from typing import Any

from hf_fastpath.packing import GROUP_SIZES

KV_BUDGET = 1024
KV_SINKS = 4
QUANT_METHOD = "fastpath"  # the name in transformers' table of quantizers, and in config.json


class WeightFormat(enum.Enum):
    """How the weights of the linear layers are stored."""

    W4A16 = "w4a16"
    W16A16 = "w16a16"


class HeadFormat(enum.Enum):
    """How the weights of the language-model head are stored."""

    INT4 = "int4"
    INT8 = "int8"


class KVFormat(enum.Enum):
    """How the KV cache that ``generate()`` makes by default is stored. ``"int4_kivi"`` is another name of int4."""

    STATIC = "static"
    INT8 = "int8"
    FP8 = "fp8"
    INT4 = "int4"
    H2O = "h2o"

    @classmethod
    def _missing_(cls, value: object) -> KVFormat | None:
        return cls.INT4 if value == "int4_kivi" else None

    @property
    def compressed(self) -> bool:
        """Whether attention has to read it in another form than plain tensors."""
        return self is not KVFormat.STATIC


def check_budget(kv_budget: int, kv_window: int | None, kv_sinks: int) -> int:
    """The window of an H2O cache, half of the budget where it is None.

    Raises:
        ValueError: a number is none, too small, or the window and the sinks together are more than the budget.
    """
    window = kv_budget // 2 if kv_window is None and type(kv_budget) is int else kv_window
    for name, value, least in (("kv_budget", kv_budget, 1), ("kv_window", window, 0), ("kv_sinks", kv_sinks, 0)):
        if type(value) is not int or value < least:
            raise ValueError(f"{name}={value!r}: must be an integer of {least} or more")
    assert window is not None
    if window + kv_sinks > kv_budget:
        raise ValueError(
            f"kv_window={window} and kv_sinks={kv_sinks} are more tokens than kv_budget={kv_budget} keeps: together "
            "they may be at most as many"
        )
    return window


class Fallback(enum.Enum):
    """What runs a patched model on a GPU where the kernels cannot."""

    REFERENCE = "reference"


class ScaleSearch(enum.Enum):
    """How the codes and scales (and zero points) of int4 weights are chosen."""

    AUTO = "auto"

    ABSMAX = "absmax"
    MSE = "mse"
    ACTIVATION = "activation"
    OUTPUT = "output"


def _parse_enum(field: str, value: Any, kind: type[enum.Enum], optional: bool) -> enum.Enum | None:
    allowed = [repr(member.value) for member in kind] + (["None"] if optional else [])
    if isinstance(value, kind) or (value is None and optional):
        return value
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return kind(value.lower())
    raise ValueError(f"FastpathConfig.{field}={value!r}: allowed are {', '.join(allowed)}")


@dataclasses.dataclass(frozen=True)
class FastpathConfig:
    """What :func:`hf_fastpath.patch_model` does to a model. Immutable; a bad value raises ValueError.

    Args:
        weights: ``"w4a16"`` stores every supported linear layer as int4 groups with 16-bit scales. ``"w16a16"`` leaves
            the weights as they are, and runs decoder layers in our kernels and CUDA graphs all the same, the products
            by cuBLAS: on a GPU logits are stock's but for the order of sums and what is rounded between. None leaves
            weights and layers as they are: with ``kv_cache="static"`` logits are stock's, bit for bit.
        group_size: consecutive input features that share a scale: 128, 64 or 32. A layer whose in_features is not a
            multiple of it takes the next smaller size that divides.
        zero_points: give every group an integer zero point (asymmetric int4): 0.06 more bits a weight at group 128,
            and less error.
        scale_search: how int4 codes and scales are chosen. ``"output"`` minimizes the error of each layer's output,
            codes and scales making up for each other's errors, on the calibration text given to ``patch_model`` or,
            without one, on text that the model writes itself. ``"activation"`` weighs the error of each weight by how
            strongly random tokens drive its input channel (several times faster); ``"mse"`` minimizes the error of
            the weights alone; ``"absmax"`` is plain rounding to the largest value. ``"auto"`` is ``"output"`` in
            ``patch_model``, and ``"activation"`` where a model is quantized while it loads, and cannot run yet.
        kv_cache: what ``generate()`` and ``model(...)`` use when you pass no cache: ``"int8"``, ``"fp8"``,
            ``"int4"``, ``"h2o"`` (a fixed number of tokens, the least attended ones go), ``"static"`` (full precision,
            preallocated), or None for transformers' own DynamicCache.
        kv_budget, kv_window, kv_sinks: of ``kv_cache="h2o"``: tokens kept in each head, how many of the latest ones
            among them (None: half), and how many of the first ones.
        lm_head: ``"int8"`` packs the language-model head too, with one scale an output; ``"int4"`` packs it like the
            other layers; None leaves it. A head that is tied to the embeddings is untied for it: the embeddings stay
            as they are.
        skip_modules: names of linear layers to leave alone, matched against each dotted component of a module's name
            (``"down_proj"``) or a whole dotted name.
        fallback: ``"reference"`` lets a patched model run on the reference implementations (plain PyTorch, slow) where
            the CUDA kernels cannot run: an older GPU, no nvcc, a float32 model, a head size that the kernels do not
            take. None refuses such a model and says why. The CPU always has what it needs.
        cuda_graphs: on a GPU, capture the decode step of ``generate()`` in a CUDA graph and replay it for every token.
        keep_original: keep the original float weights on the CPU, so that ``unpatch_model`` restores them exactly.
        progress: show a progress bar while quantizing.
    """

    weights: WeightFormat | None = WeightFormat.W4A16
    group_size: int = 128
    zero_points: bool = True
    scale_search: ScaleSearch = ScaleSearch.AUTO
    kv_cache: KVFormat | None = KVFormat.INT8
    kv_budget: int = KV_BUDGET
    kv_window: int | None = None
    kv_sinks: int = KV_SINKS
    lm_head: HeadFormat | None = None
    skip_modules: tuple[str, ...] = ()
    fallback: Fallback | None = None
    cuda_graphs: bool = True
    keep_original: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        parse = {
            "weights": _parse_enum("weights", self.weights, WeightFormat, optional=True),
            "scale_search": _parse_enum("scale_search", self.scale_search, ScaleSearch, optional=False),
            "kv_cache": _parse_enum("kv_cache", self.kv_cache, KVFormat, optional=True),
            "lm_head": _parse_enum("lm_head", self.lm_head, HeadFormat, optional=True),
            "fallback": _parse_enum("fallback", self.fallback, Fallback, optional=True),
            "skip_modules": self._parse_skip_modules(),
        }
        for field, value in parse.items():
            object.__setattr__(self, field, value)
        if type(self.group_size) is not int or self.group_size not in GROUP_SIZES:
            raise ValueError(
                f"FastpathConfig.group_size={self.group_size!r}: allowed are {', '.join(map(str, GROUP_SIZES))}"
            )
        if self.weights is WeightFormat.W16A16 and self.kv_cache is None:
            raise ValueError(
                "FastpathConfig.weights='w16a16' runs decoder layers on our caches: kv_cache=None, transformers' own, "
                "would leave nothing to do"
            )
        try:
            check_budget(self.kv_budget, self.kv_window, self.kv_sinks)
        except ValueError as error:
            raise ValueError(f"FastpathConfig.{error}") from None
        for field in ("zero_points", "cuda_graphs", "keep_original", "progress"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"FastpathConfig.{field}={getattr(self, field)!r}: allowed are True, False")

    @property
    def packs_linears(self) -> bool:
        """Whether the linear layers of decoder layers become int4."""
        return self.weights is WeightFormat.W4A16

    @property
    def quant_method(self) -> str:
        """How ``from_pretrained(quantization_config=FastpathConfig())`` finds our quantizer, which this registers."""
        from hf_fastpath.registration import register

        register()
        return QUANT_METHOD

    @property
    def cache_options(self) -> dict[str, Any]:
        """What the class of ``kv_cache`` takes of this configuration."""
        if self.kv_cache is not KVFormat.H2O:
            return {}
        return {"kv_budget": self.kv_budget, "kv_window": self.kv_window, "kv_sinks": self.kv_sinks}

    def with_search(self, automatic: ScaleSearch) -> FastpathConfig:
        """This configuration with ``scale_search="auto"`` replaced."""
        return dataclasses.replace(self, scale_search=automatic) if self.scale_search is ScaleSearch.AUTO else self

    def _parse_skip_modules(self) -> tuple[str, ...]:
        names = self.skip_modules
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise ValueError(
                f"FastpathConfig.skip_modules={names!r}: allowed is a list or tuple of module names, "
                'such as ("down_proj", "model.layers.0")'
            )
        return tuple(names)

    @classmethod
    def build(cls, config: FastpathConfig | dict[str, Any] | None, overrides: dict[str, Any]) -> FastpathConfig:
        """``config`` (or the defaults) with ``overrides`` on top; unknown names raise ValueError."""
        if config is None:
            config = cls()
        elif isinstance(config, dict):
            overrides = {**config, **overrides}
            config = cls()
        elif not isinstance(config, cls):
            raise ValueError(f"config must be a FastpathConfig, a dict or None, got {type(config).__name__}")
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(overrides) - set(known))
        if unknown:
            raise ValueError(f"FastpathConfig has no {', '.join(map(repr, unknown))}: allowed are {', '.join(known)}")
        return dataclasses.replace(config, **overrides)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; ``FastpathConfig(**config.to_dict()) == config``."""
        plain = dataclasses.asdict(self)
        return {name: value.value if isinstance(value, enum.Enum) else value for name, value in plain.items()}
