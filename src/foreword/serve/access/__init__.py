"""Who may do what: keys, grants, limits, and the admin API."""
