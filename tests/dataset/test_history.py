import os
import re
import subprocess
import time
from collections import Counter

import pytest
from repositories import FUNCTION, git, write_tree

from training.dataset.sources import checkout, gitlog, history, reasons
from training.dataset.sources.checkout import locate

HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+\d+(?:,\d+)? @@")
BASE_S = 1_700_000_000
CODE = FUNCTION.format(name="one")


def commit(root, files, message="a commit", after_s=0):
    """Write files (None: remove), commit everything so long after BASE, and give the commit's id."""
    for name in [name for name, text in files.items() if text is None]:
        (root / name).unlink()
    write_tree(root, {name: text for name, text in files.items() if text is not None})
    git(root, "add", "-A")
    date = f"{BASE_S + after_s} +0000"
    stamp = {**os.environ, "GIT_COMMITTER_DATE": date, "GIT_AUTHOR_DATE": date}
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@example.org", "commit", "-q",
                    "--allow-empty", "--allow-empty-message", "-m", message], cwd=root, env=stamp, check=True)
    return git(root, "rev-parse", "HEAD")


@pytest.fixture
def root(tmp_path):
    git(tmp_path, "init", "-q", "root")
    return tmp_path / "root"


def applied(before, patch):
    """The text that a patch makes of another, read line by line as `patch` does."""
    old = before.split("\n")
    old.pop() if old[-1] == "" else None
    out, at, unended, last = [], 0, False, ""
    for line in patch.removesuffix("\n").split("\n"):
        if found := HUNK.match(line):
            start = int(found[1]) - (found[2] != "0")
            out += old[at:start]
            at = start
        elif line[0] in " -":
            assert old[at] == line[1:]
            at += 1
        if line[0] in " +":
            out.append(line[1:])
        unended = (line[0] == "\\" and last in " +") or (unended and line[0] == "-")
        last = line[0]
    rest = old[at:]
    end = before.endswith("\n") if rest else bool(out) and not unended
    return "\n".join(out + rest) + "\n" * end


def test_a_commit_is_its_message_its_time_and_the_edit_of_each_file(root):
    commit(root, {"a.py": CODE, "b c.py": CODE + "# b\n"}, "The first")
    second = commit(root, {"a.py": CODE.replace("value + 1", "value + 2"), "new é.md": "Some words\n"},
                    "Add two\n\nIt was one.\n\nSigned-off-by: A <a@example.org>\nChange-Id: I12\n", 100)
    newest, _oldest = history.commits(root, 9)
    assert (newest.id, newest.time, newest.message) == (second, BASE_S + 100, "Add two\n\nIt was one.")
    edit, added = newest.changes
    assert (edit.path, edit.before) == ("a.py", CODE)
    assert edit.patch == ("@@ -1,5 +1,5 @@\n def one(value: int) -> int:\n"
                          "     '''Add one to the value and give it back.'''\n-    return value + 1\n"
                          "+    return value + 2\n \n \n")
    assert (added.path, added.before, added.patch) == ("new é.md", "", "@@ -0,0 +1 @@\n+Some words\n")


EDITS = [("", "a = one\n"), ("a = one\n", "a = one\nb = two\n"), ("a = one", "a = one\n"),
         ("a = one\n", "a = two"), ("a = one\nb = two", "c = three\na = one\nb = two"),
         ("".join(f"line number {n}\n" for n in range(99)),
          "".join(f"line number {n}\n" for n in range(99) if n not in (0, 50, 51, 98)) + "the end"),
         ("\ufeffa = one\r\nb = two\r\n", "\ufeffa = one\r\nb = three\r\n"),
         ("a\x0cone\n\n\n", "a\x0cone\n\n"),
         ("-- one\n++ two\n@@ three\ndiff --git x\n", "-- one\n+++ two\n~end-of-commit\ndiff --git y\n")]


@pytest.mark.parametrize(("before", "after"), EDITS)
def test_the_patch_makes_the_new_text_of_the_old_one(root, before, after):
    commit(root, {"a.py": before.encode()} if before else {})
    commit(root, {"a.py": after.encode()})
    change = next(history.commits(root, 1)).changes[0]
    plain = [text.removeprefix("\ufeff").replace("\r\n", "\n") for text in (before, after)]
    assert change.before == plain[0]
    assert applied(change.before, change.patch) == plain[1]


