"""What works on this machine, what does not, why, and what to do: the same as `elite_train.py doctor`."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    command = str(Path(__file__).resolve().parent / "elite_train.py")
    os.execv(sys.executable, [sys.executable, command, "doctor", *sys.argv[1:]])
