"""Measurements behind the numbers this project states; each can be run again by its command."""

import os

# Read by libgomp when torch loads, so it must be set before; the Makefile's value and reason.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
