"""Which of `rollout.extra_arguments` would change what a run relies on. What remains is for the engine's own parser to read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from megatron_hpt.errors import ConfigError

SET_BY_RUN = "it may hold what the run sets itself"
TENSOR_RANKS_ALONE = "weights are sent to tensor parallel ranks alone"


def check(given: Sequence[str], own: Sequence[str], reserved: Mapping[str, str]) -> None:
    """Refuse arguments that repeat an option of the command line, in whatever form a parser takes it, or that are reserved.

    Args:
        given: `rollout.extra_arguments`.
        own: the command line without them.
        reserved: `EngineKind.reserved_arguments`.

    Raises:
        ConfigError: names the first of them and who sets it.
    """
    taken = {name: "the run sets it" for name in _options(own)} | {_name(option): why for option, why in reserved.items()}
    for name in _options(given):
        # Parsers take the beginning of an option for the whole.
        meant = name if name in taken else next((each for each in taken if len(name) > 1 and each.startswith(name)), None)
        if meant is not None:
            raise ConfigError(f"rollout.extra_arguments: {_written(name)} cannot be given: {taken[meant]}; leave it out")


def _options(arguments: Sequence[str]) -> Iterator[str]:
    return (_name(argument) for argument in arguments if re.match(r"-{1,2}[A-Za-z]", argument))


def _name(option: str) -> str:
    """Return what an option is about: ``--no-enforce_eager`` and ``--enforce-eager`` are the same, ``--x.key=1`` sets x."""
    bare = re.split(r"[=.]", option, maxsplit=1)[0].replace("_", "-")
    return bare.removeprefix("--").removeprefix("no-") if bare.startswith("--") else bare


def _written(name: str) -> str:
    return name if name.startswith("-") else f"--{name}"