def test_what_is_no_edit_to_train_on_is_left_out_and_counted(root):
    long = "x = '" + "a" * 2_000 + "'\n"
    commit(root, {"gone.py": CODE, "crlf.py": b"a = one\nb = two\n", "move.py": CODE + "# moved\n",
                  "huge.py": CODE * 3_000, "mode.py": CODE + "# mode\n"})
    (root / "link.py").symlink_to("gone.py")
    (root / "mode.py").chmod(0o755)
    (root / "move.py").rename(root / "moved.py")
    commit(root, {"gone.py": None, "crlf.py": b"a = one\r\nb = two\r\n", "a.bin": b"\0", "b.py": b"x\0y\n",
                  "vendor/c.py": "c = 1\n", "yarn.lock": "x\n", "x_pb2.py": "p = 1\n", "long.py": long,
                  "latin.py": b"# \xe9t\xe9\n", "huge.py": CODE * 3_000 + "x = 1\n", "book.ipynb": "{}\n",
                  "large.py": CODE * 2_000, "cr.py": b"a = one\rb = two\rc\n", "numbers.py": "1, 2\n" * 99,
                  "run": "#!/bin/sh\necho one two three\n", "noext": "words and words\n",
                  "made.py": "# Code generated by x. DO NOT EDIT.\nx = 1\n", "LICENSE": "Words\n"})
    skipped = Counter()
    newest = next(history.commits(root, 1, skipped))
    assert [change.path for change in newest.changes] == ["run"]
    assert skipped == {
        "deleted file": 1, "line ends of several kinds": 2, "symbolic link": 1, "no text changed": 2,
        "unknown type": 3, "binary": 1, "vendored": 1, "lock file": 1, "generated": 2, "long lines": 1,
        "not UTF-8": 1, "file over 256 KiB": 1, "patch over 64 KiB": 1, "under 25 % letters": 1,
        "licence text": 1}
    assert all(reasons.advice(reason) for reason in skipped)


def test_a_commit_of_ten_thousand_files_is_counted_and_not_held(root, monkeypatch):
    small = commit(root, {"a.py": CODE})
    names = [f"{number // 100}/{number}.py" for number in range(10_000)]
    blob = git(root, "rev-parse", "HEAD:a.py")
    subprocess.run(["git", "update-index", "--index-info"], cwd=root, check=True,
                   input="".join(f"100644 {blob} 0\t{name}\n" for name in names).encode())
    git(root, "commit", "-qm", "everything")
    asked = []
    monkeypatch.setattr(gitlog, "patches", lambda process, name, real=gitlog.patches:
                        asked.append(name) or real(process, name))
    skipped = Counter()
    assert [found.id for found in history.commits(root, 9, skipped)] == [small]
    assert (skipped, asked) == ({"commit over 64 files": 1}, [small])


def test_merges_and_empty_commits_are_left_out_and_the_limit_counts_what_is_given(root):
    commit(root, {"a.py": CODE}, "first")
    git(root, "checkout", "-qb", "side")
    commit(root, {"b.py": CODE + "# b\n"}, "side", 10)
    git(root, "checkout", "-q", "main")
    commit(root, {"c.py": CODE + "# c\n"}, "main", 20)
    git(root, "merge", "-q", "--no-edit", "side")
    commit(root, {}, "nothing", 30)
    skipped = Counter()
    assert [found.message for found in history.commits(root, 2, skipped)] == ["main", "side"]
    assert skipped == {"commit with no change left": 1}
    assert history.count(root) == 4
    assert list(history.commits(root, 0)) == []


