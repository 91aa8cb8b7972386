import os
import subprocess
from pathlib import Path

import pytest
from repositories import FUNCTION, write_tree

from training.dataset import DatasetGenerator
from training.dataset.sources.checkout import check_url, locate, without_password
from training.dataset.sources.filters import verdict_on_name, verdict_on_text
from training.dataset.sources.languages import of_name, of_shebang
from training.dataset.sources.repository import Survey, notebook_text, survey
from training.errors import DataError, MissingInput, UsageError

CODE = FUNCTION.format(name="code")


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@example.org", *arguments], cwd=folder,
                   check=True,
                   capture_output=True)


def reason_of(found: Survey, path: str) -> str:
    return next((item.reason for item in found.dropped if item.path == path), "")


def test_a_repository_that_is_not_there_a_file_or_no_name_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(MissingInput, match=r"does not exist; give a folder or a git URL"):
        DatasetGenerator.survey(str(tmp_path / "nowhere"))
    (tmp_path / "one.py").write_text(CODE)
    with pytest.raises(MissingInput, match="is a file; give the folder that holds it"):
        DatasetGenerator.survey(str(tmp_path / "one.py"))
    with pytest.raises(UsageError, match="reads like a flag"):
        DatasetGenerator.survey("--upload-pack=touch /tmp/x")
    with pytest.raises(UsageError, match="No repository was named"):
        DatasetGenerator.survey(" ")


def test_an_unreadable_repository_is_missing_input(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(MissingInput, match=r"cannot be read: Permission denied"):
        DatasetGenerator.survey(str(tmp_path))


def test_an_empty_repository_and_one_without_code_say_what_was_found(tmp_path):
    with pytest.raises(DataError, match="is empty"):
        DatasetGenerator.survey(str(tmp_path))
    write_tree(tmp_path, {"a.png": b"\x89PNG\0", "b.png": b"\x89PNG\0\1", "README.md": "words " * 40})
    with pytest.raises(DataError, match=r"no code.*1 documents.*2 unknown type"):
        DatasetGenerator.survey(str(tmp_path))


def test_a_repository_with_a_few_bytes_is_too_little(tmp_path):
    write_tree(tmp_path, {"a.py": "x = one\n"})
    with pytest.raises(DataError, match=r"holds 8 bytes of text; the least is 64"):
        DatasetGenerator.survey(str(tmp_path))


def test_facts_count_seen_accepted_and_bytes_by_language(tmp_path):
    write_tree(tmp_path,
               {"a.py": CODE, "b.go": "package main\n\nfunc main() { println(\"hello\") }\n", "c.bin": b"\0"})
    facts = DatasetGenerator.survey(str(tmp_path))
    assert (facts.files, facts.code_files, facts.name) == (3, 2, tmp_path.name)
    assert facts.languages == {"python": len(CODE), "go": 47}
    assert facts.code_bytes == len(CODE) + 47


def test_hostile_files_are_dropped_with_a_reason_and_never_opened(tmp_path):
    write_tree(tmp_path,
               {"good.py": CODE, "binary.py": b"x = 1\0\n", "latin.py": "s = 'é'\n".encode("latin-1"),
                          "line.py": "x = '" + "a" * 100_000 + "'\n", "big.py": CODE * 20_000})
    (tmp_path / "passwd.py").symlink_to("/etc/passwd")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "etc").symlink_to("/etc")
    os.mkfifo(tmp_path / "pipe.py")
    found = survey(tmp_path)
    assert [source.path for source in found.sources] == ["good.py"]
    expected = {"binary.py": "binary", "latin.py": "not UTF-8", "line.py": "long lines",
                "passwd.py": "symbolic link",
                "loop": "symbolic link", "etc": "symbolic link", "pipe.py": "no regular file",
                "big.py": "over 1,048,576 bytes"}
    assert {path: reason_of(found, path) for path in expected} == expected


def test_a_tracked_file_below_a_folder_that_became_a_symbolic_link_is_not_read(tmp_path):
    outside = write_tree(tmp_path / "outside", {"a.py": CODE + "# outside\n"})
    root = write_tree(tmp_path / "root", {"sub/a.py": CODE, "b.py": FUNCTION.format(name="other")})
    git(root, "init", "-q")
    git(root, "add", ".")
    (root / "sub" / "a.py").unlink()
    (root / "sub").rmdir()
    (root / "sub").symlink_to(outside)
    found = survey(root)
    assert [source.path for source in found.sources] == ["b.py"]
    assert reason_of(found, "sub/a.py") == "symbolic link"


