"""One profile of this machine for all whole commands of a process of tests: each would take some 12 s."""

import atexit
import shutil
import tempfile
from pathlib import Path

FOLDER = Path(tempfile.mkdtemp(prefix="elite-profile-"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
PROFILE = {"ELITE_PROFILE": str(FOLDER / "hardware.json")}
