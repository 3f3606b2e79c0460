"""The bias recipes' input: what is read, what is refused in one line, and when a fine-tuned state counts."""

from __future__ import annotations

import json
import math
import re

import pytest

from megatron_ext.bias.prompts import AttributePair, PromptsConfig, own_professions
from recipes.bias.guard import Guard
from recipes.bias.prompts import (
    load_prompt_sets,
    load_texts,
    pair_tokens,
    question_rows,
    read_winogender,
    sentence_rows,
)
from recipes.bias.report import summary_rows
from recipes.bias.settings import BiasEvalConfig, LFTFSettings
from recipes.cli.config import build
from recipes.data.tokenizer import load_tokenizer

TEXT = ["The nurse smiled because she was late.", "The baker left because he was tired.", "his hat, her hat"] * 20
TEXT.append(
    "The quick brown fox jumps over the lazy dog's 12 34 567 890 keys; She, ‘He’, It, When, Nobody, After, Everyone."
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from tools.make_word_problems import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(folder, TEXT, 300)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def with_begin(tmp_path_factory):
    """A tokenizer that puts a begin token before a text and an end token behind, as some do."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    from tools.make_word_problems import train_tokenizer

    folder = tmp_path_factory.mktemp("with_begin")
    train_tokenizer(folder, TEXT, 300, ("<s>",))
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    special = [(t, made.token_to_id(t)) for t in ("<s>", "<|endoftext|>")]
    made.post_processor = TemplateProcessing(single="<s> $A <|endoftext|>", special_tokens=special)
    made.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": "<s>"}))
    return load_tokenizer(folder)


def test_pair_tokens(tokenizer, with_begin):
    for found in (tokenizer, with_begin):
        he, she = pair_tokens(found, ("he", "she"))
        assert (found.decode([he]), found.decode([she])) == (" he", " she")
    with pytest.raises(ValueError, match=r"reads 'accountant' after a space as \d+ tokens"):
        pair_tokens(tokenizer, ("he", "accountant"))
    with pytest.raises(ValueError, match="'he' and 'he' are the same tokens"):
        pair_tokens(tokenizer, ("he", "he"))


def test_a_begin_token_stays_and_an_end_token_does_not(tokenizer, with_begin):
    plain = tokenizer.encode_prompt("The nurse")
    assert plain == tokenizer.encode("The nurse") and tokenizer.begin_id == tokenizer.eos_id
    begun = with_begin.encode_prompt("The nurse")
    assert begun[0] == with_begin.begin_id != with_begin.eos_id and with_begin.decode(begun) == "The nurse"
    assert begun[-1] != with_begin.eos_id


def test_prompt_sets(tokenizer, tmp_path):
    path = tmp_path / "professions.json"
    path.write_text(json.dumps([[f"job_{i}", 0, 0] for i in range(20)] + [["monk", 1.0, 0]]))
    sets = load_prompt_sets(PromptsConfig(professions_path=str(path), exclude=["job 3"]), tokenizer, 64)
    names = {name: {p.profession for p in part.bias} for name, part in sets.items()}
    assert not names["train"] & names["test"] and not names["train"] & names["dev"] and len(names["all"]) == 19
    assert names["train"] | names["dev"] | names["test"] == names["all"] and "job 3" not in names["all"]
    train = sets["train"]
    for (a, b), first in zip(train.swapped, train.hinted[::2], strict=True):
        assert tokenizer.decode(a) == first.prompt and first.hint == 1
        assert tokenizer.decode(b) == first.prompt.replace(" his ", " her ")
    probe = train.probe((1, 2), 10, 7)
    assert len(probe.prompts) == 10 and len(probe.swapped) == 5 and probe.seed == 7
    assert all(p in train.bias_tokens for p in probe.prompts)


def test_a_template_behind_which_a_word_has_other_tokens_is_refused(tmp_path):
    """The scores compare one token behind every prompt; this tokenizer has one for "- he" that it has nowhere else."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    texts = [*TEXT, "The nurse paused -"]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    from tokenizers.trainers import BpeTrainer

    made.train_from_iterator([*texts, *["- he", "- she"] * 50], BpeTrainer(vocab_size=300, show_progress=False))
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    professions = tmp_path / "professions.json"
    professions.write_text(json.dumps([[f"nurse{'s' * i}", 0, 0] for i in range(10)]))
    settings = PromptsConfig(professions_path=str(professions), bias_templates=["The {profession} paused -"])
    with pytest.raises(ValueError, match="reads '.* paused -' otherwise when ' he' follows"):
        load_prompt_sets(settings, load_tokenizer(tmp_path), 64)


def test_a_letter_of_a_prompt_that_the_tokenizer_would_leave_out_is_refused(tokenizer, tmp_path):
    path = tmp_path / "professions.json"
    path.write_text(json.dumps([[f"job_{i}", 0, 0] for i in range(20)] + [["caf\u00e9 owner", 0, 0]]))
    with pytest.raises(ValueError, match="has no token for '\u00e9' and would leave it out"):
        load_prompt_sets(PromptsConfig(professions_path=str(path)), tokenizer, 64)


def test_another_pair_with_its_templates(tokenizer, tmp_path):
    path = tmp_path / "professions.json"
    path.write_text(json.dumps([[f"job_{i}", 0, 0] for i in range(20)]))
    settings = PromptsConfig(
        professions_path=str(path),
        pair=AttributePair("man", "woman", "father", "mother"),
        bias_templates=["The {profession} was a kind", "We know the {profession}, a good"],
        hint_templates=["The {profession}, a {hint} of two, was a kind"],
    )
    everything = load_prompt_sets(settings, tokenizer, 64)["all"]
    assert [p.prompt for p in everything.bias[:2]] == ["The job 0 was a kind", "We know the job 0, a good"]
    assert [(p.prompt, p.hint) for p in everything.hinted[:2]] == [
        ("The job 0, a father of two, was a kind", 1), ("The job 0, a mother of two, was a kind", -1)
    ]  # fmt: skip
    assert len(everything.bias) == 40 and len(everything.hinted) == 40
    assert [tokenizer.decode(a) for a, _ in everything.swapped[:1]] == [everything.hinted[0].prompt]
    assert {p.scale for p in (*everything.bias, *everything.hinted)} == {"own"}


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ({"bias_templates": []}, "bias_templates is empty: give at least one template, or null for ours"),
        (
            {"bias_templates": ["The {job} sat because"]},
            "bias_templates: template 'The {job} sat because' must hold {profession} and nothing else in braces",
        ),
        (
            {"bias_templates": ["The {profession} {sat because"]},
            "bias_templates: template 'The {profession} {sat because' must hold {profession} and nothing else in braces",
        ),
        ({"bias_templates": [""]}, "bias_templates: template '' must hold {profession} and nothing else in braces"),
        (
            {"bias_templates": ["The {profession} sat because "]},
            "bias_templates: template 'The {profession} sat because ' must not end in a space: the words are read after one",
        ),
        ({"bias_templates": ["{profession}:"] * 2}, "bias_templates: template '{profession}:' is there twice"),
        (
            {"hint_templates": ["The {profession} sat because"]},
            "hint_templates: template 'The {profession} sat because' must hold {hint} and {profession} and nothing else in "
            "braces",
        ),
        (
            {"bias_templates": "The {profession}"},
            "data.prompts.bias_templates must be a list of str or null, got 'The {",
        ),
        ({"bias_templats": []}, "unknown key data.prompts.bias_templats; did you mean data.prompts.bias_templates?"),
    ],
)
def test_template_refusals(templates, message):
    node = {"exp_manager": {"explicit_log_dir": "x"}, "pretrained_checkpoint": {"restore_from_path": "y"}}
    with pytest.raises(ValueError, match=re.escape(message)):
        build(BiasEvalConfig, node | {"data": {"prompts": templates}})


