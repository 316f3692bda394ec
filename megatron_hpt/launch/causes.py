"""Finds in a process's log why it failed, and what to do about common errors. Pure functions over text.

The last error of an engine says that another of its processes failed; the reason is where the first process failed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_PREFIX = re.compile(
    r"(\x1b\[[0-9;]*m)*"
    r"(\((?:[A-Z][A-Za-z]*|EngineCore[^ )]*|Worker[^ )]*)(?: pid=\d+)?\) ?)*"  # vLLM: which of its processes
    r"(?:(?:INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d [\d:]{8} \[[^\]]*\] ?)?"  # vLLM: level, time, place
    r"(?:\[rank\d+\]: ?)?"  # torch, of ranks
    r"(?:\[\d{4}-\d\d-\d\d [\d:]{8}[^\]]*\] ?)?"  # SGLang: time and rank
    r"(?:[\d-]{10} [\d:,]+ (?:ERROR|CRITICAL) [\w.]+: )?"  # ours: time, level, logger
)
"""What loggers write before each line of a traceback."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_BEGINS = "Traceback (most recent call last):"
_ENDS = re.compile(r"[A-Za-z_][\w.]*(?:: .*)?$")
"""The line after a traceback's frames, which names the exception."""
_HANDLING = "During handling of the above exception, another exception occurred:"
_ARGUMENT = re.compile(r"[\w./ -]{1,60}: error: .+")
_OWN_WORDS = re.compile(r"^[\d-]+ [\d:,]+ ERROR megatron_hpt\.process: (?P<said>.+)", re.MULTILINE)
"""The error that ended a process of ours, as `process.ends_in_words` logs it."""
_LOGGED = re.compile(r"(?:^|[ (])(?:ERROR|CRITICAL|FATAL)\b[ :\]]*\S")
_OTHERS = re.compile(
    r"See root cause above|Engine core initialization failed|EngineDeadError|ChildFailedError|resource_tracker"
)
"""Errors that only report the failure of another process, whose own words are better."""
_FATAL = re.compile(r"Fatal Python error: |terminate called |\s*what\(\):|[A-Z]\w*Error: |torch\.\S*Error: ")
"""Errors that end a process without a traceback."""
_WARNED = re.compile(r"\bWARN(?:ING)?\b")
_MOST_LINES, _MOST_CHARACTERS = 6, 1000

ADVICE: tuple[tuple[str, str], ...] = (
    (
        r"No space left on device.*/dev/shm|/dev/shm.*No space left|unable to (?:open|allocate|write).*shared memory|"
        r"SIGBUS|[Bb]us error|insufficient shared memory|psm_\w+.*No space",
        "/dev/shm is full or too small: give it room (docker: --shm-size=16g or --ipc=host; else mount -o remount,size=… "
        "/dev/shm)",
    ),
    (
        r"No space left on device|Disk quota exceeded|\[Errno (?:28|122)\]",
        "make room there, or move the run: `df -h` says which is full",
    ),
    (
        r"CUDA out of memory|OutOfMemoryError|out of memory",
        "not enough GPU memory: lower rollout.gpu_memory_share or actor.micro_batch_tokens; `megatron-hpt plan` shows its use",
    ),
    (
        r"Free memory on device .* is less than desired GPU memory utilization",
        "another process has the GPU's memory (nvidia-smi), or rollout.gpu_memory_share is too large for what is left",
    ),
    (
        r"No available memory for the cache blocks|KV cache is needed, which is larger than the available|"
        r"Not enough memory\. Please try to increase --mem-fraction-static|Loading model.*not enough memory",
        "no room for the KV cache: raise rollout.gpu_memory_share (on a host rollout.kv_cache_gib), or lower "
        "data.max_response_length",
    ),
    (
        r"Cannot allocate memory|std::bad_alloc|DefaultCPUAllocator: can't allocate",
        "the host's memory is used up: smaller rollout.kv_cache_gib, fewer ranks or servers, or a larger machine",
    ),
    (
        r"Address already in use|address already in use|EADDRINUSE",
        "another process has the port: start again, it gets another one",
    ),
    (r"Too many open files", "raise the limit of open files (ulimit -n); `megatron-hpt doctor` names it"),
    (
        r"undefined symbol|cannot open shared object file|GLIBCXX_|no kernel image is available|"
        r"CUDA driver version is insufficient",
        "the environment does not fit this machine: `megatron-hpt doctor` names the package",
    ),
    (r"No module named", "a package is missing from the environment: `megatron-hpt doctor` says how to build it"),
    (
        r"NCCL error|ncclSystemError|ncclInternalError|ncclRemoteError",
        "the network between GPUs: run again with NCCL_DEBUG=INFO, and see docs/cluster.md for the variables of your network",
    ),
    (
        r"gethostbyname|getaddrinfo|Name or service not known|Temporary failure in name resolution|Unable to resolve hostname",
        "a host name does not resolve: put it into DNS or /etc/hosts",
    ),
)
"""Pattern of an error → what to do about it. The first that matches counts."""


