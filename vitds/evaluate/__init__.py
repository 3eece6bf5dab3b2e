"""(frozen features, labels) -> metrics: top-1, kNN, linear probe."""
