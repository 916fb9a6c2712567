"""Measurements behind the numbers this project states; each can be run again by its command."""
