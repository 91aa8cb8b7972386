"""Writing a folder so that it is complete or absent: made beside its place, then renamed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from training.errors import CannotWrite

BYTES_ON_DISK_A_TEXT_BYTE = 4
MIN_FREE_BYTES = 64 << 20


@contextmanager
def aside_of(target: Path, text_bytes: int) -> Iterator[Path]:
    """A folder beside `target` to write in; gone afterwards. Raises CannotWrite with the system's reason."""
    if target.exists() and not is_replaceable(target):
        raise CannotWrite(f"{target} exists and is no dataset; choose another `--output` or remove it.")
    aside: Path | None = None
    new_parent = not target.parent.exists()
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _sweep(target)
        needed = BYTES_ON_DISK_A_TEXT_BYTE * text_bytes + MIN_FREE_BYTES
        free = shutil.disk_usage(target.parent).free
        if free < needed:
            raise CannotWrite(f"The dataset needs about {needed:,} bytes in {target.parent}; {free:,} are "
                              "free. Choose another `--output`.")
        aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{_prefix(target)}{os.getpid()}-"))
        yield aside
    except OSError as error:
        raise CannotWrite(f"Cannot write {target}: {error.strerror or error}.") from error
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
        if new_parent:
            with suppress(OSError):     # what is not empty stays
                target.parent.rmdir()


def is_replaceable(target: Path) -> bool:
    """Whether a folder is empty or a dataset of this program, so that nothing of the user's can be lost."""
    if not target.is_dir():
        return False
    if not any(target.iterdir()):
        return True
    try:
        manifest = json.loads((target / "manifest.json").read_text(encoding="utf-8"))
        known = {*manifest["store"]["files"], "manifest.json"}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return all(path.is_dir() or path.relative_to(target).as_posix() in known for path in target.rglob("*"))


def _prefix(target: Path) -> str:
    return f".{target.name}.being-made-by-"


def _sweep(target: Path) -> None:
    """Remove what killed runs left aside."""
    for left in target.parent.iterdir():
        owner = left.name.removeprefix(_prefix(target)).split("-")[0]
        if left.name.startswith(_prefix(target)) and owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(left, ignore_errors=True)


def replace(aside: Path, target: Path) -> None:
    """Put the finished folder in the place of an older one."""
    aside.chmod(0o755)
    if target.exists():
        os.replace(target, aside / ".replaced")
        # The older dataset lies inside the new one for a moment, so that one rename shows the new one.
    os.replace(aside, target)
    shutil.rmtree(target / ".replaced", ignore_errors=True)
