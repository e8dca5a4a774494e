# SPDX-License-Identifier: Apache-2.0
"""Devices, instruction sets, and the one tolerance table."""

import pytest
import torch

import peftkern
from peftkern.ops.library import ops

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() and ops.cuda_archs() else [])
ISAS = ops.cpu_isas()

# Largest error relative to the largest magnitude of the reference: a few roundings of the output dtype, over sums whose
# length these tests keep below about 1000. fp32 sums in fp32; 16-bit results are rounded at most three times.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}


@pytest.fixture(autouse=True)
def same_start():
    """A fixed seed, and afterwards no choice that a test has forced."""
    torch.manual_seed(0)
    yield
    peftkern.set_cpu_isa("")
    peftkern.autotune(False)
    ops.forget_timed_products()
    ops.set_product("forward", "")
    ops.set_product("gradient", "")


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(params=ISAS)
def isa(request):
    """Runs the test once for each instruction set of this machine."""
    peftkern.set_cpu_isa(request.param)
    return request.param


@pytest.fixture
def threads():
    """A function that sets the number of threads; the old one comes back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread():
    """Two threads on work this small only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, what: str = "", slack: float = 1.0):
    """got against an fp64 reference, by the table above; says where the largest error is."""
    assert tuple(got.shape) == tuple(expected.shape), f"{what}: shape {tuple(got.shape)} != {tuple(expected.shape)}"
    if not got.numel():
        return
    error = (got.detach().double().cpu() - expected.detach().double().cpu()).abs()
    scale = expected.detach().double().abs().max().item() or 1.0
    worst = error.max().item() / scale
    limit = TOLERANCE[dtype] * slack
    where = torch.unravel_index(error.argmax(), error.shape)
    assert worst <= limit, (
        f"{what}: error {worst:.2e} > {limit:.1e} of the largest value, at {tuple(int(i) for i in where)}: "
        f"got {got[where].item():.6g}, expected {expected[where].item():.6g}"
    )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    """A Hugging Face folder with a random two-layer Llama and a byte-level tokenizer with a chat template."""
    from finetune_runs import CHAT_TEMPLATE, SENTENCES
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    bpe = ByteLevelBPETokenizer()
    specials = ["<|eos|>", "<|start|>", "<|end|>"]
    bpe.train_from_iterator(SENTENCES, vocab_size=320, show_progress=False, special_tokens=specials)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|eos|>", additional_special_tokens=specials[1:]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=0, bos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer(tiny):
    from peftkern.finetune import model as finetune_model

    return finetune_model.load_tokenizer(finetune_model.find_model(tiny))
