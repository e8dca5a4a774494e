# SPDX-License-Identifier: Apache-2.0
"""Which layers get which adapter. Field names and meanings are HF PEFT's; its config objects are accepted too."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from .modules.adalora import check_adalora
from .modules.lora import check_lora
from .modules.starts import is_decomposition

BIAS = ("none", "all", "lora_only")
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)
}  # fmt: skip


@dataclass
class LoraConfig:
    """LoRA for a whole model.

    r, lora_alpha, lora_dropout, use_rslora, use_dora, init_lora_weights: as for LoRALinear.
    target_modules: module names or name endings; a regular expression that has to match the whole name; or
        "all-linear", every linear layer but the output head. None: HF PEFT's choice for the type of the model.
    exclude_modules: the same, for layers to leave alone.
    layers_to_transform, layers_pattern: of the layers that a list of endings in target_modules finds only those with
        these numbers; the number is the first one in the name, or the one behind a name of layers_pattern.
    modules_to_save: endings of names of modules that train as a whole and are saved with the adapter.
    rank_pattern, alpha_pattern: {name or ending or regular expression: r or lora_alpha} for layers that differ.
    task_type: with "SEQ_CLS", "TOKEN_CLS" and "QUESTION_ANS" the head trains as a whole, as one of modules_to_save.
    ensure_weight_tying: what is asked for an embedding, or for the head tied to it, holds for both: one adapter, or one
        weight that trains, so that they stay tied.
    bias: "none", "all" (all biases of the model train) or "lora_only" (those of the adapted layers).
    Raises ValueError naming the field.
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: str | list[str] | None = "all-linear"
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    ensure_weight_tying: bool = False
    bias: str = "none"
    task_type: str | None = None
    base_model_name_or_path: str | None = None

    def __post_init__(self) -> None:
        check_lora(self.r, self.lora_alpha, self.lora_dropout, self.init_lora_weights)
        _check_targets(self)
        for name in ("rank_pattern", "alpha_pattern"):
            value = getattr(self, name)
            if not isinstance(value, dict):
                raise ValueError(f"{name}: expected a dict of pattern: value, got {value!r}")
            for pattern in value:
                _check_pattern(name, pattern)
        if self.ensure_weight_tying and self.use_dora:
            raise ValueError("ensure_weight_tying: expected False with use_dora, whose magnitudes differ, got True")
        for name in ("use_rslora", "use_dora", "ensure_weight_tying"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected True or False, got {getattr(self, name)!r}")
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


@dataclass
class AdaLoraConfig:
    """AdaLoRA for a whole model (Zhang et al. 2023, arXiv 2303.10512): the names and defaults are HF PEFT's.

    init_r, target_r: rank of every layer at the start, and mean rank at the end; the budget is that times the layers.
    total_step: optimizer steps of the training. tinit: steps before the budget falls, tfinal: steps with the final
    ranks; in between it falls as a cubic. deltaT: steps between two allocations.
    beta1, beta2: decay of the averages of sensitivity and uncertainty, each in (0, 1).
    orth_reg_weight: weight of ``peftkern.orthogonality(model)`` in the loss, which you add (docs/adalora.md).
    lora_alpha, lora_dropout, init_lora_weights: as for AdaLoRALinear; target_modules, exclude_modules,
    layers_to_transform, layers_pattern, modules_to_save, bias: as for LoraConfig.
    rank_pattern: of a saved adapter, {"<layer>.lora_E": which of the init_r triplets there are}.
    Raises ValueError naming the field.
    """

    init_r: int = 12
    target_r: int = 8
    total_step: int | None = None
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: str | list[str] | None = "all-linear"
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    init_lora_weights: bool = True
    rank_pattern: dict[str, list[bool]] | None = None
    bias: str = "none"
    task_type: str | None = None
    base_model_name_or_path: str | None = None

    def __post_init__(self) -> None:
        check_adalora(self.init_r, self.lora_alpha, self.lora_dropout, self.init_lora_weights, "init_r")
        _check_targets(self)
        lowest = {"target_r": 0, "total_step": 1, "tinit": 0, "tfinal": 0, "deltaT": 1}
        for name, low in lowest.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"{name}: expected an int >= {low}, got {value!r}")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if not isinstance(value, Real) or not 0.0 < value < 1.0:
                raise ValueError(f"{name}: expected a number between 0 and 1, got {value!r}")
        if not isinstance(self.orth_reg_weight, Real) or not 0.0 <= self.orth_reg_weight < math.inf:
            raise ValueError(f"orth_reg_weight: expected a finite number >= 0, got {self.orth_reg_weight!r}")
        if self.tinit >= self.total_step - self.tfinal:
            raise ValueError(
                f"tinit: expected less than total_step - tfinal = {self.total_step - self.tfinal}, so that there are "
                f"steps in which the budget falls, got {self.tinit}"
            )
        if not isinstance(self.rank_pattern, (dict, type(None))):
            raise ValueError(f"rank_pattern: expected a dict of layer: list of booleans, got {self.rank_pattern!r}")
        for name, present in (self.rank_pattern or {}).items():
            booleans = isinstance(present, list) and all(isinstance(v, bool) for v in present)
            if not booleans or len(present) != self.init_r:
                raise ValueError(f"rank_pattern[{name!r}]: expected a list of {self.init_r} booleans, got {present!r}")

    def present_in(self, name: str) -> list[bool]:
        """Which of the init_r triplets a layer has."""
        return (self.rank_pattern or {}).get(f"{name}.lora_E", [True] * self.init_r)

    def rank_of(self, name: str) -> int:
        return sum(self.present_in(name))

    def alpha_of(self, name: str) -> float:
        return self.lora_alpha

    def to_peft_dict(self) -> dict[str, Any]:
        """The content of an ``adapter_config.json`` of HF PEFT."""
        values = dataclasses.asdict(self)
        return {**values, "peft_type": "ADALORA", "inference_mode": True, "fan_in_fan_out": False}


