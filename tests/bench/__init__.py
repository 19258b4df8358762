"""What it costs, as ratios to limits of this machine that were measured in the same run."""
