"""Engines: how the processes that share one run are started, and how they share out its units of work."""
