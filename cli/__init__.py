"""The `effc` command: one file a command."""
