"""Beside other libraries: their interfaces, and their checkpoints."""
