"""What came of the rounds: a table, and benchmarks/soak.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from soak.faults import FAULTS, Result
from soak.training import ROOT

COLUMNS = ("fault", "rounds", "injected", "survived", "bytes lost", "final weights")


def as_row(name: str, results: Sequence[Result]) -> dict[str, Any]:
    """Return what all rounds of a fault came to, by column."""
    if not all(result.ran for result in results):
        return dict(zip(COLUMNS, (name, 0, 0, 0, 0, f"not run: {results[0].problem}"), strict=True))
    sums = [sum(getattr(result, key) for result in results) for key in ("injected", "survived", "bytes_lost")]
    equal = not sums[-1] and not any(result.problem for result in results)
    return dict(zip(COLUMNS, (name, len(results), *sums, "equal" if equal else "NOT EQUAL"), strict=True))


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as Markdown."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([str(row[column]) for column in COLUMNS] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def keep(run: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], path=ROOT / "benchmarks" / "soak.json") -> None:
    """Write what was measured; the rows of some faults take the places of theirs, or stand before the last."""
    kept = json.loads(path.read_text()) if path.is_file() and len(rows) <= len(FAULTS) else {"runs": [], "rows": []}
    by_name = {row["fault"]: row for row in [*kept["rows"], *rows]}
    names = [name for name in (*FAULTS, "hostile files") if name in by_name]
    content = {"runs": [*kept["runs"], run], "rows": [by_name[name] for name in names]}
    path.write_text(json.dumps(content, indent=1) + "\n")
