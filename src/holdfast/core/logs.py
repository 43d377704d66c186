"""One log format for all processes: time, process, message, on standard error."""

from __future__ import annotations

import logging
import sys


def setup_logging(process: str, level: str) -> None:
    """Log to stderr as `12:00:01 [worker 0.0.0] message`; warnings and errors carry their level."""

    class _Formatter(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            mark = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
            text = f"{self.formatTime(record, '%H:%M:%S')} [{process}] {mark}{record.getMessage()}"
            return text + ("\n" + self.formatException(record.exc_info) if record.exc_info else "")

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
