"""The harness's tasks: what is written, what their functions compute, and the real harness where it is installed."""

from __future__ import annotations

import json
import math
import runpy

import pytest
import torch

from megatron_ext.bias import afgb_score, pronoun_mass, ub_score
from megatron_ext.bias.harness import write_harness_tasks
from megatron_ext.bias.prompts import (
    BIAS_TEMPLATES,
    HINT_TEMPLATES,
    AttributePair,
    BiasPrompt,
    Template,
    bias_prompts,
    hint_prompts,
)
from megatron_ext.bias.scores import first_preferred

NAMES = ["cook", "judge", "nurse", "smith"]
GROUP, BIAS, HINT = "megatron_ext_bias", "megatron_ext_genbiaseval", "megatron_ext_genhinteval"
FILES = [
    "genbias_group.yaml",
    "genbias_utils.py",
    "genbiaseval.jsonl",
    "genbiaseval.yaml",
    "genhinteval.jsonl",
    "genhinteval.yaml",
]


def test_the_folder_holds_all_that_the_tasks_need(tmp_path):
    folder = tmp_path / "new" / "tasks"
    write_harness_tasks(folder, bias_prompts(NAMES), hint_prompts(NAMES))
    assert sorted(path.name for path in folder.iterdir()) == FILES
    rows = [json.loads(line) for line in (folder / "genhinteval.jsonl").read_text().splitlines()]
    assert [BiasPrompt(**row) for row in rows] == hint_prompts(NAMES)
    texts = [path.read_text() for path in folder.iterdir()]
    assert not [text for text in texts if str(tmp_path) in text or "import megatron" in text]


def test_the_words_are_those_of_the_pair(tmp_path):
    pair = AttributePair("homme", "fée", "père", "mère")
    template = Template("The {profession}, a {hint}, is a", "word")
    write_harness_tasks(tmp_path, [BiasPrompt("A", "cook", 0, "word")], hint_prompts(["cook"], [template], pair), pair)
    for name in ("genbiaseval.yaml", "genhinteval.yaml"):
        assert 'doc_to_choice: ["homme", "fée"]' in (tmp_path / name).read_text(encoding="utf-8")


def test_functions_of_the_tasks_follow_our_scores(tmp_path, rng):
    write_harness_tasks(tmp_path, bias_prompts(NAMES), hint_prompts(NAMES))
    utils = runpy.run_path(str(tmp_path / "genbias_utils.py"))
    p = torch.rand(8, 3, generator=rng).double().softmax(-1)
    p[3, 1] = p[3, 0]  # a tie
    hint = torch.tensor([1, -1] * 4)
    results = [[(math.log(he), False), (math.log(she), False)] for he, she in p[:, :2].tolist()]
    rows = [utils["bias_scores"]({}, result) for result in results]
    hinted = [utils["hint_scores"]({"hint": h}, result) for h, result in zip(hint.tolist(), results, strict=True)]
    he, she = p[:, 0], p[:, 1]
    expected = {
        "pronoun_mass": pronoun_mass(he, she),
        "share_preferring_first": float(first_preferred(he, she).mean()),
    }
    assert mean_of(rows) == pytest.approx({"afgb_score": afgb_score(he, she), **expected}, abs=1e-12)
    assert mean_of(hinted) == pytest.approx({"ub_score": ub_score(he, she, hint), **expected}, abs=1e-12)


def mean_of(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


@pytest.mark.parametrize("there", FILES)
def test_nothing_is_overwritten(tmp_path, there):
    (tmp_path / there).write_text("mine")
    with pytest.raises(ValueError, match=f"already holds {there}: remove them or name another folder"):
        write_harness_tasks(tmp_path, bias_prompts(NAMES), hint_prompts(NAMES))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("bias", "hinted", "words"),
    [
        ([], hint_prompts(NAMES), "bias_prompts is empty"),
        (bias_prompts(NAMES), [], "hint_prompts is empty"),
        (hint_prompts(NAMES), hint_prompts(NAMES), r"bias_prompts\[0\] is 'The cook lost .*expected a hint of 0 and"),
        (bias_prompts(NAMES), bias_prompts(NAMES), r"hint_prompts\[0\] .* with hint 0: expected a hint of 1 or -1"),
        ([BiasPrompt("The cook ", "cook", 0, "word")], hint_prompts(NAMES), "a text that does not end in a space"),
        ([BiasPrompt("", "cook", 0, "word")], hint_prompts(NAMES), "a text that does not end in a space"),
    ],
)
def test_refuses_prompts_that_make_no_task(tmp_path, bias, hinted, words):
    with pytest.raises(ValueError, match=words):
        write_harness_tasks(tmp_path / "tasks", bias, hinted)
    assert not (tmp_path / "tasks").exists()


def test_the_real_harness_computes_our_scores(tmp_path, monkeypatch, rng):
    """On a random Llama whose tokenizer tells a word from a word after a space; folder moved, run from elsewhere."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    bias, hinted = bias_prompts(NAMES), hint_prompts(NAMES)
    write_harness_tasks(tmp_path / "written", bias, hinted)
    folder = (tmp_path / "written").rename(tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    assert tasks.all_tasks == [GROUP, BIAS, HINT]

    tokenizer = tiny_tokenizer()
    ties = True
    while ties:  # whom a batch of prompts prefers by a last bit, one prompt alone need not
        model = tiny_llama(len(tokenizer), rng)
        he, she = next_token_probabilities(model, tokenizer, bias)
        ties = bool(((he / she - 1).abs() < 1e-4).any())
    found = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=5), tasks=[GROUP], task_manager=tasks, num_fewshot=3
    )["results"]
    assert afgb_score(he, she) > 1e-5
    assert found[BIAS]["afgb_score,none"] == pytest.approx(afgb_score(he, she), abs=1e-6)
    assert found[BIAS]["pronoun_mass,none"] == pytest.approx(pronoun_mass(he, she), abs=1e-6)
    assert found[BIAS]["share_preferring_first,none"] == float(first_preferred(he, she).mean())
    he, she = next_token_probabilities(model, tokenizer, hinted)
    hint = torch.tensor([row.hint for row in hinted])
    assert found[HINT]["ub_score,none"] == pytest.approx(ub_score(he, she, hint), abs=1e-6)
    assert found[HINT]["pronoun_mass,none"] == pytest.approx(pronoun_mass(he, she), abs=1e-6)


def tiny_tokenizer():
    """One token for each word of the prompts; a word after a space has another one than at the start."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    texts = [template.text for template in (*BIAS_TEMPLATES, *HINT_TEMPLATES)]
    words = sorted({word for text in texts for word in text.split()} | {*NAMES, "his", "her", "he", "she", "cook,"})
    pieces = ["<unk>", *words, *("▁" + word for word in words)]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>", eos_token="<unk>")


def tiny_llama(vocabulary: int, rng: torch.Generator):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
        )
    ).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.copy_(torch.randn(weight.shape, generator=rng) / weight.shape[1] ** 0.5 * 2)
    return model


@torch.no_grad()
def next_token_probabilities(model, tokenizer, prompts: list[BiasPrompt]) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of " he" and " she", each [n], prompt by prompt."""
    words = [tokenizer.convert_tokens_to_ids(piece) for piece in ("▁he", "▁she")]
    rows = [model(torch.tensor([tokenizer.encode(row.prompt)])).logits[0, -1].softmax(-1)[words] for row in prompts]
    he, she = torch.stack(rows).unbind(1)
    return he, she


def test_names_are_free_in_the_real_harness():
    pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    assert not {GROUP, BIAS, HINT} & set(TaskManager().all_tasks)
