"""Logs: one line an event, `event=name key=value ...`, on standard error."""

from __future__ import annotations

import json
import logging
import sys
import time


class KeyValue(logging.Formatter):
    """Formats a record as time, level, logger and message; a value never breaks its line."""

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        """One line; an exception's traceback follows as one quoted value."""
        line = (
            f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')}.{int(record.msecs):03d}Z "
            f"{record.levelname.lower()} {record.name.removeprefix('agent.')} "
            f"{printable(record.getMessage())}"
        )
        if record.exc_info:
            line += f" traceback={json.dumps(self.formatException(record.exc_info))}"
        return line


def printable(text: str) -> str:
    """The text with everything that could steer a terminal or start a new line escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def start(level: str) -> None:
    """Log from `level` (debug, info, warning, error) upwards to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(KeyValue())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
