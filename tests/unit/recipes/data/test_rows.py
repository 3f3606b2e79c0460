"""Tokenizers, JSONL rows and the order of the data, on real files."""

from __future__ import annotations

import json
import logging
import random
import re

import pytest

from recipes.data.rows import load_pairs, load_prompts, read_jsonl
from recipes.data.sampler import EpochSampler
from recipes.data.tokenizer import DataError, load_tokenizer

EOS, PAD, START = "<eos>", "<pad>", "<start>"
TEXTS = ["what is 1 + 2 ? it is 3", "the quick brown fox", "user assistant system"] * 3
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots\nhere') }}{% endif %}"
    "<start>{{ m.role }}:{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}<start>assistant:{% endif %}"
)
# Writes something into its generation prompt that is not there once the assistant has spoken.
FORGETFUL = TEMPLATE.replace("assistant:", "assistant:the")
# Ends its generation prompt with a space, which is a token there, and part of the first one of a response.
MERGING = TEMPLATE.replace(":", " ")
USER, ANSWER = {"role": "user", "content": "what is 1 + 2 ?"}, {"role": "assistant", "content": "it is 3"}


def write_tokenizer(folder, around="", **config):
    """A byte-level BPE tokenizer with a folder's files, and a truncation that must not apply.

    Args:
        around: what it puts around a text of its own, such as "<start> $A".
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=[EOS, PAD, START], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.enable_truncation(4)
    if around:
        special = [(token, tokenizer.token_to_id(token)) for token in (EOS, START)]
        tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=special)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config})
        )
    return folder


def write_words(folder, vocabulary, *added):
    """A tokenizer of whole words, with "?" for unknown ones."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(EOS, special=True), *(AddedToken(a, special=True) for a in added)])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def plain(folder):
    return load_tokenizer(write_tokenizer(folder / "plain", eos_token=EOS, pad_token=PAD))


@pytest.fixture(scope="module")
def chat(folder):
    return load_tokenizer(write_tokenizer(folder / "chat", eos_token=EOS, chat_template=TEMPLATE))


