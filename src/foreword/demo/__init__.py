"""A small base model and four tasks that travel with the package."""
