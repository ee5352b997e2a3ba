"""Fine-tuning: an encoder and a head trained on labels, from a source to a result."""
