"""Checks that a tokenizer does what its tokenizer.json says, and loses nothing of what it is given."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_hpt.errors import ModelError, shown

logger = logging.getLogger(__name__)
PROBES = (
    "How many primes are below 100?",
    " two  spaces,\n\na new line,\tand 1,234.5 = 2 + 3 .",
    "So $\\frac{1}{2} \\le x$; thus \\boxed{x \\in [0, 1)} .\n",
    "naïve Σ 数学 √2 🙂",
)
"""Texts that show how tokenizers differ: spaces, line ends, digits, LaTeX, more than ASCII."""


def as_its_file(tokenizer: Any, folder: str) -> Any:
    """Return the tokenizer, read again from its tokenizer.json alone where transformers made another one of it.

    For some classes (LlamaTokenizerFast) transformers takes no more than the vocabulary from tokenizer.json and builds the rest
    as that class's first model had it; a byte-level vocabulary (DeepSeek's distillations) then has no token for a space.

    Raises:
        ModelError: it differs from the file even so.
    """
    from transformers import PreTrainedTokenizerFast

    if first_difference(tokenizer, folder, PROBES) is None:
        return tokenizer
    plain = PreTrainedTokenizerFast.from_pretrained(folder)
    if found := first_difference(plain, folder, PROBES):
        raise ModelError(f"model.path: {found}")
    logger.warning(
        "note: transformers' %s differs from tokenizer.json in %s, which is read as it is", type(tokenizer).__name__, folder
    )
    return plain


def first_difference(tokenizer: Any, folder: str, texts: Iterable[str]) -> str | None:
    """Return in words where a tokenizer gives other tokens than its tokenizer.json; None: nowhere, or there is no such file."""
    from tokenizers import Tokenizer

    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        return None
    exact = Tokenizer.from_file(str(file))
    exact.no_truncation()
    exact.no_padding()
    added = [token for token in tokenizer.get_added_vocab() if exact.token_to_id(token) is None]  # by tokenizer_config.json
    for text in (text for text in texts if not any(token in text for token in added)):
        expected = exact.encode(text, add_special_tokens=False).ids
        found = list(tokenizer.encode(text, add_special_tokens=False))
        if found != expected:
            place = next((i for i, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), len(expected))
            return (
                f"transformers reads the tokenizer in {folder} otherwise than its tokenizer.json: {shown(text)} becomes "
                f"{shown(exact.decode(found, skip_special_tokens=False))} ({len(found)} tokens, another one from number "
                f'{place} on), by the file {len(expected)} tokens; "tokenizer_class": "PreTrainedTokenizerFast" in '
                "tokenizer_config.json has the file read as it is"
            )
    return None


def loss(tokenizer: Any, text: str) -> str | None:
    """Return in words what becomes of a text that tokens cannot carry, or None where it comes back from them.

    White space around it and around special tokens, where some tokenizers put some, and the spelling of characters (Unicode's
    normal forms) may differ.
    """
    tokens = tokenizer.encode(text, add_special_tokens=False)
    back = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    marks = _marks(tokenizer)
    if back == text or _normal(back, marks) == _normal(text, marks):
        return None
    place = next((i for i, pair in enumerate(zip(text, back, strict=False)) if pair[0] != pair[1]), min(len(text), len(back)))
    start = max(0, place - 10)
    return f"{shown(text[start : place + 20])} comes back from its tokens as {shown(back[start : place + 20])}"


def _marks(tokenizer: Any) -> re.Pattern[str]:
    """Match special and added tokens with the white space around them; nothing where there are no such tokens."""
    tokens = sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}, key=len, reverse=True)
    return re.compile(rf"\s*({'|'.join(map(re.escape, tokens))})\s*" if tokens else r"(?!)()")


def _normal(text: str, marks: re.Pattern[str]) -> str:
    return unicodedata.normalize("NFC", marks.sub(r"\1", text)).strip()
