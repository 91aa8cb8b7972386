"""Puts the checkout on the path and keeps tests off the network and off spinning threads."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("ELITE_LEDGER", "")     # a ledger of this very machine must not decide what tests plan
os.environ.setdefault("ELITE_PROFILE", "")    # nor an earlier profile of it

from hypothesis import HealthCheck, settings  # noqa: E402

# Shared cores make single examples slow now and then; that is no defect of the code under test.
settings.register_profile("shared-cores", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared-cores")
