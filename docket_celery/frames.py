"""Tracebacks of the users' code, without the engine's frames in front of it."""

from __future__ import annotations

import contextlib
import os
import traceback
from typing import Final, TypeVar

E = TypeVar("E", bound=BaseException)

_ENGINE: Final = os.path.dirname(__file__) + os.sep
_MOST_CHARS: Final = 4000


def trim_traceback(error: E) -> E:
    """Let the traceback of *error* start in the users' code: what led there is the engine's, the same each time.

    A traceback without any other frame is left as it is: then the engine's are all there is to go by.
    """
    trace = error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        # Hooks that are generators are entered through contextlib.
        if not file.startswith(_ENGINE) and file != contextlib.__file__:
            error.__traceback__ = trace
            break
        trace = trace.tb_next
    return error


def show(error: BaseException) -> str:
    """Return the end of the traceback of *error*, of bounded length."""
    text = "".join(traceback.format_exception(error)).rstrip()
    return text if len(text) <= _MOST_CHARS else "…" + text[-_MOST_CHARS:]
