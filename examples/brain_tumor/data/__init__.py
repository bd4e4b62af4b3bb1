"""The slices: read, made, downloaded, split."""
