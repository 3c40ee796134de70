"""From models to scores. Benchmarks come here; training validates on held-out rows by itself."""
