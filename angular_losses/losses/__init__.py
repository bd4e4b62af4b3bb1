"""The published losses, and what they share: base class, centres, options, labels, state."""
