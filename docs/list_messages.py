"""Write docs/messages.md: every error and warning of the package, read from its source. Sphinx calls it."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeGuard

ROOT = Path(__file__).parents[1]
KINDS = (
    "ZeroCopyError",
    "ModelLostError",
    "ModelTimeoutError",
    "TypeError",
    "ValueError",
    "AttributeError",
    "Refusal",
)
_REFUSAL = "… cannot be shared: … is a …, which cannot be pickled: {}. {}"
WARNS = ("warn", "_warn_once")
# By the beginning of a file's path: what its messages are about.
TOPICS = {
    "_arrow": "Columns",
    "arrow": "Columns",
    "_batch": "Predictors and batches",
    "predictor": "Predictors and batches",
    "_device": "Devices",
    "_model/aoti": "Compiled programs",
    "_model/package": "Compiled programs",
    "_model/signature": "Compiled programs",
    "_model": "Models and their code",
    "_task": "Tasks and stand-ins",
    "invoke": "Tasks and stand-ins",
    "_pages": "Memory and limits",
    "memory": "Memory and limits",
    "_store": "Models in the object store",
    "models": "Models in the object store",
    "actor": "Models in the object store",
    "_cli": "The command line",
    "__init__": "The package",
    "errors": "The package",
}


class Message(NamedTuple):
    """A message of the package.

    Attributes:
        where: The file and line.
        kind: The class of the error, or "warning", or "log line".
        text: The text, with `…` for each value in it.
    """

    where: str
    kind: str
    text: str


def literal(node: ast.AST, names: dict[str, str], value: str = "…") -> str:
    """Return the text of a string expression, with `value` for each value that is not known from `names`."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(literal(part, names, value) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        inner = literal(node.value, names, "") if node.conversion == -1 else ""
        return inner or value
    if isinstance(node, ast.BinOp):
        return literal(node.left, names, value) + literal(node.right, names, value)
    return names.get(node.id, "") if isinstance(node, ast.Name) else ""


def messages() -> Iterator[Message]:
    """Yield the messages of the package, file by file."""
    trees = {path: ast.parse(path.read_text()) for path in sorted((ROOT / "ray_zerocopy").rglob("*.py"))}
    returned = _texts_of_functions(trees.values())
    for path, tree in trees.items():
        constants = _strings(tree.body)
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        seen: set[int] = set()
        for scope in [*reversed(functions), tree]:  # inner functions first: their names are the nearer ones
            names = {**constants, **_strings(list(ast.walk(scope)))}
            for node in ast.walk(scope):
                if isinstance(node, ast.Call) and id(node) not in seen and (kind := _kind(node)):
                    seen.add(id(node))
                    text = " ".join(filter(None, (literal(argument, names) for argument in node.args)))
                    if ast.unparse(node.func) == "Refusal":  # `unpicklable_error` puts its two texts into an error
                        text = _REFUSAL.format(*(literal(argument, names) or "…" for argument in node.args))
                    called = [part.func for argument in node.args for part in ast.walk(argument) if is_call(part)]
                    parts = [text for function in called for text in returned.get(ast.unparse(function), [])]
                    for part in [text, *parts]:
                        if is_text(part):
                            where = f"{path.relative_to(ROOT / 'ray_zerocopy')}:{node.lineno}"
                            yield Message(where, kind, part)


def _texts_of_functions(trees: Iterable[ast.Module]) -> dict[str, list[str]]:
    """Return the texts that the functions of the package return, by name: some write the message of an error."""
    found: dict[str, list[str]] = {}
    for tree in trees:
        constants = _strings(tree.body)
        for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
            nodes = list(ast.walk(function))
            names = {**constants, **_strings(nodes)}
            texts = [literal(node.value, names) for node in nodes if isinstance(node, ast.Return) and node.value]
            name = f"self.{function.name}" if "self" in ast.unparse(function.args) else function.name
            found.setdefault(name, []).extend(filter(is_text, texts))
    return found


def is_call(node: ast.AST) -> TypeGuard[ast.Call]:
    """Tell whether a node is a call."""
    return isinstance(node, ast.Call)


def is_text(text: str) -> bool:
    """Tell whether a string is a sentence, and not a name or a format."""
    return sum(letter.isalpha() for letter in text) > 10


def _strings(nodes: list[ast.AST] | list[ast.stmt]) -> dict[str, str]:
    """Return the names that are given a text, each with the first text; a text may use the ones before it."""
    found: dict[str, str] = {}
    assigned = [node for node in nodes if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)]
    for node in sorted(assigned, key=lambda node: node.lineno):
        text = literal(node.value, found)
        if is_text(text):
            found.setdefault(node.targets[0].id, text)  # type: ignore[attr-defined]
    return found


def _kind(node: ast.Call) -> str:
    name = node.func.id if isinstance(node.func, ast.Name) else ""
    if name in WARNS:
        return "warning"
    if name == "log" and any("WARNING" in ast.dump(argument) for argument in node.args):
        return "log line"
    return {"Refusal": "TypeError"}.get(name, name) if name in KINDS else ""


def topic_of(where: str) -> str:
    """Return the heading for the messages of a file."""
    return next(topic for begin, topic in sorted(TOPICS.items(), reverse=True) if where.startswith(begin))


def page() -> str:
    """Return the text of docs/messages.md."""
    lines = [
        "# All messages",
        "",
        "Every error, warning and warning log line of the package, read from its source when this site is built. A "
        "message has the fact, where, and the remedy. `…` stands for a name or a number. "
        "[Troubleshooting](troubleshooting.md) says more about those that come from the machine or the cluster.",
    ]
    found = list(messages())
    for topic in dict.fromkeys(TOPICS.values()):
        entries = sorted({(m.kind, m.text) for m in found if topic_of(m.where) == topic}, key=lambda pair: pair[1])
        if entries:
            lines += ["", f"## {topic}", ""]
            lines += [f"- `{kind}`: {_escape(text)}" for kind, text in entries]
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    return "".join(f"\\{letter}" if letter in r"\`*_{}[]<>#|~$" else letter for letter in " ".join(text.split()))


def write(_app: object = None) -> None:
    """Write the page, if it changed."""
    path = ROOT / "docs/messages.md"
    text = page()
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


if __name__ == "__main__":
    write()
