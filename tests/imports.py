"""Reads which modules Python files import, wherever in the file, for the tests that hold the walls."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

OURS = ("runtime", "kernels", "tramontane")


def module_name(path: Path, root: Path) -> str:
    """Dotted name of a file below `root`; a package's is that of its folder."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(source: str, module: str, *, package: bool = False) -> set[str]:
    """Dotted names that `source`, the text of `module`, imports: at the top, in functions, under conditions.

    `from a import b` yields both "a" and "a.b", since b may be a module. `importlib.import_module` and
    `__import__` of a literal count; of anything else they yield "?", which no wall lets through."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, module, package)
            found.add(base)
            found |= {f"{base}.{alias.name}" for alias in node.names if alias.name != "*"}
        elif isinstance(node, ast.Call) and _is_dynamic(node.func):
            name = node.args[0] if node.args else None
            literal = isinstance(name, ast.Constant) and isinstance(name.value, str)
            found.add(name.value if literal else "?")
    return found


def _absolute(node: ast.ImportFrom, module: str, package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + package]
    return ".".join([*parts, node.module] if node.module else parts)


def _is_dynamic(called: ast.expr) -> bool:
    name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
    return name in ("import_module", "__import__")


class Modules:
    """The project's modules below some roots, and what each imports."""

    def __init__(self, roots: dict[Path, tuple[str, ...]]):
        """roots: folder -> packages in it that are looked at."""
        self.files: dict[str, Path] = {}
        for root, packages in roots.items():
            for package in packages:
                for path in sorted((root / package).rglob("*.py")):
                    self.files[module_name(path, root)] = path
        self.imports = {
            name: imports_of(path.read_text(), name, package=path.name == "__init__.py")
            for name, path in self.files.items()
        }

    def within(self, *packages: str) -> list[str]:
        return [name for name in self.files if under(name, packages)]

    def outside(self, module: str) -> set[str]:
        """Top names of what `module` imports from neither the standard library nor this project."""
        tops = {name.partition(".")[0] for name in self.imports[module]}
        return {top for top in tops if top not in sys.stdlib_module_names and top not in OURS}

    def inside(self, module: str) -> set[str]:
        """The project's modules that `module` imports by itself."""
        return {name for name in self.imports[module] if name in self.files} - {module}

    def reached(self, module: str) -> Iterator[str]:
        """`module`, and every module of the project that importing it may load, parents included."""
        seen, pending = set(), [module]
        while pending:
            name = pending.pop()
            if name in seen:
                continue
            seen.add(name)
            yield name
            parent = name.rpartition(".")[0]
            pending += [*self.inside(name), *([parent] if parent in self.files else [])]


def under(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)
