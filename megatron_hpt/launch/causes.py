"""Why a process failed, from its log: the first error there, and what to do about the common ones. Pure functions over text.

What an engine says last is that something went wrong in another of its processes; the reason stands where the first one failed.
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
"""Before each line of a traceback that a logger wrote."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_BEGINS = "Traceback (most recent call last):"
_ENDS = re.compile(r"[A-Za-z_][\w.]*(?:: .*)?$")
"""The line behind a traceback's frames."""
_HANDLING = "During handling of the above exception, another exception occurred:"
_ARGUMENT = re.compile(r"[\w./ -]{1,60}: error: .+")
_OWN_WORDS = re.compile(r"^[\d-]+ [\d:,]+ ERROR megatron_hpt\.process: (?P<said>.+)", re.MULTILINE)
"""What ended a process of ours, when it knew (`process.ends_in_words`)."""
_LOGGED = re.compile(r"(?:^|[ (])(?:ERROR|CRITICAL|FATAL)\b[ :\]]*\S")
_OTHERS = re.compile(
    r"See root cause above|Engine core initialization failed|EngineDeadError|ChildFailedError|resource_tracker"
)
"""Said of the failure of another process, whose own words are better."""
_FATAL = re.compile(r"Fatal Python error: |terminate called |\s*what\(\):|[A-Z]\w*Error: |torch\.\S*Error: ")
"""Ends of a process without a traceback."""
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
"""What an error says → what to do. The first that fits counts."""


_EXITS = {
    -7: f"memory that it had mapped was not there\n    what to do: {ADVICE[0][1]}",
    -9: "killed from outside\n    what to do: if nobody did, the kernel has, for want of memory (dmesg | grep -i oom)",
}
"""Exit codes, negative as Python's, of processes that say nothing more."""


def cause(log: str) -> str | None:
    """What a log says of why its process failed, with advice where the error is a common one; None: nothing of that kind."""
    found = first_error(log)
    if found is None:
        return None
    known = advice(found)
    return f"{found}\n    what to do: {known}" if known else found


def of_exit(code: int) -> str | None:
    """What an exit code alone says; None: nothing."""
    return _EXITS.get(code)


def advice(error: str) -> str | None:
    """What to do about an error; None: it is not a common one."""
    return next((remedy for pattern, remedy in ADVICE if re.search(pattern, error, re.DOTALL)), None)


def first_error(log: str) -> str | None:
    """The first error of a log: what a process of ours said it ended of, an argument that a parser refuses, what the first
    traceback ends in, else the first line that is logged as an error. What only repeats that another process has failed counts
    where there is nothing else."""
    raw = log.splitlines()
    raw = [_COLOUR.sub("", line) for line in raw]
    lines = [line[_PREFIX.match(line).end() :].rstrip() for line in raw]
    found = [match["said"] for match in _OWN_WORDS.finditer(log)][-1:]
    found += [line for line in lines if _ARGUMENT.fullmatch(line)]
    found += _exceptions(lines, [bool(_WARNED.search(line)) for line in raw])
    found += [line[:_MOST_CHARACTERS] for line, whole in zip(lines, raw, strict=True) if line and _LOGGED.search(whole)]
    found += [line for line in lines if _FATAL.match(line)]
    own = [error for error in found if not _OTHERS.search(error)]
    return next(iter([*own, *found]), None)


def _exceptions(lines: list[str], warned: list[bool]) -> Iterator[str]:
    """What each traceback ends in, in order, with the lines that belong to its message.

    Of a chain the first is the reason, but for exceptions that were raised while another was handled: those explain it.
    """
    for start, line in enumerate(lines):
        if not line.endswith(_BEGINS) or warned[start] or (start and warned[start - 1]):  # what was done without
            continue
        end = next((i for i in range(start + 1, len(lines)) if lines[i] and not lines[i].startswith(" ")), None)
        if end is not None and _ENDS.match(lines[end]) and _HANDLING not in lines[end : end + _MOST_LINES]:
            yield _message(lines[end:])


def _message(lines: list[str]) -> str:
    """An exception's line, and those below that continue it: indented, as pydantic's are."""
    own = [lines[0]]
    for line in lines[1:_MOST_LINES]:
        if not line.startswith("  ") or "For further information visit" in line:
            break
        own.append(line.strip())
    return "\n    ".join(own)[:_MOST_CHARACTERS]
