"""ELITE: a source repository and a machine in, a code model tuned on that repository out."""
