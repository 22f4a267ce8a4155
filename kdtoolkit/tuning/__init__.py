"""`kd tune`: which method, weights and schedule suit a pair and its data, found on a share of the training images."""
