"""What a base is made of, from a configuration, a folder or numbers: layers, linear maps, parameters."""
