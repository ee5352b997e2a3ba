"""The papers' linear probes: heads trained on augmented images, which the encoder sees anew in each epoch."""
