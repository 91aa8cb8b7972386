"""The ledger: what each optimization of the catalogue does on this machine, by the real trainer."""

from training.ledger.catalogue import GROUPS, Optimization, catalogue
from training.ledger.judging import NOTICEABLE, Arm, Change
from training.ledger.measuring import Ledger, missing_needs
from training.ledger.records import Entry, save

__all__ = ["GROUPS", "NOTICEABLE", "Arm", "Change", "Entry", "Ledger", "Optimization", "catalogue",
           "missing_needs", "save"]
