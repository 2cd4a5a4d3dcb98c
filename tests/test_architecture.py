"""The shape of the code: imports point one way, the core's dependencies are few, files stay small."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "jaxpo"
MAX_LINES = 500

# Each module may import from its own group and those above it; a package stands for its modules that are not listed.
# objectives.score runs a decoder over packed rows, so it comes after the models though its package comes before.
ORDER = [
    [
        "jaxpo",
        "jaxpo.errors",
        "jaxpo.atomic",
        "jaxpo.seal",
        "jaxpo.allocator",
        "jaxpo.compiler",
        "jaxpo.processes",
        "jaxpo.models.kept",
        "jaxpo.models.product",
        "jaxpo.planning.hardware",
        "jaxpo.arguments",
    ],
    ["jaxpo.batch", "jaxpo.objectives.losses", "jaxpo.objectives.logprobs"],
    ["jaxpo.objectives"],
    ["jaxpo.config"],
    ["jaxpo.console", "jaxpo.config_checks", "jaxpo.config_mistakes"],
    ["jaxpo.config_file", "jaxpo.models", "jaxpo.data"],
    ["jaxpo.objectives.score"],
    ["jaxpo.reference"],
    ["jaxpo.training"],
    ["jaxpo.rewards"],
    ["jaxpo.evaluation"],
    ["jaxpo.prepare", "jaxpo.references"],
    ["jaxpo.delivery", "jaxpo.run_folder", "jaxpo.origin", "jaxpo.run", "jaxpo.conversion", "jaxpo.rating"],
    ["jaxpo.recipes", "jaxpo.advise", "jaxpo.dialogue"],
    ["jaxpo.planning"],
    ["jaxpo.plan"],
    ["jaxpo.launch"],
]
RANK = {name: rank for rank, group in enumerate(ORDER) for name in group}
# Siblings: neither imports the other.
APART = [("jaxpo.config_file", "jaxpo.models"), ("jaxpo.config_file", "jaxpo.data"), ("jaxpo.models", "jaxpo.data")]

FILES = sorted(PACKAGE.rglob("*.py"))


def module(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(path): path for path in FILES}


def imported(tree: ast.AST, inside: str) -> Iterator[tuple[int, str]]:
    """Line and full name of every import, lazy ones too; `from jaxpo import x` is jaxpo.x where that is a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{inside}:{node.lineno}: relative import"
            assert node.module is not None
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield node.lineno, name if name in MODULES else node.module
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from ((node.lineno, str(a.value)) for a in node.args if isinstance(a, ast.Constant))


def group(name: str) -> str:
    """The entry of ORDER that a module falls under: its own, else its package's."""
    while name not in RANK:
        name, _, last = name.rpartition(".")
        assert name, f"{last} is in no group of ORDER"
    return name


def wrong_imports(inside: str, source: str) -> list[str]:
    mine = group(inside)
    found = []
    for line, name in imported(ast.parse(source), inside):
        if name.split(".")[0] != "jaxpo" or name == "jaxpo":
            continue
        theirs = group(name)
        sideways = (mine, theirs) in APART or (theirs, mine) in APART
        if RANK[theirs] > RANK[mine] or sideways:
            found.append(f"{inside}:{line} imports {name}")
    return found


def test_every_module_has_its_place() -> None:
    new = [name for name in MODULES if name != "jaxpo" and group(name) == "jaxpo"]
    assert new == [], "a new module or package needs a line in ORDER"
    assert {name for name in RANK if name not in MODULES} == set()


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name: str) -> None:
    """Lazy imports included, but for launch, which comes last anyway."""
    assert wrong_imports(name, MODULES[name].read_text(encoding="utf-8")) == []


def test_the_check_sees_imports_against_the_order() -> None:
    assert wrong_imports("jaxpo.batch", "def f():\n    from jaxpo import config\n") == [
        "jaxpo.batch:2 imports jaxpo.config"
    ]
    assert wrong_imports("jaxpo.models.decoder", "import jaxpo.data.pack") == [
        "jaxpo.models.decoder:1 imports jaxpo.data.pack"
    ]
    assert wrong_imports("jaxpo.objectives.preference", "from jaxpo.objectives.score import Scorer") != []
    assert wrong_imports("jaxpo.reference.store", "importlib.import_module('jaxpo.training.step')") != []
    assert wrong_imports("jaxpo.training.step", "from jaxpo.models.decoder import Decoder\nimport numpy") == []


CORE = ["jaxpo.objectives.losses", "jaxpo.objectives.logprobs", "jaxpo.models.product", "jaxpo.models.kept"]


@pytest.mark.parametrize("name", CORE)
def test_the_numerical_core_needs_jax_only(name: str) -> None:
    plain = {"collections.abc", "dataclasses", "functools", "itertools", "math", "typing"}
    standard = {*plain, "contextlib", "contextvars", *CORE}
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    needed = {imported_name.split(".")[0] for _, imported_name in imported(tree, name) if imported_name not in standard}
    assert needed == {"jax"}


def at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported, those in its classes, ifs and trys included."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        yield node
        for field in ("body", "orelse", "finalbody"):
            yield from at_import(getattr(node, field, []))
        for handler in getattr(node, "handlers", []):
            yield from at_import(handler.body)


def oracles(source: str) -> list[str]:
    """Imports of torch or trl that happen when the module is imported."""
    nodes = [n for n in at_import(ast.parse(source).body) if isinstance(n, ast.Import | ast.ImportFrom)]
    names = [name for node in nodes for _, name in imported(node, "module")]
    return [name for name in names if name.split(".")[0] in ("torch", "trl")]


@pytest.mark.parametrize("name", MODULES)
def test_torch_and_trl_are_never_needed(name: str) -> None:
    source = MODULES[name].read_text(encoding="utf-8")
    assert oracles(source) == []
    assert not any(n.split(".")[0] == "trl" for _, n in imported(ast.parse(source), name))


def test_the_check_sees_torch() -> None:
    assert oracles("try:\n    import torch.nn\nexcept ImportError:\n    from trl import x\n") == ["torch.nn", "trl"]
    assert oracles("def f():\n    import torch\n") == []


@pytest.mark.parametrize("name", MODULES)
def test_files_are_small(name: str) -> None:
    lines = len(MODULES[name].read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{lines} lines are two files waiting to be told apart"
