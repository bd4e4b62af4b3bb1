"""What a GPU has to show, in phases: whether it works, how fast it is, where the time goes."""
