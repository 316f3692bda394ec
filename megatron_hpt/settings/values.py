"""YAML as this project reads it: nothing that was written is cut, guessed at or dropped. Knows no configuration.

Plain words are read by YAML 1.2's core schema: 1e-3 is a number, 010 is ten, and `no`, `1:30` and `2020-01-01` stay the texts
that they are (YAML 1.1 makes of them false, 90 and a date). A key that stands twice in a mapping is refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar

import yaml

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_MERGE = re.compile(r"<<")
_CORE = {"null": _NULL, "bool": _BOOL, "int": _INT, "float": _FLOAT, "merge": _MERGE}
"""YAML 1.2.2, section 10.3.2, in the order in which they are tried; `merge` is 1.1's, as cluster files may share parts."""
_TAG = "tag:yaml.org,2002:"
_UNWANTED = {
    yaml.AliasToken: "an alias (*)",
    yaml.AnchorToken: "an anchor (&)",
    yaml.TagToken: "a tag (!)",
    yaml.DirectiveToken: "a directive (%)",
    yaml.DocumentStartToken: "the start of a document (---)",
    yaml.DocumentEndToken: "the end of a document (...)",
}
"""Tokens that say nothing in a value of a command line."""
_DEEPEST = 200
_QUOTES = ("'", '"')
LONGEST = 200
"""Characters of a value that a message repeats."""


class NotAValue(ValueError):
    """A text that is no value, or would be read as something else than what was written; says which."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict] = {}

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        """PyYAML takes seconds for some thousands that are nested, and Python has an end.

        Raises:
            yaml.composer.ComposerError: nested too deep.
        """
        if self._depth > _DEEPEST:
            raise yaml.composer.ComposerError(None, None, "nested too deep", self.peek_event().start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        """Keys are the texts that were written.

        Raises:
            yaml.constructor.ConstructorError: one stands twice, or is no text.
        """
        keys = [key for key, _ in node.value if key.tag != f"{_TAG}merge"]
        if odd := next((key for key in keys if not isinstance(key, yaml.ScalarNode)), None):
            raise yaml.constructor.ConstructorError(None, None, "a key that is no text", odd.start_mark)
        if twice := next((name for name, number in Counter(key.value for key in keys).items() if number > 1), None):
            last = [key for key in keys if key.value == twice][-1]
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} stands twice", last.start_mark)
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=True) for key, value in node.value}

    def construct_yaml_map(self, node: yaml.MappingNode) -> Iterator[dict[str, Any]]:
        """In two steps, so that a mapping may hold itself: what reads it refuses that."""
        data: dict[str, Any] = {}
        yield data
        data.update(self.construct_mapping(node))

    def construct_number(self, node: yaml.ScalarNode) -> int:
        """Decimal, 0o… or 0x….

        Raises:
            yaml.constructor.ConstructorError: more digits than Python reads.
        """
        text = node.value
        try:
            return int(text, 8 if text.startswith("0o") else 16 if text.startswith("0x") else 10)
        except ValueError:
            raise yaml.constructor.ConstructorError(None, None, f"a number of {len(text)} digits", node.start_mark) from None


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would misread."""

    yaml_implicit_resolvers: ClassVar[dict] = dict(yaml.SafeDumper.yaml_implicit_resolvers)

    def ignore_aliases(self, data: Any) -> bool:
        """A value that stands twice is written twice."""
        return True


for _name, _pattern in _CORE.items():
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern.pattern})$"), None)
    _Dumper.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern.pattern})$"), None)
_Loader.add_constructor(f"{_TAG}int", _Loader.construct_number)
_Loader.add_constructor(f"{_TAG}map", _Loader.construct_yaml_map)


def parse(text: str) -> Any:
    """What a YAML document says.

    Raises:
        NotAValue: it is none, a key stands twice, or it is nested too deep.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise NotAValue(
            f"{error.problem}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(error.problem)
        ) from None
    except yaml.YAMLError as error:
        raise NotAValue(" ".join(str(error).split())) from None


def dump(tree: Any, one_line: bool = False) -> str:
    """The document that `parse` reads back equal."""
    flow = {"default_flow_style": True, "width": float("inf")} if one_line else {}
    text = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, **flow)
    return text.removesuffix("...\n").strip() if one_line else text


def given_text(text: str) -> str:
    """A setting that is a text: what was given, to the last character, or what quotes around all of it hold."""
    node = _composed(text) if text.strip().startswith(_QUOTES) else None
    return node.value if isinstance(node, yaml.ScalarNode) and _whole(node, text) else text


def _composed(text: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, _Loader)
    except yaml.YAMLError:
        return None


def _whole(node: yaml.Node, text: str) -> bool:
    return text[node.start_mark.index : node.end_mark.index] == text.strip()


def given_value(text: str) -> Any:
    """A setting that is no text: a number, true or false, null, a list in brackets, a mapping in braces.

    Raises:
        NotAValue: it is none of these, or holds what YAML would drop or turn into something else; says what was understood.
    """
    try:
        value = parse(text)
    except NotAValue as error:
        raise NotAValue(f"{shown(text)} is not a YAML value: {error}; put a text in quotes") from None
    if doubt := next(_doubts(text), None):
        raise NotAValue(
            f"{shown(text)} would be read as {shown(value)}, because it holds {doubt}; write a list as [a, b], a mapping as "
            "{a: b}, and a text that has such characters in quotes"
        )
    return value


def shown(given: Any) -> str:
    """As Python writes it, cut in the middle where that is long."""
    text = repr(given)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"


def _doubts(text: str) -> Iterator[str]:
    """What in a value makes YAML read less than was written, or something else."""
    before = 0
    for token in yaml.scan(text, _Loader):
        if between := text[before : token.start_mark.index].strip():
            yield f"the comment {between!r}"
        before = max(before, token.end_mark.index)
        if type(token) in _UNWANTED:
            yield _UNWANTED[type(token)]
    if after := text[before:].strip():
        yield f"the comment {after!r}"
    yield from _doubts_of(yaml.compose(text, _Loader), text)


def _doubts_of(node: yaml.Node | None, text: str) -> Iterator[str]:
    if node is None:
        return
    written = text[node.start_mark.index : node.end_mark.index]
    if isinstance(node, yaml.MappingNode):
        if not written.startswith("{"):
            yield "a colon outside of braces"
        for key, value in node.value:
            if isinstance(value, yaml.ScalarNode) and value.style is None and not value.value:
                yield f"the key {key.value!r} without a value (a space belongs behind its colon)"
            yield from _doubts_of(value, text)
    elif isinstance(node, yaml.SequenceNode):
        if not written.startswith("["):
            yield "a list without brackets"
        for each in node.value:
            yield from _doubts_of(each, text)
    elif node.style not in (None, *_QUOTES):
        yield f"a block ({node.style})"
    elif node.style is None and node.value != written:
        yield "a break of lines"
