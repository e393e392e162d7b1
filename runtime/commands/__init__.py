"""What each command does, a file a command. cli.py parses; these work on plain settings."""
