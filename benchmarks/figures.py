"""What a benchmark yields, and the table that is made of it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Figure:
    """One line of a table.

    what: what was measured. values: result by contestant, ours first; None where it does not apply.
    unit: ms, MB, ... goal: the figure to reach, in words. reached: whether ours does; None when
    nothing was set.
    """

    what: str
    values: dict[str, float | None]
    unit: str
    goal: str = ""
    reached: bool | None = field(default=None)


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.1g}"


def table(figures: list[Figure]) -> str:
    """A Markdown table with a column for each contestant."""
    contestants = list(dict.fromkeys(name for figure in figures for name in figure.values))
    rows = [["figure", *contestants, "goal", "reached"]]
    for figure in figures:
        cells = [figure.values.get(name) for name in contestants]
        rows.append(
            [
                f"{figure.what} ({figure.unit})",
                *("–" if value is None else number(value) for value in cells),
                figure.goal,
                {None: "", True: "yes", False: "no"}[figure.reached],
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
