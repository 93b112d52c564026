"""Settings of every command, their sources, and what a file may not decide."""
