"""The network and what it minimises."""
