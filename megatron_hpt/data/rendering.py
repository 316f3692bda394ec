"""A chat as the text that a model is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_hpt.errors import DataError


def rendered(tokenizer: Any, chat: Sequence[dict[str, str]], where: str) -> str:
    """Render a chat by the tokenizer's chat template, with a generation prompt.

    Args:
        where: how error messages call the row.

    Raises:
        DataError: the template refuses the chat.
    """
    try:
        return tokenizer.apply_chat_template(list(chat), add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template is somebody's program: it raises whatever it likes
        roles = [message["role"] for message in chat]
        raise DataError(
            f"{where}, prompt: the chat template (data.chat_template, or else that of the tokenizer in "
            f"{getattr(tokenizer, 'name_or_path', '')!r}) refuses messages of the roles {', '.join(roles)}: "
            f"{error or type(error).__name__}; {_advice(roles)}"
        ) from None


def _advice(roles: Sequence[str]) -> str:
    if "system" in roles:
        return (
            "write the system prompt into the question (tools/prepare_data.py openr1 leaves it out), or set data.chat_template "
            "to a template that has a place for it"
        )
    return "most templates take user and assistant by turns, the user first and last: change the row, or set data.chat_template"
