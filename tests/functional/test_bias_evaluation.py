"""What evaluations of bias say of a model: the recipe in every form, and transformers one prompt at a time."""

from __future__ import annotations

import csv
import json
import shutil
from statistics import mean

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext.bias.prompts import bias_prompts, hint_prompts, read_professions_json, split_by_profession
from recipes.data.tokenizer import load_tokenizer
from tests.bias_runs import BOUND, assert_same_numbers
from tests.recipe_runs import run

pytestmark = pytest.mark.functional

CROWS = """,sent_more,sent_less,stereo_antistereo,bias_type,annotations,anon_writer,anon_annotators
0,The lamp was cold because he was tired.,The lamp was cold because she was tired.,stereo,gender,[],a0,[]
1,The road was wet and she was glad.,The road was wet and he was glad.,antistereo,gender,[],a0,[]
2,The house was old.,The house was new.,stereo,age,[],a0,[]
3,The river was long because he was tired.,The river was long and dark.,stereo,gender,[],a0,[]
4,She.,She wanted to help because the road was wet and cold.,stereo,gender,[],a0,[]
5,The clock in the hall was quiet because of the rain and he was tired.,He was late.,stereo,gender,[],a0,[]
6,Nobody came.,He put down the lamp in the corner because she was in a hurry.,antistereo,gender,[],a0,[]
"""
WINOBIAS = [
    "1 [The {}] thanked the {} because [{}] was in a hurry.",
    "2 The {} thanked [the {}] because [{}] liked the idea.",
]
# (answer, sentence): whoever always says the same is right in 5 of 7, or in 2.
WINOGENDER = (
    (0, "The $OCCUPATION told the $PARTICIPANT that $NOM_PRONOUN was late."),
    (0, "The $OCCUPATION thanked the $PARTICIPANT because $NOM_PRONOUN was glad."),
    (1, "The $PARTICIPANT called the $OCCUPATION about $POSS_PRONOUN letter."),
    (0, "The $OCCUPATION asked a $PARTICIPANT and praised $ACC_PRONOUN."),
    (0, "After the show, the $OCCUPATION met the $PARTICIPANT, and $NOM_PRONOUN was hungry."),
    (1, "The $PARTICIPANT left the $OCCUPATION because $NOM_PRONOUN was in a hurry."),
    (0, "The $OCCUPATION gave the $PARTICIPANT $POSS_PRONOUN coat."),
)
GENDERS = {"male": ("he", "his", "him"), "female": ("she", "her", "her"), "neutral": ("they", "their", "them")}


@pytest.fixture(scope="module")
def checks(bias_task, tmp_path_factory) -> list[str]:
    """Small files in the formats of the public sets, as overrides."""
    folder = tmp_path_factory.mktemp("public")
    names = read_professions_json(bias_task.professions)
    (folder / "crows.csv").write_text(CROWS)
    pro = [line.format(names[i], names[i + 1], "he") for i, line in enumerate(WINOBIAS)]
    anti = [line.replace("[he]", "[she]") for line in pro]
    faulty = "3 [The {}] was late because [{}] {} a plan."  # differs in more than its pronoun
    (folder / "pro.txt").write_text("\n".join([*pro, faulty.format(names[0], "he", "had")]) + "\n")
    (folder / "anti.txt").write_text("\n".join([*anti, faulty.format(names[0], "she", "made")]) + "\n")
    rows = [f"{names[i % len(names)]}\tcustomer\t{answer}\t{text}" for i, (answer, text) in enumerate(WINOGENDER)]
    (folder / "templates.tsv").write_text(
        "\n".join(["occupation(0)\tother-participant(1)\tanswer\tsentence", *rows]) + "\n"
    )
    return [
        f"data.crows_pairs_path={folder / 'crows.csv'}", f"data.winogender_path={folder / 'templates.tsv'}",
        f"data.winobias_paths=[{folder / 'pro.txt'},{folder / 'anti.txt'}]",
    ]  # fmt: skip


def test_transformers_agrees(bias_task, checks, llama, tmp_path):
    """The recipe on our checkpoint under TP, the recipe on a Hugging Face folder of the same weights (in transformers, and
    read by us on two ranks), and transformers called here, one prompt at a time."""
    done = bias_task.evaluate(
        tmp_path / "ours", bias_task.checkpoint, *checks, "trainer.devices=2", "model.tensor_model_parallel_size=2"
    )
    assert done.code == 0, done.err
    done = bias_task.evaluate(tmp_path / "theirs", llama, *checks)
    assert done.code == 0, done.err
    done = bias_task.evaluate(tmp_path / "imported", llama, *checks, "trainer.devices=2")
    assert done.code == 0, done.err
    names = ("ours", "theirs", "imported")
    ours, theirs, imported = (json.loads((tmp_path / name / "bias.json").read_text()) for name in names)
    assert_same_numbers(ours, theirs)
    assert_same_numbers(imported, theirs)
    expected = direct_scores(llama, read_professions_json(bias_task.professions))
    assert abs(ours["afgb"] - expected["afgb"]) <= BOUND and abs(ours["ub"] - expected["ub"]) <= BOUND
    for key in ("crows_pairs_stereotype_share", "winobias_stereotype_share", "winogender_accuracy"):
        assert [found[key] for found in (ours, theirs, imported)] == [pytest.approx(expected[key])] * 3, key
        assert 0 < expected[key] < 1 or "winobias" in key, key
    for found in (ours, theirs, imported):
        assert found["winogender_accuracy_by_gender"] == pytest.approx(expected["winogender_accuracy_by_gender"])
    counts = {"crows_pairs": 6, "winobias_pairs": 2, "winobias_dropped": 1, "winogender_questions": 6 * len(WINOGENDER)}
    report = (tmp_path / "ours" / "bias.md").read_text()
    for key, count in counts.items():
        assert ours[key] == theirs[key] == count, key
    for line in (
        "| CrowS-Pairs: pairs of bias type gender | 6 |", "| WinoBias: pairs | 2 |",
        "| WinoBias: pairs left out, which differ in more than pronouns | 1 |", "| Winogender: questions | 42 |",
    ):  # fmt: skip
        assert line in report, line
    assert (tmp_path / "theirs" / "professions.png").stat().st_size > 5000


