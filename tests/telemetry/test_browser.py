"""The page of several runs, opened in a real browser without a network."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from megatron_hpt.run import RunDir
from megatron_hpt.telemetry import metrics
from megatron_hpt.telemetry.report.write import write_report

from .browser import Page, browser, unavailable
from .runs import BLUE, GREEN, ORANGE, VERMILION

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """One browser for all tests here."""
    if reason := unavailable():
        pytest.skip(reason)
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(chromium: Page, report: Path) -> Page:
    """The report of three runs on a laptop, just opened."""
    return opened(chromium, report)


def opened(chromium: Page, file: Path) -> Page:
    chromium.requests.clear()
    chromium.complaints.clear()
    chromium.size(1366, 768)
    chromium.open(file)
    return chromium


def drawing(title: str) -> str:
    """The script that finds a chart by its title."""
    return f"document.querySelector('figure[aria-label={json.dumps(title)}] svg.marks')"


def colors(page: Page, title: str) -> set[str]:
    """Colours of a chart's marks that have an extent."""
    return set(
        page.run(f"""[...{drawing(title)}.querySelectorAll('.mark-line path, .mark-rect path, .mark-area path')]
            .filter(path => path.getBBox().width && getComputedStyle(path).opacity > 0)
            .flatMap(path => [path.getAttribute('stroke'), path.getAttribute('fill')])""")
    )


def test_the_page_asks_for_nothing_and_complains_of_nothing(page: Page, report: Path, tmp_path: Path) -> None:
    assert page.requests == [report.resolve().as_uri()]
    assert page.complaints == []
    figures = page.run("[...document.querySelectorAll('figure')].filter(f => !f.querySelector('svg.marks, .empty')).length")
    assert figures == 0
    assert page.run("document.title") == "3 runs: hpt, grpo, luffy"  # what a problem is called has no say
    assert page.run("document.querySelectorAll('img').length") == 0
    page.picture(tmp_path / "page.png")
    assert Image.open(tmp_path / "page.png").height > 3000


def test_nothing_is_wider_than_the_window(page: Page) -> None:
    for width in (1366, 820, 420):
        page.size(width, 768)
        page.run("new Promise(done => setTimeout(done, 300))")  # the charts follow
        assert page.run("document.documentElement.scrollWidth") <= width


def test_the_runs_are_overlaid_and_can_be_hidden(page: Page) -> None:
    assert colors(page, "Accuracy of rollouts") >= {BLUE, VERMILION}
    page.run("[...document.querySelectorAll('#runs button')][1].click()")
    page.run("new Promise(done => setTimeout(done, 200))")
    assert VERMILION not in colors(page, "Accuracy of rollouts")
    assert page.run("[...document.querySelectorAll('#runs button')].map(b => b.ariaPressed)") == ["true", "false", "true"]


def test_the_values_under_the_pointer_are_those_of_the_runs(page: Page, runs: list[RunDir]) -> None:
    page.run(f"{drawing('Accuracy of rollouts')}.scrollIntoView({{block: 'center'}})")
    box = page.run(f"{drawing('Accuracy of rollouts')}.getBoundingClientRect().toJSON()")
    for offset in (0.5, 0.45):  # two moves: the first one enters
        place = {"x": box["x"] + box["width"] * offset, "y": box["y"] + box["height"] / 2}
        page.call("Input.dispatchMouseEvent", type="mouseMoved", **place)
    page.run("new Promise(done => setTimeout(done, 200))")
    shown = page.run("[...document.querySelectorAll('#vg-tooltip-element tr')].map(r => r.innerText.split('\\t'))")
    told = {name.strip().rstrip(":"): value.strip() for name, value in shown}
    step = int(told["step"])
    for run, name in zip(runs[:2], ("hpt", "grpo"), strict=True):
        assert told[name] == f"{metrics.read(run.metrics)[step]['rollout/accuracy']:.3f}"


def test_another_axis_and_another_scheme_are_drawn_again(page: Page) -> None:
    page.run("axis.value = 'tokens'; axis.dispatchEvent(new Event('change'))")
    page.drawn()
    page.run("smooth.value = '5'; smooth.dispatchEvent(new Event('change'))")
    page.drawn()
    page.run(
        "window.axisColor = () => " + drawing("SFT share") + ".querySelector('.role-axis-domain line').getAttribute('stroke')"
    )
    light = page.run("axisColor()")
    page.size(1366, 768, dark=True)
    page.drawn()
    assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    assert page.run("axisColor()") != light
    assert BLUE in colors(page, "SFT share")
    assert page.complaints == []


def test_the_way_from_sft_over_rl_to_solved_is_drawn(page: Page) -> None:
    assert colors(page, "From SFT to RL to solved, prompt by prompt") >= {ORANGE, BLUE, GREEN}
    assert "29 of 30 prompts" not in page.run("document.querySelector('#depth').innerText")
    assert "30 of 30 prompts (visited more than once)" in page.run("document.querySelector('#depth').innerText")


def test_answers_can_be_read_step_by_step(page: Page, runs: list[RunDir]) -> None:
    read = "document.querySelector('#answers').innerText"
    assert "step 39, weights of version 39" in page.run(read)
    page.run("step.value = 0; step.dispatchEvent(new Event('input'))")
    first = page.run(read)
    assert "step 0, weights of version 0" in first
    assert "0 of 4 answers right → the gate chose demonstration (SFT)" in first
    assert "cut at the length limit" in first
    assert "trains in this step" in first
    page.run("after.click()")
    assert "step 1," in page.run(read)
    page.run("{ const s = document.querySelector('#answers select.run'); s.value = 2; s.dispatchEvent(new Event('change')) }")
    page.drawn()
    assert "the gate chose both" in page.run(read)
    assert "no prompt was visited twice" in page.run("document.querySelector('#depth').innerText")
    assert page.complaints == []


def test_what_is_missing_is_said(chromium: Page, runs: list[RunDir], tmp_path: Path) -> None:
    shutil.copytree(runs[1].path, tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "batches")
    page = opened(chromium, write_report([RunDir(tmp_path / "bare")]))
    text = page.run("document.body.innerText")
    assert "23 of 40 steps are finished" in text
    assert "2 of the steps were not taken (step 7, 8): the gradient norm is nan" in text
    assert "Nothing was evaluated on held-out problems" in text
    assert "bare has no ledger" in text
    assert "no answers to read" in text
    assert not page.run("stepper.getClientRects().length")
    assert page.complaints == []
