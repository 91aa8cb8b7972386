"""Folders: which repository is meant, where its run goes, and moving an old run out of the way."""

from __future__ import annotations

import os
import re
from pathlib import Path

from training.errors import CannotWrite, MissingInput
from training.manager.lock import RunLock
from training.manager.runs import is_run

RUNS = Path("runs")
# Any of these makes a folder the top of a project.
PROJECT_MARKS = (".git", ".hg", "pyproject.toml", "setup.py", "package.json", "Cargo.toml", "go.mod",
                 "pom.xml", "build.gradle", "CMakeLists.txt", "Makefile")


def is_project(folder: Path) -> bool:
    """Whether a folder looks like the top of a source repository."""
    return any((folder / mark).exists() for mark in PROJECT_MARKS)


def find_repository(folder: Path, home: Path) -> tuple[Path, str] | None:
    """The repository that is probably meant, and why: this folder, a parent, or the newest in ~/projects.

    The home folder itself is never taken.
    """
    if is_project(folder) and folder != home:
        return folder, "the current folder"
    for parent in folder.parents:
        if parent not in (home, Path(folder.anchor)) and is_project(parent):
            return parent, "a parent of the current folder"
    try:
        projects = [path for path in (home / "projects").iterdir() if path.is_dir() and is_project(path)]
    except OSError:
        projects = []
    newest = max(projects, key=lambda path: path.stat().st_mtime, default=None)
    return (newest, "the newest folder in ~/projects") if newest else None


def default_repository(folder: Path, home: Path) -> tuple[Path, str]:
    """`find_repository`, or MissingInput saying where was looked."""
    found = find_repository(folder, home)
    if found is None:
        raise MissingInput(f"No repository in {folder}, its parents or {home / 'projects'}; give one: "
                           "--repo DIR.")
    return found


def name_of(repo: str) -> str:
    """A run's name from a folder or a git URL: letters, digits, dot, dash and underscore.

    >>> name_of("https://example.org/pallets/click.git"), name_of("/srv/my project/"), name_of("/")
    ('click', 'my-project', 'model')
    """
    last = re.split(r"[/:\\\\]", repo.rstrip("/\\"))[-1].removesuffix(".git")
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", last).strip("-.")[:80] or "model"


def free_path(path: Path) -> Path:
    """`path`, or `path-2`, `path-3` ... : the first that holds nothing yet."""
    candidate, number = path, 2
    while candidate.exists() and not _empty(candidate):
        candidate, number = path.with_name(f"{path.name}-{number}"), number + 1
    return candidate


def _empty(path: Path) -> bool:
    try:
        return path.is_dir() and not any(os.scandir(path))
    except OSError:
        return False


def move_aside(path: Path) -> Path | None:
    """Rename an existing run to `<name>.old-<n>` and return its new place; None when there was none.

    Raises CannotWrite when it is in use or cannot be renamed.
    """
    if not is_run(path):
        return None
    guard = RunLock(path)
    guard.take(patience_s=0.0)
    number = 1
    while (aside := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    try:
        os.rename(path, aside)
    except OSError as error:
        raise CannotWrite(f"Cannot rename {path} to {aside.name}: {error.strerror}.") from error
    finally:
        guard.release()
    return aside
