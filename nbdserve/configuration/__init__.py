"""What the daemon is told: the command line and a file in TOML; a module a part of it."""
