"""A laboratory of faults: systems with one fault planted in each, and healthy ones."""
