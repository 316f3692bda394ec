"""Normal forms of an answer in LaTeX: two answers with an equal form say the same.

`typeset` undoes ways of writing (what MATH's own scripts do), `spoken` also reads words, case and thousands (after PRM800K).
Both are for comparison only, never for evaluation.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from fractions import Fraction

from megatron_hpt.rewards.reference.boxes import argument
from megatron_hpt.rewards.reference.words import without_units
from megatron_hpt.rewards.rewriting import rewritten, rules

_LAYOUT = rules(
    (r"\\(?:text)?color\s*\{[A-Za-z]+\}|\\(?:[hv]?phantom|hspace\*?)\s*\{[^{}]*\}", ""),
    (r"\\(?:bm|boldsymbol|emph|hbox|rm|bf|tiny|small|normalsize|[lL]arge|LARGE|[hH]uge)(?![A-Za-z])", ""),
    (r"\\dots(?![A-Za-z])|…", r"\\ldots"),
    (r"\n|\\!|\\(?:displaystyle|quad|qquad)(?![A-Za-z])", ""),
    # a number that ends a sentence, or is said to be near; "B." is left as it is
    (r"^\s*(?:(?:\\approx(?![A-Za-z])|≈)\s*)?([+-]?(?:\d[\d,]*\.?\d*|\.\d+))\s*\.?\s*$", r"\1"),
    (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
    (r"\\\\", r"\\"),
    (r"\\begin\{array\}\{.*?\}", r"\\begin{pmatrix}"),
    (r"\\end\{array\}", r"\\end{pmatrix}"),
    (r"bmatrix", "pmatrix"),
    (r"\\[td]frac", r"\\frac"),
    (r"\\(ne|le|ge)q(?![A-Za-z])", r"\\\1"),
    (r"\\(?:left|right)(?![A-Za-z])\.?", ""),
)
_MONEY = rules((r"\\?\$", ""), (r"\\%", ""))
_SHORTHAND = rules(
    (r"(^|[ {])\.(?=\d)", r"\g<1>0."),
    (r"^\s*[A-Za-z][A-Za-z\d]?\s*=([^=]+)$", r"\1"),  # "x=5": which letter it has is not asked
    (r"\\sqrt\s*([^{\s\[\\])", r"\\sqrt{\1}"),
    (r"\s|\\[ ,;:](?!\d)|~", ""),  # between digits it is kept: a thin space is not read as one of thousands
    (r"\\frac([^{\\])([^{\\])", r"\\frac{\1}{\2}"),
    (r"\\frac([^{\\])(?=\{)", r"\\frac{\1}"),
    (r"^0\.50*$", r"\\frac{1}{2}"),
    (r"^(-?)(\d+)/(\d+)$", r"\1\\frac{\2}{\3}"),
    (r"^\\frac\{-(\d+)\}", r"-\\frac{\1}"),
)
_WORDS = rules(
    (r"\\?[$%]", ""),
    (r"\s(?:or|and)\s|\s*,?\s*\\text\s*\{\s*,?\s*(?:or|and)\s*\}\s*", " , "),
)
_LARGE = rules((r"\s*\bmillion", r"*10^6"), (r"\s*\bbillion", r"*10^9"), (r"\s*\btrillion", r"*10^{12}"))
_CONNECTIVE = re.compile(r"\s*,?\s*\\text\s*\{\s*,?\s*(?:or|and)\s*\}\s*")
_MIXED = rules((r"(?<![\d.,])(\d+)\s+(\d+)/(\d+)", r"\1\\frac{\2}{\3}"), (r"(?<=\d)\{,\}(?=\d{3})", ","))
_SYMBOLS = rules(
    (r"\\(?:text|mathrm|mathbf|textbf|textit|mbox|underline)\s*(?=\{)", ""),
    (r"\\pi(?![A-Za-z])", "pi"),
    (r"\\infty(?![A-Za-z])", "inf"),
    (r"\\cup(?![A-Za-z])", "U"),
    (r"\\(?:cdot|times)(?![A-Za-z])", "*"),
    (r"\\[,;: ](?!\d)|~", " "),
    (r"\\([{}])", r"\1"),
)
_SPACES = rules((r"-\s+", "-"), (r"(\d)\s+(?=\(?\d+\)?/)", r"\1+"), (r"[\s{}]", ""))
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?:\D|$))")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d{1,3})?", re.IGNORECASE)
_FRACTION = re.compile(r"([+-]?)\s*(?:\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d+)\s*/\s*(\d+))")
_SHORT = 64
_WHOLE_WITHIN = Decimal("1e-7")


def without_text(latex: str) -> str:
    """Content of the one \\text{…} that the whole answer is; any other answer as it is."""
    latex = latex.strip()
    inner = latex.removeprefix("\\text").lstrip()
    return inner[1:-1].strip() if inner != latex and inner and argument(inner, 0) == len(inner) else latex


def typeset(latex: str) -> str:
    """The answer without choices of layout: spaces, sizes, units, ways to write a fraction or a root."""
    laid_out = rewritten(without_text(latex), _LAYOUT).strip()
    return rewritten(rewritten(without_units(laid_out), _MONEY).strip(), _SHORTHAND)


def spoken(latex: str) -> str:
    """The answer as one would say it: words, units, case, braces and separators of thousands make no difference."""
    text = rewritten(rewritten(rewritten(without_text(latex), _LAYOUT), _LARGE), _WORDS)
    text = _fractions(without_units(text).replace("{,}", ","))
    text = rewritten(rewritten(text, _SYMBOLS), _SPACES).lower()
    return _whole(_THOUSANDS.sub("", text))


def listed(latex: str) -> str:
    """The answer with commas for \\text{ or } and \\text{ and }, which math-verify drops: it reads 1\\text{ or }2 as 12."""
    return _CONNECTIVE.sub(", ", latex)


def readable(latex: str) -> str:
    """The answer in LaTeX that a parser reads: without units and currency, mixed numbers written out."""
    text = without_units(rewritten(without_text(latex), _LAYOUT))
    return rewritten(rewritten(text, _MONEY).strip(), _MIXED)


def number(text: str) -> Decimal | None:
    """The value of a plain decimal number; None if it is not one."""
    if not _NUMBER.fullmatch(text):
        return None
    try:
        return Decimal(text)
    except InvalidOperation:
        return None


def rational(text: str) -> Fraction | None:
    """The value of a plain decimal number or of a fraction of two integers; None if it is neither, or long."""
    if len(text) > _SHORT:
        return None
    fraction = _FRACTION.fullmatch(text)
    if fraction:
        sign, *parts = fraction.groups()
        above, below = (int(part) for part in parts if part)
        return Fraction(-above if sign == "-" else above, below) if below else None
    value = number(text)
    return None if value is None else Fraction(value)


def _whole(text: str) -> str:
    """A number that is whole, up to rounding, without its decimals."""
    value = number(text)
    if value is None or value.adjusted() > 300:
        return text
    nearest = value.to_integral_value()
    return str(int(nearest)) if len(text) < 400 and abs(value - nearest) < _WHOLE_WITHIN else text


def _fractions(text: str) -> str:
    r"""\frac{a}{b} as a/b and \sqrt{a} as sqrt(a), with parentheses where an operand is not one number or letter."""
    text = re.sub(r"\\frac\s*([^{\s\\])\s*([^{\s\\])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*([^{\s\\])\s*(?=\{)", r"\\frac{\1}", text)
    text = re.sub(r"\\sqrt\s*([^{\s\[\\])", r"\\sqrt{\1}", text)
    for _ in range(text.count("\\frac") + text.count("\\sqrt")):
        start = max(text.rfind("\\frac{"), text.rfind("\\sqrt{"))  # the innermost of the last
        if start < 0:
            break
        first = argument(text, start + 5)
        inner = text[start + 6 : first - 1]
        if text.startswith("\\sqrt", start):
            text = f"{text[:start]} sqrt({inner}){text[first:]}"
            continue
        second = argument(text, first)
        if second == first:
            break
        text = f"{text[:start]} {_operand(inner)}/{_operand(text[first + 1 : second - 1])}{text[second:]}"
    return text


def _operand(text: str) -> str:
    return text if re.fullmatch(r"\s*-?(?:\d+|[A-Za-z]|\\[A-Za-z]+)\s*", text) else f"({text})"
