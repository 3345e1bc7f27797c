"""Code that the families share: choice of the backend, loaders, launches, tiles, arithmetic of rows."""
