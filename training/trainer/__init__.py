"""The parts of the training subprocess: run directory in, trained model out."""
