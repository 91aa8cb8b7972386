"""Stage 1: what this machine can really do."""
