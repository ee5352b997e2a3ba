"""The data path: tar shards in, batches of uint8 views out. Imports nothing of ours."""
