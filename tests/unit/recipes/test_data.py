"""Files in, tokens out, and every bad row named by file and line."""

import json

import pytest
import torch

from recipes.data import DataError, EpochSampler, load_pairs, load_prompts, load_tokenizer, read_jsonl


@pytest.fixture(scope="session")
def plain(tokenizers_folder):
    return load_tokenizer(str(tokenizers_folder / "plain"))


@pytest.fixture(scope="session")
def chat(tokenizers_folder):
    return load_tokenizer(str(tokenizers_folder / "chat"))


def write(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def test_tokenizer_round_trip(plain):
    ids = plain.encode("Question: héllo 2")
    assert plain.decode([*ids, plain.eos_id]) == "Question: héllo 2"
    assert plain.eos_id == 0 and max(ids) < plain.vocab_size


def test_saved_tokenizer_is_the_same(chat, tmp_path):
    chat.save(tmp_path / "copy")
    again = load_tokenizer(str(tmp_path / "copy"))
    messages = [{"role": "user", "content": "hello"}]
    assert again.encode_chat(messages, True) == chat.encode_chat(messages, True)
    assert (again.eos_id, again.vocab_size) == (chat.eos_id, chat.vocab_size)


@pytest.mark.parametrize(("name", "word"), [("no_eos", "end-of-text"), ("nothing", "does not exist")])
def test_bad_tokenizers(tokenizers_folder, name, word):
    with pytest.raises(DataError, match=word) as caught:
        load_tokenizer(str(tokenizers_folder / name))
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(DataError, match="tokenizer_config.json"):
        load_tokenizer(str(tmp_path))


def test_pairs_end_with_the_end_of_text(plain, tmp_path):
    (pair,) = load_pairs(write(tmp_path, {"prompt": "Question: 2?", "response": " 5"}, ""), plain, 100)
    assert list(pair.prompt) == plain.encode("Question: 2?")
    assert list(pair.response) == [*plain.encode(" 5"), plain.eos_id] and pair.line == 1


def test_chat_pairs_split_at_the_generation_prompt(chat, tmp_path):
    messages = [{"role": "user", "content": "what is 2"}, {"role": "assistant", "content": "5"}]
    (pair,) = load_pairs(write(tmp_path, {"messages": messages}), chat, 100)
    assert list(pair.prompt) == chat.encode_chat(messages[:1], True)
    assert list(pair.prompt + pair.response) == chat.encode_chat(messages, False)
    assert chat.decode(list(pair.response)).strip() == "5" and pair.response[-1] == chat.eos_id
    (prompt,) = load_prompts(write(tmp_path, {"messages": messages[:1], "answer": "5"}), chat, 100)
    assert prompt.tokens == pair.prompt and prompt.row["answer"] == "5"


BAD_PROMPTS = [
    ('{"prompt": ', "malformed JSON"),
    ("[1]", "must be a JSON object"),
    ({"answer": "1"}, "has no 'prompt'"),
    ({"prompt": 3}, "must be a string"),
    ({"prompt": ""}, "the prompt is empty"),
    ({"prompt": "hello " * 50}, "data.max_prompt_length=20"),
    ({"messages": []}, "non-empty list"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "ends with the user's"),
    ({"messages": [{"role": "user", "content": "x"}]}, "no chat template"),
]


@pytest.mark.parametrize(("row", "words"), BAD_PROMPTS)
def test_bad_prompts_name_the_line(plain, tmp_path, row, words):
    path = write(tmp_path, {"prompt": "good"}, "", row)
    with pytest.raises(DataError) as caught:
        load_prompts(path, plain, 20)
    message = str(caught.value)
    assert words in message and "\n" not in message
    assert "no chat template" in message or message.startswith(f"{path}:3: ")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a"}, "has no 'response'"),
        ({"prompt": "a", "response": ""}, "the response is empty"),
        ({"prompt": "hello " * 50, "response": "b"}, "model.encoder_seq_length=20"),
        ({"messages": [{"role": "user", "content": "x"}]}, "must be the assistant's"),
    ],
)
def test_bad_pairs_name_the_line(plain, tmp_path, row, words):
    path = write(tmp_path, row)
    with pytest.raises(DataError) as caught:
        load_pairs(path, plain, 20)
    assert str(caught.value).startswith(f"{path}:1: ") and words in str(caught.value)


def test_unreadable_files(tmp_path):
    for path, words in ((tmp_path / "none", "does not exist"), (tmp_path, "is not a file")):
        with pytest.raises(DataError, match=words):
            list(read_jsonl(path))
    empty = tmp_path / "empty"
    empty.write_text("\n\n")
    with pytest.raises(DataError, match="has no rows"):
        list(read_jsonl(empty))
    binary = tmp_path / "binary"
    binary.write_bytes(b'{"a": 1}\n{"a": "\xff"}\n')
    with pytest.raises(DataError, match=r"binary:2: not UTF-8"):
        list(read_jsonl(binary))


def test_sampler_sees_everything_once_per_epoch_on_all_ranks():
    count, batch, world = 10, 4, 2
    ranks = [EpochSampler(count, batch, 7, rank, world) for rank in range(world)]
    drawn = [i for _ in range(15) for rank in ranks for i in rank.next()]  # 60 = 6 epochs
    epochs = torch.tensor(drawn).view(6, count)
    assert all(sorted(e) == list(range(count)) for e in epochs.tolist())
    assert len({tuple(e) for e in epochs.tolist()}) > 1, "every epoch has the same order"
    one = EpochSampler(count, batch, 7, 0, 1)
    assert [i for _ in range(15) for i in one.next()] == drawn


def test_sampler_comes_back_to_its_place():
    straight, first = EpochSampler(10, 4, 3, 0, 1), EpochSampler(10, 4, 3, 0, 1)
    expected = [straight.next() for _ in range(9)]
    seen = [first.next() for _ in range(4)]
    second = EpochSampler(10, 4, 3, 0, 1)
    second.load_state_dict(first.state_dict())
    assert seen + [second.next() for _ in range(5)] == expected
    with pytest.raises(ValueError, match="not divisible"):
        EpochSampler(10, 5, 3, 0, 2)
