"""Real tokenizers, trained here."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = ["Question: what is 2 and 3? Answer: 5", "user assistant system : hello there"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:\n{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)


def make_tokenizer(folder, **config):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", **config})
    )
    return str(folder)


@pytest.fixture(scope="session")
def tokenizers_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    make_tokenizer(root / "plain", eos_token="<eos>")
    make_tokenizer(root / "chat", eos_token="<eos>", chat_template=TEMPLATE)
    make_tokenizer(root / "no_eos")
    return root