_EXITS = {
    -7: f"memory that it had mapped was not there\n    what to do: {ADVICE[0][1]}",
    -9: "killed from outside\n    what to do: if nobody did, the kernel has, for want of memory (dmesg | grep -i oom)",
}
"""Exit codes (negative for signals, as Python has them) of processes that cannot say more → cause and advice."""


def cause(log: str) -> str | None:
    """Return the first error of a log, with advice where there is some, or None if the log has no error."""
    error = first_error(log)
    if error is None:
        return None
    known = advice(error)
    return f"{error}\n    what to do: {known}" if known else error


def of_exit(code: int) -> str | None:
    """Return the cause that an exit code alone tells, with advice, or None."""
    return _EXITS.get(code)


def advice(error: str) -> str | None:
    """Return what to do about an error, or None if it is not a common one."""
    return next((remedy for pattern, remedy in ADVICE if re.search(pattern, error, re.DOTALL)), None)


def first_error(log: str) -> str | None:
    """Return the error of a log that explains best why its process ended, or None.

    In this order: the error that ended a process of ours, an argument that a parser refused, the first traceback's exception,
    the first line that is logged as an error, a fatal line without a traceback. Errors that only report the failure of another
    process count where there is nothing else.
    """
    raw = [_COLOUR.sub("", line) for line in log.splitlines()]
    lines = [line[_PREFIX.match(line).end() :].rstrip() for line in raw]
    errors = [match["said"] for match in _OWN_WORDS.finditer(log)][-1:]
    errors += [line for line in lines if _ARGUMENT.fullmatch(line)]
    errors += _exceptions(lines, [bool(_WARNED.search(line)) for line in raw])
    errors += [line[:_MOST_CHARACTERS] for line, whole in zip(lines, raw, strict=True) if line and _LOGGED.search(whole)]
    errors += [line for line in lines if _FATAL.match(line)]
    own = [error for error in errors if not _OTHERS.search(error)]
    return next(iter([*own, *errors]), None)


def _exceptions(lines: list[str], warned: list[bool]) -> Iterator[str]:
    """Yield the exception of each traceback in order, with the lines that belong to its message.

    Of a chain of exceptions the first is the reason, but one that was raised while another was handled explains that one: the
    handled one is left out. Tracebacks of warnings are left out too.

    Args:
        warned: whether each line is a logged warning.
    """
    for start, line in enumerate(lines):
        if not line.endswith(_BEGINS) or warned[start] or (start and warned[start - 1]):  # the process went on
            continue
        end = next((i for i in range(start + 1, len(lines)) if lines[i] and not lines[i].startswith(" ")), None)
        if end is not None and _ENDS.match(lines[end]) and _HANDLING not in lines[end : end + _MOST_LINES]:
            yield _message(lines[end:])


def _message(lines: list[str]) -> str:
    """Return an exception's line and the indented lines below that continue it, as pydantic's errors have them."""
    own = [lines[0]]
    for line in lines[1:_MOST_LINES]:
        if not line.startswith("  ") or "For further information visit" in line:
            break
        own.append(line.strip())
    return "\n    ".join(own)[:_MOST_CHARACTERS]
