"""From the word a user gives (folder or git URL) to a folder on this machine, and git's view of that folder.

A repository is untrusted input: no command that it names is run (hooks, file-system monitor, filters, diff
drivers, signatures, submodules, remote helpers), and a local question never reaches for the network.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit, urlunsplit

from training.errors import CannotWrite, MissingInput, UsageError
from training.texts import without_password

SCHEMES = ("https", "ssh", "git", "file")
CLONE_TIMEOUT_S = 1_800
LIST_TIMEOUT_S = 60
ASK_TIMEOUT_S = 10
CLONE_DEPTH = 1_000             # commits: enough to draw edits from, and to tell new files from old
_SCP_LIKE = re.compile(r"^(?P<user>[\w.-]+)@(?P<host>[\w.-]+):(?P<path>[^/].*)$")
_QUIET = ("--no-pager", "-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false",
          "-c", "submodule.recurse=false", "-c", "filter.lfs.smudge=", "-c", "filter.lfs.process=",
          "-c", "filter.lfs.required=false", "-c", "log.showSignature=false", "-c", "gc.auto=0",
          "-c", "maintenance.auto=false")


# A credential helper: git runs it with `get`, and for this one address.
_TELL = ('!f() { test "$1" = get && printf "username=%s\\npassword=%s\\n" "$ELITE_GIT_USER" '
         '"$ELITE_GIT_PASSWORD"; }; f')


class Login(NamedTuple):
    """Who clones from a host (`https://name`)."""

    host: str
    user: str
    password: str


def is_url(repo: str) -> bool:
    """Whether this names a remote: `scheme://...` or `user@host:path`.

    >>> is_url("https://example.org/a.git"), is_url("git@example.org:a/b.git"), is_url("../a")
    (True, True, False)
    """
    return "://" in repo or bool(_SCP_LIKE.match(repo) and not os.path.exists(repo))


def locate(repo: str, refresh: bool = True) -> Path:
    """The local folder of a repository; a URL is cloned into the cache, and fetched anew when `refresh`.

    A bare repository has no files of its own: it is cloned into the cache too, over `file://`.
    Raises UsageError for what cannot be a repository's name, MissingInput when it is not there.
    """
    if not repo.strip():
        raise UsageError("No repository was named; give a folder or a git URL: `--repo DIR`.")
    if repo.startswith("-"):
        raise UsageError(f"The repository {repo!r} starts with '-' and reads like a flag; "
                         f"write ./{repo} for a folder.")
    if is_url(repo):
        return _clone(check_url(repo), refresh)
    path = Path(os.path.expanduser(repo))
    try:
        if not path.exists():
            raise MissingInput(f"The repository {repo} does not exist; give a folder or a git URL.")
        if not path.is_dir():
            raise MissingInput(f"The repository {repo} is a file; give the folder that holds it: "
                               f"{path.resolve().parent}.")
        with os.scandir(path):
            path = path.resolve()
    except OSError as error:
        raise MissingInput(f"The repository {repo} cannot be read: {error.strerror}.") from error
    return _clone(path.as_uri(), refresh) if _is_bare(path) else path


def _is_bare(path: Path) -> bool:
    return (path / "HEAD").is_file() and all((path / name).is_dir() for name in ("objects", "refs")) \
        and not (path / ".git").exists()


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


def split_login(url: str) -> tuple[str, Login | None]:
    """An https URL without its user and password, and these; other URLs as they are (ssh needs its user).

    git writes the address that it clones into .git/config, and it can be read in the list of processes.

    >>> split_login("https://me:to%40ken@example.org/a.git")
    ('https://example.org/a.git', Login(host='https://example.org', user='me', password='to@ken'))
    """
    parts = urlsplit(url)
    if parts.scheme != "https" or "@" not in parts.netloc:
        return url, None
    named, _, host = parts.netloc.rpartition("@")
    user, _, password = named.partition(":")
    return (urlunsplit(parts._replace(netloc=host)),
            Login(host=f"https://{host}", user=unquote(user), password=unquote(password)))


def without_login(url: str) -> str:
    """A URL as a run keeps it: git finds its clone by it, and it holds no secret.

    >>> without_login("https://me:token@example.org/a.git"), without_login("ssh://git:x@example.org/a.git")
    ('https://example.org/a.git', 'ssh://git@example.org/a.git')
    """
    try:
        plain = split_login(url)[0]
    except ValueError:      # no URL; whoever clones it says so
        return url
    return re.sub(r"^(\w+://[^/@:]*):[^/@]*@", r"\1@", plain)


def cache_folder() -> Path:
    """Where clones are kept: `$XDG_CACHE_HOME/elite/repositories`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "elite" / "repositories"


