# SPDX-License-Identifier: Apache-2.0
"""Which layers get which adapter. Field names and meanings are HF PEFT's; its config objects are accepted too."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from .modules.lora import check_lora

BIAS = ("none", "all", "lora_only")


@dataclass
class LoraConfig:
    """LoRA for a whole model.

    r, lora_alpha, lora_dropout, use_rslora, init_lora_weights: as for LoRALinear.
    target_modules: module names or name endings; a regular expression that has to match the whole name; or
        "all-linear", every linear layer but the output head.
    exclude_modules: the same, for layers to leave alone.
    rank_pattern, alpha_pattern: {name or ending or regular expression: r or lora_alpha} for layers that differ.
    bias: "none", "all" (all biases of the model train) or "lora_only" (those of the adapted layers).
    Raises ValueError naming the field.
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    exclude_modules: str | list[str] | None = None
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    bias: str = "none"
    task_type: str | None = None
    base_model_name_or_path: str | None = None

    def __post_init__(self) -> None:
        check_lora(self.r, self.lora_alpha, self.lora_dropout, self.init_lora_weights)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            names = isinstance(value, list) and all(isinstance(v, str) for v in value)
            if not (names or isinstance(value, str) or (value is None and name == "exclude_modules")):
                raise ValueError(f"{name}: expected a list of names or a pattern, got {value!r}")
            if isinstance(value, str):
                _check_pattern(name, value)
        for name in ("rank_pattern", "alpha_pattern"):
            value = getattr(self, name)
            if not isinstance(value, dict):
                raise ValueError(f"{name}: expected a dict of pattern: value, got {value!r}")
            for pattern in value:
                _check_pattern(name, pattern)
        if not isinstance(self.use_rslora, bool):
            raise ValueError(f"use_rslora: expected True or False, got {self.use_rslora!r}")
        if self.bias not in BIAS:
            raise ValueError(f"bias: expected one of {BIAS}, got {self.bias!r}")
        if not self.target_modules:
            raise ValueError(f'target_modules: expected names, a pattern or "all-linear", got {self.target_modules!r}')
        for name, rank in self.rank_pattern.items():
            if not isinstance(rank, int) or rank < 1:
                raise ValueError(f"rank_pattern[{name!r}]: expected an int >= 1, got {rank!r}")
        for name, alpha in self.alpha_pattern.items():
            if not isinstance(alpha, Real) or not math.isfinite(alpha):
                raise ValueError(f"alpha_pattern[{name!r}]: expected a finite number, got {alpha!r}")

    def rank_of(self, name: str) -> int:
        return _by_pattern(self.rank_pattern, name, self.r)

    def alpha_of(self, name: str) -> float:
        return _by_pattern(self.alpha_pattern, name, self.lora_alpha)

    def to_peft_dict(self) -> dict[str, Any]:
        """The content of an ``adapter_config.json`` of HF PEFT."""
        values = dataclasses.asdict(self)
        return {**values, "peft_type": "LORA", "inference_mode": True, "fan_in_fan_out": False}


def _check_pattern(name: str, pattern: Any) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{name}: expected a regular expression, got {pattern!r}: {error}") from error


def matches(name: str, patterns: str | list[str] | None) -> bool:
    """Does a module name match, as HF PEFT matches: a string is a regular expression, a list holds name endings?"""
    if patterns is None:
        return False
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == p or name.endswith(f".{p}") for p in patterns)


def _by_pattern(patterns: dict[str, Any], name: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


# Fields of a PEFT config that say where it came from or how PEFT itself is to behave, not what is computed.
_PEFT_ONLY = {"peft_type", "auto_mapping", "peft_version", "revision", "inference_mode", "runtime_config"}
_OURS = {f.name for f in dataclasses.fields(LoraConfig)}


def read_config(config: Any) -> LoraConfig:
    """Ours from ours, from a ``peft.LoraConfig``, or from the dict of an adapter_config.json.

    Raises TypeError for anything else and ValueError for a PEFT option that would change the result and is not
    supported, so that nothing is silently ignored.
    """
    if isinstance(config, LoraConfig):
        return config
    if isinstance(config, dict):
        values, defaults = config, {}
    elif dataclasses.is_dataclass(config) and hasattr(config, "peft_type"):
        values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        defaults = {f.name: _default(f) for f in dataclasses.fields(config)}
    else:
        raise TypeError(f"config: expected a peftkern.LoraConfig or a peft.LoraConfig, got {type(config).__name__}")
    kind = getattr(values.get("peft_type"), "value", values.get("peft_type"))
    if kind != "LORA":
        raise ValueError(f"config.peft_type: expected LORA, got {kind!r}")
    for name, value in values.items():
        off = value in (None, False, "", [], {}, ()) or (name in defaults and value == defaults[name])
        if name not in _OURS and name not in _PEFT_ONLY and not off and not _harmless(name, value):
            raise ValueError(f"config.{name}: expected its default, this option is not supported here; got {value!r}")
    if values.get("target_modules") is None:
        raise ValueError(
            'config.target_modules: expected names, a pattern or "all-linear", got None, with which HF PEFT chooses by '
            "the type of the model"
        )
    ours = {name: value for name, value in values.items() if name in _OURS and value is not None}
    for name in ("target_modules", "exclude_modules"):
        if isinstance(ours.get(name), (set, tuple)):
            ours[name] = sorted(ours[name])
    if "task_type" in ours:
        ours["task_type"] = getattr(ours["task_type"], "value", ours["task_type"])
    return LoraConfig(**ours)


def _default(f: dataclasses.Field) -> Any:
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


def _harmless(name: str, value: Any) -> bool:
    """Options of a feature that is itself off: PEFT writes them with their defaults into every adapter_config.json."""
    return name in {"megatron_core", "loftq_config", "qalora_group_size"}
