"""What a frozen encoder is worth: its features taken once, then weighed by neighbours and by linear heads."""
