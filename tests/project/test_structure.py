"""The structure of the sources: imports go one way, files stay small, tests mirror the sources."""

import ast
from functools import cache
from pathlib import Path

from tests.support.order import LONGEST
from tests.support.sources import sources

ROOT = Path(__file__).parents[2]
LARGEST_FILE = 25_000  # bytes

# From the bottom up. A module imports from lower layers, and from its own folder.
LAYERS = (
    ("fastcl.checks", "fastcl.command"),
    ("fastcl.cached",),
    ("fastcl.ops.backends",),
    ("fastcl.ops.library",),
    ("fastcl.ops.small",),
    ("fastcl.ops.products", "fastcl.ops.pair_maps", "fastcl.ops.at_once"),
    ("fastcl.ops.contrastive",),
    ("fastcl.ops.soft", "fastcl.ops.pairs", "fastcl.ops.sinkhorn", "fastcl.ops.topk", "fastcl.ops.sampled"),
    ("fastcl.ops.prototypes",),
    ("fastcl.swept",),
    ("fastcl.guide", "fastcl.tags"),
    ("fastcl.statistics", "fastcl.sinkhorn", "fastcl.neighbors", "fastcl.memory_state"),
    ("fastcl.memory", "fastcl.distributed", "fastcl.quality"),
    ("fastcl.clustered_rows",),
    ("fastcl.lloyd",),
    ("fastcl.clustering", "fastcl.exchange"),
    ("fastcl.losses",),
    ("fastcl.functional", "fastcl.metric_learning"),
    ("fastcl",),
    ("fastcl.info", "fastcl.train", "fastcl.__main__"),
)


@cache
def modules() -> dict[str, Path]:
    """The package's modules by their dotted names."""
    found = {}
    for path in (ROOT / "fastcl").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if not path.name.startswith(("_build", "_cuda")):
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(module: str) -> frozenset[str]:
    """The package's modules that a module imports anywhere, except under TYPE_CHECKING."""
    path = modules()[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom):
            continue
        base = node.module or ""
        if node.level:
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*above, *([node.module] if node.module else [])])
        if base.split(".")[0] != "fastcl":
            continue
        for name in node.names:
            inner = f"{base}.{name.name}"
            found.add(inner if inner in modules() else base)
    return frozenset(found - {module})


def layer(module: str) -> int:
    """The layer with the longest name that is a prefix of the module's name."""
    fits = [
        (len(prefix), k)
        for k, prefixes in enumerate(LAYERS)
        for prefix in prefixes
        if module == prefix or (prefix != "fastcl" and module.startswith(f"{prefix}."))
    ]
    assert fits, f"{module} has no place among the layers"
    return max(fits)[1]


def folder(module: str) -> str:
    """The family or folder of a module."""
    return next(prefix for prefix in LAYERS[layer(module)] if module == prefix or module.startswith(f"{prefix}."))


def test_imports_go_one_way() -> None:
    wrong = []
    for module in modules():
        if module == "fastcl.ops":
            continue
        for other in imports(module):
            if other == "fastcl":  # its version
                assert module in LAYERS[-1] or module.startswith("fastcl.train."), module
            elif layer(other) >= layer(module) and folder(other) != folder(module):
                wrong.append(f"{module} imports {other}")
    assert not wrong


def test_imports_make_no_circle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for other in imports(module) - {"fastcl"}:
                visit(other, (*path, module))
            done.add(module)

    for module in modules():
        if module != "fastcl":
            visit(module, ())


def test_nothing_imports_the_trainer() -> None:
    users = [m for m in modules() if not m.startswith("fastcl.train") and any("train" in other for other in imports(m))]
    assert users == []


def test_no_file_is_large() -> None:
    sizes = {str(path): (ROOT / path).stat().st_size for path in sources(".py", ".h", ".cpp", ".cu")}
    assert len(sizes) > 100
    assert {name: size for name, size in sizes.items() if size > LARGEST_FILE} == {}


def families(place: str) -> set[str]:
    return {path.name for path in (ROOT / place).iterdir() if path.is_dir() and not path.name.startswith("_")}


def test_folders_have_the_same_families() -> None:
    of_ops = families("fastcl/ops") - {"backends"}
    assert families("tests/ops") == of_ops
    assert families("csrc/cpu") == of_ops
    assert families("csrc/cuda") <= of_ops


def test_tests_lie_where_their_source_lies() -> None:
    allowed = {"support", "project", "backends", "benchmarks", "integrations"}
    for name in families("tests") - allowed:
        assert (ROOT / "fastcl" / name).is_dir() or (ROOT / "fastcl" / f"{name}.py").exists(), name
    assert [path.name for path in (ROOT / "tests").glob("*.py")] == ["conftest.py"]
    for path in (ROOT / "tests" / "losses").glob("test_*.py"):
        subject = path.stem.removeprefix("test_")
        known = [*(ROOT / "fastcl" / "losses").glob("*.py")]
        assert any(subject.startswith(module.stem) for module in known), f"{path.name} is no loss's"


def test_what_comes_first_is_there() -> None:
    assert [name for name in LONGEST if not (ROOT / "tests" / name).exists()] == []


def test_kernels_of_triton_are_in_files_of_their_own() -> None:
    with_kernels = {module for module, path in modules().items() if "@triton.jit" in path.read_text(encoding="utf-8")}
    assert with_kernels == {module for module in modules() if module.endswith("_kernels")}


def test_the_native_sources_know_no_torch_and_python_in_the_bindings_only() -> None:
    for path in (ROOT / "csrc").rglob("*.*"):
        if path.suffix in (".h", ".cpp", ".cu"):
            text = path.read_text(encoding="utf-8")
            assert "#include <torch" not in text, path
            assert "#include <ATen" not in text, path
            assert "pybind11" not in text or path.parent.name == "bindings", path
