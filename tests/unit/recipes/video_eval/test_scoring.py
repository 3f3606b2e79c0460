"""Scores of options are those of a plain GPT on the whole text; accuracy, its interval and what is written down."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from megatron_ext.errors import UserError
from megatron_ext.models import build_gpt
from megatron_ext.models.config import PositionEmbedding
from megatron_ext.vision import VisionConfig
from recipes.cli.config import build
from recipes.data.tokenizer import load_tokenizer
from recipes.data.video import VideoReader
from recipes.data.video_settings import VideoSettings
from recipes.video_eval.report import summary, table, wilson, write_report
from recipes.video_eval.scoring import ask_all, prepare
from recipes.video_eval.sets import read_questions
from recipes.video_eval.settings import VideoEvalConfig, VideoEvalData
from tests.gpt_cases import randomize, small_config
from tests.plain_gpt import plain_logprobs

FEATURES = 6
ROWS = [
    {"features": "0.npy", "question": "which ?", "options": ["left", "right way"], "answer": "A", "category": "motion"},
    {"features": "1.npy", "question": "how many ?", "options": ["1", "2", "3"], "answer": "C", "category": "count"},
    {"features": "0.npy", "question": "what ?", "options": ["left", "right"], "category": "motion"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from tools.make_word_problems import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    text = "which what how many left right way ? Answer with the option's letter.\nAnswer: A B C 1 2 3 user assistant"
    train_tokenizer(folder, [text], 300, special=("<video>",))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}{{ 'assistant:' if add_generation_prompt }}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return load_tokenizer(folder)


def asked(tmp_path, tokenizer, rows=ROWS, longest: int = 400, **data):
    rng = np.random.default_rng(1)
    for name in ("0.npy", "1.npy"):
        np.save(tmp_path / name, rng.standard_normal((2, 2, 1, FEATURES)).astype(np.float32))
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = VideoEvalData(path=str(tmp_path / "q.jsonl"), **data)
    reader = VideoReader(VideoSettings(num_frames=1, height=8, width=8), FEATURES)
    return prepare(read_questions(settings.path, settings.set), settings, tokenizer, reader, longest)


@pytest.mark.parametrize("data", [{}, {"scoring": "text", "prompt_as_message": True}], ids=["letters", "texts"])
def test_scores_are_those_of_the_whole_text(data, tmp_path, tokenizer, rng, world):
    found = asked(tmp_path, tokenizer, **data)
    config = small_config(
        vocab_size=tokenizer.vocab_size, encoder_seq_length=400, vision=VisionConfig(FEATURES),
        position_embedding=PositionEmbedding("vrope"),
    )  # fmt: skip
    model = build_gpt(config, world)
    randomize(model, rng)
    told = []
    scores = ask_all(model, found, progress=told.append)
    assert scores.shape == (3, 3) and sum(told) == 3
    weights = {name: p.detach() for name, p in model.named_parameters()}
    for one, values in zip(found, scores, strict=True):
        for pair, value in zip(one.pairs, values, strict=False):
            logprobs, _ = plain_logprobs(weights, config, pair.prompt.for_model(), list(pair.response))
            expected = logprobs.mean() if data else logprobs.sum()
            assert float(value) == pytest.approx(float(expected), abs=1e-4)
        assert all(value == -torch.inf for value in values[len(one.pairs) :])


def test_an_option_is_a_letter_behind_a_space_or_its_text(tmp_path, tokenizer):
    (first, *_) = asked(tmp_path, tokenizer)
    assert [tokenizer.decode(pair.response) for pair in first.pairs] == [" A", " B"]
    text = tokenizer.decode(first.pairs[0].prompt.tokens)
    assert text == "\nwhich ?\nA. left\nB. right way\nAnswer with the option's letter.\nAnswer:"
    (first, *_) = asked(tmp_path, tokenizer, scoring="text", prompt_as_message=True)
    assert [tokenizer.decode(pair.response) for pair in first.pairs] == ["left\n", "right way\n"]
    assert len(asked(tmp_path, tokenizer, max_questions=2)) == 2


def test_accuracy_by_category(tmp_path, tokenizer):
    found = asked(tmp_path, tokenizer)
    inf = torch.inf
    scores = torch.tensor([[-1.0, -2.0, -inf], [-3.0, -1.0, -2.0], [-1.0, -2.0, -inf]], dtype=torch.float64)
    result = summary(found, scores)
    assert (result["questions"], result["answered"], result["accuracy"]) == (3, 2, 0.5)
    assert result["chance"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    kinds = result["by"]["category"]
    assert {name: (part["count"], part["accuracy"]) for name, part in kinds.items()} == {
        "count": (1, 0.0),
        "motion": (1, 1.0),
    }
    assert table(result)[0][:3] == ("all", "2", "50.0")
    write_report(tmp_path, "a title", result, found, scores)
    assert json.loads((tmp_path / "video_eval.json").read_text())["accuracy"] == 0.5
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [(row["chosen"], row["answer"]) for row in rows] == [("A", "A"), ("B", "C"), ("A", None)]
    assert "| category: motion | 1 | 100.0 |" in (tmp_path / "video_eval.md").read_text()
    nothing = summary(found[2:], scores[2:])
    assert nothing == {"questions": 1, "answered": 0} and table(nothing) == []


def test_the_interval_is_wilsons():
    """Worked: 8 of 10, z = 1.96."""
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 5)[0] == 0 and wilson(5, 5)[1] == 1


@pytest.mark.parametrize(
    ("rows", "data", "words"),
    [
        ([ROWS[0] | {"features": "none.npy"}], {}, "q.jsonl:1: features .*none.npy does not exist"),
        (
            [ROWS[0]],
            {"longest": 20},
            r"q.jsonl:1: prompt and answer have \d+ tokens, more than model.encoder_seq_length=20",
        ),
        (
            [ROWS[0]],
            {"prompt": "{question} {options}"},
            "q.jsonl:1: the text has 0 video placeholders, the row has 1 videos",
        ),
    ],
)
def test_questions_that_cannot_be_asked_are_one_line(rows, data, words, tmp_path, tokenizer):
    with pytest.raises(UserError, match=words):
        asked(tmp_path, tokenizer, rows, **data)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"set": "videome"}, "data.set must be one of rows, videomme"),
        ({"scoring": "both"}, "data.scoring must be letter or text"),
        ({"prompt": "<video>"}, "data.prompt='<video>' must have {question} in it"),
        ({"prompt": "<video>{question}"}, "must have {options} in it"),
        ({"chat_template": "x"}, "data.chat_template is set, and data.prompt_as_message=false"),
        ({"max_questions": 0}, "data.max_questions=0 must be at least 1"),
    ],
)
def test_settings_without_meaning(data, words):
    with pytest.raises(UserError) as caught:
        VideoEvalData(path="q.jsonl", **data)
    assert words in str(caught.value)


def test_a_model_without_eyes_is_shown_nothing(tmp_path, tokenizer):
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "what ?", "options": ["left", "right"]}) + "\n")
    data = VideoEvalData(path=str(tmp_path / "q.jsonl"))
    questions = read_questions(data.path, "rows")
    with pytest.raises(UserError, match="shows <video>, and the model has no eyes"):
        prepare(questions, data, tokenizer, None, 100)
    blind = VideoEvalData(path=data.path, prompt="{question}\n{options}\n")
    (one,) = prepare(questions, blind, tokenizer, None, 100)
    assert one.media == () and len(one.pairs) == 2


def test_ranks_that_share_experts_are_refused():
    node = {
        "pretrained_checkpoint": {"restore_from_path": "x"}, "exp_manager": {"explicit_log_dir": "y"}, "data": {"path": "z"},
        "model": {"expert_model_parallel_size": 2},
    }  # fmt: skip
    with pytest.raises(UserError, match="model.expert_model_parallel_size=2: here data-parallel ranks run prompts"):
        build(VideoEvalConfig, node)
