"""The import graph points one way; see CONTRIBUTING.md, "Import rules"."""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "longnet_zoo"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
INNER_FILES = [file for file in FILES if file != "__init__.py"]
OPS_FILES = [file for file in FILES if file.startswith("ops/")]

# Floor -> the floors it may import from, besides itself.
ALLOWED = {
    "registry": set(),
    "ops": set(),
    "layers": {"ops"},
    "parallel": {"ops"},
    "models": {"ops", "layers", "registry"},
    "weights": {"ops", "models", "registry"},
    "factory": {"ops", "models", "weights", "parallel", "registry"},
    "open_data": {"registry"},
    "tokenizers": set(),
    "batch_tokenizer": {"tokenizers", "registry"},
    "image_text": {"models", "factory", "registry"},
    "timm_registry": {"layers", "models", "weights", "factory", "registry"},
    "planner": {
        "ops",
        "layers",
        "parallel",
        "models",
        "factory",
        "bench",
        "command_options",
        "registry",
    },
    "interop": {"ops", "layers", "models", "weights", "factory", "registry", "tokenizers"},
    "plot": {"ops"},
    "command_options": set(),
    "export": {"command_options", "factory", "models", "registry", "weights"},
    "text": {"bench", "command_options", "models", "factory", "ops", "registry", "tokenizers"},
    "long_range": {
        "bench",
        "command_options",
        "factory",
        "models",
        "registry",
        "weights",
    },
    "bench": {"ops"},
    "cli": {
        "ops",
        "bench",
        "long_range",
        "export",
        "open_data",
        "plot",
        "factory",
        "planner",
        "text",
        "weights",
        "registry",
    },
}
# The oracle shares no code with what it judges; a pattern is how both are asked.
ORACLE = "ops/reference.py"
ORACLE_MAY_IMPORT = {"longnet_zoo.ops.pattern"}

# Everything outside the core, and what only the command line draws with.
OPTIONAL = {
    "datasets",
    "fairscale",
    "flash_attn",
    "h5py",
    "jsonargparse",
    "lightning",
    "matplotlib",
    "peft",
    "pytorch_lightning",
    "qtawesome",
    "rich",
    "soundfile",
    "tensorboard",
    "tokenizers",
    "torchaudio",
    "torchmetrics",
    "torchscale",
    "transformers",
    "triton",
}
# Its classes are those of Transformers, so that there is nothing in it without.
BRIDGE, BRIDGE_NEEDS = "interop/transformers/", {"tokenizers", "transformers"}
PROGRAMMES = {"recipes", "benchmarks", "tests"}


@functools.cache
def parse(file: str) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text(encoding="utf-8"))


