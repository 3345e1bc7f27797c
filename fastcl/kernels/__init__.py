"""The operators and the backends that compute them. Nothing here knows a loss."""
