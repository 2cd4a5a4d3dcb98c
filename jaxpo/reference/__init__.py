"""The reference model as a table: its key (`fingerprint`) and its place on disk (`store`)."""
