"""One training, in a folder of its own."""
