"""What an encoder says of single places of an image."""
