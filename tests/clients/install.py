"""Installs the real clients that tests/clients/ drives, each group into an environment of its own under build/clients/.

    python -m tests.clients.install ci          # the clients that CI runs
    python -m tests.clients.install all         # every client
    python -m tests.clients.install lm_eval     # one environment

tests/clients/locks/ pins every package: NAME.txt for pip, package-lock.json for npm. An environment is made again if its lock
file, Python or this file has changed since. Nothing is installed into the project's own .venv.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
LOCKS = Path(__file__).parent / "locks"
PROGRAMS = Path(__file__).parent / "programs"
BUILD = ROOT / "build" / "clients"


class Environment(NamedTuple):
    """A group of clients whose dependencies agree."""

    in_ci: bool
    clients: tuple[str, ...]  # the packages that the tests drive; the lock file has what they need, too


ENVIRONMENTS = {
    "openai": Environment(True, ("openai", "litellm")),
    "node": Environment(True, ("openai", "ai", "@ai-sdk/openai-compatible", "@bufbuild/buf", "@grpc/grpc-js")),
    "langchain": Environment(False, ("langchain-openai", "pydantic-ai-slim")),
    "llama_index": Environment(False, ("llama-index-llms-openai-like", "instructor")),
    "lm_eval": Environment(False, ("lm_eval",)),
    "guidellm": Environment(False, ("guidellm",)),
    "aiperf": Environment(False, ("aiperf",)),
}


def chosen(clients: str) -> list[str]:
    """Return the environments that `clients` means: "ci", "all", or names with commas. Raises ValueError for other names."""
    if clients == "all":
        return list(ENVIRONMENTS)
    if clients == "ci":
        return [name for name, environment in ENVIRONMENTS.items() if environment.in_ci]
    names = clients.split(",")
    for name in names:
        if name not in ENVIRONMENTS:
            raise ValueError(f"there is no environment '{name}': choose ci, all, or some of {', '.join(ENVIRONMENTS)}")
    return names


def program(environment: str, name: str) -> Path:
    """Return the path of the command `name` of an environment. Raises FileNotFoundError if it is not installed."""
    found = BUILD / environment / "bin" / name
    if not found.exists():
        raise FileNotFoundError(f"{found} is missing: run `make test-clients`, which installs the clients")
    return found


def node_command(script: str) -> list[str]:
    """Return the command that runs a script of programs/ in Node. Node looks for packages above the path of the script, so the
    script is run by its path in the environment, where `programs` is a link."""
    links = ("--preserve-symlinks", "--preserve-symlinks-main")
    return [str(program("node", "node")), *links, str(BUILD / "node" / "programs" / script)]


def npm_command(name: str) -> list[str]:
    """Return the command that runs a command of an npm package, with the Node of the environment."""
    return [str(program("node", "node")), str(BUILD / "node" / "node_modules" / ".bin" / name)]


def install(name: str) -> bool:
    """Make the environment `name` if it is missing or out of date. Returns whether there was anything to do."""
    folder, stamp = BUILD / name, _stamp(name)
    if (folder / "stamp").is_file() and (folder / "stamp").read_text() == stamp:
        return False
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    _pip_install(folder, LOCKS / f"{name}.txt")
    if name == "node":
        _npm_install(folder)
    (folder / "stamp").write_text(stamp)
    return True


def _stamp(name: str) -> str:
    files = [Path(__file__), LOCKS / f"{name}.txt"]
    if name == "node":
        files += [LOCKS / "package.json", LOCKS / "package-lock.json"]
    return hashlib.sha256(b"\0".join([sys.version.encode(), *(file.read_bytes() for file in files)])).hexdigest()


def _pip_install(folder: Path, lock: Path) -> None:
    pip = [str(folder / "bin" / "python"), "-m", "pip"]
    quietly = ["--quiet", "--disable-pip-version-check", "--no-input", "--no-compile"]
    for line in lock.read_text().splitlines():
        if line.startswith("torch=="):
            # torch comes first, with its dependencies: a machine may offer the CPU build of this version, which has fewer.
            subprocess.run([*pip, "install", *quietly, line], check=True)
    subprocess.run([*pip, "install", *quietly, "--no-deps", "--requirement", str(lock)], check=True)
    subprocess.run([*pip, "check"], check=True, stdout=subprocess.PIPE)


def _npm_install(folder: Path) -> None:
    """Install the packages of package-lock.json with the Node of the environment. No package runs a script of its own."""
    for file in ("package.json", "package-lock.json"):
        shutil.copy(LOCKS / file, folder / file)
    (folder / "programs").symlink_to(PROGRAMS)
    npm = [str(folder / "bin" / "npm"), "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    subprocess.run(npm, cwd=folder, check=True)


def _installed(name: str) -> bool:
    """Install an environment. Raises SystemExit with what the failed step said."""
    try:
        return install(name)
    except subprocess.CalledProcessError as error:
        said = (error.stdout or b"").decode(errors="replace")
        raise SystemExit(f"{said}cannot install {name}: {' '.join(error.cmd)} ended with code {error.returncode}") from error


def main(arguments: list[str]) -> int:
    try:
        names = chosen(*arguments)
    except (TypeError, ValueError) as error:
        print(f"usage: python -m tests.clients.install ci|all|NAME,...: {error}", file=sys.stderr)
        return 2
    for name in names:
        if _installed(name):
            print(f"installed {', '.join(ENVIRONMENTS[name].clients)} in {(BUILD / name).relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
