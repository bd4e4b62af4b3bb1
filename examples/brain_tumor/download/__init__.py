"""Fetching the slices and the ImageNet weights, which no one vouches for until they are checked."""
