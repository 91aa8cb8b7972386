import time

import pytest

from training.dataset.structure.edges import distance, import_edges, python_imports, topological
from training.dataset.sources.languages import of_name
from training.dataset.sources.repository import SourceFile


def edges(texts: dict[str, str], root_name: str = "repo") -> dict[str, tuple[str, ...]]:
    sources = [SourceFile(path=path, language=of_name(path).name, kind="code", text=text)
               for path, text in texts.items()]
    return import_edges(sources, root_name)


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


def test_python_that_does_not_parse_is_read_by_lines():
    assert list(python_imports("print 'old'\nimport a.b\nfrom .c import d, e  # note\n")) == [
        (0, "a.b", ()), (1, "c", ("d", "e"))]
    assert edges({"a.py": "print 'old'\nimport b\n", "b.py": ""})["a.py"] == ("b.py",)


@pytest.mark.parametrize(("texts", "path", "expected"), [
    ({"src/a.ts": "import {x} from './b';\nimport React from 'react';\nexport * from '../lib'",
      "src/b.tsx": "",
      "lib/index.ts": ""}, "src/a.ts", ("src/b.tsx", "lib/index.ts")),
    ({"a.js": "const b = require('./b.js'); import('./c')", "b.js": "", "c.mjs": ""}, "a.js",
     ("b.js", "c.mjs")),
    ({"a.ts": "import x from './b.js'", "b.ts": ""}, "a.ts", ("b.ts",)),
    ({"src/main/java/org/x/A.java": "import org.x.util.B;\n"
      "import static org.x.util.B.make;\nimport java.util.List;",
      "src/main/java/org/x/util/B.java": ""}, "src/main/java/org/x/A.java",
      ("src/main/java/org/x/util/B.java",)),
    ({"go.mod": "module example.org/m\n", "main.go": 'import (\n\t"fmt"\n\tu "example.org/m/util"\n)',
      "util/u.go": "",
      "util/u_test.go": "", "fmt/f.go": ""}, "main.go", ("util/u.go",)),
    ({"src/lib.rs": "mod a;\npub mod deep;\nuse crate::deep::inner::Thing;", "src/a.rs": "",
      "src/deep/mod.rs": "",
      "src/deep/inner.rs": ""}, "src/lib.rs", ("src/a.rs", "src/deep/mod.rs", "src/deep/inner.rs")),
    ({"src/m.c": '#include "m.h"\n#include <stdio.h>\n#  include "util/u.h"', "src/m.h": "",
      "include/util/u.h": ""},
     "src/m.c", ("src/m.h", "include/util/u.h")),
    ({"A.cs": "using My.Data;\nusing System;", "Data/B.cs": "namespace My.Data;\nclass B {}"}, "A.cs",
     ("Data/B.cs",)),
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


@pytest.mark.parametrize("name", ["a.py", "a.ts", "a.java", "a.go", "a.rs", "a.c", "a.cs", "a.rb"])
def test_reading_imports_takes_no_quadratic_time(name):
    started = time.monotonic()
    for text in ("import (\n" * 20_000, "use crate::a" * 15_000,
                 "from " * 40_000, "\n" * 100_000 + "(", "import {\n" * 20_000):
        edges({name: text})
    assert time.monotonic() - started < 5
