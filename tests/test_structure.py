"""How the package hangs together, read from its imports: those within functions and for type checking only, too.

Who may know whom, downwards only; a room may know all that lie below one that it knows:

    __main__ > studies > cli > serving > adapting > modules > evaluation > engines > learner > algorithms > networks
        > objectives, tasks, runs > checks > errors
    studies > simulation > modules, strategies
    engines > optimizers > checks
    data_modules > rollouts > data, policies > objectives
    cli > strategies, checkpoints > launching, runs
    cli, serving > tracking > provenance, console, launching
    cli, adapting > data_modules > data > tasks

and besides: `adapting` finds its files by `checkpoints`, and has a command line, so it knows `console`; `evaluation`
reports on the tasks of a data module, so it knows `data`, `provenance` and `console`; `console` shows tasks and
`launching` tells of lost workers, so both know what is at the bottom. `_learn2learn` loads the reference library, for
`engines` and `algorithms`, and for the one sampler of `data_modules`. Only `dmaml_pl/__init__.py`, which names
everything lazily, is outside of the order.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parents[1]
BOTTOM = {"objectives", "tasks", "runs"}
KNOWS: dict[str, set[str]] = {
    "__main__": {"studies", ""},
    "": set(),  # the package itself, for its version
    "studies": {"cli", "simulation"},
    "simulation": {"modules", "strategies"},
    "cli": {"serving", "strategies", "checkpoints", "tracking", "data_modules"},
    "serving": {"adapting", "tracking"},
    "adapting": {"modules", "checkpoints", "console", "data_modules"},
    "modules": {"evaluation"},
    "evaluation": {"engines", "provenance", "console", "data"},
    "engines": {"learner", "optimizers"},
    "optimizers": {"checks"},
    "learner": {"algorithms"},
    "algorithms": {"networks", "_learn2learn"},
    "networks": BOTTOM,
    "strategies": {"launching", "runs"},
    "checkpoints": {"launching", "runs"},
    "tracking": {"provenance", "console", "launching"},
    "launching": {"checks"},
    "console": BOTTOM,
    "provenance": {"checks"},
    "data_modules": {"data", "rollouts"},
    "rollouts": {"data", "policies"},
    "policies": BOTTOM,
    "data": {"tasks"},
    "objectives": {"tasks"},
    "tasks": {"checks"},
    "runs": {"checks"},
    "checks": {"errors"},
    "errors": set(),
    "_learn2learn": {"errors"},
}
EXCEPTIONS = {
    ("data_modules.samplers", "dmaml_pl._learn2learn"): "the one file that samples by learn2learn's task transforms",
}
EMPTY_WORDS = {"own", "finding", "written", "asking", "place", "payload", "utils", "helpers", "misc", "common"}


@cache
def modules() -> dict[str, Path]:
    """All files, by the names under which they are imported."""
    files = [*ROOT.glob("dmaml_pl/**/*.py"), *ROOT.glob("data_modules/**/*.py")]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


@cache
def imports(module: str) -> set[str]:
    """The modules that a file names in its imports, wherever they stand."""
    found = set()
    for node in ast.walk(ast.parse(modules()[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inside & modules().keys()) or {node.module}
    return found & modules().keys()


def room(module: str) -> str:
    package, _, inside = module.partition(".")
    return inside.partition(".")[0] if package == "dmaml_pl" else package


@cache
def below(name: str) -> frozenset[str]:
    return frozenset(KNOWS[name]).union(*(below(known) for known in KNOWS[name]))


def lines(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


def test_every_room_has_its_place_in_the_order_and_the_order_has_no_circle() -> None:
    assert {room(module) for module in modules()} <= KNOWS.keys()
    assert list(TopologicalSorter(KNOWS).static_order())


@pytest.mark.parametrize("module", sorted(modules().keys() - {"dmaml_pl"}))
def test_a_file_knows_only_its_own_room_and_those_below(module: str) -> None:
    mine = room(module)
    wrong = {
        known
        for known in imports(module)
        if room(known) not in {mine, *below(mine)} and (module, known) not in EXCEPTIONS
    }
    assert not wrong, f"{mine} may know {sorted(below(mine))}"


def test_no_file_imports_itself_by_way_of_others() -> None:
    known = {module: set(imports(module)) for module in modules()}
    try:
        TopologicalSorter(known).prepare()
    except CycleError as error:
        pytest.fail(" > ".join(reversed(error.args[1])))


def test_few_files_lie_outside_of_rooms() -> None:
    assert len(list((ROOT / "dmaml_pl").glob("*.py"))) <= 10


def test_no_file_is_long() -> None:
    lengths = {str(file.relative_to(ROOT)): lines(file) for file in modules().values()}
    assert {name: length for name, length in lengths.items() if length > 400} == {}
    assert median(lengths.values()) < 150


def test_the_name_of_a_file_says_what_it_holds() -> None:
    assert not EMPTY_WORDS & {file.stem for file in modules().values()}


def test_no_two_public_classes_have_one_name() -> None:
    named: dict[str, list[str]] = {}
    for module, file in modules().items():
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                named.setdefault(node.name, []).append(module)
    assert {name: homes for name, homes in named.items() if len(homes) > 1} == {}


def _explained(docstring: str, section: str) -> set[str]:
    """The names below a heading of a docstring."""
    found = re.search(rf"^{section}:\n((?:    .*\n|\n)+)", f"{docstring}\n", re.MULTILINE)
    return set(re.findall(r"^    (\w+):", found[1], re.MULTILINE)) if found else set()


def test_no_attribute_is_explained_under_the_name_of_a_setting_whose_help_would_show_that() -> None:
    both = {
        f"{file.name}, {node.name}": _explained(text, "Args") & _explained(text, "Attributes")
        for room in ("dmaml_pl", "data_modules")
        for file in (ROOT / room).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef) and (text := ast.get_docstring(node))
    }
    assert {name: names for name, names in both.items() if names} == {}
    assert _explained("A.\n\nArgs:\n    a: b\n        c.\n    d: e.\n\nRaises:\n    F: g.", "Args") == {"a", "d"}
