"""What to expect of a dataset of its size, in sentences for the manifest."""

from training.expectations import notes as notes
