"""The first error of a log, in the shapes in which vLLM 0.32, SGLang, torch and this project write them."""

import sys
from pathlib import Path

import pytest

from megatron_hpt.launch.causes import advice, cause, first_error
from megatron_hpt.launch.children import Child, failure_of

FRAMES = """Traceback (most recent call last):
  File "/x/vllm/v1/engine/core.py", line 900, in run_engine_core
    engine_core = EngineCoreProc(*args, **kwargs)
                  ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
"""


def logged(prefix: str, text: str) -> str:
    return "".join(f"{prefix}{line}\n" for line in text.splitlines())


SHM = logged(
    "(EngineCore pid=123) ERROR 11-28 23:01:17 [core.py:936] ",
    FRAMES + "OSError: [Errno 28] No space left on device: '/dev/shm/psm_1'",
)
PYDANTIC = (
    FRAMES
    + """pydantic_core._pydantic_core.ValidationError: 1 validation error for SchedulerConfig
  Value error, max_num_batched_tokens (4096) must be greater than or equal to max_num_seqs (8192). [type=value_error]
    For further information visit https://errors.pydantic.dev/2.14/v/value_error
"""
)
LAST = logged(
    "(APIServer pid=7) ", FRAMES + "RuntimeError: Engine core initialization failed. See root cause above. Failed core"
)
USAGE = """usage: launch_server.py [-h] [--dtype {auto,float32}]
                     [--error: x]
launch_server.py: error: argument --dtype: invalid choice: 'chalk' (choose from 'auto', 'float32')
"""
SGLANG = logged(
    "[2026-11-28 22:58:01 TP0] ",
    "Scheduler hit an exception: " + FRAMES + "ValueError: Total number of attention heads (12) must be divisible by 5.",
)
DIRECT = (
    FRAMES
    + "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n\n"
    + "The above exception was the direct cause of the following exception:\n\n"
    + FRAMES
    + "RuntimeError: the model could not be loaded\n"
)
HANDLED = (
    FRAMES
    + "KeyError: 'llama9'\n\nDuring handling of the above exception, another exception occurred:\n\n"
    + FRAMES
    + "ValueError: model type `llama9` is not known\n"
)
OURS = "2026-11-28 22:58:01,123 ERROR megatron_hpt.process: step 3: the gradient norm is nan\n"
RANK = logged("[rank3]: ", FRAMES + "torch.distributed.DistBackendError: NCCL error in: NCCLUtils.cpp:93, ncclSystemError")
PLAIN = "INFO fine\n(EngineCore pid=1) ERROR 11-28 23:01:17 [x.py:1] the device went away\nINFO shutting down\n"


@pytest.mark.parametrize(
    ("log", "found", "remedy"),
    [
        (SHM + SHM + LAST, "OSError: [Errno 28] No space left on device: '/dev/shm/psm_1'", "--shm-size"),
        (PYDANTIC, "ValidationError: 1 validation error for SchedulerConfig\n    Value error, max_num_batched", None),
        ("W1128 noise\n" + USAGE, "launch_server.py: error: argument --dtype: invalid choice: 'chalk'", None),
        (SGLANG, "ValueError: Total number of attention heads (12) must be divisible by 5.", None),
        (DIRECT, "torch.OutOfMemoryError: CUDA out of memory.", "gpu_memory_share"),
        (HANDLED, "ValueError: model type `llama9` is not known", None),
        (FRAMES + "ValueError: of a request\n" + OURS, "step 3: the gradient norm is nan", None),
        (RANK, "torch.distributed.DistBackendError: NCCL error", "NCCL_DEBUG=INFO"),
        (PLAIN, "the device went away", None),
        (LAST, "RuntimeError: Engine core initialization failed.", None),
        ("RuntimeError: unable to write to file </torch_1>: No space left on device\n", "unable to write to file", "make room"),
        (
            "ERROR: Unexpected bus error encountered in worker. This might be caused by insufficient shared memory (shm)\n",
            "bus error",
            "--shm-size",
        ),
        ("Fatal Python error: Segmentation fault\n", "Segmentation fault", None),
        ("vllm serve: error: unrecognized arguments: --foo\n", "unrecognized arguments: --foo", None),
        (
            "WARNING optional package\n"
            + FRAMES.replace("Traceback", "WARNING Traceback", 1)
            + "ImportError: flash\n"
            + "ERROR the device went away\n",
            "the device went away",
            None,
        ),
    ],
)
def test_the_first_error_and_what_to_do(log: str, found: str, remedy: str | None) -> None:
    error = first_error("INFO loading\n" * 40 + log)
    assert error is not None
    assert found in error
    assert "further information" not in error
    assert (advice(error) is None) == (remedy is None)
    assert (remedy or "") in (cause(log) or "")


@pytest.mark.parametrize("log", ["", "INFO all is well\nerror_rate 0.1\n", "usage: x\n", FRAMES])
def test_a_log_without_an_error(log: str) -> None:
    assert cause(log) is None


def test_a_failure_shows_the_cause_that_stands_far_above_the_last_lines(tmp_path: Path) -> None:
    code = f"print({SHM!r} + 'INFO ending' + chr(10) * 60, end=''); raise SystemExit(1)"
    log = tmp_path / "engine.log"
    log.write_text(FRAMES + "ValueError: of the run before\n")
    child = Child.start("engine 0", [sys.executable, "-c", code], log)
    child.process.wait(30)
    text = str(failure_of(child, tmp_path))
    assert text.startswith("engine 0 died (exit code 1): OSError: [Errno 28] No space left on device: '/dev/shm/psm_1'\n")
    assert "what to do: /dev/shm is full or too small" in text
    assert "the last lines of" in text


def test_memory_that_is_not_there_is_explained_by_the_signal(tmp_path: Path) -> None:
    child = Child.start("engine 0", [sys.executable, "-c", "import os; os.kill(os.getpid(), 7)"], tmp_path / "engine.log")
    child.process.wait(30)
    assert "died (exit code -7, SIGBUS): memory that it had mapped was not there" in str(failure_of(child, tmp_path))
