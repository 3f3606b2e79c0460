"""What the check of a GPU finds, as one JSON file. Standard library only: the process that writes it never touches the GPU.

    {"version": 1,
     "machine": {...} or null,            bench_common.record: date, commit, machine, versions, settings
     "sections": [{"name": str, "status": "ok" | "failed" | "skipped", "reason": str or null, "seconds": float,
                   "budget_seconds": float,
                   "checks": [{"name": str, "value": float or null, "limit": float, "ok": bool, "error": str or null}],
                   "numbers": {table: [{column: str, int, float, bool or null}, ...]},
                   "notes": [str]}]}

A section failed when a check did, or when it ended before its end; a check is ok where its value is at most its limit, and its
value is null where it raised. A skipped section has a reason. What a section found before it was stopped stands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ext.files import write_json

__all__ = ["STATUSES", "VERSION", "Check", "Section", "Value", "check_result", "print_section", "write_result"]

VERSION = 1
STATUSES = ("ok", "failed", "skipped")
Value = str | int | float | bool | None


@dataclass
class Check:
    """A number that must not exceed a limit; None where it could not be found, and why."""

    name: str
    value: float | None
    limit: float
    error: str | None = None

    @property
    def ok(self) -> bool:
        return self.value is not None and self.value <= self.limit

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "value": self.value, "limit": self.limit, "ok": self.ok, "error": self.error}


@dataclass
class Section:
    """What one section has found so far."""

    name: str
    budget_seconds: float
    status: str = "failed"
    reason: str | None = "it has not ended"
    seconds: float = 0.0
    checks: list[Check] = field(default_factory=list)
    numbers: dict[str, list[dict[str, Value]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def end(self, status: str, reason: str | None, seconds: float) -> None:
        """Say how it ended; one whose checks failed has failed, however it ended."""
        broken = [check for check in self.checks if not check.ok]
        if broken and status == "ok":
            first = broken[0]
            found = first.error or f"{first.value:.4g} is more than {first.limit:.4g}"
            more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
            status, reason = "failed", f"{first.name}: {found}{more}"
        self.status, self.reason, self.seconds = status, reason, round(seconds, 2)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"checks": [check.to_json() for check in self.checks]}


def write_result(path: Path, machine: dict | None, sections: Sequence[Section]) -> None:
    """Write all that is known, whole: a kill leaves this file or the one before it."""
    result = {"version": VERSION, "machine": machine, "sections": [section.to_json() for section in sections]}
    check_result(result)
    write_json(path, result)


SECTION = {"name": str, "status": str, "reason": (str, type(None)), "seconds": (int, float), "budget_seconds": (int, float),
           "checks": list, "numbers": dict, "notes": list}  # fmt: skip
CHECK = {"name": str, "value": (int, float, type(None)), "limit": (int, float), "ok": bool, "error": (str, type(None))}


def check_result(result: Any) -> None:
    """Refuse what is no result of this version.

    Raises:
        ValueError: naming the first place that is wrong.
    """
    _has(result, {"version": int, "machine": (dict, type(None)), "sections": list}, "result")
    if result["version"] != VERSION:
        raise ValueError(f"result.version is {result['version']}, not {VERSION}")
    for section in result["sections"]:
        _has(section, SECTION, "section")
        where = f"section {section['name']}"
        if section["status"] not in STATUSES:
            raise ValueError(f"{where}: status {section['status']!r} is none of {', '.join(STATUSES)}")
        if (section["status"] == "ok") != (section["reason"] is None):
            raise ValueError(f"{where}: status {section['status']} with reason {section['reason']!r}")
        for check in section["checks"]:
            _has(check, CHECK, f"{where}: check")
            if check["ok"] != (check["value"] is not None and check["value"] <= check["limit"]):
                raise ValueError(f"{where}: check {check['name']} says ok={check['ok']}, its numbers do not")
        for name, rows in section["numbers"].items():
            for row in rows:
                if not isinstance(row, dict) or not all(isinstance(v, Value) for v in row.values()):
                    raise ValueError(f"{where}: {name} has a row that is no plain mapping: {row!r}")
        if not all(isinstance(note, str) for note in section["notes"]):
            raise ValueError(f"{where}: a note is no text")


def _has(value: Any, kinds: dict[str, Any], where: str) -> None:
    if not isinstance(value, dict) or value.keys() != kinds.keys():
        raise ValueError(f"{where} must be a mapping with {', '.join(kinds)}, got {str(value)[:100]}")
    for key, kind in kinds.items():
        if not isinstance(value[key], kind):
            raise ValueError(f"{where}.{key} is {value[key]!r}")


def print_section(section: Section) -> None:
    """Its tables as Markdown, its checks that failed, its notes, and how it ended."""
    print(f"\n## {section.name}: {section.status} ({section.seconds:.0f} s of {section.budget_seconds:.0f})")
    for title, rows in section.numbers.items():
        _print_rows(title, rows)
    print()
    for check in section.checks:
        if not check.ok:
            found = check.error or f"{check.value:.4g} is more than {check.limit:.4g}"
            print(f"FAILED {check.name}: {found}")
    good = sum(check.ok for check in section.checks)
    if section.checks:
        print(f"{good} of {len(section.checks)} checks passed")
    for note in section.notes:
        print(f"note: {note}")
    if section.reason is not None:
        print(f"{section.status}: {section.reason}", flush=True)


def _print_rows(title: str, rows: list[dict[str, Value]]) -> None:
    header = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_text(row.get(key)) for key in header] for row in rows]
    widths = [max(len(line[i]) for line in (header, *cells)) for i in range(len(header))]
    print(f"\n{title}\n")
    for line in (header, ["-" * width for width in widths], *cells):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")


def _text(value: Value) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
