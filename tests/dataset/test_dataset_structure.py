import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "training" / "dataset"
MODULES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_the_documentation_are_true(name):
    assert doctest.testmod(importlib.import_module(f"training.dataset.{name}")).failed == 0


def test_the_room_is_imported_without_torch_and_transformers():
    code = ("import sys, training.dataset; "
            "heavy = ('torch', 'transformers', 'tokenizers', 'huggingface_hub'); "
            "print([name for name in heavy if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=FOLDER.parents[1], capture_output=True, text=True,
                          check=True)
    assert done.stdout.strip() == "[]"
