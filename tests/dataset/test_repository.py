import codecs
import os
import re
import time
from pathlib import Path

import pytest
from repositories import FUNCTION, git, read_tree, write_tree

from training.dataset import DatasetGenerator
from training.dataset.sources import checkout, filters, gitlog, history, reasons
from training.dataset.sources.checkout import check_url, locate
from training.dataset.sources.filters import verdict_on_name, verdict_on_text
from training.dataset.sources.languages import of_name, of_shebang
from training.dataset.sources.listing import MAX_FOLDER_DEPTH
from training.dataset.sources.repository import Counts, Dropped, advice, check, list_repository
from training.dataset.sources.texts import decode, notebook_text
from training.errors import DataError, MissingInput, UsageError
from training.texts import without_password

CODE = FUNCTION.format(name="code")


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


def test_when_little_is_left_the_counts_the_limit_and_the_way_out_are_told():
    dropped = Dropped(path="b.py", reason="over 10 bytes")
    counts = Counts()
    for _ in range(3):
        counts.add(dropped)
    with pytest.raises(DataError) as caught:
        check("/r", counts)
    assert str(caught.value) == (
        "The repository /r holds no code to train on: 0 documents or settings and no code; left out: "
        "3 over 10 bytes. Most often left out as over 10 bytes: Raise the limit: "
        "`--set dataset.max_file_bytes=BYTES`.")
    assert (counts.files, counts.reasons) == (3, {"over 10 bytes": 3})


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
    sources, dropped = read_tree(tmp_path)
    assert [source.path for source in sources] == ["good.py"]
    expected = {"binary.py": "binary", "latin.py": "not UTF-8", "line.py": "long lines",
                "passwd.py": "symbolic link",
                "loop": "symbolic link", "etc": "symbolic link", "pipe.py": "no regular file",
                "big.py": "over 1,048,576 bytes"}
    assert dropped == expected


def test_a_tracked_file_below_a_folder_that_became_a_symbolic_link_is_not_read(tmp_path):
    outside = write_tree(tmp_path / "outside", {"a.py": CODE + "# outside\n"})
    root = write_tree(tmp_path / "root", {"sub/a.py": CODE, "b.py": FUNCTION.format(name="other")})
    git(root, "init", "-q")
    git(root, "add", ".")
    (root / "sub" / "a.py").unlink()
    (root / "sub").rmdir()
    (root / "sub").symlink_to(outside)
    sources, dropped = read_tree(root)
    assert [source.path for source in sources] == ["b.py"]
    assert dropped["sub/a.py"] == "symbolic link"


@pytest.mark.parametrize("use_git", [False, True])
def test_strange_names_are_read_and_shown_on_one_line(tmp_path, use_git):
    names = ["with space.py", "new\nline.py", "-leading.py", "ünïcode.py", "日本.py", "quote'\".py"]
    write_tree(tmp_path, {name: FUNCTION.format(name=f"f{index}") for index, name in enumerate(names)})
    (tmp_path / os.fsdecode(b"raw\xff.py")).write_text(FUNCTION.format(name="raw"))
    if use_git:
        git(tmp_path, "init", "-q")
    shown = {source.path for source in read_tree(tmp_path)[0]}
    assert shown == {"with space.py", "new\\x0aline.py", "-leading.py", "ünïcode.py", "日本.py",
                     "quote'\".py", "raw\\xff.py"}


def test_line_ends_and_byte_order_marks_are_made_alike(tmp_path):
    write_tree(tmp_path, {"a.py": b"\xef\xbb\xbf" + CODE.replace("\n", "\r\n").encode(), "b.py": CODE})
    sources, dropped = read_tree(tmp_path)
    assert [source.text for source in sources] == [CODE, CODE]
    assert not dropped


def test_git_decides_which_files_count(tmp_path):
    write_tree(tmp_path, {"kept.py": CODE, "new.py": FUNCTION.format(name="new"), ".gitignore": "secret.py\n",
                          "secret.py": FUNCTION.format(name="hidden")})
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "kept.py")
    sources, dropped = read_tree(tmp_path)
    assert [source.path for source in sources] == ["kept.py", "new.py"]
    assert "secret.py" not in dropped


def test_a_plain_folder_follows_its_own_gitignore_files_and_leaves_tool_folders_out(tmp_path):
    write_tree(tmp_path,
               {"kept.py": CODE, ".gitignore": "*.gen.py\nout/\n", "a.gen.py": FUNCTION.format(name="a"),
                          "sub/.gitignore": "!b.gen.py\n", "sub/b.gen.py": FUNCTION.format(name="b"),
                          "out/c.py": FUNCTION.format(name="c"), "node_modules/d.js": "let d = 1\n" * 20,
                          "old/pyvenv.cfg": "home = /usr\n", "old/lib/e.py": FUNCTION.format(name="e")})
    sources, dropped = read_tree(tmp_path)
    assert [source.path for source in sources] == ["kept.py", "sub/b.gen.py"]
    ignored = ("a.gen.py", "out", "node_modules", "old/lib/e.py")
    assert {dropped[path] for path in ignored} == {"ignored by rule"}


