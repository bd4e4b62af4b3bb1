"""The published losses, a class each."""
