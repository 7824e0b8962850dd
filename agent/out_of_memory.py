"""Whom the kernel kills when the memory is full: nobody of the agent while a container has any
process left. A container can fill it with files in a tmpfs of its own, which are no process's, and
go when its last process does.
"""

from __future__ import annotations

_SCORE = "-900"
"""Of 1000, proc(5): below everybody else who does not have nearly all of the memory himself."""


def spare_us() -> None:
    """Spares this process, and those that it starts."""
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write(_SCORE)
    except OSError:
        pass  # who is not root has no say in it
