"""Spans to complete: whole nodes on whole lines, text that stands in the file, the same ones every time."""

import ast
import email
import random
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from training.dataset.completions import completion_spans
from training.dataset.sources.repository import SourceFile

GO = """package main

import "fmt"

// Sum adds the numbers of a list, whatever their sign may be.
func Sum(numbers []int) int {
\ttotal := 0 // nothing yet
\tfor _, number := range numbers {
\t\ttotal += number
\t}
\treturn total
}

func main() {
\tfmt.Println(
\t\t"čísla:",
\t\tSum([]int{1, 2, 3}),
\t)
}
"""


def source(path, text, language="go", kind="code"):
    return SourceFile(path=path, language=language, kind=kind, text=text)


def nodes(text, *parts):
    """A structure whose nodes are these texts, each found once."""
    data = text.encode()
    spans = []
    for part in parts:
        assert data.count(part.encode()) == 1, part
        spans.append((start := data.index(part.encode()), start + len(part.encode())))
    return SimpleNamespace(spans=np.array(sorted(spans), dtype=np.int32).reshape(-1, 2))


def python_nodes(text):
    """Every statement of a Python text that the parser reads."""
    starts = np.cumsum([0, *(len(line) + 1 for line in text.encode().split(b"\n"))])
    spans = [(starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset)
             for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt)]
    return SimpleNamespace(spans=np.array(sorted(spans), dtype=np.int32))


def test_middles_of_other_languages_are_whole_nodes():
    parts = ["total := 0", "for _, number := range numbers {\n\t\ttotal += number\n\t}", "total += number",
             "return total", "Sum([]int{1, 2, 3})", '"čísla:"',
             'fmt.Println(\n\t\t"čísla:",\n\t\tSum([]int{1, 2, 3}),\n\t)', "numbers []int",
             "int {\n\ttotal := 0", 'import "fmt"',
             "// Sum adds the numbers of a list, whatever their sign may be."]
    spans = completion_spans([source("a.go", GO)], {"a.go": nodes(GO, *parts)}, 1)
    # Four lines are too long, some do not stand alone on their lines, one is a string, one a comment, and too
    # little stands before the import.
    assert {span["middle"] for span in spans} == {
        "\ttotal := 0 // nothing yet", "\tfor _, number := range numbers {\n\t\ttotal += number\n\t}",
        "\t\ttotal += number", "\treturn total", "\t\tSum([]int{1, 2, 3}),"}
    assert len(spans) == 5
    for span in spans:
        assert span["prefix"] + span["middle"] + span["suffix"] == GO
        assert (span["kind"], span["parses"], span["language"]) == ("node", None, "go")
        assert span["header"] == "# path: a.go\n"


def test_prefix_and_suffix_are_whole_lines_and_bounded():
    text = "".join(f"static int value_{number:04d} = {number};\n" for number in range(2_000))
    middle = "static int value_1000 = 1000;"
    span, = completion_spans([source("a.c", text, "c")], {"a.c": nodes(text, middle)}, 1)
    assert span["middle"] == middle
    assert span["prefix"] + middle + span["suffix"] in text
    assert span["prefix"].startswith("static int value_0")
    assert span["suffix"].endswith(";\n")
    for side in ("prefix", "suffix"):
        assert 1_900 < len(span[side]) <= 2_000


def test_python_spans_are_nodes_of_a_program_that_is_given_whole():
    files = [source(f"email/{path.name}", path.read_text(), "python")
             for path in sorted(Path(email.__file__).parent.glob("*.py"))]
    texts = {item.path: item.text for item in files}
    spans = completion_spans(files, {path: python_nodes(text) for path, text in texts.items()}, 1)
    assert len(spans) == 64
    whole = [span for span in spans if span["kind"] == "node"]
    assert len(whole) > 50
    for span in whole:
        assert span["prefix"] + span["middle"] + span["suffix"] in texts[span["path"]]
        assert span["parses"] is True
        ast.parse(span["prefix"] + span["middle"] + span["suffix"])
        assert len(span["middle"].split("\n")) <= 3
        assert 60 <= len(span["prefix"]) <= 2_000
        assert not span["prefix"].startswith((" ", "\n"))
        lines = span["middle"].split("\n")
        indent = len(lines[0]) - len(lines[0].lstrip())
        ast.parse("if 1:\n " + "\n ".join(lines) if not indent else "if 1:\n" + span["middle"])
    assert {span["parses"] for span in spans if span["kind"] == "lines"} <= {False}


def test_without_a_structure_lines_are_completed():
    for structures in ({}, {"a.go": SimpleNamespace(spans=np.empty((0, 2), dtype=np.int32))}):
        spans = completion_spans([source("a.go", GO)], structures, 1)
        assert len(spans) == 8
        for span in spans:
            assert (span["kind"], span["parses"]) == ("lines", None)
            assert span["prefix"] + span["middle"] + span["suffix"] == GO
            assert 1 <= len(span["middle"].split("\n")) <= 3
            assert span["middle"].split("\n")[0].strip()
    broken = completion_spans([source("a.py", "def f(:\n    return 12345\n", "python")], {}, 1)
    assert [span["parses"] for span in broken] == [False]


def many(count):
    return [source(f"{number:03d}.go", GO.replace("Sum", f"Sum{number}")) for number in range(count)]


def test_files_take_turns_and_their_order_does_not_matter():
    files = many(20)
    spans = completion_spans(files, {}, 3)
    assert len(spans) == 64
    assert [span["path"] for span in spans] == [*[item.path for item in files] * 3,
                                                *[item.path for item in files][:4]]
    shuffled = files.copy()
    random.Random(1).shuffle(shuffled)
    assert completion_spans(iter(shuffled), {}, 3) == spans
    assert completion_spans(files, {}, 4) != spans
    assert len(completion_spans(files[:2], {}, 3)) == 16


def test_of_many_files_some_are_drawn_from_all_over():
    files = many(400)
    spans = completion_spans(files, {}, 3)
    paths = [span["path"] for span in spans]
    assert len(set(paths)) == 64
    assert paths == sorted(paths)
    assert min(paths) < "050"
    assert max(paths) > "350"
    assert completion_spans(iter(files[::-1]), {}, 3) == spans


def test_files_are_held_one_at_a_time():
    made, most = [], 0

    def texts():
        nonlocal most
        for number in range(100):
            item = source(f"{number:03d}.go", GO)
            made.append(weakref.ref(item))
            yield item
            del item
            most = max(most, sum(ref() is not None for ref in made))

    assert len(completion_spans(texts(), {}, 1)) == 64
    assert most == 1


@pytest.mark.parametrize("text", ["", "\n", "\n\n\n", "x", "no line break at all", "a = 1\r\nbc = 23456\r\n",
                                  "\ufeffint a;\nint bcdefg;\n", "x" * 9_000 + "\nint last_one;\n",
                                  "int first;\n" + "é" * 9_000 + "\n" + "y" * 9_000])
def test_odd_texts_give_spans_of_themselves_or_none(text):
    odd = SimpleNamespace(spans=np.array([[0, len(text.encode())], [0, 10**6], [3, 2]]))
    spans = completion_spans([source("a.c", text, "c"), source("b.py", text, "python"),
                              source("c.md", text, "markdown", "docs")], {"a.c": odd}, 1)
    assert all(span["prefix"] + span["middle"] + span["suffix"] in text for span in spans)
    assert not [span for span in spans if span["path"] == "c.md"]