def _clone(given: str, refresh: bool) -> Path:
    url, login = split_login(given)
    stem = re.sub(r"[^\w.-]", "-",
                  urlsplit(url).path.rstrip("/").rpartition("/")[2].removesuffix(".git"))[:80] or "clone"
    target = cache_folder() / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}" / stem
    if target.exists():
        if refresh:
            _update(target, login)
        return target
    try:
        cache_folder().mkdir(mode=0o700, parents=True, exist_ok=True)     # clones may be of private code
        target.parent.mkdir(mode=0o700, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=".cloning-"))
    except OSError as error:
        raise CannotWrite(f"Cannot write the clone cache {target.parent}: {error.strerror}. "
                          "Set XDG_CACHE_HOME.") from error
    try:
        done = run_git(["clone", "--quiet", "--depth", str(CLONE_DEPTH), "--no-tags",
                        "--no-recurse-submodules", "--template=", "--", url, str(aside / "tree")], aside,
                       CLONE_TIMEOUT_S, SCHEMES, login)
        if done.returncode:
            lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["git gave no reason"]
            raise MissingInput(f"Cannot clone {without_password(url)}: {without_password(lines[-1])}")
        os.replace(aside / "tree", target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def _update(target: Path, login: Login | None) -> None:
    """The newest commits of a clone, `CLONE_DEPTH` deep whatever it was; without a network it stays."""
    fetch = ["fetch", "--quiet", "--depth", str(CLONE_DEPTH), "--no-tags", "--no-recurse-submodules",
             "origin", "HEAD"]
    if run_git(fetch, target, CLONE_TIMEOUT_S, SCHEMES, login).returncode == 0:
        run_git(["reset", "--quiet", "--hard", "FETCH_HEAD"], target, LIST_TIMEOUT_S)


def command(arguments: list[str], protocols: tuple[str, ...] = (),
            login: Login | None = None) -> tuple[list[str], dict[str, str]]:
    """git's command line and environment with which nothing of the repository's own is run.

    `protocols` are those that may be spoken: none for a question about the local folder, since a repository
    can name a remote that git would ask for a missing object. A `login` is in the environment, which other
    users cannot read, and git asks for it for its own host only.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {"GIT_CONFIG_NOSYSTEM": "1", "GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0",
                    "GIT_LFS_SKIP_SMUDGE": "1", "GIT_ASKPASS": "", "GIT_SSH_COMMAND": "ssh -oBatchMode=yes",
                    "GIT_ALLOW_PROTOCOL": ":".join(protocols) or "none", "GIT_NO_LAZY_FETCH": "1",
                    "GIT_NO_REPLACE_OBJECTS": "1", "GIT_ATTR_NOSYSTEM": "1", "LC_ALL": "C"}
    if login is None:
        return ["git", *_QUIET, *arguments], environment
    environment |= {"ELITE_GIT_USER": login.user, "ELITE_GIT_PASSWORD": login.password}
    asked = ["-c", "credential.helper=", "-c", f"credential.{login.host}.helper={_TELL}"]
    return ["git", *_QUIET, *asked, *arguments], environment


def run_git(arguments: list[str], folder: Path, timeout_s: float, protocols: tuple[str, ...] = (),
            login: Login | None = None) -> subprocess.CompletedProcess[bytes]:
    """git in `folder`; see `command`.

    A git that is not installed or takes too long answers with return code 127 and the reason on stderr.
    """
    line, environment = command(arguments, protocols, login)
    try:
        return subprocess.run(line, cwd=folder, env=environment, timeout=timeout_s,
                              stdin=subprocess.DEVNULL, capture_output=True, check=False)
    except OSError as error:
        reason = "git is not installed" if isinstance(error, FileNotFoundError) else str(error.strerror)
        return subprocess.CompletedProcess(arguments, 127, b"", reason.encode())
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(arguments, 127, b"", f"no answer in {timeout_s:g} s".encode())


def is_repository(root: Path) -> bool:
    """Whether git knows this folder and keeps what it knows in the folder's own tree."""
    return git_place(root) is not None


def git_place(root: Path) -> tuple[str, str] | None:
    """(git's folder, `root` below the work tree as `sub/folder/` or ""), or None when git does not know it.

    A `.git` that is a file, a link or holds links leads elsewhere, perhaps to somebody's private repository.
    Only a linked work tree counts, since the main repository's entry names this very folder.
    """
    answer = run_git(["rev-parse", "--show-toplevel", "--git-dir", "--git-common-dir", "--show-prefix"], root,
                     ASK_TIMEOUT_S)
    top, own, shared, prefix = (os.fsdecode(answer.stdout).split("\n") + [""] * 4)[:4]
    if answer.returncode or not top:
        return None
    marker, folder, common = os.path.join(top, ".git"), os.path.join(root, own), os.path.join(root, shared)
    try:
        if stat.S_ISDIR(os.lstat(marker).st_mode):
            ours = os.path.samefile(marker, folder) and os.path.samefile(marker, common)
        else:
            ours = _is_linked_tree(marker, folder, common)
    except (OSError, ValueError):
        return None
    return (os.path.realpath(folder), prefix) if ours and not _has_links(common) else None


def _is_linked_tree(marker: str, folder: str, common: str) -> bool:
    named = os.fsdecode(Path(folder, "gitdir").read_bytes()).strip()
    return (stat.S_ISREG(os.lstat(marker).st_mode) and os.path.samefile(named, marker)
            and os.path.samefile(os.path.join(folder, "..", ".."), common))


def _has_links(git_folder: str) -> bool:
    """Whether git would follow a symbolic link to its refs or objects."""
    for place, folders, files in os.walk(git_folder):
        if any(os.path.islink(os.path.join(place, name)) for name in (*folders, *files)):
            return True
        if os.path.samefile(place, git_folder):
            folders[:] = [name for name in folders if name in ("refs", "objects", "info")]
    return False


def tracked_files(root: Path) -> list[str] | None:
    """Tracked and untracked-but-not-ignored paths below `root`, or None when git does not know this folder.

    Names are decoded with surrogateescape. A folder that a surrounding repository ignores lists nothing:
    None.
    """
    if not is_repository(root):
        return None
    listing = run_git(["ls-files", "-z", "--cached", "--others", "--exclude-standard"], root, LIST_TIMEOUT_S)
    if listing.returncode or not listing.stdout:
        return None
    return sorted({os.fsdecode(name) for name in listing.stdout.split(b"\0") if name})
