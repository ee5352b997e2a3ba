"""Several encoders side by side: who takes part, what is known of each, the table and the page."""
