"""From text on disk to packed batches."""
