"""Processes: where they run, how they are called, and what they share. The only package that imports Ray."""
