"""The seeded simulator: whole clusters under a virtual clock."""
