"""Tests and measurements on a GPU, in phases: correctness, speed, profile."""
