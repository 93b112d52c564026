"""Settings of every command, where they come from, and what a file may not decide."""
