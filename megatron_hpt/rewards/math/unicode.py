"""Unicode as LaTeX."""

from __future__ import annotations

import re


def _words(text: str) -> list[str]:
    return text.split()


_COMMANDS = _words(
    r"""
    × \cdot ⋅ \cdot · \cdot ∙ \cdot ÷ \div ± \pm ∓ \mp ≤ \le ⩽ \le ≥ \ge ⩾ \ge ≠ \ne ≈ \approx ∈ \in ∪ \cup ∩ \cap ∅ \emptyset
    ∞ \infty … \ldots ⋯ \ldots → \to ∠ \angle △ \triangle ⌊ \lfloor ⌋ \rfloor ⌈ \lceil ⌉ \rceil ⟨ \langle ⟩ \rangle ∖ \setminus
    ∣ \mid ° ^\circ ℝ \mathbb{R} ℤ \mathbb{Z} ℕ \mathbb{N} ℚ \mathbb{Q} ℂ \mathbb{C}
    α \alpha β \beta γ \gamma δ \delta ε \epsilon ζ \zeta η \eta θ \theta ι \iota κ \kappa λ \lambda μ \mu ν \nu ξ \xi π \pi
    ρ \rho σ \sigma τ \tau υ \upsilon φ \varphi χ \chi ψ \psi ω \omega ϕ \phi ϑ \vartheta
    Γ \Gamma Δ \Delta Θ \Theta Λ \Lambda Ξ \Xi Π \Pi Σ \Sigma Υ \Upsilon Φ \Phi Ψ \Psi Ω \Omega
    """
)
"""Signs, each before its command."""
_FRACTIONS = _words(
    "½ 1 2 ⅓ 1 3 ⅔ 2 3 ¼ 1 4 ¾ 3 4 ⅕ 1 5 ⅖ 2 5 ⅗ 3 5 ⅘ 4 5 ⅙ 1 6 ⅚ 5 6 ⅐ 1 7 ⅛ 1 8 ⅜ 3 8 ⅝ 5 8 ⅞ 7 8 ⅑ 1 9 ⅒ 1 10"
)
_PLAIN = {"′": "'", "″": "''", "’": "'", "⁄": "/", "∕": "/"}
_MINUS = "\u2212\u2012\u2013\u2014\ufe63\uff0d"
_WIDE = range(0xFF01, 0xFF5F)
"""ASCII in full width."""
_TABLE = {
    **dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\u00ad")),
    **dict.fromkeys([0xA0, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000], " "),
    **{wide: chr(wide - 0xFEE0) for wide in _WIDE},
    **dict.fromkeys(map(ord, _MINUS), "-"),
    **{ord(sign): f" {command} " for sign, command in zip(_COMMANDS[::2], _COMMANDS[1::2], strict=True)},
    **{
        ord(sign): rf"\frac{{{above}}}{{{below}}}"
        for sign, above, below in zip(_FRACTIONS[::3], _FRACTIONS[1::3], _FRACTIONS[2::3], strict=True)
    },
    **{ord(sign): text for sign, text in _PLAIN.items()},
}
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ", "0123456789+-ni")
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋ₙᵢ", "0123456789+-ni")
_EXPONENT = re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ]+")
_INDEX = re.compile(r"[₀₁₂₃₄₅₆₇₈₉₊₋ₙᵢ]+")
_ROOTS = (
    (re.compile(r"√\s*(\d+(?:\.\d+)?|[A-Za-z])"), r"\\sqrt{\1}"),
    (re.compile(r"∛\s*(\d+(?:\.\d+)?|[A-Za-z])"), r"\\sqrt[3]{\1}"),
    (re.compile("√"), r"\\sqrt "),
)


def as_latex(text: str) -> str:
    """The text with commands of LaTeX for signs, exponents, fractions and Greek letters; what is invisible goes."""
    text = _EXPONENT.sub(lambda found: f"^{{{found[0].translate(_RAISED)}}}", text)
    text = _INDEX.sub(lambda found: f"_{{{found[0].translate(_LOWERED)}}}", text)
    for pattern, root in _ROOTS:
        text = pattern.sub(root, text)
    return text.translate(_TABLE)
