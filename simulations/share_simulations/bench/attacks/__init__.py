"""``share-sim bench attacks``: what hostile organisations can do to a space, with the defence and without it."""
