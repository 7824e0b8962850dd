"""PID 1: spawns, reaps, respawns and shuts down. Stdlib and prctl only; see __main__.py."""

STATE_VARIABLE = "PROCESS_SUPERVISOR_STATE"
"""After an upgrade: the environment variable with the number of the memfd of upgrade.py."""
