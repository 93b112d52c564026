"""Run folders: what a run writes, whether it still is what was written, and how a run goes on."""
