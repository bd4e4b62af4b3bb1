"""How the losses are computed: modes, chunks of classes, operators, where the centres are."""