def write_rows(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def refused(function, *arguments) -> str:
    with pytest.raises(DataError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Tokenizer


def test_encode_and_decode_are_inverse_and_ignore_truncation(plain):
    text = "what is 1 + 2 ?  it is 3 , naïve 漢 ."
    ids = plain.encode(text)
    assert len(ids) > 4 and all(type(i) is int for i in ids)
    assert plain.decode(ids) == text
    assert plain.decode([*ids, plain.eos_id, plain.pad_id]) == text
    assert plain.encode("") == []


def test_special_ids_and_size(plain, chat, folder):
    assert (plain.eos_id, plain.pad_id) == (0, 1)
    assert chat.pad_id == chat.eos_id == 0, "without a padding token the end token pads"
    entries = json.loads((folder / "plain" / "tokenizer.json").read_text())["model"]["vocab"]
    assert plain.vocab_size == len(entries) == 1 + max(entries.values())
    assert str(plain.path) == str(folder / "plain")


def test_added_tokens_count_and_so_do_gaps(folder):
    words = load_tokenizer(write_words(folder / "gap", {EOS: 0, "fox": 1, "?": 9}, "<extra>"))
    (extra,) = words.encode("<extra>")
    assert words.encode("fox cat") == [1, 9]
    assert words.vocab_size == 1 + max(9, extra)


def test_bare_file_reads_the_config_beside_it(plain, folder):
    tokenizer = load_tokenizer(folder / "plain" / "tokenizer.json")
    assert (tokenizer.eos_id, tokenizer.pad_id) == (plain.eos_id, plain.pad_id)
    assert tokenizer.encode("the fox") == plain.encode("the fox")


@pytest.mark.parametrize(
    ("around", "front"),
    [("", ()), ("<start> $A", (2,)), ("<start> $A <eos>", (2,)), ("$A <eos>", ()), ("<eos> $A", (0,))],
)
def test_a_prompt_begins_as_the_tokenizer_begins_a_text(tmp_path, around, front):
    """Whatever it ends a text with; a response and a conversation get nothing."""
    options = {"eos_token": EOS, "bos_token": START, "chat_template": TEMPLATE}
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer", around, **options))
    plain = load_tokenizer(write_tokenizer(tmp_path / "plain", **options))
    text, answer = "the quick", "brown fox"
    theirs = tokenizer._tokenizer(text)["input_ids"]
    alone = plain.encode(text)
    assert tokenizer.encode(text) == alone and tokenizer.encode_prompt("") == []
    assert tokenizer.encode_prompt(text) == [*front, *alone] == theirs[: len(front) + len(alone)]
    path = write_rows(tmp_path / "a.jsonl", {"prompt": text, "response": answer}, {"messages": [USER, ANSWER]})
    first, talk = load_pairs(path, tokenizer, 1000)
    assert first.prompt.tokens == (*front, *alone) and first.response == (*plain.encode(answer), 0)
    assert talk == load_pairs(path, plain, 1000)[1]
    path = write_rows(tmp_path / "b.jsonl", {"prompt": text}, {"messages": [USER]})
    assert [p.tokens for p in load_prompts(path, tokenizer, 1000)] == [
        (*front, *alone),
        tuple(plain.encode_chat([USER], True)),
    ]
    path = write_rows(tmp_path / "c.jsonl", {"prompt": ""})
    assert refused(load_prompts, path, tokenizer, 1000) == f"{path}:1: prompt is empty; fill it or remove the row"


def test_without_eos_the_remedy_is_named(folder):
    place = write_tokenizer(folder / "bare")
    for path in (place, place / "tokenizer.json"):
        message = refused(load_tokenizer, path)
        assert "no eos_token" in message and "tokenizer_config.json" in message and EOS in message


def test_saved_copy_is_the_same(chat, tmp_path):
    chat.save(tmp_path / "copy")
    copy = load_tokenizer(tmp_path / "copy")
    assert copy.encode_chat([USER], True) == chat.encode_chat([USER], True)
    assert (copy.eos_id, copy.vocab_size) == (chat.eos_id, chat.vocab_size)
    assert (tmp_path / "copy" / "tokenizer.json").is_file()


def test_what_is_not_a_tokenizer(tmp_path):
    assert "does not exist" in refused(load_tokenizer, tmp_path / "nowhere")
    assert "does not exist" in refused(load_tokenizer, "./nowhere")
    assert "does not exist" in refused(load_tokenizer, "runs/sft/checkpoints/final")
    assert "cannot load tokenizer" in refused(load_tokenizer, tmp_path), "an empty folder"
    broken = tmp_path / "tokenizer.json"
    broken.write_text("{")
    assert "cannot load tokenizer" in refused(load_tokenizer, broken)
    # Not a possible name on the hub, so that nothing is asked of it.
    assert "no local folder" in refused(load_tokenizer, "no such tokenizer")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"num_attention_heads": 5},
            r"The hidden size \(32\) is not a multiple of the number of attention heads \(5\)",
        ),
        ({"hidden_size": "32"}, "Field 'hidden_size' expected int, got str"),
        ({"dtype": "bflaot16"}, "no attribute 'bflaot16'"),
    ],
)
def test_a_model_config_beside_it_is_named_where_it_is_at_fault(tmp_path, changes, words):
    place = write_tokenizer(tmp_path / "tokenizer", eos_token=EOS)
    path = place / "config.json"
    path.write_text(json.dumps({"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4} | changes))
    message = refused(load_tokenizer, place)
    assert message.startswith(f"{path}: transformers refuses it: ") and re.search(words, message)
    path.write_text(json.dumps({"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4}))
    load_tokenizer(place)
    (place / "tokenizer.json").write_text("{")
    assert "cannot load tokenizer" in refused(load_tokenizer, place)


def test_chat_template(plain, chat):
    ids = chat.encode_chat([USER], True)
    assert ids[0] == 2 and all(type(i) is int for i in ids)
    assert chat.decode(ids) == "user:what is 1 + 2 ?assistant:"
    assert chat.encode_chat([USER], False) == ids[: ids.index(0) + 1]
    assert "no chat template" in refused(plain.encode_chat, [USER], True)
    assert "no robots here" in refused(chat.encode_chat, [{"role": "robot", "content": "x"}], True)


# JSONL


def test_rows_skip_blank_lines_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n   \n{"a": "\xc3\xa9"}')
    assert read_jsonl(path) == [{"a": 1}, {"a": "é"}]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"a": 1}\n\n{"a": \n', ["rows.jsonl:3:", "one JSON object"]),
        (b'{"a": 1}\n[1, 2]\n', ["rows.jsonl:2:", "a list"]),
        (b'{"a": 1}\n"text"\n', ["rows.jsonl:2:", "a string"]),
        (b"null\n", ["rows.jsonl:1:", "null"]),
        (b'{"a": 1}\n{"a": "\xff"}\n', ["rows.jsonl:2:", "UTF-8"]),
        (b'{"a": 1}\n{"a": ' + b"9" * 5000 + b"}\n", ["rows.jsonl:2:", "digits"]),
        (b"[" * 200_000 + b"\n", ["rows.jsonl:1:", "recursion"]),
        (b'[\n  {"a": 1}\n]\n', ["rows.jsonl:1:", "each line"]),
        (b"", ["rows.jsonl", "empty"]),
        (b"\n  \n", ["rows.jsonl", "empty"]),
    ],
)
def test_bad_files_name_the_line(tmp_path, content, words):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    message = refused(read_jsonl, path)
    for word in words:
        assert word in message, message


def test_files_that_cannot_be_read(tmp_path):
    assert "nowhere.jsonl" in refused(read_jsonl, tmp_path / "nowhere.jsonl")
    assert "folder" in refused(read_jsonl, tmp_path)


# Prompts


def test_prompts_keep_row_and_line(tmp_path, chat):
    path = write_rows(
        tmp_path / "a.jsonl",
        {"prompt": "the fox", "answer": 3},
        "",
        {"messages": [USER], "prompt": None, "level": "easy"},
    )
    first, second = load_prompts(path, chat, 100)
    assert first.tokens == tuple(chat.encode("the fox"))
    assert first.row["answer"] == 3 and first.line == 1
    assert second.tokens == tuple(chat.encode_chat([USER], True))
    assert second.row["level"] == "easy" and second.line == 3
    with pytest.raises(AttributeError):
        first.line = 2


BAD_PROMPTS = {
    "neither": ({"text": "x"}, ["neither prompt nor messages", "text"]),
    "both": ({"prompt": "x", "messages": [USER]}, ["both"]),
    "null": ({"prompt": None}, ["neither"]),
    "number": ({"prompt": 3}, ["prompt must be a string", "a number"]),
    "conversation as prompt": ({"prompt": [USER]}, ["prompt must be a string", "messages"]),
    "empty": ({"prompt": ""}, ["prompt is empty"]),
    "surrogate": ('{"prompt": "\\ud800"}', ["surrogate"]),
    "messages not a list": ({"messages": "hi"}, ["messages must be a list", "a string"]),
    "no messages": ({"messages": []}, ["messages is empty"]),
    "message not an object": ({"messages": [USER, "x"]}, ["messages[1]", "a string"]),
    "no role": ({"messages": [{"content": "x"}]}, ["messages[0] has no role"]),
    "no content": ({"messages": [{"role": "user"}]}, ["messages[0] has no content"]),
    "content not text": ({"messages": [{"role": "user", "content": None}]}, ["messages[0].content", "null"]),
    "empty content": ({"messages": [{"role": "user", "content": ""}]}, ["messages[0]", "empty"]),
    "assistant last": ({"messages": [USER, ANSWER]}, ["assistant"]),
    "template refuses": ({"messages": [{"role": "robot", "content": "x"}]}, ["no robots"]),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_bad_prompts_name_the_line(tmp_path, chat, name):
    row, words = BAD_PROMPTS[name]
    path = write_rows(tmp_path / "a.jsonl", {"prompt": "fine"}, "", row)
    message = refused(load_prompts, path, chat, 100)
    assert message.startswith(f"{path}:3: ")
    for word in words:
        assert word in message, message


def test_prompt_length_limit(tmp_path, plain):
    tokens = len(plain.encode("the quick brown fox"))
    path = write_rows(tmp_path / "a.jsonl", {"prompt": "the quick brown fox"})
    assert len(load_prompts(path, plain, tokens)) == 1
    message = refused(load_prompts, path, plain, tokens - 1)
    assert (
        f"{tokens} tokens" in message and f"data.max_prompt_length={tokens - 1}" in message and "a.jsonl:1" in message
    )


def test_messages_without_a_template_name_the_line(tmp_path, plain):
    path = write_rows(tmp_path / "a.jsonl", {"messages": [USER]})
    message = refused(load_prompts, path, plain, 100)
    assert "a.jsonl:1" in message and "no chat template" in message


def test_a_prompt_that_encodes_to_nothing(tmp_path, folder):
    words = load_tokenizer(write_words(folder / "words", {EOS: 0, "fox": 1, "?": 2}))
    assert words.encode("fox dog") == [1, 2]
    path = write_rows(tmp_path / "a.jsonl", {"prompt": "  \t"})
    message = refused(load_prompts, path, words, 100)
    assert "a.jsonl:1" in message and "no token" in message


# Pairs


def test_pairs_end_with_eos_once(tmp_path, plain):
    path = write_rows(
        tmp_path / "a.jsonl", {"prompt": "the ", "response": "fox"}, {"prompt": "the ", "response": f"fox{EOS}"}
    )
    first, second = load_pairs(path, plain, 100)
    assert first.prompt.tokens == tuple(plain.encode("the "))
    assert first.response == (*plain.encode("fox"), plain.eos_id)
    assert second.response == first.response and (first.prompt.line, second.prompt.line) == (1, 2)


def test_conversations_are_cut_at_the_last_answer(tmp_path, chat):
    talk = [{"role": "system", "content": "the quick"}, USER, ANSWER, USER, ANSWER]
    (pair,) = load_pairs(write_rows(tmp_path / "a.jsonl", {"messages": talk}), chat, 1000)
    assert pair.prompt.tokens + pair.response == tuple(chat.encode_chat(talk, False))
    assert pair.prompt.tokens == tuple(chat.encode_chat(talk[:-1], True))
    assert chat.decode(pair.response) == "it is 3" and pair.response[-1] == chat.eos_id


BAD_PAIRS = {
    "no response": ({"prompt": "x", "answer": "3"}, ["no response"]),
    "empty response": ({"prompt": "x", "response": ""}, ["response is empty"]),
    "response not text": ({"prompt": "x", "response": 3}, ["response must be a string", "a number"]),
    "empty prompt": ({"prompt": "", "response": "x"}, ["prompt is empty"]),
    "neither": ({"response": "x"}, ["neither prompt nor messages"]),
    "user last": ({"messages": [USER]}, ["must be the assistant's", "user"]),
    "only the assistant": ({"messages": [ANSWER]}, ["at least one message before"]),
    "empty answer": ({"messages": [USER, {"role": "assistant", "content": ""}]}, ["messages[1]", "empty"]),
}


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_bad_pairs_name_the_line(tmp_path, chat, name):
    row, words = BAD_PAIRS[name]
    path = write_rows(tmp_path / "a.jsonl", {"prompt": "fine", "response": "fine"}, row)
    message = refused(load_pairs, path, chat, 100)
    assert message.startswith(f"{path}:2: ")
    for word in words:
        assert word in message, message


def test_pair_length_limit_counts_eos(tmp_path, plain):
    prompt, response = len(plain.encode("the ")), len(plain.encode("fox")) + 1
    path = write_rows(tmp_path / "a.jsonl", {"prompt": "the ", "response": "fox"})
    assert len(load_pairs(path, plain, prompt + response)) == 1
    message = refused(load_pairs, path, plain, prompt + response - 1)
    assert f"{prompt} + {response} tokens" in message
    assert f"model.encoder_seq_length={prompt + response - 1}" in message


@pytest.mark.parametrize("template", [FORGETFUL, MERGING], ids=["forgetful", "merging"])
def test_a_template_that_does_not_continue_its_generation_prompt(tmp_path, template):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer", eos_token=EOS, chat_template=template))
    message = refused(load_pairs, write_rows(tmp_path / "a.jsonl", {"messages": [USER, ANSWER]}), tokenizer, 100)
    assert "a.jsonl:1" in message and "generation prompt" in message


def ended_by(tmp_path, caplog, template, load, row) -> list[str]:
    """What is said of a template while such rows are read twice."""
    options = {"eos_token": EOS, "chat_template": template}
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer", **options))
    path = write_rows(tmp_path / "rows.jsonl", row, row)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert len(load(path, tokenizer, 1000)) == 2
    return [record.getMessage() for record in caplog.records if record.name == "recipes.data.tokenizer"]


READERS = [(load_prompts, {"messages": [USER]}), (load_pairs, {"messages": [USER, ANSWER]})]


@pytest.mark.parametrize(("load", "row"), READERS)
def test_a_template_that_ends_with_another_token_is_said_once(tmp_path, caplog, load, row):
    (said,) = ended_by(tmp_path, caplog, TEMPLATE.replace("<eos>", "<pad>"), load, row)
    assert said == (
        f"the chat template of {tmp_path / 'tokenizer'} ends a response with '<pad>', sampling stops at its eos_token '<eos>' "
        'alone, which such responses never contain: set "eos_token": "<pad>" in tokenizer_config.json of its folder (or of a '
        "copy that model.tokenizer names)"
    )


@pytest.mark.parametrize(("load", "row"), READERS)
def test_a_template_that_ends_with_nothing_is_said_once(tmp_path, caplog, load, row):
    (said,) = ended_by(tmp_path, caplog, TEMPLATE.replace("<eos>", ";"), load, row)
    assert "ends a response with no special token" in said
    assert "write '<eos>' behind the assistant's content in its chat template" in said


@pytest.mark.parametrize(("load", "row"), [*READERS, (load_prompts, {"prompt": "the fox"})])
def test_a_template_that_ends_with_the_end_token_is_not_spoken_of(tmp_path, caplog, load, row):
    template = TEMPLATE if "messages" in row else TEMPLATE.replace("<eos>", "<pad>")
    assert ended_by(tmp_path, caplog, template, load, row) == []


# EpochSampler


def draw(sampler, batches):
    return [sampler.next() for _ in range(batches)]


@pytest.mark.parametrize(("count", "batch"), [(10, 4), (12, 4), (3, 8), (1, 2), (7, 7)])
def test_every_epoch_draws_every_index_once(count, batch):
    drawn = [i for b in draw(EpochSampler(count, batch, seed=3, rank=0, world=1), 5 * count) for i in b]
    assert len(drawn) == 5 * count * batch
    epochs = [drawn[i : i + count] for i in range(0, len(drawn), count)]
    assert all(sorted(e) == list(range(count)) for e in epochs)
    if count > 5:
        assert len({tuple(e) for e in epochs}) > 1, "the order must change between epochs"


def test_ranks_share_one_order():
    whole = draw(EpochSampler(50, 12, 1, 0, 1), 20)
    parts = [draw(EpochSampler(50, 12, 1, rank, 4), 20) for rank in range(4)]
    assert [sum(step, []) for step in zip(*parts, strict=True)] == whole


def test_the_seed_decides():
    one, same, other = (draw(EpochSampler(50, 10, seed, 0, 1), 10) for seed in (1, 1, 2))
    assert one == same != other


def test_position_comes_back_on_any_number_of_ranks():
    steps = random.SystemRandom().randrange(1, 40)
    sampler = EpochSampler(17, 6, 5, 0, 1)
    draw(sampler, steps)
    state = json.loads(json.dumps(sampler.state_dict()))
    rest = draw(sampler, 10)
    ranks = [EpochSampler(17, 6, 5, rank, 2) for rank in range(2)]
    for rank in ranks:
        draw(rank, 3)
        rank.load_state_dict(state)
    assert [a + b for a, b in zip(*(draw(r, 10) for r in ranks), strict=True)] == rest, f"after {steps} steps"


def test_sampler_refuses():
    with pytest.raises(ValueError, match=re.escape("batch=10")) as caught:
        EpochSampler(50, 10, 1, 0, 4)
    assert "world=4" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="0 rows"):
        EpochSampler(0, 10, 1, 0, 1)
    state = EpochSampler(50, 10, 1, 0, 1).state_dict()
    with pytest.raises(ValueError, match="count=50.*count=51"):
        EpochSampler(51, 10, 1, 0, 1).load_state_dict(state)
    with pytest.raises(ValueError, match="seed=1.*seed=2"):
        EpochSampler(50, 10, 2, 0, 1).load_state_dict(state)
