"""Decisions: pure functions and state machines; no clock, no socket, no file, no thread."""
