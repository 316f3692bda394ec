"""Answers that try to break a grader: none equals its ground truth, many cannot be computed.

    PYTHONPATH=. python tests/rewards/hostile.py [CASES] [DEADLINE_S] [WORKERS]

grades that many of them and prints, for each kind, how many were wrong and how many ungraded, and the latencies.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_hpt.config import RewardConfig
from megatron_hpt.rewards.grades import Grade
from megatron_hpt.rewards.pool import GraderPool

TRUTHS = (
    "42",
    "-7",
    "0.125",
    "\\frac{3}{7}",
    "\\sqrt{2}",
    "x^2+1",
    "(1,2)",
    "[0,1)",
    "\\{1,2,3\\}",
    "2\\pi",
    "\\text{Evelyn}",
    "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}",
    "x=5",
    "3+4i",
    "x^2+y^2=25",
    "\\infty",
)


PAIRS = (
    ("{", "}"),
    ("(", ")"),
    ("[", "]"),
    ("-(", ")"),
    ("\\{", "\\}"),
    ("\\left(", "\\right)"),
    ("\\frac{1}{1+", "}"),
    ("\\sqrt{1+", "}"),
    ("2^{", "}"),
    ("\\sin(", ")"),
    ("\\log_{2}(", ")"),
    ("\\text{", "}"),
    ("\\overline{", "}"),
)


@dataclass(frozen=True)
class Case:
    """One hostile answer."""

    kind: str
    response: str
    truth: str


def _box(inside: str) -> str:
    return f"so \\boxed{{{inside}}}."


def _tower(r: random.Random) -> str:
    base, height = r.choice([2, 3, 9, 10, 99, 12345]), r.randint(2, 9)
    forms = (
        "^{".join([str(base)] * height) + "}" * (height - 1),
        f"{base}^{{{base}^{{{r.randint(4, 12)}}}}}",
        f"{base}^{{{r.randint(10**4, 10**9)}}}",
        f"\\left({base}^{{{r.randint(99, 9999)}}}\\right)^{{{r.randint(99, 9999)}}}",
        f"{base}^{{-{r.randint(10**5, 10**9)}}}+1",
        f"1.5^{{{r.randint(10**6, 10**9)}}}",
        f"{base}^{{10^{{{r.randint(3, 9)}}}}} \\bmod 7",
        f"10^{{10^{{10}}}} - 10^{{10^{{{r.randint(9, 11)}}}}} + {r.randint(2, 9)}^{{x}}",
    )
    return _box(r.choice(forms))


def _factorial(r: random.Random) -> str:
    n = r.choice([500, 5000, 10**5, 10**6, 10**9])
    forms = (
        f"{n}!",
        f"({r.randint(5, 9)}!)!!",
        f"{r.randint(3, 9)}" + "!" * r.randint(3, 40),
        f"\\frac{{{n}!}}{{{n + 1}!}}+{n}",
    )
    return _box(r.choice(forms))


def _nested(r: random.Random) -> str:
    depth = r.choice([30, 100, 1000, 20_000])
    opening, closing = r.choice(PAIRS)
    return _box(opening * depth + str(r.randint(50, 99)) + closing * r.choice([depth, depth, depth - 1]))


def _million_braces(r: random.Random) -> str:
    n = 10**6
    return r.choice(["\\boxed{" + "{" * n + "9" + "}" * n + "}", "\\boxed{" + "{" * n, "\\boxed{" * (n // 10) + "9", "}" * n])


def _unicode(r: random.Random) -> str:
    planes = [
        (0x20, 0x7E),
        (0x300, 0x36F),
        (0x590, 0x6FF),
        (0x2000, 0x206F),
        (0x2200, 0x22FF),
        (0x1D400, 0x1D7CB),
        (0xD800, 0xDFFF),
    ]
    planes += [(0x1F300, 0x1F6FF), (0xE000, 0xE0FF), (0, 0x1F)]
    return _box("".join(chr(r.randint(*r.choice(planes))) for _ in range(r.randint(1, 200))) + "ש")


def _matrix(r: random.Random) -> str:
    n = r.choice([5, 8, 12, 30])
    rows = "\\\\".join("&".join(str(r.randint(-99, 99)) for _ in range(n)) for _ in range(n))
    matrix = f"\\begin{{pmatrix}}{rows}\\end{{pmatrix}}"
    return _box(r.choice(["{}", "\\det{}", "{}^{{50}}", "{}^{{-1}}", "\\begin{{vmatrix}}{}"]).format(matrix))


def _set(r: random.Random) -> str:
    n = r.choice([10, 60, 300])
    numbers = [r.randint(-(10**6), 10**6) for _ in range(n)]
    forms = (
        " \\cup ".join(f"({a}, {a + 1})" for a in numbers),
        " \\cap ".join(f"[{a}, \\infty)" for a in numbers),
        "\\{" + ",".join(f"\\sqrt{{{abs(a)}}}" for a in numbers) + "\\}",
        ",".join(f"x_{{{i}}}={a}" for i, a in enumerate(numbers)),
        "(" + ",".join(f"\\pm {abs(a) + 9}" for a in numbers[:20]) + ")",
        "\\pm\\sqrt{2\\pm\\sqrt{3\\pm\\sqrt{5\\pm\\sqrt{7}}}}",
        "\\mathbb{R} \\setminus \\{" + ",".join(map(str, numbers)) + "\\}",
    )
    return _box(r.choice(forms))


def _analysis(r: random.Random) -> str:
    n = r.choice([10**3, 10**6, 10**9])
    forms = (
        f"\\sum_{{k=1}}^{{{n}}} \\frac{{1}}{{k^{{3}}+k+1}}",
        f"\\prod_{{k=1}}^{{{n}}} (k+\\sin k)",
        "\\int_0^1 e^{\\sin(x^{x^x})} \\cos(\\ln(1+x^7)) dx",
        f"\\int \\frac{{x^{{{r.randint(9, 99)}}}+1}}{{x^{{{r.randint(9, 99)}}}+x+3}} dx",
        f"\\lim_{{x \\to 0}} \\frac{{\\sin(x^{{{n % 23 + 3}}})}}{{\\tan^{{{n % 23 + 3}}} x}} + 12",
        f"\\binom{{{n}}}{{{n // 2}}}",
        f"\\frac{{d^{{{r.randint(5, 60)}}}}}{{dx^{{5}}}} e^{{e^{{e^x}}}}",
        f"\\log_{{{r.randint(2, 9)}}} {r.randint(2, 9)}^{{{n}}} \\cdot \\sin({n}^{{99}})",
        "\\sin(\\sin(\\sin(\\sin(10^{22}))))^{\\pi^{e^{\\pi}}}",
        f"\\gcd({n}!, {n + 1}^{{999}})",
        f"\\lfloor \\pi^{{{r.randint(500, 99_999)}}} \\rfloor",
        f"\\sum_{{n=1}}^{{\\infty}} \\frac{{(-1)^n}}{{n^{{{r.randint(2, 9)}}}+\\ln n}}",
    )
    return _box(r.choice(forms))


def _algebra(r: random.Random) -> str:
    n = r.choice([30, 200, 2000])
    forms = (
        f"(x+y+z+w)^{{{n}}}",
        f"(x+1)^{{{n}}}-(x-1)^{{{n}}}",
        "+".join(f"{r.randint(2, 99)}x^{{{k}}}y^{{{n - k}}}" for k in range(min(n, 60))),
        "".join(f"(x-{r.randint(1, 999)})" for _ in range(min(n, 60))),
        f"x^{{{n + 1}}}+x^{{7}}+{r.randint(3, 9)}x=y^{{5}}-\\sin(xy)",
        "\\sqrt{x+" * 12 + "1" + "}" * 12,
        f"\\left(\\sqrt{{2}}+\\sqrt{{3}}+\\sqrt{{5}}+\\sqrt[7]{{11}}\\right)^{{{min(n, 300)}}}",
        "=".join(f"x^{{{k}}}" for k in range(2, 40)),
        "\\begin{cases} " + " \\\\ ".join(f"x^{{{k}}}+y={k}" for k in range(1, 30)) + " \\end{cases}",
        f"|x-{n}|+|x+{n}|+||x|-{n}| \\le {n}^{{x}}",
        "\\sqrt{x^2+y^2+\\sqrt{x^4+y^4+\\sqrt{x^8+y^8}}} \\cdot \\sin^{9}(x)\\cos^{9}(y)",
    )
    return _box(r.choice(forms))


def _digits(r: random.Random) -> str:
    n = r.choice([10**3, 5000, 10**6])
    forms = ("9" * n, "1" + "0" * n, "0." + "3" * n, "-" + "7" * n, "9" * 4301, f"1e{n}", f"9.9e-{n}", "1_000" * 99)
    forms += (
        ",".join(["1"] * (n // 10)),
        " ".join(["8"] * (n // 10)),
        f"{'9' * 999}/{'8' * 999}",
        "1/" * 400 + "3",
        "0x" + "f" * 200,
    )
    return _box(r.choice(forms))


def _repeated(r: random.Random) -> str:
    piece = r.choice(
        [
            "1+",
            "\\frac{1}{2}+",
            "x\\cdot ",
            "and ",
            "$",
            "\\text{a}",
            "\\\\",
            "= ",
            ",",
            "\\%",
            "\\ ",
            "-",
            "\\,",
            "!",
            "a",
            "^2",
        ]
    )
    piece = r.choice(
        [piece, "\\boxed{", "\\frac", "\\sqrt", "{,}", "million ", "cm ", "or ", "\\left", "(1,", "1 ", "\\text{ "]
    )
    return _box(piece * r.choice([50, 300, 30_000]) + r.choice(["", "3", "x"]))


def _injection(r: random.Random) -> str:
    forms = (
        "__import__('os').system('touch /tmp/hpt-was-here')",
        "().__class__.__bases__[0].__subclasses__()",
        "eval('9'*9**9)",
        "[c for c in range(10**12)]",
        "\\input{/etc/passwd}",
        "\\def\\x{\\x\\x}\\x",
        "\\newcommand{\\a}{\\a}\\a",
        "%s%n{0.__class__}",
        "exit()",
        "lambda x: x",
        "\\write18{rm -rf /}",
        "True",
        "None",
        "is_correct",
        "ground\\_truth",
        "the answer",
        "zoo",
        "nan",
        "\\frac{0}{0}",
        "\\frac{1}{0}-\\frac{1}{0}",
        "0 \\cdot \\infty + \\text{any}",
        "S.Reals",
        "?",
        "*",
        ".",
        "...",
        "\\ldots",
        "x",
        "any",
        "\\{\\}\\{\\}",
    )
    return _box(r.choice(forms) + r.choice(["", " ", "\n", "\\!"]))


KINDS: dict[str, Callable[[random.Random], str]] = {
    "towers": _tower,
    "factorials": _factorial,
    "nesting": _nested,
    "a million braces": _million_braces,
    "unicode": _unicode,
    "matrices": _matrix,
    "sets": _set,
    "analysis": _analysis,
    "algebra": _algebra,
    "digits": _digits,
    "repetition": _repeated,
    "injection": _injection,
}
RARE = ("a million braces",)
"""Slow to make and to send, and all alike."""


def corpus(number: int, seed: int = 0) -> Iterator[Case]:
    """That many cases, the same for the same seed; the kinds take turns."""
    r = random.Random(seed)
    kinds = list(KINDS)
    for index in range(number):
        kind = kinds[index % len(kinds)]
        if kind in RARE and index // len(kinds) % 5:
            kind = r.choice([other for other in kinds if other not in RARE])
        yield Case(kind, KINDS[kind](r), r.choice(TRUTHS))


async def grade_all(pool: GraderPool, cases: list[Case], workers: int) -> list[tuple[Grade, float]]:
    """Grades with seconds; as many at once as there are graders, so that nobody waits in a queue."""
    turns = asyncio.Semaphore(workers)

    async def one(case: Case) -> tuple[Grade, float]:
        async with turns:
            started = time.monotonic()
            (grade,) = await pool.grade([(case.response, case.truth)])
            return grade, time.monotonic() - started

    return await asyncio.gather(*map(one, cases))


def main() -> None:
    given = [*sys.argv[1:], *("1200", "2", "2")[len(sys.argv) - 1 :]]
    number, deadline_s, workers = int(given[0]), float(given[1]), int(given[2])
    cases = list(corpus(number))
    with GraderPool(RewardConfig(workers=workers, deadline_s=deadline_s)) as pool:
        started = time.monotonic()
        outcomes = asyncio.run(grade_all(pool, cases, workers))
        total = time.monotonic() - started
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for case, (grade, seconds) in zip(cases, outcomes, strict=True):
        verdict = str(grade.cause) if grade.cause else "right" if grade.score else "wrong"
        kinds[case.kind][verdict] += 1
        if verdict == "right":
            print("FALSE POSITIVE", case.kind, case.response[:200], case.truth)
        if seconds > deadline_s + 1:
            print("LATE", round(seconds, 2), case.kind, case.response[:200])
    for kind, verdicts in kinds.items():
        print(f"{kind:<18} " + "  ".join(f"{verdict} {count}" for verdict, count in sorted(verdicts.items())))
    latencies = sorted(seconds for _, seconds in outcomes)
    shares = {
        name: latencies[min(number - 1, int(share * number))] for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
    }
    print(
        f"{number} cases in {total:.0f} s; "
        + ", ".join(f"{k} {v * 1e3:.0f} ms" for k, v in shares.items())
        + f", max {latencies[-1]:.2f} s"
    )


if __name__ == "__main__":
    main()
