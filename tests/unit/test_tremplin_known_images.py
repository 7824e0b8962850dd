"""What the aliases of image servers were found to mean."""

from __future__ import annotations

from agent.tremplin.image_source import FromServer, KnownImages

_BUSYBOX = FromServer("https://images", "busybox")


def test_what_an_alias_means_is_known_for_ten_minutes() -> None:
    known = KnownImages()
    assert known.fingerprint(_BUSYBOX, 0.0) == ""
    known.note(_BUSYBOX, "f1", 100.0)
    assert known.fingerprint(_BUSYBOX, 699.0) == "f1"
    assert known.fingerprint(_BUSYBOX, 700.0) == ""
    assert known.fingerprint(FromServer("https://images", "big"), 100.0) == ""
    known.note(_BUSYBOX, "f2", 650.0)
    assert known.fingerprint(_BUSYBOX, 700.0) == "f2"
    known.forget(_BUSYBOX)
    known.forget(_BUSYBOX)
    assert known.fingerprint(_BUSYBOX, 700.0) == ""


def test_the_oldest_go_when_they_are_many() -> None:
    known = KnownImages()
    for number in range(100):
        known.note(FromServer("https://images", str(number)), f"f{number}", 0.0)
    found = [known.fingerprint(FromServer("https://images", str(n)), 0.0) for n in range(100)]
    assert found == [""] * 36 + [f"f{n}" for n in range(36, 100)]
