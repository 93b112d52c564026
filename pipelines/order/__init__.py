"""Orders of training: estimates, search, and validation."""
