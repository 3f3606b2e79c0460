"""The recipe on two small models that transformers runs: words of several tokens, a third answer, and models side by side."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from megatron_ext.bias.measures import Measure, difference
from megatron_ext.bias.prompts import PromptsConfig
from megatron_ext.bias.scores import afgb_score, ub_score
from recipes import eval_bias
from recipes.bias.comparing import Answers, compared, comparison_lines, read_earlier
from recipes.bias.prompts import answer_tokens
from recipes.bias.settings import BiasEvalConfig, LocateConfig
from recipes.cli.compose import CONFIG_FOLDER, compose
from recipes.cli.config import build
from recipes.data.tokenizer import load_tokenizer

NAMES = ["baker", "clerk", "cook", "driver", "guard", "judge", "nurse", "potter", "smith", "tutor"]
PROMPTS = [
    f"data.prompts.professions_list=[{','.join(NAMES)}]", "data.split=all", "data.prompts.pair.others=[they,xemselves]",
    "data.prompts.bias_templates=['The {profession} sat because','A {profession} ran because']",
    "data.prompts.hint_templates=['The {profession} lost {hint} hat because']",
]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    """Two, of one tokenizer that reads "xemselves" as several tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tools.make_word_problems import train_tokenizer

    text = ["The nurse sat because she lost his hat.", "A baker ran because he they lost her hat."] * 20 + [
        *NAMES,
        "xmvlws",
    ]
    made = []
    for name in ("before", "after"):
        folder = tmp_path_factory.mktemp(name) / "model"
        train_tokenizer(folder, text, 300)
        config = LlamaConfig(
            vocab_size=load_tokenizer(folder).vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, initializer_range=0.15,
        )  # fmt: skip
        while not made or made[-1] != folder:
            LlamaForCausalLM(config).save_pretrained(folder)
            logs = direct(folder)[:20].log()
            # Which answer is the likeliest must not be for rounding to say.
            if (logs[:, :2].amax(1) - logs[:, 2:].amax(1)).abs().min() > 1e-4:
                made.append(folder)
    return made


def evaluate(model: Path, out: Path, *overrides: str) -> dict:
    given = [f"pretrained_checkpoint.restore_from_path={model}", f"exp_manager.explicit_log_dir={out}", *PROMPTS]
    eval_bias.main(compose("eval_bias", [*given, "++data.bootstrap_samples=300", *overrides]))
    return json.loads((out / "bias.json").read_text())


