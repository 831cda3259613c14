"""Tools of contributors; nothing here is installed."""
