"""The transformer, one file per section of the paper."""
