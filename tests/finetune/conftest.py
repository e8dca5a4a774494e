# SPDX-License-Identifier: Apache-2.0
"""A tiny random Llama for the tests of `peftkern finetune`. Imports what may be missing only when it is used."""

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two threads on work this small only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
