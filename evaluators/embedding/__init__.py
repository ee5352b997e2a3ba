"""Features as files for other tools, and nearest images out of them."""