@pytest.mark.parametrize("use_git", [False, True])
def test_strange_names_are_read_and_shown_on_one_line(tmp_path, use_git):
    names = ["with space.py", "new\nline.py", "-leading.py", "ünïcode.py", "日本.py", "quote'\".py"]
    write_tree(tmp_path, {name: FUNCTION.format(name=f"f{index}") for index, name in enumerate(names)})
    (tmp_path / os.fsdecode(b"raw\xff.py")).write_text(FUNCTION.format(name="raw"))
    if use_git:
        git(tmp_path, "init", "-q")
    shown = {source.path for source in survey(tmp_path).sources}
    assert shown == {"with space.py", "new\\x0aline.py", "-leading.py", "ünïcode.py", "日本.py",
                     "quote'\".py", "raw\\xff.py"}


def test_line_ends_and_byte_order_marks_are_made_alike(tmp_path):
    write_tree(tmp_path, {"a.py": b"\xef\xbb\xbf" + CODE.replace("\n", "\r\n").encode(), "b.py": CODE})
    found = survey(tmp_path)
    assert [source.text for source in found.sources] == [CODE]
    assert reason_of(found, "b.py") == "duplicate"


def test_git_decides_which_files_count(tmp_path):
    write_tree(tmp_path, {"kept.py": CODE, "new.py": FUNCTION.format(name="new"), ".gitignore": "secret.py\n",
                          "secret.py": FUNCTION.format(name="hidden")})
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "kept.py")
    found = survey(tmp_path)
    assert [source.path for source in found.sources] == ["kept.py", "new.py"]
    assert not reason_of(found, "secret.py")


def test_a_plain_folder_follows_its_own_gitignore_files_and_leaves_tool_folders_out(tmp_path):
    write_tree(tmp_path,
               {"kept.py": CODE, ".gitignore": "*.gen.py\nout/\n", "a.gen.py": FUNCTION.format(name="a"),
                          "sub/.gitignore": "!b.gen.py\n", "sub/b.gen.py": FUNCTION.format(name="b"),
                          "out/c.py": FUNCTION.format(name="c"), "node_modules/d.js": "let d = 1\n" * 20,
                          "old/pyvenv.cfg": "home = /usr\n", "old/lib/e.py": FUNCTION.format(name="e")})
    found = survey(tmp_path)
    assert [source.path for source in found.sources] == ["kept.py", "sub/b.gen.py"]
    assert {reason_of(found, path)
            for path in ("a.gen.py", "out", "node_modules", "old/lib/e.py")} == {"ignored by rule"}


def test_the_output_of_an_earlier_run_is_no_source(tmp_path):
    write_tree(tmp_path,
               {"a.py": CODE, "runs/x/plan.json": "{\"a\": 1}", "runs/x/ds_config.json": "{\"b\": 1}",
                          "runs/x/model/code.py": FUNCTION.format(name="copied")})
    assert [source.path for source in survey(tmp_path).sources] == ["a.py"]


def test_a_repository_own_commands_are_not_run(tmp_path):
    write_tree(tmp_path, {"a.py": CODE})
    git(tmp_path, "init", "-q")
    mark = tmp_path / "mark"
    git(tmp_path, "config", "core.fsmonitor", f"touch {mark}")
    assert survey(tmp_path).sources
    assert not mark.exists()


def test_a_folder_that_the_surrounding_repository_ignores_is_walked(tmp_path):
    write_tree(tmp_path, {".gitignore": "lib/\n", "lib/a.py": CODE})
    git(tmp_path, "init", "-q")
    assert [source.path for source in survey(tmp_path / "lib").sources] == ["a.py"]