def _check_targets(config: LoraConfig | AdaLoraConfig) -> None:
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        config.target_modules = "all-linear"
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        names = isinstance(value, list) and all(isinstance(v, str) for v in value)
        if not (names or isinstance(value, str) or value is None):
            raise ValueError(f"{name}: expected a list of names or a pattern, got {value!r}")
        if isinstance(value, str):
            _check_pattern(name, value)
    for name, kind in (("layers_to_transform", int), ("layers_pattern", str)):
        value = getattr(config, name)
        for item in value if isinstance(value, list) else [] if value is None else [value]:
            if not isinstance(item, kind) or isinstance(item, bool):
                raise ValueError(f"{name}: expected {kind.__name__} or a list of them, got {value!r}")
            if kind is str:
                _check_pattern(name, item)
        if value is not None and isinstance(config.target_modules, str):
            raise ValueError(f"{name}: expected None, as target_modules is a string, got {value!r}")
    if config.layers_pattern and config.layers_to_transform is None:
        raise ValueError(
            f"layers_to_transform: expected numbers for layers_pattern={config.layers_pattern!r}, got None"
        )
    saved = config.modules_to_save
    if saved is not None and not (isinstance(saved, list) and all(isinstance(v, str) and v for v in saved)):
        raise ValueError(f"modules_to_save: expected a list of names, got {saved!r}")
    if config.bias not in BIAS:
        raise ValueError(f"bias: expected one of {BIAS}, got {config.bias!r}")
    if config.target_modules is not None and not config.target_modules:
        raise ValueError(f'target_modules: expected names, a pattern or "all-linear", got {config.target_modules!r}')


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


def is_target(config: LoraConfig | AdaLoraConfig, name: str) -> bool:
    """Does config ask for an adapter on the module of this name? HF PEFT's rule, but for "all-linear"."""
    targets, numbers = config.target_modules, config.layers_to_transform
    if is_excluded(config, name) or not matches(name, targets):
        return False
    if isinstance(targets, str) or name in targets or numbers is None or numbers == []:
        return True
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    # Lazy: the first number, not that of an expert inside the layer.
    rules = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in patterns or []] or [r".*?\.[^.]*\.(\d+)\."]
    found = next(filter(None, (re.match(rule, name) for rule in rules)), None)
    return found is not None and int(found[1]) in (numbers if isinstance(numbers, list) else [numbers])


def is_excluded(config: LoraConfig | AdaLoraConfig, name: str) -> bool:
    """Left alone, or inside a module that trains as a whole."""
    saved = config.modules_to_save or []
    return matches(name, config.exclude_modules) or any(re.match(rf"(^|.*\.){m}($|\..*)", name) for m in saved)


def check_only_adds(config: LoraConfig | AdaLoraConfig) -> None:
    """Raises ValueError unless an adapter with config adds low-rank products to the weights of the base model, and does
    nothing else to them."""
    if getattr(config, "use_dora", False):
        raise ValueError("use_dora: expected False; what DoRA changes in a weight is not of low rank")
    if is_decomposition(config.init_lora_weights):
        raise ValueError(
            "init_lora_weights: expected a start that leaves the weights as they are, got "
            f"{config.init_lora_weights!r}; HF PEFT's save_pretrained(path_initial_model_for_weight_conversion=...) "
            "makes a plain adapter of it"
        )


def with_task_heads(config: LoraConfig | AdaLoraConfig) -> LoraConfig | AdaLoraConfig:
    """config with the heads that HF PEFT adds to modules_to_save for a task."""
    saved = config.modules_to_save or []
    heads = [name for name in TASK_HEADS.get(str(config.task_type), ()) if name not in saved]
    return dataclasses.replace(config, modules_to_save=[*saved, *heads]) if heads else config


