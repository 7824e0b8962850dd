"""Runs every benchmark and prints our figures beside a peer's. `make bench`."""

from __future__ import annotations

import sys


def main() -> int:
    """Runs what there is."""
    print("no benchmarks yet")
    return 0


if __name__ == "__main__":
    sys.exit(main())
