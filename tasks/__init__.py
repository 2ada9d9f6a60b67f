"""Prefect tasks: one restartable unit each; a call into gsrl_core plus tracking."""