def test_a_git_url_is_cloned_once_and_refreshed(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    origin = write_tree(tmp_path / "origin", {"a.py": CODE})
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        git(origin, *arguments)
    facts = DatasetGenerator.survey(origin.as_uri())
    assert (facts.name, facts.code_files) == ("origin", 1)
    write_tree(origin, {"b.py": FUNCTION.format(name="b")})
    git(origin, "add", ".")
    git(origin, "commit", "-qm", "two")
    assert DatasetGenerator.survey(origin.as_uri()).code_files == 2
    assert locate(origin.as_uri(), refresh=False) == Path(facts.path)


def test_a_url_that_cannot_be_cloned_leaves_nothing_and_hides_the_password(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(MissingInput, match="Cannot clone") as caught:
        locate((tmp_path / "nowhere").as_uri())
    assert "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()
                or path.name.startswith(".")]
    assert without_password("fatal: https://a:b@example.org/x") == "fatal: https://example.org/x"


@pytest.mark.parametrize("url", ["ext::sh -c touch", "ftp://example.org/a", "http://example.org/a",
                                 "ssh://-oProxyCommand=touch/a", "https:///a", "file://x/-a", "https://[::1"])
def test_urls_that_git_could_take_for_commands_are_refused(url):
    with pytest.raises((UsageError, MissingInput)):
        check_url(url) if "://" in url else locate(url)


@pytest.mark.parametrize(("name", "language"), [
    ("a.py", "python"), ("a.ts", "typescript"), ("a.js", "javascript"), ("A.java", "java"), ("a.go", "go"),
    ("a.rs", "rust"), ("a.c", "c"), ("a.hpp", "cpp"), ("a.cs", "csharp"), ("a.rb", "ruby"), ("a.php", "php"),
    ("a.swift", "swift"), ("a.kt", "kotlin"), ("a.scala", "scala"), ("a.lua", "lua"), ("a.pl", "perl"),
    ("a.r", "r"),
    ("a.jl", "julia"), ("a.hs", "haskell"), ("a.ex", "elixir"), ("a.dart", "dart"), ("a.sh", "shell"),
    ("Dockerfile", "docker"), ("a.sql", "sql"), ("a.zig", "zig"), ("a.rst", "restructuredtext")])
def test_languages_are_told_by_name(name, language):
    assert of_name(name).name == language


@pytest.mark.parametrize(("line", "language"), [
    ("#!/usr/bin/env python3", "python"), ("#!/bin/sh", "shell"),
    ("#!/usr/bin/env -S node --x", "javascript"),
    ("#!/usr/bin/perl -w", "perl"), ("#!/usr/local/bin/ruby", "ruby")])
def test_scripts_without_extension_are_told_by_their_first_line(tmp_path, line, language):
    assert of_shebang(line).name == language
    write_tree(tmp_path, {"run": f"{line}\n" + CODE})
    assert survey(tmp_path).sources[0].language == language


@pytest.mark.parametrize(("path", "reason"), [
    ("a/vendor/x.go", "vendored"), ("third_party/y.c", "vendored"), ("jquery.min.js", "minified"),
    ("x_pb2.py", "generated"), ("api.pb.go", "generated"), ("package-lock.json", "lock file"),
    ("LICENSE", "licence text"),
    ("src/licence_check.py", ""), ("vendor.py", ""), ("minimum.js", "")])
def test_names_that_tell_enough(path, reason):
    assert verdict_on_name(path) == reason


@pytest.mark.parametrize(("text", "kind", "reason"), [
    ("// Code generated by stringer; DO NOT EDIT.\npackage x\n", "code", "generated"),
    ("# This file was automatically generated from a.tmpl\nx = 1\n", "code", "generated"),
    ("text = 'code generated by hand'\n" * 3, "code", ""),
    ("x = '" + "ab" * 600 + "'\n", "code", "long lines"),
    (("word " * 60 + "\n") * 5, "code", "long lines"),
    ('"""' + "word " * 25 + '"""\n', "code", ""),
    (("word " * 300 + "\n") * 5, "docs", ""),
    ("1, 2, 3, 4, 5, 6, 7,\n" * 20, "code", "under 25 % letters"),
    ("名前は何ですか\n" * 5, "docs", ""),
    ("key: value\n" * 7_000, "config", "data over 64 KiB"),
    (" \n\n", "code", "empty")])
def test_texts_are_left_out_for_a_reason_or_kept(text, kind, reason):
    assert verdict_on_text(text, kind) == reason


def test_a_notebook_gives_its_cells_without_outputs():
    text = ('{"cells": [{"cell_type": "markdown", "source": ["# Title\\n", "words"]},'
            ' {"cell_type": "code", "source": "x = 1\\n", "outputs": [{"data": "NOISE"}]}]}')
    assert notebook_text(text) == "# # Title\n# words\n\nx = 1\n"
    assert notebook_text("[1, 2]") == notebook_text("{") == ""
