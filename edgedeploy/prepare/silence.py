"""What exporters and the person's own factory print goes to the log: stdout belongs to the command's answer."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

_log = logging.getLogger(__name__)


class _ToLog(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _log.debug("%s", record.getMessage())


@contextlib.contextmanager
def silenced(what: str) -> Iterator[None]:
    """Send prints, warnings and torch's own log lines to our log for the length of a block.

    Args:
        what: the step, named in the log.
    """
    printed = io.StringIO()
    # torch puts handlers of its own on these loggers, which write to the stderr of the moment torch was imported.
    loggers = {
        logger: logger.handlers
        for name, logger in logging.root.manager.loggerDict.items()
        if isinstance(logger, logging.Logger) and name.partition(".")[0] == "torch" and logger.handlers
    }
    for logger in loggers:
        logger.handlers = [_ToLog()]
    try:
        with (
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("default")
            yield
    finally:
        for logger, handlers in loggers.items():
            logger.handlers = handlers
        for line in printed.getvalue().splitlines():
            _log.info("%s: %s", what, line)
    for warning in caught:
        _log.info("%s: %s: %s", what, warning.category.__name__, warning.message)
