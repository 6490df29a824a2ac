"""Values inside the networks: which there are, kept while pictures are drawn, changed, or taken from another run."""
