"""A comparison as one HTML file: its words and tables, its charts, and the pictures that need the encoders."""
