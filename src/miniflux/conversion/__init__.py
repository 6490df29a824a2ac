"""Files into files: other layouts, other formats, whole pipelines."""
