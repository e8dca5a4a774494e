# SPDX-License-Identifier: Apache-2.0
"""transformers.Trainer and TRL's SFTTrainer, unchanged, on our adapters and on HF PEFT's over NF4Linear."""

import os

import pytest
import torch
from samples import BF16, F32
from torch import nn

import peftkern
from peftkern import LoraConfig, LoRALinear, NF4Config, NF4Linear

transformers = pytest.importorskip("transformers", minversion="5.23")
pytest.importorskip("accelerate")
from test_transformers import load, save, tiny_llama  # noqa: E402

os.environ["HF_HUB_OFFLINE"] = "1"
TEXT = "the quick brown fox jumps over the lazy dog and then it sleeps in the warm sun "
WORDS = sorted(set(TEXT.split()))
BASES = pytest.mark.parametrize("base", ["dense", "nf4"])
CHECKPOINTING = pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])


class Batches(torch.utils.data.Dataset):
    """The same sentence from different words on: learnt within a few steps."""

    def __len__(self):
        return 32

    def __getitem__(self, i):
        ids = torch.tensor([WORDS.index(w) + 3 for w in (TEXT * 3).split()[i % 7 :][:16]])
        return {"input_ids": ids, "labels": ids}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # Weights large enough that a frozen random head lets adapters alone learn something.
    return save(tiny_llama(initializer_range=0.15), tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def base_model(folder, base):
    return load(folder, NF4Config(double_quant=True) if base == "nf4" else None)


def ours(folder, base, **options):
    model = base_model(folder, base)
    torch.manual_seed(3)
    return peftkern.adapt(model, LoraConfig(**{"r": 4, "lora_alpha": 16} | options))


def arguments(folder, kind=transformers.TrainingArguments, **options):
    defaults = {
        "output_dir": str(folder), "max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 2e-2,
        "lr_scheduler_type": "constant", "report_to": "none", "use_cpu": True, "logging_steps": 1,
        "disable_tqdm": True, "save_strategy": "no", "bf16": True,
    }  # fmt: skip
    return kind(**(defaults | options))


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def frozen(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}


def train_and_check(trainer, before):
    """The loss falls, every adapter gets gradients and moves, and nothing else changes."""
    adapters = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert adapters and all("lora_" in name for name in adapters)
    trainer.train()
    curve = losses(trainer)
    assert curve[-1] < 0.6 * curve[0], curve
    after = dict(trainer.model.named_parameters())
    assert all(not torch.equal(after[name], p) for name, p in adapters.items())
    assert all(torch.equal(after[name], p) for name, p in before.items())
    return curve


@BASES
@CHECKPOINTING
def test_trainer_with_our_adapters(folder, tmp_path, base, checkpointing):
    model = ours(folder, base, lora_dropout=0.05)
    assert any(isinstance(m, LoRALinear) and (m.nf4_config is not None) == (base == "nf4") for m in model.modules())
    before = frozen(model)
    trainer = transformers.Trainer(
        model, arguments(tmp_path, gradient_checkpointing=checkpointing), train_dataset=Batches()
    )
    train_and_check(trainer, before)


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_trainer_with_peft_over_nf4(folder, tmp_path, method):
    """PEFT takes NF4Linear for the nn.Linear that it is; prepare() before, as for bitsandbytes."""
    peft = pytest.importorskip("peft")
    model = peftkern.prepare(base_model(folder, "nf4"))
    if method == "lora":
        config = peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    else:
        config = peft.AdaLoraConfig(
            init_r=6, target_r=4, total_step=8, tinit=1, tfinal=2, lora_alpha=16, target_modules="all-linear",
            task_type="CAUSAL_LM",
        )  # fmt: skip
    model = peft.get_peft_model(model, config)
    wrapped = [m for m in model.modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)]
    assert len(wrapped) == 14 and all(type(m.base_layer) is NF4Linear for m in wrapped)
    assert all(p.dtype == F32 for p in model.parameters() if p.requires_grad)
    before = frozen(model)
    options = {}
    trainer = transformers.Trainer(
        model, arguments(tmp_path, gradient_checkpointing=True, **options), train_dataset=Batches()
    )
    if method == "adalora":
        trainer.train()
        assert losses(trainer)[-1] < losses(trainer)[0]
    else:
        train_and_check(trainer, before)
    model.save_pretrained(tmp_path / "adapter")
    reloaded = peft.PeftModel.from_pretrained(base_model(folder, "nf4"), tmp_path / "adapter")
    for name, p in model.named_parameters():
        if "lora_" in name and p.requires_grad:
            assert torch.equal(reloaded.get_parameter(name), p), name


