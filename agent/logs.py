"""logging for maitred and tremplin, in the form of the console. Not for PID 1, which does without
the logging module.
"""

from __future__ import annotations

import logging
import sys

from agent.console import format_line


class _ConsoleFormatter(logging.Formatter):
    def __init__(self, program: str) -> None:
        super().__init__()
        self._program = program

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            frame = error.__traceback__
            while frame is not None and frame.tb_next is not None:
                frame = frame.tb_next
            where = f" at {frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}" if frame else ""
            # A console line stays one line: the innermost frame says where to look.
            text = f"{text}: {type(error).__name__}: {error}{where}"
        return format_line(self._program, text)


def set_up(program: str, *, level: int = logging.INFO) -> None:
    """Sends every logging record to stderr as console lines.

    program: the name at the head of each line.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_ConsoleFormatter(program))
    logging.basicConfig(level=level, handlers=[handler], force=True)
