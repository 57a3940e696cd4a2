"""Tests the structure of the code: who may import whom, which modules need no torch, and that the error table has every error."""

import ast
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from engine import errors
from server.errors import STATUS

ROOT = Path(__file__).resolve().parents[2]

# The rungs of the import ladder, the highest first; each rung is a list of groups. A module may import from lower rungs and from
# its own group. Groups of one rung may not import each other. The longest entry that a module's name begins with decides its
# place.
LADDER: list[list[set[str]]] = [
    [{"server.__main__"}, {"train"}],
    [{"server.cli"}],
    [{"server.admin_client"}, {"server.compile"}, {"server.doctor", "server.doctor_tiers"}, {"server.supervise"}],
    [{"server.bench"}, {"server.settings_sources"}],
    [{"server.http"}, {"server.rpc"}],
    [{"server.http.schemas"}],
    [{"server.service"}],
    [{"server.metrics"}],
    [{"server.engines"}, {"server.text"}],
    [{"server.settings"}],
    [{"server.errors"}, {"server.bundled"}, {"server.findings"}],
    [{"engine.process"}, {"engine.llm"}],
    [{"engine.core"}],
    [{"engine.scheduler"}, {"engine.device"}, {"engine.fake", "engine.fake_blocks", "engine.fake_device"}],
    [
        {
            "engine.scheduler.cost_file",
            "engine.scheduler.cost_fit",
            "engine.scheduler.cost_folder",
            "engine.scheduler.cost_solve",
            "engine.scheduler.cost_table",
            "engine.scheduler.limits",
            "engine.scheduler.step_cost",
        }
    ],
    [{"engine.kvcache"}, {"engine.sampling"}],
    [{"engine.kvcache.disk"}],
    [{"engine.backends"}],
    [{"engine.weights", "engine.quant"}],
    [{"engine.models"}],
    [{"engine.layers"}],
    [{"engine.attention"}],
    [{"engine.kernels"}],
    [{"engine.batch"}],
    [{"engine.messages"}, {"engine.plan"}],
    [{"engine.request"}],
    [{"engine.config"}],
    [{"engine.errors"}, {"engine.lifeline"}, {"engine.logs"}, {"engine.slo"}, {"engine.startup"}],
]

TORCH_FREE = (
    "engine",
    "engine.errors",
    "engine.lifeline",
    "engine.logs",
    "engine.slo",
    "engine.startup",
    "engine.config",
    "engine.request",
    "engine.plan",
    "engine.messages",
    "engine.core",
    "engine.process",
    "engine.llm",
    "engine.fake",
    "engine.fake_blocks",
    "engine.fake_device",
    "engine.scheduler",
    "engine.kvcache.disk",
    "engine.kvcache.chain",
    "engine.kvcache.identity",
    "engine.kvcache.kinds",
    "engine.kvcache.load",
    "engine.kvcache.loads",
    "engine.kvcache.pool",
    "engine.kvcache.prefix",
    "engine.kvcache.manager",
    "engine.kvcache.host_tier",
    "engine.kernels.linear_tiles",
    "engine.layers.kinds",
    "engine.models.config_common",
    "engine.models.config_defaults",
    "engine.models.config_keys",
    "engine.models.config_reader",
    "engine.models.config_rope",
    "engine.models.config_text",
    "engine.models.deepseek_config",
    "engine.models.generation",
    "engine.models.dense_config",
    "engine.models.families",
    "engine.models.formats",
    "engine.models.glm4_moe_config",
    "engine.models.minimax_m2_config",
    "engine.models.qwen3_moe_config",
    "engine.models.sigmoid_moe_config",
    "engine.models.spec",
    "engine.sampling.reference",
    "engine.sampling.uniform",
    "server",
)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> dict[str, Path]:
    found = [p for top in ("engine", "server", "train") for p in (ROOT / top).rglob("*.py") if "pb" not in p.parts]
    return {module_name(p): p for p in found}


def own_imports(name: str, path: Path) -> set[str]:
    """Return the modules of engine, server and train that the file imports, in functions and TYPE_CHECKING blocks too."""
    found = set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            relative = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            found |= {f"{relative}.{alias.name}" for alias in node.names}
    return {module for module in found if module.split(".")[0] in ("engine", "server", "train")}


PLACES = {entry: (rung, number) for rung, groups in enumerate(LADDER) for number, group in enumerate(groups) for entry in group}


def place(module: str) -> tuple[int, int] | None:
    """Return (rung, group) of a module in LADDER. None stands for the packages `engine` and `server` themselves, which hold
    public names only."""
    while module and module not in PLACES:
        module = module.rpartition(".")[0]
    return PLACES.get(module)


def may_import(importer: str, imported: str) -> bool:
    here, there = place(importer), place(imported)
    if here is None or there is None:
        return True
    return here == there or here[0] < there[0]


@pytest.mark.parametrize(("name", "path"), sources().items(), ids=sources().keys())
def test_imports_go_down_the_ladder(name, path):
    wrong = {imported for imported in own_imports(name, path) if not may_import(name, imported)}
    assert not wrong, f"{name} may not import {sorted(wrong)}: see LADDER"


# These modules may be directly in the packages `engine` and `server`. Every other module belongs in a subpackage.
FLAT = {
    "engine": [
        "errors",
        "config",
        "request",
        "plan",
        "messages",
        "core",
        "llm",
        "process",
        "fake",
        "fake_blocks",
        "fake_device",
        "logs",
        "slo",
        "startup",
        "lifeline",
        "batch",
    ],
    "server": [
        "__main__",
        "admin_client",
        "cli",
        "compile",
        "settings",
        "settings_sources",
        "bundled",
        "doctor",
        "doctor_tiers",
        "errors",
        "findings",
    ],
}


@pytest.mark.parametrize("package", FLAT)
def test_flat_modules_are_the_listed_ones(package):
    found = {path.stem for path in (ROOT / package).glob("*.py")} - {"__init__"}
    assert found == set(FLAT[package])


def test_the_ladder_has_a_rung_for_every_module():
    missing = [name for name in sources() if name not in ("engine", "server") and place(name) is None]
    assert not missing, f"add to LADDER: {missing}"


def test_torch_free_modules_import_without_torch():
    """The test imports all modules of TORCH_FREE in a process in which `import torch` fails."""
    modules = [m for m in sources() if any(m == t or (t != "engine" and m.startswith(t + ".")) for t in TORCH_FREE)]
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'triton'):\n"
        "    sys.modules[name] = None\n"
        f"import importlib\nfor name in {modules!r}:\n    importlib.import_module(name)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]


def error_classes() -> list[type[errors.TidegateError]]:
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.TidegateError)]
    assert len(classes) > 10
    return classes


def test_the_docstring_of_errors_names_every_error():
    tree = errors.__doc__ or ""
    missing = [c.__name__ for c in error_classes() if c.__name__ not in tree]
    assert not missing, f"add to the tree in the docstring of engine/errors.py: {missing}"


@pytest.mark.parametrize("cls", error_classes(), ids=lambda c: c.__name__)
def test_every_error_has_a_row_in_the_error_table(cls):
    assert cls in STATUS, "add the HTTP and gRPC status of the error to STATUS in server/errors.py"


def test_the_error_table_has_no_other_rows():
    assert set(STATUS) == set(error_classes())
