"""What long work shows."""

import io

from rich.console import Console

from megatron_hpt.telemetry.progress import Counter


def test_a_plain_stream_gets_a_line_every_tenth() -> None:
    console = Console(file=io.StringIO(), width=100)
    with Counter(40, console) as counter:
        counter.status("starting: engine 0 (0 s)")
        counter.status("starting: engine 0 (1 s)")
        counter.begin()
        for _ in range(40):
            counter.sample(10)
    first, *lines = console.file.getvalue().splitlines()
    assert first == "starting: engine 0 (0 s)"
    assert [line.split()[1] for line in lines] == [f"{4 * tenth}/40" for tenth in range(1, 11)]
    assert lines[-1].endswith("time left 0:00")
