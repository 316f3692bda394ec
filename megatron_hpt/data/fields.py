"""The fields of one row in the project's schema: what is in them, or an error that names row and field and ends the command.

`preparation.fields` reads the fields of anybody's records. It takes more kinds of values, and an error costs one row its place.
`storage.columns` and `storage.lines` see to the types of whole columns before a row comes here.
"""

from __future__ import annotations

from typing import Any

from megatron_hpt.errors import DataError, shown


def check_row(row: dict[str, Any], where: str) -> None:
    """Check all that can be checked of a row without a tokenizer; `scan` calls this for rows that look doubtful.

    Raises:
        DataError: as `PromptReader.read`.
    """
    messages(row["prompt"], f"{where}, prompt")
    ground_truth(row, where)
    demonstrations(row, where)


def ground_truth(row: dict[str, Any], where: str) -> str:
    """Return what the verifier compares with.

    Raises:
        DataError: there is none.
    """
    truth = _record(row["reward_model"], f"{where}, reward_model").get("ground_truth")
    if not isinstance(truth, str) or not truth:
        raise DataError(f"{where}, reward_model.ground_truth: given {shown(truth)}; expected a non-empty string")
    return truth


def _record(value: Any, where: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise DataError(f"{where}: given {shown(value)}; expected a record of named fields")
    return value or {}


def messages(value: Any, where: str) -> list[dict[str, str]]:
    """Return a chat.

    Raises:
        DataError: it is empty, or one of its messages is.
    """
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: given {shown(value)}; expected a non-empty list of messages with role and content")
    for message in value:
        fields = message if isinstance(message, dict) else {}
        if not all(isinstance(fields.get(key), str) and fields[key].strip() for key in ("role", "content")):
            raise DataError(f"{where}: a message is empty, or has no role or no text content: {shown(message)}")
    return value


def demonstrations(row: dict[str, Any], where: str) -> list[str]:
    """Return the texts of a row's demonstrations: those of ``target_lst``, or the one of ``target``, or none.

    Raises:
        DataError: one is empty, or not one message.
    """
    several = row.get("target_lst")
    if several:
        return [_demonstration(value, f"{where}, target_lst[{index}]") for index, value in enumerate(several)]
    return [_demonstration(row["target"], f"{where}, target")] if row.get("target") else []


def _demonstration(value: Any, where: str) -> str:
    if isinstance(value, str):
        value = [{"role": "assistant", "content": value}]
    written = messages(value, where)
    if len(written) != 1:
        raise DataError(f"{where}: {len(written)} messages; a demonstration is one message")
    return written[0]["content"]