def test_files_are_dated_by_the_commit_that_added_them_through_renames(root):
    commit(root, {"a.py": CODE * 3, "b\n.py": CODE + "# b\n"}, after_s=100)
    commit(root, {"a.py": CODE * 3 + "x = 1\n", "c.py": "c = 1\n"}, after_s=200)
    commit(root, {"a.py": None, "sub/moved.py": CODE * 3 + "x = 2\n", "c.py": None}, after_s=300)
    commit(root, {"c.py": "c = 2  # anew\n"}, after_s=400)
    found = history.created(root)
    assert {name: found[name] - BASE_S for name in ("sub/moved.py", "b\\x0a.py", "c.py")} == {
        "sub/moved.py": 100, "b\\x0a.py": 100, "c.py": 400}
    assert history.created(root / "sub") == {"moved.py": BASE_S + 300}     # what lay outside is not told
    newest = next(found for found in history.commits(root / "sub", 1))
    assert [change.path for change in newest.changes] == ["moved.py"]


def test_a_folder_without_git_an_empty_repository_and_no_git_have_no_history(tmp_path, root, monkeypatch):
    plain = write_tree(tmp_path / "plain", {"a.py": CODE})
    for folder in (plain, root):
        assert (history.count(folder), history.created(folder)) == (0, {})
        assert list(history.commits(folder, 9)) == []
    assert (history.is_repository(plain), history.is_repository(root)) == (False, True)
    commit(root, {"a.py": CODE})
    monkeypatch.setenv("PATH", "")
    assert (history.count(root), history.created(root), list(history.commits(root, 9))) == (0, {}, [])


def test_a_shallow_clone_has_the_commits_whose_parents_are_there(root, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for number in range(4):
        commit(root, {f"{number}.py": FUNCTION.format(name=f"f{number}")}, f"number {number}", 100 + number)
    monkeypatch.setattr(checkout, "CLONE_DEPTH", 1)
    once = locate(root.as_uri())
    assert (history.count(once), list(history.commits(once, 9))) == (0, [])
    monkeypatch.setattr(checkout, "CLONE_DEPTH", 3)
    clone = locate(root.as_uri())
    skipped = Counter()
    assert [found.message for found in history.commits(clone, 9, skipped)] == ["number 3", "number 2"]
    assert (skipped, history.count(clone)) == ({"oldest commit of a shallow clone": 1}, 2)
    assert {name: seconds - BASE_S for name, seconds in history.created(clone).items()} == {
        "0.py": 101, "1.py": 101, "2.py": 102, "3.py": 103}


def test_a_history_that_breaks_off_gives_what_came_before_and_says_so(root):
    commit(root, {"a.py": CODE}, "first", 100)
    commit(root, {"a.py": CODE + "x = 1\n"}, "second", 200)
    tree = git(root, "rev-parse", "HEAD~1^{tree}")
    commit(root, {"c.py": CODE + "# c\n"}, "third", 300)
    commit(root, {"b.py": CODE + "# b\n"}, "fourth", 400)
    lost = root / ".git" / "objects" / tree[:2] / tree[2:]
    lost.chmod(0o600)
    lost.write_bytes(b"not an object")
    skipped = Counter()
    assert [found.message for found in history.commits(root, 9, skipped)] == ["fourth"]
    assert skipped == {"history not read to its end": 1}
    assert history.created(root) == {"b.py": BASE_S + 400}


def test_git_that_gives_nothing_is_ended_and_a_slow_reader_is_no_stall(root, tmp_path, monkeypatch):
    commit(root, {"a.py": CODE}, "first", 100)
    commit(root, {"a.py": CODE + "x = 1\n"}, "second", 200)
    monkeypatch.setattr(gitlog, "STALL_S", 0.4)
    found = history.commits(root, 9)
    assert next(found).message == "second"
    time.sleep(1.0)
    assert next(found).message == "first"
    found.close()
    monkeypatch.setattr(gitlog, "PATCHES", ("cat-file", "--batch-check", "--buffer"))   # answers at the end
    skipped = Counter()
    assert list(history.commits(root, 9, skipped)) == []
    assert skipped == {"history not read to its end": 1}


def test_closing_early_leaves_no_process(root):
    for number in range(3):
        commit(root, {"a.py": CODE + f"x = {number}\n"})
    found = history.commits(root, 9)
    next(found)
    processes = found.gi_frame.f_locals["git"]._processes
    assert [process.poll() for process in processes[1:]] == [None, None]
    found.close()
    assert all(process.returncode is not None for process in processes)
