"""LFTF end to end: the bias goes, one block has changed, and every layout and transformers agree on the numbers."""

from __future__ import annotations

import csv
import json
import shutil
from statistics import mean

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_ext.bias.prompts import bias_prompts, hint_prompts, read_professions_json, split_by_profession
from megatron_ext.blocks.delta import apply_delta, read_delta
from megatron_ext.models import GPTModelConfig, build_gpt
from megatron_ext.runtime.checkpoint import load_weights, read_checkpoint_info
from recipes.cli.config import build
from recipes.data.tokenizer import load_tokenizer
from tests.hf_llama import save_llama
from tests.recipe_runs import metrics

pytestmark = pytest.mark.functional

BOUND = 1e-5
SHORT = ["trainer.lftf.max_steps=4", "trainer.lftf.val_check_interval=2"]
NUMBERS = (
    "afgb", "ub", "pronoun_mass", "hinted_pronoun_mass", "share_preferring_first", "perplexity", "afgb_interval",
    "ub_interval", "profession_table",
)  # fmt: skip


def result(folder) -> dict:
    return json.loads((folder / "result.json").read_text())


def weights(folder, world) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors, whole."""
    model = build_gpt(build(GPTModelConfig, read_checkpoint_info(folder)["model"]), world)
    load_weights(folder, model)
    return {name: p.detach() for name, p in model.named_parameters()}


def assert_same_numbers(found: dict, expected: dict) -> None:
    for key in NUMBERS:
        if isinstance(expected[key], dict):
            assert found[key] == pytest.approx(expected[key], abs=BOUND), key
        else:
            assert found[key] == pytest.approx(expected[key], rel=BOUND, abs=BOUND), key


@pytest.fixture(scope="module")
def mended(bias_task, tmp_path_factory):
    out = tmp_path_factory.mktemp("mended") / "run"
    done = bias_task.lftf(out, "trainer.lftf.max_epochs=10", "trainer.lftf.loss=balanced+2*hint+kl")
    assert done.code == 0, done.err
    return out


def test_the_bias_goes_and_nothing_else(mended):
    """The numbers that `make lftf` is held to, on professions held out of the fine-tuning."""
    found = result(mended)
    before, after = found["before"], found["after"]
    assert before["afgb"] >= 0.3 and before["ub"] > 0.5, "the model is not biased, or hears no hint: nothing is tested"
    assert after["afgb"] <= 0.4 * before["afgb"]
    assert after["ub"] >= before["ub"] - 0.05
    assert after["pronoun_mass"] > 0.8 * before["pronoun_mass"]
    assert after["perplexity"] < 1.03 * before["perplexity"]


def test_one_block_has_changed_bitwise(bias_task, mended, world):
    block = result(mended)["block"]
    before, after = weights(bias_task.checkpoint, world), weights(mended / "checkpoints/final", world)
    for name, value in after.items():
        assert torch.equal(value, before[name]) == (f"layers.{block}." not in name), name


def test_a_run_leaves_its_report(mended):
    found = result(mended)
    assert found["ranking"]["best"] == found["block"] != 0
    report = (mended / "report.md").read_text()
    assert f"{found['after']['afgb']:.4f}" in report and "## Blocks by gradient" in report
    assert (mended / "ranking-gradient.png").stat().st_size > 5000
    kept = [v for v in found["validations"] if v["complaint"] is None]
    assert found["best_step"] == min(kept, key=lambda v: v["val/afgb"])["step"]
    steps = [r["step"] for r in metrics(mended)]
    assert steps == list(range(found["steps"] + 1))


def test_a_run_that_was_stopped_goes_on_bitwise(bias_task, world, tmp_path):
    """Stopped after its first step, and started again; beside it one that is left alone and saves in the background."""
    settings = ["trainer.lftf.max_steps=10", "trainer.lftf.val_check_interval=2", "trainer.lftf.save_interval=3",
                "trainer.lftf.loss=balanced+2*hint+kl", "trainer.lftf.locate_prompts=20", "trainer.devices=1"]  # fmt: skip
    resume = "exp_manager.resume_if_exists=true"
    runs = {
        "straight": [["exp_manager.checkpoint_callback_params.async_save=true"]],
        "stopped": [[resume, 'trainer.max_time_per_run="00:00:00:00"'], [resume]],
    }
    for name, starts in runs.items():
        for more in starts:
            done = bias_task.lftf(tmp_path / name, *settings, *more)
            assert done.code == 0, done.err
        steps = "step-1" if name == "stopped" else "step-3"
        assert (tmp_path / name / "checkpoints" / steps / "best").is_dir()
    assert "going on after step 1" in done.out + done.err
    assert result(tmp_path / "stopped") == result(tmp_path / "straight")
    found = [weights(tmp_path / name / "checkpoints/final", world) for name in runs]
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())
    (about, delta), (other_about, other) = (read_delta(tmp_path / name / "delta.safetensors") for name in runs)
    assert about == other_about and delta.keys() == other.keys()
    assert all(torch.equal(other[name], value) for name, value in delta.items())
    rows = [[{k: v for k, v in r.items() if not k.startswith("timers/")} for r in metrics(tmp_path / n)] for n in runs]
    assert rows[0] == rows[1] and [r["step"] for r in rows[0]] == list(range(11))


def test_a_run_that_diverges_ends_with_its_best_state(bias_task, world, tmp_path):
    done = bias_task.lftf(
        tmp_path / "run", "trainer.lftf.max_steps=6", "trainer.lftf.val_check_interval=1", "trainer.lftf.block=1",
        "trainer.lftf.loss=abs_diff", "model.optim.lr=1e20", "model.optim.sched.warmup_steps=0", "trainer.devices=1",
    )  # fmt: skip
    assert done.code == 0, done.err
    found = result(tmp_path / "run")
    assert "diverged" in found["stopped"] and found["steps"] < 6 and found["best_step"] == 0
    assert {k: found["after"][k] for k in NUMBERS} == {k: found["before"][k] for k in NUMBERS}
    before, after = weights(bias_task.checkpoint, world), weights(tmp_path / "run/checkpoints/final", world)
    assert all(torch.equal(before[name], value) for name, value in after.items())


DAMAGED = {
    "no description": lambda about: {"format": about["format"]},
    "broken description": lambda about: about | {"delta": about["delta"][:-5]},
    "no base": lambda about: about | {"delta": json.dumps({**json.loads(about["delta"]), "base": 3})},
    "another dtype": lambda about: about | {"delta": json.dumps({**json.loads(about["delta"]), "dtype": "bfloat16"})},
    "no checksum": lambda about: (
        about | {"delta": json.dumps({k: v for k, v in json.loads(about["delta"]).items() if k != "content"})}
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_delta_is_one_line(damage, bias_task, mended, world, tmp_path):
    with safe_open(str(mended / "delta.safetensors"), "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        save_file(tensors, str(tmp_path / "d"), metadata=DAMAGED[damage](file.metadata()))
    model = build_gpt(build(GPTModelConfig, read_checkpoint_info(bias_task.checkpoint)["model"]), world)
    load_weights(bias_task.checkpoint, model)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="the delta .*d is damaged"):
        apply_delta(tmp_path / "d", model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_delta_of_another_precision_is_refused(bias_task, mended, world):
    fields = read_checkpoint_info(bias_task.checkpoint)["model"] | {"precision": "bf16"}
    model = build_gpt(build(GPTModelConfig, fields), world)
    with pytest.raises(ValueError, match="was trained in float32, this model is bfloat16.*set model.precision"):
        apply_delta(mended / "delta.safetensors", model)


def test_the_delta_is_the_checkpoint(bias_task, mended, tmp_path):
    """Put into the model it came from it gives the fine-tuned model's numbers; any other model is refused."""
    delta = mended / "delta.safetensors"
    assert delta.stat().st_size < 0.5 * sum(f.stat().st_size for f in (mended / "checkpoints/final/weights").iterdir())
    done = bias_task.evaluate(tmp_path / "e", bias_task.checkpoint, f"pretrained_checkpoint.delta_path={delta}")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "e" / "bias.json").read_text())
    assert {k: found[k] for k in NUMBERS} == {k: result(mended)["after"][k] for k in NUMBERS}


