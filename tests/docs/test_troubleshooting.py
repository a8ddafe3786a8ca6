"""docs/troubleshooting.md has an entry for each error, warning and warning log line of the package."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))

import list_messages  # noqa: E402

RAISED = {"ZeroCopyError", "ModelLostError", "ModelTimeoutError", "warn", "_warn_once"}


def literal(node: ast.AST) -> str:
    """Return the text of a string expression, with `{}` for each value in it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(literal(value) if isinstance(value, ast.Constant) else "{}" for value in node.values)
    return literal(node.left) + literal(node.right) if isinstance(node, ast.BinOp) else ""


def messages() -> Iterator[tuple[str, str]]:
    """Yield where and what the package raises or warns, for messages that are written at the call."""
    for path in sorted((ROOT / "ray_zerocopy").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            is_warning = node.func.id == "log" and any("WARNING" in ast.dump(argument) for argument in node.args)
            if node.func.id in RAISED or is_warning:
                text = max((literal(argument) for argument in node.args), key=len, default="")
                if len(re.sub(r"[^a-z]", "", text)) > 10:
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", text


def test_every_error_and_warning_has_an_entry() -> None:
    """A part of each message is quoted in the page, as the beginning of an entry."""
    page = (ROOT / "docs/troubleshooting.md").read_text()
    quoted = [part for line in page.splitlines() if line.startswith("`") for part in re.findall("`([^`]+)`", line)]
    found = list(messages())
    assert len(found) > 25
    missing = [f"{where}: {text}" for where, text in found if not any(part in text for part in quoted)]
    assert not missing, "\n".join(missing)


def test_every_entry_is_a_message() -> None:
    """Each quoted part is in the text of the package."""
    page = (ROOT / "docs/troubleshooting.md").read_text()
    source = "".join(
        literal(node)
        for path in (ROOT / "ray_zerocopy").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.JoinedStr, ast.Constant))
    )
    quoted = [part for line in page.splitlines() if line.startswith("`") for part in re.findall("`([^`]+)`", line)]
    assert [part for part in quoted if part not in source] == []


def test_the_list_of_all_messages() -> None:
    """docs/messages.md, which Sphinx has written, has each error and warning, also those that functions compose."""
    listed = {message.text for message in list_messages.messages()}
    missing = [f"{where}: {text}" for where, text in messages() if not _is_part(text, listed)]
    assert not missing, "\n".join(missing)
    page = list_messages.page()
    for part in (
        "`ValueError`: column '…' (…) has … nulls in … rows",
        "cannot be pickled: its values belong to threads of this process. Set the values in the worker",
        "`ModelLostError`: … is no longer in the object store: …. Node …, on which it was prepared, died.",
        "`warning`: the object store of this node is not in memory",
    ):
        assert part in page


def _is_part(text: str, listed: set[str]) -> bool:
    """Tell whether all of a message's literal parts, in their order, are in one of the listed texts."""
    parts = [re.escape(part) for part in text.split("{}") if part]
    return any(re.search(".*".join(parts), whole) for whole in listed)
