"""What many processes need to be one run: the same code and data, one end, and a word about who is missing."""
