# SPDX-License-Identifier: Apache-2.0
"""Writes the site's API page from the sources: signature and docstring of every public class and function.

It reads the sources without importing them, so that the site builds where zexpert is not built. A name is public if an
``__all__`` below has it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "python" / "zexpert"
#: Packages and modules of the page, and where the definitions of each are.
MODULES = {
    "zexpert": ".",
    "zexpert.ops": "ops",
    "zexpert.router": "router",
    "zexpert.runner": "runner",
    "zexpert.models": "models",
    "zexpert.training": "training",
    "zexpert.telemetry": "telemetry.py",
    "zexpert.choices": "choices.py",
}
INTRODUCTION = """# API

Every public class and function, from the docstrings. `help(zexpert.FusedMoE)` prints the same in Python.
"""

Definition = ast.ClassDef | ast.FunctionDef


def page() -> str:
    """The page in Markdown."""
    parts = [INTRODUCTION]
    shown: set[str] = set()
    for module in MODULES:
        names = [name for name in public_names(module) if name not in shown]
        shown.update(names)
        parts.append(f"## {module}\n")
        parts += [entry(name, definition(module, name)) for name in names]
    return "\n".join(parts)


def public_names(module: str) -> list[str]:
    """Names of classes and functions in the ``__all__`` of a package; of a module, all without an underscore."""
    place = PACKAGE / MODULES[module]
    if place.is_file():
        return [node.name for node in definitions_in(place) if not node.name.startswith("_")]
    for node in ast.parse((place / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            modules = {name.rpartition(".")[2] for name in MODULES} | {"experts", "integrations"}
            return [name for name in names if name not in modules and not name.startswith("__")]
    raise ValueError(f"{place / '__init__.py'} must have an __all__, got none")


def definition(module: str, name: str) -> Definition:
    """The definition of a public name; ValueError if the package's sources have none."""
    place = PACKAGE / MODULES[module]
    files = [place] if place.is_file() else [*sorted(place.rglob("*.py")), *sorted(PACKAGE.glob("*.pyi"))]
    for file in files:
        for node in definitions_in(file):
            if node.name == name:
                return node
    raise ValueError(f"{module}.{name} must be a class or function in {place}, got neither")


def definitions_in(file: Path) -> Iterator[Definition]:
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, Definition):
            yield node


def entry(name: str, node: Definition) -> str:
    """Heading, signature and docstring; of a class, those of its public methods too."""
    if isinstance(node, ast.FunctionDef):
        return f"### {name}\n\n{described(signature(node), ast.get_docstring(node))}"
    functions = [part for part in node.body if isinstance(part, ast.FunctionDef)]
    bases = f"({', '.join(ast.unparse(base) for base in node.bases)})" if node.bases else ""
    start = [signature(function) for function in functions if function.name == "__init__"][:1]
    parts = [f"### {name}\n", described("\n".join([f"class {name}{bases}", *start]), ast.get_docstring(node))]
    public = [function for function in functions if not function.name.startswith("_")]
    documented = [(function, text) for function in public if (text := ast.get_docstring(function))]
    parts += [described(signature(function), text) for function, text in documented]
    return "\n".join(parts)


def signature(node: ast.FunctionDef) -> str:
    decorators = "".join(f"@{ast.unparse(decorator)}\n" for decorator in node.decorator_list)
    returned = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    flat = f"def {node.name}({ast.unparse(node.args)}){returned}"
    if len(flat) > 110:
        arguments = ast.unparse(node.args).replace(", ", ",\n    ")
        flat = f"def {node.name}(\n    {arguments}\n){returned}"
    return decorators + flat


def described(code: str, docstring: str | None) -> str:
    text = f"```text\n{docstring}\n```\n" if docstring else ""
    return f"```py\n{code}\n```\n\n{text}"


if __name__ == "__main__":
    print(page())
