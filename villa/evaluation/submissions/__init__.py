"""Submission files: predictions in the form that a leaderboard reads, with validators."""
