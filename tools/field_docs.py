"""Extension of griffe: a field of a dataclass gets its `help` or comment as docstring, and its default as value."""

import ast
from typing import Any

import griffe


class FieldDocs(griffe.Extension):
    """Gives dataclass fields a docstring."""

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, **_: Any) -> None:
        """Called by griffe for each attribute that it finds."""
        if attr.docstring is not None or not isinstance(node, ast.AnnAssign):
            return
        text = help_text(node) or comment(attr.lines_collection[attr.filepath], node)
        attr.docstring = griffe.Docstring(text, parent=attr) if text else None
        if isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "field":
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.value.keywords}
            made = given.get("default_factory", "").removeprefix("lambda: ")
            attr.value = given.get("default") or {"list": "[]", "dict": "{}"}.get(made, made) or None


def help_text(node: ast.AnnAssign) -> str:
    """The metadata's `help`, an empty string without one."""
    for call in ast.walk(node):
        if isinstance(call, ast.Dict):
            for key, value in zip(call.keys, call.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "help":
                    return ast.literal_eval(value)
    return ""


def comment(lines: list[str], node: ast.AnnAssign) -> str:
    """The comment behind a field, or the one above it."""
    behind = lines[node.end_lineno - 1][node.end_col_offset :].strip()
    if behind.startswith("# "):
        return behind[2:]
    above: list[str] = []
    for line in reversed(lines[: node.lineno - 1]):
        if not line.strip().startswith("# "):
            break
        above.insert(0, line.strip()[2:])
    return " ".join(above)
