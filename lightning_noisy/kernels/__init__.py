"""Fast paths and the random source, each equal to its reference; nothing here knows a feature."""
