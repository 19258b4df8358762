"""A job that trains while everything around it is killed, stopped, cut off and filled up.

`python -m tests.integration.soak --minutes N --seed S --json FILE`; see DESIGN.md beside this file.
"""
