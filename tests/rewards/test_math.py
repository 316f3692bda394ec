"""The verifier of mathematics: by hand, on a file of graded cases, and on the benchmarks' own answers."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hpt.config import RewardConfig
from megatron_hpt.rewards import math, reference, registry
from megatron_hpt.rewards.boxes import last_boxed
from megatron_hpt.rewards.grades import Answer

SHARED = Path(__file__).parents[3] / "shared"
CASES = SHARED / "vectors" / "grading_cases.jsonl"
BENCHMARKS = SHARED / "data" / "benchmarks"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the reference's vectors are not beside the project")

RIGHT = [
    ("x^2-1", "(x-1)(x+1)"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt 3}"),
    (r"2\sqrt{2}", r"\sqrt{8}"),
    (r"\sqrt[3]{16}", r"2\sqrt[3]{2}"),
    (r"\frac12", "0.5"),
    (".5", r"\frac{1}{2}"),
    (r"50\%", r"\frac{1}{2}"),
    (r"50\%", "50"),
    ("50", r"50\%"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"),
    (r"\frac{1}{-2}", "-0.5"),
    (r"3^{\frac{1}{2}}", r"\sqrt{3}"),
    (r"\sin^2 x+\cos^2 x", "1"),
    (r"\tan^{-1}(1)", r"\frac{\pi}{4}"),
    (r"\arctan 1", r"\pi/4"),
    (r"\sqrt{x^2}", "|x|"),
    (r"e^{\ln 5}", "5"),
    (r"\log_2 8", "3"),
    (r"\log 100", "2"),
    (r"\ln 2", r"\log 2"),
    (r"\log_{10} 2", r"\log 2"),
    ("n!", "n(n-1)!"),
    (r"\binom{n}{2}", r"\frac{n(n-1)}{2}"),
    ("(-1)^n", r"\cos(n\pi)"),
    ("2^{n+1}", r"2\cdot 2^n"),
    ("x+y", "y+x"),
    ("a_1+a_2", "a_2+a_1"),
    ("a_{n+1}", "a_{n+1}"),
    ("f(x)=2x+1", "2x+1"),
    ("y=2x+1", "2x+1"),
    ("2x+1", "y=2x+1"),
    ("y=2x+1", "2x-y+1=0"),
    ("x=5", "5"),
    ("5", "x=5"),
    ("x = 1, x = 2", "1, 2"),
    (r"x=1 \text{ or } x=2", r"\{1,2\}"),
    ("(1,2)", "( 1 , 2 )"),
    ("1,2", "(1,2)"),
    ("x=1, y=2", "(1,2)"),
    (r"[2,\infty)", r"x\ge 2"),
    (r"x \geq 2", r"[2,\infty)"),
    ("2<x<3", "(2,3)"),
    ("3>x>2", "(2,3)"),
    (r"(-\infty,0)\cup(0,\infty)", r"(0,\infty)\cup(-\infty,0)"),
    ("2x<8", "x<4"),
    ("-2x<8", "x>-4"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)"),
    (r"\langle 1,2\rangle", "(1,2)"),
    ("3:4", "6:8"),
    ("3:4", r"\frac34"),
    (r"12\text{ cm}", "12"),
    ("12", r"12\text{ cm}"),
    (r"12\,\mathrm{cm}", "12 cm"),
    (r"1200\text{ cm}", r"12\text{ m}"),
    (r"12\text{ cm}^2", r"12\text{ square cm}"),
    (r"12\text{ cm}^2", "12"),
    (r"\$12", r"12\text{ dollars}"),
    (r"\$12.50", "12.5"),
    (r"1250 \text{ cents}", r"\$12.50"),
    (r"3.5 \text{ million}", "3500000"),
    (r"5\text{ ft }3\text{ in}", r"63\text{ in}"),
    (r"1 \text{ hour } 30 \text{ minutes}", r"90 \text{ minutes}"),
    (r"9\text{ a.m.}", r"9\text{ AM}"),
    (r"30^\circ", "30"),
    (r"30^\circ", r"\frac{\pi}{6}"),
    (r"45 \text{ degrees}", r"45^\circ"),
    (r"37^\circ C", r"37^\circ\text{C}"),
    (r"3\text{rd}", "3"),
    ("2516_8", "2516_{8}"),
    ("101_2", "5"),
    ("101", "101_2"),
    (r"0.\overline{3}", r"\frac13"),
    (r"0.1\overline{6}", "1/6"),
    (r"1\frac{1}{2}", "3/2"),
    ("2 1/2", "2.5"),
    ("1.5e3", "1500"),
    (r"1.5 \times 10^3", "1500"),
    (r"6.02\times10^{23}", r"6.02 \cdot 10^{23}"),
    ("0.333333", r"\frac13"),
    ("1-10^{-30}", r"1-\frac{1}{10^{30}}"),
    ("i^2", "-1"),
    (r"\frac{1+i}{1-i}", "i"),
    (r"e^{i\pi}", "-1"),
    (r"\sqrt{-1}", "i"),
    ("yes", r"\text{Yes}"),
    (r"\textbf{(B)}", r"\text{(B)}"),
    ("(B)", "B"),
    (r"\pm 42", "42, -42"),
    (r"2 \pm \sqrt 3", r"2-\sqrt{3}, 2+\sqrt{3}"),
    (r"\frac{-1 \pm \sqrt 5}{2}", r"\frac{\pm\sqrt 5 - 1}{2}"),
    ("2(3)", "6"),
    ("(2)(3)", "6"),
    ("y'=2x", "2x"),
    (r"2\operatorname{sgn}(x)", r"\operatorname{sgn}(x)\cdot 2"),
    (r"3 \pmod{7}", r"3 \pmod 7"),
    (r"\{1,2,3\}", "3,2,1"),
    (r"\{\}", r"\varnothing"),
    (r"\mathbb{R}", "ℝ"),
    (r"\mathbb{R}\setminus\{0\}", r"\mathbb{R} \setminus \{ 0 \}"),
    ("x^3+y^3=1", "y^3+x^3=1"),
    ("AB=5", "5"),
    (r"P(A)=\frac13", "1/3"),
    ("E[X]=2", "2"),
    (r"\frac{a}{b}", "a/b"),
    (r"\frac{a+b}{c}", "(a+b)/c"),
    ("1/2x", r"\frac{x}{2}"),
    (r"\dfrac{7}{2}", r"\tfrac72"),
    (r"3\cdot x", "3x"),
    ("3*x", "3x"),
    ("3×4", "12"),
    ("6÷2", "3"),
    ("x₁+x₂", "x_1+x_2"),
    ("10⁶", "1000000"),
    ("2√3", r"2\sqrt{3}"),
    ("√(2)", r"\sqrt{2}"),
    ("½", "0.5"),
    ("−3", "-3"),
    ("12 345", "12345"),
    ("12{,}345", "12,345"),
    ("1,234,567", "1234567"),
    (r"\text{(1,2)}", "(1,2)"),
    (r"\left[0,1\right)", "[0,1)"),
    ("$42$", "42"),
    (r"\(42\)", "42"),
    ("42.", "42"),
    (r"\mathrm{i}", "i"),
    (r"2+3\mathrm{i}", "3i+2"),
    (r"\cos 2x", r"1-2\sin^2 x"),
    (r"\sec x", r"\frac{1}{\cos x}"),
    (r"\frac{\pi}{180}", r"1^\circ"),
    (r"\frac{n^2+n}{2}", r"\frac{n(n+1)}{2}"),
    (r"x=\frac{1}{2}", r"\frac{1}{2}=x"),
    ("k=3", "3"),
    (r"\text{Area}=3", "3"),
    (r"\text{The answer is } 3", "3"),
    (r"\lfloor x \rfloor", r"\lfloor x\rfloor"),
    (r"\max(1,2)", "2"),
    (r"\gcd(4,6)", "2"),
    (r"\sqrt{2}+\sqrt{3}", r"\sqrt{5+2\sqrt{6}}"),
    (r"7 \text{ ways}", "7"),
    ("7 ways", "7"),
    (r"5\text{ m/s}", "5"),
    (r"5\text{ m/s}", r"5\ \mathrm{m/s}"),
    ("18 km/h", "5 m/s"),
    (r"10 \Omega", r"10\Omega"),
    (r"+\infty", r"\infty"),
    ("12.0", "12"),
    ("1{,}000", "1,000"),
    (r"5 \text{ cm}", "5"),
    ("5cm^2", "5"),
    ("12 square units", "12"),
    (r"90^{\circ}", "90"),
    (r"25\%", "25"),
    (r"25\%", "0.25"),
    ("x = 5", "5"),
    ("b", "B"),
    (r"\text{Yes}", "yes"),
    ("0.333333", r"\frac{1}{3}"),
    ("7 3/4", r"\frac{31}{4}"),
    ("5 million", "5*10^6"),
    ("2,1", "1,2"),
    (r"\{2,1\}", r"\{1,2\}"),
    (r"1 \text{ or } 2", "1,2"),
    (r"2\text{ or }1", "1,2"),
    (r"3\text{ or }3", "3"),
    (r"(-\infty,3)", "x<3"),
    ("(x+1)^2", "x^2+2x+1"),
    (r"\begin{bmatrix}1\\2\end{bmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    ("0.2.", "0.2"),
    (r"\approx 5", "5"),
    (r"\varnothing", r"\emptyset"),
    (r"\boldsymbol{17}", "17"),
    (r"\bm{x+1}", "x + 1"),
    (r"\color{blue}{17}", "17"),
    (r"\textcolor{red}{\frac12}", r"\frac{1}{2}"),
    (r"{\color{blue}17}", "17"),
    (r"\Large{17}\hspace{1cm}", "17"),
    (r"1,2,\dots,n", r"1,2,\ldots,n"),
    ("B.", "B"),
    (r"\sin 30^\circ", "1/2"),
    (r"1\,000", "1000"),
    ("5 million", "5000000"),
    ("5 dollars", "5"),
]
WRONG = [
    (r"2\sqrt{2}", r"\sqrt{7.99999}"),
    ("0.5", "50"),
    (r"\sin x", r"\cos x"),
    ("|x|", "x"),
    (r"\sqrt{x^2}", "x"),
    (r"\ln 2", r"\log 3"),
    (r"\binom{n}{2}", r"\frac{n(n+1)}{2}"),
    ("2^{n+1}", "2^n+1"),
    ("x+y", "x+z"),
    ("X", "x+0"),
    ("a_{n+1}", "a_{n}+1"),
    ("y=2x+1", "2x-y-1=0"),
    ("x=5", "y=5"),
    ("x=5", "x=6"),
    ("x=1", "1,2"),
    ("(1,2)", "[1,2]"),
    ("(1,2)", r"\{1,2\}"),
    ("2,1", "(1,2)"),
    ("x > 2", r"[2,\infty)"),
    ("-2x<8", "x<-4"),
    ("3:4", "4:3"),
    ("3:30", "7:70"),
    (r"12\text{ cm}", r"12\text{ m}"),
    (r"12\text{ cm}^2", r"12\text{ cm}"),
    (r"9\text{ AM}", r"9\text{ PM}"),
    (r"30^\circ", "31"),
    (r"37^\circ C", r"37^\circ F"),
    ("101_2", "101_3"),
    (r"0.\overline{3}", "0.3"),
    ("2 1/2", "1"),
    (r"6.02\times10^{23}", r"6.03 \cdot 10^{23}"),
    ("3.14", r"\pi"),
    ("3.14159265", r"\pi"),
    ("0.33", r"\frac13"),
    ("0.333334", r"\frac13"),
    ("1234567.8", "1234567.9"),
    ("10^{-30}", "0"),
    (r"e^{\pi\sqrt{163}}", "262537412640768744"),
    (r"\text{Yes}", r"\text{No}"),
    (r"\neg p", "p"),
    ("not 42", "42"),
    (r"\text{not } 42", "42"),
    (r"42 \text{ or } 43", "42"),
    ("42, 43", "42"),
    (r"42 \text{ is wrong}", "42"),
    (r"42 \text{ (approximately)}", "41"),
    (r"\approx 42", "43"),
    (r"x \ne 42", "x = 42"),
    (r"\le 42", "42"),
    (r"\pm 42", "42"),
    (r"\frac{-1 \pm \sqrt 5}{2}", r"\frac{1 \pm \sqrt 5}{2}"),
    ("2(3)", "5"),
    ("2y'", "2y''"),
    (r"\det(A)", r"\det(B)"),
    (r"\operatorname{sgn}(x)", r"\operatorname{sgn}(y)"),
    (r"\frac{dy}{dx}", r"\frac{dx}{dy}"),
    (r"\forall x", "x"),
    (r"1,2,\ldots,n", r"1,2,\ldots,m"),
    (r"1,3,\ldots", r"3,1,\ldots"),
    (r"\int_0^1 x", r"\int_0^2 x"),
    (r"3 \pmod 7", r"3 \pmod 5"),
    (r"x \equiv 3 \pmod 7", r"x \equiv 4 \pmod 7"),
    ("2^{2^{2^{2^{2^{2}}}}}", "0"),
    ("10^{10^{10^{10}}}", "10^{10^{10^{9}}}"),
    (r"\{1,2\}", r"\{1,2,3\}"),
    (r"\mathbb{R}", r"\mathbb{Z}"),
    (r"\mathbb{R}\setminus\{0\}", r"\mathbb{R}\setminus\{1\}"),
    ("E[X]=2", "E[Y]=2"),
    ("2+2=5", "2+2=4"),
    ("1=1, 2=3", "1=1, 2=2"),
    ("½", "12"),
    ("1,234,567", "1234568"),
    ("42$ or $43", "42"),
    (r"\lfloor x \rfloor", "x"),
    (r"\lfloor x \rfloor", r"\lceil x\rceil"),
    ("7 ways", "8 ways"),
    (r"5\text{ m/s}", r"5\text{ km/h}"),
    (r"42\nexists", "42"),
    ("42'", "42"),
    ("42^*", "42"),
    ("42?", "42"),
    ("42~43", "42"),
    (r"42\\43", "42"),
    ("42;43", "42"),
    ("42|43", "42"),
    ("42_{3}", "42"),
    (r"42^{0}\cdot", "42"),
    (r"\text{42 or 43}", "42"),
    (r"\text{not }42", "42"),
    (">42", "42"),
    ("42+", "42"),
    ("42..", "42"),
    (r"\sum_{k=1}^{10} k", r"\sum_{k=1}^{9} k"),
    (r"\infty", r"-\infty"),
    (r"\infty", "42"),
    ("13", "12"),
    ("1.60001", "1.6"),
    ("6.2831853", r"2\pi"),
    ("(1.4142136,2)", r"(\sqrt2,2)"),
    ("(1,2)", "(2,1)"),
    (r"1\text{ or }2", "12"),
    ("(1,2)", "[1,2)"),
    ("-4", "4"),
    ("", "5"),
    ("x+a", "x+c"),
    ("(a,b)", "(c,b)"),
    (r"f=\text{even}", r"f=\text{odd}"),
    (r"\frac{1+x}{2}", r"1+\frac{x}{2}"),
    (r"\sqrt[3]{8}", r"\sqrt{8}"),
    (r"\overline{12}", "12"),
    ("2y=-2x", "y=-2x"),
    ("11e9", "9e11"),
]


@pytest.mark.parametrize(("answer", "truth"), RIGHT)
def test_equal_answers_are_right(answer: str, truth: str) -> None:
    assert math.grade(f"so \\boxed{{{answer}}}.", truth) == 1.0


@pytest.mark.parametrize(("answer", "truth"), WRONG)
def test_other_answers_are_wrong(answer: str, truth: str) -> None:
    assert math.grade(f"so \\boxed{{{answer}}}.", truth) == 0.0


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("2", 0.0),  # no box
        ("\\boxed{1} then \\boxed{2}", 1.0),  # the last counts
        ("\\boxed{2} then \\boxed{1}", 0.0),
        ("\\boxed{2} then \\boxed{}", 1.0),  # with content
        ("\\boxed{2} (see \\boxedeqn and \\boxed)", 1.0),
        ("\\boxed{2} and \\boxed{3", 0.0),  # cut in the middle of its answer
        ("\\boxed{2", 0.0),
        ("\\boxed {2}", 1.0),
        ("\\boxed 2", 1.0),
        ("\\fbox{2}", 1.0),
        ("\\boxed{\\boxed{2}}", 1.0),
        ("<think> \\boxed{2} </think> so it is", 0.0),
        ("<think> \\boxed{1} </think> so \\boxed{2}", 1.0),
        ("thought before </think> \\boxed{2}", 1.0),
        ("<think> \\boxed{2} but wait", 0.0),  # it never closes
        ("\\boxed{2} <think> or \\boxed{1}", 1.0),
    ],
)
def test_where_the_answer_is(response: str, reward: float) -> None:
    assert math.grade(response, "2") == reward
    assert math.grade(response, "\\boxed{2}") == reward


def test_a_ground_truth_may_be_a_number_or_several() -> None:
    assert math.grade("\\boxed{4}", 4) == 1.0
    assert math.grade("\\boxed{4}", ["3", "4"]) == 1.0
    assert math.grade("\\boxed{5}", ["3", "4"]) == 0.0


@given(st.text(alphabet="{}a\\", max_size=30))
def test_a_box_is_found_again_whatever_is_in_it(inside: str) -> None:
    braces = inside.replace("\\{", "").replace("\\}", "")
    depths = [braces[:end].count("{") - braces[:end].count("}") for end in range(len(braces) + 1)]
    if inside and "\\\\" not in inside and inside[-1:] != "\\" and depths[-1] == 0 and min(depths) >= 0:
        assert last_boxed(f"so \\boxed{{{inside}}}") == inside


@needs_shared
def test_no_case_of_the_file_is_graded_wrong() -> None:
    cases = [json.loads(line) for line in CASES.read_text().splitlines()]
    rewards = {name: registry.build(name, RewardConfig()) for name in {case["reward"] for case in cases}}
    graded = [rewards[case["reward"]](Answer(case["response"], str(case["ground_truth"]))) for case in cases]
    assert [case["case"] for case, grade in zip(cases, graded, strict=True) if grade != case["expected"]] == []


@needs_shared
@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.json")), ids=lambda path: path.stem)
def test_the_benchmarks_own_answers_are_right(path: Path) -> None:
    answers = [problem["answer"] for problem in json.loads(path.read_text(encoding="utf-8"))]
    assert [answer for answer in answers if math.grade(f"\\boxed{{{answer}}}", answer) != 1.0] == []


LEAVES = st.one_of(
    st.integers(0, 999).map(str),
    st.tuples(st.integers(0, 99), st.integers(1, 99)).map(lambda pair: f"{pair[0]}.{pair[1]}"),
    st.sampled_from([r"\pi ", "e", "x", "y", "a_1", r"\theta "]),
)
EXPRESSIONS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", r"\cdot "]), inner).map(lambda t: f"({t[0]}{t[1]}{t[2]})"),
        st.tuples(inner, inner).map(lambda t: rf"\frac{{{t[0]}}}{{{t[1]}}}"),
        inner.map(lambda one: rf"\sqrt{{{one}}}"),
        st.tuples(inner, st.integers(1, 4)).map(lambda t: f"({t[0]})^{{{t[1]}}}"),
    ),
    max_leaves=6,
)


@settings(deadline=None)
@given(EXPRESSIONS)
def test_an_expression_is_itself_and_not_another_number(expression: str) -> None:
    assert math.equality.equal(expression, expression)
    assert not math.equality.equal(expression, f"{expression}+1")
    assert not math.equality.equal(f"2+{expression}", expression)


@settings(deadline=None)
@given(EXPRESSIONS, EXPRESSIONS)
def test_equality_does_not_depend_on_the_order(one: str, other: str) -> None:
    assert math.equality.equal(one, other) == math.equality.equal(other, one) or any("." in text for text in (one, other))


@settings(deadline=None)
@given(
    st.text(alphabet=r"\{}()[]|,;:=<>+-*/^_!'$%&~.0123456789 abcexinRfd≤½²√", max_size=60),
    st.sampled_from(["42", "x=5", "(1,2)"]),
)
def test_no_text_makes_it_fail(text: str, truth: str) -> None:
    assert math.grade(f"\\boxed{{{text}}}", truth) in (0.0, 1.0)
    assert math.equality.equal(text, truth) in (False, True)


@pytest.mark.parametrize(
    ("response", "truth", "reward"),
    [
        ("<think>\\boxed{1}</think> \\boxed{\\frac{2}{4}}", "\\frac12", 1.0),
        ("<think>\\boxed{2}</think> so it is", "2", 0.0),
        ("\\boxed{25\\%}", "25", 0.0),
        ("\\boxed{5 \\text{ cm}}", "5", 0.0),
        ("\\boxed{5 \\text{ cm}}", "5\\,\\mathrm{cm}", 1.0),
        ("\\boxed{b}", "B", 0.0),
        ("\\boxed{x+1}", "1+x", 1.0),
    ],
)
def test_the_strict_rule(response: str, truth: str, reward: float) -> None:
    assert math.strict(Answer(response, truth)) == reward


@pytest.mark.parametrize(
    ("answer", "truth", "by_reference"),
    [
        (r"42 \foo{x}", "42", 1.0),
        (r"\neq 42", "42", 1.0),
        (r"\ge 42", "42", 1.0),
        (r"\text{the answer is not } 42", "42", 1.0),
        (r"2\det(A)", r"2\det(B)", 1.0),
        ("2y'", "2y''", 1.0),
        ("2516_8", "2516_7", 1.0),
        (r"5\sqrt(3)", "5", 1.0),
        ("2√3", "2", 1.0),
        ("5²", "5", 1.0),
        (r"\frac{1}{2^{87}}", r"\frac{1}{2^{88}}", 1.0),
        ("f(2)=3", "f(2)=4", 1.0),
        ("2+2=4", "2+2=5", 1.0),
        ("1<2", "3<4", 1.0),
        (r"9\text{ a.m.}", r"9\text{ p.m.}", 1.0),
        (r"5\text{ feet }3\text{ inches}", r"5\text{ feet }4\text{ inches}", 1.0),
        (r"2\text{ million}", "2", 1.0),
        ("12,345", "12, 345", 1.0),
        ("x²", "x^2", 0.0),
        ("½", r"\frac{1}{2}", 0.0),
        ("sin(x)+1", r"\sin(x)+1", 0.0),
        (r"\frac{1}{e}", r"\frac{1}{\mathrm{e}}", 0.0),
        (r"\frac{1}{\sqrt{m}}", r"\sqrt{1/m}", 0.0),
        (r"\ln a+\ln b", r"\ln(ab)", 0.0),
        (r"e^{i\pi/3}", r"\frac12+\frac{\sqrt3}{2}i", 0.0),
        ("2 million", "2000000", 0.0),
        ("12 dollars", "12", 0.0),
        (r"1\,000", "1000", 0.0),
        (r"\sin 30^\circ", r"\frac12", 0.0),
    ],
)
def test_where_the_papers_rule_differs(answer: str, truth: str, by_reference: float) -> None:
    """As docs/rewards.md says."""
    assert reference.grade(f"\\boxed{{{answer}}}", truth) == by_reference
    assert math.grade(f"\\boxed{{{answer}}}", truth) == 1.0 - by_reference
