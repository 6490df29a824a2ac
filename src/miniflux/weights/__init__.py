"""From the name of a model to its files: where they are, where they come from, which they were."""
