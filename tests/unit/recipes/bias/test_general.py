"""General ability: tasks of lm-evaluation-harness through our scorers give what its own model class gives."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from megatron_ext.models import build_gpt
from recipes import eval_bias
from recipes.bias.general import HarnessTasks, LoadedTasks
from recipes.bias.scorers import HuggingFaceScorer, MegatronScorer
from recipes.cli.compose import compose
from recipes.cli.config import build
from recipes.data.tokenizer import load_tokenizer
from recipes.run.pretrained import Pretrained
from recipes.run.settings import TrainedModel
from tests.unit.recipes.bias.random_sets import letters, pick, words

pytest.importorskip("lm_eval")

DATA = """\
import json
from pathlib import Path


def rows(**_):
    from datasets import Dataset

    lines = Path(__file__).with_name("rows.jsonl").read_text().splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}
"""
TASK = """\
task: ours_{kind}
custom_dataset: !function data.rows
test_split: test
output_type: {kind}
doc_to_text: {text}
doc_to_choice: choices
doc_to_target: {target}
metric_list:
{metrics}
metadata:
  version: 1.0
"""
METRIC = "  - metric: {}\n    aggregation: {}\n    higher_is_better: true\n"


def choices(rng: torch.Generator) -> list[str]:
    """Of two that are alike, rounding would say which is the likelier."""
    while len(set(found := [words(rng, 2) for _ in range(3)])) < 3:
        pass
    return found


@pytest.fixture
def tasks(tmp_path, rng) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": words(rng, 5), "choices": choices(rng), "answer": pick(rng, range(3))} for _ in range(7)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "data.py").write_text(DATA)
    choice = METRIC.format("acc", "mean") + METRIC.format("acc_norm", "mean")
    rolling = METRIC.format("byte_perplexity", "weighted_perplexity")
    for kind, text, target, metrics in (
        ("multiple_choice", "question", "answer", choice),
        ("loglikelihood_rolling", '""', "question", rolling),
        ("generate_until", "question", "question", METRIC.format("exact_match", "mean")),
    ):
        made = TASK.format(kind=kind, text=text, target=target, metrics=metrics)
        (folder / f"{kind}.yaml").write_text(made)
    return folder


@pytest.fixture
def folder(tmp_path, rng) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    from tools.make_word_problems import train_tokenizer

    folder = tmp_path / "model"
    train_tokenizer(folder, [letters()] * 4, 200)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=load_tokenizer(folder).vocab_size, max_position_embeddings=24, **shape)
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=rng) / 6)
    model.save_pretrained(folder)
    return folder


def on_megatron(folder: Path, device: torch.device) -> MegatronScorer:
    pretrained = Pretrained.open(str(folder))
    model = build_gpt(build(TrainedModel, pretrained.architecture | {"precision": "32"}, "model"), device)
    pretrained.load(model)
    return MegatronScorer(model)


@pytest.mark.parametrize("kind", ["transformers", "megatron"])
def test_numbers_are_those_of_the_harness(kind, tasks, folder, world, monkeypatch):
    """Multiple choice of questions of which the model reads no more than the end, and perplexity of texts in windows."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    names = ["ours_multiple_choice", "ours_loglikelihood_rolling"]
    loaded = LoadedTasks.load(HarnessTasks(tuple(names), str(tasks), num_fewshot=0))
    scorer = on_megatron(folder, world) if kind == "megatron" else HuggingFaceScorer(folder, world, torch.float32)
    measures, numbers, cut = loaded.ask(scorer, load_tokenizer(folder), 24)
    model = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(str(folder)), tokenizer=AutoTokenizer.from_pretrained(folder),
        batch_size=4,
    )  # fmt: skip
    assert model.max_length == 24
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    theirs = simple_evaluate(model, tasks=names, task_manager=manager, num_fewshot=0, bootstrap_iters=0)["results"]
    assert 0 < cut <= 7 * 4, "each text is longer than the model reads"
    for task, metric in ((names[0], "acc,none"), (names[0], "acc_norm,none"), (names[1], "byte_perplexity,none")):
        assert numbers[task][metric] == pytest.approx(theirs[task][metric], rel=1e-5), metric
    assert set(measures) == {f"general.{names[0]}.acc", f"general.{names[0]}.acc_norm"}
    for name, measure in measures.items():
        assert (
            measure.value == pytest.approx(numbers[names[0]][f"{name.rsplit('.', 1)[1]},none"])
            and len(measure.sums) == 7
        )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "ours_generate_until",
            "generate_until asks for generate_until and exact_match, and here likelihoods alone",
        ),
        ("ours_multiple_choice", "ours_multiple_choice cannot be loaded: "),
    ],
)
def test_what_cannot_be_asked_is_one_line(name, message, tasks):
    if "cannot" in message:
        (tasks / "rows.jsonl").unlink()
    with pytest.raises(ValueError, match=re.escape(message)):
        LoadedTasks.load(HarnessTasks((name,), str(tasks)))


def test_in_one_report_and_compared_where_the_tasks_are_the_same(tasks, folder, tmp_path):
    def evaluate(name: str, *overrides: str) -> tuple[dict, str]:
        out = tmp_path / name
        given = [
            f"pretrained_checkpoint.restore_from_path={folder}", f"exp_manager.explicit_log_dir={out}", "data.split=all",
            "data.prompts.professions_list=[cook,nurse,smith,tutor,judge]", "data.prompts.bias_templates=['A {profession} ran']",
            "data.prompts.hint_templates=['{hint} {profession} ran']", "data.harness.tasks=[ours_multiple_choice]",
            f"+data.harness.include_path={tasks}", "++data.bootstrap_samples=50",
        ]  # fmt: skip
        eval_bias.main(compose("eval_bias", [*given, *overrides]))
        return json.loads((out / "bias.json").read_text()), (out / "bias.md").read_text()

    first, report = evaluate("first")
    assert 0 < first["harness_cut"] <= 7 * 3 and f"{first['harness_cut']} rows are longer than the 24 tokens" in report
    acc = first["harness"]["ours_multiple_choice"]["acc,none"]
    assert f"| ours_multiple_choice | acc,none | {acc:.4f} |" in report
    same, report = evaluate("same", f"data.compare_with=[{tmp_path / 'first'}]")
    cell = same["compared"]["first"]["general.ours_multiple_choice.acc"]
    assert (cell["earlier"], cell["now"], cell["difference"]) == (acc, acc, 0) and "is not compared" not in report
    fewer, report = evaluate("fewer", f"data.compare_with=[{tmp_path / 'first'}]", "+data.harness.limit=2")
    assert "afgb" in fewer["compared"]["first"] and not any("general" in name for name in fewer["compared"]["first"])
    assert "General ability is not compared with that of first: other tasks, or rows cut to other lengths." in report
