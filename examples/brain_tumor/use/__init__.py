"""A trained network used: answers for single files, other formats."""
