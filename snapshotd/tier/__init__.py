"""Whole steps in a bucket or directory: the names of their objects, and what is done to them."""
