"""Data of pre-training: what is masked, which pairs do not match, and the data sets of the objectives."""
