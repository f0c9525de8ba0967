"""One file for each verb beside fit, validate, test and predict: its options, and `run`."""
