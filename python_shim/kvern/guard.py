"""The wall between Kvern and the engine: nothing that goes wrong behind it may reach a callback of vLLM."""

import functools
import logging

logger = logging.getLogger("vllm.kvern")

_said: set[tuple] = set()
_MAX_SAID = 1000  # messages may hold text from outside


def log_once(level: int, message: str, *args) -> None:
    """Logs a message the first time that it is met, told apart by its text before formatting and its arguments."""
    key = (message, *map(str, args))  # texts, so that nothing is kept alive
    if key not in _said and len(_said) < _MAX_SAID:
        _said.add(key)
        logger.log(level, message, *args)


def guarded(default=None):
    """Method decorator: an exception becomes a log line (one per method and kind), a count in self.errors and the safe
    answer. default: that answer, or a function of the method's own arguments that makes it; such a function must not
    fail."""

    def decorate(method):
        @functools.wraps(method)
        def wrapper(self, *args, **kwargs):
            try:
                return method(self, *args, **kwargs)
            except Exception as error:
                self.errors += 1
                key = (method.__qualname__, type(error))
                if key not in _said:
                    _said.add(key)
                    logger.exception(
                        "Kvern: %s failed; the engine goes on without it this time. Further failures of this kind are "
                        "counted, not logged (vllm:kvern_callback_errors).",
                        method.__qualname__,
                    )
                return default(self, *args, **kwargs) if callable(default) else default

        return wrapper

    return decorate
