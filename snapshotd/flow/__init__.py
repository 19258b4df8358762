"""Action: thin shells that carry out what core decides."""