def imported_names(nodes: Iterable[ast.AST], file: str) -> set[str]:
    """Absolute dotted names of all that `nodes` import; `from a import b` gives `a` and `a.b`."""
    package = ["longnet_zoo", *Path(file).parent.parts]
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Walks what importing the file executes: no function bodies, no `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from run_at_import(child)


def top_names(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def test_files_are_found():
    assert len(FILES) > len(OPS_FILES) > 20


def test_files_import_only_from_floors_below():
    for file in INNER_FILES:
        floor = Path(file).parts[0].removesuffix(".py")
        assert floor in ALLOWED, f"{file}: add {floor!r} and what it may import to ALLOWED"
        names = imported_names(ast.walk(parse(file)), file)
        floors = {name.split(".")[1] for name in names if name.startswith("longnet_zoo.")}
        # Within the package's own root a name may be a re-export: refused by the next test.
        wrong = (floors & ALLOWED.keys()) - ALLOWED[floor] - {floor}
        allowed = sorted(ALLOWED[floor]) or "nothing of ours"
        assert not wrong, f"{file}: {floor} must not import {sorted(wrong)}; allowed: {allowed}"


def test_files_do_not_import_from_the_package_root():
    for file in INNER_FILES:
        # The root imports every floor, so this would be a hidden cycle.
        for node in ast.walk(parse(file)):
            if isinstance(node, ast.Import):
                wrong = any(alias.name == "longnet_zoo" for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                depth = len(Path(file).parent.parts)
                wrong = node.module == "longnet_zoo" and not node.level
                wrong = wrong or (node.module is None and node.level == depth + 1)
            else:
                continue
            assert not wrong, (
                f"{file}:{node.lineno}: `{ast.unparse(node)}` imports from the package's root; "
                "name the module that defines it"
            )


def test_optional_packages_are_imported_inside_functions():
    for file in FILES:
        # A Triton kernel needs Triton where it is defined; the test of a fresh interpreter below
        # sees to it that such a file is not imported by `import longnet_zoo`.
        allowed = {"triton"} | (BRIDGE_NEEDS if file.startswith(BRIDGE) else set())
        wrong = top_names(imported_names(run_at_import(parse(file)), file)) & (OPTIONAL - allowed)
        assert not wrong, f"{file}: import {sorted(wrong)} inside the one function that uses it"


def test_package_imports_neither_lightning_nor_programmes():
    for file in FILES:
        names = top_names(imported_names(ast.walk(parse(file)), file))
        wrong = names & (PROGRAMMES | {"lightning", "pytorch_lightning"})
        assert not wrong, f"{file}: {sorted(wrong)} belongs to recipes/ or benchmarks/, not here"


def test_oracle_shares_no_code_with_the_fast_path():
    package = {name for name in imported_names(ast.walk(parse(ORACLE)), ORACLE) if "." in name}
    modules = {name for name in package if (ROOT / f"{name.replace('.', '/')}.py").exists()}
    wrong = modules - ORACLE_MAY_IMPORT
    assert not wrong, f"{ORACLE}: imports {sorted(wrong)}; allowed: {sorted(ORACLE_MAY_IMPORT)}"


def test_ops_define_no_modules():
    for file in OPS_FILES:
        bases = [
            (node.lineno, ast.unparse(base))
            for node in ast.walk(parse(file))
            if isinstance(node, ast.ClassDef)
            for base in node.bases
        ]
        wrong = [line for line, base in bases if base.split(".")[-1] == "Module"]
        assert not wrong, f"{file}: nn.Module defined on line(s) {wrong}; modules live in layers/"


# `torch` and `timm` may import Triton or rich by themselves: they are imported first, and what is
# counted afterwards is new modules and the import statements of our own files.
RECORD_IMPORTS = """
import builtins, sys
import einops, huggingface_hub, numpy, safetensors.torch, timm, torch
before, ours, plain_import = set(sys.modules), set(), builtins.__import__

def recording_import(name, globals=None, locals=None, fromlist=(), level=0):
    if level == 0 and str((globals or {}).get("__name__")).startswith("longnet_zoo"):
        ours.add(name.split(".")[0])
    return plain_import(name, globals, locals, fromlist, level)

builtins.__import__ = recording_import
import longnet_zoo
builtins.__import__ = plain_import
assert not torch.cuda.is_initialized(), "import longnet_zoo touches the GPU"
new = {name.split(".")[0] for name in sys.modules.keys() - before}
print(",".join(sorted(new | ours)))
"""

# After it, in the same process: to start another takes seconds.
IMPORT_ALL = """
import importlib, pkgutil
for name in {optional!r}:
    if name not in sys.modules:
        sys.modules[name] = None
found = [module.name for module in pkgutil.walk_packages(longnet_zoo.__path__, "longnet_zoo.")]
for name in found:
    if not name.startswith({bridge!r}):
        importlib.import_module(name)
print(",".join(sorted(found)))
"""


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """What a fresh interpreter prints."""
    hidden = sorted(OPTIONAL - {"triton", "rich"})
    bridge = f"longnet_zoo.{BRIDGE}".replace("/", ".").rstrip(".")
    code = RECORD_IMPORTS + IMPORT_ALL.format(optional=hidden, bridge=bridge)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip().splitlines()[-2:]


def test_importing_the_package_imports_no_optional_package(lines):
    imported = set(lines[0].split(","))
    assert "longnet_zoo" in imported
    wrong = imported & OPTIONAL
    assert not wrong, f"`import longnet_zoo` imports {sorted(wrong)}; import it where it is used"


def test_every_module_can_be_imported_without_the_extras(lines):
    imported = set(lines[1].split(","))
    files = [file for file in FILES if not file.startswith(BRIDGE)]
    modules = {f"longnet_zoo.{file}".replace("/", ".").removesuffix(".py") for file in files}
    modules = {name.removesuffix(".__init__") for name in modules} - {"longnet_zoo"}
    missed = sorted(modules - imported)
    assert not missed, f"not found by pkgutil: {missed}; is there an __init__.py in each folder?"
