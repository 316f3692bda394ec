"""Errors that are part of the product: each says what was given, what is allowed and what to change."""

import difflib
from collections.abc import Callable, Iterable
from reprlib import Repr
from typing import Any

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


def shown(value: Any) -> str:
    """A value of the user's data for a message: as Python writes it, in ASCII, shortened in the middle however long or deep
    it is."""
    return _SHORT.repr(value).encode("ascii", "backslashreplace").decode()


def did_you_mean(name: str, known: Iterable[str], show: Callable[[str], str] = repr) -> str:
    """How a message about an unknown name ends: the known one that is nearest, if one is near.

    Args:
        show: how a known name is written, e.g. a key with its section.
    """
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {show(close[0])}?" if close else ""


class HptError(Exception):
    """Base of every error this project raises on purpose; the command line prints it without a traceback."""

    EXIT_CODE = 1
    """Of the command line."""


class ConfigError(HptError):
    """A setting, a recipe or a layout that cannot work."""


class DataError(HptError):
    """An input file or a row of it that cannot be used."""


class ModelError(HptError):
    """A model folder that is not one, or a model that is not supported."""


class TransferError(HptError):
    """Weights that did not arrive whole."""


class EngineError(HptError):
    """A rollout engine that failed, or answered what it must not answer."""


class EngineGone(EngineError):
    """An engine that nobody answers for: it died, or was never there."""


class RequestAborted(EngineError):
    """A request that an engine ended because it was given new weights (`transfer.in_flight`); the engine is well."""


class Interrupted(HptError):
    """SIGINT ended the run, or a second notice."""


class RequeueRequested(HptError):
    """The run ended on a notice, not because it is done: start it again with --resume. The exit code says the same."""

    EXIT_CODE = 75
    """EX_TEMPFAIL of sysexits.h."""


class DeadlineError(HptError):
    """Somebody is late; the message names who."""


class CheckpointError(HptError):
    """A checkpoint that is missing, damaged or does not fit."""
