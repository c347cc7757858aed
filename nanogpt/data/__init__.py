"""From text files to training batches: sources, tokens in shards, and their windows."""
