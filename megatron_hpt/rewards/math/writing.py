"""One spelling for what is written in several: Unicode, sizes, spaces, fonts, separators of thousands.

Nothing here changes what an answer says; what a rule cannot read it leaves as it is.
"""

from __future__ import annotations

import re
from functools import lru_cache

from megatron_hpt.rewards.boxes import argument
from megatron_hpt.rewards.math.unicode import as_latex
from megatron_hpt.rewards.rewriting import rewritten, rules

_END = r"(?![A-Za-z])"
_LAYOUT = rules(
    (r"\\(?:text)?color\s*\{[A-Za-z]+\}|\\(?:[hv]?phantom|hspace\*?|label|tag\*?)\s*\{[^{}]*\}", " "),
    (rf"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|rm|bf|it|tiny|small|normalsize|[lL]arge|LARGE|[hH]uge|"
     rf"left|right|[bB]ig[lrm]?|[bB]igg[lrm]?){_END}(?:\.(?!\d))?", " "),
    (rf"\\(?:bm|boldsymbol|mathbf|textbf|mathit|textit|emph|underline|hbox|mathnormal|ensuremath){_END}\s*", " "),
    (r"\\mathbb\s*([A-Z])", r"\\mathbb{\1}"),
    (rf"\\[dtc]frac{_END}", r"\\frac"),
    (rf"\\(?:dbinom|tbinom){_END}", r"\\binom"),
    (rf"\\(?:dots|cdots|dotsc|dotsb|hdots){_END}", r"\\ldots"),
    (rf"\\varnothing{_END}|\\O{_END}", r"\\emptyset"),
    (rf"\\(ne|le|ge)q{_END}", r"\\\1"),
    (rf"\\(le|ge)qslant{_END}", r"\\\1"),
    (rf"\\lt{_END}", "<"),
    (rf"\\gt{_END}", ">"),
    (rf"\\(?:times|ast|bullet){_END}", r"\\cdot "),
    (r"\(\s*-\s*\\infty\s*,\s*\+?\s*\\infty\s*\)", r"\\mathbb{R}"),
    (rf"\\lbrace{_END}", r"\\{"),
    (rf"\\rbrace{_END}", r"\\}"),
    (rf"\\(?:[lr]?vert){_END}", "|"),
    (rf"\\(?:lbrack){_END}", "["),
    (rf"\\(?:rbrack){_END}", "]"),
    (rf"\\(?:colon|ratio){_END}", ":"),
    (rf"\\degree{_END}|\\textdegree{_END}|\^\s*\{{\s*\\circ\s*\}}|\^\s*\\circ{_END}", r"^\\circ "),
    (rf"\\prime{_END}", "'"),
    (r"\^\s*\{\s*('+)\s*\}|\^\s*('+)", lambda m: m[1] or m[2]),
    (r"\\\\\s*\[\s*-?[\d.]+\s*(?:pt|em|ex|mm|cm)\s*\]", r"\\\\"),
    (rf"\\(?:boxed|fbox){_END}\s*(?=\{{)", " "),
    (r"\\begin\s*\{(?:b|small)?matrix\}|\\begin\s*\{array\}(?:\[[a-z]\])?\s*\{[^{}]*\}", r"\\begin{pmatrix}"),
    (r"\\end\s*\{(?:b|small)?matrix\}|\\end\s*\{array\}", r"\\end{pmatrix}"),
    (r"\\(?:d|r)cases", r"\\cases"),
    (r"(?<!\\)\\[,;:!> ]|~|\\(?:quad|qquad|enspace|thinspace)(?![A-Za-z])", lambda m: "" if m[0] == "\\!" else " "),
)  # fmt: skip
_LETTERS = rules(
    (r"\\(?:mathrm|text|textrm|operatorname\*?|mathop|mathsf)\s*\{\s*([eidx])\s*\}", r" \1 "),
    (r"\\(?:mathrm|text|textrm|operatorname\*?)\s*\{\s*(sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|ln|log|exp|gcd|lcm)\s*\}",
     r"\\\1 "),
    (r"\\operatorname\*?\s*\{\s*(max|min)\s*\}", r"\\\1 "),
    (r"(?<![A-Za-z\\])(arcsin|arccos|arctan|sin|cos|tan|cot|sec|csc|ln|log|exp|sqrt|pi|infty|(?:max|min|gcd|lcm)(?=\s*\())(?![A-Za-z])",
     r"\\\1 "),
    (r"(?<![A-Za-z\\])(?:inf|infinity)(?![A-Za-z])", r"\\infty "),
)  # fmt: skip
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:\s*\{\s*,\s*\}\s*|,?\\!,?(?:\\!)?\s*|\\,|~| )\d{3})+(?![\d])")
_OF_VECTORS = re.compile(r"\\(?:vec|mathbf|boldsymbol|bm|overrightarrow)(?![A-Za-z])")
_PRODUCT = re.compile(r"\\times(?![A-Za-z])|×")
_BRACKETED_MATRIX = re.compile(r"^[(\[]\s*(\\begin\{pmatrix\}(?:(?!\\begin).)*\\end\{pmatrix\})\s*[)\]]$", re.DOTALL)
_SYSTEM = re.compile(r"^\\\{\s*\\begin\{pmatrix\}((?:(?!\\begin).)*)\\end\{pmatrix\}$", re.DOTALL)
_NUMBERS = rules(
    (r"\{\s*,\s*\}", ","),
    (r"(?<![\w.])(\d+(?:\.\d+)?|\.\d+)[eE]([+-]?\d{1,4})(?![\w.])", r"\1\\cdot 10^{\2}"),
    (r"(?<![\d.,\w}])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d.])", r"\1\\frac{\2}{\3}"),
    (r"(\d*)\.(\d*)\\overline\s*\{\s*(\d+)\s*\}", lambda m: _repeating(m[1], m[2], m[3])),
)
_CONNECTIVES = rules(
    (r"\s*,?\s*\\(?:text|mathrm|mbox|textrm)\s*\{\s*,?\s*(?:or|and)\s*\}\s*", ", "),
    (r"(?<=[\s\d}),])\s*,?\s+(?:or|and)\s+", ", "),
)
_SAID = (
    r"^\s*(?:\\text\s*\{)?(?i:(?:the |our |my )?(?:final )?(?:answer|solution|result|value)(?: is| equals)?)"
    r"\s*[:=]?\s*\}?\s*(?=[-+\\\d(\[$])"
)
_ENDS = rules(
    (_SAID, ""),
    (r"^\s*(?:\\approx|\\therefore|\\implies|\\Rightarrow|=)(?![A-Za-z])\s*", ""),
    (r"(?<![.\s])\s?[.;,]\s*$", ""),
    (r"^\s*\\(?:\(|\[)|\\(?:\)|\])\s*$", ""),
    (r"\s+", " "),
)


