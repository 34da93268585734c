"""Submission files: predictions in the formats of leaderboards, with validators."""
