"""The main job: a real training run on four nodes of one machine, through scripted faults."""
