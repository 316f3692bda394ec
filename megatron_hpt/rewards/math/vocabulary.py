"""Commands of LaTeX that an expression may have."""

from __future__ import annotations


def word_set(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


FUNCTIONS = word_set("sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh coth ln exp log lg")
INVERSES = {"sin": "arcsin", "cos": "arccos", "tan": "arctan", "cot": "arccot", "sec": "arcsec", "csc": "arccsc"}
"""Function → what it is with the exponent -1."""
LISTS = {r"\max": "max", r"\min": "min", r"\gcd": "gcd", r"\lcm": "lcm"}
"""Of several arguments."""
ROUNDING = {r"\lfloor": "floor", r"\lceil": "ceiling", "|": "abs"}
"""Opening bracket → what it means."""
CONSTANTS = {r"\pi": "pi", r"\infty": "infinity", "e": "e", "i": "i", r"\imath": "i"}
GREEK = word_set(
    r"""
    \alpha \beta \gamma \delta \epsilon \varepsilon \zeta \eta \theta \vartheta \iota \kappa \lambda \mu \nu \xi \rho \sigma
    \tau \upsilon \phi \varphi \chi \psi \omega \Gamma \Delta \Theta \Lambda \Xi \Pi \Sigma \Upsilon \Phi \Psi \Omega \ell \hbar
    """
)
ACCENTS = word_set(
    r"""
    \hat \bar \vec \tilde \dot \ddot \overline \widehat \widetilde \overrightarrow \mathbb \mathcal \mathfrak \mathscr
    """
)
"""With their argument they are a name."""
FIGURES = frozenset({r"\angle", r"\triangle"})
"""Likewise with the letters behind them."""
APPLIED = frozenset("fgFG")
"""Letters that, before a bracket, are functions and not factors."""
