"""Stage 5: checks before the start, the trainer's subprocess, its supervision, and the report."""
