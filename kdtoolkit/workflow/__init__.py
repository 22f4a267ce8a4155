"""What users do in one call: train, distil, evaluate, predict, label."""
