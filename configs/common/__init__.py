"""What configs are built from."""
