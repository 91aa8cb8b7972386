import contextlib
import os
import subprocess
import sys
import time
from collections import Counter

import pytest
from repositories import write_tree

from training.dataset.sources import opening
from training.dataset.sources.opening import Root

FLIPS = 1_000


@pytest.mark.parametrize("openat", [True, False])
def test_a_file_is_opened_only_below_its_root_and_without_following_a_link(tmp_path, openat):
    write_tree(tmp_path / "root", {"a/b.py": "x = 1\n", "large.py": "x" * 11})
    (tmp_path / "secret.py").write_text("secret\n")
    (tmp_path / "root/link").symlink_to(tmp_path)
    (tmp_path / "root/file.py").symlink_to(tmp_path / "secret.py")
    with Root(tmp_path / "root", openat=openat) as root:
        assert root.read("a/b.py", 10) == b"x = 1\n"
        assert root.entries("") == [("a", True), ("file.py", False), ("large.py", False), ("link", False)]
        told = {name: root.read(name, 10) for name in (
            "large.py", "link/secret.py", "file.py", "../secret.py", "/etc/passwd", "a/../../secret.py", "a",
            "a/", "gone.py", "a/b.py/c", "", ".", ".git/config", "a/.GIT/config", "a\0b", "n" * 300)}
        with pytest.raises(OSError, match="symbolic link"):
            root.entries("link/")
    outside = ("../secret.py", "/etc/passwd", "a/../../secret.py", ".", ".git/config", "a/.GIT/config",
               "a\0b")
    assert told == dict.fromkeys(outside, "outside the repository") | {
        "large.py": "over 10 bytes", "link/secret.py": "symbolic link", "file.py": "symbolic link",
        "a": "submodule", "a/": "nested repository", "": "outside the repository",
        "gone.py": "missing from the working tree", "a/b.py/c": "missing from the working tree",
        "n" * 300: "unreadable"}


def test_a_hard_link_is_a_regular_file_inside_the_tree(tmp_path):
    write_tree(tmp_path, {"secret.py": "secret\n", "root/a.py": "x\n"})
    os.link(tmp_path / "secret.py", tmp_path / "root/hard.py")
    with Root(tmp_path / "root") as root:
        assert root.read("hard.py", 10) == b"secret\n"


def test_no_descriptor_stays_open(tmp_path):
    write_tree(tmp_path, {"a/b/c.py": "x\n"})
    (tmp_path / "a/link").symlink_to("b")
    before = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else os.listdir("/dev/fd")
    with Root(tmp_path) as root:
        for name in ("a/b/c.py", "a/link/c.py", "a/b/none.py", "a/b/c.py/d", "../x", "a/b"):
            root.read(name, 10)
            root.irregular(name)
        root.entries("a/b/")
    after = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else os.listdir("/dev/fd")
    assert len(after) == len(before)


def growing(monkeypatch, path, times):
    """Every read of `path` finds it grown meanwhile, `times` times."""
    fstat, left = os.fstat, [times]

    def later(descriptor):
        found = fstat(descriptor)
        if left[0] and found.st_size == path.stat().st_size:
            left[0] -= 1
            with open(path, "ab") as other:
                other.write(b"more\n")
        return found

    monkeypatch.setattr(opening.os, "fstat", later)


@pytest.mark.parametrize(("times", "found"), [(1, b"x\nmore\n"), (9, "changed while it was read")])
def test_a_file_that_changes_while_it_is_read_is_read_once_more_then_dropped(tmp_path, monkeypatch, times,
                                                                              found):
    write_tree(tmp_path, {"a.py": "x\n"})
    growing(monkeypatch, tmp_path / "a.py", times)
    with Root(tmp_path) as root:
        assert root.read("a.py", 1_000) == found


def test_a_file_of_the_same_size_and_another_time_of_change_has_changed(tmp_path, monkeypatch):
    path = write_tree(tmp_path, {"a.py": "x\n"}) / "a.py"
    fstat = os.fstat
    ticks = iter(range(1, 100))

    def later(descriptor):
        os.utime(path, ns=(0, 10**9 * next(ticks)))
        return fstat(descriptor)

    monkeypatch.setattr(opening.os, "fstat", later)
    with Root(tmp_path) as root:
        assert root.read("a.py", 1_000) == "changed while it was read"


FLIP = """
import os, sys
root, secret, least = sys.argv[1], sys.argv[2], int(sys.argv[3])
os.chdir(root)
def flip_file():                        # the file and a link to the secret take turns under one name
    os.symlink(secret, "link")
    os.replace("link", "sub/a.py")
    os.link("kept.py", "new")
    os.replace("new", "sub/a.py")
def flip_folder():                      # so do the folder and a link to the secret's folder
    os.symlink(os.path.dirname(secret), "link")
    os.rename("sub", "real")
    os.rename("link", "sub")
    os.unlink("sub")
    os.rename("real", "sub")
turns = 0
while turns < least or not os.path.exists("enough"):
    globals()[sys.argv[4]]()
    turns += 1
"""


@pytest.mark.parametrize("flip", ["flip_file", "flip_folder"])
def test_a_file_or_folder_swapped_for_a_link_a_thousand_times_leaks_nothing(tmp_path, flip):
    secret = write_tree(tmp_path / "outside", {"a.py": "CANARY\n"}) / "a.py"
    root = write_tree(tmp_path / "root", {"sub/a.py": "inside\n", "kept.py": "inside\n"})
    seen, careless, wanted = Counter(), set(), {b"inside\n", "symbolic link"}
    began_s = time.monotonic()
    with Root(root) as opened, subprocess.Popen([sys.executable, "-c", FLIP, root, secret, str(FLIPS),
                                                 flip]) as flipper:
        while flipper.poll() is None:
            seen[opened.read("sub/a.py", 100)] += 1
            with contextlib.suppress(OSError):
                careless.add((root / "sub/a.py").read_bytes())
            if (wanted <= seen.keys() and b"CANARY\n" in careless) or time.monotonic() > began_s + 20:
                (root / "enough").touch()
    assert flipper.returncode == 0
    assert b"CANARY\n" in careless          # the race is real: an ordinary read loses it
    assert wanted <= seen.keys() <= wanted | {"missing from the working tree", "changed while it was read"}
