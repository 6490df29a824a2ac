"""Looking inside: noise levels and solvers, measured and drawn."""
