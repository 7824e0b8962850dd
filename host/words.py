"""Text from the VM, made fit for a terminal. Many of these words a container has chosen: its user's
name, what a command prints, why something failed.
"""

from __future__ import annotations

_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if code != 0x09}


def shown(text: str) -> str:
    r"""The text with control characters, which a terminal would obey, as \xNN; a tab stays."""
    return text.translate(_CONTROLS).encode(errors="backslashreplace").decode()
