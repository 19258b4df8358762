"""Arithmetic: bytes in, bytes out."""
