"""The report of a real run in a browser: what it shows, light and dark, with a pointer, with keys, and without scripts."""

from __future__ import annotations

import os
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest

from recipes.data.tokenizer import load_tokenizer
from recipes.grpo.dump_files import read_step, step_files
from tests.recipe_runs import metrics, run

pytestmark = pytest.mark.functional

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
KEEP = "REPORT_SCREENSHOTS"  # a folder where pictures are left, to be looked at


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def reported(task, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reported") / "grpo"
    done = task.grpo(
        folder, "trainer.grpo.rollout_dump={}", f"data.validation_path={task.data / 'test.jsonl'}",
        "trainer.grpo.val_check_interval=2",
    )  # fmt: skip
    assert done.code == 0, done.err
    made = run("tools/report.py", folder)
    assert made.code == 0, made.err
    return folder


@pytest.fixture
def page(browser, reported, request):
    """Whatever it says on the console, or asks of a host, fails the test."""
    options = getattr(request, "param", {})
    context = browser.new_context(viewport={"width": 1280, "height": 900}, **options)
    said: list[str] = []
    opened = context.new_page()
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    address = (reported / "report.html").as_uri()
    opened.on("request", lambda asked: None if asked.url == address else said.append(asked.url))
    opened.goto(address)
    yield opened
    context.close()
    assert not said


def test_it_is_the_run_of_the_log(page, reported):
    log = metrics(reported)
    told = page.locator(".facts dd").all_inner_texts()
    assert told[0].split() == ["3", "of", "3", "ended"]
    table = page.locator("#curves table").first
    rows = table.evaluate(
        "t => [...t.tBodies[0].rows].map(r => [...r.cells].map(c => c.querySelector('data')?.value ?? c.textContent))"
    )
    names = "train_rollouts/reward", "val_rollouts/reward"
    assert [[float(x) if x else None for x in row] for row in rows] == [
        [row["step"], *(row.get(name) for name in names)] for row in log
    ]
    environment = page.locator("#environment").inner_text()
    assert "recipes/train_grpo.py" in environment and "commit hash" in environment
    assert f"versions.torch\t{version('torch')}" in environment and f"machine.cores\t{os.cpu_count()}" in environment


def test_tokens_are_those_of_the_response(page, reported, task):
    tokenizer = load_tokenizer(task.data / "tokenizer")
    dumps = {step: read_step(path) for step, path in step_files(reported / "rollouts").items()}
    shown = page.evaluate("""() => [...document.querySelectorAll('.pane')].flatMap(pane => [...pane.querySelectorAll('.said')]
        .map(said => [pane.dataset.tab, said.getAttribute('aria-label'), said.textContent]))""")
    assert len({tab for tab, *_ in shown}) == 3 and len(shown) >= 6
    for tab, label, text in shown:
        step, sample, number = (int(word) for word in (tab + " " + label.replace(",", "")).split() if word.isdecimal())
        group = next(group for _, group in dumps[step].groups if group["number"] == number)
        tokens = [token for p in group["responses"][sample]["passages"] for token in p["tokens"]]
        whole = tokenizer.decode_whole([*group["prompt_tokens"], *tokens])
        assert text == whole[len(tokenizer.decode_whole(group["prompt_tokens"])) :].replace("\n", "↵\n")


def test_a_pointer_and_keys_show_the_numbers_of_a_step(page, reported):
    log = metrics(reported)
    chart = page.locator("figure.curve", has=page.locator("h4", has_text="grad_norm"))
    chart.locator("svg").first.hover(position={"x": 4, "y": 40})
    tip = chart.locator(".tip")
    assert tip.inner_text().split() == ["step", "1", "grad_norm", f"{log[1]['train_optim/grad_norm']:.5g}"]
    page.mouse.move(0, 0)
    assert tip.is_hidden()
    chart.locator("svg").first.focus()
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    assert tip.inner_text().split() == ["step", "2", "grad_norm", f"{log[2]['train_optim/grad_norm']:.5g}"]
    page.keyboard.press("Escape")
    assert tip.is_hidden()
    for kind, count in (("bars", 3), ("map", 3)):
        figure = page.locator(f"figure.{kind}").first
        figure.locator("svg").first.focus()
        seen = []
        for key in ("Home", *["ArrowRight"] * (count - 1)):
            page.keyboard.press(key)
            seen.append(figure.locator(".tip").inner_text().split()[:2])
        assert seen == [["step", str(i + 1)] for i in range(count)]


def test_tabs_and_tokens_by_keys(page):
    tabs, panes = page.locator(".tabs button"), page.locator(".pane")
    assert [pane.is_visible() for pane in panes.all()] == [False, False, True]
    tabs.last.focus()
    page.keyboard.press("Home")
    assert [pane.is_visible() for pane in panes.all()] == [True, False, False]
    assert tabs.first.get_attribute("aria-selected") == "true"
    said = panes.first.locator(".said").first
    tokens, told = said.locator(".t"), said.locator("xpath=following-sibling::p")
    tokens.first.focus()
    assert told.inner_text() == tokens.first.get_attribute("title")
    page.keyboard.press("ArrowRight")
    assert told.inner_text() == tokens.nth(1).get_attribute("title") and told.inner_text().startswith("token 2, id ")


def test_the_filter_leaves_keys_that_hold_a_word(page):
    rows = page.locator("details.findable tbody tr")
    page.locator(".find").fill("samples_per")
    assert [row.inner_text().split() for row in rows.all() if row.is_visible()] == [
        ["trainer.grpo.samples_per_prompt", "4"]
    ]


@pytest.mark.parametrize("page", [{"java_script_enabled": False}], indirect=True)
def test_without_scripts_all_of_it_can_be_read(page):
    assert all(pane.is_visible() for pane in page.locator(".pane").all())
    assert page.locator("figure.curve svg path.line").first.is_visible()
    page.locator("#curves summary").first.click()
    assert page.locator("#curves table").first.is_visible()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize(
    "page", [{"color_scheme": "light"}, {"color_scheme": "dark"}], indirect=True, ids=["light", "dark"]
)
def test_it_can_be_read_light_and_dark_wide_and_narrow(page, width, request):
    """Text stands out from what is behind it (WCAG 2: 4.5 to 1), and nothing but tables is wider than the window."""
    page.set_viewport_size({"width": width, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    poor = page.evaluate(CONTRAST)
    assert not poor
    if folder := os.environ.get(KEEP):
        page.screenshot(path=Path(folder, f"{request.node.callspec.id}.png"), full_page=True)


# Every text whose colour is too near to that behind it, with the ratio. Colours that let others through are laid over them.
CONTRAST = """() => {
  const parts = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return [...n.slice(0, 3), n.length > 3 ? n[3] : 1]; };
  const light = (rgb) => rgb.map(c => c / 255).map(c => c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const behind = (node) => {
    const layers = [];
    for (let at = node; at; at = at.parentElement) layers.unshift(parts(getComputedStyle(at).backgroundColor));
    return layers.reduce((under, [r, g, b, a]) => under.map((c, i) => c * (1 - a) + [r, g, b][i] * a), [255, 255, 255]);
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let text = walker.nextNode(); text; text = walker.nextNode()) {
    const node = text.parentElement;
    if (!text.data.trim() || !node.checkVisibility() || node.closest("script")) continue;
    const style = getComputedStyle(node), svg = node.closest("svg");
    const [a, b] = [light(parts(svg ? style.fill : style.color).slice(0, 3)), light(behind(svg ? svg.parentElement : node))];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) found.push([text.data.slice(0, 40), node.className, ratio]);
  }
  return found.slice(0, 10);
}"""
