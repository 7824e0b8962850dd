"""Order of the tests: cheapest first. Hypothesis has no deadlines: where others use the machine,
the wall clock says nothing of a test. Files may be open as in the guest, not a login's 1024.
"""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")
_HARD = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (_HARD, _HARD))

_TIERS = ("unit", "namespace", "lxd", "vm")


def _tier(item: pytest.Item) -> int:
    """Where the test's folder stands in _TIERS; the linters, outside of them, come first."""
    folders = item.path.relative_to(Path(__file__).parent).parts
    return _TIERS.index(folders[0]) + 1 if folders[0] in _TIERS else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts by tier; within one the order of the files stays."""
    items.sort(key=_tier)