def test_a_delta_of_another_model_is_refused(bias_task, mended, world, tmp_path):
    """The fine-tuned model's own block is not what the delta replaces; nor has another file's format."""
    model = build_gpt(build(GPTModelConfig, read_checkpoint_info(bias_task.checkpoint)["model"]), world)
    load_weights(mended / "checkpoints/final", model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="does not fit: it was made from other weights"):
        apply_delta(mended / "delta.safetensors", model)
    other = build_gpt(
        build(GPTModelConfig, read_checkpoint_info(bias_task.checkpoint)["model"] | {"num_layers": 2}), world
    )
    with pytest.raises(ValueError, match="belongs to a model of 3 blocks, this one has 2"):
        apply_delta(mended / "delta.safetensors", other)
    path = tmp_path / "broken.safetensors"
    path.write_bytes((mended / "delta.safetensors").read_bytes()[:200])
    with pytest.raises(ValueError, match="cannot read the delta"):
        apply_delta(path, model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.fixture(scope="module")
def one_rank(bias_task, tmp_path_factory):
    out = tmp_path_factory.mktemp("one_rank") / "run"
    done = bias_task.lftf(out, *SHORT)
    assert done.code == 0, done.err
    return out


@pytest.mark.parametrize(
    "layout",
    [
        ["trainer.devices=4", "model.tensor_model_parallel_size=2", "model.sequence_parallel=true"],
        ["trainer.devices=3", "model.pipeline_model_parallel_size=3"],
        ["trainer.devices=2", "model.optim.overlap_grad_reduce=true", "model.optim.overlap_param_gather=true"],
    ],
    ids=["tp2 sp dp2", "pp3", "dp2 overlapping"],
)
def test_layouts_agree(layout, bias_task, one_rank, tmp_path):
    """Ranking, losses, validations and scores."""
    done = bias_task.lftf(tmp_path / "run", *SHORT, *layout)
    assert done.code == 0, done.err
    found, expected = result(tmp_path / "run"), result(one_rank)
    assert found["block"] == expected["block"] and found["ranking"]["order"] == expected["ranking"]["order"]
    assert found["ranking"]["scores"] == pytest.approx(expected["ranking"]["scores"], rel=BOUND)
    assert_same_numbers(found["before"], expected["before"])
    assert_same_numbers(found["after"], expected["after"])
    for ours, theirs in zip(metrics(tmp_path / "run"), metrics(one_rank), strict=True):
        keys = [key for key in theirs if key.startswith(("train_optim/", "val/"))]
        assert len(keys) >= 3
        for key in keys:
            assert ours[key] == pytest.approx(theirs[key], rel=BOUND, abs=BOUND), key


def test_sum_fails_the_guard(bias_task, tmp_path):
    """Without a guard it silences both pronouns; with one the run goes back to a state that has them."""
    free = ["trainer.lftf.min_pronoun_mass=0", "trainer.lftf.max_perplexity=null", "trainer.lftf.patience=null"]
    loss = ["trainer.lftf.loss=sum", "trainer.lftf.block=last", "trainer.lftf.max_epochs=5"]
    done = bias_task.lftf(tmp_path / "free", *loss, *free)
    assert done.code == 0, done.err
    found = result(tmp_path / "free")
    assert found["after"]["pronoun_mass"] < 0.5 * found["before"]["pronoun_mass"]
    assert found["after"]["ub"] < 0.5 * found["before"]["ub"]
    done = bias_task.lftf(tmp_path / "guarded", *loss, "trainer.lftf.patience=2")
    assert done.code == 0, done.err
    found = result(tmp_path / "guarded")
    assert found["after"]["pronoun_mass"] > 0.8 * found["before"]["pronoun_mass"]
    assert any("pronoun mass is" in (v["complaint"] or "") for v in found["validations"])
    assert "pronoun mass is" in found["stopped"] and found["steps"] < 30


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


@pytest.fixture(scope="module")
def llama(bias_task, world, tmp_path_factory):
    """The biased model as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("hf") / "llama"
    config = build(GPTModelConfig, read_checkpoint_info(bias_task.checkpoint)["model"])
    save_llama(folder, weights(bias_task.checkpoint, world), config)
    shutil.copytree(bias_task.data / "tokenizer", folder, dirs_exist_ok=True)
    return folder


def test_a_delta_of_a_hugging_face_folder_goes_back_into_it(bias_task, llama, tmp_path):
    """On one process, too: transformers cannot take it, so the folder is read as one of ours."""
    done = bias_task.lftf(tmp_path / "run", *SHORT, f"pretrained_checkpoint.restore_from_path={llama}")
    assert done.code == 0, done.err
    delta = f"pretrained_checkpoint.delta_path={tmp_path / 'run/delta.safetensors'}"
    done = bias_task.evaluate(tmp_path / "e", llama, delta)
    assert done.code == 0, done.err
    found, trained = json.loads((tmp_path / "e" / "bias.json").read_text()), result(tmp_path / "run")
    assert {k: found[k] for k in NUMBERS} == {k: trained["after"][k] for k in NUMBERS}
    assert trained["after"]["afgb"] != trained["before"]["afgb"]


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
    from tests.recipe_runs import run

    done = run(
        "recipes/locate_bias.py", f"pretrained_checkpoint.restore_from_path={bias_task.checkpoint}",
        f"exp_manager.explicit_log_dir={tmp_path / 'run'}", f"data.prompts.professions_path={bias_task.professions}",
        "trainer.locate.estimators=[last,similarity]", "trainer.locate.locate_prompts=20",
    )  # fmt: skip
    assert done.code == 0, done.err
    ranking = json.loads((tmp_path / "run" / "ranking-last.json").read_text())
    assert ranking["order"] == [2, 1] and ranking["excluded"] == [0]
    assert "| excluded | 0 | 0 |" in (tmp_path / "run" / "ranking-last.md").read_text()
    assert (tmp_path / "run" / "ranking-similarity.png").stat().st_size > 5000


def test_a_diverged_model_is_one_line(bias_task, llama, tmp_path):
    """On two ranks, of which one speaks."""
    from tests.recipe_runs import run

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
