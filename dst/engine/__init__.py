"""Training a model sparsely: the loop protocol, the plan of an update, its state."""
