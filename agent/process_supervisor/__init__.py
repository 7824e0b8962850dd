"""PID 1: spawns, reaps, respawns and shuts down. Stdlib and prctl only; see __main__.py."""
