"""The keys of the blackboard: the list in the coordinator's docstring, the one in docs/design.md, and the code."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_hpt"
DOCSTRING = ast.get_docstring(ast.parse((PACKAGE / "rollout/coordinator.py").read_text(encoding="utf-8")))
DOCUMENTED = re.findall(r"^    (\S+)  +", DOCSTRING.partition("    key  ")[2], re.MULTILINE)
WRITES, READS = {"put", "_announce"}, {"get", "wait", "wait_any", "wait_beside", "until", "_wait"}


def shape(key: str) -> str:
    """A key without what varies in it: `batch/step` is `batch/*`; `ready/part` and `ready/trainer` are `ready/*`."""
    name, *variable = key.split("/")
    return key if key == "status/coordinator" else "/".join([name, *("*" * len(variable))])


def keys_of(node: ast.AST, assigned: dict[str, list[ast.AST]]) -> Iterator[str]:
    """The keys that an argument may be: a text, one with values in it, a list of them, a name for any of these."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield shape(node.value)
    elif isinstance(node, ast.JoinedStr):
        yield shape("".join(part.value if isinstance(part, ast.Constant) else "*" for part in node.values))
    elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "ready":
        yield "ready/*"
    elif isinstance(node, ast.List):
        for element in node.elts:
            yield from keys_of(element, assigned)
    elif isinstance(node, ast.Name):
        for value in assigned.get(node.id, []):
            yield from keys_of(value, {})
        if node.id == "NOTICE":
            yield "notice"
    elif isinstance(node, ast.IfExp):
        yield from keys_of(node.body, assigned)


def used(calls: set[str]) -> set[str]:
    """The keys that the modules which import the blackboard pass to some of its methods."""
    found: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        if "from megatron_hpt.blackboard import" not in source:
            continue
        nodes = list(ast.walk(ast.parse(source)))
        assigned: dict[str, list[ast.AST]] = {}
        for node in nodes:
            if isinstance(node, ast.Assign | ast.AugAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    assigned.setdefault(getattr(target, "id", ""), []).append(node.value)
        for node in nodes:
            if isinstance(node, ast.Call) and node.args and getattr(node.func, "attr", "") in calls:
                found.update(keys_of(node.args[0], assigned))
    return found


def test_the_docstring_lists_every_key_that_is_written_and_no_other() -> None:
    assert len(DOCUMENTED) == len(set(DOCUMENTED))
    assert used(WRITES) == set(map(shape, DOCUMENTED))


def test_every_key_is_read_by_somebody() -> None:
    assert set(map(shape, DOCUMENTED)) <= used(READS)


def test_the_documentation_lists_the_same_keys() -> None:
    page = (ROOT / "docs/design.md").read_text(encoding="utf-8").partition("| key | written by |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\S+)` \|", page, re.MULTILINE) == DOCUMENTED