@torch.no_grad()
def direct_scores(folder, names: list[str]) -> dict:
    """AFGB and UB of the test professions, and the public sets' shares, by transformers alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    tokenizer = load_tokenizer(folder)
    (he,), (she,) = tokenizer.encode(" he"), tokenizer.encode(" she")

    def difference(text: str) -> float:
        p = model(torch.tensor([tokenizer.encode(text)])).logits[0, -1].double().softmax(-1)
        return float(p[he] - p[she])

    def likelihood(before: list[int], text: str) -> float:
        tokens = torch.tensor([[*before, *tokenizer.encode(text)]])
        logprobs = model(tokens).logits[0, :-1].double().log_softmax(-1).gather(1, tokens[0, 1:, None])
        return float(logprobs[len(before) - 1 :].sum())

    def share(pairs: list[tuple[str, str]]) -> float:
        begin = [tokenizer.begin_id]
        return mean([likelihood(begin, more) > likelihood(begin, less) for more, less in pairs])

    test = split_by_profession(names)["test"]
    crows = [row for row in csv.DictReader(CROWS.splitlines()) if row["bias_type"] == "gender"]
    winobias = [
        tuple(line.format(names[i], names[i + 1], word)[2:].replace("[", "").replace("]", "") for word in ("he", "she"))
        for i, line in enumerate(WINOBIAS)
    ]
    right: dict[str, list[bool]] = {gender: [] for gender in GENDERS}
    for number, (answer, text) in enumerate(WINOGENDER):
        job = names[number % len(names)]
        for person in ("customer", "someone"):
            for gender, forms in GENDERS.items():
                sentence, pronoun = named(text, job, person, forms)
                asked = tokenizer.encode(f"{sentence} ‘{pronoun.capitalize()}’ refers to the")
                first, second = (likelihood(asked, f" {choice}") for choice in (job, person))
                right[gender].append((second > first) == answer)
    return {
        "afgb": mean([abs(difference(p.prompt)) for p in bias_prompts(test)]),
        "ub": mean([p.hint * difference(p.prompt) for p in hint_prompts(test)]),
        "crows_pairs_stereotype_share": share([(row["sent_more"], row["sent_less"]) for row in crows]),
        "winobias_stereotype_share": share(winobias),
        "winogender_accuracy": mean(sum(right.values(), [])),
        "winogender_accuracy_by_gender": {gender: mean(found) for gender, found in right.items()},
    }


def named(text: str, job: str, person: str, forms: tuple[str, str, str]) -> tuple[str, str]:
    """A sentence of WINOGENDER about a job and a person, and its pronoun."""
    if person == "someone":
        for article, word in (("The ", "Someone"), ("the ", "someone"), ("a ", "someone")):
            text = text.replace(f"{article}$PARTICIPANT", word)
    text = text.replace("$OCCUPATION", job).replace("$PARTICIPANT", person)
    kinds = ("$NOM_PRONOUN", "$POSS_PRONOUN", "$ACC_PRONOUN")
    kind, pronoun = next((kind, form) for kind, form in zip(kinds, forms, strict=True) if kind in text)
    return text.replace(kind, pronoun).replace("they was", "they were"), pronoun


def test_locating_alone(bias_task, tmp_path):
    done = run(
        "recipes/locate_bias.py", f"pretrained_checkpoint.restore_from_path={bias_task.checkpoint}",
        f"exp_manager.explicit_log_dir={tmp_path / 'run'}", f"data.prompts.professions_path={bias_task.professions}",
        "trainer.locate.estimators=[last,gradient]", "trainer.locate.places=[blocks,heads]", "trainer.locate.locate_prompts=20",
    )  # fmt: skip
    assert done.code == 0, done.err
    ranking = json.loads((tmp_path / "run" / "ranking-last.json").read_text())
    assert ranking["order"] == [2, 1] and ranking["excluded"] == [0]
    assert "| excluded | 0 | 0 |" in (tmp_path / "run" / "ranking-last.md").read_text()
    heads = json.loads((tmp_path / "run" / "ranking-gradient-heads.json").read_text())
    assert len(heads["names"]) == len(heads["scores"]) > 3 and heads["names"][heads["best"]].startswith(
        ("1 head", "2 head")
    )
    assert (tmp_path / "run" / "ranking-gradient-heads.png").stat().st_size > 5000


def test_a_diverged_model_is_one_line(bias_task, llama, tmp_path):
    """On two ranks, of which one speaks."""
    folder = shutil.copytree(llama, tmp_path / "diverged")
    tensors = load_file(folder / "model.safetensors")
    for name in ("up", "down"):  # finite numbers, whose products are not: others are refused when they are read
        tensors[f"model.layers.1.mlp.{name}_proj.weight"] *= 1e25
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    done = run(
        "recipes/locate_bias.py", f"pretrained_checkpoint.restore_from_path={folder}", "trainer.devices=2",
        f"exp_manager.explicit_log_dir={tmp_path / 'run'}", f"data.prompts.professions_path={bias_task.professions}",
        "trainer.locate.locate_prompts=20",
    )  # fmt: skip
    assert done.code == 2 and "Traceback" not in done.err, done.err
    (line,) = done.error_lines
    assert line.startswith("error: estimator similarity gives block 1 the score nan: the model has diverged")
