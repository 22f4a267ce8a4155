"""What `kd data` does: check a data set, convert it, show it. Training uses none of it."""
