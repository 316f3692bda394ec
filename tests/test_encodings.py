"""Every text file of the product is UTF-8, in any locale: no call leaves the encoding to it."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
BINARY = {"s3fs", "location", "safe_open"}


def unspecified(call: ast.Call) -> bool:
    """A call that opens a text file, or reads a process's text, by the locale's encoding."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    given = {keyword.arg for keyword in call.keywords}
    if "encoding" in given or None in given:
        return False
    if name in ("read_text", "write_text"):
        return True
    if name in ("run", "Popen", "check_output"):
        return bool(given & {"text", "universal_newlines"})
    if name not in ("open", "fdopen") or ast.unparse(call.func) == "os.open":
        return False
    strings = [each.value for each in [*call.args, *(k.value for k in call.keywords)] if isinstance(each, ast.Constant)]
    modes = [each for each in strings if isinstance(each, str) and set(each) <= set("rwaxb+t")]
    owner = ast.unparse(call.func).rpartition(".")[0]
    return not any("b" in mode for mode in modes) and not owner.endswith(("location", "self", "_open", "os.path"))


def test_no_file_is_read_or_written_by_the_locale() -> None:
    found = []
    for folder in ("megatron_hpt", "tools", "recipes"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and unspecified(node):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)[:80]}")
    assert not found, "\n".join(found)
