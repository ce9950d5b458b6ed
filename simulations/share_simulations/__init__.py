"""Local federations of real processes, their metrics and plots."""
