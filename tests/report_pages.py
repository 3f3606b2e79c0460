"""The page of `tools/report.py`, made and taken apart."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree.ElementTree import Element

import html5lib

from tools.reporting.page import render
from tools.reporting.runs import names_of, read_run

__all__ = ["classes", "page_of", "parsed", "section", "table_of", "text_of", "value_of"]


def page_of(*folders: Path, dumped_steps: int = 60, sampled: int = 4) -> str:
    runs = [read_run(folder, name) for folder, name in zip(folders, names_of(folders), strict=True)]
    return render(runs, dumped_steps, sampled)


def parsed(page: str) -> Element:
    """Whatever is not valid raises."""
    return html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(page)


def text_of(node: Element) -> str:
    return "".join(node.itertext())


def section(page: Element, name: str) -> Element:
    return page.find(f".//section[@id='{name}']")


def table_of(node: Element) -> tuple[list[str], list[list[Element]]]:
    """(names of the columns, cells of each row)."""
    names = [text_of(cell) for cell in node.findall("./thead/tr/th")]
    return names, [list(row) for row in node.findall("./tbody/tr")]


def value_of(cell: Element) -> float | None:
    """All digits of a number, of which the reader sees five."""
    number = cell.find("data")
    if number is None:
        return None
    value, seen = float(number.get("value")), float(text_of(number).replace(",", ""))
    assert math.isclose(seen, value, rel_tol=6e-5) or not math.isfinite(value)
    return value


def classes(node: Element) -> set[str]:
    return set(node.get("class", "").split())
