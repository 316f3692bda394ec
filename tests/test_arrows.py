"""Imports go the way that docs/design.md draws. Nothing is imported here: the import lines are read, type-checking ones too."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "megatron_hpt"
DRAWN = re.compile(r"^    (\w+) +→ (.+)$", re.MULTILINE)
"""A line of docs/design.md: a room, and the rooms that it imports."""
ONLY = {"vllm": "engines/vllm", "sglang": "engines/sglang", "megatron": "actor", "nemo_run": "launch/nemo"}
"""Package of somebody else's → the folder whose modules alone import it."""


@cache
def modules() -> dict[str, Path]:
    """Dotted name → file."""
    files = sorted((ROOT / PACKAGE).rglob("*.py"))
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files)
    return dict(zip(names, files, strict=True))


@cache
def imported(name: str) -> tuple[str, ...]:
    """What a module's import lines name: modules of the package where they are, else whatever stands there."""
    return tuple(_imported(name))


def _imported(name: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(modules()[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}, line {node.lineno}: a relative import"
            below = (f"{node.module}.{each.name}" for each in node.names)
            yield from (each if each in modules() else node.module for each in below)


@cache
def drawn() -> dict[str, set[str]]:
    """The arrows of docs/design.md, rooms from the top down."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8").partition("\n## Arrows\n")[2]
    return {room: set(others.split()) - {"nothing"} for room, others in DRAWN.findall(text)}


def room(name: str) -> str:
    """The folder that a module is in, the file that it is, or, of most files at the top, `ground`."""
    first = [*name.split("."), ""][1]
    return first if first in drawn() else "ground"


def arrows() -> dict[tuple[str, str], str]:
    """(from, to) of two rooms → a module of the first that imports one of the second."""
    return {
        (room(name), room(other)): f"{name} imports {other}"
        for name in modules()
        for other in imported(name)
        if other in modules() and room(name) != room(other)
    }


def test_no_arrow_but_those_that_are_drawn() -> None:
    allowed = drawn()
    assert [why for (here, there), why in arrows().items() if there not in allowed[here]] == []
    unused = [(here, there) for here, others in allowed.items() for there in others if (here, there) not in arrows()]
    assert unused == []
    folders = {path.parent.relative_to(ROOT / PACKAGE).parts[:1] for path in modules().values()}
    assert {name for (name, *_) in filter(None, folders)} - {"settings"} <= allowed.keys()


def test_all_arrows_go_down() -> None:
    order = list(drawn())
    assert [
        (here, there) for here, others in drawn().items() for there in others if order.index(there) <= order.index(here)
    ] == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " → ".join([*way[way.index(name) :], name])
        if name not in done:
            for other in imported(name):
                if other in modules():
                    visit(other, (*way, name))
            done.add(name)

    for name in modules():
        visit(name, ())


def test_other_peoples_packages_have_one_home_each() -> None:
    for name, path in modules().items():
        folder = path.parent.relative_to(ROOT / PACKAGE).as_posix()
        for package in {other.partition(".")[0] for other in imported(name)} & ONLY.keys():
            assert f"{folder}/".startswith(f"{ONLY[package]}/"), f"{name} imports {package}"


def test_engines_do_not_know_each_other() -> None:
    for name in modules():
        for one, other in (("vllm", "sglang"), ("sglang", "vllm")):
            if name.startswith(f"{PACKAGE}.engines.{one}."):
                assert not [each for each in imported(name) if each.startswith(f"{PACKAGE}.engines.{other}")], name


def test_no_folder_is_a_heap() -> None:
    for folder in {path.parent for path in modules().values()}:
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= 17, folder
