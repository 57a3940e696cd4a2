"""Tests that all kernels compile for a Hopper GPU at the shapes of real models.

Triton's interpreter accepts kernels that the compiler refuses, such as kernels with ranges that are not a power of two.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parity.compile_kernels import GROUPS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("group", GROUPS)
def test_kernels_compile_for_hopper(group, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, str(ROOT / "tests/parity/compile_kernels.py"), group],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout == "compiled\n", run.stderr[-3000:]


def launched_kernels(path):
    """Return "module.kernel" for every `kernel[grid](...)` in the file, where `kernel` is a Triton kernel of the same file."""
    tree = ast.parse(path.read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    kernels = {f.name for f in functions if any(ast.unparse(d).startswith("triton.jit") for d in f.decorator_list)}
    calls = [node.func.value for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)]
    return {f"{path.stem}.{name.id}" for name in calls if isinstance(name, ast.Name) and name.id in kernels}


def test_every_launched_kernel_is_in_exactly_one_group():
    launched = set().union(*(launched_kernels(path) for path in (ROOT / "engine/kernels").glob("*.py")))
    grouped = sorted(kernel for group in GROUPS.values() for kernel in group.kernels)
    assert grouped == sorted(launched), "add the kernel and a launch of it to a group in compile_kernels.py"