def _by_pattern(patterns: dict[str, Any], name: str, default: Any) -> Any:
    return next((value for pattern, value in patterns.items() if fits_pattern(pattern, name)), default)


def fits_pattern(pattern: str, name: str) -> bool:
    """Does a key of rank_pattern or alpha_pattern mean this layer? An ending, or a regular expression for one."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


# Fields of a PEFT config that say where it came from or how PEFT itself is to behave, not what is computed.
_PEFT_ONLY = {"peft_type", "auto_mapping", "peft_version", "revision", "inference_mode", "runtime_config"}
_CONFIGS: dict[str, type[LoraConfig] | type[AdaLoraConfig]] = {"LORA": LoraConfig, "ADALORA": AdaLoraConfig}


def with_default_targets(model: Any, config: LoraConfig | AdaLoraConfig) -> LoraConfig | AdaLoraConfig:
    """config with the target_modules that HF PEFT takes for this type of model, where it has None."""
    if config.target_modules is not None:
        return config
    try:
        from peft.utils import constants
    except ImportError as error:
        raise ValueError(
            'target_modules: expected names, a pattern or "all-linear"; None stands for HF PEFT\'s choice for the type '
            "of the model, and peft is not installed"
        ) from error
    method = "LORA" if isinstance(config, LoraConfig) else "ADALORA"
    table = getattr(constants, f"TRANSFORMERS_MODELS_TO_{method}_TARGET_MODULES_MAPPING")
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in table:
        raise ValueError(
            'target_modules: expected names, a pattern or "all-linear"; None stands for HF PEFT\'s choice for the type '
            f"of the model, and it has none for {kind!r}"
        )
    targets = table[kind]
    return dataclasses.replace(config, target_modules=targets if isinstance(targets, str) else list(targets))


def read_config(config: Any, default_targets: bool = False) -> LoraConfig | AdaLoraConfig:
    """Ours from ours, from a ``peft.LoraConfig`` or ``peft.AdaLoraConfig``, or from the dict of an adapter_config.json.
    default_targets: target_modules may be None (with_default_targets).

    Raises TypeError for anything else and ValueError for a PEFT option that would change the result and is not
    supported, so that nothing is silently ignored.
    """
    if isinstance(config, (LoraConfig, AdaLoraConfig)):
        return config
    if isinstance(config, dict):
        values, defaults = config, {}
    elif dataclasses.is_dataclass(config) and hasattr(config, "peft_type"):
        values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        defaults = {f.name: _default(f) for f in dataclasses.fields(config)}
    else:
        raise TypeError(
            f"config: expected a LoraConfig or an AdaLoraConfig, peftkern's or peft's, got {type(config).__name__}"
        )
    kind = getattr(values.get("peft_type"), "value", values.get("peft_type"))
    if kind not in _CONFIGS:
        raise ValueError(f"config.peft_type: expected {' or '.join(_CONFIGS)}, got {kind!r}")
    fields = {f.name for f in dataclasses.fields(_CONFIGS[kind])}
    for name, value in values.items():
        off = value in (None, False, "", [], {}, ()) or (name in defaults and value == defaults[name])
        if name not in fields and name not in _PEFT_ONLY and not off and not _harmless(kind, name):
            raise ValueError(f"config.{name}: expected its default, this option is not supported here; got {value!r}")
    if values.get("target_modules") is None and not default_targets:
        raise ValueError(
            'config.target_modules: expected names, a pattern or "all-linear", got None, with which HF PEFT chooses by '
            "the type of the model"
        )
    ours = {name: value for name, value in values.items() if name in fields and value is not None}
    ours.setdefault("target_modules", None)
    for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform"):
        if isinstance(ours.get(name), (set, tuple)):
            ours[name] = sorted(ours[name])
    if "task_type" in ours:
        ours["task_type"] = getattr(ours["task_type"], "value", ours["task_type"])
    if kind == "ADALORA" and isinstance(ours.get("rank_pattern"), dict):
        # that of a PEFT config in use has the adapter's name behind every key
        ours["rank_pattern"] = {
            re.sub(r"\.lora_E\..*$", ".lora_E", str(name)): present for name, present in ours["rank_pattern"].items()
        }
    return _CONFIGS[kind](**ours)


def _default(f: dataclasses.Field) -> Any:
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


def _harmless(kind: str, name: str) -> bool:
    """Options of a feature that is itself off: PEFT writes them with their defaults into every adapter_config.json."""
    if kind == "ADALORA" and name == "r":  # the field of LoraConfig, which AdaLoRA does not read
        return True
    # Whether a weight is [in, out] is seen in the layer; PEFT corrects a wrong value as well.
    return name in {"megatron_core", "loftq_config", "qalora_group_size", "fan_in_fan_out"}
