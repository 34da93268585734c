"""Metrics, prediction files, result tables and figures."""
