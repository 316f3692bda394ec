"""The rule that the paper reports with: by hand, against its code's verdicts, and on the benchmarks' own answers."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hpt.rewards import reference
from megatron_hpt.rewards.reference.boxes import last_boxed
from tools.reference_vectors.graders import DIFFERENT, VERSION

SHARED = Path(__file__).parents[3] / "shared"
VECTORS = SHARED / "vectors" / "grader_vectors.json"
BENCHMARKS = SHARED / "data" / "benchmarks"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the reference's vectors are not beside the project")

RIGHT = [
    ("12.0", "12"),
    ("1{,}000", "1,000"),
    ("5 \\text{ cm}", "5"),
    ("5cm^2", "5"),
    ("12 square units", "12"),
    ("90^{\\circ}", "90"),
    ("25\\%", "25"),
    ("25\\%", "0.25"),
    ("x = 5", "5"),
    ("5", "x=5"),
    ("b", "B"),
    ("\\text{Yes}", "yes"),
    ("\\frac12", "0.5"),
    ("0.333333", "\\frac{1}{3}"),
    ("7 3/4", "\\frac{31}{4}"),
    ("5 million", "5*10^6"),
    ("2,1", "1,2"),
    ("\\{2,1\\}", "\\{1,2\\}"),
    ("1 \\text{ or } 2", "1,2"),
    ("2\\text{ or }1", "1,2"),
    ("3\\text{ or }3", "3"),
    ("(-\\infty,3)", "x<3"),
    ("(x+1)^2", "x^2+2x+1"),
    ("\\begin{bmatrix}1\\\\2\\end{bmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"),
    ("0.2.", "0.2"),
    ("\\approx 5", "5"),
    ("\\varnothing", "\\emptyset"),
    ("\\boldsymbol{17}", "17"),
    ("\\bm{x+1}", "x + 1"),
    ("\\color{blue}{17}", "17"),
    ("\\textcolor{red}{\\frac12}", "\\frac{1}{2}"),
    ("{\\color{blue}17}", "17"),
    ("\\Large{17}\\hspace{1cm}", "17"),
    ("1,2,\\dots,n", "1,2,\\ldots,n"),
]
WRONG = [
    ("13", "12"),
    ("B.", "B"),
    ("1.60001", "1.6"),
    ("\\sin 30^\\circ", "1/2"),
    ("6.2831853", "2\\pi"),  # near is not equal
    ("(1.4142136,2)", "(\\sqrt2,2)"),
    ("(1,2)", "(2,1)"),
    ("1\\text{ or }2", "12"),
    ("(1,2)", "[1,2)"),
    ("-4", "4"),
    ("", "5"),
    ("1\\,000", "1000"),  # as the reference says, like the next two
    ("5 million", "5000000"),
    ("5 dollars", "5"),
    # the reference calls all of these right (docs/rewards.md)
    ("x+a", "x+c"),
    ("(a,b)", "(c,b)"),
    ("f=\\text{even}", "f=\\text{odd}"),
    ("\\frac{1+x}{2}", "1+\\frac{x}{2}"),
    ("\\sqrt[3]{8}", "\\sqrt{8}"),
    ("0.\\overline{3}", "0.3"),
    ("\\overline{12}", "12"),
    ("2y=-2x", "y=-2x"),
    ("11e9", "9e11"),
]


@pytest.mark.parametrize(("answer", "truth"), RIGHT)
def test_equal_answers_are_right(answer: str, truth: str) -> None:
    assert reference.grade(f"so \\boxed{{{answer}}}.", truth) == 1.0


@pytest.mark.parametrize(("answer", "truth"), WRONG)
def test_other_answers_are_wrong(answer: str, truth: str) -> None:
    assert reference.grade(f"so \\boxed{{{answer}}}.", truth) == 0.0


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("2", 0.0),  # no box
        ("\\boxed{1} then \\boxed{2}", 1.0),  # the last counts
        ("\\boxed{2} then \\boxed{1}", 0.0),
        ("\\boxed{2} then \\boxed{}", 0.0),
        ("\\boxed{2", 0.0),
        ("\\boxed 2", 0.0),
        ("\\fbox{2}", 0.0),
        ("<think> \\boxed{2} </think> so it is", 1.0),  # in the reasoning too
    ],
)
def test_where_the_answer_is(response: str, reward: float) -> None:
    assert reference.grade(response, "2") == reward
    assert reference.grade(response, "\\boxed{2}") == reward


def test_a_ground_truth_may_be_a_number_or_several() -> None:
    assert reference.grade("\\boxed{4}", 4) == 1.0
    assert reference.grade("\\boxed{4}", ["3", "4"]) == 1.0
    assert reference.grade("\\boxed{5}", ["3", "4"]) == 0.0


@given(st.text(alphabet="{}a\\ ", max_size=30))
def test_a_box_is_found_again_whatever_is_in_it(inside: str) -> None:
    depths = [inside[:end].count("{") - inside[:end].count("}") for end in range(len(inside) + 1)]
    balanced = depths[-1] == 0 and min(depths) >= 0
    found = last_boxed(f"so \\boxed{{{inside}}}")
    assert found == inside if balanced else found is None or inside.startswith(found)


@needs_shared
def test_agreement_with_the_reference_rule() -> None:
    cases = json.loads(VECTORS.read_text())["cases"]
    ours = {case["name"]: reference.grade(case["response"], case["ground_truth"]) for case in cases}
    assert {c["name"] for c in cases if ours[c["name"]] != float(c["score"][VERSION])} == DIFFERENT.keys()


@needs_shared
@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.json")), ids=lambda path: path.stem)
def test_the_benchmarks_own_answers_are_right(path: Path) -> None:
    answers = [problem["answer"] for problem in json.loads(path.read_text(encoding="utf-8"))]
    assert [answer for answer in answers if reference.grade(f"\\boxed{{{answer}}}", answer) != 1.0] == []
