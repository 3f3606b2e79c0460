"""Texts to tokens and back, with tokenizers of several kinds."""

from __future__ import annotations

import copy
import json
import re

import pytest

from recipes.data.errors import DataError
from recipes.data.rows import load_pairs, load_prompts
from recipes.data.tokenizer import load_tokenizer
from tests.data_cases import (
    ANSWER,
    EOS,
    START,
    TEMPLATE,
    USER,
    encode_chat,
    refused,
    write_rows,
    write_tokenizer,
    write_words,
)  # fmt: skip


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
        tuple(encode_chat(plain, [USER], True)),
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
    assert encode_chat(copy, [USER], True) == encode_chat(chat, [USER], True)
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
    ids = encode_chat(chat, [USER], True)
    assert ids[0] == 2 and all(type(i) is int for i in ids)
    assert chat.decode(ids) == "user:what is 1 + 2 ?assistant:"
    assert encode_chat(chat, [USER], False) == ids[: ids.index(0) + 1]
    assert "no chat template" in refused(encode_chat, plain, [USER], True)
    assert "no robots here" in refused(encode_chat, chat, [{"role": "robot", "content": "x"}], True)


def test_the_text_of_a_response_is_what_it_adds_to_its_prompt(sentencepiece, plain):
    for tokenizer in (sentencepiece, plain):
        for prompt, response in (("the fox", " is"), ("the fox is", "n't 漢"), ("漢字", "漢"), ("é" * 40, " é")):
            start, added = tokenizer.encode_pair(prompt, response)
            assert tokenizer.decode_response(start, [*added, tokenizer.eos_id]) == response
            assert tokenizer.decode(start) + response == tokenizer.decode([*start, *added])
    start, added = sentencepiece.encode_pair("the fox", " is")
    assert sentencepiece.decode(added) == "is", "alone it is another text"


def test_a_character_whose_bytes_are_cut_is_the_responses(plain, sentencepiece):
    """A prompt that ends within a character, as no text does, and one whose last tokens show nothing."""
    for tokenizer in (plain, sentencepiece):
        ids = tokenizer.encode("the 漢")
        for cut in range(len(ids) - 2, len(ids)):
            assert tokenizer.decode_response(ids[:cut], [*ids[cut:], *tokenizer.encode("s")]).strip().startswith("漢")
        silent = [*tokenizer.encode("the"), *[tokenizer.pad_id] * 20]
        said = tokenizer.decode_response(silent, tokenizer.encode("fox"))
        assert said == ("fox" if tokenizer is plain else " fox")
    assert plain.decode_response([plain.eos_id], plain.encode(" fox")) == " fox"


def test_decode_reads_no_more_of_a_prompt_than_it_must(plain, monkeypatch):
    start = plain.encode("the quick brown fox " * 500)
    asked: list[int] = []
    monkeypatch.setattr(plain, "decode", lambda ids, decode=plain.decode: asked.append(len(ids)) or decode(ids))
    assert plain.decode_response(start, plain.encode(" is")) == " is" and max(asked) < 20


def test_a_reward_reads_the_space_that_the_policy_sampled(sentencepiece, tmp_path):
    from megatron_ext.rollouts import Trajectory
    from recipes.grpo.rollouts import response_texts

    prompts = load_prompts(
        write_rows(tmp_path / "a.jsonl", {"prompt": "it is"}, {"prompt": "the fox ("}), sentencepiece, 99
    )
    texts = [[" 3", "n't"], [" is", "3)"]]
    responses = [
        [[*sentencepiece.encode_pair(row["prompt"], text)[1], sentencepiece.eos_id] for text in group]
        for row, group in zip([p.row for p in prompts], texts, strict=True)
    ]
    found = [[Trajectory.of_response(r, [0.0] * len(r), "stop") for r in group] for group in responses]
    assert response_texts(sentencepiece, prompts, found) == texts
    assert [sentencepiece.decode(r) for group in responses for r in group] == ["3", "n't", "is", "3)"]


def test_several_tokens_end_a_response(plain):
    plain = copy.copy(plain)  # which other tests take, too
    other = next(i for i in range(plain.vocab_size) if i != plain.eos_id)
    assert plain.stop_ids == (plain.eos_id,) and plain.other_end([other]) is not None
    plain.stop_at([other, plain.eos_id], "generation_config.json")
    assert plain.stop_ids == (plain.eos_id, other) and plain.other_end([other]) is None
    with pytest.raises(DataError, match=f"generation_config.json ends responses with token {plain.vocab_size}"):
        plain.stop_at([plain.vocab_size], "generation_config.json")
