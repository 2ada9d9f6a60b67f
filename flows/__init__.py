"""Prefect flows: what a person starts, schedules and compares."""
