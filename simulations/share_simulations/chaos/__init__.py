"""Crash lab: faults aimed at a real hub, and the promises counted afterwards."""