def test_the_output_of_an_earlier_run_is_no_source(tmp_path):
    write_tree(tmp_path,
               {"a.py": CODE, "runs/x/plan.json": "{\"a\": 1}", "runs/x/ds_config.json": "{\"b\": 1}",
                          "runs/x/model/code.py": FUNCTION.format(name="copied")})
    assert [source.path for source in read_tree(tmp_path)[0]] == ["a.py"]


def test_a_repository_own_commands_are_not_run(tmp_path):
    write_tree(tmp_path, {"a.py": CODE})
    git(tmp_path, "init", "-q")
    mark = tmp_path / "mark"
    git(tmp_path, "config", "core.fsmonitor", f"touch {mark}")
    assert read_tree(tmp_path)[0]
    assert not mark.exists()


def test_a_folder_that_the_surrounding_repository_ignores_is_walked(tmp_path):
    write_tree(tmp_path, {".gitignore": "lib/\n", "lib/a.py": CODE})
    git(tmp_path, "init", "-q")
    assert [source.path for source in read_tree(tmp_path / "lib")[0]] == ["a.py"]


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


def test_a_clone_has_a_thousand_commits_and_one_of_depth_1_becomes_as_deep(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(checkout, "CLONE_DEPTH", 1)
    origin = write_tree(tmp_path / "origin", {"a.py": CODE})
    git(origin, "init", "-q")
    git(origin, "add", ".")
    for number in range(3):
        git(origin, "commit", "-qm", f"commit {number}", "--allow-empty")
    clone = locate(origin.as_uri())
    assert git(clone, "rev-list", "--count", "HEAD") == "1"
    monkeypatch.setattr(checkout, "CLONE_DEPTH", 1_000)
    assert locate(origin.as_uri(), refresh=False) == locate(origin.as_uri()) == clone
    assert git(clone, "rev-list", "--count", "HEAD") == "3"


def test_a_bare_repository_is_cloned_since_it_has_no_files_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    origin = write_tree(tmp_path / "origin", {"a.py": CODE})
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        git(origin, *arguments)
    git(tmp_path, "clone", "-q", "--bare", "origin", "with space é.git")
    found = locate(str(tmp_path / "with space é.git"))
    assert found.is_relative_to(tmp_path / "cache")
    assert [source.path for source in read_tree(found)[0]] == ["a.py"]


def test_a_submodule_and_a_nested_repository_are_named(tmp_path):
    inner = write_tree(tmp_path / "inner", {"a.py": CODE})
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        git(inner, *arguments)
    outer = write_tree(tmp_path / "outer", {"b.py": CODE})
    git(outer, "init", "-q")
    git(outer, "-c", "protocol.file.allow=always", "submodule", "add", "-q", str(inner), "sub")
    git(outer, "clone", "-q", str(inner), "nested")
    sources, dropped = read_tree(outer)
    assert [source.path for source in sources] == ["b.py"]
    assert (dropped["sub"], dropped["nested/"]) == ("submodule", "nested repository")


def test_a_linked_work_tree_is_git_and_a_git_file_that_leads_elsewhere_is_not(tmp_path):
    main = write_tree(tmp_path / "main", {"a.py": CODE, ".gitignore": "out.py\n"})
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        git(main, *arguments)
    git(main, "worktree", "add", "-q", str(tmp_path / "linked"))
    assert list_repository(tmp_path / "linked").is_git
    assert history.count(tmp_path / "linked") == 1
    for index, target in enumerate((main / ".git", main / ".git" / "worktrees" / "linked")):
        other = write_tree(tmp_path / f"other{index}", {"b.py": CODE, ".git": f"gitdir: {target}\n"})
        listing = list_repository(other)
        assert (listing.is_git, listing.names) == (False, ("b.py",))
        assert (history.count(other), history.created(other)) == (0, {})
    (main / ".git" / "refs" / "heads" / "linkto").symlink_to(main / ".git" / "HEAD")
    assert not list_repository(main).is_git


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
    assert read_tree(tmp_path)[0][0].language == language


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


@pytest.mark.parametrize(("data", "text"), [
    (b"\xef\xbb\xbfa\r\nb\rc\n", "a\nb\nc\n"), (b"\xef\xbb\xbf", ""), (b"", ""),
    ("x = 'é'\n".encode("utf-16"), "x = 'é'\n"), (codecs.BOM_UTF16_BE + "é\n".encode("utf-16-be"), "é\n"),
    ("x\r\n".encode("utf-32"), "x\n"), (codecs.BOM_UTF16_LE, ""),
    ("# -*- coding: latin-1 -*-\nx = 'é'\n".encode("latin-1"), "# -*- coding: latin-1 -*-\nx = 'é'\n"),
    ("#!/bin/sh\n# vim: set fileencoding=koi8-r :\n# я\n".encode("koi8-r"),
     "#!/bin/sh\n# vim: set fileencoding=koi8-r :\n# я\n"),
    ('<?xml version="1.0" encoding="ISO-8859-1"?>\n<é/>\n'.encode("latin-1"),
     '<?xml version="1.0" encoding="ISO-8859-1"?>\n<é/>\n')])
def test_text_is_decoded_as_its_mark_or_its_first_lines_say(data, text):
    assert decode(data) == (text, "")


@pytest.mark.parametrize(("data", "reason"), [
    ("x = 'é'\n".encode("latin-1"), "not UTF-8"), (b"a\0b", "binary"), (b"\xff\xfea\0b", "binary"),
    (codecs.BOM_UTF16_LE + b"a\0\0\0", "binary"), (codecs.BOM_UTF16_LE + b"\0\xd8", "binary"),
    (codecs.BOM_UTF32_LE + b"\xff" * 4, "binary"), (b"\x1b[31m" + b"\x01\x02" * 9, "binary"),
    (b"\xed\xa0\x80", "not UTF-8"), (b"# coding: zlib\n\xe9", "not UTF-8"),
    (b"# coding: no-such\n\xe9", "not UTF-8"), (b"# coding: utf-7\n\xe9", "not UTF-8"),
    (b"1\n2\n# coding: latin-1\n\xe9", "not UTF-8"), (b"# coding: unicode_escape\n\xe9", "not UTF-8"),
    (b"# coding: \xe9\n", "not UTF-8"), (b"# coding: " + b"a" * 9_999 + b"\xe9", "not UTF-8")])
def test_what_is_no_text_or_does_not_say_its_encoding_is_never_guessed(data, reason):
    assert decode(data) == ("", reason)


def test_every_reason_has_its_advice_in_one_sentence():
    named = {value for name, value in vars(reasons).items() if name.isupper() and isinstance(value, str)}
    named |= {gitlog.TOO_MANY, gitlog.PATCH_TOO_LARGE, gitlog.BLOB_TOO_LARGE, reasons.over(77)}
    named |= set(re.findall(r'(?:return|else) "([^"]+)"', Path(filters.__file__).read_text()))
    named |= {f"data over {filters.MAX_CONFIG_BYTES >> 10} KiB", f"over {MAX_FOLDER_DEPTH} folders deep"}
    assert {"long lines", "generated", "vendored", "minified", "licence text", "empty",
            "under 25 % letters"} <= named
    for reason in named:
        told = advice(reason)
        assert re.fullmatch(r"[A-Z`].*[.]", told) or told.startswith("git "), f"{reason!r}: {told!r}"
        assert "\n" not in told
    assert advice("nobody's reason") == ""


def test_an_ignore_rule_with_many_stars_ends_soon_and_leaves_out_at_least_as_much(tmp_path):
    write_tree(tmp_path, {".gitignore": "*a" * 12 + "b\n!" + "*a" * 12 + "\n**/*.log\n", "a" * 200: CODE,
                          "a" * 200 + "b": CODE, "kept.py": CODE, "x/y.log": CODE})
    began = time.process_time()
    sources, dropped = read_tree(tmp_path)
    assert time.process_time() - began < 2
    assert [source.path for source in sources] == ["kept.py"]
    assert dropped["a" * 200 + "b"] == dropped["x/y.log"] == "ignored by rule"
    assert dropped["a" * 200] == "unknown type"


def test_ignore_rules_that_are_too_many_leave_their_folder_out(tmp_path):
    write_tree(tmp_path, {"sub/.gitignore": "x\n" * 5_000, "sub/a.py": CODE, "b.py": CODE,
                          "long/.gitignore": b"#" * 300_000, "long/c.py": CODE})
    sources, dropped = read_tree(tmp_path)
    assert [source.path for source in sources] == ["b.py"]
    assert dropped["sub/"] == dropped["long/"] == "ignore rules too large"


def test_a_notebook_gives_its_cells_without_outputs():
    text = ('{"cells": [{"cell_type": "markdown", "source": ["# Title\\n", "words"]},'
            ' {"cell_type": "code", "source": "x = 1\\n", "outputs": [{"data": "NOISE"}]}]}')
    assert notebook_text(text) == "# # Title\n# words\n\nx = 1\n"
    assert notebook_text("[1, 2]") == notebook_text("{") == ""
    half = '{"cells": [{"cell_type": "code", "source": "x = \'\\ud800\'"}]}'
    assert notebook_text(half) == "x = '?'\n"
