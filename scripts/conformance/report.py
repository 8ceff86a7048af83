"""Results for people, for programs and for documents."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence

from .check import Check
from .facts import Facts
from .strings import printable
from .verdicts import Level, Result, Verdict

_SHOWN = {
    Verdict.PASS: "pass",
    Verdict.FAIL: "FAIL",
    Verdict.SKIP: "skip",
    Verdict.ERROR: "ERROR",
}


def format_row(result: Result) -> str:
    """One line for a result, and behind a failure what happened."""
    line = f"{_SHOWN[result.verdict]:<5}  {result.level.value:<6}  {result.check}"
    if result.verdict in (Verdict.SKIP, Verdict.ERROR):
        return line + _paragraph("why", result.reason, one_line=result.verdict is Verdict.SKIP)
    if result.verdict is Verdict.FAIL:
        return line + "".join(
            _paragraph(name, text)
            for name, text in (
                ("rule", result.violated or result.sentence),
                ("sent", result.sent),
                ("expected", result.expected),
                ("came", result.came),
            )
        )
    return line


def _paragraph(name: str, text: str, *, one_line: bool = False) -> str:
    text = printable(text)
    if one_line:
        return f"  ({text})"
    wrapped = textwrap.wrap(text, 86, break_long_words=False) or [""]
    lines = [f"\n         {name + ':':<10}{wrapped[0]}"]
    lines += [f"\n                   {line}" for line in wrapped[1:]]
    return "".join(lines)


def summarize(results: Sequence[Result]) -> str:
    """One line with the numbers."""
    verdicts = Counter(result.verdict for result in results)
    found = count_findings(results)
    findings = ", ".join(f"{found[level]} {level.value}" for level in Level)
    text = (
        f"{len(results)} checks: {verdicts[Verdict.PASS]} passed, {verdicts[Verdict.SKIP]} skipped,"
        f" {verdicts[Verdict.FAIL]} failed ({findings})"
    )
    if verdicts[Verdict.ERROR]:
        text += f", {verdicts[Verdict.ERROR]} not carried out"
    return text


def count_findings(results: Iterable[Result]) -> Counter[Level]:
    """Failed checks by level."""
    return Counter(result.level for result in results if result.verdict is Verdict.FAIL)


def format_json(uri: str, facts: Facts, results: Sequence[Result]) -> str:
    """Everything, for programs."""
    found = count_findings(results)
    document = {
        "uri": uri,
        "server": dict(facts.describe()),
        "notes": facts.notes,
        "findings": {level.value: found[level] for level in Level},
        "checks": [
            {
                "check": result.check,
                "section": result.section,
                "declared": result.declared.value,
                "level": result.level.value,
                "sentence": result.sentence,
                "verdict": result.verdict.value,
                "seconds": round(result.seconds, 3),
                **{
                    name: value
                    for name in ("reason", "sent", "expected", "came", "violated")
                    if (value := getattr(result, name))
                },
            }
            for result in results
        ],
    }
    return json.dumps(document, indent=2)


def format_markdown(uri: str, facts: Facts, results: Sequence[Result]) -> str:
    """A document of one server: a table, and the findings behind it."""
    lines = [f"# {uri}", "", *(f"- {what}: {_cell(how)}" for what, how in facts.describe()), ""]
    lines += ["| section | check | level | verdict |", "|---|---|---|---|"]
    for result in results:
        shown = _SHOWN[result.verdict]
        if result.verdict is Verdict.SKIP:
            shown += f": {_cell(result.reason)}"
        name = result.check.partition("/")[2]
        lines.append(f"| {result.section} | {name} | {result.level.value} | {shown} |")
    lines += ["", summarize(results), ""]
    lines += markdown_findings(results)
    return "\n".join(lines)


def markdown_findings(results: Iterable[Result]) -> list[str]:
    """Lines that tell what every failed check sent, expected and got."""
    lines = []
    for result in results:
        if result.verdict is Verdict.FAIL:
            lines += [
                f"- **{result.check}** ({result.level.value})",
                f"  - rule: {_cell(result.violated or result.sentence)}",
                f"  - sent: {_cell(result.sent)}",
                f"  - expected: {_cell(result.expected)}",
                f"  - came: {_cell(result.came)}",
            ]
    return lines


def format_list(checks: Iterable[Check]) -> str:
    """All checks with their sentences."""
    lines = []
    for check in checks:
        writes = "  (--write)" if check.writes else ""
        lines.append(f"{check.level.value:<6}  {check.name}{writes}")
        lines += textwrap.wrap(
            check.sentence, 90, initial_indent="        ", subsequent_indent="        "
        )
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(printable(text).split()).replace("|", "\\|").replace("<", "&lt;")
