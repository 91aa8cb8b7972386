"""Repositories that tests make, and a generator for them with small windows."""

from __future__ import annotations

import email
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from training.dataset import DatasetGenerator, WindowStore
from training.dataset.sources.repository import (
    DEFAULT_MAX_FILE_BYTES,
    Dropped,
    SourceFile,
    list_repository,
    read_all,
)
from training.settings import Config

JSON_PACKAGE = str(Path(json.__file__).parent)
EMAIL_PACKAGE = str(Path(email.__file__).parent)
FUNCTION = ("def {name}(value: int) -> int:\n    '''Add one to the value and give it back.'''\n"
            "    return value + 1\n\n\n")


def write_tree(root: Path, files: dict[str, str | bytes]) -> Path:
    """Files by relative path; the root."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def read_tree(root: Path,
              max_file_bytes: int = DEFAULT_MAX_FILE_BYTES) -> tuple[list[SourceFile], dict[str, str]]:
    """What a repository gives: accepted files, and path -> reason of the others."""
    listing = list_repository(root)
    dropped = {item.path: item.reason for item in listing.dropped}
    sources = []
    for found in read_all(listing, max_file_bytes):
        if isinstance(found, Dropped):
            dropped[found.path] = found.reason
        else:
            sources.append(found)
    return sources, dropped


def git(folder: Path, *arguments: str, date: str = "") -> str:
    """git as a user runs it, with a name of its own; what it prints. `date`: when a commit is made."""
    when = {"GIT_COMMITTER_DATE": date, "GIT_AUTHOR_DATE": date} if date else {}
    done = subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@example.org", "-c",
                           "init.defaultBranch=main", "-c", "commit.gpgSign=false", *arguments], cwd=folder,
                          check=True, capture_output=True, env=os.environ | when)
    return done.stdout.decode().strip()


def small_project(root: Path) -> Path:
    """Six Python files, a README, and imports between them."""
    files: dict[str, str | bytes] = {
        f"app/part{index}.py": f"from app import base\nfrom app.part{index - 1} import step{index - 1}\n\n\n"
        + "".join(FUNCTION.format(name=f"step{index}_{inner}") for inner in range(index + 2))
        for index in range(1, 6)}
    return write_tree(root,
                      files | {"app/base.py": FUNCTION.format(name="base") * 3, "app/__init__.py": "# app\n",
                                     "README.md": "# An application\n\nIt adds one to values, in parts.\n"})


def settings(repo: Path | str, **values: Any) -> Config:
    """A configuration; keyword `context_tokens` stands for `dataset.context_tokens`."""
    named = {f"dataset.{name}": value for name, value in values.items()}
    plain = {"dataset.fim_share": 0.0, "dataset.fim_rate": 0.0, "dataset.whole_share": 0.0}
    return Config({"dataset.repo": str(repo), "embedded.vocab_tokens": 512} | plain | named)


def make(repo: Path | str, output: Path, **values: Any) -> tuple[dict[str, Any], WindowStore]:
    """Generate and open a dataset."""
    manifest = DatasetGenerator(settings(repo, **values), output).generate()
    return manifest, WindowStore.open(output / "dataset")
