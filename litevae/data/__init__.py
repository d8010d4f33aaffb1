"""Images to train, validate and encode: sources, crops, squares and the list of unreadable images."""
