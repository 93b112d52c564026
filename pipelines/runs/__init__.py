"""Run folders: what a run writes, how its files are verified, and how a run continues."""
