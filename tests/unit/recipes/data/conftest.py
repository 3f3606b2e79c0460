"""Tokenizers and files with media that the tests of data share."""

from __future__ import annotations

import json

import pytest

from recipes.data.tokenizer import load_tokenizer
from tests.data_cases import EOS, FAMILIES, PAD, START, TEMPLATE, write_sentencepiece, write_tokenizer
from tests.unit.recipes.data.clip_cases import write_clip
from tests.unit.recipes.data.media_row_cases import MEDIA_TEMPLATE, picture
from tools.make_word_problems import train_tokenizer


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


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Files of rows: a.png .. d.png of one grey each, wide.png, clip.mp4 of 20 frames in 2.5 seconds, tall.mp4."""
    found = tmp_path_factory.mktemp("media")
    for number, name in enumerate("abcd"):
        picture(found / f"{name}.png", grey=40 + 50 * number)
    picture(found / "wide.png", 16, 64)
    write_clip(found / "clip.mp4", 20, size=(32, 48))
    write_clip(found / "tall.mp4", 6, size=(64, 32))
    (found / "broken.mp4").write_bytes((found / "clip.mp4").read_bytes()[:-700])
    return found


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """A tokenizer with the tokens of media."""
    found = tmp_path_factory.mktemp("seeing")
    special = ("<video>", "<|image_pad|>", "<|see|>", "<|end|>")
    train_tokenizer(found, ["see which of a and user: assistant: yes 0.6 1.8 seconds <>\n"], 300, special=special)
    config = json.loads((found / "tokenizer_config.json").read_text())
    (found / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": MEDIA_TEMPLATE}))
    return load_tokenizer(found)


@pytest.fixture
def clip(tmp_path):
    """A film of 20 frames in this test's folder."""
    write_clip(tmp_path / "clip.mp4", 20)
    return tmp_path / "clip.mp4"
