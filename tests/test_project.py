"""Limits that keep the project readable, and promises that its files make to each other."""

import ast
import os
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ["longnet_zoo", "recipes", "configs", "benchmarks", "tests", ".ci", ".github"]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
TEXT_SUFFIXES = {"", ".cfg", ".css", ".html", ".json", ".md", ".py", ".toml", ".txt", ".yaml"}
TEXT_SUFFIXES |= {".yml"}


def project_files() -> list[Path]:
    """Our files: those at the root and those below our folders, without what tools leave."""
    files = [path for path in ROOT.iterdir() if path.is_file()]
    for folder in FOLDERS:
        files += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    return sorted(path for path in files if "__pycache__" not in path.parts)


def names(files: list[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in files]


def read(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


FILES = names(project_files())
PYTHON_FILES = [file for file in FILES if file.endswith(".py")]
TEXT_FILES = [file for file in FILES if Path(file).suffix in TEXT_SUFFIXES]
CONFIGS = [file for file in FILES if file.startswith("configs/") and file.endswith(".yaml")]


def test_files_are_found():
    for some in (PYTHON_FILES, TEXT_FILES, CONFIGS):
        assert len(some) > 20


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, without the docstring."""
    num_lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        num_lines -= docstring.end_lineno - docstring.lineno + 1
    return num_lines


def test_files_are_short():
    num_lines = {file: len(read(file).splitlines()) for file in PYTHON_FILES}
    long = {file: number for file, number in num_lines.items() if number > MAX_FILE_LINES}
    assert not long, f"lines {long}, the limit is {MAX_FILE_LINES}: split a longer file by idea"


def test_functions_are_short():
    long = {
        f"{file}, {node.name} (line {node.lineno})": code_lines(node)
        for file in PYTHON_FILES
        for node in ast.walk(ast.parse(read(file)))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and code_lines(node) > MAX_FUNCTION_LINES
    }
    assert not long, (
        f"lines of code without docstring {long}, the limit is {MAX_FUNCTION_LINES}: "
        "a longer function is two ideas"
    )


def test_files_name_no_path_of_one_machine():
    path = re.compile(r"(?<![\w.:/])/(?:home|root|Users|work)/[\w.]\S*")
    found = {file: path.findall(read(file)) for file in TEXT_FILES}
    wrong = {file: paths for file, paths in found.items() if paths}
    assert not wrong, f"{wrong} exist on one machine only"


@pytest.mark.parametrize("file", CONFIGS)
def test_config_starts_with_the_command_that_runs_it(file):
    lines = read(file).splitlines()
    header = lines[: next((i for i, line in enumerate(lines) if not line.startswith("#")), None)]
    commands = re.findall(r"python -m (recipes\.\w+)", "\n".join(header))
    assert commands, f"{file} must start with a comment holding `python -m recipes.NAME ...`"
    for module in commands:
        path = f"{module.replace('.', '/')}.py"
        assert (ROOT / path).is_file(), f"{file} names {module}, but there is no {path}"
    for config in re.findall(r"--config[ =](\S+\.yaml)", "\n".join(header)):
        assert (ROOT / config).is_file(), f"{file} names {config}, which does not exist"


def project_table() -> dict:
    return tomllib.loads(read("pyproject.toml"))["project"]


def declared(extras: list[str]) -> list[Requirement]:
    table = project_table()
    lines = [*table["dependencies"]]
    for extra in extras:
        lines += table["optional-dependencies"][extra]
    return [Requirement(line) for line in lines]


def constraints(python_version: str) -> dict[str, str]:
    """Name -> the version that `constraints.txt` gives it on Linux with this Python."""
    pins = {}
    environment = {"python_version": python_version, "sys_platform": "linux"}
    for line in read("constraints.txt").splitlines():
        if not line or line.startswith("#"):
            continue
        pin = Requirement(line)
        if pin.marker is None or pin.marker.evaluate(environment):
            assert pin.name not in pins, f"constraints.txt gives {pin.name} twice"
            pins[pin.name] = str(pin.specifier).removeprefix("==")
    return pins


@pytest.mark.parametrize("python_version", PYTHONS)
def test_tested_versions_are_those_that_users_may_install(python_version):
    pins = constraints(python_version)
    for requirement in declared(["train", "audio", "dev"]):
        name = requirement.name
        assert name in pins, f"constraints.txt gives no version of {name}"
        assert requirement.specifier.contains(pins[name]), (
            f"constraints.txt has {name} {pins[name]}, pyproject.toml asks for {requirement}"
        )


def test_dependencies_are_ranges():
    for requirement in declared(list(project_table()["optional-dependencies"])):
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators == {">="}, (
            f"pyproject.toml: {requirement} must be a range such as {requirement.name}>=1.0; "
            "exact versions belong in constraints.txt"
        )


def test_workflow_tests_every_python_that_is_promised():
    promised = [
        line.removeprefix("Programming Language :: Python :: ")
        for line in project_table()["classifiers"]
        if line.startswith("Programming Language :: Python :: 3.")
    ]
    tested = re.findall(r'"(3\.\d+)"', read(".github/workflows/ci.yml"))
    assert promised == PYTHONS
    assert tested == PYTHONS


DOCUMENTS = ["CONTRIBUTING.md", ".ci/run", ".github/workflows/ci.yml", ".pre-commit-config.yaml"]


@pytest.mark.parametrize("file", DOCUMENTS)
def test_make_targets_that_are_named_exist(file):
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), flags=re.MULTILINE))
    named = set(re.findall(r"(?:`|run: |exec |entry: |^)make ([a-z-]+)", read(file), re.MULTILINE))
    assert named, f"{file} names no make target"
    assert named <= targets, f"{file} names make {sorted(named - targets)}, not in the Makefile"


def test_ci_entry_can_be_executed():
    assert os.access(ROOT / ".ci/run", os.X_OK), "chmod +x .ci/run"
