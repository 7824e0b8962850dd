"""The names in use, from LXD's events."""

from __future__ import annotations

from typing import Any

from agent.tremplin.names_in_use import NamesInUse


def _event(action: str, name: str, **context: str) -> dict[str, Any]:
    return {"action": action, "source": f"/1.0/instances/{name}", "context": context}


def test_names_come_and_go() -> None:
    names = NamesInUse()
    names.catch_up([{"name": "one"}])
    assert (names.is_free("one"), names.is_free("two")) == (False, True)
    names.on_event(_event("instance-created", "two"))
    assert not names.is_free("two")
    names.on_event(_event("instance-renamed", "three", old_name="two"))
    assert (names.is_free("two"), names.is_free("three")) == (True, False)
    names.on_event(_event("instance-deleted", "one"))
    assert names.is_free("one")
    names.on_event(_event("instance-snapshot-deleted", "three/snapshots/snap0"))
    assert not names.is_free("three")


def test_without_events_no_name_is_free() -> None:
    names = NamesInUse()
    names.on_event(_event("instance-deleted", "one"))
    assert not names.is_free("one")
    names.catch_up([])
    assert names.is_free("one")
    names.know_nothing()
    assert not names.is_free("one")