def test_malformed_professions_are_one_line(tokenizer, tmp_path):
    path = tmp_path / "professions.json"
    for text, message in (
        ("[[", "no JSON"),
        ("[" * 100_000, "professions.json: no JSON .maximum recursion depth exceeded"),
        ('[["nurse", NaN, 0]]', r"entry 0 is \['nurse', nan, 0\], expected \[name, definitional score"),
        ('[["nurse", 0, 0], ["nun", -Infinity, 0]]', r"entry 1 is \['nun', -inf, 0\], expected"),
        ('[["nurse", true, 0]]', r"entry 0 is \['nurse', True, 0\], expected"),
        (f"{'[' * 300}{']' * 300}", r"entry 0 is .*\[\.\.\.\].*, expected \[name, definitional score"),
        ('[["nurse", 0]]', r"entry 0 is \['nurse', 0\], expected \[name, definitional score"),
        ('[["monk", 1.0, 0]]', "no profession is left"),
        ('[["_", 0, 0]]', "entry 0 has a name that is empty or cannot be printed: '_'"),
        ('[["\\ud800", 0, 0]]', r"entry 0 has a name that is empty or cannot be printed: '\\ud800'"),
        (
            json.dumps([[f"job_{i}" * 40, 0, 0] for i in range(20)]),
            r"'The job 0job.*has \d+ tokens; the model reads at most 63",
        ),
        ('[["a", 0, 0], ["b", 0, 0]]', "2 professions are too few for a split"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_prompt_sets(PromptsConfig(professions_path=str(path)), tokenizer, 64)


def test_an_unknown_excluded_profession(tokenizer, tmp_path):
    """In our list and in a file, where what its scores leave out may be named."""
    path = tmp_path / "professions.json"
    path.write_text(json.dumps([*([f"job_{i}", 0, 0] for i in range(20)), ["monk", 1.0, 0]]))
    ours, theirs = (
        PromptsConfig(exclude=["nurse"]),
        PromptsConfig(professions_path=str(path), exclude=["monk", "job_7"]),
    )
    assert "nurse" not in ours.professions()["all"] and len(ours.professions()["all"]) == len(own_professions()) - 1
    assert len(theirs.professions()["all"]) == 19
    for settings, message in (
        (PromptsConfig(exclude=["nurse", "xyz_xyz"]), "exclude: 'xyz xyz' is none of our professions"),
        (PromptsConfig(exclude=["nurze"]), "exclude: 'nurze' is none of our professions; did you mean 'nurse'?"),
        (
            PromptsConfig(professions_path=str(path), exclude=["job_77"]),
            f"exclude: 'job 77' is not in {path}; did you mean 'job 7'?",
        ),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            load_prompt_sets(settings, tokenizer, 64)


def test_texts(tokenizer, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "The nurse smiled."}\n\n{"text": "because she"}\n')
    assert [tokenizer.decode(t) for t in load_texts(path, tokenizer, 64)] == ["The nurse smiled.", "because she"]
    for row, message in (
        ('{"txt": "a b"}', r"text.jsonl:1: nothing reads the key txt: did you mean text\?"),
        ('{"text": null}', "text.jsonl:1: the row has no text"),
        ('{"text": "a b", "weight": 2}', "text.jsonl:1: nothing reads the key weight: remove it"),
        ('{"text": "a nurse \u2603"}', "text.jsonl:1: tokenizer .* has no token for '\u2603'"),
        ('{"text": "a nurse \\ud800"}', "text.jsonl:1: text holds half of a surrogate pair"),
        ('{"text": "a"}', "text.jsonl:1: the text has 1 tokens; from 2 to 64"),
        (json.dumps({"text": "nurse " * 90}), r"text.jsonl:1: the text has \d+ tokens"),
    ):
        path.write_text(row + "\n")
        with pytest.raises(ValueError, match=message):
            load_texts(path, tokenizer, 64)


def test_rows_of_public_sets(with_begin):
    from megatron_ext.bias.public_sets import CoreferenceQuestion, SentencePair

    rows = sentence_rows([SentencePair("he was late", "she was late")], with_begin, 64)
    assert [(before, with_begin.decode(s)) for before, s in rows] == [
        ([with_begin.begin_id], "he was late"), ([with_begin.begin_id], "she was late")
    ]  # fmt: skip
    question = CoreferenceQuestion("The nurse left.", "she", "nurse", "someone", 0, "female")
    rows = question_rows([question], with_begin, 64)
    assert {with_begin.decode(start) for start, _ in rows} == {"The nurse left. ‘She’ refers to the"}
    assert [with_begin.decode(choice) for _, choice in rows] == [" nurse", " someone"]
    assert all(with_begin.eos_id not in choice for _, choice in rows)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_winogender_is_told_by_its_first_line(mark, tmp_path):
    """With and without a byte order mark."""
    path = tmp_path / "file.tsv"
    path.write_text(f"{mark}sentid\tsentence\nnurse.cook.1.female.txt\tThe nurse saw the cook as she left.\n")
    (question,) = read_winogender(path)
    assert (question.sentence, question.answer) == ("The nurse saw the cook as she left.", 1)
    header = "occupation(0)\tother-participant(1)\tanswer\tsentence"
    path.write_text(f"{mark}{header}\nnurse\tcook\t0\tThe $OCCUPATION saw the $PARTICIPANT as $NOM_PRONOUN left.\n")
    assert len(read_winogender(path)) == 6


def test_guard():
    guard = Guard(LFTFSettings(min_pronoun_mass=0.8, max_perplexity=1.03), 0.9, 20.0)

    def complaint(mass: float, perplexity: float) -> str | None:
        return guard.complaint({"val/pronoun_mass": mass, "val/perplexity": perplexity})

    assert complaint(0.73, 20.5) is None and complaint(1.0, 10.0) is None
    assert complaint(0.71, 20.0) == "pronoun mass is 0.79 of its start, less than 0.8"
    assert complaint(0.9, 20.7) == "perplexity is 1.035 times its start, more than 1.03"
    for bad in (math.nan, math.inf):
        assert complaint(0.9, bad) == complaint(bad, 20.0) == "the model has diverged"
    free = Guard(LFTFSettings(min_pronoun_mass=0, max_perplexity=None), 0.9, None)
    assert free.complaint({"val/pronoun_mass": 0.0}) is None
    for least in (0, 0.8):  # a model that says neither word has nothing to lose
        nothing = Guard(LFTFSettings(min_pronoun_mass=least, max_perplexity=None), 0.0, None)
        assert nothing.complaint({"val/pronoun_mass": 0.0, "train_optim/loss": math.nan}) is None


def test_summary():
    result = {"afgb": 0.25, "afgb_interval": [0.2, 0.3], "ub": 0.5, "ub_interval": [0.4, 0.6]}
    result |= {"pronoun_mass": 0.75, "hinted_pronoun_mass": 0.8, "share_preferring_first": 0.9}
    result |= {"winogender_accuracy_by_gender": {"male": 0.5}}
    rows = dict(summary_rows(result, ("man", "woman")))
    assert rows["AFGB (0 is fair)"] == "0.2500 [0.2000, 0.3000]"
    assert rows["mean P(man) + P(woman)"] == "0.7500" and rows["Winogender: accuracy by pronoun"] == "male 0.500"
    assert "perplexity of neutral text" not in rows
