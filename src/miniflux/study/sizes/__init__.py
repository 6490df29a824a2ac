"""What a model costs: parameters, operations, bytes; and how it is built, drawn from its modules."""
