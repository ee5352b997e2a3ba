"""Shards made of what people have: a source lists images, a plan deals them out, a writer makes tars of them."""
