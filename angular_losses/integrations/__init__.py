"""Integrations with other libraries: interfaces and checkpoints."""
