"""Metrics, prediction files, submissions, result tables and figures."""
