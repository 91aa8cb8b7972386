"""Edges and pairs: imports lead to files; tests and documents find their code."""

import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from training.dataset.sources.languages import of_name
from training.dataset.structure.edges import distance, import_edges, pairs, topological
from training.dataset.structure.syntax import Import, analyse

SAMPLES = Path(__file__).parent / "samples"


@dataclass(frozen=True)
class File:
    path: str
    language: str
    kind: str
    structure_imports: tuple[Import, ...]
    defines: tuple[str, ...]
    package: str


def facts(texts: dict[str, str]) -> list[File]:
    files = []
    for path, text in texts.items():
        language = of_name(path)
        found = analyse(text, language.name)
        files.append(File(path, language.name, language.kind, found.imports, found.defines, found.package))
    return files


def edges(texts: dict[str, str], root_name: str = "repo") -> dict[str, tuple[str, ...]]:
    return import_edges(facts(texts), root_name)


def paired(texts: dict[str, str]) -> dict[str, tuple[str, ...]]:
    files = facts(texts)
    return pairs(files, import_edges(files, "repo"))


def sample(name: str) -> dict[str, str]:
    root = SAMPLES / name
    return {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8")
            for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(("name", "expected"), [
    ("python", {"docs/prices.md": (), "src/shop/__init__.py": ("src/shop/basket.py",),
                "src/shop/basket.py": ("src/shop/pricing.py",), "src/shop/pricing.py": (),
                "src/shop/report.py": ("src/shop/pricing.py", "src/shop/basket.py"),
                "tests/test_basket.py": ("src/shop/__init__.py",)}),
    ("javascript", {"src/help/index.js": (),
                    "src/index.js": ("src/store.js", "src/view.jsx", "src/help/index.js"),
                    "src/store.js": ("src/util.js",), "src/store.test.js": ("src/store.js",),
                    "src/util.js": (), "src/view.jsx": ()}),
    ("typescript", {"src/api/client.ts": ("src/models/user.ts", "src/util.ts"),
                    "src/api/client.spec.ts": ("src/api/client.ts",), "src/models/user.ts": (),
                    "src/util.ts": (), "src/view.tsx": ("src/api/client.ts", "src/models/user.ts")}),
    ("java", {"src/main/java/org/example/Account.java": ("src/main/java/org/example/money/Amount.java",
                                                        "src/main/java/org/example/money/Rounding.java"),
              "src/main/java/org/example/money/Amount.java": (),
              "src/main/java/org/example/money/Rounding.java": (),
              "src/test/java/org/example/AccountTest.java": ("src/main/java/org/example/money/Amount.java",
                                                            "src/main/java/org/example/money/Rounding.java")}),
    ("go", {"go.mod": (), "main.go": ("internal/ring/ring.go",), "internal/ring/ring.go": (),
            "internal/ring/ring_test.go": ()}),
    ("rust", {"Cargo.toml": (), "core/Cargo.toml": (), "cli/Cargo.toml": (),
              "core/src/lib.rs": ("core/src/count.rs", "core/src/split.rs"),
              "core/src/count.rs": ("core/src/split.rs",), "core/src/split.rs": (),
              "cli/src/main.rs": ("core/src/count.rs",)}),
    ("c", {"include/list.h": (), "src/grow.h": (), "src/list.c": ("include/list.h", "src/grow.h"),
           "tests/test_list.c": ("include/list.h",)}),
    ("cpp", {"include/geo/shape.hpp": (), "src/main.cpp": ("include/geo/shape.hpp", "src/total.h"),
             "src/square.cpp": ("include/geo/shape.hpp",), "src/total.h": ("include/geo/shape.hpp",)}),
    ("csharp", {"Inventory/Item.cs": (), "Inventory/Stock.cs": (),
                "Program.cs": ("Inventory/Item.cs", "Inventory/Stock.cs")}),
    ("ruby", {"lib/garden.rb": ("lib/garden/plant.rb", "lib/garden/calendar.rb"),
              "lib/garden/plant.rb": (), "lib/garden/calendar.rb": ("lib/garden/plant.rb",),
              "spec/plant_spec.rb": ("lib/garden/plant.rb",)}),
    ("php", {"public/index.php": ("src/helpers.php", "src/Blog/Post.php", "src/Blog/Store.php"),
             "src/helpers.php": (), "src/Blog/Post.php": (), "src/Blog/Store.php": ("src/Blog/Post.php",)}),
    ("shell", {"bin/backup.sh": ("lib/log.sh", "lib/paths.sh"), "lib/log.sh": (), "lib/paths.sh": ()}),
    ("kotlin", {"src/main/kotlin/notes/Main.kt": ("src/main/kotlin/notes/store/Storage.kt",),
                "src/main/kotlin/notes/store/Storage.kt": ()}),
])
def test_a_small_project_of_each_language_is_joined(name, expected):
    assert edges(sample(name)) == expected


def test_python_imports_lead_to_modules_packages_and_submodules():
    found = edges({"src/app/__init__.py": "",
                   "src/app/a.py": "import app.b\nfrom app import c, value\nimport os",
                   "src/app/b.py": "from . import c\nfrom .sub import deep\nfrom .sub.deep import x",
                   "src/app/c.py": "def f():\n    from app.sub import deep", "src/app/sub/__init__.py": "",
                   "src/app/sub/deep.py": "from ...app import a\nfrom .. import b"})
    assert found["src/app/a.py"] == ("src/app/b.py", "src/app/c.py", "src/app/__init__.py")
    assert found["src/app/b.py"] == ("src/app/c.py", "src/app/sub/deep.py")
    assert found["src/app/c.py"] == ("src/app/sub/deep.py",)
    assert found["src/app/sub/deep.py"] == ("src/app/a.py", "src/app/b.py")


def test_a_repository_that_is_itself_the_package_is_known_by_its_folder_name():
    found = edges({"__init__.py": "", "a.py": "from rich.b import x\nimport rich.c", "b.py": "", "c.py": ""},
                  "rich")
    assert found["a.py"] == ("b.py", "c.py")


def test_a_local_file_named_like_a_standard_module_of_another_folder_is_no_edge():
    found = edges({"tools/json.py": "", "app/__init__.py": "", "app/a.py": "import json"})
    assert found["app/a.py"] == ()


def test_python_that_this_python_cannot_parse_keeps_its_edges():
    assert edges({"a.py": "print 'old'\nimport b\nexec 'x' in {}\n", "b.py": ""})["a.py"] == ("b.py",)
    assert edges({"a.py": "def broken(:\n    pass\nfrom b import c\n", "b.py": ""})["a.py"] == ("b.py",)


@pytest.mark.parametrize(("texts", "path", "expected"), [
    ({"src/a.ts": "import {x} from './b';\nimport React from 'react';\nexport * from '../lib'",
      "src/b.tsx": "",
      "lib/index.ts": ""}, "src/a.ts", ("src/b.tsx", "lib/index.ts")),
    ({"a.js": "const b = require('./b.js'); import('./c')", "b.js": "", "c.mjs": ""}, "a.js",
     ("b.js", "c.mjs")),
    ({"a.ts": "import x from './b.js'", "b.ts": ""}, "a.ts", ("b.ts",)),
    ({"a.ts": "import x = require('./b')", "b.ts": ""}, "a.ts", ("b.ts",)),
    ({"a.vue": "<script>\nimport b from './b'\n</script>", "b.js": ""}, "a.vue", ("b.js",)),
    ({"packages/a/package.json": '{"name": "@x/a"}', "packages/a/src/index.ts": "",
      "packages/b/src/main.ts": "import a from '@x/a'"}, "packages/b/src/main.ts",
     ("packages/a/src/index.ts",)),
    ({"src/main/java/org/x/A.java": "import org.x.util.B;\n"
      "import static org.x.util.B.make;\nimport java.util.List;",
      "src/main/java/org/x/util/B.java": ""}, "src/main/java/org/x/A.java",
      ("src/main/java/org/x/util/B.java",)),
    ({"go.mod": "module example.org/m\n", "main.go": 'import (\n\t"fmt"\n\tu "example.org/m/util"\n)',
      "util/u.go": "",
      "util/u_test.go": "", "fmt/f.go": ""}, "main.go", ("util/u.go",)),
    ({"tools/go.mod": "module example.org/m/tools\n", "go.mod": "module example.org/m\n",
      "main.go": 'import "example.org/m/tools/u"', "tools/u/u.go": ""}, "main.go", ("tools/u/u.go",)),
    ({"src/lib.rs": "mod a;\npub mod deep;\nuse crate::deep::inner::Thing;", "src/a.rs": "",
      "src/deep/mod.rs": "",
      "src/deep/inner.rs": ""}, "src/lib.rs", ("src/a.rs", "src/deep/mod.rs", "src/deep/inner.rs")),
    ({"src/lib.rs": "", "src/a/mod.rs": "use super::b::{self, C};\nuse self::d::*;", "src/b.rs": "",
      "src/a/d.rs": ""}, "src/a/mod.rs", ("src/b.rs", "src/a/d.rs")),
    ({"src/m.c": '#include "m.h"\n#include <stdio.h>\n#  include "util/u.h"', "src/m.h": "",
      "include/util/u.h": ""},
     "src/m.c", ("src/m.h", "include/util/u.h")),
    ({"k.cu": '#include "k.cuh"\n__global__ void f() {}', "k.cuh": ""}, "k.cu", ("k.cuh",)),
    ({"A.cs": "using My.Data;\nusing System;", "Data/B.cs": "namespace My.Data;\nclass B {}"}, "A.cs",
     ("Data/B.cs",)),
    ({"A.cs": "using D = My.Data.B;", "Data/B.cs": "namespace My.Data;\nclass B {}"}, "A.cs", ("Data/B.cs",)),
    ({"lib/a.rb": "require_relative 'b/c'\nrequire 'json'", "lib/b/c.rb": ""}, "lib/a.rb", ("lib/b/c.rb",)),
])
def test_imports_of_other_languages_lead_to_files(texts, path, expected):
    assert edges(texts)[path] == expected


def test_cycles_and_self_imports_end():
    found = edges({"a.py": "import b\nimport a", "b.py": "import a", "c.py": "import a"})
    assert found["a.py"] == ("b.py",)
    rank = topological(found)
    assert set(rank) == {"a.py", "b.py", "c.py"}
    assert rank["a.py"] < rank["c.py"]


def test_a_deep_chain_of_imports_needs_no_recursion():
    chain = {f"m{index}.py": (f"m{index + 1}.py",) for index in range(5_000)} | {"m5000.py": ()}
    rank = topological(chain)
    assert rank["m5000.py"] == 0
    assert rank["m0.py"] == 5_000


def test_distance_counts_folders_up_and_down():
    assert [distance("a/b/c.py", other) for other in ("a/b/d.py", "a/e.py", "x/y.py")] == [0, 1, 3]


def test_a_document_and_a_test_are_paired_with_their_code():
    found = paired(sample("python"))
    assert found["docs/prices.md"] == ("src/shop/pricing.py", "src/shop/report.py")
    assert found["tests/test_basket.py"] == ("src/shop/basket.py", "src/shop/__init__.py")
    assert found["src/shop/basket.py"] == ("tests/test_basket.py",)
    assert found["src/shop/pricing.py"] == ("docs/prices.md",)


@pytest.mark.parametrize(("name", "test", "code"), [
    ("javascript", "src/store.test.js", "src/store.js"),
    ("typescript", "src/api/client.spec.ts", "src/api/client.ts"),
    ("java", "src/test/java/org/example/AccountTest.java", "src/main/java/org/example/Account.java"),
    ("go", "internal/ring/ring_test.go", "internal/ring/ring.go"),
    ("c", "tests/test_list.c", "include/list.h"),
    ("ruby", "spec/plant_spec.rb", "lib/garden/plant.rb"),
])
def test_a_test_finds_what_it_tests_first_and_is_found(name, test, code):
    found = paired(sample(name))
    assert found[test][0] == code
    assert test in found[code]


def test_a_c_test_finds_the_header_it_includes_and_the_source_of_its_name():
    assert paired(sample("c"))["tests/test_list.c"] == ("include/list.h", "src/list.c")


def test_a_document_mentions_paths_modules_and_names_that_one_file_defines():
    texts = {"README.md": "See `Engine`, app.gear and ./app/wheel.py; `Common` is in two files.",
             "app/engine.py": "class Engine: pass\nclass Common: pass\n", "app/gear.py": "x = 1\n",
             "app/wheel.py": "class Common: pass\n", "app/other.py": ""}
    found = paired(texts)
    assert found["README.md"] == ("app/wheel.py", "app/gear.py", "app/engine.py")
    assert found["app/other.py"] == ()


def test_a_file_has_at_most_eight_pairs_and_the_same_ones_in_any_order():
    texts = {f"app/part{index}.py": f"def function{index}(): pass\n" for index in range(20)}
    texts["tests/test_all.py"] = "".join(f"import app.part{index}\n" for index in range(20))
    texts["README.md"] = " ".join(f"`function{index}`" for index in range(20)) + " `function7`"
    found = paired(texts)
    assert {len(found["README.md"]), len(found["tests/test_all.py"])} == {8}
    assert found == paired(dict(reversed(texts.items())))


def test_edges_and_pairs_of_many_files_of_one_name_take_linear_time():
    def seconds(count):
        files = facts({f"pkg{index}/util.h": '#include "util.h"\n#include "common/util.h"\n'
                       for index in range(8)})
        many = [File(f"pkg{index}/a/util.h", "c", "code", files[0].structure_imports, ("make",), "")
                for index in range(count)]
        started = time.process_time()
        pairs(many, import_edges(many, "repo"))
        return time.process_time() - started
    assert seconds(8_000) < 12 * max(seconds(2_000), 0.02)


@pytest.mark.parametrize("name", ["a.py", "a.ts", "a.java", "a.go", "a.rs", "a.c", "a.cs", "a.rb", "a.kt"])
def test_reading_imports_takes_no_quadratic_time(name):
    started = time.process_time()
    for text in ("import (\n" * 5_000, "use crate::a" * 4_000,
                 "from " * 10_000, "\n" * 100_000 + "(", "import {\n" * 5_000):
        edges({name: text})
    assert time.process_time() - started < 5