def test_peft_and_our_adapters_train_alike(folder, tmp_path):
    """The same start, the same data: the curves agree to what the order of bfloat16 roundings leaves."""
    peft = pytest.importorskip("peft")
    theirs = base_model(folder, "nf4")
    theirs = peft.get_peft_model(
        theirs, peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    theirs.save_pretrained(tmp_path / "start")
    mine = peftkern.load_adapter(base_model(folder, "nf4"), tmp_path / "start")
    curves = []
    for model in (theirs, mine):
        for name, p in model.named_parameters():
            p.requires_grad_("lora_" in name)
        trainer = transformers.Trainer(
            model, arguments(tmp_path, learning_rate=5e-3, bf16=False), train_dataset=Batches()
        )
        trainer.train()
        curves.append(losses(trainer))
    assert curves[0] == pytest.approx(curves[1], rel=2e-2)


def test_peft_refuses_to_merge_into_nf4(folder):
    """Loudly: a dense update does not fit packed weights. peftkern.merge requantizes instead."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(base_model(folder, "nf4"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(RuntimeError):
        model.merge_and_unload()


@BASES
def test_resuming_from_a_trainer_checkpoint(folder, tmp_path, base):
    options = {"save_strategy": "steps", "save_steps": 4}

    def run(resume):
        trainer = transformers.Trainer(
            ours(folder, base, lora_dropout=0.05), arguments(tmp_path, **options), train_dataset=Batches()
        )
        trainer.train(resume_from_checkpoint=resume)
        return losses(trainer)

    whole = run(None)
    assert run(str(tmp_path / "checkpoint-4"))[-4:] == whole[-4:]


@BASES
@pytest.mark.parametrize("adapters", ["ours", "peft"])
def test_sft_trainer(folder, tmp_path, tokenizer, base, adapters):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    texts = [" ".join((TEXT * 3).split()[i % 7 :][:16]) for i in range(32)]
    peft_config = None
    if adapters == "peft":
        peft = pytest.importorskip("peft")
        model = base_model(folder, base)
        peft_config = peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    else:
        model = ours(folder, base)
    trainer = trl.SFTTrainer(
        model,
        arguments(tmp_path, trl.SFTConfig, max_length=32),
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    assert trainer.args.gradient_checkpointing, "TRL's default, and so a part of this test"
    train_and_check(trainer, frozen(trainer.model))
    trainer.save_model(str(tmp_path / "saved"))
    if adapters == "ours":
        peftkern.save_adapter(trainer.model, tmp_path / "adapter")
        again = peftkern.load_adapter(base_model(folder, base), tmp_path / "adapter")
        state = dict(trainer.model.named_parameters())
        assert all(torch.equal(state[n], p) for n, p in again.named_parameters() if "lora_" in n)


def test_sft_trainer_loads_the_model_itself(folder, tmp_path, tokenizer):
    """A path and quantization_config, as TRL's own command line passes them."""
    trl, datasets, peft = (pytest.importorskip(name) for name in ("trl", "datasets", "peft"))
    trainer = trl.SFTTrainer(
        str(folder),
        arguments(tmp_path, trl.SFTConfig, max_length=32, max_steps=2),
        train_dataset=datasets.Dataset.from_dict({"text": [TEXT] * 8}),
        processing_class=tokenizer,
        quantization_config=NF4Config(),
        peft_config=peft.LoraConfig(target_modules="all-linear"),
    )
    assert sum(isinstance(m, NF4Linear) for m in trainer.model.modules()) == 14
    trainer.train()
    assert len(losses(trainer)) == 2


@pytest.mark.slow
def test_sft_trainer_on_smollm2(tmp_path):
    """The model that the demo fine-tunes, from the package that carries it."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    pytest.importorskip("gguf")
    from peftkern.finetune import model as models
    from peftkern.finetune.errors import FinetuneError

    try:
        source = models.find_model(None)
    except FinetuneError as error:
        pytest.skip(str(error))
    base = models.load_base(source, "bf16", torch.device("cpu"))
    model = peftkern.adapt(peftkern.prepare(base, upcast="none"), LoraConfig(r=8), quantize="nf4")
    trainer = trl.SFTTrainer(
        model,
        arguments(
            tmp_path, trl.SFTConfig, max_length=16, max_steps=3, learning_rate=5e-3, per_device_train_batch_size=1
        ),
        train_dataset=datasets.Dataset.from_dict({"text": [TEXT] * 4}),
        processing_class=models.load_tokenizer(source),
    )
    trainer.train()
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]


# ---- prepare --------------------------------------------------------------------------------------------------------


def test_prepare_casts_as_peft_does(folder):
    peft = pytest.importorskip("peft")
    mine, theirs = peftkern.prepare(base_model(folder, "nf4")), base_model(folder, "nf4")
    theirs = peft.prepare_model_for_kbit_training(theirs)
    for (name, a), (_, b) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b) and not a.requires_grad, name
    assert {p.dtype for p in mine.parameters()} == {torch.uint8, F32}


def test_prepare_turns_on_checkpointing(folder):
    model = peftkern.prepare(base_model(folder, "nf4"))
    calls = []
    peftkern.adapt(model, LoraConfig(r=2)).train()
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert len(calls) == 2, "once forward, once recomputed"
    off = peftkern.prepare(base_model(folder, "nf4"), use_gradient_checkpointing=False)
    assert not any(getattr(m, "gradient_checkpointing", False) for m in off.modules())


def test_prepare_norms_only(folder):
    model = peftkern.prepare(base_model(folder, "nf4"), upcast="norms")
    kinds = {n: p.dtype for n, p in model.named_parameters() if p.is_floating_point()}
    assert kinds and all((dtype == F32) == ("norm" in name) for name, dtype in kinds.items())
    same = peftkern.prepare(base_model(folder, "nf4"), upcast="none")
    assert all(p.dtype in (BF16, torch.uint8) for p in same.parameters())
    with torch.autocast("cpu", BF16):
        assert torch.isfinite(model(torch.arange(8)[None]).logits).all()


def test_prepare_errors(folder):
    with pytest.raises(ValueError, match="upcast: expected one of"):
        peftkern.prepare(base_model(folder, "dense"), upcast="some")
    with pytest.raises(ValueError, match="model: expected one without adapters"):
        peftkern.prepare(ours(folder, "nf4"))
    with pytest.raises(ValueError, match="a Linear has no gradient_checkpointing_enable; pass False"):
        peftkern.prepare(nn.Linear(4, 4))


@BASES
@pytest.mark.parametrize("kind", ["trainer", "sft"])
def test_adalora_in_both_trainers(folder, tmp_path, tokenizer, base, kind):
    """The allocator is hooked onto the optimizer that the trainer is given."""
    config = peftkern.AdaLoraConfig(init_r=6, target_r=3, total_step=8, tinit=1, tfinal=3, lora_alpha=16)
    model = peftkern.adapt(base_model(folder, base), config)
    before = frozen(model)
    optimizer = torch.optim.AdamW(peftkern.trainable_parameters(model), lr=2e-2)
    allocator = peftkern.RankAllocator(model, optimizer=optimizer)
    if kind == "trainer":
        trainer = transformers.Trainer(
            model, arguments(tmp_path), train_dataset=Batches(), optimizers=(optimizer, None)
        )
    else:
        trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
        trainer = trl.SFTTrainer(
            model,
            arguments(tmp_path, trl.SFTConfig, max_length=32),
            train_dataset=datasets.Dataset.from_dict({"text": [TEXT] * 32}),
            processing_class=tokenizer,
            optimizers=(optimizer, None),
        )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert allocator.step == 8 and sum(allocator.ranks().values()) <= 3 * 14
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in before.items())
    peftkern.save_adapter(model, tmp_path / "adapter", drop_masked=False)
    again = peftkern.load_adapter(base_model(folder, base), tmp_path / "adapter")
    state = dict(model.named_parameters())
    assert all(torch.equal(state[n], p) for n, p in again.named_parameters() if "lora_" in n)