@lru_cache(maxsize=4096)
def plain(latex: str) -> str:
    """The answer in one spelling: commands of LaTeX only, no layout, numbers without separators of thousands."""
    text = as_latex(latex)
    text = _GROUPED.sub(lambda m: re.sub(r"\D", "", m[0]), text)
    text = _whole_text(rewritten(text, _ENDS).strip())
    if _OF_VECTORS.search(text):  # a product of vectors is not one of numbers
        text = _PRODUCT.sub(r"\\vectorproduct ", text)
    # "$" stands for mathematics, "\$" for money; a percent sign means the same with and without its backslash
    text = re.sub(r"(?<!\\)\$", "", text)
    text = re.sub(r"(?<!\\)%", r"\\%", text)
    for step in (_LAYOUT, _CONNECTIVES, _LETTERS, _NUMBERS, _ENDS):
        text = rewritten(text, step)
    return _bare(text)


@lru_cache(maxsize=4096)
def normal(text: str) -> str:
    """A plain text without space and needless braces, for comparison as text; a space behind a comma within digits is kept."""
    text = re.sub(r"(?<=\d),\s+(?=\d)", ";", text)
    text = re.sub(r"(?<=\d)\s+(?=\d)", "|", text)
    text = re.sub(r"(\\[A-Za-z]+)\s+(?=[A-Za-z])", r"\1|", text)
    text = re.sub(r"\\(?:text|mathrm|mbox|textrm|operatorname\*?)\s*(?=\{)", "", text)
    text = re.sub(r"\\frac\s*([0-9A-Za-z])\s*([0-9A-Za-z])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\s", "", text)
    return re.sub(r"([\^_]|\\[pb]?mod)\{(\w)\}", r"\1\2", text)


def _bare(text: str) -> str:
    """Without braces, \\text and the brackets of a matrix around all of it."""
    before = ""
    while text != before:
        before, text = text, _whole_text(_outer(text.strip()))
        text = _BRACKETED_MATRIX.sub(r"\1", text)
    return _SYSTEM.sub(r"\\begin{cases}\1\\end{cases}", text)


def _repeating(whole: str, fixed: str, period: str) -> str:
    """0.1\\overline{6} is (16 - 1) / 90."""
    nines = int("9" * len(period) + "0" * len(fixed))
    return rf"\frac{{{int(whole + fixed + period) - int(whole + fixed or 0)}}}{{{nines}}}"


def _whole_text(latex: str) -> str:
    """Content of the one \\text{…} that the whole answer is; any other answer as it is."""
    inner = re.sub(r"^\\(?:text|textbf|mathrm|mbox|textrm)\s*(?=\{)", "", latex)
    return inner[1:-1].strip() if inner != latex and argument(inner, 0) == len(inner) else latex


def _outer(text: str) -> str:
    """Without braces around all of it."""
    return text[1:-1].strip() if text.startswith("{") and argument(text, 0) == len(text) else text
