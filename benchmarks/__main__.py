"""Runs benchmarks and prints our figures beside a peer's: `make bench`, or `make bench BENCH=NAME`.

Every other module of this folder that has a `run` function is a benchmark: it yields Figures
(figures.py), which are printed as a table.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from pathlib import Path

from benchmarks.figures import table


def names() -> list[str]:
    """The benchmarks there are."""
    modules = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))
    return [
        name for name in modules if hasattr(importlib.import_module(f"benchmarks.{name}"), "run")
    ]


def main(wanted: list[str]) -> int:
    """Runs the benchmarks wanted, or all; the exit code."""
    there = names()
    if unknown := sorted(set(wanted) - set(there)):
        print(
            f"cannot run {', '.join(unknown)}: there is only {', '.join(there) or 'none'}",
            file=sys.stderr,
        )
        return 2
    failed = False
    for name in wanted or there:
        started = time.monotonic()
        module = importlib.import_module(f"benchmarks.{name}")
        print(f"## {name}\n\n{(module.__doc__ or '').splitlines()[0]}\n", flush=True)
        figures = []
        for figure in module.run():
            print(f"measured: {figure.what}", file=sys.stderr, flush=True)
            figures.append(figure)
        print(table(figures))
        print(f"\n{os.cpu_count()} processors, {time.monotonic() - started:.0f} s\n", flush=True)
        failed = failed or any(figure.reached is False for figure in figures)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
