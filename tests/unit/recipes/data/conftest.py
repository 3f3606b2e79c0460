"""Tokenizers that the tests of data share."""

from __future__ import annotations

import pytest

from recipes.data.tokenizer import load_tokenizer
from tests.data_cases import EOS, FAMILIES, PAD, START, TEMPLATE, write_sentencepiece, write_tokenizer


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="session")
def plain(folder):
    return load_tokenizer(write_tokenizer(folder / "plain", eos_token=EOS, pad_token=PAD))


@pytest.fixture(scope="session")
def chat(folder):
    return load_tokenizer(write_tokenizer(folder / "chat", eos_token=EOS, chat_template=TEMPLATE))


@pytest.fixture(scope="session")
def families(folder):
    """By name, byte-level tokenizers with the chat templates of families."""
    special = {"eos_token": EOS, "bos_token": START}
    return {
        name: load_tokenizer(write_tokenizer(folder / name, chat_template=template, **special))
        for name, template in FAMILIES.items()
    }


@pytest.fixture(scope="session")
def sentencepiece(folder):
    return load_tokenizer(write_sentencepiece(folder / "sentencepiece"))
