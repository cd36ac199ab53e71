"""Episodes in, batches out: schema, RLDS files, statistics, transforms, tokenizer, loader."""
