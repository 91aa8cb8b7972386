import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "training" / "dataset"


def test_the_room_is_imported_without_torch_and_transformers():
    code = ("import sys, training.dataset; "
            "heavy = ('torch', 'transformers', 'tokenizers', 'huggingface_hub'); "
            "print([name for name in heavy if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=FOLDER.parents[1], capture_output=True, text=True,
                          check=True)
    assert done.stdout.strip() == "[]"
