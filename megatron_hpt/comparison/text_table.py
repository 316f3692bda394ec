"""A table of text that is shown on a terminal, in Markdown and in HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Cell:
    """One place of a table."""

    text: str
    detail: str = ""
    """More text, which is shown smaller, below the text or behind it."""
    best: bool = False
    """Whether the text is bold."""


@dataclass(frozen=True)
class TextTable:
    """A table with a title; the first `left` columns are names, the others numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    left: int = 1
    caption: str = ""


def rich_table(grid: TextTable) -> Table:
    """Make a table for the terminal."""
    table = Table(title=grid.title, title_justify="left", caption=grid.caption or None, caption_justify="left", box=None)
    for index, column in enumerate(grid.columns):
        table.add_column(Text(column), justify="left" if index < grid.left else "right", header_style="bold")
    for row in grid.rows:
        table.add_row(*(_rich_cell(cell) for cell in row))
    return table


def _rich_cell(cell: Cell) -> Text:
    text = Text(cell.text, style="bold" if cell.best else "")
    return text.append(f"\n{cell.detail}", style="dim not bold") if cell.detail else text


def markdown(grid: TextTable) -> str:
    """Make a table in GitHub's Markdown, with the title as a heading."""
    rules = ["---" if index < grid.left else "---:" for index in range(len(grid.columns))]
    lines = [
        [_escaped(column) for column in grid.columns],
        rules,
        *([_markdown_cell(cell) for cell in row] for row in grid.rows),
    ]
    heading = f"## {grid.title}\n\n" if grid.title else ""
    caption = f"\n{grid.caption}\n" if grid.caption else ""
    return heading + "".join(f"| {' | '.join(line)} |\n" for line in lines) + caption


def _markdown_cell(cell: Cell) -> str:
    text = f"**{_escaped(cell.text)}**" if cell.best else _escaped(cell.text)
    return f"{text} ({_escaped(cell.detail)})" if cell.detail else text


def _escaped(text: str) -> str:
    for character in "\\|*<":
        text = text.replace(character, f"\\{character}")
    return text


def html_table(grid: TextTable) -> str:
    """Make a heading and a table in HTML; the classes of cells put names left and numbers right."""
    head = "".join(f'<th class="{_kind(i < grid.left)}">{html.escape(column)}</th>' for i, column in enumerate(grid.columns))
    body = "".join(f"<tr>{''.join(_html_cell(cell, i < grid.left) for i, cell in enumerate(row))}</tr>" for row in grid.rows)
    caption = f"<p>{html.escape(grid.caption)}</p>" if grid.caption else ""
    return f"<h2>{html.escape(grid.title)}</h2><table><tr>{head}</tr>{body}</table>{caption}"


def _html_cell(cell: Cell, is_name: bool) -> str:
    text = f"<b>{html.escape(cell.text)}</b>" if cell.best else html.escape(cell.text)
    detail = f"<br><small>{html.escape(cell.detail)}</small>" if cell.detail else ""
    return f'<td class="{_kind(is_name)}">{text}{detail}</td>'


def _kind(is_name: bool) -> str:
    return "name" if is_name else "number"
