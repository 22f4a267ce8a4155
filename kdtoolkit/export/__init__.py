"""Writes detectors for deployment."""
