"""What the families share on a backend: the choice of one, loaders, launches, tiles, arithmetic of rows."""
