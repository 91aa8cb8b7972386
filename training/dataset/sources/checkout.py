"""From the word a user gives (folder or git URL) to a folder on this machine, and git's view of that folder.

A repository is untrusted input: its hooks, file-system monitor, submodules and LFS filters are never run.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from training.errors import CannotWrite, MissingInput, UsageError

SCHEMES = ("https", "ssh", "git", "file")
CLONE_TIMEOUT_S = 1_800
LIST_TIMEOUT_S = 120
_SCP_LIKE = re.compile(r"^(?P<user>[\w.-]+)@(?P<host>[\w.-]+):(?P<path>[^/].*)$")
_QUIET = ("-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false", "-c", "protocol.ext.allow=never",
          "-c", "submodule.recurse=false", "-c", "filter.lfs.smudge=", "-c", "filter.lfs.required=false")


def is_url(repo: str) -> bool:
    """Whether this names a remote: `scheme://...` or `user@host:path`.

    >>> is_url("https://example.org/a.git"), is_url("git@example.org:a/b.git"), is_url("../a")
    (True, True, False)
    """
    return "://" in repo or bool(_SCP_LIKE.match(repo) and not Path(repo).exists())


def locate(repo: str, refresh: bool = True) -> Path:
    """The local folder of a repository; a URL is cloned into the cache, and fetched anew when `refresh`.

    Raises UsageError for what cannot be a repository's name, MissingInput when it is not there.
    """
    if not repo.strip():
        raise UsageError("No repository was named; give a folder or a git URL: `--repo DIR`.")
    if repo.startswith("-"):
        raise UsageError(f"The repository {repo!r} starts with '-' and reads like a flag; "
                         f"write ./{repo} for a folder.")
    if is_url(repo):
        return _clone(check_url(repo), refresh)
    path = Path(repo).expanduser()
    try:
        if not path.exists():
            raise MissingInput(f"The repository {repo} does not exist; give a folder or a git URL.")
        if not path.is_dir():
            raise MissingInput(f"The repository {repo} is a file; give the folder that holds it: "
                               f"{path.resolve().parent}.")
        with os.scandir(path):
            return path.resolve()
    except OSError as error:
        raise MissingInput(f"The repository {repo} cannot be read: {error.strerror}.") from error


def check_url(url: str) -> str:
    """The URL in a form that git takes as nothing else. Raises UsageError for schemes not in `SCHEMES`.

    >>> check_url("git@example.org:team/a.git")
    'ssh://git@example.org/team/a.git'
    """
    if found := _SCP_LIKE.match(url):
        url = f"ssh://{found['user']}@{found['host']}/{found['path']}"
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError as error:
        raise UsageError(f"{without_password(url)} is no URL: {error}.") from error
    if parts.scheme not in SCHEMES:
        raise UsageError(f"{without_password(url)}: {parts.scheme}:// is not supported; "
                         f"use one of {', '.join(SCHEMES)}.")
    if host.startswith("-") or parts.path.lstrip("/").startswith("-") or (not host
                                                                          and parts.scheme != "file"):
        raise UsageError(f"{without_password(url)} names no host and path that git could clone.")
    return url


def without_password(url: str) -> str:
    """The URL without user and password, for messages and manifests.

    >>> without_password("https://me:token@example.org/a.git")
    'https://example.org/a.git'
    """
    return re.sub(r"(?<=://)[^/@\s]*@", "", url)


def cache_folder() -> Path:
    """Where clones are kept: `$XDG_CACHE_HOME/elite/repositories`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "elite" / "repositories"


def _clone(url: str, refresh: bool) -> Path:
    stem = re.sub(r"[^\w.-]", "-",
                  urlsplit(url).path.rstrip("/").rpartition("/")[2].removesuffix(".git")) or "clone"
    target = cache_folder() / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}" / stem
    if target.exists():
        if refresh and run_git(["fetch", "--quiet", "--depth", "1", "--no-tags", "origin", "HEAD"], target,
                               CLONE_TIMEOUT_S).returncode == 0:
            run_git(["reset", "--quiet", "--hard", "FETCH_HEAD"], target, LIST_TIMEOUT_S)
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=".cloning-"))
    except OSError as error:
        raise CannotWrite(f"Cannot write the clone cache {target.parent}: {error.strerror}. "
                          "Set XDG_CACHE_HOME.") from error
    try:
        done = run_git(["clone", "--quiet", "--depth", "1", "--no-tags", "--no-recurse-submodules",
                        "--template=",
                        "--", url, str(aside / "tree")], aside, CLONE_TIMEOUT_S)
        if done.returncode:
            lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["git gave no reason"]
            raise MissingInput(f"Cannot clone {without_password(url)}: {without_password(lines[-1])}")
        os.replace(aside / "tree", target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def run_git(arguments: list[str], folder: Path, timeout_s: float) -> subprocess.CompletedProcess[bytes]:
    """git in `folder`, with nothing of the machine's or the repository's own commands run.

    A git that is not installed or takes too long answers with return code 127 and the reason on stderr.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {"GIT_CONFIG_NOSYSTEM": "1", "GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0",
                    "GIT_LFS_SKIP_SMUDGE": "1", "GIT_ASKPASS": "", "GIT_SSH_COMMAND": "ssh -oBatchMode=yes",
                    "LC_ALL": "C"}
    try:
        return subprocess.run(["git", *_QUIET, *arguments], cwd=folder, env=environment, timeout=timeout_s,
                              stdin=subprocess.DEVNULL, capture_output=True, check=False)
    except FileNotFoundError:
        return subprocess.CompletedProcess(arguments, 127, b"", b"git is not installed")
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(arguments, 127, b"", f"no answer in {timeout_s:g} s".encode())


def tracked_files(root: Path) -> list[str] | None:
    """Tracked and untracked-but-not-ignored paths below `root`, or None when git does not know this folder.

    Names are decoded with surrogateescape. A folder that a surrounding repository ignores lists nothing:
    None.
    """
    listing = run_git(["ls-files", "-z", "--cached", "--others", "--exclude-standard"], root, LIST_TIMEOUT_S)
    if listing.returncode or not listing.stdout:
        return None
    return sorted({os.fsdecode(name) for name in listing.stdout.split(b"\0") if name})
