"""The doors: each reads its arguments, builds the parts and hands them to each other."""
