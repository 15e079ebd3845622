"""Check the layering of research/qwen and the length limits: ``check_layers.py [ROOT]``.

A module imports only from a lower tier or its own unit (a folder, or a single file that stands alone). Prints
one line ``file:line: what`` per violation and exits with 1 if there is any. Imports are read from the syntax
tree, so one inside a function counts for the layers too; the rule on heavy packages is about module level.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "research.qwen"
MAX_FILE, MAX_FUNCTION = 400, 60

# First path part below research/qwen -> (tier, unit). Modules of one unit may import each other.
UNITS: dict[str, tuple[int, str]] = {
    **dict.fromkeys(
        (
            "__init__.py",
            "checks.py",
            "errors.py",
            "config.py",
            "interrupts.py",
            "messages.py",
            "chat_template.py",
        ),
        (0, "base"),
    ),
    "demo": (0, "demo"),
    "text": (1, "text"),
    "decode": (1, "decode"),
    "weights": (1, "weights"),
    "quant": (1, "quant"),
    "rope.py": (1, "rope"),
    "settings.py": (1, "settings"),
    "kernels": (2, "kernels"),
    "model": (3, "model"),
    **dict.fromkeys(("engine.py", "answers.py", "prompts.py", "scheduler.py"), (4, "engine")),
    "mf": (4, "mf"),
    "serve": (5, "serve"),
    "train": (5, "train"),
    "evals": (5, "evals"),
    "cli": (5, "cli"),
    **dict.fromkeys(("qwen_model.py", "qwen_tokenizer.py", "qwen_chat.py", "run_qwen_7b.py"), (5, "doors")),
}
# Commands start the other surfaces; the doors open into the commands and into training, and so does MindFormers'
# Trainer, a surface itself.
SIDEWAYS = {("cli", "serve"), ("cli", "train"), ("cli", "evals"), ("doors", "cli")}
SIDEWAYS |= {("doors", "train"), ("mf", "train")}

HEAVY = ("mindspore", "mindformers", "torch", "transformers")
# Must import without the heavy packages. Whole units, and single files of the others.
LIGHT_UNITS = frozenset(
    "base demo text decode weights quant rope settings engine serve train evals cli".split()
)
LIGHT_FILES = frozenset(f"kernels/{name}.py" for name in ("__init__", "api", "build"))
ASCEND_FILE, ASCEND_LAYERS = "kernels/ascend.py", "mindformers.modules"


@dataclass(frozen=True)
class Import:
    """One imported module: absolute dotted name, line, and whether importing the file runs it."""

    name: str
    line: int
    runs: bool


def is_light(relative: str) -> bool:
    """Whether the file (path below research/qwen) must import without the heavy packages."""
    unit = UNITS.get(relative.split("/")[0])
    return relative in LIGHT_FILES or (unit is not None and unit[1] in LIGHT_UNITS)


def light_modules(root: Path) -> list[str]:
    """Dotted names of all modules that must import without the heavy packages."""
    base = root / "research" / "qwen"
    names = []
    for path in _sources(base):
        relative = path.relative_to(base).as_posix()
        if is_light(relative) and path.name != "__main__.py":
            dotted = relative.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            names.append(PACKAGE if dotted == "__init__" else f"{PACKAGE}.{dotted}")
    return names


def violations(root: Path) -> list[str]:
    """Every violation below ``root`` as ``file:line: what``, sorted by file."""
    base = root / "research" / "qwen"
    found: list[str] = []
    torch_readers: list[tuple[str, int]] = []
    for path in _sources(base):
        relative = path.relative_to(base).as_posix()
        where = path.relative_to(root).as_posix()
        tree = _parse(path)
        if isinstance(tree, str):
            found.append(f"{where}:{tree}")
            continue
        found += [f"{where}:{line}: {what}" for line, what in _check_imports(relative, tree, base)]
        lines = [item.line for item in _imports(tree, base) if _top(item.name) == "torch"]
        torch_readers += [(where, line) for line in lines[:1]]
    in_weights = [reader for reader in torch_readers if "/weights/" in reader[0]]
    for where, line in in_weights[1:]:
        found.append(f"{where}:{line}: imports torch; only one reader may, and {in_weights[0][0]} does")
    for path in [*_sources(root / "research"), *_sources(root / "scripts"), *sorted(root.glob("*.py"))]:
        found += _check_lengths(path, path.relative_to(root).as_posix())
    return sorted(found)


def _sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def _parse(path: Path) -> ast.Module | str:
    try:
        return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    except SyntaxError as error:
        return f"{error.lineno or 1}: does not parse: {error.msg}"


def _top(name: str) -> str:
    return name.split(".")[0]


def _imports(tree: ast.Module, base: Path) -> Iterator[Import]:
    """All absolute imports; ``from package import name`` is the module ``package.name`` if there is one."""
    lazy = _lazy_nodes(tree)
    for node in ast.walk(tree):
        runs = id(node) not in lazy
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, runs) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield Import(inner if _exists(inner, base) else node.module, node.lineno, runs)


def _lazy_nodes(tree: ast.Module) -> set[int]:
    """Nodes that importing the file does not run: inside functions, or under ``if TYPE_CHECKING``."""
    lazy: set[int] = set()
    for node in ast.walk(tree):
        bodies: list[ast.stmt] = []
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ):
            bodies = node.body
        lazy.update(id(inner) for statement in bodies for inner in ast.walk(statement))
    return lazy


def _exists(name: str, base: Path) -> bool:
    parts = name.split(".")
    if ".".join(parts[:2]) != PACKAGE or len(parts) < 3:
        return False
    target = base.joinpath(*parts[2:])
    return target.is_dir() or target.with_suffix(".py").is_file()


def _check_imports(relative: str, tree: ast.Module, base: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield node.lineno, f"relative import; write from {PACKAGE}..."
    unit = UNITS.get(relative.split("/")[0])
    if unit is None:
        yield 1, "has no tier; add it to the table in scripts/check_layers.py"
        return
    own_names = {path.stem for path in base.iterdir() if path.suffix == ".py" or path.is_dir()} | {"configs"}
    reported: set[tuple[int, str]] = set()
    for item in _imports(tree, base):
        for what in _problems(item, relative, unit, own_names):
            if (item.line, what) not in reported:
                reported.add((item.line, what))
                yield item.line, what


def _problems(item: Import, relative: str, unit: tuple[int, str], own_names: set[str]) -> Iterator[str]:
    tier, name = unit
    top = _top(item.name)
    if item.name == PACKAGE or item.name.startswith(PACKAGE + "."):
        target = _target_unit(item.name)
        if target is None:
            yield f"imports {item.name}, which has no tier"
        elif target[1] != name and target[0] >= tier and (name, target[1]) not in SIDEWAYS:
            yield f"tier {tier} ({name}) imports {item.name} of tier {target[0]} ({target[1]})"
    elif top in own_names:
        yield f"imports {item.name} as a top-level module; write {PACKAGE}... (configs are opened by path)"
    if top in HEAVY and item.runs and is_light(relative):
        yield f"imports {top} at module level; it must import without it"
    yield from _third_party(item.name, relative, name)


def _third_party(imported: str, relative: str, name: str) -> Iterator[str]:
    top = _top(imported)
    if top == "mindformers" and name != "mf":
        if relative != ASCEND_FILE:
            yield f"imports {imported}; only mf/ touches MindFormers"
        elif imported != ASCEND_LAYERS and not imported.startswith(ASCEND_LAYERS + "."):
            yield f"imports {imported}; {ASCEND_FILE} may use {ASCEND_LAYERS} only"
    if top == "torch" and name != "weights":
        yield "imports torch; only one reader in weights/ does"
    if top == "transformers" and name != "mf":
        yield "imports transformers; the package does not depend on it"


def _target_unit(imported: str) -> tuple[int, str] | None:
    parts = imported.split(".")[2:]
    if not parts:
        return UNITS["__init__.py"]
    return UNITS.get(parts[0]) or UNITS.get(parts[0] + ".py")


def _check_lengths(path: Path, where: str) -> list[str]:
    found = []
    lines = len(path.read_text(encoding="utf-8").splitlines())
    if lines > MAX_FILE:
        found.append(f"{where}:{lines}: file of {lines} lines (at most {MAX_FILE})")
    tree = _parse(path)
    if isinstance(tree, str):
        return found
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION:
                found.append(
                    f"{where}:{node.lineno}: function {node.name} of {length} lines (at most {MAX_FUNCTION})"
                )
    return found


def main(argv: list[str] | None = None) -> int:
    """Check the tree given (default: the one this file is in)."""
    arguments = sys.argv[1:] if argv is None else argv
    root = Path(arguments[0]) if arguments else Path(__file__).resolve().parent.parent
    if not (root / "research" / "qwen").is_dir():
        print(f"error: no research/qwen below {root}", file=sys.stderr)
        return 2
    found = violations(root)
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
