"""Devices and processes: where machines meet, agree and stop."""
