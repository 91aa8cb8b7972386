"""What a text says about itself: imports, names, package, whole nodes, skeleton; in bounded time."""

import ast
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.dataset.sources.languages import of_name
from training.dataset.structure import grammars, textual, worker
from training.dataset.structure.syntax import BYTES_A_SPAN, MAX_OWN_BYTES, Import, analyse

SAMPLES = Path(__file__).parent / "samples"
PARSED = sorted(grammars.GRAMMARS)
LANGUAGES = [*PARSED, "kotlin", "vue", "markdown", "go module", "toml", "json", "unknown"]
CODE = sorted(path for path in SAMPLES.rglob("*") if path.is_file() and of_name(path.name).kind == "code")
BRACED = {"javascript", "typescript", "java", "go", "rust", "c", "cpp", "csharp", "php"}


def read(path):
    text = path.read_text(encoding="utf-8")
    return text, analyse(text, of_name(path.name).name)


def pieces(text, found):
    data = text.encode("utf-8")
    return [data[start:end].decode("utf-8") for start, end in found.spans]


def sample(name):
    return read(SAMPLES / name)


def ids(path):
    return path.relative_to(SAMPLES).as_posix()


@pytest.mark.parametrize("path", [path for path in CODE if of_name(path.name).name in PARSED], ids=ids)
def test_spans_are_whole_nodes_in_order(path):
    text, found = read(path)
    spans = found.spans
    assert spans.dtype == np.int32
    assert spans.shape[1] == 2
    data = text.encode("utf-8")
    own = {node.byte_range for node in nodes(data, of_name(path.name).name)}
    assert {(int(start), int(end)) for start, end in spans} <= own
    assert [tuple(span) for span in spans] == sorted(map(tuple, spans), key=lambda span: (span[0], -span[1]))
    assert len(spans) <= max(1, len(data) // BYTES_A_SPAN)
    lengths = spans[:, 1] - spans[:, 0]
    assert len(data) < 60 or ((lengths >= 8) & (lengths <= 2_000)).all()
    assert len(data) < 200 or len(spans) >= 3


def nodes(data, language):
    parsed = grammars.parse(data, language)
    pending = [parsed.tree.root_node]
    while pending:
        node = pending.pop()
        yield node
        pending += node.children


@pytest.mark.parametrize("path", [path for path in CODE if path.suffix == ".py"], ids=ids)
def test_python_spans_parse_alone(path):
    text, found = read(path)
    data = text.encode("utf-8")
    for start, end in found.spans:
        column = start - (data.rfind(b"\n", 0, start) + 1)
        piece = textwrap.dedent(" " * column + data[start:end].decode("utf-8"))
        assert any(parses(form.format(piece)) for form in (
            "{}", "def f():\n x = ({}\n )", "f{}", "if x: pass\n{}", "try: pass\n{}")), piece


def parses(text):
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


@pytest.mark.parametrize("path", [path for path in CODE if of_name(path.name).name in BRACED], ids=ids)
def test_spans_of_languages_with_braces_are_balanced(path):
    text, found = read(path)
    for piece in pieces(text, found):
        assert [piece.count(one) for one in "({["] == [piece.count(one) for one in ")}]"], piece


def test_spans_hold_blocks_branches_arguments_and_assigned_values():
    text, found = sample("python/src/shop/basket.py")
    have = pieces(text, found)
    assert "amount -= discount(amount, share=0.05)" in have
    assert "else:\n            amount = round(amount, 2)" in have
    assert "(name, number)" not in have, "a pattern is no argument list"
    assert "sum(price_of(name) * number for name, number in self.items.items())" in have
    text, found = sample("rust/core/src/count.rs")
    assert "None => 0," in pieces(text, found)


@pytest.mark.parametrize(("name", "imports", "defines", "package"), [
    ("python/src/shop/report.py", [Import(1, "", ("pricing",), "import"),
                                   Import(1, "basket", ("Basket",), "import")], ("receipt",), ""),
    ("javascript/src/store.js", [Import(0, "./util", (), "require")], ("createStore",), ""),
    ("typescript/src/api/client.ts", [Import(0, "../models/user", (), "import"),
                                      Import(0, "../util.js", (), "import")],
     ("ClientOptions", "Client"), ""),
    ("java/src/test/java/org/example/AccountTest.java", [Import(0, "org.example.money", ("*",), "import")],
     ("AccountTest",), "org.example"),
    ("go/internal/ring/ring.go", [Import(0, "errors", (), "import")], ("ErrFull", "Buffer", "New"), "ring"),
    ("go/go.mod", [], (), "example.org/queue"),
    ("rust/core/src/lib.rs", [Import(0, "count", (), "mod"), Import(0, "split", (), "mod"),
                              Import(0, "crate::count::Counter", (), "use")], (), ""),
    ("rust/core/Cargo.toml", [], (), "word-core"),
    ("c/src/list.c", [Import(0, "list.h", (), "include"), Import(0, "grow.h", (), "include"),
                      Import(0, "stdlib.h", (), "include")], ("list_push", "list_free"), ""),
    ("cpp/include/geo/shape.hpp", [Import(0, "memory", (), "include")], ("Shape",), "geo"),
    ("csharp/Inventory/Stock.cs", [Import(0, "System.Collections.Generic", (), "import")], ("Stock",),
     "Shop.Inventory"),
    ("ruby/lib/garden.rb", [Import(0, "json", (), "require"), Import(1, "garden/plant", (), "require"),
                            Import(0, "garden/calendar", (), "require")], ("Garden",), ""),
    ("php/public/index.php", [Import(1, "../src/helpers.php", (), "require"),
                              Import(0, "App\\Blog\\Post", (), "use"),
                              Import(0, "App\\Blog\\Store", (), "use")], (), ""),
    ("shell/bin/backup.sh", [Import(1, "../lib/log.sh", (), "source"),
                             Import(1, "./lib/paths.sh", (), "source")], (), ""),
    ("kotlin/src/main/kotlin/notes/store/Storage.kt", [], ("Store", "newId"), "notes.store"),
    ("python/docs/prices.md", [Import(0, "shop.pricing", (), "mention"), Import(0, "price_of", (), "mention"),
                               Import(0, "src/shop/report.py", (), "mention")], (), ""),
])
def test_imports_names_and_package_of_each_language(name, imports, defines, package):
    _, found = sample(name)
    assert (list(found.imports), found.defines, found.package) == (imports, defines, package)


@pytest.mark.parametrize(("name", "skeleton"), [
    ("python/src/shop/basket.py", '''\
class Basket:
    """Items and their number."""
    def __init__(self) -> None:
    def add(self, name: str, number: int = 1) -> None:
        """Put `number` pieces of an item into the basket."""
    def total(self, member: bool = False) -> float:
        """The price of everything, after discounts."""
'''),
    ("javascript/src/store.js", "export function createStore(initial)\n"),
    ("java/src/main/java/org/example/Account.java", '''\
public class Account
    public Account(Amount first)
    public void book(Amount amount)
    public long balance()
'''),
    ("go/internal/ring/ring.go", '''\
type Buffer struct {
	values []int
	limit  int
}
func New(limit int) *Buffer
func (b *Buffer) Push(value int) error
'''),
    ("rust/core/src/count.rs", '''\
pub struct Counter {
    seen: HashMap<String, usize>,
}
impl Counter
    pub fn add(&mut self, text: &str) -> usize
    pub fn get(&self, word: &str) -> usize
'''),
    ("c/src/list.c", "int list_push(struct list *list, int value)\nvoid list_free(struct list *list)\n"),
    ("cpp/src/square.cpp", '''\
namespace geo
class Square : public Shape
    explicit Square(double side) : side_(side)
    double area() const override
std::unique_ptr<Shape> make_square(double side)
'''),
    ("csharp/Program.cs", '''\
namespace Shop
    public static class Program
        public static void Main(string[] args)
'''),
    ("ruby/lib/garden/plant.rb", '''\
module Garden
  class Plant
    def initialize(name, days)
    def ripe?(age)
'''),
    ("php/src/Blog/Store.php", '''\
class Store implements \\Countable
    public function add(Post $post): void
    public function count(): int
'''),
])
def test_a_skeleton_shows_heads_and_first_docstring_lines(name, skeleton):
    assert sample(name)[1].skeleton == skeleton


def test_definitions_within_a_body_are_not_in_the_skeleton():
    text = "def outer():\n    def inner():\n        pass\n    class Local:\n        pass\n    return inner\n"
    assert analyse(text, "python").skeleton == "def outer():\n"


def test_a_file_with_a_broken_place_keeps_the_nodes_around_it():
    whole = "def first(value):\n    return value + one_more\n\n\n"
    text = whole + "def broken():\n    x = = 3\n\n\n" + whole.replace("first", "second")
    found = analyse(text, "python")
    have = pieces(text, found)
    assert "return value + one_more" in have
    assert not [piece for piece in have if "= = 3" in piece]
    assert {"first", "second"} <= set(found.defines)


def test_python_2_is_read():
    text = "import urllib2\ndef get(url):\n    print 'get', url\n    try:\n        exec code in space\n" \
           "    except IOError:\n        raise\n"
    found = analyse(text, "python")
    assert found.imports == (Import(0, "urllib2", (), "import"),)
    assert "print 'get', url" in pieces(text, found)


def test_bytes_are_counted_not_characters():
    text = 'name = "Zürich und Köln"\nplace = call("größer als ein Wort", name)\n# ' + "ü" * 80
    assert 'call("größer als ein Wort", name)' in pieces(text, analyse(text, "python"))


def test_tsx_and_headers_of_cpp_are_read_by_their_second_grammar():
    for name in ("typescript/src/view.tsx", "cpp/src/total.h"):
        text, found = sample(name)
        assert len(found.spans) > 3
        assert grammars.parse(text.encode(), of_name(name).name).broken == []


def test_a_language_whose_wheel_is_missing_is_read_by_lines(monkeypatch):
    text, found = sample("go/main.go")
    monkeypatch.setitem(grammars.GRAMMARS, "go", (grammars.Grammar("tree_sitter_none", "language", "go"),))
    without = analyse(text, "go")
    assert without.imports == found.imports
    assert without.package == "main"
    assert without.defines == ("main",)
    assert len(without.spans) == 0


def test_a_text_that_would_take_minutes_is_read_by_lines_and_the_next_by_its_grammar():
    text, found = sample("c/src/list.c")
    arrows = analyse("#include <x.h>\n" + "a=>\n" * 20_000, "c")
    assert arrows.imports == (Import(0, "x.h", (), "include"),)
    assert len(arrows.spans) == 0
    again = analyse(text + " " * MAX_OWN_BYTES, "c")
    assert set(map(tuple, found.spans)) <= set(map(tuple, again.spans))


def test_the_worker_ends_with_the_process_that_asked_it():
    code = ("from training.dataset.structure import syntax, worker\n"
            "syntax.analyse('x = call(1, 2)\\n' * 200, 'python')\n"
            "print(worker._worker._process.pid)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).resolve().parents[2])
    assert done.stderr == ""
    assert not Path(f"/proc/{int(done.stdout)}").exists()


HOSTILE = {
    "parentheses": "(" * 30_000, "calls": "a(" * 80_000 + ")" * 80_000, "braces": "{" * 30_000,
    "comparisons": "a<" * 60_000, "heredocs": "<<A " * 40_000, "templates": "`${" * 8_000,
    "semicolons": "m!{" + ";" * 120_000 + "}", "keywords": "if " * 100_000,
    "branches": "if (x) {} else " * 10_000,
    "indents": "".join(" " * depth + "if x:\n" for depth in range(800)), "classes": "class A {" * 20_000,
    "uses": "use a::{" * 20_000, "strings": 'f"{' * 40_000, "ticks": "`a" * 100_000,
}


@pytest.mark.parametrize(("kind", "language"), [
    ("parentheses", "python"), ("calls", "python"), ("indents", "python"), ("strings", "python"),
    ("braces", "javascript"), ("templates", "javascript"), ("comparisons", "typescript"),
    ("semicolons", "rust"), ("uses", "rust"), ("branches", "c"), ("calls", "cpp"), ("classes", "java"),
    ("heredocs", "ruby"), ("heredocs", "shell"), ("keywords", "csharp"), ("parentheses", "php"),
    ("ticks", "markdown"), ("classes", "kotlin")])
def test_hostile_text_ends_in_seconds(kind, language):
    worker.close()      # what it used before does not count
    started = cpu_seconds()
    analyse(HOSTILE[kind], language)
    worker.close()
    assert cpu_seconds() - started < 5


def cpu_seconds():
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


@pytest.mark.parametrize("language", LANGUAGES)
@given(text=st.one_of(st.text(max_size=200), st.lists(st.sampled_from(
    ["import ", "from ", "use ", "{", "}", "(", ")", "a", "::", ".", "\n", "    ", "def f():", "class A", ";",
     '"', "'", "`", "<?php ", "namespace x", "#include <a>", ":", "é", "\x00", "\ud800", "=", "*"]),
    max_size=40).map("".join)))
@settings(max_examples=20, deadline=None)
def test_any_text_has_a_structure_and_the_same_one_twice(text, language):
    one, two = analyse(text, language), analyse(text, language)
    assert (one.imports, one.defines, one.package, one.skeleton) == (
        two.imports, two.defines, two.package, two.skeleton)
    assert np.array_equal(one.spans, two.spans)
    assert len(one.skeleton) <= 0.6 * len(text) + 1
    size = len(text.encode("utf-8", "replace"))
    assert ((one.spans >= 0) & (one.spans <= size)).all()


@pytest.mark.parametrize(("tree", "paths"), [
    ("std::io", ["std::io"]), ("a::{self, b as c, d::{e, f::*}}", ["a", "a::b", "a::d::e", "a::d::f"]),
    ("{a, b::c}", ["a", "b::c"]), ("a::b::{self}", ["a::b"]), ("r#type::x", ["type::x"])])
def test_a_rust_use_is_taken_apart(tree, paths):
    assert textual.use_leaves(tree) == paths
