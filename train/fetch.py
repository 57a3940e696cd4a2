"""Fetches the packages of `sources.toml`: downloads them with apt, checks them, and unpacks their text files.

    <work>/debs/NAME_VERSION_ARCH.deb      the downloaded package
    <work>/unpacked/NAME/usr/...           the files that `wanted` chose, and the package's copyright file
    <work>/unpacked/NAME.ok                written last: the sha256 of the .deb and the patterns it was unpacked with

Nothing is installed. Both steps skip what exists, so an interrupted run continues where it stopped. `train.filters` decides
which of the unpacked files are good enough to train on.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
import tomllib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import IO, Annotated, Literal, cast

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from engine.errors import ConfigError

SOURCES = Path(__file__).with_name("sources.toml")
WORK = Path(".cache/train")
BATCH = 16  # packages in one call of apt, since each call reads the whole index (about a second)
CALLS = 4  # concurrent calls of apt
UNPACKERS = 2  # concurrent dpkg-deb processes

Work = Annotated[Path, typer.Option("--work", metavar="FOLDER", help="Where packages, corpus and tokenizer are kept.")]


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Describes one Debian package and which of its files to take. `html`, `text` and `exclude` hold fnmatch patterns of paths
    such as `usr/share/doc/NAME/index.html`."""

    version: str
    licence: str
    kind: Literal["code", "docs"]
    sha256: str
    what: str
    html: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    copyright: str = ""  # name of the package that has the copyright file, if another package has it


class _Table(msgspec.Struct, forbid_unknown_fields=True):
    packages: dict[str, Source]


def load_sources(path: Path = SOURCES) -> dict[str, Source]:
    """Read the table of packages from a TOML file. Returns the packages by name, sorted. Raises ConfigError."""
    try:
        packages = msgspec.convert(tomllib.loads(path.read_text("utf-8")), _Table).packages
    except (OSError, tomllib.TOMLDecodeError, msgspec.ValidationError) as e:
        raise ConfigError(f"{path} cannot be used as the table of sources: {e}") from e
    return dict(sorted(packages.items()))


def wanted(path: str, source: Source) -> bool:
    """Return whether the file at `path` in a package is text to train on. Only the path is looked at."""
    if _matches(path, source.exclude):
        return False
    if path.endswith(".html"):
        return _matches(path, source.html)
    if path.endswith(".py"):
        return True
    if source.kind == "docs" and path.endswith((".rst", ".rst.txt")):
        return True
    return path.endswith(".txt") and _matches(path, source.text)


def progress() -> Progress:
    columns = TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=Console(stderr=True))


def download(sources: dict[str, Source], debs: Path) -> None:
    """Download the packages that are missing from the folder `debs`, then check every package there against its sha256."""
    debs.mkdir(parents=True, exist_ok=True)
    missing = [name for name, source in sources.items() if find_deb(name, source, debs) is None]
    batches = [missing[i : i + BATCH] for i in range(0, len(missing), BATCH)]
    with progress() as bar, ThreadPoolExecutor(CALLS) as pool:
        task = bar.add_task("download", total=len(sources), completed=len(sources) - len(missing))
        calls = {pool.submit(_apt_download, batch, sources, debs): len(batch) for batch in batches}
        for call in as_completed(calls):
            call.result()
            bar.advance(task, calls[call])
        for name, source in bar.track(sources.items(), description="check"):
            _check(name, source, debs)


def find_deb(name: str, source: Source, debs: Path) -> Path | None:
    version = source.version.replace(":", "%3a")  # apt escapes the colon of an epoch in file names
    return next(iter(sorted(debs.glob(f"{name}_{version}_*.deb"))), None)


def unpack(sources: dict[str, Source], debs: Path, unpacked: Path) -> None:
    unpacked.mkdir(parents=True, exist_ok=True)
    with progress() as bar, ThreadPoolExecutor(UNPACKERS) as pool:
        task = bar.add_task("unpack", total=len(sources))
        for call in as_completed([pool.submit(_unpack_one, name, source, debs, unpacked) for name, source in sources.items()]):
            call.result()
            bar.advance(task)


