"""One spelling for a text that may be written in many: characters, LaTeX, Markdown, white space."""

from __future__ import annotations

import re
import unicodedata

__all__ = ["closing_brace", "plain"]

LONGEST_NOTATION = 2000  # characters; a longer text is prose, and stays as it is but for its white space


def plain(text: str) -> str:
    """The text in one spelling: of characters, LaTeX, Markdown and white space. Lines stay apart."""
    if len(text) > LONGEST_NOTATION:
        return _lines(unicodedata.normalize("NFC", text))
    spelt = unicodedata.normalize("NFC", text.translate(_CHARACTERS)).replace("}^{", "").replace("}_{", "")
    spelt = _unwrapped(spelt)
    for pattern, replacement in _SPELLINGS:
        spelt = pattern.sub(replacement, spelt)
    spelt = _bare(_AROUND_SYMBOLS.sub(r"\1", _lines(spelt)))
    return _BRACED.sub(r"\1\2", spelt) or _lines(text)


def closing_brace(text: str, start: int) -> int | None:
    """Where the brace that is open at `start` closes; None, if it does not."""
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if not depth:
            return brace.start()
    return None


def _unwrapped(text: str) -> str:
    r"""Without \text{}, \mathbf{} and the like around what they hold."""
    while (wrapper := _WRAPPER.search(text)) and (end := closing_brace(text, wrapper.end())) is not None:
        text = f"{text[: wrapper.start()]} {text[wrapper.end() : end]} {text[end + 1 :]}"
    return text


def _spell(character: str) -> str:
    """One character by its kind in Unicode: digits of all scripts, full-width forms, ½, ², ₂."""
    if character in _ODD:
        return _ODD[character]
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    kind, *codes = unicodedata.decomposition(character).split() or [""]
    if not kind.startswith("<"):
        return character
    parts = "".join(_spell(chr(int(code, 16))) for code in codes)
    if kind == "<fraction>":
        top, _, bottom = parts.partition("/")
        return rf"\frac{{{top}}}{{{bottom}}}"
    if kind in ("<super>", "<sub>"):
        return f"{'^' if kind == '<super>' else '_'}{{{parts}}}"
    # "①", "⒈" and the like do not stand among digits: "1①" is not 11.
    is_ornament = kind in ("<circle>", "<square>") or unicodedata.category(character) in ("No", "Nl")
    return character if is_ornament else parts


_ODD = {
    **dict.fromkeys("‐‑‒–−", "-"), **dict.fromkeys("⁄∕÷", "/"), **dict.fromkeys("×·⋅∙", "*"), **dict.fromkeys("‘’ʼ", "'"),
    **dict.fromkeys("“”„", '"'), **dict.fromkeys("\u200b\u200e\u200f\u2060\ufeff\u00ad\u061c", ""),
    "٫": ".", "٬": ",", "٪": "%", "。": ".", "√": r"\sqrt",
}  # fmt: skip


class _Characters(dict):
    """For str.translate: each character's spelling, found when it is first met."""

    def __missing__(self, code: int) -> str:
        self[code] = _spell(chr(code))
        return self[code]


_CHARACTERS = _Characters({code: chr(code) for code in range(128)})

_COMMANDS = {
    r"times|cdot|ast": "*", "div": "/", "pi": "π", "infty": "∞", "pm": "±", "leq?": "≤", "geq?": "≥", "neq?": "≠", "approx": "≈",
    "displaystyle|left|right": "", "q?quad": "  ", "dots|ldots|cdots": "...",
}  # fmt: skip
_WRAPPER = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it|sf)|mbox|boxed|fbox|operatorname)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.S)
_SPELLINGS = [  # in this order
    (re.compile(r"\\!"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[,:; ]"), " "),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\frac\s*(?:\{([^{}]*)\}|(\w))\s*(?:\{([^{}]*)\}|(\w))"), r"\\frac{\1\2}{\3\4}"),
    (re.compile(r"\\sqrt\s*(\d+|[A-Za-z])"), r"\\sqrt{\1}"),
    (re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree|\\textdegree"), "°"),
    *((re.compile(rf"\\(?:{name})(?![A-Za-z])"), sign) for name, sign in _COMMANDS.items()),
    (re.compile(r"(?<=\d)(?:\t|[^\S\n]{2,})(?=\d|\\frac)"), " ; "),  # columns are no thousands
    (re.compile(r"\\\[|\\\]|\\\(|\\\)|\$\$"), " "),
    (re.compile(r"(?<!\\)\$(?=\S)((?:\\.|[^$\\])+)(?<=\S)\$(?!\d)"), r"\1"),
    (re.compile(r"\\([%$#&_])"), r"\1"),
    (re.compile(r"(?<=[\d)])\*\*(?=[\d(-])"), "^"),
    (re.compile(r"(?<![\w)*])\*\*([^*]+)\*\*(?![\w(*])"), r"\1"),
]
_AROUND_SYMBOLS = re.compile(r""" ?([^\w\s.,:;!?'"]) ?|(?<=\d) (?=[π∞])""")
_BRACED = re.compile(r"([\^_])\{([-+]?\w+)\}")


def _lines(text: str) -> str:
    """White space as single spaces and single line ends."""
    return "\n".join(line for raw in text.splitlines() if (line := " ".join(raw.split())))


def _bare(text: str) -> str:
    """Without what stands around an answer: Markdown, quotes, math delimiters and one full stop."""
    before = None
    while text != before:
        before = text
        text = text.strip()
        for mark in ("**", "__", "`"):
            text = text.removeprefix(mark).removesuffix(mark)
        if len(text) > 1 and text[0] == text[-1] and text[0] in "*_$\"'" and text[0] not in text[1:-1]:
            text = text[1:-1]
        if text.endswith(".") and not text.endswith(".."):
            text = text[:-1]
    return text