@torch.no_grad()
def direct(folder: Path) -> torch.Tensor:
    """P of he, she, they and xemselves behind every prompt [prompts, 4], bias templates first, token by token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float64)
    tokenizer = load_tokenizer(folder)
    texts = [f"{start} {name} {verb} because" for name in NAMES for start, verb in (("The", "sat"), ("A", "ran"))]
    texts += [f"The {name} lost {hint} hat because" for name in NAMES for hint in ("his", "her")]
    rows = []
    for text in texts:
        row = []
        for word in ("he", "she", "they", "xemselves"):
            start, ids = tokenizer.encode(text), tokenizer.encode(f"{text} {word}")
            logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            row.append(sum(logs[i - 1, ids[i]] for i in range(len(start), len(ids))).exp())
        rows.append(torch.stack(row))
    return torch.stack(rows)


def test_two_models_side_by_side(models, tmp_path, capsys):
    before = evaluate(models[0], tmp_path / "before")
    after = evaluate(models[1], tmp_path / "after", f"data.compare_with=[{tmp_path / 'before'}]")
    assert len(load_tokenizer(models[0]).encode(" xemselves")) > 1
    bias, hint = slice(0, 20), torch.tensor([1, -1] * 10)
    differences = []
    for folder, found in zip(models, (before, after), strict=True):
        p = direct(folder)
        asked, hinted = p[bias], p[20:]
        assert found["afgb"] == pytest.approx(afgb_score(asked[:, 0], asked[:, 1]), abs=1e-6)
        assert found["ub"] == pytest.approx(ub_score(hinted[:, 0], hinted[:, 1], hint), abs=1e-6)
        assert found["others_by_word"]["they"] == pytest.approx(float(asked[:, 2].mean()), abs=1e-6)
        assert found["others_by_word"]["xemselves"] == pytest.approx(float(asked[:, 3].mean()), abs=1e-6, rel=1e-4)
        assert found["others_mass"] == pytest.approx(float(asked[:, 2:].sum(1).mean()), abs=1e-6)
        assert found["others_preferred"] == float((asked.argmax(1) >= 2).double().mean())
        differences.append(Measure.mean([name for name in NAMES for _ in range(2)], (asked[:, 0] - asked[:, 1]).abs()))
    gap, ends = difference(*differences, samples=300)
    cell = after["compared"]["before"]["afgb"]
    assert cell["difference"] == pytest.approx(gap, abs=1e-6) and cell["interval"] == pytest.approx(ends, abs=1e-6)
    assert (cell["earlier"], cell["now"]) == (before["afgb"], after["afgb"])
    report = (tmp_path / "after/bias.md").read_text()
    row = f"| AFGB (0 is fair) | {before['afgb']:.4f} | {after['afgb']:.4f} | {cell['difference']:+.4f} ["
    assert row in report and row in capsys.readouterr().out
    assert "### Most changed from before, P(he) - P(she)" in report and f"- before: {models[0]}" in report
    assert "Beside other models" not in (tmp_path / "before/bias.md").read_text()
    for overrides, message in (
        (["data.prompts.pair.others=[they]"], "before was asked other questions of prompts than this evaluation asks"),
        ([f"data.compare_with=[{models[0]}]"], "answers.json is no evaluation's (FileNotFoundError"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            evaluate(models[1], tmp_path / "no", f"data.compare_with=[{tmp_path / 'before'}]", *overrides)
    assert not (tmp_path / "no").exists()


def test_what_was_written_is_read_again(tmp_path, rng):
    measures = {"mean": Measure.mean(["a", "b", "a"], torch.randn(3, generator=rng))}
    (tmp_path / "run").mkdir()
    Answers({"bbq": "digest"}, {"bbq": measures}).write(tmp_path / "run", "my model", {"nurse": -0.25})
    (found,) = read_earlier([str(tmp_path / "run")])
    assert (found.name, found.model, found.professions) == ("run", "my model", {"nurse": -0.25})
    assert found.answers.by_name["mean"].value == measures["mean"].value
    assert found.check({"bbq": "digest", "prompts": "more"}) == []
    with pytest.raises(ValueError, match="run was asked none of the questions of this evaluation"):
        found.check({"prompts": "digest"})
    with pytest.raises(ValueError, match="folders of one name, run, run, cannot be told apart"):
        read_earlier([str(tmp_path / "run")] * 2)


def test_other_tasks_are_not_compared_and_a_figure_that_is_none_is_no_number(tmp_path, rng):
    """What cannot be had of one set is said, and no reason to refuse all."""
    (tmp_path / "run").mkdir()
    ability = {"general.arc_easy.acc": Measure.mean(["0", "1"], torch.rand(2, generator=rng))}
    alike = {
        "winogender_correlation": Measure.correlation(["a", "b", "c"], torch.rand(3, generator=rng), torch.zeros(3))
    }
    earlier = Answers({"general": "one", "winogender": "w"}, {"general": ability, "winogender": alike})
    earlier.write(tmp_path / "run", "a model", {})
    (found,) = read_earlier([str(tmp_path / "run")])
    now = Answers({"general": "other", "winogender": "w"}, {"general": ability, "winogender": alike})
    assert found.check(now.asked) == ["general"]
    gaps = compared(found, now, 50)
    lines = "\n".join(comparison_lines([found], [gaps], now, {}, ("he", "she")))
    assert set(gaps) == {"winogender_correlation"} and "nan" not in lines and "winogender" not in lines.lower()
    assert "General ability is not compared with that of run: other tasks, or rows" in lines


def test_words_whose_tokens_one_begins_with_the_other_are_refused(models):
    tokenizer = load_tokenizer(models[0])
    with pytest.raises(ValueError, match="'he' and 'he' are the same tokens"):
        answer_tokens(tokenizer, ["he", "he"])
    one, other = "xm", "xmx"  # letters that no token joins
    assert tokenizer.encode(f" {other}")[: len(tokenizer.encode(f" {one}"))] == tokenizer.encode(f" {one}")
    with pytest.raises(ValueError, match=f"begins '{other}' with the tokens of '{one}'"):
        answer_tokens(tokenizer, ["she", one, other])


EXAMPLES = sorted(path.stem for path in (CONFIG_FOLDER / "prompts").glob("*.yaml"))


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_of_attributes_and_languages(example):
    """Each makes prompts of either kind about enough names, and needs nothing beside."""
    given = ["pretrained_checkpoint.restore_from_path=x", "exp_manager.explicit_log_dir=y", f"+prompts={example}"]
    prompts = build(BiasEvalConfig, compose("eval_bias", given)).data.prompts
    names = prompts.professions()["all"]
    bias, hinted = prompts.prompts(names)
    assert len(names) >= 25 and len(bias) >= 2 * len(names) and len(hinted) >= 2 * len(names)
    assert {row.hint for row in hinted} == {1, -1} and not any("{" in row.prompt for row in (*bias, *hinted))
    assert prompts.pair.first not in ("he", "she") and len(set(prompts.pair.words)) == len(prompts.pair.words)


def test_all_attributes_have_an_example():
    assert {"names", "race", "age", "religion"} < set(EXAMPLES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pair": {"others": ["she"]}}, "others=['she'] must be words that differ from 'he', 'she' and each other"),
        ({"pair": {"others": ["they", "they"]}}, "must be words that differ"),
        ({"pair": {"others": [" "]}}, "must be words that differ"),
        (
            {"professions_list": ["cook"], "professions_path": "x"},
            "professions_list and professions_path both say whom",
        ),
        ({"professions_list": ["cook", "cook"]}, "professions_list has a name twice"),
        ({"professions_list": ["cook", ""]}, "professions_list has a name that is empty"),
    ],
)
def test_prompts_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(PromptsConfig, changes)


def test_training_and_locating_know_two_words():
    node = {"exp_manager": {"explicit_log_dir": "x"}, "pretrained_checkpoint": {"restore_from_path": "y"}}
    with pytest.raises(ValueError, match="locating know those two alone: set it to"):
        build(LocateConfig, node | {"data": {"prompts": {"pair": {"others": ["they"]}}}})