def _matches(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def _apt_download(names: Sequence[str], sources: dict[str, Source], debs: Path) -> None:
    """Download exactly the versions in `sources`, or raise ConfigError. Another version would give another corpus under the same
    name."""
    asked = [f"{name}={sources[name].version}" for name in names]
    try:
        done = subprocess.run(["apt-get", "download", "-q", *asked], cwd=debs, capture_output=True, text=True, check=False)
    except FileNotFoundError as e:
        raise ConfigError("apt-get is not here: the sources are Debian packages, fetch them on Debian 12 (bookworm)") from e
    if done.returncode != 0:
        raise ConfigError(
            f"apt-get download {' '.join(asked)} failed: {done.stderr.strip()}. Run apt-get update first; where a version is no "
            f"longer offered, write the one that `apt-cache policy` shows, and its sha256, into {SOURCES.name}"
        )


def _check(name: str, source: Source, debs: Path) -> None:
    deb = find_deb(name, source, debs)
    if deb is None:
        raise ConfigError(f"apt-get download reported no error and left no {name}_{source.version}_*.deb in {debs}")
    with deb.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != source.sha256:
        raise ConfigError(
            f"{deb} has sha256 {found}, {SOURCES.name} says {source.sha256}: delete the file and run again; if it comes back "
            "the same, this machine is not amd64 or the package was rebuilt"
        )


def _unpack_one(name: str, source: Source, debs: Path, unpacked: Path) -> None:
    if is_unpacked(name, source, unpacked):
        return
    deb = find_deb(name, source, debs)
    if deb is None:
        raise ConfigError(f"{name} {source.version} is not in {debs}: run `python -m train.fetch`")
    mark = _mark(name, unpacked)
    mark.unlink(missing_ok=True)
    shutil.rmtree(unpacked / name, ignore_errors=True)  # another version or an interrupted run may have left files
    try:
        with (
            subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE) as process,
            tarfile.open(fileobj=cast(IO[bytes], process.stdout), mode="r|") as tar,
        ):
            _write_wanted(tar, name, source, unpacked / name)
    except FileNotFoundError as e:
        raise ConfigError("dpkg-deb is not here: the sources are Debian packages, unpack them on Debian") from e
    except tarfile.TarError as e:
        raise ConfigError(f"dpkg-deb cannot read {deb}: delete it and run again") from e
    if process.returncode != 0:
        raise ConfigError(f"dpkg-deb cannot read {deb}: delete it and run again")
    mark.write_bytes(msgspec.json.encode(source))


def is_unpacked(name: str, source: Source, unpacked: Path) -> bool:
    """Return whether all files that `source` selects are unpacked, from exactly the version that `source` names."""
    mark = _mark(name, unpacked)
    return mark.is_file() and mark.read_bytes() == msgspec.json.encode(source)


def _mark(name: str, unpacked: Path) -> Path:
    return unpacked / f"{name}.ok"


def _write_wanted(tar: tarfile.TarFile, name: str, source: Source, folder: Path) -> None:
    for member in tar:
        path = member.name.removeprefix("./")
        if not member.isfile() or ".." in PurePosixPath(path).parts:
            continue
        if not wanted(path, source) and path != f"usr/share/doc/{name}/copyright":
            continue
        content = tar.extractfile(member)
        if content is not None:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content.read())


def main(work: Work = WORK) -> None:
    """Download the packages of train/sources.toml and unpack their text."""
    try:
        sources = load_sources()
        download(sources, work / "debs")
        unpack(sources, work / "debs", work / "unpacked")
    except ConfigError as e:
        raise SystemExit(f"train.fetch: {e.message}") from e


if __name__ == "__main__":
    typer.run(main)
