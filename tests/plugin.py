"""How the whole test run behaves: who watches it, what runs beside what, which tests may be skipped, where the seconds went."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests import janitor

BESIDE = {
    "runs": ("tests/end_to_end/",),
    "slurm": ("tests/slurm/",),
    "engines": ("tests/transfer/test_engines.py", "tests/transfer/test_faults.py", "tests/rewards/test_http.py"),
    "ranks": ("tests/actor/", "tests/plan/test_memory.py", "tests/models/test_conversion.py"),
}
"""Group → where its tests are. Those of a group run one after the other in one process, whose engines, Slurm and forked ranks
serve all of them. Groups, longest first, and then the files of no group run beside each other (pytest-xdist)."""
SKIPS = {
    "there is a real nvidia-smi": "a machine with GPUs cannot show what one without does",
    "this machine has a GPU": "likewise",
    "there is a GPU": "likewise",
    "Triton is not installed": "hosts have no use for its gigabyte; `make gpu-rehearsal` has it",
    "the reference's vectors are not": "shared/ lies beside the project of its developers, and is not a part of it",
    "the seven test sets are not on this machine": "likewise",
    "the benchmark files (shared/data/benchmarks) are not here": "likewise",
}
"""Beginnings of the reasons for which a test may be skipped where everything that can be installed is → why."""


def pytest_configure(config: pytest.Config) -> None:
    if janitor.is_watched():
        return
    out = os.dup(1)  # pytest captures nothing yet
    janitor.watch(out)
    os.close(out)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    order = list(BESIDE)
    items.sort(key=lambda item: order.index(group) if (group := group_of(item.nodeid)) in order else len(order))
    for item in items:
        if item.get_closest_marker("thorough") and not (item.function.__doc__ or "").strip():
            raise pytest.UsageError(f"{item.nodeid}: a test of `make test-all` alone says in its docstring what it adds")


class BesideEachOther(LoadScopeScheduling):
    """Sends a group to one process, and of the other tests a file, whose fixtures are then made once."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


def group_of(nodeid: str) -> str:
    """Of a test: one of `BESIDE`, or its file."""
    groups = [group for group, places in BESIDE.items() if nodeid.startswith(places)]
    return groups[0] if groups else nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log) -> BesideEachOther:
    config.option.loadscopereorder = False  # it would begin with what has most tests, not with what takes longest
    return BesideEachOther(config, log)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid: str) -> None:
    if janitor.MARK in os.environ:
        janitor.note(nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A skip that nobody has thought of fails the run where everything should be there: in CI."""
    reporter = session.config.pluginmanager.getplugin("terminalreporter")
    if "CI" in os.environ and reporter and unexpected_skips(reporter) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter) -> None:
    seconds: Counter[str] = Counter()
    for report in all_reports(terminalreporter):
        seconds[folder_of(report.nodeid)] += report.duration
    terminalreporter.write_sep("=", "seconds by folder")
    for folder, spent in seconds.most_common():
        terminalreporter.write_line(f"{spent:8.1f} s  {folder}")
    for line in unexpected_skips(terminalreporter):
        terminalreporter.write_line(f"not on the list of skips (tests/plugin.py): {line}", red="CI" in os.environ)


def all_reports(terminalreporter) -> Iterator[pytest.TestReport]:
    """Of every phase of every test."""
    for reports in terminalreporter.stats.values():
        yield from (report for report in reports if isinstance(report, pytest.TestReport))


def folder_of(nodeid: str) -> str:
    """``tests/actor`` of a test in it, or deeper."""
    return str(Path(*Path(nodeid.partition("::")[0]).parts[:2]))


def unexpected_skips(terminalreporter) -> list[str]:
    """Tests that were skipped for a reason that is not on the list."""
    skipped = [report for report in terminalreporter.stats.get("skipped", ()) if isinstance(report, pytest.TestReport)]
    reasons = {report.nodeid: report.longrepr[2].removeprefix("Skipped: ") for report in skipped}
    return [f"{test}: {reason}" for test, reason in reasons.items() if not reason.startswith(tuple(SKIPS))]
